"""A world: the video of one pass with its depth, points and cameras, and what was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fw_model.cameras import Cameras

FRAMES_PER_SECOND = 16  # the base model's own, for which it was trained


@dataclass(frozen=True)
class World:
    """One clip with its geometry, T frames of H x W pixels, all on the CPU.

    video          uint8 [T, H, W, 3], RGB
    depth          float32 [T, H, W], z-depth in clip units (mean distance of the scene's points = 1); 0 where unknown
    depth_conf     float32 [T, H, W], non-negative; larger is surer
    points         float32 [T, H, W, 3], in the frame of the first camera, clip units
    points_conf    float32 [T, H, W], as `depth_conf`
    cameras        the cameras that go with the geometry: w2c (OpenCV axes), the first is the world; intrinsics in pixels of H x W
    requested      the path that was asked for, in the same conventions; None where nothing was (a clip of a dataset)
    fps            frames per second of the video
    meta           what made it: prompt, seed, steps, checkpoint, scale; plain values that go into JSON
    """

    video: Tensor
    depth: Tensor
    depth_conf: Tensor
    points: Tensor
    points_conf: Tensor
    cameras: Cameras
    requested: Cameras | None = None
    fps: float = FRAMES_PER_SECOND
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.video.ndim != 4 or self.video.shape[-1] != 3:
            raise ValueError(f"world: expected video [T,H,W,3], got {list(self.video.shape)}")
        shape = self.video.shape[:3]
        found = {"depth": self.depth, "depth_conf": self.depth_conf, "points_conf": self.points_conf}
        wrong = [f"{name} {list(tensor.shape)}" for name, tensor in found.items() if tensor.shape != shape]
        if self.points.shape != (*shape, 3):
            wrong.append(f"points {list(self.points.shape)}")
        wrong += [f"{len(cameras)} cameras" for cameras in (self.cameras, self.requested) if cameras and len(cameras) != shape[0]]
        if wrong:
            raise ValueError(f"world: video is {list(self.video.shape)}, but there are {', '.join(wrong)}")

    def save(self, folder: str | Path) -> Path:
        """Write video, depth, cloud, cameras and a page to look at them; see `fw_model.export.save.save_world`."""
        from fw_model.export.save import save_world

        return save_world(self, Path(folder))
