"""In which convention a sample's rows and points are: every one is tried, and the layout's own must clearly be it.

World points that are right land on their own pixels, and so tell the rows' convention by themselves. Points in each camera's
own frame land there whatever the rows are, and wrong rows of a small motion move them by little: there the depth that the points
of one frame meet in another tells.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.ndimage import map_coordinates

from fw_pipeline.annotate.quality import MAX_REPROJECTION

GIVEN = "world-to-camera, OpenCV axes"  # what the layout says rows are
# Errors of another convention over those of the given one. From here on, what the other adds is more than all else that is wrong
# with the sample: noise of the depth, drift of the poses, rounding.
CLEARLY = 2.0
ROUNDING = 1e-6  # relative error of depth kept as float32: below it, one error is as good as another
OVERLAP = 0.1  # share of a frame's points that must meet a depth in the other for the pair to say something
STARTS = 4  # pairs of frames of each gap
FLIP = np.diag([1.0, -1.0, -1.0])  # OpenCV axes (y down, z forward) <-> OpenGL axes (y up, z backward)


def inverse(poses: np.ndarray) -> np.ndarray:
    """[T, 3, 4] rigid transforms the other way."""
    rotation = poses[:, :, :3].transpose(0, 2, 1)
    return np.concatenate([rotation, -rotation @ poses[:, :, 3:]], axis=2)


# Name -> rows [T, 3, 4] to what they are as world-to-camera with OpenCV axes. A flipped world changes nothing between frames.
ROWS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    GIVEN: lambda rows: rows,
    "camera-to-world, OpenCV axes": inverse,
    "world-to-camera, OpenGL axes": lambda rows: FLIP @ rows,
    "camera-to-world, OpenGL axes": lambda rows: FLIP @ inverse(rows),
}
# The same of points [..., 3].
POINTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"OpenCV axes": lambda p: p, "OpenGL axes": lambda p: p @ FLIP}


def settle(errors: Mapping[str, float], given: str, ties: Collection[str], shown: Callable[[float], str]) -> None:
    """Raise ValueError unless `given` is clearly right: all others, but for `ties`, have `CLEARLY` times its error.

    errors: what may be so, as a clause -> how far off the sample is then, > 0; `shown` puts an error in words.
    """
    close = [clause for clause, error in errors.items() if error < CLEARLY * errors[given] and clause not in (given, *ties)]
    if not close:
        return
    numbers = "; ".join(f"{shown(error)} if {clause}" for clause, error in errors.items())
    best = min(close, key=errors.__getitem__)
    if errors[given] >= CLEARLY * errors[best]:
        raise ValueError(f"{best} ({numbers}); write them so that {given}")
    raise ValueError(
        f"nothing tells clearly whether {' or '.join([given, *close])} ({numbers}; the right one is at most 1/{CLEARLY:g} of any "
        "other); points in the world frame would tell"
    )


def same_in_effect(here: np.ndarray, other: np.ndarray) -> bool:
    """Whether points land within `MAX_REPROJECTION` of each other (median) in every view: pixels [V, N, 2], NaN where nowhere."""
    for a, b in zip(here, other, strict=True):
        off = np.linalg.norm(a - b, axis=1)
        off = np.where(np.isfinite(a[:, 0]) ^ np.isfinite(b[:, 0]), np.inf, off)
        if not np.isnan(off).all() and np.nanmedian(off) > MAX_REPROJECTION:
            return False
    return True


# --------------------------------------------------------------------------------------------- rows, from points in each camera


@dataclass(frozen=True)
class _Met:
    """Points of one frame in another, under one convention of the rows."""

    pixels: np.ndarray  # [N, 2]; NaN behind the camera
    error: float  # median relative difference of their depth and the one met there; NaN when hardly any is met


def require_given_rows(
    points: np.ndarray, rows: np.ndarray, lens: np.ndarray, z_map: Callable[[int], np.ndarray], height: int, width: int
) -> None:
    """Raise ValueError unless `GIVEN` is clearly the convention of the rows, naming the one that fits best.

    The error of a convention is the mean over pairs of frames of the median relative difference between the depth a point has
    and the one it meets. Where points meet hardly any depth under another convention it counts as 1; pairs where that is so
    under the given one show different parts of the scene and say nothing.

    Args:
        points: [T, N, 3] in the frame of each camera, NaN where unknown.
        rows: [T, 3, 4] of the pose file.
        lens: [T, 4] fx fy cx cy as shares of the picture.
        z_map: frame -> its z-depth [h, w], 0 where unknown.
        height, width: of the picture that pixels are counted in.
    """
    readings = {name: read(rows) for name, read in ROWS.items()}
    met: dict[str, list[_Met]] = {name: [] for name in ROWS}

    @lru_cache(maxsize=4)  # pairs share their second frame
    def inverse_z(frame: int) -> np.ndarray:
        z = np.asarray(z_map(frame), np.float64)
        return np.where(z > 0, 1 / np.where(z > 0, z, 1), np.nan)  # of a plane, 1/z is linear in the picture

    for here, there in pairs(len(rows)):
        for name, w2c in readings.items():
            met[name].append(_meet(points[here], w2c[[here, there]], lens[there], inverse_z(there), height, width))
    landed = {name: np.array([each.pixels for each in found]) for name, found in met.items()}
    ties = {name for name in ROWS if same_in_effect(landed[GIVEN], landed[name])}
    if ties == ROWS.keys():
        return
    errors = {name: np.array([each.error for each in found]) for name, found in met.items()}
    told = np.isfinite(errors[GIVEN])
    if not told.any():
        raise ValueError(f"no two frames see the same points if {_clause(GIVEN)}, so nothing tells whether they are")
    means = {name: max(ROUNDING, float(np.nan_to_num(error[told], nan=1.0).mean())) for name, error in errors.items()}
    settle(
        {_clause(name): mean for name, mean in means.items()},
        _clause(GIVEN),
        {_clause(name) for name in ties},
        lambda error: f"frames differ by {error:.2%}",
    )


def _clause(rows: str) -> str:
    return f"the rows are {rows}"


def pairs(count: int) -> list[tuple[int, int]]:
    """Pairs of frames at gaps from one to the whole sample, at most `STARTS` of each, spread evenly."""
    gaps = sorted({1, count // 4, count // 2, count - 1} - {0}) if count > 1 else []
    starts = ((gap, np.unique(np.linspace(0, count - 1 - gap, STARTS).astype(int))) for gap in gaps)
    return [(int(start), int(start) + gap) for gap, found in starts for start in found]


def _meet(points: np.ndarray, w2c: np.ndarray, lens: np.ndarray, inverse_z: np.ndarray, height: int, width: int) -> _Met:
    """Points [N, 3] of the camera w2c[0], seen by w2c[1] and its map of 1/z [h, w]."""
    world = (points - w2c[0, :, 3]) @ w2c[0, :, :3]
    moved = world @ w2c[1, :, :3].T + w2c[1, :, 3]
    front = moved[:, 2:] > 0
    share = np.where(front, moved[:, :2] / np.where(front, moved[:, 2:], 1) * lens[:2] + lens[2:], np.nan)
    at = share[:, ::-1].T * np.array(inverse_z.shape)[:, None] - 0.5
    difference = np.abs(moved[:, 2] * map_coordinates(inverse_z, np.nan_to_num(at, nan=-9), order=1, cval=np.nan) - 1)
    known = np.isfinite(difference)
    enough = known.sum() > OVERLAP * np.isfinite(points[:, 2]).sum()
    return _Met(share * [width, height], float(np.median(difference[known])) if enough else np.nan)
