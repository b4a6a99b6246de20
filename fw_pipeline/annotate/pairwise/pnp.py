"""Single cameras against known points (PnP), and what is done about frames whose camera cannot be found.

A failed frame is an exception with a reason, never an identity pose. `fill_missing_poses` puts a pose between the neighbours',
says so in a flag, and refuses a clip that would be made up to more than a fifth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from fw_model.errors import Explained
from fw_pipeline.annotate.pairwise.pair_graph import PairPrediction, sure_level, to_numpy
from fw_pipeline.annotate.vectors import length

PNP_PIXELS = 2000  # at most
PNP_DRAWS = 1000  # at most; as many as the share of outliers asks for
MIN_POINTS = 12
MIN_INLIERS = 0.2  # share of the points; fewer agreeing ones are chance
GRID_ORIGINS = (0.0, 0.5)


class PnPError(Explained, ValueError):
    """No camera fits the points of a frame; the message says why."""


@dataclass(frozen=True)
class PnPResult:
    w2c: np.ndarray  # [3, 4] float64
    inlier_ratio: float  # share of the pixels above `sure_level` whose point projects within `pixel_threshold` of them
    reprojection_error: float  # median over those, pixels


def pixel_threshold(height: int, width: int) -> float:
    """Largest reprojection error of an inlier in pixels: 1.5, or a hundredth of the long side."""
    return max(1.5, 0.01 * max(height, width))


def solve_pnp(points_world: Any, confidence: Any, intrinsics: Any, origin: float | None = None) -> PnPResult:
    """The camera that sees each pixel's world point at that pixel: SQPNP in RANSAC on confident pixels, then LM on the inliers.

    Args:
        points_world: [H, W, 3] numpy or torch, any units; non-finite points are left out.
        confidence: [H, W] relative; pixels at 0, or below `sure_level`, are left out.
        intrinsics: [3, 3] pixels.
        origin: image position of pixel (0, 0) that `intrinsics` mean: 0 for the network's integer grid, 0.5 for pixel
            centres. None: 0, unless the points fit 0.5 clearly better, which exact ones show.

    Raises:
        PnPError: too few points, points on one line, or no pose that enough of them fit.
        ValueError: malformed input.
    """
    points, weight, lens = _pnp_input(points_world, confidence, intrinsics)
    height, width = weight.shape
    sure = np.flatnonzero((weight > 0) & (weight >= sure_level(weight)))
    if len(sure) < MIN_POINTS:
        raise PnPError(f"only {len(sure)} usable points, {MIN_POINTS} are needed")
    points = points.reshape(-1, 3)[sure]
    pixels = np.stack([sure % width, sure // width], axis=1).astype(np.float64)
    some = np.linspace(0, len(sure) - 1, min(PNP_PIXELS, len(sure))).astype(int)
    _require_spread(points[some])
    threshold = pixel_threshold(height, width)
    start = pnp_ransac(points[some], pixels[some] + (origin or 0.0), lens, threshold, PNP_DRAWS)
    if start is None:
        raise PnPError(f"no pose fits the {len(some)} points tried")
    fits = []
    for grid in GRID_ORIGINS if origin is None else (origin,):
        rotation, translation = _polish(points[some], pixels[some] + grid, lens, *start)
        fits.append(_result(rotation, translation, points, pixels + grid, lens, threshold))
    best = fits[-1] if fits[-1].reprojection_error < 0.5 * fits[0].reprojection_error else fits[0]
    if not best.inlier_ratio >= MIN_INLIERS:
        raise PnPError(f"only {100 * best.inlier_ratio:.0f} % of the points fit one pose within {threshold:.3g} px")
    return best


def measure_pose(points_world: Any, confidence: Any, intrinsics: Any, w2c: np.ndarray) -> PnPResult:
    """How well a camera found otherwise fits the points of its pixels, in the numbers of `solve_pnp` (arguments as there).

    `intrinsics` are of the integer grid. Raises PnPError when no point is usable.
    """
    points, weight, lens = _pnp_input(points_world, confidence, intrinsics)
    sure = np.flatnonzero((weight > 0) & (weight >= sure_level(weight)))
    if not len(sure):
        raise PnPError("no usable point")
    height, width = weight.shape
    pixels = np.stack([sure % width, sure // width], axis=1).astype(np.float64)
    return _result(w2c[:, :3], w2c[:, 3], points.reshape(-1, 3)[sure], pixels, lens, pixel_threshold(height, width))


def reprojection_errors(points_world: np.ndarray, intrinsics: np.ndarray, w2c: np.ndarray) -> np.ndarray:
    """How far [H, W], in pixels, each pixel's world point [H, W, 3] lands from it; infinite behind the camera, NaN for NaN.

    `intrinsics` are of the integer grid.
    """
    height, width = points_world.shape[:2]
    pixels = np.stack(np.meshgrid(np.arange(width, dtype=np.float64), np.arange(height, dtype=np.float64)), axis=-1)
    off = _reprojection(points_world.reshape(-1, 3), pixels.reshape(-1, 2), intrinsics, w2c[:, :3], w2c[:, 3])
    return off.reshape(height, width)


def _result(
    rotation: np.ndarray, translation: np.ndarray, points: np.ndarray, pixels: np.ndarray, lens: np.ndarray, threshold: float
) -> PnPResult:
    error = _reprojection(points, pixels, lens, rotation, translation)
    inlier = error < threshold
    typical = float(np.median(error[inlier])) if inlier.any() else np.inf
    return PnPResult(np.concatenate([rotation, translation[:, None]], axis=1), float(inlier.mean()), typical)


def pnp_ransac(
    points: np.ndarray, image_points: np.ndarray, intrinsics: np.ndarray, threshold: float, draws: int = 100
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """points [n, 3], image_points [n, 2] -> rotation [3, 3], translation [3], inliers [n] bool; None when nothing fits.

    SQPNP on minimal draws, then on all inliers. Deterministic.
    """
    if len(points) < 6:
        return None
    centre = np.median(points, axis=0)  # far from the origin, or in great units, the solver loses digits
    spread = float(np.median(length(points - centre)))
    if not spread > 0:
        return None
    try:
        found, vector, shift, kept = cv2.solvePnPRansac(
            (points - centre) / spread,
            np.ascontiguousarray(image_points, np.float64),
            intrinsics,
            None,
            iterationsCount=draws,
            reprojectionError=threshold,
            confidence=0.9999,
            flags=cv2.SOLVEPNP_SQPNP,
        )
    except cv2.error:  # OpenCV's way to say that the points are degenerate
        return None
    if not found or kept is None or len(kept) < 6 or not np.isfinite(vector).all() or not np.isfinite(shift).all():
        return None
    rotation = np.asarray(cv2.Rodrigues(vector)[0])
    inliers = np.zeros(len(points), bool)
    inliers[kept.ravel()] = True
    return rotation, spread * shift.ravel() - rotation @ centre, inliers


def points_in_world(pair: PairPrediction, depth_i: np.ndarray, w2c_i: np.ndarray) -> np.ndarray:
    """World points [H, W, 3] of frame j of a pair whose frame i is already aligned: what `solve_pnp` wants for frame j.

    depth_i [H, W] z-depth of frame i (0 = unknown) and w2c_i [3, 4] are in the clip's units. The pair gets its scale from them,
    the median ratio over the pixels of frame i that the network is sure of. Raises PnPError when there is none.
    """
    z, trust = to_numpy(pair.points_i)[..., 2], to_numpy(pair.confidence_i)
    both = np.isfinite(z) & (z > 0) & (trust > 0) & (depth_i > 0)
    if not both.any():
        raise PnPError(f"pair ({pair.i}, {pair.j}): no pixel of frame {pair.i} has a depth both in the pair and in the clip")
    both &= trust >= sure_level(np.where(both, trust, 0))
    scale = float(np.median(depth_i[both] / z[both]))
    local = scale * to_numpy(pair.points_j).astype(np.float64) - w2c_i[:, 3]
    return np.asarray(local @ w2c_i[:, :3])


def _pnp_input(points_world: Any, confidence: Any, intrinsics: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points as float64, confidence with 0 where unusable, lens as float64."""
    if hasattr(points_world, "detach"):
        points_world = points_world.detach().cpu().double().numpy()
    points, weight, lens = np.asarray(points_world, np.float64), to_numpy(confidence), np.asarray(intrinsics, np.float64)
    if points.ndim != 3 or points.shape != (*weight.shape, 3) or lens.shape != (3, 3):
        raise ValueError(
            f"solve_pnp: expected points [H,W,3], confidence [H,W], intrinsics [3,3], "
            f"got {points.shape}, {weight.shape}, {lens.shape}"
        )
    if not (np.isfinite(lens).all() and lens[0, 0] > 0 and lens[1, 1] > 0):
        raise ValueError(f"solve_pnp: not intrinsics of a camera: {lens.tolist()}")
    good = np.isfinite(points).all(-1) & np.isfinite(weight) & (weight > 0)
    return points, np.where(good, weight, 0), lens


