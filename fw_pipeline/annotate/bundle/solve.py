"""Tracks of one clip -> cameras, lens and points, with all that is known of how sure they are."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fw_pipeline.annotate.bundle.adjust import Adjusted, Free, Observations, State, adjust, residuals, stack
from fw_pipeline.annotate.bundle.certainty import (
    Profile,
    block_of,
    compare,
    focal_profile,
    lens_certainty,
    with_log_focal,
)
from fw_pipeline.annotate.bundle.grow import SCALE, grow, replaced, usable
from fw_pipeline.annotate.bundle.starts import FOCAL_RANGE, FOCALS, Core, choose_core, coarse, depth_agreement, distinct
from fw_pipeline.annotate.motion_kind import MotionNumbers, motion_numbers
from fw_pipeline.annotate.tracks import Tracks
from fw_pipeline.annotate.types import RejectedClip

MIN_TRACKS = 60  # fewer decide nothing: six unknowns a frame stand against them
# Fixed focal lengths for the profile, as logs from the best one: close ones for how sharp it is, far ones for other valleys.
OFFSETS = np.array([-1.0, -0.65, -0.4, -0.2, -0.08, 0.0, 0.08, 0.2, 0.4, 0.65, 1.0])
PROFILE_POINTS = 260
INLIER = 1.5  # pixels
REVERSED = 0.3  # rank correlation of inverse distances below which a solution has another depth order


@dataclass(frozen=True)
class Solution:
    """Cameras, points and lens of a clip, in the camera of the reference frame and the tracks' pixels."""

    tracks: Tracks
    rotation: np.ndarray  # [T, 3, 3] world (the reference camera) to camera
    translation: np.ndarray  # [T, 3]
    points: np.ndarray  # [N, 3] world; nan where the track was not placed
    intrinsics: np.ndarray  # [3, 3] pixels
    known_lens: bool  # given, not found
    placed: np.ndarray  # [T] bool, frames whose pose was solved
    inlier: np.ndarray  # [N] bool: the track is placed, and its median error small
    inlier_ratio: np.ndarray  # [T] of the observations in the frame
    reprojection_error: np.ndarray  # [T] median pixels of the inliers
    cost: float  # squared pixels, see `adjust`
    focal: float  # over the long side
    focal_std: float  # relative
    focal_spread: float  # largest over smallest focal length of all solutions within 5 % of the best cost
    profile: Profile | None  # None with a known lens
    mirror_ratio: float  # cost of the cheapest solution with another depth order, over the best; inf: none
    mirror_z: float  # how many standard deviations the best is better than that one; inf: none
    zoom: float  # relative change of the focal length over the clip, if it were free
    zoom_std: float
    motion: MotionNumbers
    state: State = field(repr=False)  # batch 1
    observations: Observations = field(repr=False)

    @property
    def w2c(self) -> np.ndarray:
        """[T, 3, 4] with the reference camera as world."""
        return np.concatenate([self.rotation, self.translation[..., None]], -1)

    @property
    def focal_interval(self) -> tuple[float, float]:
        """Focal lengths over the long side between which the lens lies (two standard deviations of evidence)."""
        if self.profile is None:
            return self.focal, self.focal
        low, high = self.profile.interval()
        return float(np.exp(low)), float(np.exp(high))

    @property
    def lens_std(self) -> float:
        """Relative standard deviation of the focal length: the larger of the covariance's and the profile's. 0 if given."""
        if self.profile is None:
            return 0.0
        low, high = self.profile.interval()
        return max(self.focal_std, (high - low) / 4)

    @property
    def outliers(self) -> np.ndarray:
        """[N] bool: tracks that the solution does not explain."""
        return ~self.inlier


def solve(tracks: Tracks, intrinsics: np.ndarray | None = None, focal_fixed: bool = True) -> Solution:
    """Cameras of a clip from its tracks.

    intrinsics: [3, 3] pixels, kept as they are; None: square pixels, principal point in the middle, focal length found.
    Nothing is refused here but what cannot be computed: see `fw_pipeline.annotate.bundle.refuse.check`.

    Raises RejectedClip when there are too few tracks to solve anything.
    """
    if tracks.frames < 3:
        raise RejectedClip(f"{tracks.frames} frames; structure from motion needs at least 3")
    core = choose_core(tracks)
    if len(core.points) < MIN_TRACKS // 2 or len(tracks) < MIN_TRACKS:
        raise RejectedClip(
            f"too few tracks: {len(tracks)} points could be followed, {len(core.points)} of them around the middle of the clip "
            f"(at least {MIN_TRACKS} and {MIN_TRACKS // 2}): no texture, blur, or a motion too fast to follow"
        )
    return _Solver(tracks, core, intrinsics).run()


