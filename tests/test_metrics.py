"""Camera and depth metrics."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from fw_model import metrics
from fw_model.metrics import (
    absrel,
    align_sim3,
    ate,
    auc,
    camera_centres,
    delta125,
    path_extent,
    project_to_so3,
    relative_pose_errors,
    rpe,
    rra,
    rta,
)


def path(frames: int = 8, seed: int = 0) -> np.ndarray:
    """A smooth turning path, w2c [T, 3, 4]."""
    rng = np.random.default_rng(seed)
    centres = np.cumsum(rng.normal(size=(frames, 3)), axis=0)
    rotation = Rotation.from_rotvec(np.linspace(0, 1, frames)[:, None] * rng.normal(size=3)).as_matrix()
    return np.concatenate([rotation, -rotation @ centres[:, :, None]], axis=2)


def seen_from(w2c: np.ndarray, scale: float, rotation: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """The same cameras in a world x' = scale * rotation @ x + shift."""
    centres = scale * camera_centres(w2c) @ rotation.T + shift
    turned = w2c[:, :, :3] @ rotation.T
    return np.concatenate([turned, -turned @ centres[:, :, None]], axis=2)


similarities = st.tuples(st.floats(0.01, 100), st.integers(0, 10_000), st.lists(st.floats(-50, 50), min_size=3, max_size=3))


@given(similarity=similarities)
@settings(max_examples=30, deadline=None)
def test_alignment_recovers_any_similarity(similarity: tuple) -> None:
    scale, seed, shift = similarity
    rotation = Rotation.random(random_state=seed).as_matrix()
    points = np.random.default_rng(seed).normal(size=(10, 3))
    found = align_sim3(points, scale * points @ rotation.T + shift)
    assert found.scale == pytest.approx(scale)
    np.testing.assert_allclose(found.rotation, rotation, atol=1e-9)
    np.testing.assert_allclose(found.apply(points), scale * points @ rotation.T + shift, atol=1e-9 * scale + 1e-9)


@given(similarity=similarities)
@settings(max_examples=30, deadline=None)
def test_pose_metrics_do_not_see_a_similarity_of_the_world(similarity: tuple) -> None:
    scale, seed, shift = similarity
    gt = path(seed=seed)
    est = seen_from(gt, scale, Rotation.random(random_state=seed).as_matrix(), np.array(shift))
    assert ate(est, gt) == pytest.approx(0, abs=1e-9)
    assert rpe(est, gt) == pytest.approx((0, 0), abs=1e-5)
    rotation, translation = relative_pose_errors(est, gt)
    assert max(rotation.max(), translation.max()) < 1e-4
    assert auc(rotation, translation) == 1


def test_alignment_never_mirrors() -> None:
    points = np.random.default_rng(0).normal(size=(10, 3))
    found = align_sim3(points, points * [1, 1, -1])
    assert np.linalg.det(found.rotation) == pytest.approx(1)


def test_alignment_is_the_least_squares_one() -> None:
    rng = np.random.default_rng(0)
    source, target = rng.normal(size=(12, 3)), rng.normal(size=(12, 3))
    best = align_sim3(source, target)
    cost = ((best.apply(source) - target) ** 2).sum()
    for _ in range(50):
        turn = Rotation.from_rotvec(0.05 * rng.normal(size=3)).as_matrix() @ best.rotation
        other = (best.scale + 0.05 * rng.normal()) * source @ turn.T + best.translation + 0.05 * rng.normal(size=3)
        assert ((other - target) ** 2).sum() >= cost


@pytest.mark.parametrize(
    ("source", "target"),
    [(np.zeros((0, 3)), np.zeros((0, 3))), (np.zeros((3, 3)), np.zeros((2, 3))), (np.full((3, 3), np.nan), np.zeros((3, 3)))],
)
def test_alignment_refuses_what_it_cannot_align(source: np.ndarray, target: np.ndarray) -> None:
    with pytest.raises(ValueError, match="align_sim3"):
        align_sim3(source, target)


def test_a_still_estimate_has_the_spread_of_the_truth_as_error() -> None:
    gt = path()
    still = np.broadcast_to(np.eye(3, 4), gt.shape)
    centres = camera_centres(gt)
    spread = np.sqrt(((centres - centres.mean(0)) ** 2).sum(1).mean())
    assert ate(still, gt) == pytest.approx(spread / path_extent(gt))


def test_ate_is_a_fraction_of_the_true_paths_extent() -> None:
    gt = path(40)
    est = gt.copy()
    noise = np.random.default_rng(1).normal(scale=0.01 * path_extent(gt), size=(40, 3))
    est[:, :, 3] += noise
    assert ate(est, gt) == pytest.approx(0.01 * math.sqrt(3), rel=0.25)


