"""Where bundle adjustment starts from: a camera that only turns, plus translations in every direction at several lenses.

A short clip is nearly affine, and the adjustment then has a minimum for each way to read the same flow. None of them can be
told from another beforehand, so all are tried, on few frames and points, and what differs among the cheap ones is kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fw_model.metrics import project_to_so3
from fw_pipeline.annotate.bundle.adjust import Free, adjust
from fw_pipeline.annotate.bundle.state import Observations, State, stack
from fw_pipeline.annotate.tracks import Tracks

CORE_FRAMES = 7
CORE_POINTS = 140
FOCALS = (0.55, 0.9, 1.5)  # of the long side: fields of view of 85, 58 and 37 degrees along it
FOCAL_RANGE = (0.25, 6.0)  # of the long side: 127 to 10 degrees. Beyond, perspective is nothing that tracks can show.
SURVIVORS = 5
# Translations: the axes and the cube's diagonals, both ways (for a camera that goes forward the sign is no matter of scale).
AXES = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]], float)
DIAGONALS = np.array([[1, 1, 1], [1, -1, 1], [-1, 1, 1], [-1, -1, 1]], float) / np.sqrt(3)
DIRECTIONS = np.concatenate([AXES, -AXES, DIAGONALS, -DIAGONALS])


@dataclass(frozen=True)
class Core:
    """The frames around the reference that share most of its points, thinned out, and an even selection of those points."""

    frames: np.ndarray  # [C] frame numbers, the reference among them
    points: np.ndarray  # [M] track numbers, all seen in the reference
    reference: int


def choose_core(tracks: Tracks, frames: int = CORE_FRAMES, points: int = CORE_POINTS) -> Core:
    """Reference near the middle of the clip, frames as far from it as half of its points last, points that last longest."""
    count = tracks.frames
    per_frame = tracks.seen.sum(0)
    centred = 1 - np.abs(np.arange(count) - (count - 1) / 2) / count  # 1 in the middle, a half at the ends
    reference = int(np.argmax(per_frame * centred**2))
    shared = (tracks.seen & tracks.seen[:, reference : reference + 1]).sum(0)
    enough = shared >= max(12, min(0.4 * shared[reference], 200))
    low = high = reference
    while low > 0 and enough[low - 1]:
        low -= 1
    while high < count - 1 and enough[high + 1]:
        high += 1
    chosen = np.unique(np.concatenate([np.rint(np.linspace(low, high, frames)).astype(int), [reference]]))
    inside = tracks.seen[:, reference] & (tracks.seen[:, chosen].sum(1) >= min(4, len(chosen)))
    candidates = np.flatnonzero(inside)
    if len(candidates) > points:
        length = tracks.seen[candidates][:, chosen].sum(1)
        longest = candidates[np.argsort(-length, kind="stable")[: 2 * points]]
        place = tracks.xy[longest, reference]
        order = np.lexsort((place[:, 0], place[:, 1] // (tracks.height / 8)))
        candidates = np.sort(longest[order][np.linspace(0, len(order) - 1, points).astype(int)])
    return Core(chosen, candidates, reference)


def rays(xy: np.ndarray, focal: tuple[float, float], centre: tuple[float, float]) -> np.ndarray:
    """Pixels [..., 2] -> unit directions [..., 3]."""
    ray = np.concatenate([(xy - np.asarray(centre)) / np.asarray(focal), np.ones((*xy.shape[:-1], 1))], -1)
    return ray / np.linalg.norm(ray, axis=-1, keepdims=True)


def turning_camera(ray: np.ndarray, seen: np.ndarray, reference: int, tolerance: float) -> np.ndarray:
    """Rotations [T, 3, 3] that explain directions ray [N, T, 3] best when the camera only turns; all points in the reference.

    Least squares made robust by a few rounds of Cauchy weights; `tolerance` is their scale, in radians.
    """
    here = np.where(seen[:, reference, None], ray[:, reference], 0)
    there = np.where(seen[..., None], ray, 0)
    weight = seen & seen[:, reference : reference + 1]
    rotation = np.tile(np.eye(3), (ray.shape[1], 1, 1))
    value = weight.astype(float)
    for _ in range(6):
        rotation = project_to_so3(np.einsum("nt,nti,nj->tij", value, there, here) + 1e-9 * np.eye(3))
        off = np.linalg.norm(there - np.einsum("tij,nj->nti", rotation, here), axis=-1)
        scale = max(tolerance, float(np.median(off[weight])) if weight.any() else 0.0)
        value = weight / (1 + (off / scale) ** 2)
    return rotation


def path_in_time(off: np.ndarray, seen: np.ndarray, reference: int) -> np.ndarray:
    """[T] how far along its path the camera is in each frame, 0 in the reference, from flow that turning leaves [N, T, 2].

    A straight path moves every point along its own line by the same share: the leading component over time.
    """
    count = off.shape[1]
    time = (np.arange(count) - reference) / max(1, count - 1)
    value, known = np.where(seen[..., None], off, 0), seen.astype(float)
    known = np.where(np.arange(count) == reference, 0, known)
    path = time
    for _ in range(15):
        pattern = np.einsum("t,nt,nti->ni", path, known, value) / np.maximum((known * path**2).sum(1), 1e-9)[:, None]
        size = np.maximum(np.linalg.norm(pattern, axis=1), 1e-12)
        weight = known / (size + np.median(size))[:, None] ** 2  # no single near point decides
        path = np.einsum("ni,nt,nti->t", pattern, weight, value) / np.maximum((weight * size[:, None] ** 2).sum(0), 1e-12)
        path = path / max(np.abs(path).max(), 1e-12)
    return path if np.isfinite(path).all() and np.abs(path).max() > 0 else time


def starting_states(
    xy: np.ndarray, seen: np.ndarray, reference: int, obs: Observations, centre: tuple[float, float], logs: list[float]
) -> State:
    """Every lens in `logs` (log of the focal length over the observations') x every direction x an even and a measured pace."""
    states = []
    for log in logs:
        focal = (obs.focal[0] * np.exp(log), obs.focal[1] * np.exp(log))
        ray = rays(np.where(seen[..., None], xy, 0).astype(np.float64), focal, centre)
        rotation = turning_camera(ray, seen, reference, tolerance=0.7 / focal[0])
        turned = np.einsum("tij,nj->nti", rotation, ray[:, reference])
        off = ray - turned
        flow = off[..., :2] / np.maximum(turned[..., 2:], 0.1)
        size = float(np.median(np.linalg.norm(flow[seen], axis=-1))) if seen.any() else 0.0
        path = path_in_time(flow, seen, reference)
        size = max(size, 1e-4) / max(float(np.abs(path).mean()), 1e-3)
        for direction in DIRECTIONS:
            camera = np.einsum("tij,j->ti", rotation, direction) * path[:, None] * size
            states.append(
                State(
                    rotation[None],
                    camera[None],
                    ray[None, :, reference],
                    np.ones((1, len(xy))),
                    np.array([[log, 0.0]]),
                )
            )
    return stack(states)


def coarse(few: Tracks, obs: Observations, centre: tuple[float, float], logs: list[float], free: Free, size: float) -> State:
    """Distinct solutions of a clip's core, cheapest first, at most `SURVIVORS`.

    few: the core's points in its frames, `obs` the same; logs: lenses to start from (logs, over the observations' focal length);
    free: what may move in the end; size: see `grow`. First with the lens fixed and much room for errors, then with less.
    """
    state = starting_states(few.xy, few.seen, obs.reference, obs, centre, logs)
    loose = replace(free, front=False)
    first = adjust(obs, state, replace(loose, lens=0), scale=3.0 * size, steps=6)
    second = adjust(obs, first.state, loose, scale=1.5 * size, steps=6)
    order = np.argsort(second.cost, kind="stable")[: max(8, len(state) // 3)]
    third = adjust(obs, second.state.take(order).scaled(), free, scale=0.7 * size, steps=12)
    state = third.state.take(distinct(third.state, third.cost, SURVIVORS))
    both = stack([state, state.mirrored().scaled()])
    last = adjust(obs, both, free, scale=0.7 * size, steps=15)
    return last.state.take(distinct(last.state, last.cost, SURVIVORS))


def distinct(state: State, cost: np.ndarray, count: int, worst: float = 4.0) -> list[int]:
    """Indices of the cheapest solutions that differ in lens (by 5 %) or in depth order, up to `worst` times the best cost."""
    state = state.scaled()
    kept: list[int] = []
    for index in np.argsort(cost, kind="stable"):
        if len(kept) == count or (kept and cost[index] > worst * cost[kept[0]]):
            break
        same = [
            abs(state.log_focal[index, 0] - state.log_focal[other, 0]) < 0.05
            and depth_agreement(state.inverse[index], state.inverse[other]) > 0.9
            for other in kept
        ]
        if not any(same):
            kept.append(int(index))
    return kept


def depth_agreement(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two sets of inverse distances [N] of the same points: 1 the same order, -1 reversed."""
    order_a, order_b = np.argsort(np.argsort(a)), np.argsort(np.argsort(b))
    spread = order_a.std() * order_b.std()
    return float(((order_a - order_a.mean()) * (order_b - order_b.mean())).mean() / spread) if spread else 1.0
