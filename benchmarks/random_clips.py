"""A dataset of random clips in the shapes of a model, for timing its training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from middle_model import Size

from fw_model.config import Preset
from fw_model.data.schema import ClipRecord
from fw_model.data.shard_writer import ShardWriter
from fw_model.trajectory.text import make_trajectory

CLIPS = 4
PROMPT = "A camera moves slowly through a furnished room with a wooden floor, a table, books and a lamp by the window. " * 5


def made_record(name: str, size: Size, preset: Preset) -> ClipRecord:
    """A clip of random numbers with smooth depth, in the shapes of `size`."""
    clip, wan = size.clip, preset.model.wan
    rng = np.random.default_rng(list(name.encode()))
    cameras = make_trajectory("orbit_right", clip.frames, clip.height, clip.width)
    slope = np.linspace(0.7, 1.3, clip.height * clip.width).reshape(clip.height, clip.width)
    return ClipRecord(
        clip_id=name,
        video=f"{name}.mp4",
        fps=16.0,
        scale=1.0,
        prompt=PROMPT,
        arrays={
            "latents": rng.normal(size=(16, clip.latent_frames, clip.height // 8, clip.width // 8)).astype(np.float16),
            "image": rng.normal(size=(wan.image_tokens, wan.image_dim)).astype(np.float16),
            "depth": np.broadcast_to(slope, (clip.frames, *slope.shape)).astype(np.float16),
            "confidence": np.full((clip.frames, *slope.shape), 255, np.uint8),
            "intrinsics": cameras.intrinsics.numpy(),
            "w2c": cameras.w2c.numpy(),
        },
        quality={},
        versions=preset.encoders.identities(wan.text_len),
    )


def make_dataset(folder: Path, size: Size, preset: Preset) -> Path:
    """Pack `CLIPS` clips into `folder`/dataset; their frames, for the plain way, lie in `folder`/frames."""
    clip = size.clip
    (folder / "frames").mkdir()
    wan = preset.model.wan
    text = np.random.default_rng(1).normal(size=(wan.text_len, wan.text_dim)).astype(np.float16)
    with ShardWriter(folder / "dataset") as writer:
        for prompt in ("", PROMPT):
            writer.add_text(prompt, text, preset.encoders.identities(wan.text_len)["text"])
        for name in (f"clip-{i}" for i in range(CLIPS)):
            writer.add(made_record(name, size, preset), "train")
            frames = np.random.default_rng(0).integers(0, 256, (clip.frames, clip.height, clip.width, 3), np.uint8)
            np.save(folder / "frames" / f"{name}.npy", frames)
    return folder / "dataset"
