"""Reading clips out of a packed dataset's shards."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fw_model.data.manifest import ClipRow, DatasetError, Manifest, dataset_folder, open_parquet, read_manifest
from fw_model.data.payload import payload_hash, payload_schema, stored_dtype
from fw_model.data.remote import RemoteFolder, is_remote


class _Open(NamedTuple):
    path: Path
    identity: tuple[int, int, int]
    file: pq.ParquetFile


class ShardReader:
    """Reads clips of one dataset by manifest row, keeping the last few shards memory-mapped. One per process.

    Shards behind a URL are fetched into the local cache when they are first needed.
    """

    def __init__(self, path: str | Path, verify_hash: bool = True, max_open: int = 32, manifest: Manifest | None = None) -> None:
        """path: the dataset's folder or URL; manifest: of the dataset, if it is read already."""
        self.verify_hash = verify_hash
        self.max_open = max_open
        self._files: dict[str, _Open] = {}
        self._remote: RemoteFolder | None = None
        if is_remote(path):
            self.path = str(path).rstrip("/")
            self._remote = RemoteFolder(self.path)
            self._shards = (manifest or read_manifest(path)).shards
        else:
            self.path = str(dataset_folder(path))

    @classmethod
    def of_folder(cls, folder: Path) -> ShardReader:
        """A reader of shards in a folder that need not hold a whole dataset."""
        reader = cls.__new__(cls)
        reader.path, reader.verify_hash, reader.max_open = str(folder), True, 1
        reader._files, reader._remote = {}, None
        return reader

    def read(self, row: ClipRow) -> dict[str, np.ndarray]:
        """Arrays of a row of the manifest or of the texts, named and shaped as it says, viewing the bytes that were read: those
        are this caller's own, so the arrays may be changed.

        Raises DatasetError naming shard and clip when the shard is missing, damaged, or its bytes have another hash.
        """
        where = f"{os.path.join(self.path, row.shard)}: clip {row.clip_id} (row group {row.row_group})"
        file = self._file(row.shard)
        if not 0 <= row.row_group < file.num_row_groups:
            raise DatasetError(f"{where}: the shard has {file.num_row_groups} row groups; pack the dataset again")
        try:
            table = file.read_row_group(row.row_group, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise DatasetError(f"{where}: cannot be read ({error})") from error
        names = payload_schema(row.arrays).names
        if table.num_rows != 1 or table.column_names != names:
            raise DatasetError(f"{where}: expected one row with {names}, got {table.num_rows} with {table.column_names}")
        if table["clip_id"][0].as_py() != row.clip_id:
            found = table["clip_id"][0].as_py()
            raise DatasetError(
                f"{where}: holds clip {found} instead: was the dataset packed again meanwhile? Start again or pack it"
            )
        # The one value of a column is the whole of its data buffer, which arrow made for this read.
        buffers = {name: memoryview(table[name].chunk(0).buffers()[2]) for name in row.arrays}
        if self.verify_hash and payload_hash(row.arrays, buffers) != row.xxh64:
            raise DatasetError(f"{where}: the bytes do not have the hash in the manifest; pack the dataset again")
        try:
            return {
                name: np.frombuffer(buffers[name], stored_dtype(dtype)).reshape(shape)
                for name, (dtype, shape) in row.arrays.items()
            }
        except ValueError as error:
            raise DatasetError(f"{where}: {error}") from error

    def _file(self, shard: str) -> pq.ParquetFile:
        """The open shard. One that was deleted or replaced since it was opened is not read on: it is fetched again from a URL
        and named as missing in a folder."""
        opened = self._files.pop(shard, None)
        if opened is not None and _identity(opened.path) != opened.identity:
            opened.file.close()
            opened = None
        if opened is None:
            opened = self._open(shard)
            for name in [name for name, other in self._files.items() if not other.path.exists()]:
                self._files.pop(name).file.close()  # evicted from the cache: lets go of its space
        self._files[shard] = opened  # most recently used last
        while len(self._files) > self.max_open:
            self._files.pop(next(iter(self._files))).file.close()
        return opened.file

    def _open(self, shard: str) -> _Open:
        for attempt in range(5):
            path = self._local(shard)
            try:
                return _Open(path, _identity(path), open_parquet(path))
            except DatasetError:  # another process may have needed its place in the cache just now
                if self._remote is None or path.exists() or attempt == 4:
                    raise
        raise AssertionError("not reached")

    def _local(self, shard: str) -> Path:
        if self._remote is None:
            return Path(self.path) / shard
        if shard not in self._shards:
            raise DatasetError(f"{self.path}/{shard}: its manifest has no hash of it; pack the dataset again and upload it")
        return self._remote.fetch(shard, *self._shards[shard])

    def close(self) -> None:
        while self._files:
            self._files.popitem()[1].file.close()


def _identity(path: Path) -> tuple[int, int, int]:
    """Changes when a file is replaced or written to; (0, 0, 0) when it is gone."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return 0, 0, 0
    return found.st_ino, found.st_size, found.st_mtime_ns
