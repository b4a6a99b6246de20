"""Reading clips out of a packed dataset's shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fw_model.data.manifest import ClipRow, DatasetError, dataset_folder, open_parquet
from fw_model.data.payload import payload_hash, payload_schema, stored_dtype


class ShardReader:
    """Reads clips of one dataset by manifest row, keeping the last few shards memory-mapped. One per process."""

    def __init__(self, path: str | Path, verify_hash: bool = True, max_open: int = 32) -> None:
        self.path = dataset_folder(path)
        self.verify_hash = verify_hash
        self.max_open = max_open
        self._files: dict[str, pq.ParquetFile] = {}

    @classmethod
    def of_folder(cls, folder: Path) -> ShardReader:
        """A reader of shards in a folder that need not hold a whole dataset."""
        reader = cls.__new__(cls)
        reader.path, reader.verify_hash, reader.max_open, reader._files = folder, True, 1, {}
        return reader

    def read(self, row: ClipRow) -> dict[str, np.ndarray]:
        """Read-only arrays of a row of the manifest or of the texts, named and shaped as it says, viewing the bytes read.

        Raises DatasetError naming shard and clip when the shard is missing, damaged, or its bytes have another hash.
        """
        where = f"{self.path / row.shard}: clip {row.clip_id} (row group {row.row_group})"
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
        buffers = {name: memoryview(table[name][0].as_buffer()) for name in row.arrays}
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
        file = self._files.pop(shard, None) or open_parquet(self.path / shard)
        self._files[shard] = file  # most recently used last
        while len(self._files) > self.max_open:
            self._files.pop(next(iter(self._files))).close()
        return file

    def close(self) -> None:
        while self._files:
            self._files.popitem()[1].close()
