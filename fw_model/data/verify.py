"""Checking a packed dataset: every hash, shape and row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from fw_model.data.manifest import MANIFEST, ClipRow, dataset_folder, read_manifest
from fw_model.data.schema import ClipRecord, check_record
from fw_model.data.shard_reader import ShardReader


def verify(path: str | Path) -> list[str]:
    """Read every clip and return all faults found, in words; an empty list means that the dataset is whole.

    Raises DatasetError only when there is no readable manifest.
    """
    return list(iter_faults(path, read_manifest(path)))


def iter_faults(path: str | Path, rows: Iterable[ClipRow]) -> Iterator[str]:
    """The faults of `verify`, clip by clip, for a progress bar around `rows`."""
    folder = dataset_folder(path)
    reader = ShardReader(folder)
    seen: set[str] = set()
    split_of_video: dict[str, str] = {}
    kind_of_shard: dict[str, tuple[str, str]] = {}
    for row in rows:
        if row.clip_id in seen:
            yield f"{folder / MANIFEST}: clip {row.clip_id} is listed twice"
        seen.add(row.clip_id)
        if row.quarantine:
            continue
        if split_of_video.setdefault(row.video, row.split) != row.split:
            yield f"{folder / MANIFEST}: video {row.video!r} has clips in both splits (clip {row.clip_id})"
        if kind_of_shard.setdefault(row.shard, (row.split, row.bucket)) != (row.split, row.bucket):
            yield f"{folder / row.shard}: mixes splits or buckets (clip {row.clip_id})"
        try:
            arrays = reader.read(row)
            check_record(ClipRecord(row.clip_id, row.video, row.fps, row.scale, row.prompt, arrays, row.quality, row.versions))
        except ValueError as error:
            yield str(error)
    reader.close()
    for file in sorted(folder.glob("*.parquet")):
        if file.name != MANIFEST and file.name not in kind_of_shard:
            yield f"{file}: not in the manifest"