def test_ate_without_motion_is_refused() -> None:
    still = np.broadcast_to(np.eye(3, 4), (4, 3, 4))
    with pytest.raises(ValueError, match="does not move"):
        ate(path(4), still)


def test_rpe_measures_a_known_step() -> None:
    gt = path(2)
    turn = Rotation.from_euler("x", 7, degrees=True).as_matrix()
    est = gt.copy()
    est[1] = turn @ est[1]  # turns the second camera on the spot
    assert rpe(est, gt)[1] == pytest.approx(7)
    with pytest.raises(ValueError, match="delta"):
        rpe(est, gt, delta=2)


def test_rotation_error_of_a_turned_camera() -> None:
    gt = path(3)
    est = gt.copy()
    est[2] = Rotation.from_euler("y", 20, degrees=True).as_matrix() @ est[2]
    rotation, _ = relative_pose_errors(est, gt)
    assert rotation == pytest.approx([0, 20, 20], abs=1e-5)  # pairs 01, 02, 12
    assert rra(rotation) == pytest.approx(1 / 3)
    assert rra(rotation, 21) == 1


def test_half_turn_and_tiny_turn_are_measured_exactly() -> None:
    for degrees in (180.0, 179.999, 1e-6):
        gt = path(2)
        est = gt.copy()
        est[1] = Rotation.from_euler("z", degrees, degrees=True).as_matrix() @ est[1]
        assert relative_pose_errors(est, gt)[0][0] == pytest.approx(degrees, abs=1e-9)


def test_translation_direction_error_needs_no_scale() -> None:
    gt = np.tile(np.eye(3, 4), (3, 1, 1))
    gt[:, :, 3] = [[0, 0, 0], [1, 0, 0], [2, 0, 0]]
    est = gt.copy()
    est[1, :, 3] = [3, 0, 0]
    est[2, :, 3] = [3, 3, 0]
    _, translation = relative_pose_errors(est, gt)
    assert translation == pytest.approx([0, 45, 90])
    assert rta(translation) == pytest.approx(1 / 3)


def test_pairs_without_true_translation_have_no_direction_error_but_a_missing_one_counts() -> None:
    gt = np.tile(np.eye(3, 4), (3, 1, 1))
    gt[2, 0, 3] = 1
    moved = gt.copy()
    moved[1, 1, 3] = 0.3
    assert relative_pose_errors(moved, gt)[1][0] == 0
    still = np.tile(np.eye(3, 4), (3, 1, 1))
    assert relative_pose_errors(still, gt)[1].tolist() == [0, 180, 180]


def test_auc_is_the_mean_share_over_whole_degree_thresholds() -> None:
    rotation, translation = np.array([0.5, 10.5, 100.0]), np.array([0.2, 20.5, 1.0])
    worst = [0.5, 20.5, 100.0]
    expected = np.mean([np.mean([w < threshold for w in worst]) for threshold in range(1, 31)])
    assert auc(rotation, translation) == pytest.approx(expected)
    assert auc(rotation, translation) == pytest.approx((30 + 10) / 90)


def test_projection_gives_the_nearest_rotation() -> None:
    rng = np.random.default_rng(0)
    noisy = Rotation.random(20, random_state=0).as_matrix() + 0.1 * rng.normal(size=(20, 3, 3))
    projected = project_to_so3(noisy)
    np.testing.assert_allclose(projected @ projected.transpose(0, 2, 1), np.broadcast_to(np.eye(3), (20, 3, 3)), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(projected), 1)
    distance = ((projected - noisy) ** 2).sum((1, 2))
    for _ in range(20):
        nearby = Rotation.from_rotvec(0.02 * rng.normal(size=(20, 3))).as_matrix() @ projected
        assert (((nearby - noisy) ** 2).sum((1, 2)) >= distance).all()
    mirrored = project_to_so3(np.diag([1.0, 1.0, -1.0]))
    assert np.linalg.det(mirrored) == pytest.approx(1)


def test_rotations_are_projected_before_they_are_compared() -> None:
    gt = path()
    noisy = gt.copy()
    noisy[:, :, :3] += 0.05 * np.random.default_rng(0).normal(size=(8, 3, 3))
    proper = noisy.copy()
    proper[:, :, :3] = project_to_so3(noisy[:, :, :3])
    assert ate(noisy, gt) == pytest.approx(ate(proper, gt))
    assert rpe(noisy, gt) == pytest.approx(rpe(proper, gt))
    np.testing.assert_allclose(relative_pose_errors(noisy, gt), relative_pose_errors(proper, gt), atol=1e-9)


@given(scale=st.floats(0.01, 100))
@settings(deadline=None)
def test_depth_metrics_take_one_scale_per_clip(scale: float) -> None:
    depth = np.random.default_rng(0).uniform(1, 5, size=(3, 8, 8))
    valid = np.ones_like(depth, bool)
    assert absrel(depth * scale, depth, valid) == pytest.approx(0, abs=1e-9)
    assert delta125(depth * scale, depth, valid) == 1


