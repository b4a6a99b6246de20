"""Files that are whole or not there, locks that a dead process does not hold, hashes: the one place for each.

What is being written has a hidden name, `.NAME.HOST-PID-N.tmp`, until it is flushed to the disk and renamed. Whoever is killed
before that leaves the old file as it was, and a temporary that the next process to write into that folder removes.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import logging
import os
import platform
import re
import shutil
import stat
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

import xxhash

log = logging.getLogger(__name__)

_BLOCK = 8 * 2**20  # bytes read at a time
_TEMPORARY = re.compile(r"\..+\.(?P<host>[^.]*)-(?P<pid>\d+)-\d+\.tmp")
_HOST = platform.node().partition(".")[0]
_numbers = itertools.count()
_swept: set[Path] = set()


class Digest(Protocol):
    """A hash that is being computed."""

    def update(self, data: bytes, /) -> Any: ...


# ------------------------------------------------------------------------------------------------------------- writing


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, to write a file to: it takes the place of `path` when the block ends without an error.

    The folder is made if need be. The file's permissions follow the umask, whatever wrote it. Raises OSError naming `path`
    when it cannot be written; the old file is then as it was.
    """
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent)
        temporary = _temporary(path)
        with open(temporary, "wb") as file:
            mode = os.fstat(file.fileno()).st_mode
        temporary.unlink()  # so that nothing written is an error, not an empty file
        try:
            yield temporary
            _set_mode(temporary, mode)
            put_in_place(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """`whole_file` of these bytes."""
    with whole_file(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """`whole_file` of a text in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """`whole_file` of a value as JSON."""
    write_text(path, json.dumps(value, indent=1))


@contextmanager
def whole_folder(path: Path, flush: bool = True) -> Iterator[Path]:
    """A temporary folder beside `path`, which takes its place, with all that is in it, when the block ends without an error.

    A folder that was there is removed only then. Between the two renames there is none: readers take that as not made yet.

    flush: wait until the disk holds every file in it; without, a power cut soon after may leave empty ones.
    """
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent)
        temporary = _temporary(path)
        remove(temporary)  # of an earlier process with this number
        temporary.mkdir()
        try:
            yield temporary
            for file in (*temporary.rglob("*"), temporary):
                if file.is_file():
                    _set_mode(file, temporary.stat().st_mode & 0o666)
                if flush:
                    fsync(file)
            old = path.rename(_temporary(path)) if path.exists() else None
            temporary.rename(path)
            fsync(path.parent)
            if old is not None:
                shutil.rmtree(old)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def put_in_place(temporary: Path, path: Path) -> None:
    """Flush a finished file and give it its name, in place of any that has it."""
    fsync(temporary)
    temporary.replace(path)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Have the disk hold what was written to a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def link(source: Path, target: Path) -> None:
    """Give a finished file a second name; a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK):
            raise
        shutil.copyfile(source, target)
        fsync(target)


def remove(path: Path) -> None:
    """Delete a folder if it is there. It gets a temporary name first: a kill half-way leaves no half under its own."""
    if not path.exists():
        return
    if not path.name.startswith("."):
        path = path.rename(_temporary(path))
    shutil.rmtree(path)


def remove_temporaries(folder: Path) -> None:
    """Delete what killed processes were writing into a folder; the caller is the only one writing there."""
    for path in folder.glob(".*.tmp"):
        _delete(path)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{_HOST}-{os.getpid()}-{next(_numbers)}.tmp")


def _sweep(folder: Path) -> None:
    """Delete the temporaries in a folder whose process is no more, once for every process that writes there."""
    if folder in _swept or _TEMPORARY.fullmatch(folder.name):
        return
    _swept.add(folder)
    for path in folder.iterdir():
        found = _TEMPORARY.fullmatch(path.name)
        if found and found["host"] == _HOST and not _alive(int(found["pid"])):
            _delete(path)


def _set_mode(file: Path, mode: int) -> None:
    """Give a file the permissions that the umask gives new ones: safetensors makes files for their owner alone."""
    if stat.S_IMODE(file.stat().st_mode) != stat.S_IMODE(mode):
        file.chmod(stat.S_IMODE(mode))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file in an error of the disk that names none, or only a temporary."""
    try:
        yield
    except OSError as error:
        nameless = error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
        if nameless or (error.filename and _TEMPORARY.fullmatch(Path(os.fsdecode(error.filename)).name)):
            error.filename = str(path)
        raise


# --------------------------------------------------------------------------------------------------------------- names


def printable(name: str) -> str:
    """A file's name as it can be logged and stored: bytes that are no text and control characters are escaped (`\\udcff`)."""
    return "".join(ascii(char)[1:-1] if unicodedata.category(char) in ("Cc", "Cs") else char for char in name)


# --------------------------------------------------------------------------------------------------------------- locks


def take_lock(path: Path, refuse: Callable[[str], Exception], patience: float = 0) -> IO[str]:
    """An exclusive lock on a file, which is made and holds its owner's process id. Closing the file gives the lock back; a
    process that dies gives it back, too.

    Args:
        path: the lock file; it stays.
        refuse: process id of the owner, or "unknown" -> what is raised when the lock is not to be had.
        patience: seconds to wait for an owner that is about to stop.
    """
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 closed by the caller
    try:
        deadline = time.monotonic() + patience
        while not _try_lock(file):
            file.seek(0)
            owner = file.read().strip() or "unknown"
            if time.monotonic() >= deadline:
                raise refuse(owner)
            log.info("%s: waiting for process %s to stop", path.parent, owner)
            time.sleep(min(5.0, patience))
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
    except BaseException:
        file.close()
        raise
    return file


@contextmanager
def held_lock(path: Path) -> Iterator[None]:
    """Hold a lock file as soon as it is free, however long that takes."""
    with open(path, "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_locked(path: Path) -> bool:
    """Whether somebody holds a lock file right now."""
    with open(path, "a+b") as file:
        return not _try_lock(file)


def _try_lock(file: IO[Any]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# -------------------------------------------------------------------------------------------------------------- hashes


def file_hash(path: Path) -> tuple[int, str]:
    """(bytes, xxh64 as 16 hex digits) of a whole file."""
    digest = xxhash.xxh64()
    return update_from_file(digest, path), digest.hexdigest()


def update_from_file(digest: Digest, path: Path) -> int:
    """Feed a file's bytes to a hash, in pieces; returns how many there were."""
    size = 0
    with _naming(path), open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return size
