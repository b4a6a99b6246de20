"""Which split a video belongs to."""

from __future__ import annotations

from collections.abc import Iterable

import xxhash

from fw_model.errors import ConfigError


def _hash_share(video: str) -> float:
    """Where a video's path falls in [0, 1)."""
    return xxhash.xxh64_intdigest(video.encode()) / 2**64


def split_of(video: str, val_percent: float = 10) -> str:
    """The split a video's path hashes to, whatever other videos there are; `assign_splits` adds the rule for small sets."""
    return "val" if _hash_share(video) < val_percent / 100 else "train"


def assign_splits(videos: Iterable[str], val_percent: float = 10) -> dict[str, str]:
    """Video path -> "train" or "val", by a hash of the path: stable when videos are added or removed.

    A single video is for training. With two or more and 0 < val_percent < 100, neither split may be empty: if no video
    hashes to val, the one with the smallest hash goes there; if none to train, the one with the largest. Only that one may
    change its split when the set grows.
    """
    if not 0 <= val_percent <= 100:
        raise ConfigError(f"val_percent must lie in 0..100, got {val_percent}")
    ranked = sorted(set(videos), key=lambda video: (_hash_share(video), video))
    splits = {video: split_of(video, val_percent) for video in ranked}
    if len(ranked) == 1:
        splits[ranked[0]] = "train"
    elif ranked and 0 < val_percent < 100:
        if "val" not in splits.values():
            splits[ranked[0]] = "val"
        elif "train" not in splits.values():
            splits[ranked[-1]] = "train"
    return splits
