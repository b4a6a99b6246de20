"""How arrays lie in a shard: one row group of raw bytes, and the hash that the manifest keeps of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TypeVar

import numpy as np
import pyarrow as pa
import xxhash

from fw_model.data.schema import ARRAYS, TEXT, UNREAD, VIDEO

T = TypeVar("T")

_DTYPES = {name: dtype for name, (dtype, _) in {**ARRAYS, "video": VIDEO, "text": TEXT}.items()}


def payload_schema(names: Iterable[str]) -> pa.Schema:
    """Columns of a shard whose rows have these arrays; all rows of a shard have the same ones."""
    return pa.schema([("clip_id", pa.string()), *((name, pa.large_binary()) for name in sorted(names))])


def stored_dtype(dtype: str) -> np.dtype:
    """A dtype in the byte order of the files."""
    return np.dtype(dtype).newbyteorder("<")


class Payload:
    """The bytes of one row: of a clip's arrays, or of a prompt's embedding."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        """arrays: of the dtypes of `schema.ARRAYS`, in any byte order and memory layout; copied only where they must be."""
        stored = {name: np.ascontiguousarray(a, dtype=stored_dtype(_DTYPES[name])) for name, a in arrays.items()}
        self.arrays = {name: (_DTYPES[name], array.shape) for name, array in stored.items()}
        self.buffers = {name: array.reshape(-1).view(np.uint8).data for name, array in stored.items()}
        self.bytes = sum(buffer.nbytes for buffer in self.buffers.values())

    def xxh64(self) -> str:
        return payload_hash(self.arrays, self.buffers)

    def training_xxh64(self) -> str:
        """The hash of what training reads of it."""
        return payload_hash(read_in_training(self.arrays), self.buffers)


def read_in_training(arrays: Mapping[str, T]) -> dict[str, T]:
    """The arrays that training reads, of those of a clip."""
    return {name: array for name, array in arrays.items() if name != UNREAD}


def payload_hash(arrays: Mapping[str, tuple[str, tuple[int, ...]]], buffers: Mapping[str, memoryview]) -> str:
    """xxh64 over name, dtype, shape and bytes of every array, in the order of names."""
    digest = xxhash.xxh64()
    for name in sorted(arrays):
        digest.update(json.dumps([name, *arrays[name]]).encode())
        digest.update(buffers[name])
    return digest.hexdigest()
