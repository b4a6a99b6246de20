"""Global alignment, fed with exact pointmaps of the demo's scenes and with spoilt ones."""

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from fw_model import metrics
from fw_pipeline.annotate.pairwise import refine as alignment_refine
from fw_pipeline.annotate.pairwise.align import Alignment, PairPrediction, align, pair_graph, to_pixel_centres
from fw_pipeline.annotate.pairwise.initial import Samples, State, initialise, sample_pixels
from fw_pipeline.annotate.pairwise.pair_graph import check_pairs
from fw_pipeline.annotate.pairwise.refine import cost_and_weight, refine, residuals
from fw_pipeline.annotate.types import ClipSetAside
from fw_pipeline.demo.scenes import SHOTS
from fw_pipeline.demo.true_pairs import Spoil, TrueViews, pair_predictions, true_views

RGBD = Path(__file__).parents[2].parent / "shared" / "data" / "rgbd"
ORBIT, HALL = (next(p for p in SHOTS if p.name == name).shots[0] for name in ("room_orbit", "hall_portrait"))
Edit = Callable[[PairPrediction], PairPrediction]


@cache
def views(count: int, hall: bool = False) -> TrueViews:
    return true_views(HALL if hall else ORBIT, count)


def window(count: int, symmetric: bool = True) -> list[tuple[int, int]]:
    return pair_graph(count, window=3, symmetric=symmetric, long_links=False)


def spoilt(count: int, spoil: Spoil | None = None, hall: bool = False, symmetric: bool = True) -> list[PairPrediction]:
    return pair_predictions(views(count, hall), window(count, symmetric), spoil, seed=count)


def ate_percent(found: Alignment, truth: TrueViews) -> float:
    return 100 * metrics.ate(found.w2c, truth.w2c)


def rotation_error(found: Alignment, truth: TrueViews) -> float:
    return float(metrics.relative_pose_errors(found.w2c, truth.w2c)[0].max())


def focal_error(found: Alignment, truth: TrueViews) -> float:
    return float(np.abs(found.intrinsics[:, :2, :2] - truth.intrinsics[:2, :2]).max())


def absrel(found: Alignment, truth: TrueViews) -> float:
    return metrics.absrel(found.depth, truth.depth, np.ones_like(truth.depth, bool))


def _with_hole(points: np.ndarray, hole: np.ndarray) -> np.ndarray:
    return np.where(hole[..., None], np.float32(np.nan), points)


# ----------------------------------------------------------------------------------------------------------------- bars


@pytest.mark.parametrize("hall", [False, True])
def test_align_is_exact_on_exact_pointmaps(hall: bool) -> None:
    truth, found = views(8, hall), align(spoilt(8, hall=hall), 8)
    np.testing.assert_array_equal(found.w2c[0], np.eye(3, 4))
    assert ate_percent(found, truth) <= 1e-4  # the bar is 0.05
    assert rotation_error(found, truth) <= 1e-4  # the bar is 0.02
    assert focal_error(found, truth) <= 1e-3
    assert absrel(found, truth) <= 1e-5
    assert found.believed.all()
    assert found.residuals.max() < 1e-5


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("patch", [1, 16])
def test_align_averages_noise_along_the_ray(own: bool, patch: int) -> None:
    truth = views(8)
    found = align(spoilt(8, Spoil(noise=0.02, noise_patch=patch, noise_of_own_camera=own)), 8)
    assert ate_percent(found, truth) <= 0.38
    assert focal_error(found, truth) <= 0.3
    # Seen from elsewhere, noise along the first camera's ray is triangulated away; a median of the depths would give 0.0062.
    assert absrel(found, truth) <= (0.0055 if (patch, own) == (1, False) else 0.007)


def test_align_needs_only_one_direction_of_each_pair() -> None:
    truth, found = views(8), align(spoilt(8, Spoil(noise=0.02), symmetric=False), 8)
    assert ate_percent(found, truth) <= 0.38
    assert focal_error(found, truth) <= 0.3


