"""Reading clips out of a packed dataset's shards."""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from fw_model.data.manifest import ClipRow, Manifest, dataset_folder, open_parquet, read_manifest
from fw_model.data.payload import payload_hash, payload_schema, read_in_training, stored_dtype
from fw_model.data.remote import RemoteFolder, is_remote
from fw_model.errors import DatasetError


class _Open(NamedTuple):
    path: Path
    identity: tuple[int, int, int]
    metadata: pq.FileMetaData
    columns: list[str]
    file: BinaryIO  # closed with the last reference: another thread may be reading from a shard that is let go of


class ShardReader:
    """Reads clips of one dataset by manifest row, keeping the last few shards open. Any number of threads may use one.

    Shards behind a URL are fetched into the local cache when they are first needed.
    """

    def __init__(self, path: str | Path, verify_hash: bool = True, max_open: int = 32, manifest: Manifest | None = None) -> None:
        """path: the dataset's folder or URL; manifest: of the dataset, if it is read already."""
        self.verify_hash = verify_hash
        self.max_open = max_open
        self._files: dict[str, _Open] = {}
        self._lock = threading.Lock()  # of `_files`
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
        reader._files, reader._lock, reader._remote = {}, threading.Lock(), None
        return reader

    def read(self, row: ClipRow, for_training: bool = False) -> dict[str, np.ndarray]:
        """Arrays of a row of the manifest or of the texts, named and shaped as it says: views of the mapped shard,
        uncopied. The mapping is this caller's own: what is written to the arrays changes no file and no other read.

        for_training: without `schema.UNREAD`, of which nothing is read or checked (in datasets without a hash of the others
        it is checked).

        Raises DatasetError naming shard and clip when the shard is missing, damaged, or its bytes have another hash.
        """
        where = f"{os.path.join(self.path, row.shard)}: clip {row.clip_id} (row group {row.row_group})"
        opened = self._file(row.shard)
        starts = _find(opened, row, where)
        wanted = read_in_training(row.arrays) if for_training else row.arrays
        checked, xxh64 = (wanted, row.training_xxh64) if for_training and row.training_xxh64 else (row.arrays, row.xxh64)
        if not self.verify_hash:
            checked = wanted
        buffers = _map(opened.file, {name: (starts[name], _byte_count(*array)) for name, array in checked.items()})
        if self.verify_hash and payload_hash(checked, buffers) != xxh64:
            raise DatasetError(f"{where}: the bytes do not have the hash in the manifest; pack the dataset again")
        return {name: _as_array(buffers[name], *array) for name, array in wanted.items()}

    def _file(self, shard: str) -> _Open:
        """The open shard. One that was deleted or replaced since it was opened is not read on: it is fetched again from a URL
        and named as missing in a folder."""
        with self._lock:
            opened = self._files.pop(shard, None)
            if opened is not None and _identity(opened.path) == opened.identity:
                self._files[shard] = opened  # most recently used last
                return opened
        opened = self._open(shard)  # may take a download, for which nobody else waits
        with self._lock:
            self._files[shard] = opened
            gone = [name for name, other in self._files.items() if not other.path.exists()]  # evicted from the cache
            for name in (*gone, *list(self._files)[: -self.max_open]):
                self._files.pop(name, None)
        return opened

    def _open(self, shard: str) -> _Open:
        for attempt in range(5):
            path = self._local(shard)
            try:
                identity = _identity(path)
                with open_parquet(path) as parquet:
                    return _Open(path, identity, parquet.metadata, parquet.schema_arrow.names, path.open("rb"))
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
        with self._lock:
            self._files.clear()


def _find(opened: _Open, row: ClipRow, where: str) -> dict[str, int]:
    """Where the bytes of each of a row's arrays begin. Raises DatasetError when they are not there."""
    count = opened.metadata.num_row_groups
    if not 0 <= row.row_group < count:
        raise DatasetError(f"{where}: the shard has {count} row groups; pack the dataset again")
    names = payload_schema(row.arrays).names
    if opened.columns != names:
        raise DatasetError(f"{where}: expected columns {names}, got {opened.columns}")
    clip_id = row.clip_id.encode()
    try:
        starts = _starts(opened, row.row_group, [len(clip_id), *(_byte_count(*row.arrays[name]) for name in names[1:])])
    except ValueError as error:
        raise DatasetError(f"{where}: {error}; was the dataset packed again meanwhile? Start again or pack it") from error
    if (found := os.pread(opened.file.fileno(), len(clip_id), starts[0])) != clip_id:
        raise DatasetError(
            f"{where}: holds clip {found.decode(errors='replace')} instead: was the dataset packed again meanwhile? "
            "Start again or pack it"
        )
    return dict(zip(names[1:], starts[1:], strict=True))


def _starts(opened: _Open, row_group: int, sizes: list[int]) -> list[int]:
    """Where the bytes of the one value of every column begin, of which the manifest says so many.

    A column chunk of one uncompressed page and one value ends with that value, and before it stands its length as four bytes.
    Raises ValueError when it is not so.
    """
    group = opened.metadata.row_group(row_group)
    chunks = [group.column(column) for column in range(len(sizes))]
    if group.num_rows != 1 or any(chunk.compression != "UNCOMPRESSED" for chunk in chunks):
        raise ValueError(f"holds {group.num_rows} rows, {chunks[0].compression}; expected one, uncompressed")
    starts = []
    for chunk, size in zip(chunks, sizes, strict=True):
        start = chunk.data_page_offset + chunk.total_compressed_size - size
        if start < 4 or os.pread(opened.file.fileno(), 4, start - 4) != size.to_bytes(4, "little"):
            raise ValueError(f"no {chunk.path_in_schema} of {size} bytes where the manifest says")
        starts.append(start)
    return starts


def _map(file: BinaryIO, places: dict[str, tuple[int, int]]) -> dict[str, memoryview]:
    """The bytes at (start, size), where they lie in the page cache, in one mapping: a row's arrays lie side by side."""
    first = min(start for start, _ in places.values()) // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    end = max(start + size for start, size in places.values())
    # Copy on write, not read only: torch wants memory that could be written to.
    mapped = mmap.mmap(file.fileno(), end - first, access=mmap.ACCESS_COPY, offset=first)
    mapped.madvise(mmap.MADV_WILLNEED)
    return {name: memoryview(mapped)[start - first :][:size] for name, (start, size) in places.items()}


def _as_array(buffer: memoryview, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(buffer, stored_dtype(dtype)).reshape(shape)


def _byte_count(dtype: str, shape: tuple[int, ...]) -> int:
    return stored_dtype(dtype).itemsize * int(np.prod(shape))


def _identity(path: Path) -> tuple[int, int, int]:
    """Changes when a file is replaced or written to; (0, 0, 0) when it is gone."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return 0, 0, 0
    return found.st_ino, found.st_size, found.st_mtime_ns
