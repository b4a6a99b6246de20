"""Writing the packed dataset.

    dataset/manifest.parquet                one row per clip, quarantined clips included; written last
    dataset/train-00000-of-00012.parquet    payload: one split and one bucket per shard, ONE ROW GROUP = ONE CLIP

Arrays are raw little-endian bytes in large_binary columns, uncompressed, without dictionary or statistics, so that a clip
is one contiguous memory-mapped read; their dtypes and shapes stand in the manifest, with a hash of each clip's bytes.

A pack is prepared in a sibling folder `.dataset.packing` and swapped in whole by rename; until then, and however it is
interrupted, the last good dataset stays readable. The folder belongs to the pack: anything else put there is lost.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fw_model.data.manifest import MANIFEST, SPLITS, ClipRow, DatasetError, write_manifest
from fw_model.data.payload import PAYLOAD_SCHEMA, payload_hash, stored_dtype
from fw_model.data.schema import ARRAYS, ClipRecord, bucket_of, check_record
from fw_model.data.swap import clear_up, fsync, packing_folder, remove, swap_in, take_lock


class ShardWriter:
    """Packs a dataset: `with ShardWriter(folder) as writer: writer.add(record, "train")`.

    Entering takes the pack lock (PackInProgressError if another process holds it). Leaving normally writes the manifest and
    swaps the new dataset in; leaving by an exception discards it. Either way, and if the process is killed, a dataset that
    was there before stays whole until the new one is. The lock is the kernel's: a dead process holds none.
    """

    def __init__(self, path: str | Path, target_bytes: float = 256e6) -> None:
        """path: the dataset's folder; target_bytes: a shard is closed when its payload reaches this size."""
        self.path = Path(path).absolute()
        self.target_bytes = target_bytes
        self._folder = packing_folder(self.path)
        self._rows: dict[str, ClipRow] = {}
        self._open: dict[tuple[str, str], _Shard] = {}
        self._closed: list[_Shard] = []
        self._split_of_video: dict[str, str] = {}
        self._lock: IO[str] | None = None

    def __enter__(self) -> ShardWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = take_lock(self.path)
        try:
            clear_up(self.path)
            self._folder.mkdir()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            for shard in self._open.values():
                shard.close()
            self._closed += self._open.values()
            if kind is None:
                self._finish()
        finally:
            remove(self._folder)
            if self._lock is not None:
                self._lock.close()

    def add(self, record: ClipRecord, split: str) -> ClipRow:
        """Check and write one clip; returns its manifest row (shard names become final when the pack is done).

        Raises ValueError naming the clip and array for a record that does not fit `schema.ARRAYS`, a clip id seen before,
        or a video that already has clips in the other split.
        """
        check_record(record)
        if split not in SPLITS:
            raise ValueError(f"clip {record.clip_id}: split must be one of {SPLITS}, got {split!r}")
        self._check_new(record.clip_id)
        if self._split_of_video.setdefault(record.video, split) != split:
            raise ValueError(f"clip {record.clip_id}: video {record.video!r} already has clips in the other split")
        payload = {
            name: np.ascontiguousarray(record.arrays[name], dtype=stored_dtype(dtype)) for name, (dtype, _) in ARRAYS.items()
        }
        arrays = {name: (ARRAYS[name][0], array.shape) for name, array in payload.items()}
        buffers = {name: array.reshape(-1).view(np.uint8).data for name, array in payload.items()}
        bucket = bucket_of(record)

        shard = self._open.get((split, bucket))
        if shard is None:
            number = sum(s.split == split and s.bucket == bucket for s in self._closed)
            shard = self._open[split, bucket] = _Shard(self._folder, split, bucket, number)
        row = ClipRow(
            clip_id=record.clip_id,
            video=record.video,
            split=split,
            bucket=bucket,
            fps=float(record.fps),
            scale=float(record.scale),
            prompt=record.prompt,
            shard=shard.path.name,
            row_group=shard.row_groups,
            arrays=arrays,
            bytes=sum(buffer.nbytes for buffer in buffers.values()),
            xxh64=payload_hash(arrays, buffers),
            versions=dict(record.versions),
            quality={key: float(value) for key, value in record.quality.items()},
        )
        shard.write(record.clip_id, buffers)
        self._rows[record.clip_id] = row
        if shard.bytes >= self.target_bytes:
            shard.close()
            self._closed.append(self._open.pop((split, bucket)))
        return row

    def quarantine(self, clip_id: str, video: str, reason: str, split: str | None = None) -> ClipRow:
        """List a clip that is not packed, and why."""
        self._check_new(clip_id)
        if not reason:
            raise ValueError(f"clip {clip_id}: a quarantined clip needs a reason")
        row = self._rows[clip_id] = ClipRow(clip_id=clip_id, video=video, split=split or "", quarantine=reason)
        return row

    def _check_new(self, clip_id: str) -> None:
        if self._lock is None or self._lock.closed:
            raise RuntimeError("ShardWriter is used as a context manager: `with ShardWriter(path) as writer`")
        if clip_id in self._rows:
            raise ValueError(f"clip {clip_id}: added twice")

    def _finish(self) -> None:
        """Give shards their final names, write the manifest, swap the folder in."""
        good = [row for row in self._rows.values() if not row.quarantine]
        if not good:
            reasons = [f"  {row.clip_id}: {row.quarantine}" for row in self._rows.values()][:5]
            raise DatasetError(
                "\n".join([f"{self.path}: no clip to pack, {len(self._rows)} quarantined; nothing written", *reasons])
            )
        names: dict[str, str] = {}
        for split in SPLITS:
            shards = sorted((s for s in self._closed if s.split == split), key=lambda s: (s.bucket, s.number))
            for i, shard in enumerate(shards):
                names[shard.path.name] = f"{split}-{i:05d}-of-{len(shards):05d}.parquet"
                shard.path.rename(self._folder / names[shard.path.name])
        rows = sorted(self._rows.values(), key=lambda row: row.clip_id)
        write_manifest(self._folder / MANIFEST, [replace(row, shard=names.get(row.shard, "")) for row in rows])
        fsync(self._folder / MANIFEST)
        fsync(self._folder)
        swap_in(self.path)


class _Shard:
    """One payload file being written, under a name that is not final."""

    def __init__(self, folder: Path, split: str, bucket: str, number: int) -> None:
        self.split, self.bucket, self.number = split, bucket, number
        self.path = folder / f"{split}-{bucket}-{number:05d}.partial"
        self.bytes = 0
        self.row_groups = 0
        self._writer = pq.ParquetWriter(
            self.path, PAYLOAD_SCHEMA, compression="none", use_dictionary=False, write_statistics=False, store_schema=True
        )

    def write(self, clip_id: str, buffers: dict[str, memoryview]) -> None:
        columns = [pa.array([clip_id]), *(_binary(buffers[name]) for name in ARRAYS)]
        self._writer.write_table(pa.Table.from_arrays(columns, schema=PAYLOAD_SCHEMA))  # one call = one row group
        self.bytes += sum(buffer.nbytes for buffer in buffers.values())
        self.row_groups += 1

    def close(self) -> None:
        self._writer.close()
        fsync(self.path)


def _binary(buffer: memoryview) -> pa.Array:
    """One large_binary value around a buffer, without copying it."""
    offsets = pa.py_buffer(np.array([0, buffer.nbytes], np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, pa.py_buffer(buffer)])
