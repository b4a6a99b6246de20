"""Tracks against poses and lens alone: no point, no depth. What the given cameras get wrong, and which others would not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fw_pipeline.annotate.audit.verdict import Cause
from fw_pipeline.annotate.tracks import Tracks
from fw_pipeline.annotate.vectors import skew

FOCAL_FACTORS = np.exp(np.linspace(-0.7, 0.7, 29))
FLIP = np.diag([1.0, -1.0, -1.0])  # OpenCV's camera axes and OpenGL's
# Another reading is named when it leaves less than half of the error: noise is left by any.
CLEARLY = 0.5
PLAUSIBLE = 1.0  # pixels at a long side of 448 that a right reading may leave


@dataclass(frozen=True)
class Rays:
    """Tracks through a lens: rays [N, T, 2] with z = 1, nan where not seen; `focal` [2] turns them into pixels again."""

    xy: np.ndarray
    seen: np.ndarray
    focal: np.ndarray

    @classmethod
    def of(cls, tracks: Tracks, intrinsics: np.ndarray) -> Rays:
        """intrinsics [T, 3, 3] pixels."""
        focal = intrinsics[:, [0, 1], [0, 1]].astype(np.float64)
        return cls((tracks.xy - intrinsics[:, [0, 1], 2]) / focal, tracks.seen, np.median(focal, axis=0))

    def with_focal(self, factor: float) -> Rays:
        """As if the focal length were `factor` times as long."""
        return Rays(self.xy / factor, self.seen, self.focal * factor)


def gaps(frames: int) -> dict[str, int]:
    """The distances between frames at which poses are judged, by name."""
    return {"1": 1, "5": min(5, frames - 1), "half": max(1, frames // 2)}


def sampson(rays: Rays, w2c: np.ndarray, gap: int) -> np.ndarray:
    """Sampson distances [M], pixels, of all tracks between all frames `gap` apart. Empty when nothing is seen that long.

    Frames between which the given camera does not move have no epipolar line: the distance is then from where a turning camera
    sees the point.
    """
    out = []
    for t in range(len(w2c) - gap):
        both = rays.seen[:, t] & rays.seen[:, t + gap]
        rotation = w2c[t + gap, :, :3] @ w2c[t, :, :3].T
        translation = w2c[t + gap, :, 3] - rotation @ w2c[t, :, 3]
        here, there = (np.c_[rays.xy[both, i], np.ones(both.sum())] for i in (t, t + gap))
        if np.linalg.norm(translation) < 1e-9:
            moved = here @ rotation.T
            out.append(np.linalg.norm((moved[:, :2] / moved[:, 2:] - there[:, :2]) * rays.focal, axis=1))
            continue
        essential = skew(translation / np.linalg.norm(translation)) @ rotation
        line, back = here @ essential.T, there @ essential
        square = ((line[:, :2] / rays.focal) ** 2).sum(1) + ((back[:, :2] / rays.focal) ** 2).sum(1)
        out.append(np.abs((there * line).sum(1)) / np.sqrt(np.maximum(square, 1e-18)))
    return np.concatenate(out) if out else np.empty(0)


def error(rays: Rays, w2c: np.ndarray) -> float:
    """Median Sampson distance at the two longer gaps, the larger one; inf when nothing is seen that long."""
    found = [sampson(rays, w2c, gap) for name, gap in gaps(len(w2c)).items() if name != "1"]
    return max((float(np.median(f)) if len(f) else 0.0 for f in found), default=np.inf)


def readings(w2c: np.ndarray) -> Iterator[tuple[Cause, np.ndarray]]:
    """(what is wrong, the poses if so) for the ways in which poses are commonly misread."""
    flipped = np.concatenate([FLIP @ w2c[:, :, :3] @ FLIP, FLIP @ w2c[:, :, 3:]], -1)
    yield Cause.C2W, inverted(w2c)
    yield Cause.OPENGL, flipped
    yield Cause.C2W_OPENGL, inverted(flipped)
    for shift in (-2, -1, 1, 2):
        index = np.clip(np.arange(len(w2c)) + shift, 0, len(w2c) - 1)
        yield Cause.POSE_SHIFT, w2c[index]


def inverted(w2c: np.ndarray) -> np.ndarray:
    """Rigid poses [T, 3, 4] -> their inverses."""
    rotation = w2c[:, :, :3].transpose(0, 2, 1)
    return np.concatenate([rotation, -rotation @ w2c[:, :, 3:]], -1)


def likely_cause(tracks: Tracks, w2c: np.ndarray, intrinsics: np.ndarray, size: float) -> tuple[Cause, str]:
    """Of poses that are wrong: which other reading of poses or lens the tracks follow, and how it compares, in words."""
    rays = Rays.of(tracks, intrinsics)
    own = error(rays, w2c)
    tried = [(error(rays, poses), cause, cause.value) for cause, poses in readings(w2c)]
    for factor in FOCAL_FACTORS:
        tried.append((error(rays.with_focal(factor), w2c), Cause.FOCAL, f"a focal length {factor:.2f} times as long"))
    best, cause, words = min(tried, key=lambda one: one[0])
    if best < CLEARLY * own and best < PLAUSIBLE * size:
        return cause, f"{words} would leave {best:.2f} px where these leave {own:.2f}"
    return Cause.PATH, f"points lie {own:.2f} px from their epipolar lines, and no other reading of poses or lens mends that"
