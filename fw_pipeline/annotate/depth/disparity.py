"""From a network's disparity, known up to an affine map, to the geometry's units.

A monocular network gives d with 1/z = scale * d + shift, scale and shift unknown and different in every frame. They are fitted
against the depth that the geometry measured, some of which is wrong, and then steadied over time. An output in metres (the
metric networks) is turned into 1/metres first: the same fit with shift 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fw_pipeline.annotate.types import ClipSetAside

DRAWS = 300  # of RANSAC: with 45 % outliers, 90 of them hit two inliers
TOLERANCE = 0.05  # relative error of 1/z within which a pixel is an inlier
SCORED = 1024  # pixels that the draws are compared on; the refit sees all
FITTED = 20_000  # a frame's fit sees at most so many pixels
REFITS = 6
MIN_PIXELS = 32

WINDOW = 4  # frames to either side that steady a fit
WORSE = 1.1  # a steadied fit may cost this much more on its frame than the frame's own fit ...
SLACK = 0.001  # ... and this much in any case: mean relative error of 1/z, each pixel's cut off at TOLERANCE


@dataclass(frozen=True)
class DisparityFit:
    """1/z = scale * disparity + shift."""

    scale: float  # > 0
    shift: float
    inlier_ratio: float  # share of the usable pixels whose 1/z it explains within 5 %
    residual: float  # median relative error of 1/z over these inliers (over all pixels where there is none)
    fallback: str = ""  # why this is a median ratio and no real fit; empty for a real one


@dataclass(frozen=True)
class Pixels:
    """What one frame is fitted to: at most FITTED of its usable pixels."""

    d: np.ndarray  # [P] disparity
    target: np.ndarray  # [P] 1/z, > 0

    def judge(self, scale: float, shift: float, fallback: str = "") -> DisparityFit:
        error = self._error(scale, shift)
        inside = error <= TOLERANCE
        residual = np.median(error[inside] if inside.any() else error)
        return DisparityFit(float(scale), float(shift), float(inside.mean()), float(residual), fallback)

    def cost(self, scale: float, shift: float) -> float:
        return float(np.minimum(self._error(scale, shift), TOLERANCE).mean())

    def _error(self, scale: float, shift: float) -> np.ndarray:
        return np.abs(scale * self.d + shift - self.target) / self.target


def align_disparity(disparity: Any, z: Any, mask: Any) -> DisparityFit:
    """Fit 1/z = scale * disparity + shift, robustly: RANSAC, then least squares on the inliers.

    300 draws of two pixels, inliers within 5 % relative disparity; the refit weighs errors relative to 1/z, as the inlier
    test does, and so minimises the relative error of depth. A scale that is not positive is refused (depth would be turned
    inside out): then scale is the median ratio of 1/z to disparity and shift 0, and `fallback` says why. Deterministic.

    Args:
        disparity: numpy or torch, any shape; larger is nearer. Pixels that are not finite are left out.
        z: z-depth of the same shape, in any unit; pixels that are not finite or <= 0 are left out.
        mask: bool of the same shape, the pixels to believe.

    Raises:
        ClipSetAside: fewer than 32 usable pixels, or no positive scale fits at all; the message has the numbers.
        ValueError: the shapes differ.
    """
    return fit_pixels(usable_pixels(disparity, z, mask))


def usable_pixels(disparity: Any, z: Any, mask: Any) -> Pixels:
    """The pixels a fit can use, at random when there are more than it needs. Args and errors as `align_disparity`."""
    d, depth, believed = (_flat(value) for value in (disparity, z, mask))
    if not len(d) == len(depth) == len(believed):
        raise ValueError(
            f"disparity, z and mask hold {len(d)}, {len(depth)} and {len(believed)} pixels; expected as many of each"
        )
    index = np.flatnonzero(believed)
    measured = index[np.isfinite(depth[index]) & (depth[index] > 0)]
    usable = measured[np.isfinite(d[measured])]
    if len(usable) < MIN_PIXELS:
        raise ClipSetAside(
            f"depth cannot be aligned: {len(index)} confident pixels, {len(measured)} of them with a depth, "
            f"{len(usable)} with a finite disparity (at least {MIN_PIXELS} are needed)"
        )
    if len(usable) > FITTED:
        usable = usable[np.random.default_rng(0).choice(len(usable), FITTED, replace=False, shuffle=False)]
    return Pixels(d[usable].astype(np.float64), 1 / depth[usable].astype(np.float64))


def fit_pixels(pixels: Pixels, affine: bool = True) -> DisparityFit:
    """`align_disparity` on pixels already chosen; `affine=False` fits the scale alone, for a disparity whose zero is known."""
    d, unit = pixels.d, float(np.median(pixels.target))
    centre, spread = (d.mean(), d.std()) if affine else (0.0, np.abs(d).mean())
    if not spread > 1e-9 * np.abs(d).max():
        return _median_ratio(pixels, "the disparity is the same everywhere" if affine else "the disparity is 0 everywhere")
    # In these coordinates every affine change of d and every unit of z give the same numbers.
    x, y = (d - centre) / spread, pixels.target / unit
    slope, offset = _refit(x, y, *_ransac(x, y, affine), affine)
    if not slope > 0:
        return _median_ratio(pixels, "no affine fit with a positive scale: the disparity does not fall with the distance")
    scale = slope * unit / spread
    return pixels.judge(scale, offset * unit - scale * centre)


def _flat(value: Any) -> np.ndarray:
    """numpy or torch, on any device and of any precision -> flat numpy array."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float().numpy() if value.is_floating_point() else value.numpy()
    return np.asarray(value).ravel()


