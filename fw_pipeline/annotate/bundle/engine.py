"""The `tracks` geometry engine: cameras by bundle adjustment of followed points, depth by plane-sweep stereo. No weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
import scipy

from fw_pipeline.annotate.bundle.joint import JointLens, joint_lens
from fw_pipeline.annotate.bundle.refuse import check
from fw_pipeline.annotate.bundle.solve import Solution, solve
from fw_pipeline.annotate.plane_sweep import SweepSettings, depth_range, sweep_depth
from fw_pipeline.annotate.pose import fill_poses
from fw_pipeline.annotate.tracks import Tracks, TrackSettings, follow
from fw_pipeline.annotate.types import ClipGeometry, RejectedClip

CODE_VERSION = 1
FEW_POINTS = 50  # a frame that shows fewer takes the whole clip's depth range


@dataclass(frozen=True)
class BundleEngine:
    """GeometryEngine over `follow`, `solve` and `sweep_depth`; `solve` and `finish` apart allow a lens for a whole video."""

    device: str = "cpu"  # of the sweep
    tracks: TrackSettings = field(default_factory=TrackSettings)
    sweep: SweepSettings = field(default_factory=SweepSettings)
    name: str = "tracks"

    @property
    def version(self) -> str:
        return f"{CODE_VERSION}:opencv-{cv2.__version__}:scipy-{scipy.__version__}:{self.tracks}:{self.sweep}"

    def estimate(self, frames: np.ndarray, intrinsics: np.ndarray | None = None) -> ClipGeometry:
        """Cameras and depth of one clip alone; see `GeometryEngine.estimate`.

        Raises RejectedClip when motion, tracks, depth order or lens leave the geometry open; see `refuse.check`.
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

        Raises RejectedClip when there are too few tracks.
        """
        tracks = frames if isinstance(frames, Tracks) else follow(frames, self.tracks)
        return solve(tracks if ignore is None else tracks.without(ignore), intrinsics)

    def solve_video(self, solutions: Sequence[Solution]) -> tuple[list[Solution], JointLens]:
        """Clips of one video, each solved alone without a known lens -> the same with the lens they share.

        A clip that contradicts the others (a zoom between clips) keeps its own. Raises RejectedClip when all clips together
        do not determine the lens.
        """
        lens = joint_lens(solutions)
        together = [
            solve(s.tracks, _pinhole(lens.focal, s.tracks.height, s.tracks.width)) if shared else s
            for s, shared in zip(solutions, lens.clips, strict=True)
        ]
        return together, lens

    def finish(self, frames: np.ndarray, solution: Solution) -> ClipGeometry:
        """Dense depth for a solved clip: frames [T, h, w, 3] as they were followed. The unit is the tracks' median depth.

        Frames that could not be placed are interpolated and flagged. Raises RejectedClip as `refuse.check` does.
        """
        check(solution)
        w2c, points = first_camera_world(solution)
        good = np.flatnonzero(solution.inlier)
        seen = [good[solution.tracks.seen[good, t]] for t in range(len(w2c))]
        z = np.concatenate([points[seen[t]] @ w2c[t, 2, :3] + w2c[t, 2, 3] for t in np.flatnonzero(solution.placed)])
        unit = float(np.median(z))
        if not unit > 0:
            raise RejectedClip("the scene lies behind the camera: the tracks do not fit one rigid scene")
        w2c[:, :, 3] /= unit
        points = points / unit
        try:
            near, far = np.array(
                [depth_range(points[seen[t] if len(seen[t]) >= FEW_POINTS else good], w2c[t]) for t in range(len(w2c))]
            ).T
        except ValueError as error:
            raise RejectedClip(str(error)) from error
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


def first_camera_world(solution: Solution) -> tuple[np.ndarray, np.ndarray]:
    """(w2c [T, 3, 4] with the first camera as world, all frames filled, points [N, 3]); w2c[0] is exactly the identity."""
    poses = {int(t): solution.w2c[t] for t in np.flatnonzero(solution.placed)}
    w2c = fill_poses(poses, len(solution.placed))
    rotation, translation = w2c[0, :, :3], w2c[0, :, 3]
    turned = w2c[:, :, :3] @ rotation.T
    moved = np.concatenate([turned, (w2c[:, :, 3] - turned @ translation)[..., None]], -1)
    moved[0] = np.eye(3, 4)
    return moved, solution.points @ rotation.T + translation


def _pinhole(focal: float, height: int, width: int) -> np.ndarray:
    pixels = focal * max(height, width)
    return np.array([[pixels, 0, width / 2], [0, pixels, height / 2], [0, 0, 1.0]])
