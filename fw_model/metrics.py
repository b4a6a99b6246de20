"""Camera and depth metrics, in numpy and float64.

Poses are w2c [T, 3, 4] (world to camera, OpenCV axes). Rotations are projected to SO(3) before they are compared, so poses
stored with few digits, or estimated without the constraint, may be passed. ATE and RPE first align the estimate to the truth
by one similarity (rotation, translation, scale); the relative-pose metrics need no alignment.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

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
    """Relative pose error over pairs (t, t + delta), after the Sim(3) scale of the whole path.

    Returns (RMS translation error as a fraction of the true path's extent, RMS rotation error in degrees).
    """
    est, gt = _poses(w2c_est), _poses(w2c_gt)
    _same_length(est, gt)
    if not 1 <= delta < len(gt):
        raise ValueError(f"rpe: delta must lie in 1..{len(gt) - 1}, got {delta}")
    extent = _extent(w2c_gt)
    scale = align_sim3(camera_centres(est), camera_centres(gt)).scale
    first, second = np.arange(len(gt) - delta), np.arange(delta, len(gt))
    rotation_est, translation_est = _relative(est, first, second)
    rotation_gt, translation_gt = _relative(gt, first, second)
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
