"""Trajectories: rigid, from the identity, and the way their names say."""

from __future__ import annotations

import pytest
import torch

from fw_model.cameras import (
    invert_pose,
    project,
)
from fw_model.trajectories import TRAJECTORIES, make_trajectory


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_trajectories_are_rigid_and_start_at_the_identity(name: str) -> None:
    cameras = make_trajectory(name, 9, 64, 96)
    rotation = cameras.w2c[:, :, :3]
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).expand(9, 3, 3), atol=1e-5, rtol=0)
    assert (torch.linalg.det(rotation) > 0).all()
    assert torch.equal(cameras.w2c[0], torch.eye(3, 4))
    assert not torch.allclose(cameras.w2c[4], cameras.w2c[0])


def where_is(name: str, point: tuple[float, float, float]) -> tuple[float, float]:
    """Pixel of a world point in the last frame of a trajectory, from the image centre."""
    cameras = make_trajectory(name, 9, 64, 96)
    pixels, _ = project(torch.tensor([point]), cameras.intrinsics[-1], cameras.w2c[-1])
    return pixels[0, 0].item() - 48, pixels[0, 1].item() - 32


def test_trajectories_move_the_way_they_are_named() -> None:
    ahead = (0.0, 0.0, 2.0)
    assert where_is("pan_right", ahead)[0] < -1  # what was ahead is now on the left
    assert where_is("pan_left", ahead)[0] > 1
    assert where_is("tilt_up", ahead)[1] > 1
    assert where_is("tilt_down", ahead)[1] < -1
    assert where_is("truck_right", ahead)[0] < 0 < where_is("truck_left", ahead)[0]
    assert where_is("pedestal_up", ahead)[1] > 0 > where_is("pedestal_down", ahead)[1]
    aside = (0.2, 0.0, 2.0)
    assert where_is("zoom_out", aside)[0] < where_is("zoom_in", aside)[0]
    centres = invert_pose(make_trajectory("orbit_right", 9, 64, 96).w2c)[:, :, 3]
    assert centres[-1, 0] > 0.1
    assert invert_pose(make_trajectory("orbit_left", 9, 64, 96).w2c)[-1, 0, 3] < -0.1


@pytest.mark.parametrize("name", ["truck_left", "truck_right", "pedestal_up", "pedestal_down"])
def test_trucks_and_pedestals_shift_and_pans_and_tilts_turn(name: str) -> None:
    shifted = make_trajectory(name, 9, 64, 96).w2c
    assert torch.equal(shifted[..., :3], torch.eye(3).expand(9, 3, 3).to(shifted))
    turned = make_trajectory({"truck": "pan_left", "pedestal": "tilt_up"}[name.partition("_")[0]], 9, 64, 96).w2c
    assert torch.equal(turned[..., 3], torch.zeros(9, 3).to(turned))


@pytest.mark.parametrize("name", ["orbit_left", "orbit_right", "orbit_360deg", "spiral"])
def test_orbits_and_spiral_keep_looking_at_their_centre(name: str) -> None:
    assert where_is(name, (0.0, 0.0, 1.0)) == pytest.approx((0, 0), abs=1e-3)


def test_full_orbit_ends_where_it_began() -> None:
    w2c = make_trajectory("orbit_360deg", 17, 64, 96).w2c
    torch.testing.assert_close(w2c[-1], w2c[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(invert_pose(w2c)[8, :, 3], torch.tensor([0.0, 0.0, 2.0]), atol=1e-5, rtol=0)


def test_unknown_trajectory_is_refused_with_the_names() -> None:
    with pytest.raises(ValueError, match="orbit_360deg"):
        make_trajectory("loop", 5, 32, 32)
