"""How a sample's numbers are meant: in which frame its points are, through which lens, and what kind of depth it has.

All of it is decided on a probe: the same few hundred pixels of every frame.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fw_pipeline.annotate.quality import MAX_REPROJECTION
from fw_pipeline.guide_layout.conventions import GIVEN, POINTS, ROUNDING, ROWS, same_in_effect, settle

DepthKind = Literal["z", "disparity"]
PointsFrame = Literal["world", "camera"]

MIN_CORRELATION = 0.9  # below it, depth has nothing to do with the points
MAX_DISAGREEMENT = 0.1  # median relative difference of z-depth and the points' z, after one scale per sample
SAME_UNIT = 0.01  # a scale this close to 1 is rounding, not another unit
FLAT = 1e-3  # relative spread of z below which a correlation says nothing


@dataclass(frozen=True)
class Probe:
    """The probed pixels of a sample. NaN where a value is unknown."""

    uv: np.ndarray  # [N, 2] pixel centres as shares of the picture's width and height
    points: np.ndarray  # [T, N, 3] as in the files


@dataclass(frozen=True)
class Reading:
    """How a sample's points are read."""

    frame: PointsFrame
    lens: np.ndarray  # [T, 4] fx fy cx cy as shares of the picture's width and height
    lens_from: str
    error: float  # pixels: median over the frames of their median
    worst: tuple[int, float]  # the frame with the largest median, and that
    landed: np.ndarray  # [T, N, 2] pixels; NaN where unknown or behind the camera

    @property
    def lands(self) -> bool:
        return self.error <= MAX_REPROJECTION and self.worst[1] <= MAX_REPROJECTION


def in_camera(points: np.ndarray, w2c: np.ndarray) -> np.ndarray:
    """World points [T, ..., 3] -> the same in the camera of their frame, w2c [T, 3, 4]."""
    shape = points.shape
    flat = points.reshape(len(points), -1, 3)
    return (flat @ w2c[:, :, :3].transpose(0, 2, 1) + w2c[:, None, :, 3]).reshape(shape)


def read_points(probe: Probe, w2c: np.ndarray, lenses: dict[str, np.ndarray], height: int, width: int) -> Reading:
    """Tell points in the world frame from points in each camera's own by projecting them back onto their pixels.

    Other conventions of rows and points are tried likewise, and none that changes anything may do nearly as well. What points in
    each camera's frame leave open of the rows is for `conventions.require_given_rows`.

    Args:
        probe: T frames of N pixels.
        w2c: [T, 3, 4] of the pose file.
        lenses: where a lens comes from -> fx fy cx cy [T, 4] as shares of the picture. Without any, one lens for all frames
            is fitted to the points.
        height, width: of the picture that pixels are counted in.

    Raises ValueError with the errors in pixels when no frame fits, or another convention fits as well or better.
    """
    tried = {
        name: _project(frame, points, probe.uv, lenses, height, width) for name, frame, points in _conventions(probe.points, w2c)
    }
    world, camera = (tried[name] for name in (_WORLD, _CAMERA))
    given = min((_WORLD, _CAMERA), key=lambda name: tried[name].error)
    if not tried[given].lands:
        reason = (
            f"points land on their pixels neither as world points ({_pixels(world)}) nor as points of each frame's own camera "
            f"({_pixels(camera)}); at most {MAX_REPROJECTION:g} px are allowed"
        )
        best = min(tried, key=lambda name: tried[name].error)
        if tried[best].lands:
            reason += f". They do ({_pixels(tried[best])}) if {best}: write rows that are {GIVEN}, and points with these axes"
        raise ValueError(reason)
    others = {name: reading for name, reading in tried.items() if name not in (_WORLD, _CAMERA)} | {given: tried[given]}
    settle(
        {name: max(reading.error, ROUNDING * max(height, width)) for name, reading in others.items()},
        given,
        {name for name, reading in others.items() if same_in_effect(tried[given].landed, reading.landed)},
        lambda error: f"{error:.2f} px",
    )
    return tried[given]


_WORLD = f"the rows are {GIVEN}"
_CAMERA = "the points are in each camera's own frame"


def _conventions(points: np.ndarray, rows: np.ndarray) -> Iterator[tuple[str, PointsFrame, np.ndarray]]:
    """(what it is like, frame, the points [T, N, 3] in their cameras) under every convention. Camera points need no rows."""
    for axes, turned in POINTS.items():
        own = turned(points)
        with_axes = "" if own is points else f", the points with {axes}"
        yield _CAMERA + with_axes, "camera", own
        for name, read in ROWS.items():
            yield f"the rows are {name}{with_axes}", "world", in_camera(own, read(rows))


def _pixels(reading: Reading) -> str:
    frame, worst = reading.worst
    return f"{reading.error:.2f} px, frame {frame} {worst:.2f} px"


