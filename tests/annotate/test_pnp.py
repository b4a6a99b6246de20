"""Cameras from world points, and what becomes of frames without one."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from fw_pipeline.annotate.pairwise.align import align, pair_graph, to_pixel_centres
from fw_pipeline.annotate.pairwise.pnp import PnPError, points_in_world, solve_pnp
from fw_pipeline.annotate.trajectory import fill_missing_poses, require_motion
from fw_pipeline.annotate.types import ClipSetAside
from fw_pipeline.demo.scenes import SHOTS
from fw_pipeline.demo.true_pairs import Spoil, TrueViews, integer_rays, pair_predictions, true_views

SHOT_OF = {plan.name: plan.shots[0] for plan in SHOTS}
ONES = np.ones((96, 128), np.float32)


@cache
def views(name: str) -> TrueViews:
    return true_views(SHOT_OF[name], 5)


def world_points(truth: TrueViews, frame: int) -> np.ndarray:
    return np.asarray((truth.points_in(frame, frame) - truth.w2c[frame, :, 3]) @ truth.w2c[frame, :, :3])


def with_outliers(points: np.ndarray, share: float, seed: int = 0) -> np.ndarray:
    rng, spoilt = np.random.default_rng(seed), points.copy()
    thrown = rng.random(points.shape[:2]) < share
    spoilt[thrown] = rng.uniform(points.min((0, 1)), points.max((0, 1)), (int(thrown.sum()), 3))
    return spoilt


@pytest.mark.parametrize("name", ["room_orbit", "hall_portrait", "studio_arc"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6])
def test_pnp_is_exact_among_outliers(name: str, share: float) -> None:
    truth = views(name)
    found = solve_pnp(with_outliers(world_points(truth, 3), share), ONES, truth.intrinsics)
    np.testing.assert_allclose(found.w2c, truth.w2c[3], atol=1e-6)  # the bar is 1e-4
    assert found.inlier_ratio == pytest.approx(1 - share, abs=0.03)
    assert found.reprojection_error < 1e-4


@pytest.mark.parametrize("origin", [None, 0.5])
def test_pnp_takes_pixel_centres_too(origin: float | None) -> None:
    truth = views("room_orbit")
    points = with_outliers(world_points(truth, 2), 0.3)
    found = solve_pnp(points, ONES, to_pixel_centres(truth.intrinsics), origin)
    np.testing.assert_allclose(found.w2c, truth.w2c[2], atol=1e-6)


def test_pnp_given_the_grid_does_not_guess_it() -> None:
    truth = views("room_orbit")
    found = solve_pnp(world_points(truth, 2), ONES, truth.intrinsics, origin=0.5)
    assert np.abs(found.w2c - truth.w2c[2]).max() > 1e-3


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.5, 3), st.floats(1e-2, 1e3))
def test_pnp_finds_any_camera_in_any_unit(seed: int, focal: float, unit: float) -> None:
    rng = np.random.default_rng(seed)
    lens = np.array([[64 * focal, 0, 32], [0, 60 * focal, 24], [0, 0, 1]])
    local = integer_rays(48, 64, lens) * rng.uniform(1, 4, (48, 64, 1)) * unit
    rotation = Rotation.random(random_state=seed).as_matrix()
    translation = unit * rng.normal(0, 5, 3)
    found = solve_pnp((local - translation) @ rotation, np.ones((48, 64)), lens)
    np.testing.assert_allclose(found.w2c[:, :3], rotation, atol=1e-5)
    np.testing.assert_allclose(found.w2c[:, 3], translation, atol=1e-4 * unit)


def test_pnp_takes_torch() -> None:
    truth = views("room_orbit")
    points = torch.from_numpy(world_points(truth, 1)).float()
    found = solve_pnp(points, torch.ones(96, 128), torch.from_numpy(truth.intrinsics))
    np.testing.assert_allclose(found.w2c, truth.w2c[1], atol=1e-5)


def test_pnp_leaves_out_what_the_network_is_unsure_of() -> None:
    truth = views("room_orbit")
    points, confidence = world_points(truth, 1), np.full((96, 128), 9.0)
    points[:60] = points[:60] * 1.3 + 1  # together: a pose of their own would fit them
    confidence[:60] = 1.05
    points[:5, :5] = np.nan
    found = solve_pnp(points, confidence, truth.intrinsics)
    np.testing.assert_allclose(found.w2c, truth.w2c[1], atol=1e-6)
    assert found.inlier_ratio == 1


def test_pnp_of_noisy_points_says_how_noisy() -> None:
    truth = views("room_orbit")
    rng = np.random.default_rng(0)
    clean = solve_pnp(world_points(truth, 1), ONES, truth.intrinsics)
    noisy = solve_pnp(world_points(truth, 1) + rng.normal(0, 0.03, (96, 128, 3)), ONES, truth.intrinsics)
    np.testing.assert_allclose(noisy.w2c, truth.w2c[1], atol=0.02)
    assert clean.reprojection_error < 0.01 < noisy.reprojection_error
    assert noisy.inlier_ratio < clean.inlier_ratio == 1


GRID = np.linspace(0, 1, 96 * 128).reshape(96, 128, 1)
HOPELESS = {
    "not finite": (np.full((96, 128, 3), np.nan), "only 0 usable points"),
    "constant": (np.ones((96, 128, 3)), "one point or lie on a line"),
    "a line": (1 + GRID * [1, 2, 3], "one point or lie on a line"),
    "scattered": (np.random.default_rng(0).standard_normal((96, 128, 3)), "fit"),
}


@pytest.mark.parametrize("what", HOPELESS)
def test_pnp_failure_is_an_error_with_the_reason_and_never_a_pose(what: str) -> None:
    points, reason = HOPELESS[what]
    with pytest.raises(PnPError, match=reason):
        solve_pnp(points, ONES, views("room_orbit").intrinsics)


def test_pnp_refuses_a_pose_that_few_points_fit() -> None:
    truth = views("room_orbit")
    with pytest.raises(PnPError, match="only .* % of the points fit one pose"):
        solve_pnp(with_outliers(world_points(truth, 3), 0.85), ONES, truth.intrinsics)


def test_pnp_without_confidence_is_an_error() -> None:
    truth = views("room_orbit")
    with pytest.raises(PnPError, match="only 0 usable points"):
        solve_pnp(world_points(truth, 1), 0 * ONES, truth.intrinsics)


def test_pnp_names_malformed_input() -> None:
    truth = views("room_orbit")
    with pytest.raises(ValueError, match="expected points"):
        solve_pnp(world_points(truth, 1), ONES[:50], truth.intrinsics)
    with pytest.raises(ValueError, match="not intrinsics"):
        solve_pnp(world_points(truth, 1), ONES, np.zeros((3, 3)))


def test_pnp_of_a_frame_between_keyframes_joins_the_aligned_clip() -> None:
    truth = true_views(SHOT_OF["room_orbit"], 9)
    keys, spoil = [0, 2, 4, 6, 8], Spoil(noise=0.01, outliers=0.1)
    keyframes = TrueViews(truth.depth[keys], truth.w2c[keys], truth.intrinsics)
    clip = align(pair_predictions(keyframes, pair_graph(5), spoil), 5)
    (pair,) = pair_predictions(truth, [(4, 5)], spoil)
    points = points_in_world(pair, clip.depth[2], clip.w2c[2])
    found = solve_pnp(points, pair.confidence_j, clip.intrinsics[2], origin=0.0).w2c
    to_metres = np.median(truth.depth[0]) / np.median(clip.depth[0])
    relative = truth.w2c[5, :, :3] @ truth.w2c[0, :, :3].T
    np.testing.assert_allclose(found[:, :3], relative, atol=3e-3)
    np.testing.assert_allclose(found[:, 3] * to_metres, truth.w2c[5, :, 3] - relative @ truth.w2c[0, :, 3], atol=0.02)


# -------------------------------------------------------------------------------------------------------- missing poses


def steady_path(count: int) -> np.ndarray:
    """Constant speed, constant turning."""
    rotation = Rotation.from_rotvec(np.arange(count)[:, None] * np.array([[0.01, 0.05, -0.02]])).as_matrix()
    centres = np.arange(count)[:, None] * np.array([[0.1, 0.0, 0.05]])
    return np.concatenate([rotation, -rotation @ centres[:, :, None]], axis=2)


def test_pnp_failures_are_interpolated_and_flagged() -> None:
    path = steady_path(20)
    poses = [None if t in (3, 4, 11) else path[t] for t in range(20)]
    found, interpolated = fill_missing_poses(poses)
    np.testing.assert_allclose(found, path, atol=1e-9)
    assert np.flatnonzero(interpolated).tolist() == [3, 4, 11]


def test_pnp_failures_at_the_ends_stand_still() -> None:
    path = steady_path(20)
    found, interpolated = fill_missing_poses([None, *path[1:18], None, None])
    np.testing.assert_allclose(found[[0, 18, 19]], path[[1, 17, 17]], atol=1e-12)
    assert interpolated.sum() == 3


@pytest.mark.parametrize(("failed", "count"), [(3, 10), (1, 4), (2, 2)])
def test_pnp_failing_on_more_than_a_fifth_rejects_the_clip(failed: int, count: int) -> None:
    with pytest.raises(ClipSetAside, match=f"{failed} of {count} frames"):
        fill_missing_poses([None] * failed + list(steady_path(count - failed)) if count > failed else [None] * failed)


def test_pnp_failing_on_a_fifth_is_allowed() -> None:
    assert fill_missing_poses([*steady_path(4), None])[1].tolist() == [False] * 4 + [True]


def test_pnp_poses_of_a_still_or_turning_camera_reject_the_clip() -> None:
    depth, path = np.full((20, 4, 6), 5.0), steady_path(20)
    require_motion(path, depth)
    turning = path.copy()
    turning[:, :, 3] = 0
    for still in (np.tile(path[:1], (20, 1, 1)), turning):
        with pytest.raises(ClipSetAside, match="does not move"):
            require_motion(still, depth)
    with pytest.raises(ClipSetAside, match="no depth"):
        require_motion(path, 0 * depth)
