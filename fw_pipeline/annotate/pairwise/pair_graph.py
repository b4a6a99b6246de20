"""Which pairs of frames the two-view network sees, what it says about each, and the checks on that before any is believed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

from fw_pipeline.annotate.types import ClipSetAside

SPREAD = 1e-3  # a pointmap whose points stay within this fraction of their distance is one point, not a scene
UNSURE = 0.3  # of the 80th percentile of a map's confidence
LOW_CONFIDENCE = 1.1  # the network's floor is 1; a clip whose better pixels stay under this was not understood


@dataclass(frozen=True)
class PairPrediction:
    """Two pointmaps of one pair of frames, both in the frame of camera `i`, in a scale of the pair's own.

    Arrays are numpy or torch. Pixel (row v, column u) is the ray through image position (u, v): the network's integer grid.
    """

    i: int
    j: int
    points_i: Any  # [H, W, 3] points that frame i sees
    confidence_i: Any  # [H, W] > 0; the network's start at 1. Used as relative weights of the pixels
    points_j: Any  # [H, W, 3] points that frame j sees, in camera i
    confidence_j: Any  # [H, W]


def pair_graph(num_images: int, window: int = 3, symmetric: bool = True, long_links: bool = True) -> list[tuple[int, int]]:
    """Pairs (i, j) for a video: a sliding window that does not close, and ever longer, ever rarer links against drift.

    Every frame is paired with the next `window` ones. The link (i, i + 2**k) is added for those 2**k beyond the window that
    divide i: their number halves as their length doubles, so the whole grows linearly with `num_images`.

    Args:
        symmetric: also (j, i), as a network whose two views are not interchangeable wants it: twice the passes and
            twice the measurements of each pixel.
        long_links: whether to add them.

    Raises ValueError when there is no pair to form.
    """
    if num_images < 2 or window < 1:
        raise ValueError(f"pair_graph: needs 2 images and a window of 1, got {num_images} and {window}")
    pairs = {(i, j) for i in range(num_images) for j in range(i + 1, min(i + window + 1, num_images))}
    length = 2
    while long_links and length < num_images:
        if length > window:
            pairs |= {(i, i + length) for i in range(0, num_images - length, length)}
        length *= 2
    ordered = sorted(pairs)
    return ordered + [(j, i) for i, j in ordered] if symmetric else ordered


def to_numpy(array: Any) -> np.ndarray:
    """numpy or torch (any device, any float type) -> float32 numpy, without a copy where possible."""
    if hasattr(array, "detach"):
        array = array.detach().cpu().float().numpy()
    return np.asarray(array, np.float32)


def sure_level(confidence: np.ndarray) -> float:
    """Confidence below which a pixel of this map [any shape, 0 = unusable] is not used to find cameras.

    Where a network is unsure (sky, glass, what moves) whole regions are wrong together, which robust averages do not survive.
    The level is relative to the map's own better pixels, so that a fifth of them at least are always used.
    """
    known = confidence[confidence > 0]
    return UNSURE * float(np.quantile(known[:: max(1, known.size // 2000)], 0.8)) if known.size else 0.0


@dataclass(frozen=True)
class PairMaps:
    """Checked predictions of E usable pairs as numpy. Side 0 is view i, the source, in whose camera frame both are; 1 is j."""

    index: np.ndarray  # [E] position of each usable pair in the caller's list
    views: np.ndarray  # [E, 2] the frames (i, j)
    points: list[tuple[np.ndarray, np.ndarray]]  # E x 2 x [H, W, 3] float32
    confidence: list[tuple[np.ndarray, np.ndarray]]  # E x 2 x [H, W] float32, 0 where the point is unusable
    num_images: int
    size: tuple[int, int]  # H, W

    def observations(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(image, its pointmap, its confidence) of side 0 and 1 of each pair in turn: 2 E of them."""
        for views, points, confidence in zip(self.views, self.points, self.confidence, strict=True):
            for side in (0, 1):
                yield int(views[side]), points[side], confidence[side]


