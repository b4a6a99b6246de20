"""Points that the engine did not choose, and what they say where the given cameras are taken at their word."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from fw_pipeline.annotate.bundle.adjust import Free, adjust, cauchy, residuals
from fw_pipeline.annotate.bundle.certainty import block_of
from fw_pipeline.annotate.bundle.state import Observations, State
from fw_pipeline.annotate.tracks import Tracks, TrackSettings, follow

# Another grid and a larger patch than the engine's own: what these tracks have wrong is not what the engine was fitted to.
TRACKS = TrackSettings(cell=14, window=15, every=5)
MAX_POINTS = 640  # more add time, not certainty: their errors are much alike
SCALE = 0.7  # Cauchy's, pixels at a long side of 448
INLIER = 1.5  # pixels at a long side of 448


@dataclass(frozen=True)
class Witness:
    """Tracks of a clip with each point where it fits the given cameras best, which themselves are left as they are."""

    tracks: Tracks
    observations: Observations  # positions through one common lens, in its pixels from the principal point
    given: State  # batch 1
    block: np.ndarray  # [N] part of the picture that each track belongs to
    size: float  # how many times larger than at a long side of 448 pixels the picture is

    @property
    def scale(self) -> float:
        return SCALE * self.size

    @cached_property
    def squared(self) -> np.ndarray:
        """[O] squared reprojection errors under the given cameras, pixels."""
        return np.asarray((residuals(self.observations, self.given)[0] ** 2).sum(-1))

    @cached_property
    def inside(self) -> np.ndarray:
        """[O] bool: observations that the given cameras explain."""
        return np.asarray(self.squared < (INLIER * self.size) ** 2)

    @cached_property
    def frame_error(self) -> np.ndarray:
        """[T] median reprojection error, pixels; nan where a frame shows nothing."""
        return per_frame(self.observations, np.sqrt(self.squared))

    @cached_property
    def refined(self) -> State:
        """The cameras that the tracks would rather have, with the given lens, from the given ones on."""
        free = Free(lens=0, front=True)
        first = adjust(self.observations, self.given, free, 3 * self.scale, steps=6, tolerance=1e-3).state
        near = adjust(self.observations, self.given, free, self.scale, steps=10, tolerance=1e-3)
        far = adjust(self.observations, first, free, self.scale, steps=10, tolerance=1e-3)
        return (near if near.cost[0] <= far.cost[0] else far).state.scaled()

    def cost(self, state: State) -> float:
        """Cauchy's cost of one solution, squared pixels."""
        return float(cauchy((residuals(self.observations, state)[0] ** 2).sum(-1), self.scale).sum())


def per_frame(obs: Observations, value: np.ndarray) -> np.ndarray:
    """Medians [T] of a value [O] of each observation; nan for frames without one."""
    return np.array([np.median(value[obs.frame == t]) if (obs.frame == t).any() else np.nan for t in range(obs.frames)])


def follow_witnesses(frames: np.ndarray) -> Tracks:
    """Tracks of frames [T, h, w, 3] uint8, at most MAX_POINTS of them, evenly over picture and time."""
    tracks = follow(frames, TRACKS)
    if len(tracks) <= MAX_POINTS:
        return tracks
    born = tracks.seen.argmax(1)
    block = block_of(tracks.xy[np.arange(len(tracks)), born], tracks.height, tracks.width)
    order = np.lexsort((born, block))
    return tracks.subset(np.sort(order[np.linspace(0, len(order) - 1, MAX_POINTS).astype(int)]))


def witness(tracks: Tracks, w2c: np.ndarray, intrinsics: np.ndarray) -> Witness:
    """w2c [T, 3, 4]; intrinsics [T, 3, 3] pixels of the pictures the tracks are from."""
    focal = intrinsics[:, [0, 1], [0, 1]].astype(np.float64)
    centre = intrinsics[:, [0, 1], 2].astype(np.float64)
    common = np.median(focal, axis=0)
    xy = (tracks.xy - centre) / focal * common
    obs = Observations.of(xy, tracks.seen, tracks.frames // 2, (float(common[0]), float(common[1])), (0.0, 0.0))
    size = max(1.0, max(tracks.height, tracks.width) / 448)
    born, length = tracks.seen.argmax(1), tracks.length
    middle = born + (length - 1) // 2
    block = block_of(tracks.xy[np.arange(len(tracks)), middle], tracks.height, tracks.width)
    state = triangulated(obs, w2c)
    free = Free(poses=False, lens=0, front=True)
    near = adjust(obs, state, free, 3 * SCALE * size, steps=5, tolerance=1e-3).state
    given = adjust(obs, near, free, SCALE * size, steps=8, tolerance=1e-3).state
    return Witness(tracks, obs, given, block, size)


def triangulated(obs: Observations, w2c: np.ndarray) -> State:
    """Points (batch 1) by the direct linear transform under cameras w2c [T, 3, 4], path of unit size."""
    rotation = w2c[:, :, :3].astype(np.float64) @ w2c[obs.reference, :, :3].astype(np.float64).T
    translation = w2c[:, :, 3] - rotation @ w2c[obs.reference, :, 3]
    translation = translation / (np.sqrt((translation**2).sum(-1).mean()) + 1e-12)
    matrix = np.concatenate([rotation, translation[..., None]], -1)[obs.frame]  # [O, 3, 4]
    ray = obs.xy / np.asarray(obs.focal)
    rows = ray[:, :, None] * matrix[:, 2:] - matrix[:, :2]  # [O, 2, 4]
    normal = np.stack([obs.per_point((rows[:, :, i] * rows[:, :, j]).sum(1)) for i in range(4) for j in range(4)], -1)
    point = np.linalg.eigh(normal.reshape(-1, 4, 4))[1][:, :, 0]
    first, present = obs.starts
    in_front = np.ones(obs.points)
    in_front[present] = np.sign((matrix[first, 2] * point[present]).sum(-1))
    point *= np.where(in_front < 0, -1, 1)[:, None]
    length = np.maximum(np.linalg.norm(point[:, :3], axis=1), 1e-9)
    return State(
        rotation[None],
        translation[None],
        (point[:, :3] / length[:, None])[None],
        np.maximum(point[:, 3] / length, 0)[None],
        np.zeros((1, 2)),
    )


def poses(state: State) -> np.ndarray:
    """w2c [T, 3, 4] of one solution."""
    return np.concatenate([state.rotation[0], state.translation[0][..., None]], -1)


def subset(witness: Witness, keep: np.ndarray) -> Witness:
    """The points at `keep` [N] bool only; points keep their numbers."""
    return replace(witness, observations=witness.observations.select(keep[witness.observations.point]))
