"""Values of a depth map that stand for "nothing there": what a renderer writes for the sky, and numbers that a format cut off."""

from __future__ import annotations

import numpy as np

from fw_pipeline.guide_layout.conventions import inverse

FARTHEST = 1e-3  # a disparity below this share of the frame's median is as good as infinitely far: unknown depth
PLATEAU = 0.01  # share of the pixels that have the largest value, to the last bit, for it to be one that is filled in
AXIS = 1e-3  # radians, or share of the depth: motion of the optical axis far beyond the rounding of a pose file
# Where integers, half and single precision end. A map keeps such a number, as a plateau, only where something was cut off.
LARGEST = (
    *(float(np.iinfo(kind).max) for kind in ("u2", "i2", "u4", "i4")),
    *(float(np.finfo(kind).max) for kind in ("f2", "f4")),
)


def near(depth: np.ndarray) -> np.ndarray:
    """Pixels of a map of z-depth [h, w] that hold a depth, bool.

    Not so: 0, NaN and infinity, the largest number of an integer type (whatever was cut off there is farther), and what lies
    beyond the median of all but the largest value by 1 / `FARTHEST`, as it does with disparity.
    """
    known = np.isfinite(depth) & (depth > 0)
    if depth.dtype.kind in "iu":
        known &= depth < np.iinfo(depth.dtype).max
    values = depth[known]
    below = values[values < values.max()] if len(values) else values
    if len(below):
        known &= depth < np.median(below) / FARTHEST
    return known


def as_z(depth: np.ndarray, rows: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, float | None]:
    """A sample's probed depth [T, N], in the files' dtype, as z-depth float64 with 0 where unknown, and the `far_value` in it."""
    known = np.where([near(frame) for frame in depth], depth, 0).astype(np.float64)
    far = far_value(known, rows, points)
    return np.where(known == far, 0, known), far


def far_value(depth: np.ndarray, rows: np.ndarray, points: np.ndarray) -> float | None:
    """The value that fills what is far in a sample's z-depth, or None when there is no sign of one.

    It is the largest of several frames to the last bit, on `PLATEAU` of their pixels, and one of `LARGEST`, or the same though
    the cameras look elsewhere or moved along their axes: the depth of a surface that faces one camera so exactly would be
    another in the next.

    Args:
        depth: [T, N] of the probe, 0 where unknown (see `near`).
        rows: [T, 3, 4] of the pose file, in whatever convention.
        points: [T, N, 3] in the unit of the rows, in whatever frame; their spread is what motion is measured against.
    """
    largest = depth.max(1)
    share = (depth == largest[:, None]).sum(1) / np.maximum((depth > 0).sum(1), 1)
    # A map that is one number all over is a picture of one surface, or of nothing; nothing tells.
    flat = np.flatnonzero((share >= PLATEAU) & (share < 1) & (largest > 0))
    there = points[(depth > 0) & (depth < largest[:, None]) & np.isfinite(points).all(-1)]
    scale = float(np.median(np.linalg.norm(there - np.median(there, 0), axis=1))) if len(there) else np.inf
    for value in np.unique(largest[flat])[::-1]:
        frames = flat[largest[flat] == value]
        if value in LARGEST or (len(frames) > 1 and _axis_moves(rows[frames], scale)):
            return float(value)
    return None


def _axis_moves(rows: np.ndarray, scale: float) -> bool:
    """Whether the optical axis turns, or the camera moves along it, between the first of some poses [F, 3, 4] and another."""
    back = inverse(rows[:1])[0]
    turn = rows[:, :, :3] @ back[:, :3]
    shift = rows[:, :, :3] @ back[:, 3] + rows[:, :, 3]
    return bool((turn[:, 2, 2] < np.cos(AXIS)).any() or (np.abs(shift[:, 2]) > AXIS * scale).any())
