"""From a solved core to the whole clip: the other frames are placed on known points, the other points between placed frames."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from scipy.spatial.transform import Rotation

from fw_pipeline.annotate.bundle.adjust import Free, adjust, cauchy, residuals
from fw_pipeline.annotate.bundle.starts import Core
from fw_pipeline.annotate.bundle.state import Observations, State
from fw_pipeline.annotate.trajectory import fill_poses

CHUNK = 3  # frames placed at a time, on either side
MIN_SEEN = 12  # known points that a frame must show to be placed
_REST = ("direction", "inverse", "log_focal")
SCALE, WIDE = 0.7, 3.0  # Cauchy's, pixels: for what is placed, and for what is new


@dataclass(frozen=True)
class Grown:
    state: State  # of all frames and points
    placed: np.ndarray  # [T] bool
    known: np.ndarray  # [N] bool


def grow(obs: Observations, core: Core, solved: State, free: Free, size: float) -> Grown:
    """Solutions `solved` of the core [B, C frames, M points] -> of all frames and points of `obs`.

    size: how many times larger than at a long side of 448 pixels the picture is; it scales what counts as an error.
    """
    placed = np.zeros(obs.frames, bool)
    placed[core.frames.min() : core.frames.max() + 1] = True
    known = np.zeros(obs.points, bool)
    known[core.points] = True
    state = _spread(obs, core, solved)
    inner = tuple(set(range(obs.frames)) - set(core.frames.tolist()))
    if placed.sum() > len(core.frames):
        state = _settle(obs, state, placed, known, _only(free, obs, inner), size, points=False)
    state, known = _add_points(obs, state, placed, known, size)
    state = _settle(obs, state, placed, known, replace(free, front=True), size)
    while not placed.all():
        new = _next_frames(placed)
        new = [t for t in new if _shown(obs, known, t) >= MIN_SEEN]
        if not new:
            break
        state = _extrapolated(state, placed, new)
        placed[new] = True
        state = _settle(obs, state, placed, known, _only(free, obs, new), size, points=False)
        state, known = _add_points(obs, state, placed, known, size)
        state = _settle(obs, state, placed, known, replace(free, front=True), size)
    return Grown(state, placed, known)


def replaced(obs: Observations, state: State, scale: float, rounds: int = 2) -> State:
    """One solution with every frame tried once more from where its neighbours say it should be; each takes what costs less.

    A frame that few points hold may have been placed on the wrong ones of them, and then stays there by itself.
    """
    free = Free(points=False, lens=0)
    for _ in range(rounds):
        tried = _between_neighbours(state)
        tried = adjust(obs, tried, free, 4 * scale, steps=5).state
        tried = adjust(obs, tried, free, scale, steps=5).state
        cost = [obs.per_frame(cauchy((residuals(obs, s) ** 2).sum(-1), scale))[0] for s in (state, tried)]
        better = cost[1] < cost[0]
        better[obs.reference] = False
        state = replace(
            state,
            rotation=np.where(better[None, :, None, None], tried.rotation, state.rotation),
            translation=np.where(better[None, :, None], tried.translation, state.translation),
        )
    return state


def _between_neighbours(state: State) -> State:
    """Every frame half way between its neighbours; the first and the last go on from the two beside them."""
    rotation, translation = state.rotation[0], state.translation[0]
    centre = -np.einsum("tji,tj->ti", rotation, translation)
    before, after = np.arange(len(centre)) - 1, np.arange(len(centre)) + 1
    before[0], after[0] = 1, 2
    before[-1], after[-1] = len(centre) - 2, len(centre) - 3
    share = np.full(len(centre), 0.5)
    share[[0, -1]] = -1.0
    turn = Rotation.from_matrix(rotation[after] @ rotation[before].transpose(0, 2, 1)).as_rotvec()
    turned = Rotation.from_rotvec(share[:, None] * turn).as_matrix() @ rotation[before]
    moved = centre[before] + share[:, None] * (centre[after] - centre[before])
    return replace(state, rotation=turned[None], translation=-np.einsum("tij,tj->ti", turned, moved)[None])


def expand(obs: Observations, solved: Grown, frames: np.ndarray, points: np.ndarray, free: Free, size: float) -> Grown:
    """One solution of some frames and points of a clip -> of all of them: `obs` are the whole clip's.

    Frames in between are interpolated and then placed on the known points; points are found where they are seen.
    """
    placed, known = np.zeros(obs.frames, bool), np.zeros(obs.points, bool)
    placed[frames[solved.placed]] = True
    known[points[solved.known]] = True
    state = solved.state
    core = Core(frames[solved.placed], points, obs.reference)
    some = State(state.rotation[:, solved.placed], state.translation[:, solved.placed], *(vars(state)[k] for k in _REST))
    whole = _spread(obs, core, some)
    inside = np.flatnonzero(placed)
    new = [t for t in range(inside[0], inside[-1] + 1) if not placed[t] and _shown(obs, known, t) >= MIN_SEEN]
    ends = [t for t in (*range(inside[0]), *range(inside[-1] + 1, obs.frames)) if _shown(obs, known, t) >= MIN_SEEN]
    new += [t for t in ends if np.abs(inside - t).min() <= CHUNK]
    if new:
        placed[new] = True
        whole = _settle(obs, whole, placed, known, _only(free, obs, new), size, points=False)
    whole, known = _add_points(obs, whole, placed, known, size)
    part = obs.select(usable(obs, placed, known))
    whole = adjust(part, whole, replace(free, front=True), SCALE * size, steps=12, tolerance=1e-4).state
    return Grown(whole, placed, known)


def usable(obs: Observations, placed: np.ndarray, known: np.ndarray) -> np.ndarray:
    """[O] bool: observations of known points in placed frames."""
    return np.asarray(placed[obs.frame] & known[obs.point])


def _shown(obs: Observations, known: np.ndarray, frame: int) -> int:
    return int(known[obs.point[obs.frame == frame]].sum())


def _next_frames(placed: np.ndarray) -> list[int]:
    low, high = int(np.argmax(placed)), len(placed) - 1 - int(np.argmax(placed[::-1]))
    return [*range(max(0, low - CHUNK), low), *range(high + 1, min(len(placed), high + 1 + CHUNK))]


def _only(free: Free, obs: Observations, frames: Iterable[int]) -> Free:
    """Only these frames move."""
    moving = set(frames)
    return replace(free, lens=0, points=False, held_frames=tuple(t for t in range(obs.frames) if t not in moving))


def _settle(
    obs: Observations, state: State, placed: np.ndarray, known: np.ndarray, free: Free, size: float, points: bool = True
) -> State:
    """A few steps on what is known, first with room for errors where frames are new."""
    use = usable(obs, placed, known)
    if free.held_frames:
        use &= ~np.isin(obs.frame, free.held_frames)
    part = obs.select(use)
    if not points:
        state = adjust(part, state, free, WIDE * size, steps=6).state
        return adjust(part, state, free, SCALE * size, steps=3).state
    return adjust(part, state, free, SCALE * size, steps=5, tolerance=1e-3).state


def _spread(obs: Observations, core: Core, solved: State) -> State:
    """The core's poses and points put into arrays for all; frames between are interpolated, other points still without place."""
    batch = len(solved)
    poses = np.concatenate([solved.rotation, solved.translation[..., None]], -1)
    filled = np.stack([fill_poses(dict(zip(core.frames.tolist(), p, strict=True)), obs.frames) for p in poses])
    direction = np.tile(np.array([0.0, 0, 1]), (batch, obs.points, 1))
    inverse = np.ones((batch, obs.points)) * np.median(solved.inverse, axis=1, keepdims=True)
    direction[:, core.points], inverse[:, core.points] = solved.direction, solved.inverse
    return State(filled[..., :3], filled[..., 3], direction, inverse, solved.log_focal.copy())


