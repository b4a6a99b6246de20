"""The `colmap` geometry engine: cameras by structure from motion (pycolmap, CPU), depth by plane-sweep stereo.

Needs no weights. COLMAP's pixel convention is the project's own: the centre of the upper left pixel is (0.5, 0.5).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pycolmap

from fw_pipeline.annotate.colmap.mapping import Mapper, SparseModel, solve
from fw_pipeline.annotate.colmap.plane_sweep import SweepSettings, depth_range, sweep_depth
from fw_pipeline.annotate.trajectory import fill_poses
from fw_pipeline.annotate.types import ClipGeometry, ClipSetAside

CODE_VERSION = 2


@dataclass(frozen=True)
class ColmapEngine:
    """GeometryEngine over pycolmap and `sweep_depth`."""

    device: str = "cpu"  # of the sweep; structure from motion runs on the CPU
    mapper: Mapper = field(default_factory=Mapper)
    min_angle: float = 0.5  # degrees of median triangulation angle; below it depth is noise
    sweep: SweepSettings = field(default_factory=SweepSettings)
    name: str = "colmap"

    @property
    def version(self) -> str:
        return f"{CODE_VERSION}:pycolmap-{pycolmap.__version__}:{self.mapper.max_features}:{self.mapper.enlarge_to}:{self.sweep}"

    def estimate(self, frames: np.ndarray, intrinsics: np.ndarray | None = None) -> ClipGeometry:
        """Cameras and depth of a clip; see `GeometryEngine.estimate`.

        The unit is the median depth of the sparse points. Frames that do not register are interpolated and flagged.

        Raises:
            ClipSetAside: nothing to match, a camera that does not move or only turns, too few frames registered.
            ColmapDied: see `mapping.solve`.
        """
        count, height, width, _ = frames.shape
        model = self._solved(frames, intrinsics)
        ratio, error = _fit(model, count, tolerance=2.0 * max(1.0, max(height, width) / 448))
        interpolated = np.array([t not in model.poses for t in range(count)])
        w2c = fill_poses(model.poses, count)
        w2c, points = _first_camera_world(w2c, model.points)
        z = np.concatenate([points[model.seen[t]] @ w2c[t, 2, :3] + w2c[t, 2, 3] for t in model.poses])
        unit = float(np.median(z))
        w2c[:, :, 3] /= unit
        near, far = self._ranges(points / unit, w2c, model)
        k = np.repeat(model.intrinsics[None], count, 0)
        depth, confidence = sweep_depth(frames, w2c, k, near, far, self.sweep, self.device)
        return ClipGeometry(w2c, k, depth, confidence, ratio, error, interpolated)

    def cameras(self, frames: np.ndarray, intrinsics: np.ndarray | None = None) -> np.ndarray:
        """`estimate` without its depth: w2c [T, 3, 4] with the first camera as world."""
        model = self._solved(frames, intrinsics)
        return _first_camera_world(fill_poses(model.poses, len(frames)), model.points)[0]

    def _solved(self, frames: np.ndarray, intrinsics: np.ndarray | None) -> SparseModel:
        """Structure from motion whose cameras can be trusted, or ClipSetAside."""
        count = len(frames)
        if count < 3:
            raise ClipSetAside(f"{count} frames; structure from motion needs at least 3")
        model = solve(frames, intrinsics, self.mapper)
        needed = self.mapper.min_registered
        if len(model.poses) < needed * count:
            raise ClipSetAside(f"only {len(model.poses)} of {count} frames could be placed (at least {needed:.0%} are needed)")
        if model.triangulation_angle < self.min_angle:
            raise ClipSetAside(
                f"the camera turns but hardly moves: points are seen under {model.triangulation_angle:.2f} degrees "
                f"(at least {self.min_angle:g})"
            )
        return model

    def _ranges(self, points: np.ndarray, w2c: np.ndarray, model: SparseModel) -> tuple[np.ndarray, np.ndarray]:
        """(near [T], far [T]); a frame that sees too few points takes the whole clip's."""
        ranges = []
        for t in range(len(w2c)):
            seen = model.seen.get(t, np.empty(0, int))
            ranges.append(depth_range(points[seen] if len(seen) >= 50 else points, w2c[t]))
        near, far = np.array(ranges).T
        return near, far


def _fit(model: SparseModel, count: int, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """Per frame: share of its 2-D/3-D matches within `tolerance` pixels of its pose, and the median error of those."""
    ratio, error = np.zeros(count, np.float32), np.zeros(count, np.float32)
    for t, (pixels, world) in model.observed.items():
        camera = world @ model.poses[t][:, :3].T + model.poses[t][:, 3]
        projected = camera @ model.intrinsics.T
        off = np.linalg.norm(projected[:, :2] / np.maximum(projected[:, 2:], 1e-9) - pixels, axis=1)
        inliers = (off < tolerance) & (camera[:, 2] > 0)
        ratio[t] = inliers.mean() if len(off) else 0
        error[t] = np.median(off[inliers]) if inliers.any() else tolerance
    return ratio, error


def _first_camera_world(w2c: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same scene with the first camera as world: w2c[0] is exactly the identity."""
    rotation, translation = w2c[0, :, :3], w2c[0, :, 3]
    turned = w2c[:, :, :3] @ rotation.T
    moved = np.concatenate([turned, (w2c[:, :, 3] - turned @ translation)[..., None]], -1)
    moved[0] = np.eye(3, 4)
    return moved, points @ rotation.T + translation
