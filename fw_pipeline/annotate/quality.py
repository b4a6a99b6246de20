"""Whether an annotation is good enough to train on, and its change to clip units."""

from __future__ import annotations

import numpy as np
import torch

from fw_model.cameras import unproject
from fw_pipeline.annotate.types import ClipDepth, ClipGeometry, ClipSetAside

MAX_INTERPOLATED = 0.2  # share of frames whose pose was filled in from their neighbours
MIN_VALID = 0.2  # share of pixels with a depth
MAX_REPROJECTION = 2.0  # pixels of the annotation image, median over the frames
GRID_TOLERANCE = 0.5  # pixels: how far a frame's own points may land from the pixels they came from
NEIGHBOUR_TOLERANCE = 0.1  # relative depth disagreement between neighbouring frames, median
SCALE_TOLERANCE = 0.1  # relative: how far a frame's depth may be from the geometry's scale, median over the frames


def check_geometry(geometry: ClipGeometry) -> dict[str, float]:
    """The clip's quality numbers.

    Returns:
        inlier_ratio (mean), reprojection_error (median, pixels), interpolated (share of frames), valid_fraction (share of
        pixels), neighbour_error (median relative depth disagreement with the next frame).

    Raises:
        ClipSetAside: a value is not finite or misses its bar; the message has the numbers.
    """
    for name in ("w2c", "intrinsics", "depth", "confidence", "inlier_ratio", "reprojection_error"):
        if not np.isfinite(getattr(geometry, name)).all():
            raise ClipSetAside(f"geometry: {name} has values that are not finite")
    numbers = {
        "inlier_ratio": float(geometry.inlier_ratio.mean()),
        "reprojection_error": float(np.median(geometry.reprojection_error)),
        "interpolated": float(geometry.interpolated.mean()),
        "valid_fraction": float((geometry.depth > 0).mean()),
    }
    failed = []
    if numbers["interpolated"] > MAX_INTERPOLATED:
        failed.append(f"{numbers['interpolated']:.0%} of the frames could not be posed (at most {MAX_INTERPOLATED:.0%})")
    if numbers["valid_fraction"] < MIN_VALID:
        failed.append(f"depth for {numbers['valid_fraction']:.0%} of the pixels (at least {MIN_VALID:.0%})")
    if numbers["reprojection_error"] > MAX_REPROJECTION:
        failed.append(f"reprojection error {numbers['reprojection_error']:.2f} px (at most {MAX_REPROJECTION:g})")
    if not failed:
        numbers["neighbour_error"] = neighbour_error(geometry.depth, geometry.intrinsics, geometry.w2c)
        if not numbers["neighbour_error"] <= NEIGHBOUR_TOLERANCE:
            failed.append(
                f"neighbouring frames disagree by {numbers['neighbour_error']:.0%} in depth (at most {NEIGHBOUR_TOLERANCE:.0%})"
            )
    if failed:
        raise ClipSetAside("geometry not good enough: " + "; ".join(failed))
    return numbers


def check_depth(result: ClipDepth, geometry: ClipGeometry) -> dict[str, float]:
    """Quality numbers of the final depth, and whether it still is in the one scale of the geometry's cameras.

    Returns:
        network_depth (share of frames that carry the depth network's depth), fit_inlier_ratio (mean) and fit_residual (median)
        over those frames, scale_error (median over the frames of how far their median ratio to the geometry's depth is from 1),
        neighbour_error of the final depth. Only the first where every frame carries the geometry's own depth.

    Raises:
        ClipSetAside: a value is not finite, negative, or misses its bar; the message has the numbers.
    """
    for name in ("depth", "confidence", "scale", "shift", "inlier_ratio", "residual"):
        if not np.isfinite(getattr(result, name)).all():
            raise ClipSetAside(f"depth: {name} has values that are not finite")
    if (result.depth < 0).any():
        raise ClipSetAside("depth has negative values")
    fitted = result.source != ClipDepth.SOURCES.index("geometry")
    numbers = {"network_depth": float(fitted.mean())}
    if not fitted.any():
        return numbers
    numbers["fit_inlier_ratio"] = float(result.inlier_ratio[fitted].mean())
    numbers["fit_residual"] = float(np.median(result.residual[fitted]))
    numbers["scale_error"] = _scale_error(result.depth, geometry.depth)
    numbers["neighbour_error"] = neighbour_error(result.depth, geometry.intrinsics, geometry.w2c)
    failed = [
        f"{what} by {numbers[name]:.0%} (at most {bar:.0%})"
        for name, bar, what in (
            ("scale_error", SCALE_TOLERANCE, "its scale differs from the cameras'"),
            ("neighbour_error", NEIGHBOUR_TOLERANCE, "neighbouring frames disagree"),
        )
        if not numbers[name] <= bar
    ]
    if failed:
        raise ClipSetAside("depth not good enough: " + "; ".join(failed))
    return numbers


def _scale_error(depth: np.ndarray, own: np.ndarray) -> float:
    """Median over the frames [T, H, W] of |median(depth / own) - 1|; NaN when no pixel has both."""
    off = []
    for frame, reference in zip(depth, own, strict=True):
        both = (frame > 0) & (reference > 0)
        if both.any():
            off.append(abs(float(np.median(frame[both] / reference[both])) - 1))
    return float(np.median(off)) if off else float("nan")