def _extrapolated(state: State, placed: np.ndarray, new: list[int]) -> State:
    """New frames go on turning and moving as the two placed ones before them did."""
    rotation, translation = state.rotation.copy(), state.translation.copy()
    last = int(np.flatnonzero(placed).max())
    for t in sorted(new, key=lambda t: abs(t - last) if t > last else -t):
        step = 1 if t > last else -1
        a, b = t - step, t - 2 * step
        if not 0 <= b < len(placed):
            rotation[:, t], translation[:, t] = rotation[:, a], translation[:, a]
            continue
        turn = Rotation.from_matrix(rotation[:, a] @ rotation[:, b].transpose(0, 2, 1)).as_rotvec()
        rotation[:, t] = Rotation.from_rotvec(0.8 * turn).as_matrix() @ rotation[:, a]
        centre_a = -np.einsum("bji,bj->bi", rotation[:, a], translation[:, a])
        centre_b = -np.einsum("bji,bj->bi", rotation[:, b], translation[:, b])
        translation[:, t] = -np.einsum("bij,bj->bi", rotation[:, t], centre_a + 0.8 * (centre_a - centre_b))
    return replace(state, rotation=rotation, translation=translation)


def _add_points(obs: Observations, state: State, placed: np.ndarray, known: np.ndarray, size: float) -> tuple[State, np.ndarray]:
    """Points seen in at least three placed frames get a place: at the median depth first, then where they are seen best."""
    in_placed = placed[obs.frame]
    often = np.bincount(obs.point[in_placed], minlength=obs.points) >= 3
    new = often & ~known
    if not new.any():
        return state, known
    distance = np.abs(obs.frame - obs.reference) + np.where(in_placed, 0, 10 * obs.frames)
    order = np.lexsort((distance, obs.point))
    point, first = np.unique(obs.point[order], return_index=True)
    nearest = order[first[new[point]]]
    point, frame = obs.point[nearest], obs.frame[nearest]
    factor = np.exp(state.log_focal[:, :1] + state.log_focal[:, 1:] * obs.time[frame])
    ray = np.stack(
        [
            obs.xy[nearest, 0] / (obs.focal[0] * factor),
            obs.xy[nearest, 1] / (obs.focal[1] * factor),
            np.ones_like(factor),
        ],
        -1,
    )
    ray /= np.linalg.norm(ray, axis=-1, keepdims=True)
    middle = np.median(state.inverse[:, known], axis=1)[:, None, None]
    # ray = lambda (R d + rho t), so R^T (ray - middle t) has the direction of d and, over its length, rho = middle.
    back = np.einsum("bnji,bnj->bni", state.rotation[:, frame], ray - middle * state.translation[:, frame])
    length = np.linalg.norm(back, axis=-1)
    direction, inverse = state.direction.copy(), state.inverse.copy()
    direction[:, point] = back / length[..., None]
    inverse[:, point] = middle[..., 0] / length
    state = replace(state, direction=direction, inverse=inverse)
    part = obs.select(in_placed & new[obs.point])
    state = adjust(part, state, Free(poses=False, lens=0, front=True), WIDE * size, steps=6, tolerance=1e-3).state
    return state, known | new
