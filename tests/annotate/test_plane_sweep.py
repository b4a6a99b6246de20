"""Plane-sweep depth is right where it claims something, and claims nothing where it cannot know."""

import numpy as np
import pytest

from fw_pipeline.annotate.colmap.plane_sweep import SweepSettings, choose_sources, depth_range, sweep_depth
from fw_pipeline.demo.render import intrinsics_of, render_frame
from fw_pipeline.demo.scenes import SCENES, Shot

SHOT = Shot("room", ((-0.5, -1.6, 0.6), (0.0, -1.65, 0.7), (0.6, -1.55, 0.8)), ((0, -0.9, 3.6), (0, -0.9, 3.6)), 7, 96, 160)
SETTINGS = SweepSettings(downsample=1, planes=48)


@pytest.fixture(scope="module")
def clip() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rendered frames [T, H, W, 3], depth [T, H, W], w2c [T, 3, 4], K [T, 3, 3]."""
    scene = SCENES[SHOT.scene]()
    frames, depth, w2c = zip(*(render_frame(scene, SHOT, t / (SHOT.frames - 1)) for t in range(SHOT.frames)), strict=True)
    return np.stack(frames), np.stack(depth), np.stack(w2c), np.repeat(intrinsics_of(SHOT)[None], SHOT.frames, 0)


@pytest.fixture(scope="module")
def swept(clip) -> tuple[np.ndarray, np.ndarray]:
    frames, depth, w2c, k = clip
    return sweep_depth(frames, w2c, k, depth.min((1, 2)) * 0.8, depth.max((1, 2)) * 1.3, SETTINGS)


def test_depth_is_right_where_it_is_given_and_most_pixels_have_one(clip, swept) -> None:
    truth, (depth, _) = clip[1], swept
    valid = depth > 0
    error = np.abs(depth - truth)[valid] / truth[valid]
    assert valid.mean() > 0.6
    assert np.median(error) < 0.015
    assert error.mean() < 0.05


def test_confidence_is_given_exactly_where_depth_is_and_is_higher_where_depth_is_right(clip, swept) -> None:
    truth, (depth, confidence) = clip[1], swept
    np.testing.assert_array_equal(confidence > 0, depth > 0)
    assert confidence.max() <= 1
    error = np.abs(depth - truth) / truth
    valid = depth > 0
    sure, unsure = (valid & (confidence >= np.median(confidence[valid]))), (valid & (confidence < np.median(confidence[valid])))
    assert error[sure].mean() < error[unsure].mean()


def test_nothing_is_claimed_of_a_grey_wall(clip) -> None:
    frames, depth, w2c, k = clip
    _, confidence = sweep_depth(np.full_like(frames, 128), w2c, k, depth.min((1, 2)), depth.max((1, 2)), SETTINGS)
    assert (confidence == 0).all()


def test_wrong_poses_are_noticed_by_the_cross_view_check(clip, swept) -> None:
    frames, depth, w2c, k = clip
    shuffled = w2c[np.array([3, 0, 5, 1, 6, 2, 4])]
    wrong, _ = sweep_depth(frames, shuffled, k, depth.min((1, 2)) * 0.8, depth.max((1, 2)) * 1.3, SETTINGS)
    assert (wrong > 0).mean() < 0.5 * (swept[0] > 0).mean()


def test_memory_bound_chunks_change_nothing(clip, swept) -> None:
    frames, depth, w2c, k = clip
    settings = SweepSettings(downsample=1, planes=48, chunk=2)
    again, _ = sweep_depth(frames, w2c, k, depth.min((1, 2)) * 0.8, depth.max((1, 2)) * 1.3, settings)
    np.testing.assert_array_equal(again, swept[0])


def test_halved_working_size_still_returns_the_frames_own_size(clip) -> None:
    frames, depth, w2c, k = clip
    out, _ = sweep_depth(frames, w2c, k, depth.min((1, 2)) * 0.8, depth.max((1, 2)) * 1.3, SweepSettings(planes=32))
    assert out.shape == depth.shape
    valid = out > 0
    assert np.median(np.abs(out - depth)[valid] / depth[valid]) < 0.03


def test_every_frame_gets_the_same_number_of_sources_on_both_sides_where_there_are_two() -> None:
    w2c = np.repeat(np.eye(3, 4)[None], 9, 0)
    w2c[:, 0, 3] = -0.1 * np.arange(9)
    sources = choose_sources(w2c, np.full(9, 3.0), (2.0, 5.0))
    assert {len(chosen) for chosen in sources} == {4}
    for t, chosen in enumerate(sources):
        assert t not in chosen
        assert len(set(chosen)) == 4
    assert min(sources[4]) < 4 < max(sources[4])


def test_a_depth_range_needs_points_in_front_of_the_camera() -> None:
    points = np.random.default_rng(0).uniform(-1, 1, (100, 3)) + [0, 0, 5]
    near, far = depth_range(points, np.eye(3, 4))
    assert near < 4.1
    assert far > 5.9
    with pytest.raises(ValueError, match="0 sparse points"):
        depth_range(points * [1, 1, -1], np.eye(3, 4))
