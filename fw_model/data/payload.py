"""How a clip's arrays lie in a shard: one row group of raw bytes, and the hash that the manifest keeps of them."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import xxhash

from fw_model.data.schema import ARRAYS

PAYLOAD_SCHEMA = pa.schema([("clip_id", pa.string()), *((name, pa.large_binary()) for name in ARRAYS)])


def stored_dtype(dtype: str) -> np.dtype:
    """A dtype in the byte order of the files."""
    return np.dtype(dtype).newbyteorder("<")


def payload_hash(arrays: dict[str, tuple[str, tuple[int, ...]]], buffers: dict[str, memoryview]) -> str:
    """xxh64 over name, dtype, shape and bytes of every array, in the order of ARRAYS."""
    digest = xxhash.xxh64()
    for name in ARRAYS:
        digest.update(json.dumps([name, *arrays[name]]).encode())
        digest.update(buffers[name])
    return digest.hexdigest()
