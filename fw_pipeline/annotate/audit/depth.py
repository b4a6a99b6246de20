"""Whether the depth is that of the tracked points: its unit, its order, its frames."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr

from fw_pipeline.annotate.audit.cameras import CLEAR_Z
from fw_pipeline.annotate.audit.verdict import Cause, Finding
from fw_pipeline.annotate.audit.witness import Witness, poses
from fw_pipeline.annotate.bundle.certainty import BLOCKS

NOISE = 0.3  # pixels at a long side of 448: what a track is off by
SURE = 0.1  # points count whose distance is known to this (standard deviation, relative)
MIN_POINTS, MIN_PARTS = 40, 4
MAX_SCALE = 0.1  # relative, between depth and path
MAX_ERROR = 0.15  # relative, median over the points
BETTER = 0.9  # of the error that another reading of the depth must leave, to be named
MAX_SHIFT = 0.4  # frames: half a frame is what two clocks may differ by
MAX_FRAME = 0.15  # relative: a frame's depth against that of all


@dataclass(frozen=True)
class Sight:
    """Observations of points whose distance is known, in the unit of the given path."""

    frame: np.ndarray  # [M]
    row: np.ndarray  # [M] pixel
    column: np.ndarray  # [M]
    z: np.ndarray  # [M] as the tracks have it
    block: np.ndarray  # [M] part of the picture

    def depth(self, depth: np.ndarray, shift: int = 0) -> np.ndarray:
        """[M] depths [T, h, w] where the points are seen, `shift` frames later; nan where unknown."""
        frame = self.frame + shift
        inside = (frame >= 0) & (frame < len(depth))
        found = depth[frame.clip(0, len(depth) - 1), self.row, self.column].astype(np.float64)
        return np.where(inside & (found > 0), found, np.nan)


def judge_depth(whole: Witness, depth: np.ndarray, confidence: np.ndarray, path: float) -> tuple[dict[str, float], list[Finding]]:
    """depth, confidence [T, h, w] at the size of the tracks' pictures; path: the given path's size, see `path_size`."""
    sight = _sight(whole, depth, path)
    off = np.log(sight.depth(depth) / sight.z)
    known = np.isfinite(off)
    parts = len(np.unique(sight.block[known]))
    numbers = {"depth_points": float(known.sum())}
    if known.sum() < MIN_POINTS or parts < MIN_PARTS:
        seen = f"{known.sum()} sightings in {parts} parts of the picture"
        return numbers, [
            Finding(Cause.NO_DEPTH, f"{seen} have a depth and a distance that the tracks tell: too little parallax", judged=False)
        ]
    findings = list(_scale(sight, off, numbers))
    findings += _reversed(sight, depth, off, numbers)
    if not findings:
        findings += _shifted(sight, depth, off, numbers)
    findings += _frames(sight, off, len(depth), numbers)
    if numbers["depth_error"] > MAX_ERROR and not findings:
        findings.append(
            Finding(Cause.DEPTH, f"depth is {numbers['depth_error']:.0%} from the tracked points (at most {MAX_ERROR:.0%})")
        )
    sure = np.where(known, confidence[sight.frame, sight.row, sight.column], np.nan)
    if np.ptp(sure[known]) > 0:
        numbers["confidence_order"] = float(spearmanr(sure[known], -np.abs(off[known])).statistic)
    return numbers, findings


def path_size(w2c: np.ndarray, reference: int) -> float:
    """Root mean square of the translations [T, 3, 4] seen from the reference frame: what a witness' state has as 1."""
    rotation = w2c[:, :, :3] @ w2c[reference, :, :3].T
    translation = w2c[:, :, 3] - rotation @ w2c[reference, :, 3]
    return float(np.sqrt((translation**2).sum(-1).mean()))


def _sight(whole: Witness, depth: np.ndarray, path: float) -> Sight:
    obs, state = whole.observations, whole.given
    w2c = poses(state)
    sure = _relative_error(whole, w2c) < SURE
    share = obs.per_point(whole.inside.astype(float)) / np.maximum(obs.per_point(np.ones(len(obs.point))), 1)
    sure &= (share > 0.5) & (state.inverse[0] > 1e-6)
    keep = sure[obs.point] & whole.inside
    point, frame = obs.point[keep], obs.frame[keep]
    world = state.direction[0, point] / state.inverse[0, point, None] * path
    z = (w2c[frame, 2, :3] * world).sum(-1) + w2c[frame, 2, 3] * path
    place = whole.tracks.xy[point, frame].astype(int)
    _, height, width = depth.shape
    ahead = z > 0
    return Sight(
        frame[ahead],
        place[ahead, 1].clip(0, height - 1),
        place[ahead, 0].clip(0, width - 1),
        z[ahead],
        whole.block[point[ahead]],
    )


def _relative_error(whole: Witness, w2c: np.ndarray) -> np.ndarray:
    """[N] standard deviation of each point's distance, relative: from how far the path's parallax moves it in the pictures."""
    obs, state = whole.observations, whole.given
    centre = -np.einsum("tji,tj->ti", w2c[:, :, :3], w2c[:, :, 3])[obs.frame]
    rho = state.inverse[0, obs.point]
    ray = state.direction[0, obs.point] - rho[:, None] * centre
    ray /= np.maximum(np.linalg.norm(ray, axis=1, keepdims=True), 1e-12)
    count = np.maximum(obs.per_point(np.ones(len(obs.point))), 1)
    mean = np.stack([obs.per_point(ray[:, k]) / count for k in range(3)], -1)
    spread = np.sqrt(np.maximum(obs.per_point(((ray - mean[obs.point]) ** 2).sum(1)), 1e-18))  # radians, summed over frames
    return np.asarray(NOISE * whole.size / (float(np.mean(obs.focal)) * spread))


