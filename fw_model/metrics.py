"""Camera and depth metrics, in numpy and float64.

Poses are w2c [T, 3, 4] (world to camera, OpenCV axes). Rotations are projected to SO(3) before they are compared, so poses
stored with few digits, or estimated without the constraint, may be passed. ATE and RPE first align the estimate to the truth
by one similarity (rotation, translation, scale); the relative-pose metrics need no alignment.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr

Array = np.ndarray


@dataclass(frozen=True)
class Sim3:
    """x -> scale * rotation @ x + translation."""

    scale: float
    rotation: Array  # [3, 3]
    translation: Array  # [3]

    def apply(self, points: Array) -> Array:
        """points [..., 3] -> [..., 3]."""
        return self.scale * np.asarray(points, np.float64) @ self.rotation.T + self.translation


def project_to_so3(matrix: Array) -> Array:
    """[..., 3, 3] -> the nearest rotations [..., 3, 3] in the Frobenius norm."""
    u, _, vt = np.linalg.svd(np.asarray(matrix, np.float64))
    signs = np.ones(matrix.shape[:-1])
    signs[..., 2] = np.linalg.det(u @ vt)
    return (u * signs[..., None, :]) @ vt


def camera_centres(w2c: Array) -> Array:
    """w2c [T, 3, 4] -> camera centres in the world [T, 3]."""
    w2c = _poses(w2c)
    return -np.einsum("tji,tj->ti", w2c[:, :, :3], w2c[:, :, 3])


def align_sim3(source: Array, target: Array) -> Sim3:
    """The similarity that takes source [N, 3] nearest to target [N, 3] in least squares (Umeyama 1991).

    When all source points coincide, the scale is 1. Raises ValueError on empty, unequal or non-finite inputs.
    """
    source, target = np.asarray(source, np.float64), np.asarray(target, np.float64)
    if source.shape != target.shape or source.ndim != 2 or source.shape[1] != 3 or not len(source):
        raise ValueError(f"align_sim3: expected two [N, 3] arrays, got {source.shape} and {target.shape}")
    if not (np.isfinite(source).all() and np.isfinite(target).all()):
        raise ValueError("align_sim3: points must be finite")
    mean_s, mean_t = source.mean(0), target.mean(0)
    centred_s, centred_t = source - mean_s, target - mean_t
    u, singular, vt = np.linalg.svd(centred_t.T @ centred_s / len(source))
    signs = np.array([1.0, 1.0, np.sign(np.linalg.det(u @ vt))])
    rotation = (u * signs) @ vt
    variance = centred_s.var(0).sum()
    scale = float((singular * signs).sum() / variance) if variance > 0 else 1.0
    return Sim3(scale, rotation, mean_t - scale * rotation @ mean_s)


def path_extent(w2c: Array) -> float:
    """Diagonal of the bounding box of the camera centres of w2c [T, 3, 4]."""
    return float(np.linalg.norm(np.ptp(camera_centres(w2c), axis=0)))


def ate(w2c_est: Array, w2c_gt: Array) -> float:
    """Absolute trajectory error: RMS distance of camera centres after Sim(3) alignment, as a fraction of the true path's
    extent (0 = exact). Raises ValueError when the true camera does not move, for then there is no scale to align."""
    est, gt = camera_centres(w2c_est), camera_centres(w2c_gt)
    extent = _extent(w2c_gt)
    aligned = align_sim3(est, gt).apply(est)
    return float(np.sqrt(((aligned - gt) ** 2).sum(1).mean()) / extent)


def rpe(w2c_est: Array, w2c_gt: Array, delta: int = 1) -> tuple[float, float]:
    """Relative pose error over pairs (t, t + delta), after the Sim(3) scale of the whole path: where the later camera stands in
    the earlier one's axes, as the TUM benchmark defines it.

    Returns (RMS translation error as a fraction of the true path's extent, RMS rotation error in degrees).
    """
    est, gt = _poses(w2c_est), _poses(w2c_gt)
    _same_length(est, gt)
    if not 1 <= delta < len(gt):
        raise ValueError(f"rpe: delta must lie in 1..{len(gt) - 1}, got {delta}")
    extent = _extent(w2c_gt)
    scale = align_sim3(camera_centres(est), camera_centres(gt)).scale
    first, second = np.arange(len(gt) - delta), np.arange(delta, len(gt))
    rotation_est, translation_est = _relative(est, second, first)
    rotation_gt, translation_gt = _relative(gt, second, first)
    distance = ((scale * translation_est - translation_gt) ** 2).sum(1)
    angle = _rotation_angle(rotation_est, rotation_gt)
    return float(np.sqrt(distance.mean()) / extent), float(np.sqrt((angle**2).mean()))


def relative_pose_errors(w2c_est: Array, w2c_gt: Array) -> tuple[Array, Array]:
    """Errors of the relative poses of all T(T-1)/2 pairs of frames, in degrees: (rotation [P], translation direction [P]).

    Directions need no scale. A pair whose true relative translation is zero (below 1e-6 of the path's extent) has none:
    its error is 0; an estimate of zero where the truth moves counts as 180.
    """
    est, gt = _poses(w2c_est), _poses(w2c_gt)
    _same_length(est, gt)
    first, second = np.triu_indices(len(gt), k=1)
    rotation_est, translation_est = _relative(est, first, second)
    rotation_gt, translation_gt = _relative(gt, first, second)
    length_est, length_gt = np.linalg.norm(translation_est, axis=1), np.linalg.norm(translation_gt, axis=1)
    cross = np.linalg.norm(np.cross(translation_est, translation_gt), axis=1)
    angle = np.degrees(np.arctan2(cross, (translation_est * translation_gt).sum(1)))  # exact near 0, unlike arccos
    angle = np.where(length_est <= 1e-6 * path_extent(est), 180.0, angle)
    return _rotation_angle(rotation_est, rotation_gt), np.where(length_gt <= 1e-6 * path_extent(gt), 0.0, angle)


def rra(rotation_errors: Array, threshold: float = 15.0) -> float:
    """Relative rotation accuracy: share of pairs whose rotation error is below `threshold` degrees."""
    return _share_below(rotation_errors, threshold)


def rta(translation_errors: Array, threshold: float = 15.0) -> float:
    """Relative translation accuracy: share of pairs whose direction error is below `threshold` degrees."""
    return _share_below(translation_errors, threshold)


def auc(rotation_errors: Array, translation_errors: Array, threshold: int = 30) -> float:
    """Mean over the thresholds 1, 2, ..., `threshold` degrees of the share of pairs whose larger error is below it (0..1)."""
    worst = np.maximum(rotation_errors, translation_errors)
    return float(np.mean([_share_below(worst, degrees) for degrees in range(1, threshold + 1)]))


def depth_scale(predicted: Array, target: Array, valid: Array) -> float:
    """The one factor per clip that brings predicted depth to the target: median of target / predicted over usable pixels.

    Usable: valid, with a positive target and a positive, finite prediction. NaN when there is none.
    """
    use = _usable(predicted, target, valid) & np.isfinite(predicted) & (np.asarray(predicted) > 0)
    if not use.any():
        return float("nan")
    return float(np.median(np.asarray(target, np.float64)[use] / np.asarray(predicted, np.float64)[use]))


def absrel(predicted: Array, target: Array, valid: Array) -> float:
    """Mean |s p - d| / d over valid pixels of a clip, s one scale per clip (`depth_scale`). Any shape, equal for all three.

    NaN when no pixel is valid or nothing usable was predicted; a non-finite prediction on a valid pixel makes it non-finite.
    """
    use = _usable(predicted, target, valid)
    p, d = np.asarray(predicted, np.float64)[use], np.asarray(target, np.float64)[use]
    return float(np.mean(np.abs(depth_scale(predicted, target, valid) * p - d) / d)) if use.any() else float("nan")


def delta125(predicted: Array, target: Array, valid: Array) -> float:
    """Share of valid pixels with max(s p / d, d / (s p)) < 1.25, s one scale per clip; NaN when no pixel is valid."""
    use = _usable(predicted, target, valid)
    if not use.any():
        return float("nan")
    ratio = depth_scale(predicted, target, valid) * np.asarray(predicted, np.float64)[use] / np.asarray(target, np.float64)[use]
    return float(np.mean((ratio < 1.25) & (ratio > 1 / 1.25)))


def point_error(predicted: Array, target: Array, valid: Array) -> tuple[float, float]:
    """Errors of a point map [T, H, W, 3]: (mean |P - G| as it is, mean |s P - G| / |G| after one scale s per clip).

    s is the median of |G| / |P|. NaN when no pixel is valid.
    """
    use = np.asarray(valid, bool)
    p, g = np.asarray(predicted, np.float64)[use], np.asarray(target, np.float64)[use]
    if not len(g):
        return float("nan"), float("nan")
    length_p, length_g = np.linalg.norm(p, axis=1), np.linalg.norm(g, axis=1)
    if not (length_p > 0).any():
        return float(length_g.mean()), float("nan")
    scale = np.median(length_g[length_p > 0] / length_p[length_p > 0])
    ratio = np.linalg.norm(scale * p - g, axis=1)[length_g > 0] / length_g[length_g > 0]
    return float(np.linalg.norm(p - g, axis=1).mean()), float(ratio.mean())


def agreement(depth: Array, points: Array, w2c: Array, intrinsics: Array, tolerance: float = 0.05) -> float:
    """Whether depth, points and cameras of one output tell the same story: the share of pixels at which they do.

    A pixel does where its point, seen by its frame's camera, lies within `tolerance` of its depth and is projected within
    `tolerance` of the image's diagonal from its own centre. No truth is needed, and agreement does not make it true.

    depth [T, H, W], points [T, H, W, 3] in the world, w2c [T, 3, 4], intrinsics [T, 3, 3] in pixels.
    """
    depth, points = np.asarray(depth, np.float64), np.asarray(points, np.float64)
    _, height, width = depth.shape
    seen = np.einsum("tij,thwj->thwi", np.asarray(w2c, np.float64)[:, :, :3], points) + w2c[:, None, None, :, 3]
    pixels = np.einsum("tij,thwj->thwi", np.asarray(intrinsics, np.float64), seen)
    front = seen[..., 2] > 0
    z = np.where(front, seen[..., 2], 1.0)
    u, v = pixels[..., 0] / z - (np.arange(width) + 0.5), pixels[..., 1] / z - (np.arange(height)[:, None] + 0.5)
    near = np.hypot(u, v) <= tolerance * np.hypot(height, width)
    return float((front & near & (np.abs(seen[..., 2] - depth) <= tolerance * depth)).mean())


def fov_error(intrinsics_est: Array, intrinsics_gt: Array, height: int, width: int) -> float:
    """Mean absolute error of the vertical and horizontal field of view, in degrees; intrinsics [T, 3, 3] in pixels."""
    errors = []
    for axis, side in ((0, width), (1, height)):
        est, gt = (2 * np.arctan(0.5 * side / np.asarray(k, np.float64)[:, axis, axis]) for k in (intrinsics_est, intrinsics_gt))
        errors.append(np.abs(est - gt))
    return float(np.degrees(np.mean(errors)))


def flicker(predicted: Array, target: Array, valid: Array) -> float:
    """Mean |log(p/d) at t + 1 - log(p/d) at t| over pixels [T, H, W] valid in both frames.

    The relative change that is not the scene's: a depth that is wrong by one factor per clip does not flicker. NaN when no
    pixel is valid twice, or p is not positive.
    """
    use = _usable(predicted, target, valid)
    p, d = np.asarray(predicted, np.float64), np.asarray(target, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log(p / np.where(use, d, 1.0))
    both = use[1:] & use[:-1]
    return float(np.abs(ratio[1:] - ratio[:-1])[both].mean()) if both.any() else float("nan")


def calibration(error: Array, confidence: Array, bins: int = 10) -> tuple[Array, float]:
    """Does more confidence mean less error? (mean error by decile of confidence [bins], Spearman's rank correlation).

    Args:
        error: [N], of one kind.
        confidence: [N]; only its order counts.
        bins: equal counts, least confident first. -1 would be perfect, 0 says nothing; a confidence that never varies gives NaN.
    """
    error, confidence = np.asarray(error, np.float64).ravel(), np.asarray(confidence, np.float64).ravel()
    if len(error) != len(confidence):
        raise ValueError(f"calibration: {len(error)} errors but {len(confidence)} confidences")
    if len(error) < bins or np.ptp(confidence) == 0:
        return np.full(bins, np.nan), float("nan")
    order = np.argsort(confidence, kind="stable")
    curve = np.array([part.mean() for part in np.array_split(error[order], bins)])
    return curve, float(spearmanr(confidence, error).statistic)


def _poses(w2c: Array) -> Array:
    w2c = np.asarray(w2c, np.float64)
    if w2c.ndim != 3 or w2c.shape[1:] != (3, 4) or not len(w2c):
        raise ValueError(f"expected poses w2c [T, 3, 4], got {w2c.shape}")
    if not np.isfinite(w2c).all():
        raise ValueError("poses must be finite")
    return np.concatenate([project_to_so3(w2c[:, :, :3]), w2c[:, :, 3:]], axis=2)


def _same_length(est: Array, gt: Array) -> None:
    if len(est) != len(gt):
        raise ValueError(f"{len(est)} estimated poses but {len(gt)} true ones")


def _extent(w2c: Array) -> float:
    extent = path_extent(w2c)
    if extent <= 0:
        raise ValueError("the true camera does not move: there is no path extent to compare with")
    return extent


def _relative(w2c: Array, first: Array, second: Array) -> tuple[Array, Array]:
    """Rotation [P, 3, 3] and translation [P, 3] that take camera `first` coordinates to camera `second`."""
    rotation = w2c[second, :, :3] @ w2c[first, :, :3].transpose(0, 2, 1)
    return rotation, w2c[second, :, 3] - np.einsum("pij,pj->pi", rotation, w2c[first, :, 3])


def _rotation_angle(a: Array, b: Array) -> Array:
    """Angle in degrees between rotations [P, 3, 3], accurate for small and for half turns."""
    difference = a @ b.transpose(0, 2, 1)
    skew = difference - difference.transpose(0, 2, 1)
    sine = 0.5 * np.linalg.norm(np.stack([skew[:, 2, 1], skew[:, 0, 2], skew[:, 1, 0]], axis=1), axis=1)
    return np.degrees(np.arctan2(sine, 0.5 * (np.trace(difference, axis1=1, axis2=2) - 1)))


def _share_below(errors: Array, threshold: float) -> float:
    errors = np.asarray(errors, np.float64)
    return float((errors < threshold).mean()) if errors.size else float("nan")


def _usable(predicted: Array, target: Array, valid: Array) -> Array:
    if np.shape(predicted) != np.shape(target) or np.shape(valid) != np.shape(target):
        raise ValueError(
            f"depth shapes differ: predicted {np.shape(predicted)}, target {np.shape(target)}, valid {np.shape(valid)}"
        )
    return np.asarray(valid, bool) & (np.asarray(target) > 0)