def _project(
    frame: PointsFrame, points: np.ndarray, uv: np.ndarray, lenses: dict[str, np.ndarray], height: int, width: int
) -> Reading:
    """The lens under which camera-frame points [T, N, 3] land closest to their pixels, and how close."""
    with np.errstate(divide="ignore", invalid="ignore"):
        rays = np.where(points[..., 2:] > 0, points[..., :2] / points[..., 2:], np.nan)
    candidates = lenses or {"a fit to the points": np.tile(fit_lens(rays, uv), (len(points), 1))}
    found, size = [], np.array([width, height])
    for name, lens in candidates.items():
        landed = rays * lens[:, None, :2] + lens[:, None, 2:]
        off = np.linalg.norm((landed - uv) * size, axis=-1)
        # A point behind its camera is as wrong as one that lands far away.
        off = np.where(np.isnan(off) & ~np.isnan(points[..., 2]), np.inf, off)
        known = ~np.isnan(off)
        medians = np.array([np.median(row[mask]) if mask.any() else 0.0 for row, mask in zip(off, known, strict=True)])
        worst = int(medians.argmax())
        error = float(np.median(off[known])) if known.any() else np.inf
        found.append(Reading(frame, lens, name, error, (worst, float(medians[worst])), landed * size))
    return min(found, key=lambda reading: reading.error)


def fit_lens(rays: np.ndarray, uv: np.ndarray) -> np.ndarray:
    """Least-squares fx fy cx cy [4] with `uv` [N, 2] = rays [T, N, 2] * f + c; outliers are dropped in three rounds."""
    lens = np.empty(4)
    for axis in range(2):
        x, y = rays[..., axis].ravel(), np.broadcast_to(uv[:, axis], rays.shape[:2]).ravel()
        keep = np.isfinite(x)
        f, c = 0.0, 0.0
        for _ in range(4):
            if keep.sum() < 2:
                break
            centre = x[keep].mean()
            spread = ((x[keep] - centre) ** 2).sum()
            f = float(((x[keep] - centre) * y[keep]).sum() / spread) if spread > 0 else 0.0
            c = float(y[keep].mean() - f * centre)
            off = np.abs(x * f + c - y)
            keep = np.isfinite(x) & (off <= max(3 * float(np.median(off[keep])), 1e-6))
        lens[axis], lens[axis + 2] = f, c
    return lens


# -------------------------------------------------------------------------------------------------------------- depth


@dataclass(frozen=True)
class DepthReading:
    kind: DepthKind
    unit: float  # z = unit * depth for z-depth; 1 for disparity
    correlation: float  # with z or with 1/z, median over the frames; NaN where z does not vary
    why: str
    far: float | None = None  # the value of z-depth, as in the files, that stands for "nothing there"


def read_depth(
    depth: np.ndarray, as_z: np.ndarray, far: float | None, z: np.ndarray, wanted: DepthKind | Literal["auto"]
) -> DepthReading:
    """Tell z-depth from disparity by correlation with the points' z, and find the unit of z-depth.

    Args:
        depth: [T, N] of the probe, <= 0 or not finite where unknown.
        as_z, far: what there is of it as z-depth, 0 where unknown, and the value that stands for nothing (see `far.as_z`).
        z: [T, N] of the points in their own cameras, NaN where unknown.
        wanted: what the user says it is; then it only has to agree.

    Raises ValueError with the numbers when it is neither, or not what was said.
    """
    depth = np.where(np.isfinite(depth), depth, 0).astype(np.float64)
    z = np.where(np.isfinite(z), z, 0)
    usable = (as_z > 0) & (z > 0)
    if not usable.any():
        raise ValueError("no pixel has both a depth and a point in front of its camera")
    varies = bool(np.std(z[usable]) > FLAT * np.mean(z[usable]))
    with_z = _correlation(as_z, z, usable) if varies else np.nan
    inverse = 1 / np.where(z > 0, z, np.inf)
    with_inverse = _correlation(depth, inverse, (depth > 0) & (z > 0)) if varies else np.nan
    numbers = f"correlation with the points' z {with_z:.3f}, with 1/z {with_inverse:.3f}"
    unit = float(np.median(z[usable] / as_z[usable]))
    disagreement = float(np.median(np.abs(unit * as_z[usable] / z[usable] - 1)))
    kind: DepthKind
    if wanted != "auto":
        kind = wanted
    elif not varies:
        if disagreement > FLAT:
            raise ValueError("all points are equally far, so nothing tells z-depth from disparity; say --depth-kind")
        kind = "z"
    else:
        kind = "z" if with_z >= with_inverse else "disparity"
    correlation = with_z if kind == "z" else with_inverse
    if varies and not correlation >= MIN_CORRELATION:
        said = "is neither z-depth nor disparity of these points" if wanted == "auto" else f"is not {wanted} of these points"
        raise ValueError(f"depth {said}: {numbers}; at least {MIN_CORRELATION:g} is expected")
    if kind == "z":
        if disagreement > MAX_DISAGREEMENT:
            raise ValueError(
                f"depth and points disagree by {disagreement:.0%} (median, after one scale for all frames; at most "
                f"{MAX_DISAGREEMENT:.0%}); {numbers}"
            )
        unit = 1.0 if abs(unit - 1) <= SAME_UNIT else unit
    return DepthReading(kind, unit if kind == "z" else 1.0, correlation, numbers, far if kind == "z" else None)


def _correlation(a: np.ndarray, b: np.ndarray, usable: np.ndarray) -> float:
    """Median over the frames of Pearson's correlation of usable pixels; 0 when no frame has one."""
    found = []
    for x, y, mask in zip(a, b, usable, strict=True):
        if mask.sum() > 2 and np.ptp(x[mask]) > 0 and np.ptp(y[mask]) > 0:
            found.append(np.corrcoef(x[mask], y[mask])[0, 1])
    return float(np.median(found)) if found else 0.0
