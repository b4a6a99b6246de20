"""The `tracks` geometry engine: cameras by bundle adjustment of followed points, depth by plane-sweep stereo. No weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
import scipy

from fw_pipeline.annotate.bundle.joint import joint_lens
from fw_pipeline.annotate.bundle.refuse import check, require_motion, require_placed
from fw_pipeline.annotate.bundle.solution import Solution
from fw_pipeline.annotate.bundle.solve import solve
from fw_pipeline.annotate.colmap.plane_sweep import SweepSettings, depth_range, sweep_depth
from fw_pipeline.annotate.motion_kind import motion_kind
from fw_pipeline.annotate.tracks import Tracks, TrackSettings, follow
from fw_pipeline.annotate.trajectory import fill_poses
from fw_pipeline.annotate.types import ClipGeometry, ClipSetAside, Measured

CODE_VERSION = 2
FEW_POINTS = 50  # a frame that shows fewer takes the whole clip's depth range
AROUND = 2  # frames on either side whose points count for a frame's range: a few of its own may be all near or all far


@dataclass(frozen=True)
class BundleEngine:
    """GeometryEngine over `follow`, `solve` and `sweep_depth`; a SharedLensEngine: the clips of a video have one lens."""

    device: str = "cpu"  # of the sweep
    tracks: TrackSettings = field(default_factory=TrackSettings)
    sweep: SweepSettings = field(default_factory=SweepSettings)
    name: str = "tracks"

    @property
    def version(self) -> str:
        return f"{CODE_VERSION}:opencv-{cv2.__version__}:scipy-{scipy.__version__}:{self.tracks}:{self.sweep}"

    def estimate(self, frames: np.ndarray, intrinsics: np.ndarray | None = None) -> ClipGeometry:
        """Cameras and depth of one clip alone; see `GeometryEngine.estimate`.

        Raises ClipSetAside when motion, tracks, depth order or lens leave the geometry open; see `refuse.check`.
        """
        return self.finish(frames, self.solve(frames, intrinsics))

    def solve(
        self, frames: np.ndarray | Tracks, intrinsics: np.ndarray | None = None, ignore: np.ndarray | None = None
    ) -> Solution:
        """Cameras, lens and points without the dense depth; nothing is refused yet but what cannot be computed.

        Args:
            frames: [T, h, w, 3] uint8 RGB, or their tracks.
            intrinsics: [3, 3] pixels when the lens is known.
            ignore: [T, h, w] bool, moving things whose tracks are left out.

        Raises ClipSetAside when there are too few tracks.
        """
        tracks = frames if isinstance(frames, Tracks) else follow(frames, self.tracks)
        return solve(tracks if ignore is None else tracks.without(ignore), intrinsics)

    def share_lens(self, solutions: Sequence[Solution]) -> list[Solution | ClipSetAside]:
        """Clips of one video, each solved alone without a known lens -> the same with the lens they share.

        A clip that contradicts the others (a zoom between clips) keeps its own, and so does a video's only clip. When all
        clips together do not determine the lens, each is set aside: for its own motion where that is why, else for the lens.
        """
        if len(solutions) == 1:
            return list(solutions)
        try:
            lens = joint_lens(solutions)
        except ClipSetAside as undetermined:
            return [_why_not(s) or undetermined for s in solutions]
        return [
            solve(s.tracks, lens.lens(s.tracks.height, s.tracks.width).intrinsics) if shared else s
            for s, shared in zip(solutions, lens.clips, strict=True)
        ]

    def measured(self, solution: Solution) -> Measured:
        """See `Measured`; `Solution.numbers` says what the numbers are."""
        return Measured(solution.numbers(), motion_kind(solution.motion).value)

    def finish(self, frames: np.ndarray, solution: Solution) -> ClipGeometry:
        """Dense depth for a solved clip: frames [T, h, w, 3] as they were followed. The unit is the tracks' median depth.

        Frames that could not be placed are interpolated and flagged. Raises ClipSetAside as `refuse.check` does.
        """
        check(solution)
        w2c, points = first_camera_world(solution)
        good = np.flatnonzero(solution.inlier)
        seen = [good[solution.tracks.seen[good, t]] for t in range(len(w2c))]
        z = np.concatenate([points[seen[t]] @ w2c[t, 2, :3] + w2c[t, 2, 3] for t in np.flatnonzero(solution.placed)])
        unit = float(np.median(z))
        if not unit > 0:
            raise ClipSetAside("the scene lies behind the camera: the tracks do not fit one rigid scene")
        w2c[:, :, 3] /= unit
        points = points / unit
        near, far = depth_ranges(points, w2c, seen)
        k = np.repeat(solution.intrinsics[None], len(w2c), 0)
        depth, confidence = sweep_depth(frames, w2c, k, near, far, self.sweep, self.device)
        return ClipGeometry(
            w2c,
            k,
            depth,
            confidence,
            np.where(solution.placed, solution.inlier_ratio, 0).astype(np.float32),
            solution.reprojection_error.astype(np.float32),
            ~solution.placed,
        )


def _why_not(solution: Solution) -> ClipSetAside | None:
    """Why this clip would be set aside whatever its lens."""
    try:
        require_motion(solution)
        require_placed(solution)
    except ClipSetAside as reason:
        return reason
    return None


def depth_ranges(points: np.ndarray, w2c: np.ndarray, seen: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """near [T] and far [T] for the sweep, from points [N, 3] that the frames around each one see (`seen`: indices a frame)."""
    near, far = np.zeros(len(w2c)), np.zeros(len(w2c))
    everything = np.unique(np.concatenate(seen))
    for t in range(len(w2c)):
        around = np.unique(np.concatenate(seen[max(0, t - AROUND) : t + AROUND + 1]))
        chosen = around if len(around) >= FEW_POINTS else everything
        z = points[chosen] @ w2c[t, 2, :3] + w2c[t, 2, 3]
        if (z > 0).sum() < 8:
            raise ClipSetAside(f"{(z > 0).sum()} points in front of the camera in frame {t}; a depth range needs at least 8")
        near[t], far[t] = depth_range(points[chosen], w2c[t])
    return near, far


def first_camera_world(solution: Solution) -> tuple[np.ndarray, np.ndarray]:
    """(w2c [T, 3, 4] with the first camera as world, all frames filled, points [N, 3]); w2c[0] is exactly the identity."""
    poses = {int(t): solution.w2c[t] for t in np.flatnonzero(solution.placed)}
    w2c = fill_poses(poses, len(solution.placed))
    rotation, translation = w2c[0, :, :3], w2c[0, :, 3]
    turned = w2c[:, :, :3] @ rotation.T
    moved = np.concatenate([turned, (w2c[:, :, 3] - turned @ translation)[..., None]], -1)
    moved[0] = np.eye(3, 4)
    return moved, solution.points @ rotation.T + translation
