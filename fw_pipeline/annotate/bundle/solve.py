"""Tracks of one clip -> its `Solution`: few frames and points from many starts, then all from the few that differ."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fw_pipeline.annotate.bundle.adjust import Free, adjust, residuals
from fw_pipeline.annotate.bundle.certainty import (
    Profile,
    block_of,
    compare,
    focal_profile,
    lens_certainty,
    path_certainty,
    with_log_focal,
)
from fw_pipeline.annotate.bundle.grow import SCALE, Grown, expand, grow, replaced, usable
from fw_pipeline.annotate.bundle.solution import LensKnowledge, Rival, Solution
from fw_pipeline.annotate.bundle.starts import FOCAL_RANGE, FOCALS, choose_core, coarse, depth_agreement, distinct
from fw_pipeline.annotate.bundle.state import Observations, State, stack
from fw_pipeline.annotate.motion_kind import motion_numbers
from fw_pipeline.annotate.tracks import Tracks
from fw_pipeline.annotate.types import ClipSetAside

MIN_TRACKS = 60  # fewer decide nothing: six unknowns a frame stand against them
SEARCH_FRAMES, SEARCH_POINTS, PROFILE_POINTS = 21, 640, 260  # how much of a clip the searches see; the last adjustment sees all
# Fixed focal lengths for the profile, as logs from the best one: close ones for how sharp it is, far ones for other valleys.
OFFSETS = np.array([-1.0, -0.65, -0.4, -0.2, -0.08, 0.0, 0.08, 0.2, 0.4, 0.65, 1.0])
INLIER = 1.5  # pixels
REVERSED = 0.3  # rank correlation of inverse distances below which a solution has another depth order
NEAR = 1.05  # of the best cost: solutions that count for the spread of the lens


def solve(tracks: Tracks, intrinsics: np.ndarray | None = None) -> Solution:
    """Cameras, lens and points of a clip from its tracks. Deterministic; costs grow linearly with the clip's length.

    intrinsics: [3, 3] pixels, kept as they are; None: square pixels, principal point in the middle, focal length found.
    Nothing is refused here but what cannot be computed: `refuse.check` judges.

    Raises ClipSetAside when there are too few frames or tracks to solve anything.
    """
    if tracks.frames < 3:
        raise ClipSetAside(f"{tracks.frames} frames; structure from motion needs at least 3")
    frames = np.unique(np.rint(np.linspace(0, tracks.frames - 1, min(tracks.frames, SEARCH_FRAMES))).astype(int))
    points = _some_points(tracks, frames)
    some = tracks.subset(points).at(frames)
    core = choose_core(some)
    if len(core.points) < MIN_TRACKS // 2 or len(some) < MIN_TRACKS:
        raise ClipSetAside(
            f"too few tracks: {len(tracks)} points could be followed, {len(core.points)} of them around the middle of the clip "
            f"(at least {MIN_TRACKS} and {MIN_TRACKS // 2}): no texture, blur, or a motion too fast to follow"
        )
    camera = _Camera.of(tracks, intrinsics)
    found = _Search(some, camera).run()
    whole = camera.observe(tracks, int(frames[core.reference]))
    grown = expand(whole, found.grown, frames, points, camera.free, camera.size)
    return _assembled(tracks, camera, whole.select(usable(whole, grown.placed, grown.known)), grown, found)


def _some_points(tracks: Tracks, frames: np.ndarray) -> np.ndarray:
    """Indices of at most SEARCH_POINTS tracks seen in three of the frames, evenly over the picture and over time."""
    index = np.flatnonzero(tracks.seen[:, frames].sum(1) >= 3)
    if len(index) <= SEARCH_POINTS:
        return index
    born = tracks.seen[index].argmax(1)
    block = block_of(tracks.xy[index, born], tracks.height, tracks.width)
    order = np.lexsort((born, block))
    return np.sort(index[order[np.linspace(0, len(index) - 1, SEARCH_POINTS).astype(int)]])


@dataclass(frozen=True)
class Curve:
    """Costs at fixed focal lengths, and what letting the lens zoom would change."""

    log_focal: np.ndarray  # [G]
    cost: np.ndarray  # [G]
    zoom: tuple[float, float, float]  # see `_Search._zoom`


@dataclass(frozen=True)
class _Camera:
    """The lens as far as it is given, and what goes with the picture's size."""

    known: bool
    focal: tuple[float, float]
    centre: tuple[float, float]
    long_side: float

    @classmethod
    def of(cls, tracks: Tracks, intrinsics: np.ndarray | None) -> _Camera:
        long_side = float(max(tracks.height, tracks.width))
        if intrinsics is None:
            return cls(False, (long_side, long_side), (tracks.width / 2, tracks.height / 2), long_side)
        k = np.asarray(intrinsics, np.float64)
        return cls(True, (float(k[0, 0]), float(k[1, 1])), (float(k[0, 2]), float(k[1, 2])), long_side)

    @property
    def size(self) -> float:
        return max(1.0, self.long_side / 448)

    @property
    def scale(self) -> float:
        return SCALE * self.size

    @property
    def free(self) -> Free:
        low, high = np.log(FOCAL_RANGE)
        return Free(lens=0 if self.known else 1, front=True, focal_range=(float(low), float(high)))

    def observe(self, tracks: Tracks, reference: int) -> Observations:
        return Observations.of(tracks.xy, tracks.seen, reference, self.focal, self.centre)

    def intrinsics(self, state: State) -> np.ndarray:
        factor = float(np.exp(state.log_focal[0, 0]))
        return np.array([[self.focal[0] * factor, 0, self.centre[0]], [0, self.focal[1] * factor, self.centre[1]], [0, 0, 1]])


