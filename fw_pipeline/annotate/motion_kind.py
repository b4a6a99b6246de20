"""What the camera does in a clip, in numbers and by name: only some motions show depth."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

import cv2
import numpy as np

from fw_pipeline.annotate.bundle.adjust import Free, adjust, cauchy, residuals
from fw_pipeline.annotate.bundle.certainty import BLOCKS, block_of
from fw_pipeline.annotate.bundle.state import Observations, State
from fw_pipeline.annotate.tracks import Tracks

# Noise in every direction is halved by whatever takes its part along one line, and parallax does just that: with no depth to
# see, the best scene leaves at least half of the squared error that a turning camera leaves.
MIN_TURNING_RATIO = 2.0
MAX_STILL = 0.25  # share of the picture
# Homographies carry noise at both ends, which is what they are compared with: 1.0 to 1.1 for made planes, 1.4 and more for scenes
# with known depth.
MAX_PLANE_RATIO = 1.2
MIN_FORWARD = 0.95
MIN_ZOOM = 0.05
STILL = 0.002  # of the long side, over half a clip: what a resting point may seem to move


class MotionKind(StrEnum):
    """What a camera does. STILL, TURNING and ZOOMING show no depth."""

    STILL = "still"
    TURNING = "turning"
    ZOOMING = "zooming"
    PLANE = "plane"  # it moves, but all that is seen lies in one plane
    FORWARD = "forward"
    MIXED = "mixed"


NO_DEPTH = frozenset({MotionKind.STILL, MotionKind.TURNING, MotionKind.ZOOMING})


@dataclass(frozen=True)
class MotionNumbers:
    """Costs are compared on the same observations with the same robust cost; 1 means: explained as well as by depth."""

    still: float  # share of the picture whose tracks stay where they are over half the clip
    turning_ratio: float  # cost of a camera that only turns and zooms, over the solution's
    plane_ratio: float  # cost of one homography a frame (a plane, or turning), over the solution's
    forward: float  # cosine between the path and the optical axis, 1 straight ahead, 0 sideways
    angle: float  # degrees, median over the points of the angle between the first and last ray that see it
    zoom_turning: float  # relative change of the focal length over the clip if the camera only turned


def motion_numbers(tracks: Tracks, obs: Observations, state: State, cost: float, scale: float) -> MotionNumbers:
    """Of a solved clip: `state` (batch 1) has `cost` on `obs`."""
    turned, zoom = _only_turning(obs, state, scale)
    return MotionNumbers(
        still=still_share(tracks),
        turning_ratio=turned / max(cost, 1e-12),
        plane_ratio=_plane_ratio(obs, state, scale),
        forward=_forward(state),
        angle=_angle(obs, state),
        zoom_turning=zoom,
    )


def motion_kind(numbers: MotionNumbers) -> MotionKind:
    """The motion's name."""
    if numbers.still > MAX_STILL:
        return MotionKind.STILL
    if numbers.turning_ratio < MIN_TURNING_RATIO:
        return MotionKind.ZOOMING if abs(numbers.zoom_turning) > MIN_ZOOM else MotionKind.TURNING
    if numbers.plane_ratio < MAX_PLANE_RATIO:
        return MotionKind.PLANE
    return MotionKind.FORWARD if numbers.forward > MIN_FORWARD else MotionKind.MIXED


def still_share(tracks: Tracks) -> float:
    """Share of the picture's blocks, of those with tracks, where most tracks move less than `STILL` of the long side in half a
    clip. (A share of the tracks would not do: ahead of a camera that goes forward points crowd that hardly move.)"""
    half = max(1, tracks.frames // 2)
    still, count = np.zeros(BLOCKS[0] * BLOCKS[1]), np.zeros(BLOCKS[0] * BLOCKS[1])
    for i in range(tracks.frames - half):
        both = tracks.between(i, i + half)
        here = tracks.xy[both, i]
        moved = np.linalg.norm(tracks.xy[both, i + half] - here, axis=1)
        block = block_of(here, tracks.height, tracks.width)
        count += np.bincount(block, minlength=len(count))
        still += np.bincount(block, moved < STILL * max(tracks.height, tracks.width), len(count))
    with_tracks = count >= 3 * max(1, tracks.frames - half)
    return float((still[with_tracks] > 0.5 * count[with_tracks]).mean()) if with_tracks.any() else 0.0


def _only_turning(obs: Observations, state: State, scale: float) -> tuple[float, float]:
    """(cost, log of the focal length's change) of the best camera that turns and zooms on the spot."""
    flat = replace(state, translation=np.zeros_like(state.translation), inverse=np.zeros_like(state.inverse))
    free = Free(lens=0, turning=True)
    first = adjust(obs, flat, free, 4 * scale, steps=8, tolerance=1e-3)
    free = Free(lens=2, turning=True, focal_range=(-1.5, 2.0))
    last = adjust(obs, first.state, free, scale, steps=12, tolerance=1e-3)
    return float(last.cost[0]), float(last.state.log_focal[0, 1])


def _plane_ratio(obs: Observations, state: State, scale: float) -> float:
    """Robust cost of homographies from the reference to the other frames, over the solution's own, on what both see."""
    own = cauchy((residuals(obs, state)[0] ** 2).sum(-1), scale)
    at = np.full((obs.points, obs.frames), -1)
    at[obs.point, obs.frame] = np.arange(len(obs.point))
    flat, full = 0.0, 0.0
    for t in range(obs.frames):
        both = np.flatnonzero((at[:, obs.reference] >= 0) & (at[:, t] >= 0))
        if t == obs.reference or len(both) < 12:
            continue
        here, there = obs.xy[at[both, obs.reference]], obs.xy[at[both, t]]
        matrix, _ = cv2.findHomography(here, there, cv2.USAC_MAGSAC, 2 * scale, None, 500, 0.999)
        if matrix is None:
            continue
        moved = np.c_[here, np.ones(len(here))] @ matrix.T
        off = ((moved[:, :2] / moved[:, 2:] - there) ** 2).sum(1)
        flat += float(cauchy(off, scale).sum())
        # both ends carry noise under a homography, only one does in the solution
        full += float((own[at[both, t]] + own[at[both, obs.reference]]).sum())
    return flat / full if full > 0 else 1.0


def _forward(state: State) -> float:
    centre = -np.einsum("tji,tj->ti", state.rotation[0], state.translation[0])
    steps = np.diff(centre, axis=0)
    ahead = state.rotation[0][:-1, 2]
    length = np.linalg.norm(steps, axis=1)
    return float(np.abs((steps * ahead).sum(1)).sum() / max(float(length.sum()), 1e-12))


def _angle(obs: Observations, state: State) -> float:
    """Median over the points of the angle between their first and their last ray, degrees."""
    first, present = obs.starts
    last = np.append(first[1:], len(obs.point)) - 1
    d, rho = state.direction[0, present], state.inverse[0, present]
    rays = []
    for o in (first, last):
        t = obs.frame[o]
        centre = -np.einsum("tji,tj->ti", state.rotation[0, t], state.translation[0, t])
        ray = d - rho[:, None] * centre
        rays.append(ray / np.linalg.norm(ray, axis=1, keepdims=True))
    return float(np.degrees(np.median(2 * np.arcsin(np.clip(np.linalg.norm(rays[0] - rays[1], axis=1) / 2, 0, 1)))))
