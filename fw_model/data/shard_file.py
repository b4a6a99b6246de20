"""One shard on its way into a dataset: being written, then finished, with its rows kept beside it until the pack is over."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fw_model.data.manifest import ClipRow, read_rows, write_rows
from fw_model.data.payload import Payload, payload_schema
from fw_model.errors import DatasetError
from fw_model.files import fsync, whole_file


@dataclass
class FinishedShard:
    """A whole shard, of an earlier pack or of this one."""

    file: Path
    rows: list[ClipRow]  # all of it
    kept: set[str] = field(default_factory=set)  # clip ids that the dataset is to hold still

    @property
    def split(self) -> str:
        return self.rows[0].split

    @property
    def bucket(self) -> str:
        return self.rows[0].bucket

    @property
    def bytes(self) -> int:
        return sum(row.bytes for row in self.rows)


class ShardFile:
    """A shard being written as `00007.shard`. `close` makes it last, and lists its rows in `00007.rows`."""

    def __init__(self, folder: Path, number: int, names: Iterable[str]) -> None:
        """names: of the arrays that every row has."""
        self.path = folder / f"{number:05d}.shard"
        self.bytes = 0
        self.rows: list[ClipRow] = []
        self._schema = payload_schema(names)
        self._writer = pq.ParquetWriter(
            self.path, self._schema, compression="none", use_dictionary=False, write_statistics=False, store_schema=True
        )

    def write(self, row: ClipRow, payload: Payload) -> ClipRow:
        """Append one row group; returns the row with its place in it."""
        columns = [pa.array([row.clip_id]), *(_binary(payload.buffers[name]) for name in self._schema.names[1:])]
        self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema))  # one call = one row group
        row = replace(row, shard=str(self.path), row_group=len(self.rows))
        self.bytes += payload.bytes
        self.rows.append(row)
        return row

    def close(self) -> FinishedShard:
        self._writer.close()
        fsync(self.path)
        with whole_file(self.path.with_suffix(".rows")) as temporary:
            write_rows(temporary, self.rows)
        return FinishedShard(self.path, self.rows)

    def abandon(self) -> None:
        """Give up: what is written so far is of no use."""
        with suppress(OSError):  # the disk may be full: then the footer fails too, and another error is on its way already
            self._writer.close()
        self.path.unlink(missing_ok=True)


def finished_shards(folder: Path) -> list[FinishedShard]:
    """The shards that were closed in a packing folder, in the order in which they were begun; any other file is removed."""
    found = []
    for file in sorted(folder.glob("*.shard")):
        try:
            found.append(FinishedShard(file, list(read_rows(file.with_suffix(".rows")))))
        except DatasetError:  # not closed, or by another version of this code: its clips are written again
            continue
    used = {path for shard in found for path in (shard.file, shard.file.with_suffix(".rows"))}
    for file in folder.glob("*"):
        if file not in used:
            file.unlink()
    return found


def _binary(buffer: memoryview) -> pa.Array:
    """One large_binary value around a buffer, without copying it."""
    offsets = pa.py_buffer(np.array([0, buffer.nbytes], np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, pa.py_buffer(buffer)])
