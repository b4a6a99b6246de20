"""Points followed through a clip: the correspondences that cameras, lens, moving regions and the audit are found from.

Pyramidal Lucas-Kanade from frame to frame, each step checked by following it back. The picture is topped up with new points
every few frames wherever none is left, the best corner of each empty cell, so that walls and ground with weak texture count as
much as a poster; new points are followed to both ends of the clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np

HALF = 0.5  # OpenCV has the centre of the upper left pixel at 0, the project at (0.5, 0.5)


@dataclass(frozen=True)
class TrackSettings:
    """How points are found and followed. Lengths are pixels at a long side of 448 and grow with the picture."""

    # A new point in every cell of this size that has none. With 16, ends of clips with weak texture hung on a few dozen points
    # and were placed up to 6 % of the path away (real clip, ATE 2.0 %; with 12: 0.8 %).
    cell: int = 12
    every: int = 4  # frames between two looks for new points
    # Side of the patch that is followed. Against exact cameras a larger one drifts more (it straddles depth edges and sees
    # perspective change): epipolar error over 10 frames, rendered rooms and real ones, 21: .19/.67, 15: .14/.53, 11: .11/.41 px.
    window: int = 11
    levels: int = 3  # of the pyramid above the picture
    round_trip: float = 0.3  # there and back again: how far from the start a step may end
    weakest: float = 4e-5  # smallest eigenvalue of a corner, grey in 0..1; below it camera noise is followed
    edge: int = 4  # distance from the border
    min_length: int = 4  # frames


@dataclass(frozen=True)
class Tracks:
    """N points in T frames of a height x width picture; pixel (row v, column u) has its centre at (u + 0.5, v + 0.5)."""

    xy: np.ndarray  # [N, T, 2] float32 pixels; nan where not seen
    seen: np.ndarray  # [N, T] bool; a point is seen in consecutive frames
    height: int
    width: int

    def __len__(self) -> int:
        return len(self.xy)

    @property
    def frames(self) -> int:
        return self.xy.shape[1]

    @cached_property
    def length(self) -> np.ndarray:
        """[N] frames each point is seen in."""
        return self.seen.sum(1)

    def between(self, i: int, j: int) -> np.ndarray:
        """Indices [M] of the points seen in both frame i and frame j."""
        return np.flatnonzero(self.seen[:, i] & self.seen[:, j])

    def subset(self, idx: np.ndarray | Sequence[int]) -> Tracks:
        """The points at idx (indices or [N] bool), in that order."""
        idx = np.asarray(idx)
        idx = idx if idx.size else idx.astype(int)
        return Tracks(self.xy[idx], self.seen[idx], self.height, self.width)

    def at(self, frames: np.ndarray | Sequence[int]) -> Tracks:
        """All points in some of the frames only; points that are then seen nowhere stay."""
        frames = np.asarray(frames)
        return Tracks(self.xy[:, frames], self.seen[:, frames], self.height, self.width)

    def without(self, mask: np.ndarray, share: float = 0.3) -> Tracks:
        """The points that lie under `mask` [T, height, width] bool in at most `share` of the frames they are seen in."""
        if mask.shape != (self.frames, self.height, self.width):
            raise ValueError(f"mask is {list(mask.shape)}, expected {[self.frames, self.height, self.width]}")
        if not len(self):
            return self
        place = np.where(self.seen[..., None], self.xy, 0).astype(int)
        column, row = place[..., 0].clip(0, self.width - 1), place[..., 1].clip(0, self.height - 1)
        under = mask[np.arange(self.frames), row, column] & self.seen
        return self.subset(under.sum(1) <= share * self.length)


def follow(frames: np.ndarray, settings: TrackSettings = TrackSettings()) -> Tracks:
    """Follow points through frames [T, H, W, 3] uint8 RGB (or [T, H, W] grey).

    Deterministic. A point's frames are consecutive; points seen in fewer than `min_length` frames are left out. A picture
    without texture gives no tracks, which is no error here. Raises ValueError for another shape or dtype.
    """
    if frames.dtype != np.uint8 or frames.ndim not in (3, 4) or (frames.ndim == 4 and frames.shape[3] != 3):
        raise ValueError(f"frames are {list(frames.shape)} {frames.dtype}, expected [T, H, W, 3] uint8")
    count, height, width = frames.shape[:3]
    size = max(1.0, max(height, width) / 448)
    grey = [np.ascontiguousarray(f) if f.ndim == 2 else cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in frames]
    window = round(settings.window * size) // 2 * 2 + 1
    step = _Step(grey, (height, width), window, settings.levels, settings.round_trip * size, settings.edge * size)

    xy = np.full((0, count, 2), np.nan, np.float32)
    born = np.empty(0, int)
    for t in range(count):
        if t:
            xy[:, t] = step(xy[:, t - 1], t - 1, t)
        if t % settings.every == 0 or t == count - 1:
            new = _new_points(grey[t], xy[:, t], settings, size)
            xy = np.concatenate([xy, np.full((len(new), count, 2), np.nan, np.float32)])
            xy[len(born) :, t] = new
            born = np.concatenate([born, np.full(len(new), t)])
    for t in range(count - 2, -1, -1):
        back = np.flatnonzero(born > t)
        xy[back, t] = step(xy[back, t + 1], t + 1, t)
    seen = np.isfinite(xy[..., 0])
    kept = seen.sum(1) >= min(settings.min_length, count)
    return Tracks(xy[kept] + np.float32(HALF), seen[kept], height, width)


@dataclass(frozen=True)
class _Step:
    """One step of all points, in OpenCV's coordinates."""

    grey: list[np.ndarray]
    size: tuple[int, int]
    window: int
    levels: int
    round_trip: float
    edge: float

    def __call__(self, xy: np.ndarray, source: int, target: int) -> np.ndarray:
        """Positions [N, 2] in frame `source`, nan for what is lost already -> in frame `target`, nan for what is lost now."""
        out = np.full_like(xy, np.nan)
        alive = np.flatnonzero(np.isfinite(xy[:, 0]))
        if not len(alive):
            return out
        start = np.ascontiguousarray(xy[alive][:, None])
        there, found = self._flow(source, target, start)
        back, found_back = self._flow(target, source, there)
        height, width = self.size
        inside = (there[:, 0] >= self.edge).all(1) & (there[:, 0] <= np.array([width, height]) - 1 - self.edge).all(1)
        off = np.linalg.norm((back - start)[:, 0], axis=1)
        good = found & found_back & inside & (off < self.round_trip)
        out[alive[good]] = there[good, 0]
        return out

    def _flow(self, source: int, target: int, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        there, status, _ = cv2.calcOpticalFlowPyrLK(
            self.grey[source],
            self.grey[target],
            start,
            None,  # type: ignore[call-overload]
            winSize=(self.window, self.window),
            maxLevel=self.levels,
            criteria=(cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_COUNT, 30, 0.003),
            minEigThreshold=1e-5,
        )
        return there, status[:, 0] > 0


def _new_points(grey: np.ndarray, taken: np.ndarray, settings: TrackSettings, size: float) -> np.ndarray:
    """The best corner [M, 2] of every cell that has no living point among `taken` [N, 2] (nan: lost), finer than a pixel."""
    height, width = grey.shape
    cell = round(settings.cell * size)
    rows, columns = -(-height // cell), -(-width // cell)
    strength = cv2.cornerMinEigenVal(grey.astype(np.float32) / 255, blockSize=max(3, round(5 * size)), ksize=3)
    edge = round((settings.edge + 2) * size)
    padded = np.zeros((rows * cell, columns * cell), np.float32)
    padded[edge : height - edge, edge : width - edge] = strength[edge : height - edge, edge : width - edge]
    living = taken[np.isfinite(taken[:, 0])]
    for x, y in np.rint(living).astype(int):  # no second point beside a living one
        near = cell // 2
        padded[max(0, y - near) : y + near + 1, max(0, x - near) : x + near + 1] = 0
    cells = padded.reshape(rows, cell, columns, cell).transpose(0, 2, 1, 3).reshape(rows * columns, -1)
    best = cells.argmax(1)
    row = np.arange(rows * columns) // columns * cell + best // cell
    column = np.arange(rows * columns) % columns * cell + best % cell
    occupied = np.zeros(rows * columns, bool)
    place = (living // cell).astype(int)
    occupied[place[:, 1].clip(0, rows - 1) * columns + place[:, 0].clip(0, columns - 1)] = True
    good = (cells.max(1) > settings.weakest) & ~occupied
    return np.stack([column[good], row[good]], 1).astype(np.float32)