def _ransac(x: np.ndarray, y: np.ndarray, affine: bool) -> tuple[float, float]:
    """The draw (slope, offset) with most inliers; (nan, nan) when no draw gives a line."""
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, len(x), (2, DRAWS))
    with np.errstate(divide="ignore", invalid="ignore"):
        if affine:
            slope = (y[first] - y[second]) / (x[first] - x[second])
            offset = y[first] - slope * x[first]
        else:
            slope, offset = y[first] / x[first], np.zeros(DRAWS)
    good = np.isfinite(slope)
    if not good.any():
        return float("nan"), float("nan")
    slope, offset = slope[good], offset[good]
    scored = rng.integers(0, len(x), SCORED) if len(x) > SCORED else slice(None)
    xs, ys = x[scored].astype(np.float32), y[scored].astype(np.float32)
    error = np.abs(slope.astype(np.float32)[:, None] * xs + (offset.astype(np.float32)[:, None] - ys))
    best = int((error <= TOLERANCE * ys).sum(1).argmax())
    return float(slope[best]), float(offset[best])


def _refit(x: np.ndarray, y: np.ndarray, slope: float, offset: float, affine: bool) -> tuple[float, float]:
    """Least squares of the relative error on the inliers, until they stay the same; the start where too few determine it."""
    before = np.empty(0, bool)
    for _ in range(REFITS):
        inside = np.abs(slope * x + offset - y) <= TOLERANCE * y
        if inside.sum() < MIN_PIXELS // 2 or np.array_equal(inside, before):
            break
        before, xi, yi = inside, x[inside], y[inside]
        weight = 1 / yi**2
        weight /= weight.sum()
        if not affine:
            slope = float((weight @ (xi * yi)) / (weight @ (xi * xi)))
            continue
        mx, my = weight @ xi, weight @ yi
        variance = weight @ (xi - mx) ** 2
        if not variance > 1e-12:
            break
        slope = float((weight @ ((xi - mx) * (yi - my))) / variance)
        offset = float(my - slope * mx)
    return slope, offset


def _median_ratio(pixels: Pixels, why: str) -> DisparityFit:
    positive = pixels.d > 0
    if not positive.any():
        raise ClipSetAside(f"depth cannot be aligned: {why}, and no disparity is positive")
    return pixels.judge(float(np.median(pixels.target[positive] / pixels.d[positive])), 0.0, why)


