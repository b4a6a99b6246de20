"""A small guide-layout folder with exact geometry: a corner of two planes seen by a moving, turning camera."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fw_model.config import Preset
from fw_model.data.manifest import ClipRow, read_manifest
from fw_model.data.shard_reader import ShardReader
from fw_model.export.video import write_video
from fw_model.model.encoders import Encoders
from fw_pipeline.guide_layout.importer import ImportPlan, ImportResult, import_guide

SIZE = (48, 64)
FRAMES = 9


@dataclass
class MadeSample:
    """The truth of a sample; the world is not its first camera. Change a field, then `write` it."""

    name: str
    frames: int = FRAMES
    size: tuple[int, int] = SIZE  # of the maps
    video_size: tuple[int, int] = SIZE
    fps: float = 12.0
    numbers: int = 12  # in a row of camera_params
    points_frame: str = "world"
    depth_of_disparity: tuple[float, float] | None = None  # (scale, shift) of 1/z = scale * d + shift, per frame a bit other
    depth_unit: float = 1.0
    first_number: int = 0
    entry: dict[str, Any] = field(default_factory=dict)  # more keys of metadata.json

    def __post_init__(self) -> None:
        rng = np.random.default_rng(list(self.name.encode()))
        height, width = self.size
        focal = 0.8 * width
        self.intrinsics = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
        turn = np.linspace(0, 0.15, self.frames)
        moved = np.linspace(0, 1, self.frames)[:, None] * rng.uniform(0.2, 0.4, 3) * [1, 0.5, 0.5]
        own = np.tile(np.eye(4), (self.frames, 1, 1))
        own[:, 0, 0], own[:, 0, 2], own[:, 2, 0], own[:, 2, 2] = np.cos(turn), np.sin(turn), -np.sin(turn), np.cos(turn)
        own[:, :3, 3] = -np.einsum("tij,tj->ti", own[:, :3, :3], moved)
        world = np.eye(4)
        angle = rng.uniform(0.3, 1)
        world[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        world[:3, 3] = rng.uniform(-1, 1, 3)
        self.w2c = (own @ world)[:, :3]
        self.rays = np.stack(np.broadcast_arrays(
            (np.arange(width) + 0.5 - width / 2) / focal, (np.arange(height) + 0.5 - height / 2)[:, None] / focal, 1.0
        ), -1)  # fmt: skip
        planes = [(np.array([0.2, 0, 1.0]), 3.0), (np.array([0, 1.0, 0.1]), 0.9)]  # in the first camera: a wall and a floor
        depth = []
        for pose in own[:, :3]:
            normals = [(pose[:, :3] @ n, c + (pose[:, :3] @ n) @ pose[:, 3]) for n, c in planes]
            with np.errstate(divide="ignore"):
                hits = np.stack([c / (self.rays @ n) for n, c in normals])
            depth.append(np.where(hits > 0, hits, np.inf).min(0))
        self.depth = np.stack(depth)
        self.depth[:, :2] = 0  # unknown

    @property
    def points(self) -> np.ndarray:
        """[T, H, W, 3] in `points_frame`."""
        camera = self.rays * self.depth[..., None]
        if self.points_frame == "camera":
            return camera
        return np.einsum("tij,thwi->thwj", self.w2c[:, :, :3], camera - self.w2c[:, None, None, :, 3])

    def write(self, root: Path) -> dict[str, Any]:
        """Write the files; returns the entry for metadata.json."""
        for kind in ("depth", "points"):
            (root / kind / self.name).mkdir(parents=True)
        points = self.points
        for t in range(self.frames):
            depth = self.depth[t] / self.depth_unit
            if self.depth_of_disparity:
                scale, shift = self.depth_of_disparity
                scale *= 1 + 0.1 * np.sin(t)
                depth = np.where(depth > 0, (1 / np.maximum(depth, 1e-9) - shift) / scale, 0)
            name = f"frame_{t + self.first_number:04d}.npy"
            np.save(root / "depth" / self.name / name, depth.astype(np.float32))
            np.save(root / "points" / self.name / name, points[t].astype(np.float32))
        self.write_cameras(root, self.w2c)
        (root / "videos").mkdir(exist_ok=True)
        height, width = self.video_size
        picture = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3)).astype(np.uint8)
        picture = picture.repeat(8, 0).repeat(8, 1)
        write_video(root / "videos" / f"{self.name}.mp4", [np.roll(picture, t, 1) for t in range(self.frames)], self.fps)
        return {"video_id": self.name, "caption": f"a corner, {self.name}"} | self.entry

    def write_cameras(self, root: Path, w2c: np.ndarray) -> None:
        (root / "camera_params").mkdir(exist_ok=True)
        height, width = self.size
        k = self.intrinsics
        lens = [k[0, 0] / width, k[1, 1] / height, k[0, 2] / width, k[1, 2] / height]
        rows = w2c.reshape(self.frames, 12)
        if self.numbers == 19:
            head = np.tile([0, *lens, 0, 0], (self.frames, 1))
            rows = np.concatenate([head, rows], 1)
        np.savetxt(root / "camera_params" / f"{self.name}.txt", rows, fmt="%.9g")


def write_layout(root: Path, *samples: MadeSample) -> list[dict[str, Any]]:
    """Write samples and `metadata.json` as a list."""
    root.mkdir(exist_ok=True)
    entries = [sample.write(root) for sample in samples]
    (root / "metadata.json").write_text(json.dumps(entries), encoding="utf-8")
    return entries


def run_import(root: Path, dataset: Path, encoders: Encoders, preset: Preset, **plan: Any) -> ImportResult:
    return import_guide(
        root, dataset, lambda: encoders, preset.encoders, preset.model.wan.text_len, ImportPlan(val_percent=50, **plan)
    )


def read_all(dataset: Path) -> dict[str, tuple[ClipRow, dict[str, np.ndarray]]]:
    reader = ShardReader(dataset)
    return {row.clip_id: (row, reader.read(row)) for row in read_manifest(dataset) if not row.quarantine}