@dataclass(frozen=True)
class _Found:
    grown: Grown  # batch 1
    lens: LensKnowledge
    rival: Rival
    path: tuple[float, float]  # see `path_certainty`
    observations: Observations  # what the search adjusted
    cost: float


class _Search:
    """The way from tracks (few frames, few points) to the best solution and its rivals."""

    def __init__(self, tracks: Tracks, camera: _Camera) -> None:
        self.tracks, self.camera, self.free, self.scale = tracks, camera, camera.free, camera.scale
        self.core = choose_core(tracks)
        self.obs = camera.observe(tracks, self.core.reference)
        middle = tracks.seen.argmax(1) + (tracks.length - 1) // 2
        self.block = block_of(tracks.xy[np.arange(len(tracks)), middle], tracks.height, tracks.width)

    def run(self) -> _Found:
        grown = grow(
            self.obs, self.core, self._coarse(), Free(lens=self.free.lens, focal_range=self.free.focal_range), self.camera.size
        )
        part = self.obs.select(usable(self.obs, grown.placed, grown.known))
        states, costs, curve = self._candidates(part, grown)
        best = states.take([int(np.argmin(costs))])
        best = adjust(part, best, self.free, self.scale, steps=10).state
        last = adjust(part, replaced(part, best, self.scale), self.free, self.scale, steps=20, tolerance=1e-5)
        state, cost = last.state.scaled(), float(last.cost[0])
        rival = self._rival(part, grown.known, states, costs, state)
        lens = LensKnowledge() if curve is None else self._lens(part, state, cost, states, costs, curve)
        path = path_certainty(part, state, grown.placed, self.block, self.scale, self.free.lens)
        return _Found(Grown(state, grown.placed, grown.known), lens, rival, path, part, cost)

    def _coarse(self) -> State:
        core, camera = self.core, self.camera
        few = self.tracks.subset(core.points).at(core.frames)
        obs = camera.observe(few, int(np.searchsorted(core.frames, core.reference)))
        logs = [0.0] if camera.known else [float(np.log(f)) for f in FOCALS]
        return coarse(few, obs, camera.centre, logs, self.free, camera.size)

    def _candidates(self, part: Observations, grown: Grown) -> tuple[State, np.ndarray, Curve | None]:
        """(solutions, their costs, the profile): those of the starts that differ, the best one's mirror, and, with a free lens,
        every valley of the profile."""
        fine = adjust(part, grown.state, self.free, self.scale, steps=10, tolerance=1e-3)
        chosen = distinct(fine.state, fine.cost, 3, worst=2.0)
        state, cost = fine.state.take(chosen), fine.cost[chosen]
        mirror = state.take([0]).mirrored().scaled()
        extra, curve = [mirror], None
        if not self.camera.known:
            curve, valleys = self._profile(part, grown.known, state)
            extra.append(valleys)
        more = adjust(part, stack(extra), self.free, self.scale, steps=15, tolerance=1e-3)
        return stack([state, more.state]), np.concatenate([cost, more.cost]), curve

    def _profile(self, part: Observations, known: np.ndarray, state: State) -> tuple[Curve, State]:
        """Basins x fixed focal lengths on a part of the points; the valleys as solutions of all points."""
        few = part.select(self._sample(known)[part.point])
        logs = np.unique((state.log_focal[0, 0] + OFFSETS).clip(*self.free.focal_range))
        cost, solved = focal_profile(few, state, logs, self.scale)
        valleys = [i for i in range(len(logs)) if cost[i] == cost[max(0, i - 1) : i + 2].min() and cost[i] < 1.5 * cost.min()]
        has = np.zeros(part.points, bool)
        has[few.point] = True
        whole = stack([with_log_focal(state.take([0]), logs[i]) for i in valleys])  # the other points follow by refocusing
        chosen = solved.take(valleys)
        whole = State(
            chosen.rotation,
            chosen.translation,
            np.where(has[None, :, None], chosen.direction, whole.direction),
            np.where(has[None], chosen.inverse, whole.inverse),
            chosen.log_focal,
        )
        whole = adjust(part, whole, Free(poses=False, lens=0, front=True), self.scale, steps=5, tolerance=1e-3).state
        zoom = self._zoom(few, solved, float(cost.min()))
        return Curve(logs, cost * (len(part.point) / len(few.point)), zoom), whole

    def _sample(self, known: np.ndarray) -> np.ndarray:
        """[N] bool: known points for the profile, the same number from every block of the picture as far as there are, long ones
        first."""
        index = np.flatnonzero(known)
        order = index[np.lexsort((-self.tracks.length[index], self.block[index]))]
        rank = np.concatenate([np.arange(n) for n in np.bincount(self.block[index]) if n])
        out = np.zeros(len(known), bool)
        out[order[np.argsort(rank, kind="stable")[:PROFILE_POINTS]]] = True
        return out

    def _rival(self, part: Observations, known: np.ndarray, states: State, costs: np.ndarray, best: State) -> Rival:
        states = states.scaled()
        for index in np.argsort(costs, kind="stable"):
            if depth_agreement(states.inverse[index, known], best.inverse[0, known]) < REVERSED:
                return Rival(*compare(part, best, states.take([int(index)]), self.block, self.scale))
        return Rival()

    def _zoom(self, few: Observations, solved: State, cost: float) -> tuple[float, float, float]:
        """(log change of the focal length over the clip, its standard deviation, cost without a zoom over cost with one).

        A zoom pulls the one focal length of all frames far away, so it is looked for from solutions at many of them.
        """
        zooming = Free(lens=2, front=True, focal_range=self.free.focal_range)
        found = adjust(few, solved.take(np.arange(1, len(solved), 2)), zooming, self.scale, steps=18, tolerance=1e-3)
        best = int(np.argmin(found.cost))
        zoomed = found.state.take([best])
        std = lens_certainty(few, zoomed, self.block, self.scale, lens=2).zoom_std
        return float(zoomed.log_focal[0, 1]), std, cost / max(float(found.cost[best]), 1e-12)

    def _lens(
        self, part: Observations, state: State, cost: float, states: State, costs: np.ndarray, curve: Curve
    ) -> LensKnowledge:
        sure = lens_certainty(part, state, self.block, self.scale)
        profile = Profile(curve.log_focal, curve.cost, sure.unit, float(state.log_focal[0, 0]), sure.std)
        near = np.append(states.log_focal[costs <= NEAR * cost, 0], state.log_focal[0, 0])
        return LensKnowledge(sure.std, float(np.exp(np.ptp(near))), profile, *curve.zoom)