# --------------------------------------------------------------------------------------------------------- over a clip


def steady_fits(
    fits: Sequence[DisparityFit | None], pixels: Sequence[Pixels | None], affine: bool = True
) -> list[DisparityFit | None]:
    """Smooth scale and shift over the frames of a clip, robustly, as far as the frames themselves bear it out.

    Every frame's fit is replaced by a local line through its neighbours' (Cleveland's robust locally weighted regression, over 9
    frames), in the values of 1/z that the fits give for a far and a near disparity of the clip: scale and shift alone are too
    strongly correlated. The replacement must explain the frame's own pixels about as well as its own fit did (WORSE, SLACK).
    So noise of the fits is averaged and a frame with bad geometry takes over what its neighbours say, while a network whose
    scale really jumps from frame to frame keeps its jumps.

    Args:
        fits: one per frame; None where nothing could be fitted, which stays None.
        pixels: what each was fitted to.
        affine: as for `fit_pixels`; without it every shift stays exactly 0.
    """
    real = np.array([fit is not None and not fit.fallback for fit in fits])
    if real.sum() < 3:
        return list(fits)
    everything = np.concatenate(
        [p.d[:: max(1, len(p.d) // 500)] for p, use in zip(pixels, real, strict=True) if p is not None and use]
    )
    far, near = np.quantile(everything, [0.1, 0.9]) if affine else (0.0, np.quantile(everything, 0.9))
    if not near > far:
        return list(fits)
    rows = [(f.scale * far + f.shift, f.scale * near + f.shift, f.inlier_ratio) if f else (0.0, 0.0, 0.0) for f in fits]
    *ends, trust = np.array(rows).T
    smooth_far, smooth_near = _local_lines(np.stack(ends, 1), np.where(real, trust, 0)).T
    scale = (smooth_near - smooth_far) / (near - far)
    shift = smooth_far - scale * far
    return [
        _better(fit, own, float(s), float(b)) if fit is not None and own is not None else fit
        for fit, own, s, b in zip(fits, pixels, scale, shift, strict=True)
    ]


def _better(fit: DisparityFit, pixels: Pixels, scale: float, shift: float) -> DisparityFit:
    """The steadied fit where it may replace the frame's own."""
    if not (np.isfinite(shift) and scale > 0):
        return fit
    allowed = WORSE * pixels.cost(fit.scale, fit.shift) + SLACK
    return pixels.judge(scale, shift) if pixels.cost(scale, shift) <= allowed else fit


def _local_lines(values: np.ndarray, trust: np.ndarray, rounds: int = 3) -> np.ndarray:
    """Robust locally weighted lines through `values` [T, 2] with weights `trust` [T] -> their values at the frames [T, 2].

    NaN where fewer than three frames of the window have a weight.
    """
    count = len(values)
    offset = np.arange(-WINDOW, WINDOW + 1)
    index = np.arange(count)[:, None] + offset
    inside = (index >= 0) & (index < count)
    index = index.clip(0, count - 1)
    kernel = (1 - np.abs(offset / (WINDOW + 1)) ** 3) ** 3
    robust, smooth = np.ones(count), values
    for _ in range(rounds):
        weight = np.where(inside, kernel * (trust * robust)[index], 0)
        s0, s1, s2 = (weight @ (offset.astype(float) ** power) for power in range(3))
        t0, t1 = (np.einsum("tk,tkc->tc", weight * offset.astype(float) ** power, values[index]) for power in range(2))
        with np.errstate(divide="ignore", invalid="ignore"):
            smooth = (s2[:, None] * t0 - s1[:, None] * t1) / (s0 * s2 - s1**2)[:, None]
        smooth[(weight > 1e-6).sum(1) < 3] = np.nan
        off = np.nan_to_num(np.abs(values - smooth).max(1), nan=0.0)
        spread = 6 * np.median(off[trust > 0])
        robust = np.clip(1 - (off / max(spread, 1e-12)) ** 2, 0, 1) ** 2
    return smooth
