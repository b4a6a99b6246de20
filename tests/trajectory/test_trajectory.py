"""Camera paths: rigid, from the identity, the way their names say, without a jump; files read as they are meant or refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fw_model.cameras import Cameras, PoseFileError, invert_pose, project
from fw_model.trajectory.formats import CONVENTIONS, from_w2c, read_path_file, to_w2c, write_path_file
from fw_model.trajectory.moves import MOVES
from fw_model.trajectory.text import EASINGS, PathError, make_trajectory, parse_path, read_path
from tests.helpers.made_worlds import made_world

MOVING = [name for name in MOVES if name != "hold"]


def centres(text: str, frames: int = 9) -> torch.Tensor:
    return invert_pose(make_trajectory(text, frames, 64, 96).w2c)[:, :, 3]


def where_is(name: str, point: tuple[float, float, float]) -> tuple[float, float]:
    """Pixel of a world point in the last frame of a path, from the image centre."""
    cameras = make_trajectory(name, 9, 64, 96)
    pixels, _ = project(torch.tensor([point]), cameras.intrinsics[-1], cameras.w2c[-1])
    return pixels[0, 0].item() - 48, pixels[0, 1].item() - 32


# ------------------------------------------------------------------------------------------------------------- moves


@pytest.mark.parametrize("name", MOVING)
def test_moves_are_rigid_and_start_at_the_identity(name: str) -> None:
    cameras = make_trajectory(name, 9, 64, 96)
    rotation = cameras.w2c[:, :, :3]
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).expand(9, 3, 3), atol=1e-5, rtol=0)
    assert (torch.linalg.det(rotation) > 0).all()
    assert torch.equal(cameras.w2c[0], torch.eye(3, 4))
    assert not torch.allclose(cameras.w2c[3], cameras.w2c[0]) or not torch.allclose(cameras.intrinsics[3], cameras.intrinsics[0])


def test_moves_go_the_way_they_are_named() -> None:
    ahead, above, aside = (0.0, 0.0, 2.0), (0.0, -0.5, 2.0), (0.2, 0.0, 2.0)
    assert where_is("pan_right", ahead)[0] < -1  # what was ahead is now on the left
    assert where_is("pan_left", ahead)[0] > 1
    assert where_is("tilt_up", ahead)[1] > 1
    assert where_is("tilt_down", ahead)[1] < -1
    assert where_is("roll_right", above)[0] < -1  # what is above leans to the left as the camera leans to the right
    assert where_is("roll_left", above)[0] > 1
    assert where_is("truck_right", ahead)[0] < 0 < where_is("truck_left", ahead)[0]
    assert where_is("pedestal_up", ahead)[1] > 0 > where_is("pedestal_down", ahead)[1]
    assert where_is("dolly_out", aside)[0] < where_is("dolly_in", aside)[0]
    assert where_is("zoom_out", aside)[0] < where_is("zoom_in", aside)[0]
    assert centres("orbit_right")[-1, 0] > 0.1
    assert centres("orbit_left")[-1, 0] < -0.1
    assert centres("arc_up")[-1, 1] < -0.1
    assert torch.equal(centres("forward"), centres("dolly_in"))


@pytest.mark.parametrize("name", ["truck_left", "truck_right", "pedestal_up", "pedestal_down", "dolly_in", "dolly_zoom_in"])
def test_what_shifts_does_not_turn_and_what_turns_does_not_shift(name: str) -> None:
    shifted = make_trajectory(name, 9, 64, 96).w2c
    assert torch.equal(shifted[..., :3], torch.eye(3).expand(9, 3, 3).to(shifted))
    for turning in ("pan_left", "tilt_up", "roll_right", "zoom_in"):
        assert torch.equal(make_trajectory(turning, 9, 64, 96).w2c[..., 3], torch.zeros(9, 3))


@pytest.mark.parametrize("name", ["orbit_left", "orbit_360deg", "arc_up", "arc_down", "spiral", "figure_eight"])
def test_what_goes_around_keeps_looking_at_its_centre(name: str) -> None:
    assert where_is(name, (0.0, 0.0, 1.0)) == pytest.approx((0, 0), abs=1e-3)


def test_a_dolly_zoom_keeps_the_size_of_what_it_goes_round_and_a_zoom_its_place() -> None:
    for name in ("dolly_zoom_in", "dolly_zoom_out"):
        assert where_is(name, (0.2, 0.1, 1.0)) == pytest.approx(where_is("hold", (0.2, 0.1, 1.0)), rel=1e-4)
    lens = make_trajectory("zoom_in:2", 9, 64, 96).intrinsics
    assert float(lens[-1, 0, 0] / lens[0, 0, 0]) == pytest.approx(2, rel=1e-5)


@pytest.mark.parametrize("name", ["orbit_360deg", "figure_eight"])
def test_what_closes_ends_where_it_began(name: str) -> None:
    w2c = make_trajectory(name, 17, 64, 96).w2c
    torch.testing.assert_close(w2c[-1], w2c[0], atol=1e-5, rtol=0)


def test_a_hand_held_camera_shakes_a_little_and_always_alike() -> None:
    one, two = centres("handheld", 81), centres("handheld", 81)
    assert torch.equal(one, two)
    assert 0.003 < one.norm(dim=1).max() < 0.05
    turned = make_trajectory("handheld", 81, 64, 96).w2c[:, :, :3]
    angle = torch.rad2deg(torch.arccos(((turned.diagonal(dim1=1, dim2=2).sum(1) - 1) / 2).clamp(-1, 1)))
    assert 0.1 < angle.max() < 2


# ------------------------------------------------------------------------------------------------------- paths in words


def test_moves_are_joined_where_the_one_before_ended() -> None:
    path = centres("forward:1 20, pan_right:90 10, forward:1 20", 51)
    torch.testing.assert_close(path[20], torch.tensor([0.0, 0.0, 1.0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(path[30], path[20], atol=1e-5, rtol=0)
    torch.testing.assert_close(path[50], torch.tensor([1.0, 0.0, 1.0]), atol=1e-5, rtol=0)  # ahead is now to the right
    assert (path[1:] - path[:-1]).norm(dim=1).max() < 0.051


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(MOVES)), st.sampled_from(sorted(EASINGS)), st.integers(1, 30)), min_size=1, max_size=4
    ),
    st.integers(3, 20),
)
def test_any_joined_path_is_rigid_begins_at_the_identity_and_never_jumps(parts: list[tuple[str, str, int]], k: int) -> None:
    text = ", ".join(f"{name}:{MOVES[name].amount:g}:{easing} {length}" for name, easing, length in parts)
    coarse, fine = (make_trajectory(text, frames, 64, 96) for frames in (4 * k + 1, 8 * (4 * k) + 1))
    assert torch.equal(coarse.w2c[0], torch.eye(3, 4))
    rotation = fine.w2c[:, :, :3].double()
    assert (rotation @ rotation.mT - torch.eye(3)).abs().max() < 1e-5
    torch.testing.assert_close(fine.w2c[::8], coarse.w2c, atol=1e-4, rtol=0)  # the same path, seen more often
    torch.testing.assert_close(fine.intrinsics[::8], coarse.intrinsics, rtol=1e-4, atol=1e-3)
    steps = (fine.w2c[1:] - fine.w2c[:-1]).flatten(1).norm(dim=1)
    assert steps.max() < 0.2 + 200 * steps.median() + 30 / len(fine)


def test_easing_begins_and_ends_slowly_and_lengths_are_shares() -> None:
    eased, even = centres("forward:1:ease", 21)[:, 2], centres("forward:1", 21)[:, 2]
    assert eased[1] < even[1] / 3
    assert eased[-1] == pytest.approx(1)
    half = centres("forward:1 10, hold 30", 41)[:, 2]
    assert half[10] == pytest.approx(1, abs=1e-5)
    assert torch.equal(centres("forward:1 1, hold 3", 41)[:, 2], half)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("loop", "no move 'loop'"),
        ("obrit_left", "did you mean orbit_left"),
        ("", "is empty"),
        ("pan_left,,tilt_up", "is empty"),
        ("pan_left 10, tilt_up", "tilt_up has no length"),
        ("pan_left ten", "is no number"),
        ("pan_left -3", "above 0"),
        ("pan_left:nan", "not finite"),
        ("pan_left:30:slowly", "no easing"),
        ("truck_right_30deg", "clip units"),
        ("zoom_in:0", "0.05 to 20"),
        ("dolly_zoom_in:1", "less than 1"),
        ("arc_up:120", "below 90"),
        ("pan left", "no move 'pan'|is no number"),
    ],
)
def test_words_that_are_no_path_are_refused_by_name(text: str, said: str) -> None:
    with pytest.raises(PathError, match=said):
        parse_path(text)


def test_more_moves_than_frames_are_refused() -> None:
    with pytest.raises(PathError, match="4 moves in 3 frames"):
        make_trajectory("pan_left, tilt_up, pan_right, tilt_down", 3, 64, 96)


# --------------------------------------------------------------------------------------------------------------- files


def path() -> Cameras:
    return make_trajectory("orbit_right:40 5, tilt_up 3, zoom_in:1.3 5", 13, 64, 96)


@pytest.mark.parametrize("kind", ["rows", "tum", "json", "nerfstudio"])
def test_every_format_gives_back_what_was_written(tmp_path: Path, kind: Any) -> None:
    file = tmp_path / {"rows": "a.txt", "tum": "a.tum", "json": "a.json", "nerfstudio": "transforms.json"}[kind]
    write_path_file(file, path(), kind)
    found = read_path(str(file), None, 64, 96)
    assert (found.cameras.w2c - path().w2c).abs().max() < 1e-6
    if kind != "tum":  # which has no lens
        assert (found.cameras.intrinsics / path().intrinsics - 1).nan_to_num().abs().max() < 1e-6
    assert {"rows": "world-to-camera", "tum": "camera-to-world", "json": "w2c with opencv", "nerfstudio": "OpenGL"}[
        kind
    ] in found.said


def test_colmaps_model_of_a_world_is_read_as_colmap_reads_it(tmp_path: Path) -> None:
    world = made_world("orbit_right", frames=5)
    model = world.save(tmp_path / "w") / "sparse" / "0"
    found = read_path(str(model), None, 48, 80).cameras
    for image in pycolmap.Reconstruction(str(model)).images.values():
        pose = image.cam_from_world() if callable(image.cam_from_world) else image.cam_from_world
        assert found.w2c[image.image_id - 1].numpy() == pytest.approx(pose.matrix(), abs=1e-6)
    assert torch.allclose(found.intrinsics, world.cameras.intrinsics, rtol=1e-5)
    assert torch.allclose(read_path(str(tmp_path / "w" / "cameras.json"), None, 48, 80).cameras.w2c, world.cameras.w2c, atol=1e-6)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_a_stated_convention_is_read_as_it_says(tmp_path: Path, convention: Any) -> None:
    poses = from_w2c(path().w2c.double(), convention)
    torch.testing.assert_close(to_w2c(poses, convention), path().w2c.double())
    (tmp_path / "a.json").write_text(json.dumps({"convention": convention, "matrices": poses.tolist()}), encoding="utf-8")
    assert (read_path_file(tmp_path / "a.json", 64, 96).cameras.w2c - path().w2c).abs().max() < 1e-6


def square(poses: torch.Tensor) -> torch.Tensor:
    return torch.cat([poses, torch.tensor([0.0, 0, 0, 1], dtype=poses.dtype).expand(len(poses), 1, 4)], 1)


def mutations() -> dict[str, tuple[Any, str]]:
    """What people do to a list of matrices -> (the file's content, what is said)."""
    w2c = path().w2c.double()
    full = square(w2c)
    lens = [[0.5, 0.9, 0.5, 0.5]] * len(w2c)
    good: dict[str, Any] = {"convention": "w2c_opencv", "matrices": full.tolist()}
    scaled, mirrored, nan, bottom = full.clone(), full.clone(), full.clone(), full.clone()
    scaled[:, :3, :3] *= 1.5
    mirrored[4, 1] *= -1
    nan[2, 0, 0] = math.nan
    bottom[3, 3, 3] = 2
    sheared = full.clone()
    sheared[5, 0, 1] += 0.2
    return {
        "nothing stated": (full.tolist(), "does not say which way"),
        "no convention": ({"matrices": full.tolist()}, "must be stated"),
        "another word": ({**good, "convention": "blender"}, "must be stated"),
        "transposed": ({**good, "matrices": full.mT.tolist()}, "transposed"),
        "scaled rotations": ({**good, "matrices": scaled.tolist()}, "scaled by 1.5"),
        "one axis flipped": ({**good, "matrices": mirrored.tolist()}, "frame 4: mirrors"),
        "sheared": ({**good, "matrices": sheared.tolist()}, "frame 5: not a rotation"),
        "not finite": ({**good, "matrices": nan.tolist()}, "not finite"),
        "last row": ({**good, "matrices": bottom.tolist()}, "0 0 0 1"),
        "flat numbers": ({**good, "matrices": full.flatten(1).tolist()}, r"expected \[T, 3, 4\]"),
        "ragged": ({**good, "matrices": [full[0].tolist(), [1]]}, "not all 3 x 4"),
        "no poses": ({**good, "matrices": []}, "expected"),
        "words": ({**good, "matrices": [["a"]]}, "not all 3 x 4"),
        "half shares, half pixels": ({**good, "intrinsics": [[0.5, 400, 0.5, 200]] * len(w2c)}, "neither all shares"),
        "pixels of no picture": ({**good, "intrinsics": [[400, 400, 240, 160]] * len(w2c)}, "of which picture"),
        "no lens": ({**good, "intrinsics": [[0, 0.9, 0.5, 0.5]] * len(w2c)}, "positive"),
        "a lens too few": ({**good, "intrinsics": lens[1:]}, "one 3 x 3 matrix or fx fy cx cy a frame"),
    }


@pytest.mark.parametrize("name", mutations())
def test_a_list_that_was_tampered_with_is_refused_by_what_was_done(tmp_path: Path, name: str) -> None:
    content, said = mutations()[name]
    (tmp_path / "a.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(PoseFileError, match=said):
        read_path_file(tmp_path / "a.json", 64, 96)


def test_pixels_and_shares_are_told_apart(tmp_path: Path) -> None:
    w2c = path().w2c.double()
    good = {"convention": "w2c_opencv", "matrices": w2c.tolist(), "height": 480, "width": 720}
    read = []
    for lens in ([0.5, 0.75, 0.5, 0.5], [360.0, 360.0, 360.0, 240.0]):
        (tmp_path / "a.json").write_text(json.dumps({**good, "intrinsics": [lens] * len(w2c)}), encoding="utf-8")
        read.append(read_path_file(tmp_path / "a.json", 64, 96).cameras.intrinsics)
    torch.testing.assert_close(read[0], read[1])
    assert read[0][0, [0, 1, 0, 1], [0, 1, 2, 2]].tolist() == pytest.approx([48, 48, 48, 32])


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.tum", "0 0 0 0 0 0 0 2\n", "unit length"),
        ("a.tum", "0 0 0 0 0 0 0 1\n0 1 0 0 0 0 0 1\n", "do not increase"),
        ("a.tum", "0 0 0 0 0 0 0 1\n1 1 0 0\n", "2: 4 numbers"),
        ("images.txt", "1 1 0 0 0 0 0\n\n", "7 fields"),
        ("images.txt", "# nothing\n", "no images"),
        ("images.txt", "1 2 0 0 0 0 0 0 1 a.jpg\n\n", "unit length"),
        ("a.json", "{", "not JSON"),
        ("transforms.json", '{"frames": [{"file_path": "a"}]}', "not all 3 x 4"),
        ("a.txt", "1 2 3\n", "3 numbers"),
    ],
)
def test_files_that_are_no_path_are_refused_by_name(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(PoseFileError, match=said):
        read_path_file(tmp_path / name, 64, 96)


def test_a_distorted_lens_is_no_pinhole(tmp_path: Path) -> None:
    write_path_file(tmp_path / "transforms.json", path(), "nerfstudio")
    content = json.loads((tmp_path / "transforms.json").read_text())
    (tmp_path / "transforms.json").write_text(json.dumps({**content, "k1": 0.1}))
    with pytest.raises(PoseFileError, match="distorted"):
        read_path_file(tmp_path / "transforms.json", 64, 96)
    assert np.isfinite(path().w2c.numpy()).all()