@pytest.mark.parametrize("how", ["moved", "scrambled", "elsewhere"])
def test_align_finds_the_wrong_pair_and_survives_outliers(how: str) -> None:
    truth, pairs = views(12), spoilt(12, Spoil(noise=0.01, outliers=0.1, wrong_pair=how))
    found = align(pairs, 12)
    assert ate_percent(found, truth) <= 0.1  # the bar is 1
    assert np.flatnonzero(~found.believed).tolist() == [len(pairs) // 2]
    assert found.residuals[len(pairs) // 2] > 5 * np.median(found.residuals)


def test_align_does_not_drift_over_40_views() -> None:
    truth, found = views(40), align(spoilt(40, Spoil(noise=0.02)), 40)
    assert ate_percent(found, truth) <= 0.1  # the bar is 1.25


def test_align_survives_30_percent_outliers() -> None:
    truth, found = views(8), align(spoilt(8, Spoil(noise=0.02, outliers=0.3)), 8)
    assert ate_percent(found, truth) <= 0.38
    assert focal_error(found, truth) <= 0.3


@pytest.mark.skipif(not RGBD.is_dir(), reason="needs the RGB-D frames")
def test_align_reaches_the_bars_on_measured_depth_with_holes() -> None:
    depth = np.stack([cv2.imread(str(path), cv2.IMREAD_UNCHANGED)[::5, ::5] / 1000 for path in sorted(RGBD.glob("depth/*.png"))])
    numbers = np.array([line.split() for line in (RGBD / "trajectory.log").read_text().splitlines() if len(line.split()) == 4])
    w2c = np.linalg.inv(numbers.astype(float).reshape(-1, 4, 4))[:, :3]
    truth = TrueViews(depth, w2c, np.array([[105.0, 0, 64], [0, 105, 48], [0, 0, 1]]))
    pairs = [
        replace(p, points_i=_with_hole(p.points_i, depth[p.i] == 0), points_j=_with_hole(p.points_j, depth[p.j] == 0))
        for p in pair_predictions(truth, window(len(depth)), Spoil(noise=0.02))
    ]
    found = align(pairs, len(depth))
    assert (depth == 0).mean() > 0.05  # where the sensor saw nothing
    assert ate_percent(found, truth) <= 0.38
    assert metrics.absrel(found.depth, depth, depth > 0) <= 0.01
    np.testing.assert_array_equal(found.depth == 0, depth == 0)


# ----------------------------------------------------------------------------------------------------------- guarantees


def test_aligned_points_land_on_their_pixels_in_both_conventions() -> None:
    truth, found = views(8), align(spoilt(8), 8)
    points = (truth.points_in(5, 5) - truth.w2c[5, :, 3]) @ truth.w2c[5, :, :3]  # the scene's world
    local = points @ truth.w2c[0, :, :3].T + truth.w2c[0, :, 3]  # the clip's world, metres
    local *= np.median(found.depth[0]) / np.median(truth.depth[0])
    v, u = np.mgrid[:96, :128]
    for lens, offset in ((found.intrinsics[5], 0.0), (to_pixel_centres(found.intrinsics)[5], 0.5)):
        image = (local @ found.w2c[5, :, :3].T + found.w2c[5, :, 3]) @ lens.T
        np.testing.assert_allclose(image[..., 0] / image[..., 2], u + offset, atol=1e-3)
        np.testing.assert_allclose(image[..., 1] / image[..., 2], v + offset, atol=1e-3)


def test_align_takes_torch_and_gives_what_numpy_gives() -> None:
    pairs = spoilt(4, Spoil(noise=0.02))
    tensors = [
        PairPrediction(p.i, p.j, *(torch.from_numpy(x) for x in (p.points_i, p.confidence_i, p.points_j, p.confidence_j)))
        for p in pairs
    ]
    expected, found = align(pairs, 4), align(tensors, 4)
    for name in ("w2c", "intrinsics", "depth", "confidence", "residuals"):
        assert isinstance(getattr(found, name), np.ndarray)
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_align_leaves_its_input_alone() -> None:
    pairs = spoilt(4, Spoil(noise=0.02))
    before = [p.points_j.copy() for p in pairs]
    align(pairs, 4)
    for pair, points in zip(pairs, before, strict=True):
        np.testing.assert_array_equal(pair.points_j, points)


def test_the_scale_of_a_pair_does_not_matter() -> None:
    pairs = spoilt(5, Spoil(noise=0.02))
    factors = np.exp(np.linspace(-3, 3, len(pairs))).astype(np.float32)
    scaled = [replace(p, points_i=p.points_i * f, points_j=p.points_j * f) for p, f in zip(pairs, factors, strict=True)]
    a, b = align(pairs, 5), align(scaled, 5)
    assert 100 * metrics.ate(b.w2c, a.w2c) < 1e-2
    assert metrics.absrel(b.depth, a.depth, a.depth > 0) < 1e-3


def test_confidence_decides_between_pixels() -> None:
    truth = views(6)
    pairs = pair_predictions(truth, window(6), Spoil(noise=0.01))
    left = np.zeros((96, 128), bool)
    left[:, :77] = True  # six tenths of each second view are moved together, and the network says that it is unsure there
    bent = [
        replace(
            p,
            points_j=np.where(left[..., None], p.points_j * np.float32(1.3), p.points_j),
            confidence_j=np.where(left, 1.01, 8),
        )
        for p in pairs
    ]
    unaware = [replace(p, confidence_j=p.confidence_i) for p in bent]
    assert ate_percent(align(bent, 6), truth) < 0.38
    with pytest.raises(ClipSetAside, match="contradict"):
        align(unaware, 6)


def _started(spoil: Spoil) -> tuple[State, Samples]:
    maps = check_pairs(spoilt(8, spoil), 8)
    samples = sample_pixels(maps, 512)
    return initialise(maps, samples), samples


def _error(state: State) -> float:
    return 100 * metrics.ate(np.concatenate([state.rotation, state.translation[:, :, None]], axis=2), views(8).w2c)


def test_align_refines_its_start() -> None:
    start, samples = _started(Spoil(noise=0.02, noise_patch=16))
    end, noise = refine(start, samples)
    cost_start, cost_end = (cost_and_weight(residuals(state, samples), samples, noise)[0] for state in (start, end))
    assert cost_end < cost_start
    assert _error(end) < 0.5 * _error(start)


def test_align_does_not_leave_a_perfect_start() -> None:
    start, samples = _started(Spoil())
    assert _error(refine(start, samples)[0]) < 1e-5


def test_align_keeps_the_best_iterate(monkeypatch: pytest.MonkeyPatch) -> None:
    start, samples = _started(Spoil(noise=0.02))

    def overshoot(state: State, *_: object) -> tuple[State, float]:
        return replace(state, translation=state.translation * 1.5), 1.0

    monkeypatch.setattr(alignment_refine, "_step", overshoot)
    end, _ = refine(start, samples)
    np.testing.assert_array_equal(end.translation, start.translation)


def test_frames_held_twice_do_not_disturb() -> None:
    truth = views(8)
    held = [0, 0, 1, 2, 2, 2, 3, 4]
    doubled = TrueViews(truth.depth[held], truth.w2c[held], truth.intrinsics)
    found = align(pair_predictions(doubled, window(8), Spoil(noise=0.01)), 8)
    assert ate_percent(found, doubled) <= 0.38


def test_holes_and_a_pair_that_is_not_finite_are_left_out() -> None:
    truth, pairs = views(8), spoilt(8, Spoil(noise=0.01))
    rng = np.random.default_rng(0)
    holed = []
    for pair in pairs:
        points = pair.points_i.copy()
        points[rng.random(points.shape[:2]) < 0.3] = np.nan
        holed.append(replace(pair, points_i=points))
    holed[4] = replace(holed[4], points_j=np.full_like(holed[4].points_j, np.inf))
    found = align(holed, 8)
    assert ate_percent(found, truth) <= 0.38
    assert np.flatnonzero(~found.believed).tolist() == [4]
    assert np.isnan(found.residuals[4])
    assert np.isfinite(found.depth).all()


def test_a_pixel_that_no_pair_knows_has_no_depth() -> None:
    pairs = spoilt(4, Spoil(noise=0.01))
    hole = np.zeros((96, 128), bool)
    hole[10:20, 30:50] = True
    pairs = [replace(p, points_i=_with_hole(p.points_i, hole), points_j=_with_hole(p.points_j, hole)) for p in pairs]
    found = align(pairs, 4)
    np.testing.assert_array_equal(found.depth == 0, np.broadcast_to(hole, found.depth.shape))
    np.testing.assert_array_equal(found.confidence == 0, found.depth == 0)


def test_align_memory_grows_linearly() -> None:
    peaks = []
    for count in (8, 16):
        pairs = spoilt(count)
        tracemalloc.start()
        align(pairs, count)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2.4 * peaks[0]  # pairs grow 36 -> 84


# --------------------------------------------------------------------------------------------------------------- graph


@pytest.mark.parametrize("count", [2, 3, 5, 40, 81])
def test_pair_graph_is_a_window_that_does_not_close_and_never_all_pairs(count: int) -> None:
    pairs = pair_graph(count)
    assert len(set(pairs)) == len(pairs)
    assert {(j, i) for i, j in pairs} == set(pairs)
    assert all((i, j) in pairs for i in range(count) for j in range(i + 1, min(i + 4, count)))
    assert all(0 <= i < count and 0 <= j < count and i != j for i, j in pairs)
    assert len(pairs) <= 2 * (3 + 1) * count
    if count > 8:
        assert (0, count - 1) not in pairs
        assert (0, 8) in pairs
    assert pair_graph(count, symmetric=False) == sorted((i, j) for i, j in pairs if i < j)


def test_pair_graph_refuses_a_single_frame() -> None:
    with pytest.raises(ValueError, match="2 images"):
        pair_graph(1)


# ----------------------------------------------------------------------------------------------------------- bad input


def _flat(shape: tuple[int, ...], value: float) -> np.ndarray:
    return np.full(shape, value, np.float32)


POINTS, PLANE = (96, 128, 3), (96, 128)
SQUEEZED = np.float32([1e-4, 1e-4, 1])
BAD: dict[str, tuple[Edit, str]] = {
    "nan": (lambda p: replace(p, points_i=_flat(POINTS, np.nan)), "12 not finite"),
    "constant": (lambda p: replace(p, points_i=_flat(POINTS, 1), points_j=_flat(POINTS, 1)), "12 constant"),
    "behind": (lambda p: replace(p, points_i=-p.points_i, points_j=-p.points_j), "12 behind the camera"),
    "no confidence": (lambda p: replace(p, confidence_j=_flat(PLANE, 0)), "12 without confidence"),
    "low confidence": (
        lambda p: replace(p, confidence_i=_flat(PLANE, 1.02), confidence_j=_flat(PLANE, 1.01)),
        "confidence is low",
    ),
    "focal": (lambda p: replace(p, points_i=p.points_i * SQUEEZED, points_j=p.points_j * SQUEEZED), "focal ran away"),
}


@pytest.mark.parametrize("what", BAD)
def test_align_rejects_worthless_pointmaps_with_the_reason(what: str) -> None:
    edit, reason = BAD[what]
    with pytest.raises(ClipSetAside, match=reason):
        align([edit(p) for p in spoilt(4)], 4)


def test_confidence_of_exactly_one_means_that_none_was_given() -> None:
    found = align([replace(p, confidence_i=_flat(PLANE, 1), confidence_j=_flat(PLANE, 1)) for p in spoilt(4)], 4)
    assert ate_percent(found, views(4)) < 1e-4


def test_align_rejects_a_single_frame_and_no_pairs() -> None:
    with pytest.raises(ClipSetAside, match="1 frame has no pair"):
        align([], 1)
    with pytest.raises(ClipSetAside, match="no pair of frames"):
        align([], 2)


@pytest.mark.parametrize("noise", [0.0, 0.02])
@pytest.mark.parametrize("count", [2, 5])
def test_align_rejects_identical_frames(count: int, noise: float) -> None:
    truth = views(8)
    still = TrueViews(truth.depth[[3] * count], truth.w2c[[3] * count], truth.intrinsics)
    with pytest.raises(ClipSetAside, match="does not move"):
        align(pair_predictions(still, window(count), Spoil(noise=noise)), count)


def test_align_rejects_frames_tied_by_no_pair() -> None:
    truth = views(8)
    with pytest.raises(ClipSetAside, match="frames 3, 4, 5 are tied"):
        align(pair_predictions(truth, [(0, 1), (1, 2), (3, 4), (4, 5)]), 6)


@pytest.mark.parametrize("how", ["moved", "scrambled", "elsewhere"])
def test_align_rejects_a_clip_whose_pairs_are_all_wrong(how: str) -> None:
    truth = views(5)
    wrong = [pair_predictions(truth, [pair], Spoil(wrong_pair=how), seed)[0] for seed, pair in enumerate(window(5))]
    with pytest.raises(ClipSetAside):
        align(wrong, 5)


def test_align_rejects_a_link_whose_two_directions_contradict() -> None:
    truth = views(6)
    chain = pair_graph(6, window=1, long_links=False)
    pairs = pair_predictions(truth, chain, Spoil(noise=0.01))
    pairs[2] = pair_predictions(truth, [chain[2]], Spoil(wrong_pair="moved"))[0]
    with pytest.raises(ClipSetAside, match=r"frames 3, 4, 5 are tied .* contradict"):
        align(pairs, 6)


def test_align_names_malformed_input() -> None:
    pairs = spoilt(4)
    with pytest.raises(ValueError, match=r"pair \(0, 7\): expected two different frames of 0\.\.3"):
        align([replace(pairs[0], j=7), *pairs], 4)
    with pytest.raises(ValueError, match="expected points"):
        align([pairs[0], replace(pairs[1], points_j=pairs[1].points_j[:50])], 4)
