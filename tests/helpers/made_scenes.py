"""A small packed dataset with exact geometry: tilted planes seen by a moving camera, latents that follow the depth."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fw_model.config import Preset
from fw_model.data.schema import ClipRecord
from fw_model.data.shard_writer import ShardWriter


def made_scene(name: str, preset: Preset, frames: int = 5, height: int = 32, width: int = 48) -> ClipRecord:
    """Clip `name`, everything about it drawn from its name, with features of the widths and encoders of `preset`."""
    rng = np.random.default_rng(list(name.encode()))
    wan = preset.model.wan
    focal = width * rng.uniform(0.7, 1.0)
    intrinsics = np.tile(np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]], np.float32), (frames, 1, 1))
    w2c = np.tile(np.eye(3, 4, dtype=np.float32), (frames, 1, 1))
    w2c[:, :, 3] = np.linspace(0, 1, frames)[:, None] * rng.uniform(-0.3, 0.3, 3)
    u, v = (np.arange(width) + 0.5 - width / 2) / focal, (np.arange(height) + 0.5 - height / 2)[:, None] / focal
    slope = rng.uniform(-0.3, 0.3, 2)  # the plane z = 1 + slope . (x, y) in the first camera
    centre = -w2c[:, :, 3]
    depth = (1 + centre[:, :2] @ slope - centre[:, 2])[:, None, None] / (1 - slope[0] * u - slope[1] * v)
    depth[:, :2] = 0  # unknown
    coarse = depth[::4, ::8, ::8]
    return ClipRecord(
        clip_id=name,
        video=f"{name}.mp4",
        fps=12.0,
        scale=1.0,
        prompt="a plane",
        arrays={
            "latents": (rng.normal(size=(16, 1, 1, 1)) * coarse + 0.1 * rng.normal(size=(16, *coarse.shape))).astype(np.float16),
            "image": rng.normal(size=(wan.image_tokens, wan.image_dim)).astype(np.float16),
            "depth": depth.astype(np.float16),
            "confidence": np.full(depth.shape, 255, np.uint8),
            "intrinsics": intrinsics,
            "w2c": w2c,
        },
        quality={},
        versions={"geometry": "truth:1", "depth": "truth:1", **preset.encoders.identities(wan.text_len)},
    )


def pack_scenes(
    path: Path, preset: Preset, train: int = 5, val: int = 2, frames: int = 5, height: int = 32, width: int = 48
) -> Path:
    """Pack a dataset; half of the training clips are portrait."""
    wan, rng = preset.model.wan, np.random.default_rng(0)
    with ShardWriter(path) as writer:
        for prompt in ("", "a plane"):
            embedding = rng.normal(size=(3, wan.text_dim)).astype(np.float16)
            writer.add_text(prompt, embedding, preset.encoders.identities(wan.text_len)["text"])
        for i in range(train):
            size = (width, height) if i % 2 else (height, width)
            writer.add(made_scene(f"train-{i}", preset, frames, *size), "train")
        for i in range(val):
            writer.add(made_scene(f"val-{i}", preset, frames, height, width), "val")
    return path