def test_a_scale_that_changes_between_frames_is_an_error() -> None:
    depth = np.random.default_rng(0).uniform(1, 5, size=(3, 8, 8))
    flicker = depth * np.array([1.0, 1.0, 2.0])[:, None, None]
    assert absrel(flicker, depth, np.ones_like(depth, bool)) == pytest.approx(1 / 3)
    assert delta125(flicker, depth, np.ones_like(depth, bool)) == pytest.approx(2 / 3)


def test_depth_metrics_of_known_errors() -> None:
    target = np.full(10, 2.0)
    predicted = np.array([2.0] * 8 + [3.0, 1.0])
    valid = np.ones(10, bool)
    assert absrel(predicted, target, valid) == pytest.approx(0.1)
    assert delta125(predicted, target, valid) == pytest.approx(0.8)


def test_invalid_pixels_do_not_count_and_bad_predictions_do() -> None:
    target = np.array([1.0, 2.0, 3.0, 0.0])
    valid = np.array([True, True, False, True])
    predicted = np.array([1.0, 2.0, np.nan, 77.0])
    assert absrel(predicted, target, valid) == 0
    assert delta125(predicted, target, valid) == 1
    predicted[1] = np.nan
    assert math.isnan(absrel(predicted, target, valid))
    assert delta125(predicted, target, valid) == 0.5


def test_nothing_valid_gives_nan() -> None:
    nothing = np.zeros(3)
    assert math.isnan(absrel(nothing, nothing, nothing.astype(bool)))
    assert math.isnan(delta125(nothing, nothing, nothing.astype(bool)))


def test_path_errors_are_evos_on_a_published_pair_of_paths() -> None:
    """evo 1.38.1, APE and RPE (all pairs, frames) after `align(correct_scale=True)`: RMSE in metres, and degrees."""
    rows = np.loadtxt(Path(__file__).parent / "reference" / "freiburg1_xyz_keyframes.txt")

    def world_to_camera(poses: np.ndarray) -> np.ndarray:
        rotation = Rotation.from_quat(poses[:, 3:]).as_matrix().transpose(0, 2, 1)
        return np.concatenate([rotation, -rotation @ poses[:, :3, None]], axis=2)

    true, estimated = world_to_camera(rows[:, :7]), world_to_camera(rows[:, 7:])
    extent = path_extent(true)
    assert ate(estimated, true) * extent == pytest.approx(0.00975458189868511, rel=1e-6)
    for delta, metres, degrees in ((1, 0.013834917845974076, 0.8848489597243393), (5, 0.018477869477818393, 1.1156548121495513)):
        translation, rotation = rpe(estimated, true, delta)
        assert translation * extent == pytest.approx(metres, rel=1e-6)
        assert rotation == pytest.approx(degrees, rel=1e-5)


@pytest.mark.parametrize("metric", [ate, rpe, relative_pose_errors])
def test_paths_of_different_length_are_refused(metric) -> None:
    with pytest.raises(ValueError, match=r"poses|arrays"):
        metric(path(4), path(5))


def test_poses_that_are_not_finite_are_refused() -> None:
    bad = path()
    bad[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="finite"):
        ate(bad, path())


# ---- points, lens, agreement, stillness, confidence: each against plain loops


def a_scene(frames: int = 3, height: int = 6, width: int = 8) -> dict[str, np.ndarray]:
    """Depth, its points in the world, and the cameras that see it."""
    rng = np.random.default_rng(3)
    depth = rng.uniform(1, 3, (frames, height, width))
    intrinsics = np.tile(np.array([[7.0, 0, 4], [0, 7.0, 3], [0, 0, 1]]), (frames, 1, 1))
    w2c = np.stack([np.c_[Rotation.from_rotvec([0, 0.1 * t, 0]).as_matrix(), [0.2 * t, 0, 0]] for t in range(frames)])
    points = np.empty((*depth.shape, 3))
    for t, v, u in np.ndindex(depth.shape):
        seen = depth[t, v, u] * np.linalg.inv(intrinsics[t]) @ [u + 0.5, v + 0.5, 1]
        points[t, v, u] = w2c[t, :, :3].T @ (seen - w2c[t, :, 3])
    return {"depth": depth, "points": points, "w2c": w2c, "intrinsics": intrinsics}


