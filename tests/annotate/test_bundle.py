"""Cameras, lens and points from tracks."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fw_model import metrics
from fw_pipeline.annotate.bundle.adjust import Free, adjust, linearise, residuals
from fw_pipeline.annotate.bundle.certainty import Profile, refocused
from fw_pipeline.annotate.bundle.engine import BundleEngine
from fw_pipeline.annotate.bundle.joint import joint_lens
from fw_pipeline.annotate.bundle.refuse import check, require_lens, require_motion
from fw_pipeline.annotate.bundle.solution import Solution
from fw_pipeline.annotate.bundle.solve import solve
from fw_pipeline.annotate.bundle.starts import depth_agreement
from fw_pipeline.annotate.bundle.state import Observations, State
from fw_pipeline.annotate.motion_kind import MotionKind, motion_kind
from fw_pipeline.annotate.tracks import Tracks
from fw_pipeline.annotate.types import ClipSetAside
from tests.helpers.made_tracks import Made, made_scene, rendered_planes


@pytest.fixture(scope="module")
def walk() -> tuple[Made, Solution]:
    made = made_scene("walk", bad=0.15)
    return made, solve(made.tracks)


def true_state(made: Made) -> tuple[Observations, State]:
    k, reference = made.intrinsics, made.tracks.frames // 2
    obs = Observations.of(made.tracks.xy, made.tracks.seen, reference, (k[0, 0], k[1, 1]), (k[0, 2], k[1, 2]))
    xy = np.where(made.tracks.seen[:, reference, None], made.tracks.xy[:, reference], 0)
    ray = np.c_[(xy - k[:2, 2]) / k[0, 0], np.ones(len(xy))]
    length = np.linalg.norm(ray, axis=1)
    return obs, State(
        made.w2c[None, :, :, :3],
        made.w2c[None, :, :, 3],
        (ray / length[:, None])[None],
        (made.inverse_depth / length)[None],
        np.zeros((1, 2)),
    )


def median_inverse(made: Made, found: Solution) -> tuple[np.ndarray, np.ndarray]:
    good = found.inlier & ~made.bad
    return 1 / found.points[good, 2], made.inverse_depth[good]


# ------------------------------------------------------------------------------------------------------ known answers


@pytest.mark.parametrize(("path", "focal"), [("walk", 0.5), ("side", 1.2), ("forward", 0.8)])
def test_cameras_lens_and_depth_order_of_a_made_scene_are_found(path: str, focal: float) -> None:
    made = made_scene(path, focal=focal)
    found = solve(made.tracks)
    check(found)
    assert found.focal == pytest.approx(focal, rel=0.02)
    assert metrics.ate(found.w2c, made.w2c) < 0.002
    assert depth_agreement(*median_inverse(made, found)) > 0.95
    assert found.placed.all()


def test_the_lens_lies_within_its_uncertainty(walk: tuple[Made, Solution]) -> None:
    _, found = walk
    assert 0.0005 < found.focal_std < 0.02
    assert abs(np.log(found.focal / 0.8)) < 4 * found.focal_std
    low, high = found.focal_interval
    assert low <= found.focal * 1.001
    assert high >= found.focal * 0.999


def test_tracks_that_follow_something_else_are_outliers(walk: tuple[Made, Solution]) -> None:
    made, found = walk
    placed = ~np.isnan(found.points[:, 0])
    assert found.outliers[made.bad & placed].mean() > 0.9
    assert found.outliers[~made.bad & placed].mean() < 0.03


def test_given_intrinsics_are_kept_as_they_are() -> None:
    made = made_scene("side")
    squeezed = np.diag([1.0, 1.25, 1.0]) @ made.intrinsics  # pixels that are not square
    xy = made.tracks.xy * np.array([1, 1.25], np.float32)
    found = solve(Tracks(xy, made.tracks.seen, 320, 448), squeezed)
    np.testing.assert_array_equal(found.intrinsics, squeezed)
    assert found.known_lens
    assert found.focal_std == 0
    assert metrics.ate(found.w2c, made.w2c) < 0.002


def test_a_long_clip_whose_points_come_and_go_is_solved() -> None:
    made = made_scene("walk", points=700, frames=61, step=2.0)
    r = np.random.default_rng(5)
    seen = made.tracks.seen.copy()
    for row, start, length in zip(seen, r.integers(-8, 55, 700), r.integers(8, 28, 700), strict=True):
        row[: max(start, 0)] = False
        row[max(start, 0) + length :] = False
    kept = seen.sum(1) >= 4
    xy = np.where(seen[..., None], made.tracks.xy, np.nan)[kept]
    found = solve(Tracks(xy, seen[kept], made.tracks.height, made.tracks.width))
    assert found.placed.all()
    assert found.focal == pytest.approx(0.8, rel=0.03)
    assert metrics.ate(found.w2c, made.w2c) < 0.005


# ---------------------------------------------------------------------------------------------------------- invariants


@settings(deadline=None, max_examples=15)
@given(st.floats(0.05, 20), st.booleans())
def test_errors_do_not_depend_on_the_scenes_size_or_its_sign(size: float, flipped: bool) -> None:
    obs, state = true_state(made_scene("side", points=40, frames=5))
    factor = -size if flipped else size
    other = replace(state, translation=state.translation * factor, inverse=state.inverse / factor)
    np.testing.assert_allclose(residuals(obs, other), residuals(obs, state), atol=1e-8)


@settings(deadline=None, max_examples=15)
@given(st.floats(0.4, 2.5))
def test_refocusing_there_and_back_changes_nothing(factor: float) -> None:
    obs, state = true_state(made_scene("walk", points=40, frames=5))
    back = refocused(refocused(state, np.array([factor])), np.array([1 / factor]))
    np.testing.assert_allclose(residuals(obs, back), residuals(obs, state), atol=1e-7)


def test_a_mirrored_mirror_is_the_scene() -> None:
    _, state = true_state(made_scene("walk", points=40, frames=5))
    twice = state.mirrored().mirrored()
    np.testing.assert_allclose(twice.inverse, state.inverse)
    np.testing.assert_allclose(twice.translation, state.translation)


def test_derivatives_are_those_of_the_errors() -> None:
    obs, state = true_state(made_scene("walk", points=12, frames=4))
    linear = linearise(obs, state, Free(lens=2), scale=1e6)  # no down-weighting
    step = 1e-6
    for lens in range(2):
        change = np.zeros((1, 2))
        change[0, lens] = step
        numeric = (residuals(obs, replace(state, log_focal=state.log_focal + change)) - residuals(obs, state)) / step
        np.testing.assert_allclose(np.moveaxis(linear.lens[lens], 0, -1), numeric, atol=1e-3)
    moved = replace(state, translation=state.translation + np.array([0, 0, step]))
    numeric = (residuals(obs, moved) - residuals(obs, state)) / step
    np.testing.assert_allclose(np.moveaxis(linear.pose[5], 0, -1), numeric, atol=1e-3)
    numeric = (residuals(obs, replace(state, inverse=state.inverse + step)) - residuals(obs, state)) / step
    np.testing.assert_allclose(np.moveaxis(linear.point[2], 0, -1), numeric, atol=1e-3)


def test_the_order_of_tracks_does_not_matter(walk: tuple[Made, Solution]) -> None:
    made, found = walk
    order = np.random.default_rng(1).permutation(len(made.tracks))
    other = solve(made.tracks.subset(order))
    assert other.focal == pytest.approx(found.focal, rel=0.005)
    assert metrics.ate(other.w2c, found.w2c) < 0.001
    assert np.mean(other.inlier == found.inlier[order]) > 0.98


def test_adjusting_never_raises_the_cost_and_solves_side_by_side_as_alone() -> None:
    obs, state = true_state(made_scene("walk", points=60, frames=7))
    r = np.random.default_rng(0)
    shaken = State(*(np.concatenate([v, v]) for v in vars(state).values()))
    shaken = replace(shaken, translation=shaken.translation + r.normal(0, 0.02, shaken.translation.shape))
    both = adjust(obs, shaken, Free(), 0.7, steps=15)
    alone = adjust(obs, shaken.take([1]), Free(), 0.7, steps=15)
    assert (both.cost <= (np.log1p((residuals(obs, shaken) ** 2).sum(-1) / 0.49) * 0.49).sum(-1)).all()
    assert both.cost[1] == pytest.approx(alone.cost[0], rel=1e-6)


# -------------------------------------------------------------------------------------------------- what shows no depth


@pytest.mark.parametrize(
    ("scene", "kind", "words"),
    [
        ({"path": "still", "turn": 0.0}, MotionKind.STILL, "does not move"),
        ({"path": "still"}, MotionKind.TURNING, "only turns"),
        ({"path": "still", "drift": 0.5}, MotionKind.TURNING, "only turns"),
        ({"path": "still", "zoom": 0.4}, MotionKind.ZOOMING, r"turns and zooms \(\+"),
    ],
)
def test_a_motion_without_depth_is_refused_by_its_name(scene: dict[str, float], kind: MotionKind, words: str) -> None:
    found = solve(made_scene(**scene).tracks)  # type: ignore[arg-type]
    assert motion_kind(found.motion) is kind
    with pytest.raises(ClipSetAside, match=words):
        require_motion(found)


def test_motions_with_depth_have_names() -> None:
    assert motion_kind(solve(made_scene("forward").tracks).motion) is MotionKind.FORWARD
    assert motion_kind(solve(made_scene("walk", plane=True).tracks).motion) is MotionKind.PLANE


def test_a_zoom_is_found_and_refused() -> None:
    found = solve(made_scene("walk", zoom=0.4).tracks)
    assert found.zooms
    with pytest.raises(ClipSetAside, match="zooms"):
        check(found)


def test_a_scene_too_far_away_is_refused_rather_than_guessed() -> None:
    found = solve(made_scene("side", focal=3.0, depth=(60, 80), step=0.3, drift=0.3).tracks)
    with pytest.raises(ClipSetAside):
        check(found)


def test_too_few_tracks_are_refused_with_the_numbers() -> None:
    with pytest.raises(ClipSetAside, match="too few tracks: 20"):
        solve(made_scene(points=20).tracks)
    empty = Tracks(np.zeros((0, 9, 2), np.float32), np.zeros((0, 9), bool), 256, 448)
    with pytest.raises(ClipSetAside, match="too few tracks: 0"):
        solve(empty)


# --------------------------------------------------------------------------------------------------- a lens for a video


def with_profile(found: Solution, focal: float, std: float) -> Solution:
    """As if this clip had said that."""
    logs = np.linspace(-1.2, 1.2, 25)
    cost = 100 + ((logs - np.log(focal)) / std) ** 2
    profile = Profile(logs, cost, 1.0, float(np.log(focal)), std)
    k = found.intrinsics.copy()
    k[0, 0] = k[1, 1] = focal * 448
    return replace(found, intrinsics=k, lens=replace(found.lens, std=std, profile=profile))


def test_clips_that_agree_give_one_sharper_lens(walk: tuple[Made, Solution]) -> None:
    _, found = walk
    lens = joint_lens([with_profile(found, f, 0.04) for f in (0.78, 0.82, 0.8)])
    assert lens.focal == pytest.approx(0.8, rel=0.01)
    assert lens.std < 0.035
    assert not lens.zooms


def test_a_clip_that_cannot_tell_takes_the_others_lens(walk: tuple[Made, Solution]) -> None:
    _, found = walk
    flat = with_profile(found, 2.0, 2.0)
    with pytest.raises(ClipSetAside, match="lens not determined"):
        require_lens(flat)
    lens = joint_lens([with_profile(found, 0.8, 0.02), flat])
    assert lens.focal == pytest.approx(0.8, rel=0.01)
    assert lens.clips.all()


def test_clips_none_of_which_can_tell_are_refused(walk: tuple[Made, Solution]) -> None:
    _, found = walk
    with pytest.raises(ClipSetAside, match="over all 2 clips"):
        joint_lens([with_profile(found, 1.0, 0.5), with_profile(found, 1.5, 0.5)])


def test_a_clip_that_shows_no_depth_is_no_witness(walk: tuple[Made, Solution]) -> None:
    _, found = walk
    turning = replace(found, motion=replace(found.motion, turning_ratio=1.2))
    lens = joint_lens([with_profile(found, 0.8, 0.02), with_profile(turning, 1.5, 0.01)])
    assert lens.focal == pytest.approx(0.8, rel=0.01)
    with pytest.raises(ClipSetAside, match="in none of"):
        joint_lens([with_profile(turning, 1.5, 0.01)])


def test_a_clip_with_another_lens_is_named_and_keeps_its_own(walk: tuple[Made, Solution]) -> None:
    _, found = walk
    lens = joint_lens([with_profile(found, f, 0.01) for f in (0.8, 0.81, 1.3)])
    assert lens.zooms
    assert lens.clips.tolist() == [True, True, False]
    assert lens.focal == pytest.approx(0.805, rel=0.01)
    assert lens.each[2] == pytest.approx(1.3)


# -------------------------------------------------------------------------------------------------------------- engine


def test_the_engine_goes_from_pictures_to_depth() -> None:
    pictures, w2c, _ = rendered_planes()
    engine = BundleEngine()
    found = engine.solve(pictures)
    assert found.focal == pytest.approx(0.8, rel=0.1)
    geometry = engine.finish(pictures, found)
    np.testing.assert_array_equal(geometry.w2c[0], np.eye(3, 4))
    assert metrics.ate(geometry.w2c, w2c) < 0.01
    assert not geometry.interpolated.any()
    assert (geometry.depth > 0).mean() > 0.5
    middle = geometry.depth[4]
    board, wall = middle[140:170, 200:240], middle[10:40, 330:400]  # 2.4 and 6 metres away
    assert np.median(wall[wall > 0]) / np.median(board[board > 0]) == pytest.approx(2.5, rel=0.1)
    assert "tracks" in engine.name
    assert engine.version != replace(engine, tracks=replace(engine.tracks, cell=20)).version


def test_ignored_regions_take_no_part() -> None:
    made = made_scene("walk")
    ignore = np.zeros((13, 256, 448), bool)
    ignore[:, :, 300:] = True
    found = BundleEngine().solve(made.tracks, ignore=ignore)
    assert len(found.tracks) < len(made.tracks)
    assert np.nanmean(found.tracks.xy[..., 0] > 300) < 0.1
