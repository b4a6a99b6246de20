"""Files written whole or not at all, locks that end with their process, hashes of what is too large for memory: once, here.

What is being written has a hidden name that ends in `.tmp`; it takes its place by a rename, after its bytes are on the disk. A
process that is killed leaves the old file as it was, and at most a `.tmp` behind (`remove_temporaries`).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

import xxhash

_BLOCK = 2**23  # bytes read at a time


class Digest(Protocol):
    """A hash that is being computed."""

    def update(self, data: bytes, /) -> Any: ...


# ------------------------------------------------------------------------------------------------------------- writing


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name for a file that takes the place of `path` when the block ends without an error.

    Missing folders are made. A reader sees the old file or the new one, never a part; an error leaves the old one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        yield temporary
        fsync(temporary)
        temporary.replace(path)
        fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file as `whole_file` does."""
    with whole_file(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write JSON as `whole_file` does."""
    write_bytes(path, json.dumps(value, indent=1).encode())


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `path`, and of what is there, when the block ends without an error.

    Its files are on the disk before it does. Killed between two renames, `path` is missing and the old folder has a hidden
    name, never half of either.
    """
    temporary = _temporary(path)
    remove(temporary)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            fsync(file)
        fsync(temporary)
        if path.exists():
            old = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
            path.rename(old)
            temporary.rename(path)
            remove(old)
        else:
            temporary.rename(path)
        fsync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove(folder: Path) -> None:
    """Delete a folder if it is there; it loses its name first, so that no half of it is ever taken for the whole."""
    if folder.exists():
        doomed = folder.with_name(f".{folder.name.strip('.')}.removed.tmp")
        if doomed != folder:
            shutil.rmtree(doomed, ignore_errors=True)
            folder.rename(doomed)
        shutil.rmtree(doomed)


def remove_temporaries(folder: Path) -> None:
    """Delete what killed processes left in a folder; the caller is the only one writing there."""
    for path in folder.glob(".*.tmp"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def link(source: Path, target: Path) -> None:
    """Give a finished file a second name; a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK):
            raise
        shutil.copyfile(source, target)
        fsync(target)


def fsync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


# --------------------------------------------------------------------------------------------------------------- locks


def try_lock(file: IO[Any], exclusive: bool = True) -> bool:
    """Take the lock of an open file; False when another process has it. It ends with the file object or the process."""
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lock_owner(file: IO[str]) -> str:
    """Who wrote itself down as the owner of a lock."""
    file.seek(0)
    return file.read().strip() or "unknown"


def own_lock(file: IO[str]) -> None:
    """Write this process down as the owner of a lock that it has."""
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()


@contextmanager
def held_lock(path: Path) -> Iterator[None]:
    """Wait for a lock and hold it."""
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_locked(path: Path) -> bool:
    """Whether a living process holds a lock."""
    with path.open("a+b") as file:
        return not try_lock(file)


# -------------------------------------------------------------------------------------------------------------- hashes


def update_from_file(digest: Digest, path: Path) -> int:
    """Add a file's bytes to a hash, in pieces; returns how many there were."""
    size = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return size


def file_hash(path: Path) -> tuple[int, str]:
    """(bytes, xxh64 as 16 hex digits) of a whole file."""
    digest = xxhash.xxh64()
    return update_from_file(digest, path), digest.hexdigest()
