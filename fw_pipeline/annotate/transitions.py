"""Dissolves, fades and wipes: where no point of one scene lives on in the next.

Between two pictures of one shot some points can be followed, however the camera moves; from one scene to another none can. So
points of a window's first picture are followed forwards and those of its last one backwards, and what is left of them is
watched: in a shot it goes slowly, in a transition it falls to nothing, seen from both ends.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np

SIZE = 256  # long side of the pictures points are followed in, pixels
STEP = 1 / 15  # seconds between two looks at the picture; a video with fewer frames a second is looked at in each
WINDOW, HOP = 45, 15  # looks in a window, and from one window to the next: transitions of up to two seconds are inside of one
SLOWEST = 0.11  # seconds between looks: from one picture to the next of slower videos points are lost in shots as well
# A fall goes below this part of what was there at most so many looks before; in shots points go slowly. Measured, the better of
# both ends: at most 0.17 in transitions; in shots at least 0.27, there in a blurred walk backwards before a dog, else 0.37.
FALL, WITHIN = 0.2, 12
ONSET = 0.92  # of the same: a fall begins below it
ENOUGH = 0.15  # share from which a fall says something
PURE, REACH = 0.93, 11  # a scene is mixed while less of its points' contrast is left; at most so many looks before they are lost
CELLS, FEWEST = (8, 12), 8  # one point in each cell of a grid; with fewer points in all nothing is said
RADIUS = 5  # of a point's patch, pixels
WEAKEST = 1e-4  # smallest eigenvalue of a corner, grey in 0..1
ALIKE = 0.4  # correlation from which a patch is still the same
FAINT, CLEAR = 0.3, 0.7  # of a patch's contrast: a point counts as gone with less than that left, wholly with more than this
SKIPPED = 3  # looks that points may be out of sight: a flash, a dropped or damaged frame
_LK = {"winSize": (15, 15), "maxLevel": 3, "criteria": (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_COUNT, 20, 0.01)}
_PATCH = np.stack(np.meshgrid(*[np.arange(-RADIUS, RADIUS + 1, dtype=np.float32)] * 2), -1).reshape(-1, 2)


class Points:
    """Points of one picture, and how they fare in others."""

    def __init__(self, grey: np.ndarray) -> None:
        """grey: [h, w] uint8, small."""
        self.grey, self.size = grey, np.array(grey.shape[::-1])
        self.xy = _corners(grey)
        self.born = _patches(grey, self.xy)
        self.left = np.zeros(len(self.xy), bool)  # through the border: says nothing of a transition
        self.here = np.ones(len(self.xy), bool)
        self.value = np.ones(len(self.xy))  # share of its own contrast that is left in a point's patch, 0 for a lost one

    def __len__(self) -> int:
        return int((~self.left).sum())

    def share(self) -> float:
        """Of the points that did not leave the picture, how many live on; a patch that is mixed away counts for less."""
        return float(np.clip((self.value[~self.left] - FAINT) / (CLEAR - FAINT), 0, 1).mean())

    def purity(self) -> float:
        """Median over the living points of the share of contrast that is left."""
        return float(np.median(self.value[self.here])) if self.here.any() else 0.0

    def look(self, grey: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where the living points are in another picture: (xy [n, 2], value [n], left [n])."""
        xy = self.xy[self.here]
        there, found, _ = cv2.calcOpticalFlowPyrLK(self.grey, grey, xy[:, None], None, **_LK)  # type: ignore[call-overload]
        back, found_back, _ = cv2.calcOpticalFlowPyrLK(grey, self.grey, there, None, **_LK)  # type: ignore[call-overload]
        there, off = there[:, 0], np.abs(back[:, 0] - xy).max(1)
        patch, born = _patches(grey, there), self.born[self.here]
        common = (patch * born).sum(1)
        alike = common > ALIKE * np.sqrt((patch**2).sum(1) * (born**2).sum(1) + 1e-6)
        good = (found[:, 0] > 0) & (found_back[:, 0] > 0) & (off < 1) & alike
        value = np.where(good, np.clip(common / (born**2).sum(1), 0, 1), 0)
        # Where few are found these are chance, and so is their motion: what is lost then is not taken to have left.
        speed = float(np.linalg.norm(np.median((there - xy)[good], 0))) if good.mean() > 0.5 else 0.0
        outside = ((there <= RADIUS) | (there >= self.size - 1 - RADIUS)).any(1)
        at_border = np.minimum(xy, self.size - 1 - xy).min(1) < RADIUS + 2 + 2 * speed
        return there, value, outside | (~good & at_border)

    def move(self, grey: np.ndarray, looked: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
        """Go on from that picture, without those that were not found there."""
        there, value, left = looked
        index = np.flatnonzero(self.here)
        self.left[index[left]] = True
        self.value[index] = np.where(left, 0, value)
        self.xy[index] = there
        self.here[index] = (value > 0) & ~left
        self.grey = grey


def survive(before: np.ndarray, after: np.ndarray) -> bool:
    """Whether two pictures [h, w] uint8 show one scene: more than half of the points of one are in the other, at any light.

    By chance some are found wherever one looks: at most a fifth, in smooth noise; 6 % from real clip to real clip.
    """
    points = Points(cv2.equalizeHist(before))
    if len(points) < FEWEST:
        return False
    grey = cv2.equalizeHist(after)
    points.move(grey, points.look(grey))
    return float(points.here.mean()) > 0.5


def fates(window: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """What is left of the first picture's points in every picture of a window, and how pure it is; nan where nothing is known."""
    share, purity = np.full(len(window), np.nan), np.full(len(window), np.nan)
    points = Points(window[0])
    t = 0
    while t < len(window) and len(points) >= FEWEST:
        share[t], purity[t] = points.share(), points.purity()
        if not points.here.any():
            share[t:], purity[t:] = 0, 0
            break
        # Where half of them are gone at once they may be back in a moment: after a flash.
        ahead = window[t + 1 : t + 2 + SKIPPED]
        looks = []
        for grey in ahead:
            looks.append(points.look(grey))
            if looks[-1][1].sum() > 0.5 * points.value.sum():
                break
        if not looks:
            break
        best = max(range(len(looks)), key=lambda n: looks[n][1].sum())
        share[t + 1 : t + 1 + best], purity[t + 1 : t + 1 + best] = share[t], purity[t]
        points.move(ahead[best], looks[best])
        t += best + 1
    return share, purity


def _fall(share: np.ndarray) -> tuple[int, int] | None:
    """(last look before it, first at which the points are as good as gone) of a quick fall; None when they live on or fade."""
    for t in range(1, len(share)):
        before = share[max(0, t - WITHIN) : t]
        if before.max() >= ENOUGH and share[t] <= FALL * before.max():
            return t - len(before) + int(np.flatnonzero(before >= ONSET * before.max())[-1]), t
    return None


def transition(window: list[np.ndarray]) -> tuple[int, int] | None:
    """(last look of pure picture before, first after) of a transition in a window of pictures [h, w] uint8; None without one.

    Where the picture is blank at one end, a fade, it reaches to that end.
    """
    count = len(window)
    share, purity = fates(window)
    share_back, purity_back = fates(window[::-1])
    fall, fall_back = _fall(share), _fall(share_back)
    blank, blank_back = bool(np.isnan(share[0])), bool(np.isnan(share_back[0]))
    if (fall is None and not blank) or (fall_back is None and not blank_back) or (blank and blank_back):
        return None
    mirrored = tuple(count - 1 - look for look in fall_back) if fall_back else (count - 1, 0)
    first, last = min((fall or (0, 0))[0], mirrored[1]), max((fall or (0, 0))[1], mirrored[0])
    if last - first > 1:  # gradual: it began before it showed
        first, last = max(0, first - 1), min(count - 1, last + 1)
    return (0 if blank else _pure(purity, first)), (count - 1 if blank_back else count - 1 - _pure(purity_back, count - 1 - last))


def _pure(purity: np.ndarray, look: int) -> int:
    """The last look until then at which a scene is not mixed yet."""
    reach = max(0, look - REACH)
    pure = np.flatnonzero(purity[reach : look + 1] >= PURE * purity[reach : look + 1].max())
    return reach + int(pure[-1]) if len(pure) else reach


@dataclass(frozen=True)
class _Look:
    index: int  # of the frame in its video
    time: float  # seconds
    grey: np.ndarray


class Transitions:
    """Transitions of a video that is shown picture by picture; holds one window of small pictures."""

    def __init__(self) -> None:
        self.found: list[tuple[int, int]] = []  # frames: last pure one before, first pure one after
        self._looks: deque[_Look] = deque(maxlen=WINDOW)
        self._new = 0
        self._time = -np.inf

    def add(self, index: int, time: float, picture: np.ndarray) -> None:
        """picture: [h, w, 3] uint8 BGR, small."""
        if time - self._time < STEP * 0.9:
            return
        scale = min(1.0, SIZE / max(picture.shape))
        grey = cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY)
        grey = cv2.resize(grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else grey
        self._time = time
        self._looks.append(_Look(index, time, grey))
        self._new += 1
        if self._new >= HOP and len(self._looks) == WINDOW:
            self._judge()

    def border(self, index: int) -> None:
        """A cut before frame `index`, or the end: what comes next has nothing to do with what was."""
        behind = [look for look in self._looks if look.index >= index]
        for _ in behind:
            self._looks.pop()
        if self._new:
            self._judge()
        self._looks.clear()
        self._looks.extend(behind)
        self._new = len(behind)

    def _judge(self) -> None:
        self._new = 0
        if len(self._looks) <= WITHIN or np.median(np.diff([look.time for look in self._looks])) > SLOWEST:
            return
        if span := transition([look.grey for look in self._looks]):
            self.found.append((self._looks[span[0]].index, self._looks[span[1]].index))


def _corners(grey: np.ndarray) -> np.ndarray:
    """The best corner [n, 2] (x, y) float32 of every cell that has one."""
    strength = cv2.cornerMinEigenVal(grey.astype(np.float32) / 255, 5, ksize=3)
    inner = np.zeros_like(strength)
    edge = RADIUS + 2
    inner[edge:-edge, edge:-edge] = strength[edge:-edge, edge:-edge]
    rows, columns = (np.linspace(0, size, cells + 1).astype(int) for size, cells in zip(grey.shape, CELLS, strict=True))
    if min(rows[1], columns[1]) < 1:  # fewer pixels than cells
        return np.empty((0, 2), np.float32)
    found = []
    for top, bottom in pairwise(rows):
        for left, right in pairwise(columns):
            cell = inner[top:bottom, left:right]
            y, x = divmod(int(cell.argmax()), cell.shape[1])
            if cell[y, x] > WEAKEST:
                found.append((left + x, top + y))
    return np.array(found, np.float32).reshape(-1, 2)


def _patches(grey: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """[n, (2 R + 1)^2] float32 around each point, its mean taken away."""
    if not len(xy):
        return np.empty((0, len(_PATCH)), np.float32)
    place = (xy[:, None] + _PATCH).astype(np.float32)
    patch = cv2.remap(grey, place[..., 0], place[..., 1], cv2.INTER_LINEAR).astype(np.float32)
    return patch - patch.mean(1, keepdims=True)
