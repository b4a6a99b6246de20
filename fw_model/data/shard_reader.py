"""Reading clips out of a packed dataset's shards."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq

from fw_model.data.manifest import ClipRow, Manifest, dataset_folder, open_parquet, read_manifest
from fw_model.data.payload import payload_hash, payload_schema
from fw_model.data.remote import RemoteFolder, is_remote
from fw_model.data.stored_array import SharedFile, StoredArray, byte_count
from fw_model.errors import DatasetError


class _Open(NamedTuple):
    path: Path
    identity: tuple[int, int, int]
    parquet: pq.ParquetFile
    file: SharedFile  # stays open for the arrays that were found in it

    def close(self) -> None:
        self.parquet.close()


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
        """Arrays of a row of the manifest or of the texts, named and shaped as it says: views of the mapped shard,
        uncopied. The mapping is this caller's own: what is written to the arrays changes no file and no other read.

        Raises DatasetError naming shard and clip when the shard is missing, damaged, or its bytes have another hash.
        """
        return {name: array.map() for name, array in self.find(row).items()}

    def find(self, row: ClipRow) -> dict[str, StoredArray]:
        """Where the arrays of a row lie, once their bytes have the manifest's hash. Raises as `read`."""
        where = f"{os.path.join(self.path, row.shard)}: clip {row.clip_id} (row group {row.row_group})"
        opened = self._file(row.shard)
        if not 0 <= row.row_group < opened.parquet.num_row_groups:
            raise DatasetError(f"{where}: the shard has {opened.parquet.num_row_groups} row groups; pack the dataset again")
        names = payload_schema(row.arrays).names
        found = opened.parquet.schema_arrow.names
        if found != names:
            raise DatasetError(f"{where}: expected columns {names}, got {found}")
        clip_id = row.clip_id.encode()
        sizes = [len(clip_id), *(byte_count(*row.arrays[name]) for name in names[1:])]
        try:
            starts = _starts(opened, row.row_group, sizes)
        except ValueError as error:
            raise DatasetError(f"{where}: {error}; was the dataset packed again meanwhile? Start again or pack it") from error
        if (found_id := opened.file.read(starts[0], sizes[0])) != clip_id:
            raise DatasetError(
                f"{where}: holds clip {found_id.decode(errors='replace')} instead: was the dataset packed again meanwhile? "
                "Start again or pack it"
            )
        arrays = {
            name: StoredArray(opened.file, start, *row.arrays[name]) for name, start in zip(names[1:], starts[1:], strict=True)
        }
        if self.verify_hash and _hash(opened.file, arrays) != row.xxh64:
            raise DatasetError(f"{where}: the bytes do not have the hash in the manifest; pack the dataset again")
        return arrays

    def _file(self, shard: str) -> _Open:
        """The open shard. One that was deleted or replaced since it was opened is not read on: it is fetched again from a URL
        and named as missing in a folder."""
        opened = self._files.pop(shard, None)
        if opened is not None and _identity(opened.path) != opened.identity:
            opened.close()
            opened = None
        if opened is None:
            opened = self._open(shard)
            for name in [name for name, other in self._files.items() if not other.path.exists()]:
                self._files.pop(name).close()  # evicted from the cache: lets go of its space
        self._files[shard] = opened  # most recently used last
        while len(self._files) > self.max_open:
            self._files.pop(next(iter(self._files))).close()
        return opened

    def _open(self, shard: str) -> _Open:
        for attempt in range(5):
            path = self._local(shard)
            try:
                parquet = open_parquet(path)
                return _Open(path, _identity(path), parquet, SharedFile(path.open("rb"), str(path)))
            except FileNotFoundError as error:
                if self._remote is None or attempt == 4:
                    raise DatasetError(f"{path}: missing; pack the dataset again") from error
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
            self._files.popitem()[1].close()


def _starts(opened: _Open, row_group: int, sizes: list[int]) -> list[int]:
    """Where the bytes of the one value of every column begin, of which the manifest says so many.

    A column chunk of one uncompressed page and one value ends with that value, and before it stands its length as four bytes.
    Raises ValueError when it is not so.
    """
    group = opened.parquet.metadata.row_group(row_group)
    chunks = [group.column(column) for column in range(len(sizes))]
    if group.num_rows != 1 or any(chunk.compression != "UNCOMPRESSED" for chunk in chunks):
        raise ValueError(f"holds {group.num_rows} rows, {chunks[0].compression}; expected one, uncompressed")
    starts = []
    for chunk, size in zip(chunks, sizes, strict=True):
        start = chunk.data_page_offset + chunk.total_compressed_size - size
        if start < 4 or opened.file.read(start - 4, 4) != size.to_bytes(4, "little"):
            raise ValueError(f"no {chunk.path_in_schema} of {size} bytes where the manifest says")
        starts.append(start)
    return starts


def _hash(file: SharedFile, arrays: dict[str, StoredArray]) -> str:
    """The manifest's hash of what lies there now; mapped at once, since the arrays lie side by side."""
    first = min(array.start for array in arrays.values())
    mapped = file.map(first, max(array.start + array.bytes for array in arrays.values()) - first)
    buffers = {name: mapped[array.start - first :][: array.bytes] for name, array in arrays.items()}
    return payload_hash({name: (array.dtype, array.shape) for name, array in arrays.items()}, buffers)


def _identity(path: Path) -> tuple[int, int, int]:
    """Changes when a file is replaced or written to; (0, 0, 0) when it is gone."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return 0, 0, 0
    return found.st_ino, found.st_size, found.st_mtime_ns