def check_pairs(pairs: Sequence[PairPrediction], num_images: int) -> PairMaps:
    """Set aside pairs that say nothing, and refuse a clip that has too few left.

    Raises:
        ValueError: indices out of range, or arrays of unequal shapes (a caller's mistake, not the video's).
        ClipSetAside: no usable pair, a frame without one, or low confidence everywhere.
    """
    if num_images < 2:
        raise ClipSetAside(f"a clip of {num_images} frame has no pair to measure a camera move from")
    if not pairs:
        raise ClipSetAside("no pair of frames was given")
    height, width = np.shape(pairs[0].points_i)[:2]
    kept: list[int] = []
    points, confidence = [], []
    faults: dict[str, int] = {}
    for index, pair in enumerate(pairs):
        sides = _check_shapes(pair, num_images, (height, width))
        fault = _fault(*sides[0], front=True) or _fault(*sides[1], front=False)
        if fault:
            faults[fault] = faults.get(fault, 0) + 1
            continue
        kept.append(index)
        points.append((sides[0][0], sides[1][0]))
        confidence.append((_usable(*sides[0], front=True), _usable(*sides[1], front=False)))
    said = ", ".join(f"{count} {fault}" for fault, count in faults.items())
    if not kept:
        raise ClipSetAside(f"no usable pair of frames among {len(pairs)}: {said}")
    views = np.array([(pairs[index].i, pairs[index].j) for index in kept])
    require_connected(views, num_images, said)
    _require_confidence(confidence)
    return PairMaps(np.array(kept), views, points, confidence, num_images, (height, width))


def require_connected(views: np.ndarray, num_images: int, why: str = "") -> None:
    """Raise ClipSetAside naming frames that the pairs `views` [E, 2] do not tie to frame 0."""
    links = sparse.coo_matrix((np.ones(len(views)), (views[:, 0], views[:, 1])), shape=(num_images, num_images))
    labels = csgraph.connected_components(links, directed=False)[1]
    lost = np.flatnonzero(labels != labels[0])
    if len(lost):
        names = ", ".join(map(str, lost[:5])) + (", ..." if len(lost) > 5 else "")
        raise ClipSetAside(f"frames {names} are tied to the others by no usable pair" + (f" ({why})" if why else ""))


def _check_shapes(pair: PairPrediction, num_images: int, size: tuple[int, int]) -> list[tuple[np.ndarray, np.ndarray]]:
    if not (0 <= pair.i < num_images and 0 <= pair.j < num_images and pair.i != pair.j):
        raise ValueError(f"pair ({pair.i}, {pair.j}): expected two different frames of 0..{num_images - 1}")
    sides = [(to_numpy(pair.points_i), to_numpy(pair.confidence_i)), (to_numpy(pair.points_j), to_numpy(pair.confidence_j))]
    for points, confidence in sides:
        if points.shape != (*size, 3) or confidence.shape != size:
            raise ValueError(
                f"pair ({pair.i}, {pair.j}): expected points {(*size, 3)} and confidence {size}, "
                f"got {points.shape} and {confidence.shape}"
            )
    return sides


def _usable(points: np.ndarray, confidence: np.ndarray, front: bool) -> np.ndarray:
    """Confidence [H, W], 0 at pixels that cannot be used. What a camera sees itself lies in front of it."""
    good = np.isfinite(points).all(-1) & np.isfinite(confidence) & (confidence > 0)
    good &= points[..., 2] > 0 if front else (points != 0).any(-1)
    return np.where(good, confidence, np.float32(0))


def _fault(points: np.ndarray, confidence: np.ndarray, front: bool) -> str | None:
    """What makes a pointmap worthless, or None."""
    finite = np.isfinite(points).all(-1)
    if finite.mean() < 0.1:
        return "not finite"
    if not (np.isfinite(confidence) & (confidence > 0)).any():
        return "without confidence"
    if front and (points[finite][:, 2] > 0).mean() < 0.1:
        return "behind the camera"
    seen = points[finite][:: max(1, int(finite.sum()) // 2000)].astype(np.float64)
    low, high = np.quantile(seen, [0.1, 0.9], axis=0)
    if np.linalg.norm(high - low) <= SPREAD * np.median(np.linalg.norm(seen, axis=1)):
        return "constant"
    return None


def _require_confidence(confidence: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """The better pixels of the better pairs must stand above the network's floor.

    Exactly 1 everywhere is taken for weights that were not given, not for a network at its floor.
    """
    flat = np.concatenate([side[::4, ::4].ravel() for pair in confidence for side in pair])
    best = float(np.quantile(flat, 0.9))
    if best < LOW_CONFIDENCE and not (flat[flat > 0] == 1).all():
        raise ClipSetAside(f"confidence is low everywhere: 9 of 10 pixels are below {best:.3g} (the network's floor is 1)")
