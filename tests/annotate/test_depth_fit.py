"""Fitting a network's disparity to measured depth: right under outliers, in any unit, and never NaN."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fw_pipeline.annotate.depth import DisparityFit, align_disparity
from fw_pipeline.annotate.depth.disparity import Pixels, fit_pixels, steady_fits
from fw_pipeline.annotate.types import ClipSetAside

Frame = tuple[np.ndarray, np.ndarray, np.ndarray]  # disparity, measured z, true z


def frame(outliers: float = 0.0, seed: int = 0, pixels: int = 4000, noise: float = 0.014, scale: float = 0.3) -> Frame:
    rng = np.random.default_rng(seed)
    truth = np.exp(rng.uniform(np.log(1), np.log(8), pixels))
    d = (1 / truth * (1 + noise * rng.standard_normal(pixels)) - 0.05) / scale
    z = truth.copy()
    bad = rng.random(pixels) < outliers
    z[bad] = rng.uniform(0.5, 20, bad.sum())
    return d, z, truth


def believe(values: np.ndarray) -> np.ndarray:
    return np.ones(values.shape, bool)


def absrel(fit: DisparityFit, d: np.ndarray, truth: np.ndarray) -> float:
    return float(np.mean(np.abs(1 / (fit.scale * d + fit.shift) - truth) / truth))


@pytest.mark.parametrize("outliers", [0.0, 0.1, 0.3, 0.45])
def test_bad_target_pixels_do_not_move_the_fit(outliers: float) -> None:
    for seed in range(5):
        d, z, truth = frame(outliers, seed, pixels=20_000)
        fit = align_disparity(d, z, believe(z))
        assert absrel(fit, d, truth) <= 0.013
        assert fit.scale == pytest.approx(0.3, rel=0.01)
        assert fit.inlier_ratio == pytest.approx(1 - outliers, abs=0.05)
        assert fit.residual < 0.013
        assert not fit.fallback


@settings(deadline=None, max_examples=40)
@given(a=st.floats(1e-3, 1e3), b=st.floats(-100, 100), unit=st.floats(1e-3, 1e3), seed=st.integers(0, 50), bad=st.floats(0, 0.45))
def test_the_depth_does_not_depend_on_the_disparitys_affine_map_nor_on_the_unit(
    a: float, b: float, unit: float, seed: int, bad: float
) -> None:
    d, z, _ = frame(bad, seed, pixels=500)
    fit, other = align_disparity(d, z, believe(z)), align_disparity(a * d + b, unit * z, believe(z))
    np.testing.assert_allclose(unit * (other.scale * (a * d + b) + other.shift), fit.scale * d + fit.shift, rtol=1e-4, atol=1e-5)
    assert other.inlier_ratio == pytest.approx(fit.inlier_ratio, abs=0.01)
    assert other.residual == pytest.approx(fit.residual, abs=1e-3)


def test_numpy_and_torch_of_any_shape_give_the_same_fit_every_time() -> None:
    d, z, _ = (value.astype(np.float32).reshape(40, 100) for value in frame(0.3))
    fits = [align_disparity(d, z, believe(z)) for _ in range(2)]
    fits.append(align_disparity(torch.from_numpy(d), torch.from_numpy(z), torch.ones(z.shape, dtype=torch.bool)))
    assert fits[0] == fits[1] == fits[2]


def test_pixels_that_are_masked_unknown_or_not_finite_do_not_count() -> None:
    d, z, truth = frame(pixels=2000)
    mask = believe(z)
    mask[:300], z[300:600], z[600:700], z[700:800], d[800:900] = False, 0, np.nan, -1, np.nan
    z[:300] = 1e6
    fit = align_disparity(d, z, mask)
    assert fit.inlier_ratio > 0.99
    assert absrel(fit, d[900:], truth[900:]) < 0.013


@pytest.mark.parametrize(
    ("change", "reason"),
    [(lambda d: np.full_like(d, 0.7), "the same everywhere"), (lambda d: 10 - d, "does not fall with the distance")],
)
def test_a_constant_or_inverted_disparity_falls_back_to_the_median_ratio_and_says_why(change, reason: str) -> None:
    d, z, _ = frame()
    fit = align_disparity(change(d), z, believe(z))
    assert reason in fit.fallback
    assert fit.shift == 0
    assert fit.scale == pytest.approx(np.median(1 / z / change(d)))
    assert fit.inlier_ratio < 0.4
    assert np.isfinite([fit.scale, fit.inlier_ratio, fit.residual]).all()


@pytest.mark.parametrize(
    ("d", "z", "mask", "reason"),
    [
        (np.full(99, np.nan), np.ones(99), np.ones(99, bool), "0 with a finite disparity"),
        (np.arange(99.0), np.zeros(99), np.ones(99, bool), "0 of them with a depth"),
        (np.arange(99.0), np.ones(99), np.zeros(99, bool), "0 confident pixels"),
        (np.zeros(99), np.ones(99), np.ones(99, bool), "no disparity is positive"),
    ],
)
def test_what_cannot_be_fitted_is_refused_with_the_numbers(d: np.ndarray, z: np.ndarray, mask: np.ndarray, reason: str) -> None:
    with pytest.raises(ClipSetAside, match=reason):
        align_disparity(d, z, mask)


def test_inputs_of_different_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="99, 98 and 99 pixels"):
        align_disparity(np.ones(99), np.ones(98), np.ones(99, bool))


@pytest.mark.parametrize("outliers", [0.0, 0.45])
def test_a_fit_of_the_scale_alone_keeps_the_zero(outliers: float) -> None:
    d, z, truth = frame(outliers)
    fit = fit_pixels(Pixels(d + 0.05 / 0.3, 1 / z), affine=False)
    assert fit.shift == 0
    assert fit.scale == pytest.approx(0.3, rel=0.005)
    assert absrel(fit, d + 0.05 / 0.3, truth) <= 0.013


# --------------------------------------------------------------------------------------------------------- over a clip


def clip(scales: np.ndarray, outliers: float = 0.0, pixels: int = 60) -> tuple[list[DisparityFit | None], list[Pixels | None]]:
    """Fits of frames whose network has these scales, from few and noisy pixels."""
    frames = [frame(outliers, seed, pixels, noise=0.02, scale=scale) for seed, scale in enumerate(scales)]
    made = [Pixels(d, 1 / z) for d, z, _ in frames]
    return [fit_pixels(p) for p in made], list(made)


def scales_of(fits: list[DisparityFit | None]) -> np.ndarray:
    return np.array([fit.scale for fit in fits if fit])


def test_noise_of_the_fits_is_averaged_over_time() -> None:
    truth = 0.3 + 0.002 * np.arange(40)
    fits, pixels = clip(truth)
    before, after = (np.sqrt(np.mean((scales_of(f) / truth - 1) ** 2)) for f in (fits, steady_fits(fits, pixels)))
    assert after < 0.7 * before


def test_a_network_that_jumps_from_frame_to_frame_keeps_its_jumps() -> None:
    truth = np.exp(np.random.default_rng(1).uniform(-1, 1, 30))
    fits, pixels = clip(truth, pixels=500)
    np.testing.assert_allclose(scales_of(steady_fits(fits, pixels)), truth, rtol=0.05)


def test_a_frame_with_a_wrong_fit_takes_over_what_its_neighbours_say() -> None:
    fits, pixels = clip(np.full(15, 0.3), pixels=500)
    fits[7] = replace(fits[7], scale=0.9, shift=0.4)
    fits[9] = replace(fits[9], scale=0.9, shift=0.0, fallback="made up")
    steady = steady_fits(fits, pixels)
    np.testing.assert_allclose(scales_of(steady), 0.3, rtol=0.03)
    assert all(fit.inlier_ratio > 0.9 and not fit.fallback for fit in steady if fit)


def test_frames_without_a_fit_stay_without_and_short_clips_stay_as_they_are() -> None:
    fits, pixels = clip(np.full(9, 0.3), pixels=500)
    fits[3], pixels[3] = None, None
    steady = steady_fits(fits, pixels)
    assert [fit is None for fit in steady] == [t == 3 for t in range(9)]
    assert steady_fits(fits[:1], pixels[:1]) == fits[:1]
    assert steady_fits([None], [None]) == [None]