def test_point_error_is_the_mean_distance_and_its_ratio_needs_no_scale() -> None:
    scene, rng = a_scene(), np.random.default_rng(4)
    valid = rng.random(scene["depth"].shape) > 0.3
    guess = scene["points"] + rng.normal(0, 0.1, scene["points"].shape)
    distance, ratio = metrics.point_error(guess, scene["points"], valid)
    pairs = [(guess[i], scene["points"][i]) for i in np.ndindex(valid.shape) if valid[i]]
    s = np.median([np.linalg.norm(g) / np.linalg.norm(p) for p, g in pairs])
    assert distance == pytest.approx(np.mean([np.linalg.norm(p - g) for p, g in pairs]))
    assert ratio == pytest.approx(np.mean([np.linalg.norm(s * p - g) / np.linalg.norm(g) for p, g in pairs]))
    assert metrics.point_error(5 * guess, scene["points"], valid)[1] == pytest.approx(ratio)
    assert np.isnan(metrics.point_error(guess, scene["points"], np.zeros_like(valid))).all()


def test_agreement_is_whole_for_one_scene_and_lost_with_any_of_its_three_parts() -> None:
    scene = a_scene()
    assert metrics.agreement(**scene) == 1
    assert metrics.agreement(**{**scene, "depth": 1.1 * scene["depth"]}) == 0
    assert metrics.agreement(**{**scene, "points": -scene["points"]}) == 0
    still = np.tile(np.eye(3, 4), (3, 1, 1))
    assert metrics.agreement(**{**scene, "w2c": still}) == pytest.approx(1 / 3, abs=0.1)  # the first frame is the world
    wide = scene["intrinsics"] * [[[2.0], [2.0], [1.0]]]
    assert metrics.agreement(**{**scene, "intrinsics": wide}) < 0.5


def test_agreement_is_what_plain_loops_count() -> None:
    scene, rng = a_scene(), np.random.default_rng(5)
    points = scene["points"] + rng.normal(0, 0.08, scene["points"].shape)
    agreeing = 0
    for t, v, u in np.ndindex(scene["depth"].shape):
        x, y, z = scene["w2c"][t, :, :3] @ points[t, v, u] + scene["w2c"][t, :, 3]
        pixel = (7 * x / z + 4 - (u + 0.5), 7 * y / z + 3 - (v + 0.5))
        d = scene["depth"][t, v, u]
        agreeing += z > 0 and abs(z - d) <= 0.05 * d and np.hypot(*pixel) <= 0.05 * 10
    assert 0 < agreeing < scene["depth"].size
    assert metrics.agreement(**{**scene, "points": points}) == pytest.approx(agreeing / scene["depth"].size)


def test_fov_error_is_in_degrees_of_both_sides() -> None:
    def lens(horizontal: float, vertical: float) -> np.ndarray:
        fx, fy = (0.5 * side / math.tan(math.radians(fov) / 2) for side, fov in ((640, horizontal), (480, vertical)))
        return np.array([[[fx, 0, 320], [0, fy, 240], [0, 0, 1]]])

    assert metrics.fov_error(lens(60, 45), lens(60, 45), 480, 640) == 0
    assert metrics.fov_error(lens(66, 41), lens(60, 45), 480, 640) == pytest.approx((6 + 4) / 2)


def test_flicker_sees_change_over_time_and_no_constant_factor() -> None:
    depth = a_scene()["depth"]
    valid = np.random.default_rng(6).random(depth.shape) > 0.2
    assert metrics.flicker(3 * depth, depth, valid) == pytest.approx(0, abs=1e-12)
    breathing = depth * np.array([1.0, 1.1, 1.0])[:, None, None]
    assert metrics.flicker(breathing, depth, valid) == pytest.approx(math.log(1.1))
    noisy = depth * np.random.default_rng(7).uniform(0.9, 1.1, depth.shape)
    terms = [
        abs(math.log(noisy[t + 1, v, u] / depth[t + 1, v, u]) - math.log(noisy[t, v, u] / depth[t, v, u]))
        for t, v, u in np.ndindex(2, *depth.shape[1:])
        if valid[t, v, u] and valid[t + 1, v, u]
    ]
    assert metrics.flicker(noisy, depth, valid) == pytest.approx(np.mean(terms))
    assert np.isnan(metrics.flicker(depth, depth, np.zeros_like(valid)))


def test_calibration_tells_confidence_that_knows_from_confidence_that_does_not() -> None:
    rng = np.random.default_rng(8)
    error = rng.exponential(1, 1000)
    curve, rank = metrics.calibration(error, 1 / error)
    assert rank == pytest.approx(-1)
    assert (np.diff(curve) < 0).all()
    assert curve[0] == pytest.approx(np.sort(error)[-100:].mean())
    assert abs(metrics.calibration(error, rng.random(1000))[1]) < 0.1
    assert np.isnan(metrics.calibration(error, np.ones(1000))[1])
    with pytest.raises(ValueError, match="3 errors but 2"):
        metrics.calibration(np.ones(3), np.ones(2))
