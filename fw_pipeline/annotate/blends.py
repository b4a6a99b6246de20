"""Dissolves, fades and wipes: scenes that take each other's place little by little.

From frame to frame nothing tells them from motion. So points are followed for up to two seconds and held against what was
around them at first: in one shot much of it is still there, after a transition nothing is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fw_pipeline.annotate.follow import ENOUGH, corners, inside, moved, patches

STEP = 1 / 31  # seconds: frames nearer to one another than this are not looked at
PAUSE = 0.1  # seconds: between frames further apart than this everything has moved, and nothing is concluded
BORDER = 9  # pixels: half the window that points are followed with, and the edge
LINK = 0.4  # agreement with the look before below which a point is lost: halfway between same and other (`kinship`)
EVERY = 6  # looks after which new points are taken
LONGEST = 64  # looks for which points are followed, two seconds at 30 a second
SEEN = 0.15  # share of an anchor's points that must still be in sight
# Agreement below which a scene is gone: mixtures of unrelated scenes end at 0.05 to 0.17. Where points change fast by
# themselves it must be below what that lets expect: 0.4 of their agreement after EVERY looks, continued at half the speed.
# Running animals seen from close by (0.68 after 6 looks) come down to 0.21 after 24 and 0.12 after 48, and are not cut.
GONE, OWN = 0.2, 0.4
# A dissolve's agreement falls below 0.8 of its first value when 0.2 to 0.35 of it is over, and below 0.3 at 0.55 to 0.85.
# Measured on mixtures of 6, 12 and 24 frames: the transition starts at most one such span before the first of these points, and
# ends at most 1.1 after the second, 1.8 where points are lost fast anyway. Some more is left out, and two looks for rounding.
FEW = 0.35  # of its first agreement: an anchor that lost so much is in the midst of a transition
HIGH, LOW, BEFORE, AFTER, MARGIN = 0.8, 0.3, 1.6, 2.0, 2


@dataclass
class _Anchor:
    """Points of one look, followed through the next."""

    at: int  # the look
    points: np.ndarray  # [n, 2] where they are now
    template: np.ndarray  # [n, k] what was around them
    around: np.ndarray  # [n, k] what is around them now
    lost: np.ndarray  # [n] bool, lost within the picture
    left: np.ndarray  # [n] bool, gone over its border
    agreement: list[float] = field(default_factory=list)  # of every look since


class BlendDetector:
    """Finds transitions in a stream of levelled pictures."""

    def __init__(self) -> None:
        self._frames: list[int] = []  # index of the frame of every look
        self._spans: list[tuple[int, int]] = []  # (first look, last look) of each transition
        self.restart()

    def restart(self) -> None:
        """A cut: nothing is followed over it, and no transition reaches over it."""
        looks = len(self._frames)
        self._spans = [(first, min(last, looks - 1)) for first, last in self._spans]
        self._begin, self._resume = looks, looks
        self._time = -np.inf
        self._picture: np.ndarray | None = None
        self._forget()

    def _forget(self) -> None:
        self._anchors: list[_Anchor] = []
        self._usual: list[float] = []  # agreement of this shot's anchors after EVERY looks
        self._since = EVERY  # looks since the last anchor

    def spans(self, frames: int) -> list[tuple[int, int]]:
        """(first frame, one past the last) of each transition in a video of so many frames."""
        edges = [*self._frames, frames]
        return [(edges[first], edges[min(last + 1, len(edges) - 1)]) for first, last in self._spans]

    def add(self, index: int, time: float, picture: np.ndarray) -> None:
        """Look at frame `index`, at `time` seconds."""
        if time - self._time < STEP:
            return
        if time - self._time > PAUSE and self._picture is not None:
            self.restart()
        self._frames.append(index)
        if self._picture is not None:
            self._follow(self._picture, picture)
            self._judge()
        look = len(self._frames) - 1
        if self._since >= EVERY and look >= self._resume:
            points = corners(picture)
            if len(points) >= ENOUGH:
                none = np.zeros(len(points), bool)
                around = patches(picture, points)
                self._anchors.append(_Anchor(look, points, around, around, none, none.copy()))
                self._since = 0
        self._since += 1
        self._picture, self._time = picture, time

    def _follow(self, before: np.ndarray, after: np.ndarray) -> None:
        """Move all anchors' points, at once, and note how well they agree."""
        if not self._anchors:
            return
        there, found = moved(before, after, np.concatenate([anchor.points for anchor in self._anchors]))
        around, seen = patches(after, there), inside(there, after.shape)
        ends = np.cumsum([len(anchor.points) for anchor in self._anchors])[:-1]
        for anchor, *now in zip(self._anchors, *(np.split(part, ends) for part in (there, found, around, seen)), strict=True):
            near = ~inside(anchor.points, after.shape, BORDER)  # not found again after having been here: it has left
            anchor.points = now[0]
            anchor.left |= ~now[3] & (now[1] | near)
            anchor.lost |= (~now[1] | ((anchor.around * now[2]).sum(1) < LINK)) & ~anchor.left
            anchor.around = now[2]
            agree = (anchor.template * now[2]).sum(1).clip(0) * ~anchor.lost
            sight = ~anchor.left
            enough = sight.sum() >= max(ENOUGH, SEEN * len(sight))
            anchor.agreement.append(float(agree[sight].mean()) if enough else np.nan)
            if len(anchor.agreement) == EVERY:
                self._usual.append(anchor.agreement[-1])
        self._anchors = [a for a in self._anchors if len(a.agreement) < LONGEST and np.isfinite(a.agreement[-1])]

    def _judge(self) -> None:
        gone = [anchor for anchor in self._anchors if self._is_gone(anchor)]
        if not gone:
            return
        # The youngest that lost most saw the transition and least besides.
        few = [a for a in self._anchors if a.agreement[0] > 0.5 and a.agreement[-1] < FEW * a.agreement[0]]
        best = (few or gone)[-1]
        first, last = (best.at + 1 + index for index in _span(np.array(best.agreement)))
        self._spans.append((max(first, self._begin), last))
        self._resume = last + 1
        self._forget()

    def _is_gone(self, anchor: _Anchor) -> bool:
        first, now, age = anchor.agreement[0], anchor.agreement[-1], len(anchor.agreement)
        usual = float(np.nanmedian(self._usual)) if self._usual else 1.0
        return first > 0.5 and now < min(GONE, OWN * usual ** (age / (2 * EVERY)))


def _span(agreement: np.ndarray) -> tuple[int, int]:
    """(first, last) index into an anchor's agreements at which its transition surely has not begun, and surely is over."""
    share = agreement / agreement[0]
    high = int(np.argmax(share < HIGH))
    low = int(np.argmax(share < LOW)) if (share < LOW).any() else len(share) - 1
    return high - int(BEFORE * (low - high)) - MARGIN, low + int(AFTER * (low - high)) + MARGIN