def _assembled(tracks: Tracks, camera: _Camera, obs: Observations, grown: Grown, found: _Found) -> Solution:
    """The whole clip's solution in plain arrays."""
    state = grown.state.scaled()
    squared = (residuals(obs, state)[0] ** 2).sum(-1)
    inside = squared < (INLIER * camera.size) ** 2
    seen = np.maximum(np.bincount(obs.frame, minlength=obs.frames), 1)
    error = [np.sqrt(squared[inside & (obs.frame == t)]) for t in range(obs.frames)]
    share = np.bincount(obs.point, inside, obs.points) / np.maximum(np.bincount(obs.point, minlength=obs.points), 1)
    points = state.direction[0] / np.maximum(state.inverse[0], 1e-6)[:, None]
    search = found.grown.state
    return Solution(
        tracks=tracks,
        rotation=state.rotation[0],
        translation=state.translation[0],
        points=np.where(grown.known[:, None], points, np.nan),
        intrinsics=camera.intrinsics(state),
        known_lens=camera.known,
        placed=grown.placed,
        inlier=grown.known & (share > 0.5),
        inlier_ratio=np.bincount(obs.frame, inside, obs.frames) / seen,
        reprojection_error=np.array([np.median(e) if len(e) else 0.0 for e in error]),
        cost=float((camera.scale**2 * np.log1p(squared / camera.scale**2)).sum()),
        lens=found.lens,
        rival=found.rival,
        path_error=found.path[0],
        pose_auc=found.path[1],
        motion=motion_numbers(tracks, found.observations, search, found.cost, camera.scale),
        state=state,
        observations=obs,
    )
