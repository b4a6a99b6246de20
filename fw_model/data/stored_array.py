"""Arrays that lie in a file: mapped where they are needed, and sent to another process as the place where they lie.

A data worker checks a clip's bytes; the process that trains then maps the same bytes itself. What goes between them is an open
file and an offset: no copy, no second set of pages, nothing in /dev/shm, which containers often make too small.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from multiprocessing.reduction import DupFd
from typing import Any, BinaryIO

import numpy as np

from fw_model.data.payload import stored_dtype
from fw_model.errors import DatasetError


class SharedFile:
    """A file open for reading. Pickled to another process it arrives there open, whatever has become of its name since.

    It is closed with the last reference to it. Pickling works between a process and its children, as in a queue of
    `multiprocessing`, while both live.
    """

    def __init__(self, file: BinaryIO, name: str, written: tuple[int, int] | None = None) -> None:
        """name: for messages; written: size and time of the file's last change, as they are now by default."""
        self._file = file
        self._name = name
        self._written = written or self._last_change()

    def _last_change(self) -> tuple[int, int]:
        found = os.fstat(self._file.fileno())
        return found.st_size, found.st_mtime_ns

    def read(self, start: int, size: int) -> bytes:
        """The bytes from `start` on, fewer at the end of the file."""
        return os.pread(self._file.fileno(), size, start)

    def map(self, start: int, size: int) -> memoryview:
        """`size` bytes from `start` on, where they lie in the page cache. Writing to them changes neither the file nor what
        anybody else maps.

        Raises ValueError when the file is shorter; DatasetError when it was written to since it was opened: what was
        checked then need not hold any more.
        """
        if self._last_change() != self._written:
            raise DatasetError(f"{self._name}: was written to while it was read. Start again, and replace files instead of that")
        first = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        # Copy on write, not read only: torch wants memory that could be written to.
        mapped = mmap.mmap(self._file.fileno(), start + size - first, access=mmap.ACCESS_COPY, offset=first)
        mapped.madvise(mmap.MADV_WILLNEED)
        return memoryview(mapped)[start - first :]

    def __reduce__(self) -> Any:
        return _received, (DupFd(self._file.fileno()), self._name, self._written)


def _received(handle: Any, name: str, written: tuple[int, int]) -> SharedFile:
    return SharedFile(os.fdopen(handle.detach(), "rb"), name, written)


@dataclass(frozen=True)
class StoredArray:
    """An array of this dtype and shape whose bytes begin at `start`."""

    file: SharedFile
    start: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return byte_count(self.dtype, self.shape)

    def map(self) -> np.ndarray:
        """The array, uncopied; see `SharedFile.map`."""
        buffer = self.file.map(self.start, self.bytes)
        return np.frombuffer(buffer, stored_dtype(self.dtype)).reshape(self.shape)


def byte_count(dtype: str, shape: tuple[int, ...]) -> int:
    return stored_dtype(dtype).itemsize * int(np.prod(shape))