class _Solver:
    """One clip's way from tracks to a solution; the steps share the observations."""

    def __init__(self, tracks: Tracks, core: Core, intrinsics: np.ndarray | None) -> None:
        long_side = float(max(tracks.height, tracks.width))
        self.tracks, self.core, self.known = tracks, core, intrinsics is not None
        self.long_side, self.size = long_side, max(1.0, long_side / 448)
        if intrinsics is None:
            self.focal, self.centre = (long_side, long_side), (tracks.width / 2, tracks.height / 2)
        else:
            self.focal = (float(intrinsics[0, 0]), float(intrinsics[1, 1]))
            self.centre = (float(intrinsics[0, 2]), float(intrinsics[1, 2]))
        self.obs = Observations.of(tracks.xy, tracks.seen, core.reference, self.focal, self.centre)
        self.scale = SCALE * self.size
        self.lens = 0 if self.known else 1
        bounds = (float(np.log(FOCAL_RANGE[0])), float(np.log(FOCAL_RANGE[1])))
        self.free = Free(lens=self.lens, front=True, focal_range=bounds)
        middle = tracks.seen.argmax(1) + (tracks.length - 1) // 2
        self.block = block_of(tracks.xy[np.arange(len(tracks)), middle], tracks.height, tracks.width)

    def run(self) -> Solution:
        grown = grow(self.obs, self.core, self._coarse(), Free(lens=self.lens, focal_range=self.free.focal_range), self.size)
        use = usable(self.obs, grown.placed, grown.known)
        part = self.obs.select(use)
        fine = adjust(part, grown.state, self.free, self.scale, steps=10, tolerance=1e-3)
        states, costs, profile = self._over_focals(part, grown.known, fine)
        return self._result(part, grown.placed, grown.known, states, costs, profile)

    def _coarse(self) -> State:
        core = self.core
        xy, seen = self.tracks.xy[core.points][:, core.frames], self.tracks.seen[core.points][:, core.frames]
        reference = int(np.searchsorted(core.frames, core.reference))
        obs = Observations.of(xy, seen, reference, self.focal, self.centre)
        logs = [0.0] if self.known else [float(np.log(f)) for f in FOCALS]
        return coarse(self.tracks, core, obs, self.centre, logs, self.lens)[0]

    def _over_focals(self, part: Observations, known: np.ndarray, fine: Adjusted) -> tuple[State, np.ndarray, Profile | None]:
        """Solutions on all observations, their costs, and the profile: basins x fixed focal lengths, on a part of the points;
        the cheapest focal length of each basin is then let free on all."""
        chosen = distinct(fine.state, fine.cost, 3, worst=2.0)
        state, cost = fine.state.take(chosen), fine.cost[chosen]
        mirrored = adjust(part, state.take([0]).mirrored().scaled(), self.free, self.scale, steps=15, tolerance=1e-3)
        if self.known:
            return stack([state, mirrored.state]), np.concatenate([cost, mirrored.cost]), None
        few = part.select(self._sample(known)[part.point])
        logs = (state.log_focal[0, 0] + OFFSETS).clip(*self.free.focal_range)
        logs = np.unique(logs)
        grid, solutions = focal_profile(few, state, logs, self.scale)
        dips = [i for i in range(len(logs)) if grid[i] == grid[max(0, i - 1) : i + 2].min() and grid[i] < 1.5 * grid.min()]
        # points that were left out of the profile follow the lens by refocusing the full solution
        full = stack([with_log_focal(state.take([0]), logs[i]) for i in dips])
        for index, i in enumerate(dips):
            has = np.zeros(part.points, bool)
            has[few.point] = True
            full.rotation[index], full.translation[index] = solutions.rotation[i], solutions.translation[i]
            full.direction[index, has], full.inverse[index, has] = solutions.direction[i, has], solutions.inverse[i, has]
        placed = adjust(part, full, Free(poses=False, lens=0, front=True), self.scale, steps=5, tolerance=1e-3).state
        again = adjust(part, placed, self.free, self.scale, steps=12, tolerance=1e-3)
        states = stack([state, mirrored.state, again.state])
        costs = np.concatenate([cost, mirrored.cost, again.cost])
        share = len(few.point) / len(part.point)
        return states, costs, Profile(logs, grid / share, unit=np.nan)

    def _sample(self, known: np.ndarray) -> np.ndarray:
        """[N] bool: known points for the profile, evenly over the picture, long ones first."""
        index = np.flatnonzero(known)
        if len(index) > PROFILE_POINTS:
            order = index[np.lexsort((-self.tracks.length[index], self.block[index]))]
            rank = np.concatenate([np.arange(n) for n in np.bincount(self.block[index]) if n])
            index = order[np.argsort(rank, kind="stable")[:PROFILE_POINTS]]
        out = np.zeros(len(known), bool)
        out[index] = True
        return out

    def _result(
        self, part: Observations, placed: np.ndarray, known: np.ndarray, states: State, costs: np.ndarray, profile: Profile | None
    ) -> Solution:
        best = int(np.argmin(costs))
        last = adjust(part, states.take([best]), self.free, self.scale, steps=10, tolerance=1e-4)
        again = replaced(part, last.state, self.scale)
        last = adjust(part, again, self.free, self.scale, steps=20, tolerance=1e-5)
        state, cost = last.state.scaled(), float(last.cost[0])
        near = costs <= 1.05 * cost
        spread = float(np.exp(np.ptp(np.append(states.log_focal[near, 0], state.log_focal[0, 0]))))
        std, zoom, zoom_std = 0.0, 0.0, float("inf")
        if profile is not None:
            sure = lens_certainty(part, state, self.block, self.scale)
            std = sure.std
            profile = Profile(profile.log_focal, profile.cost, sure.unit)
        ratio, z = self._mirror(part, states, costs, state)
        zoomed = adjust(part, state, Free(lens=2, front=True, focal_range=self.free.focal_range), self.scale, steps=8)
        zoom = float(zoomed.state.log_focal[0, 1])
        zoom_std = lens_certainty(part, zoomed.state, self.block, self.scale, lens=2).zoom_std
        return self._assemble(part, placed, known, state, cost, spread, std, profile, ratio, z, zoom, zoom_std)

    def _mirror(self, part: Observations, states: State, costs: np.ndarray, best: State) -> tuple[float, float]:
        known = np.zeros(part.points, bool)
        known[part.point] = True
        scaled = states.scaled()
        for index in np.argsort(costs, kind="stable"):
            if depth_agreement(scaled.inverse[index, known], best.inverse[0, known]) < REVERSED:
                return compare(part, best, states.take([int(index)]), self.block, self.scale)
        return float("inf"), float("inf")

    def _assemble(  # noqa: PLR0913
        self,
        part: Observations,
        placed: np.ndarray,
        known: np.ndarray,
        state: State,
        cost: float,
        spread: float,
        std: float,
        profile: Profile | None,
        ratio: float,
        z: float,
        zoom: float,
        zoom_std: float,
    ) -> Solution:
        error = np.linalg.norm(residuals(part, state)[0], axis=-1)
        inside = error < INLIER * self.size
        count = np.bincount(part.frame, minlength=part.frames)
        inlier_ratio = np.bincount(part.frame, inside, part.frames) / np.maximum(count, 1)
        typical = np.array(
            [
                np.median(error[inside & (part.frame == t)]) if (inside & (part.frame == t)).any() else 0.0
                for t in range(part.frames)
            ]
        )
        share = np.bincount(part.point, inside, part.points) / np.maximum(np.bincount(part.point, minlength=part.points), 1)
        factor = float(np.exp(state.log_focal[0, 0]))
        intrinsics = np.array(
            [[self.focal[0] * factor, 0, self.centre[0]], [0, self.focal[1] * factor, self.centre[1]], [0, 0, 1]]
        )
        with np.errstate(divide="ignore"):
            points = state.direction[0] / np.maximum(state.inverse[0], 1e-6)[:, None]
        points = np.where(known[:, None], points, np.nan)
        motion = motion_numbers(self.tracks, part, state, cost, self.scale)
        return Solution(
            tracks=self.tracks,
            rotation=state.rotation[0],
            translation=state.translation[0],
            points=points,
            intrinsics=intrinsics,
            known_lens=self.known,
            placed=placed,
            inlier=known & (share > 0.5),
            inlier_ratio=inlier_ratio,
            reprojection_error=typical,
            cost=cost,
            focal=self.focal[0] * factor / self.long_side,
            focal_std=std,
            focal_spread=spread,
            profile=profile,
            mirror_ratio=ratio,
            mirror_z=z,
            zoom=zoom,
            zoom_std=zoom_std,
            motion=motion,
            state=state,
            observations=part,
        )