def _require_spread(points: np.ndarray) -> None:
    centred = points - np.median(points, axis=0)
    near = centred[length(centred) <= 3 * np.median(length(centred))]
    widths = np.sqrt(np.linalg.svd(near, compute_uv=False) ** 2 / len(near))
    if not widths[1] > 1e-6 * max(widths[0], float(np.abs(points).max()) * 1e-3):
        raise PnPError("the points are one point or lie on a line")


def _polish(
    points: np.ndarray, pixels: np.ndarray, lens: np.ndarray, rotation: np.ndarray, translation: np.ndarray, inliers: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """LM on the inliers, and again on those within three times their median error: outliers that passed by chance go."""
    centre = points[inliers].mean(0)
    spread = float(length(points[inliers] - centre).mean())
    scaled = (points - centre) / spread
    vector, shift = cv2.Rodrigues(rotation)[0], (translation + rotation @ centre)[:, None] / spread
    criteria = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_COUNT, 50, 1e-12)
    for _ in range(3):
        vector, shift = cv2.solvePnPRefineLM(scaled[inliers], pixels[inliers], lens, None, vector, shift, criteria)
        error = _reprojection(scaled, pixels, lens, np.asarray(cv2.Rodrigues(vector)[0]), shift.ravel())
        tight = error <= max(3 * float(np.median(error[inliers])), 1e-6)
        if tight.sum() < MIN_POINTS:
            break
        inliers = tight
    rotation = np.asarray(cv2.Rodrigues(vector)[0])
    return rotation, spread * shift.ravel() - rotation @ centre


def _reprojection(
    points: np.ndarray, pixels: np.ndarray, lens: np.ndarray, rotation: np.ndarray, translation: np.ndarray
) -> np.ndarray:
    """Distance in pixels [n], infinite for points behind the camera."""
    projected = (points @ rotation.T + translation) @ lens.T
    front = projected[:, 2] > 0
    image = projected[:, :2] / np.where(front, projected[:, 2], 1)[:, None]
    return np.where(front, np.hypot(*(image - pixels).T), np.inf)
