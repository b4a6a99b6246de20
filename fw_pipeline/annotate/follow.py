"""Whether one picture shows what another shows: points of the first are followed into the second and compared there.

What camera and things do between frames moves points and spares what lies around them; another scene has none of it. So this
tells a cut from motion, and a flash from a cut, where differences of whole pictures cannot.
"""

from __future__ import annotations

import cv2
import numpy as np

POINTS = 80  # followed from a picture
ENOUGH = 8  # points that a judgement rests on at least: the mean of so many is within 0.1 of what all would give
BACK = 1.5  # pixels by which a point may miss where it came from when it is followed back
EDGE = 3  # pixels from the border within which a point counts as having left the picture
RADIUS = 5  # of the patch around a point that is compared, pixels
# Contrast below which a patch counts as empty and agrees with nothing, in grey levels of the whole patch: noise of a codec,
# about two levels a pixel, reaches half of it.
FLAT = 30.0
OFFSETS = np.stack(np.meshgrid(*[np.arange(-RADIUS, RADIUS + 1)] * 2), -1).reshape(-1, 2).astype(np.float32)


def levelled(thumbnail: np.ndarray) -> np.ndarray:
    """BGR [h, w, 3] uint8 -> [h, w] uint8, mean and contrast alike everywhere: light that changes leaves no trace in it."""
    grey = cv2.cvtColor(thumbnail, cv2.COLOR_BGR2GRAY).astype(np.float32)
    mean = cv2.blur(grey, (17, 17))
    spread = np.sqrt(np.maximum(cv2.blur(grey * grey, (17, 17)) - mean * mean, 0))
    return np.clip((grey - mean) / (spread + 6) * 40 + 128, 0, 255).astype(np.uint8)  # 6: above the noise of plain areas


def corners(picture: np.ndarray) -> np.ndarray:
    """[n, 2] float32 x, y of at most POINTS places that can be recognised."""
    found = cv2.goodFeaturesToTrack(picture, POINTS, 0.01, 6)
    return np.zeros((0, 2), np.float32) if found is None else found.reshape(-1, 2)


def patches(picture: np.ndarray, points: np.ndarray) -> np.ndarray:
    """[n, k] float32: what lies around points [n, 2], of mean 0 and, unless it is flat, of length near 1."""
    if not len(points):
        return np.zeros((0, len(OFFSETS)), np.float32)
    at = points[:, None] + OFFSETS
    around = cv2.remap(picture, at[..., 0], at[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE).astype(np.float32)
    around -= around.mean(1, keepdims=True)
    return around / (np.linalg.norm(around, axis=1, keepdims=True) + FLAT)


def moved(
    before: np.ndarray, after: np.ndarray, points: np.ndarray, guess: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(where points [n, 2] of `before` are in `after` [n, 2], whether they were found [n]): pyramidal Lucas-Kanade."""
    if not len(points):
        return points, np.zeros(0, bool)
    start = (points if guess is None else points + guess).astype(np.float32).reshape(-1, 1, 2)
    found, status, _ = cv2.calcOpticalFlowPyrLK(
        before, after, points.reshape(-1, 1, 2), start, winSize=(15, 15), maxLevel=3, flags=cv2.OPTFLOW_USE_INITIAL_FLOW
    )
    return found.reshape(-1, 2), status.ravel() > 0


def returns(before: np.ndarray, after: np.ndarray, points: np.ndarray, there: np.ndarray) -> np.ndarray:
    """[n] bool: whether points found at `there` in `after` lead back to where they were in `before`.

    The way back starts from what all have moved in common, so a likeness met by chance leads elsewhere.
    """
    if not len(points):
        return np.zeros(0, bool)
    back, found = moved(after, before, there, -np.median(there - points, axis=0))
    return np.asarray(found & (np.linalg.norm(back - points, axis=1) < BACK))


def inside(points: np.ndarray, shape: tuple[int, ...], edge: int = EDGE) -> np.ndarray:
    """[n] bool: whether points [n, 2] are in a picture of that shape, its very border left out."""
    return np.asarray(((points >= edge) & (points < np.array(shape[1::-1]) - edge)).all(1))


def kinship(before: np.ndarray, after: np.ndarray) -> float | None:
    """How well levelled pictures agree, 0 to 1, at the points that stay in sight; None where too few can be followed.

    Neighbouring frames of one shot give 0.6 and more, of two scenes 0.25 at most, be they soft noise of one kind (measured on
    films and made scenes; without the way back it is 0.46).
    """
    points = corners(before)
    if len(points) < ENOUGH:
        return None
    best = _agreement(before, after, points, None)
    if best is None or best < 0.5:  # it may have moved further than Lucas and Kanade see: all of it together
        shift, _ = cv2.phaseCorrelate(before.astype(np.float32), after.astype(np.float32))
        again = _agreement(before, after, points, np.array(shift))
        best = max((value for value in (best, again) if value is not None), default=None)
    return best


def _agreement(before: np.ndarray, after: np.ndarray, points: np.ndarray, guess: np.ndarray | None) -> float | None:
    there, found = moved(before, after, points, guess)
    found &= returns(before, after, points, there)
    agree = (patches(before, points) * patches(after, there)).sum(1).clip(0) * found
    seen = inside(there, after.shape) | ~found
    return float(agree[seen].mean()) if seen.sum() >= ENOUGH else None