def check_consistency(depth: np.ndarray, intrinsics: np.ndarray, w2c: np.ndarray) -> None:
    """Raise ClipSetAside unless depth, intrinsics and poses describe one world seen from its first camera.

    World points of frame t, projected by w2c_t, must land on their own pixels (within 0.5 px: what rounding to float16 and
    float32 may cost); the first pose is the identity, rotations are rotations, everything is finite.

    Args:
        depth: [T, H, W], 0 = invalid.
        intrinsics: [T, 3, 3] pixels.
        w2c: [T, 3, 4].
    """
    for name, value in (("depth", depth), ("intrinsics", intrinsics), ("w2c", w2c)):
        if not np.isfinite(value).all():
            raise ClipSetAside(f"{name} has values that are not finite")
    if (depth < 0).any():
        raise ClipSetAside("depth has negative values")
    if not (depth > 0).any():
        raise ClipSetAside("not a single pixel has a depth")
    if not np.allclose(w2c[0], np.eye(3, 4), atol=1e-6):
        raise ClipSetAside("the first camera is not the identity")
    rotation = w2c[:, :, :3].astype(np.float64)
    skew = np.abs(rotation @ rotation.transpose(0, 2, 1) - np.eye(3)).max()
    if skew > 1e-3 or (np.linalg.det(rotation) < 0).any():
        raise ClipSetAside(f"w2c holds matrices that are no rotations (off by {skew:.2g})")
    points = _world(depth, intrinsics, w2c)
    uv, z = _project(points, intrinsics, w2c)
    off = np.abs(uv - _grid(*depth.shape[1:])).max(-1)
    bad = (depth > 0) & ((off > GRID_TOLERANCE) | (np.abs(z - depth) > 0.01 * depth))
    if bad.any():
        t = int(bad.reshape(len(bad), -1).any(1).argmax())
        raise ClipSetAside(f"points of frame {t} land up to {off[t][depth[t] > 0].max():.2f} px from their pixels")


def neighbour_error(depth: np.ndarray, intrinsics: np.ndarray, w2c: np.ndarray) -> float:
    """Median relative disagreement of each frame's points with the depth the next frame has where they land.

    Args as `check_consistency`. NaN when no point lands on a pixel with a depth.
    """
    errors = []
    _, height, width = depth.shape
    for t in range(len(depth) - 1):
        points = _world(depth[t : t + 1], intrinsics[t : t + 1], w2c[t : t + 1])
        uv, z = _project(points, intrinsics[t + 1 : t + 2], w2c[t + 1 : t + 2])
        column, row = np.floor(uv[0, ..., 0]), np.floor(uv[0, ..., 1])
        inside = (depth[t] > 0) & (z[0] > 0) & (column >= 0) & (column < width) & (row >= 0) & (row < height)
        other = depth[t + 1][row[inside].astype(int), column[inside].astype(int)]
        errors.append((np.abs(other - z[0][inside]) / z[0][inside])[other > 0])
    joined = np.concatenate(errors) if errors else np.empty(0)
    return float(np.median(joined)) if len(joined) else float("nan")


def to_clip_units(depth: np.ndarray, intrinsics: np.ndarray, w2c: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Divide depth and translations by the mean distance of the clip's valid points from its first camera.

    Args as `check_consistency`, in the annotator's units.

    Returns:
        (depth, w2c, scale): in clip units, and what they were divided by.

    Raises:
        ClipSetAside: no valid point, or a distance that is not finite.
    """
    valid = depth > 0
    if not valid.any():
        raise ClipSetAside("not a single pixel has a depth")
    scale = float(np.linalg.norm(_world(depth, intrinsics, w2c)[valid], axis=-1).mean())
    if not np.isfinite(scale) or scale <= 0:
        raise ClipSetAside(f"mean distance of the clip's points is {scale}")
    moved = np.array(w2c, copy=True)
    moved[:, :, 3] /= scale
    return depth / scale, moved, scale


def _world(depth: np.ndarray, intrinsics: np.ndarray, w2c: np.ndarray) -> np.ndarray:
    parts = (torch.from_numpy(np.asarray(a, np.float64)) for a in (depth, intrinsics, w2c))
    return unproject(*parts).numpy()


def _project(points: np.ndarray, intrinsics: np.ndarray, w2c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """World points [T, H, W, 3] -> positions [T, H, W, 2] in their own frame's image, and z [T, H, W]."""
    camera = np.einsum("tij,thwj->thwi", w2c[:, :, :3].astype(np.float64), points) + w2c[:, None, None, :, 3]
    pixel = np.einsum("tij,thwj->thwi", intrinsics.astype(np.float64), camera)
    return pixel[..., :2] / np.maximum(pixel[..., 2:], 1e-12), camera[..., 2]


def _grid(height: int, width: int) -> np.ndarray:
    """Pixel centres [H, W, 2] as (u, v)."""
    return np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), -1)
