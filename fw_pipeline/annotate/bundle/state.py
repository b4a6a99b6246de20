"""What bundle adjustment works on: observations, and solutions side by side. Conventions: see `adjust`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Observations:
    """Where points were seen: observation o is point `point[o]` in frame `frame[o]` at `xy[o]`, sorted by point."""

    point: np.ndarray  # [O] int
    frame: np.ndarray  # [O] int
    xy: np.ndarray  # [O, 2] float64 pixels from the principal point
    points: int
    frames: int
    reference: int
    focal: tuple[float, float]  # fx, fy in pixels where the log focal length is 0

    @classmethod
    def of(
        cls, xy: np.ndarray, seen: np.ndarray, reference: int, focal: tuple[float, float], centre: tuple[float, float]
    ) -> Observations:
        """From xy [N, T, 2] in pixels and seen [N, T]."""
        point, frame = np.nonzero(seen)
        position = xy[point, frame].astype(np.float64) - np.asarray(centre, np.float64)
        return cls(point, frame, position, len(xy), xy.shape[1], reference, focal)

    @cached_property
    def starts(self) -> tuple[np.ndarray, np.ndarray]:
        """Where each point's observations begin, and which points have any."""
        present, first = np.unique(self.point, return_index=True)
        return first, present

    @cached_property
    def in_frame(self) -> np.ndarray:
        """[O, T] 1 where the observation is in the frame."""
        return np.eye(self.frames)[self.frame]

    @cached_property
    def time(self) -> np.ndarray:
        """[T] from the reference frame, in clip lengths."""
        return (np.arange(self.frames) - self.reference) / max(1, self.frames - 1)

    def per_point(self, value: np.ndarray) -> np.ndarray:
        """[..., O] -> sums [..., N]."""
        first, present = self.starts
        out = np.zeros((*value.shape[:-1], self.points))
        out[..., present] = np.add.reduceat(value, first, axis=-1)
        return out

    def per_frame(self, value: np.ndarray) -> np.ndarray:
        """[..., O] -> sums [..., T]."""
        return value @ self.in_frame

    def select(self, keep: np.ndarray) -> Observations:
        """The observations at `keep` [O] bool; points and frames keep their numbers."""
        return replace(self, point=self.point[keep], frame=self.frame[keep], xy=self.xy[keep])


@dataclass(frozen=True)
class State:
    """B solutions side by side."""

    rotation: np.ndarray  # [B, T, 3, 3]
    translation: np.ndarray  # [B, T, 3]
    direction: np.ndarray  # [B, N, 3] unit
    inverse: np.ndarray  # [B, N] inverse distance
    log_focal: np.ndarray  # [B, 2]: log of the focal length over that of `Observations.focal`, and its change over the clip

    def __len__(self) -> int:
        return len(self.rotation)

    def take(self, which: np.ndarray | list[int]) -> State:
        """The solutions at `which`."""
        i = np.asarray(which)
        return State(self.rotation[i], self.translation[i], self.direction[i], self.inverse[i], self.log_focal[i])

    def where(self, chosen: np.ndarray, other: State) -> State:
        """`other` [B] where chosen [B], else self."""
        c = chosen
        return State(
            np.where(c[:, None, None, None], other.rotation, self.rotation),
            np.where(c[:, None, None], other.translation, self.translation),
            np.where(c[:, None, None], other.direction, self.direction),
            np.where(c[:, None], other.inverse, self.inverse),
            np.where(c[:, None], other.log_focal, self.log_focal),
        )

    def scaled(self) -> State:
        """The same scenes with the points' median inverse distance positive and the path of unit size."""
        size = np.sqrt((self.translation**2).sum(-1).mean(-1)) + 1e-12
        size *= np.where(np.median(self.inverse, axis=1) < 0, -1, 1)
        return replace(self, translation=self.translation / size[:, None, None], inverse=self.inverse * size[:, None])

    def mirrored(self) -> State:
        """Inverse distances reflected about their median, translations reversed: what a distant scene is mistaken for."""
        middle = np.median(self.inverse, axis=1, keepdims=True)
        return replace(self, translation=-self.translation, inverse=2 * middle - self.inverse)


def stack(states: list[State]) -> State:
    """Solutions of the same observations, side by side."""
    parts = ((s.rotation, s.translation, s.direction, s.inverse, s.log_focal) for s in states)
    return State(*(np.concatenate(part) for part in zip(*parts, strict=True)))