def _by_block(block: np.ndarray, value: np.ndarray) -> float:
    """How many standard deviations the sum of a value [M] is from 0, with the picture's parts as witnesses."""
    sums = np.bincount(block, value, BLOCKS[0] * BLOCKS[1])
    return float(sums.sum() / max(float(np.sqrt((sums**2).sum())), 1e-12))


def _scale(sight: Sight, off: np.ndarray, numbers: dict[str, float]) -> Iterator[Finding]:
    known = np.isfinite(off)
    scale = float(np.exp(np.median(off[known])))
    error = float(np.median(np.abs(off[known] - np.log(scale))))
    order = float(spearmanr(off[known] + np.log(sight.z[known]), np.log(sight.z[known])).statistic)
    numbers |= {"depth_scale": scale, "depth_error": error, "depth_order": order if np.isfinite(order) else 0.0}
    if abs(np.log(scale)) > np.log1p(MAX_SCALE) and error < abs(np.log(scale)) + MAX_ERROR:
        yield Finding(Cause.SCALE, f"depth is {scale:.2f} times what path and tracks tell (at most {MAX_SCALE:.0%} off)")


def _reversed(sight: Sight, depth: np.ndarray, off: np.ndarray, numbers: dict[str, float]) -> Iterator[Finding]:
    """Is depth with near and far exchanged nearer to the tracked points?"""
    inverse = 1 / depth[depth > 0]
    turned = np.zeros_like(depth)
    turned[depth > 0] = 1 / np.maximum(2 * np.median(inverse) - inverse, np.quantile(inverse, 0.01))
    there = np.log(sight.depth(turned) / sight.z)
    both = np.isfinite(off) & np.isfinite(there)
    own, its = (np.minimum(np.abs(v[both] - np.median(v[both])), 0.5) for v in (off, there))
    ratio, z = float(its.sum() / max(own.sum(), 1e-12)), _by_block(sight.block[both], own - its)
    numbers["depth_reversed"] = ratio
    if ratio < BETTER and z > CLEAR_Z:
        yield Finding(
            Cause.MIRRORED,
            f"depth with near and far exchanged leaves {ratio:.2f} of the error (parts of the picture agree by {z:.1f})",
        )


def _shifted(sight: Sight, depth: np.ndarray, off: np.ndarray, numbers: dict[str, float]) -> Iterator[Finding]:
    """Does depth err as if it were that of other frames? How it changes from the frame before to the frame after, at one place
    of the picture, is what it would err by; the share of that which it does err by is the shift."""
    change = np.log(sight.depth(depth, 1) / sight.depth(depth, -1)) / 2
    both = np.isfinite(off) & np.isfinite(change)
    if both.sum() < MIN_POINTS:
        return
    error, change, block = off[both] - np.median(off[both]), change[both], sight.block[both]
    change = change - np.median(change)
    # An edge is missed by any amount: what is far off counts little.
    width = 3 * max(float(np.median(np.abs(error))), 1e-3)
    wide = 3 * max(float(np.median(np.abs(change))), 1e-3)
    weight = 1 / (1 + (error / width) ** 2) / (1 + (change / wide) ** 2)
    shift = float((weight * error * change).sum() / max(float((weight * change**2).sum()), 1e-12))
    z = abs(_by_block(block, weight * error * change))
    numbers |= {"depth_shift": shift, "depth_shift_z": z}
    if abs(shift) > MAX_SHIFT and z > CLEAR_Z:
        when = "later" if shift > 0 else "earlier"
        yield Finding(
            Cause.DEPTH_SHIFT,
            f"depth errs as if it were that of {abs(shift):.1f} frames {when} (parts of the picture agree by {z:.1f})",
        )


def _frames(sight: Sight, off: np.ndarray, frames: int, numbers: dict[str, float]) -> Iterator[Finding]:
    """Frames whose depth is in another unit than that of the rest."""
    known = np.isfinite(off)
    overall = float(np.median(off[known]))
    jump, unsure = np.zeros(frames), np.full(frames, np.inf)
    for t in range(frames):
        here = known & (sight.frame == t)
        parts = len(np.unique(sight.block[here]))
        if parts >= MIN_PARTS:
            middle = float(np.median(off[here]))
            jump[t] = abs(middle - overall)
            # of a median of that many parts of the picture, whose sightings err alike
            unsure[t] = 1.85 * float(np.median(np.abs(off[here] - middle))) / np.sqrt(parts)
    judged = np.isfinite(unsure)
    if not judged.any():
        return
    numbers["depth_frame"] = float(jump[judged].max())
    wrong = np.flatnonzero(judged & (jump > np.maximum(np.log1p(MAX_FRAME), 3 * unsure)))
    if len(wrong):
        t = int(wrong[np.argmax(jump[wrong])])
        yield Finding(Cause.DEPTH, f"depth of frame {t} is {np.exp(jump[t]) - 1:.0%} off the others' unit ({len(wrong)} such)")
