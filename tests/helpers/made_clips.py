"""Small clips that fit the dataset's schema, for tests."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from fw_model.data.manifest import ClipRow
from fw_model.data.schema import ClipRecord
from fw_model.data.shard_writer import ShardWriter
from fw_model.trajectory.text import make_trajectory

TEXT_VERSION = "seeded:0/text"


def make_record(
    clip_id: str,
    video: str | None = None,
    size: tuple[int, int, int] = (32, 48, 5),
    image: tuple[int, int] = (5, 8),
    **changes: np.ndarray,
) -> ClipRecord:
    """A clip of random numbers that depend on its id; `changes` replace arrays. size is (H, W, T)."""
    height, width, frames = size
    rng = np.random.default_rng(zlib.crc32(clip_id.encode()))
    cameras = make_trajectory("orbit_right", frames, height, width)
    depth = rng.uniform(0.5, 2, (frames, height, width))
    depth[:, :2] = 0
    arrays = {
        "latents": rng.normal(size=(16, 1 + (frames - 1) // 4, height // 8, width // 8)).astype(np.float16),
        "image": rng.normal(size=image).astype(np.float16),
        "depth": depth.astype(np.float16),
        "confidence": rng.integers(0, 256, (frames, height, width)).astype(np.uint8),
        "intrinsics": cameras.intrinsics.numpy(),
        "w2c": cameras.w2c.numpy(),
    }
    return ClipRecord(
        clip_id=clip_id,
        video=video or f"{clip_id}.mp4",
        fps=16.0,
        scale=2.5,
        prompt=f"prompt of {clip_id}",
        arrays={**arrays, **changes},
        quality={"inlier_ratio": 0.9},
        versions={"geometry": "test:1", "vae": "seeded:0", "text": TEXT_VERSION},
    )


def make_text(prompt: str, shape: tuple[int, int] = (3, 16)) -> np.ndarray:
    """An embedding [L, D] of random numbers that depend on the prompt."""
    return np.random.default_rng(zlib.crc32(prompt.encode())).normal(size=shape).astype(np.float16)


def add_clip(writer: ShardWriter, record: ClipRecord, split: str = "train", source: str = "", **options: object) -> ClipRow:
    """Add a clip with its prompt and the empty one."""
    for prompt in ("", record.prompt):
        writer.add_text(prompt, make_text(prompt, **options), TEXT_VERSION)  # type: ignore[arg-type]
    return writer.add(record, split, source)


def pack(path: Path, splits: dict[str, str], target_bytes: float = 256e6, **options: object) -> None:
    """Pack one clip per entry of clip id -> split."""
    with ShardWriter(path, target_bytes) as writer:
        for clip_id, split in splits.items():
            add_clip(writer, make_record(clip_id, **options), split)  # type: ignore[arg-type]


CLIP_BYTES = sum(array.nbytes for array in make_record("a").arrays.values())
TWO_CLIPS = 2 * CLIP_BYTES  # of a shard


def bring_up_to_date(path: Path, clips: Mapping[str, str], target: float = TWO_CLIPS, split: str = "train") -> tuple[int, int]:
    """Pack clip id -> version as the pipeline does; returns (clips that had to be made, clips that were written)."""
    made = 0
    with ShardWriter(path, target) as writer:
        for clip_id, version in clips.items():
            for prompt in ("", f"prompt of {clip_id}"):
                if not writer.keep_text(prompt, TEXT_VERSION):
                    writer.add_text(prompt, make_text(prompt), TEXT_VERSION)
            if not writer.keep(clip_id, split, version):
                made += 1
                writer.add(version_of(clip_id, version), split, version)
    return made, writer.bytes_written // CLIP_BYTES  # a handful of embeddings is far less than a clip


def version_of(clip_id: str, version: str) -> ClipRecord:
    return replace(make_record(f"{clip_id}/{version}", f"{clip_id}.mp4"), clip_id=clip_id, prompt=f"prompt of {clip_id}")
