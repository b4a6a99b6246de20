"""Datasets behind a URL that fsspec knows (s3://, gs://, https://, memory://): files are fetched once into a local cache.

    FW_CACHE      folder of the cache; default ~/.cache/fantasyworld
    FW_CACHE_GB   its size in GB; default 200. What was used longest ago goes first

A shard is known by its hash, which the manifest has: it is checked on arrival, and a dataset that is packed again shares
the shards that did not change. Any number of processes may use a cache together.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from fw_model.errors import DatasetError, MissingDatasetError
from fw_model.files import held_lock, is_locked, put_in_place, whole_file

log = logging.getLogger(__name__)

RETRY_SECONDS = (1.0, 4.0, 16.0)  # before the second, third and fourth attempt, each times 0.5 to 1.5
_CHUNK = 8 * 2**20
_T = TypeVar("_T")


def is_remote(path: str | Path) -> bool:
    """Whether a dataset's path is a URL rather than a local path."""
    return "://" in str(path)


def cache_from_env() -> tuple[Path, int]:
    """(folder, bytes) of the cache; raises DatasetError for a size that is none."""
    folder = Path(os.environ.get("FW_CACHE") or "~/.cache/fantasyworld").expanduser().absolute()
    text = os.environ.get("FW_CACHE_GB") or "200"
    try:
        gigabytes = float(text)
    except ValueError:
        gigabytes = -1.0
    if not 0 < gigabytes < float("inf"):
        raise DatasetError(f"FW_CACHE_GB={text!r}: expected the size of the cache in GB, e.g. FW_CACHE_GB=200")
    return folder, int(gigabytes * 1e9)


class RemoteFolder:
    """One dataset's folder behind a URL, seen through the local cache."""

    def __init__(self, url: str, cache: Path | None = None, cache_bytes: int | None = None) -> None:
        """url: of the folder that holds manifest.parquet; cache, cache_bytes: instead of FW_CACHE and FW_CACHE_GB."""
        folder, size = cache_from_env()
        self.url = url.rstrip("/")
        self.cache = cache or folder
        self.cache_bytes = cache_bytes or size
        for name in ("files", "locks", "manifests"):
            (self.cache / name).mkdir(parents=True, exist_ok=True)

    def manifest(self) -> Path:
        """The manifest as it is now, as a local file.

        Raises MissingDatasetError when the URL has none; DatasetError when it cannot be fetched.
        """
        where = f"{self.url}/manifest.parquet"
        version = _patiently(where, lambda: _version(where), MissingDatasetError)
        target = self.cache / "manifests" / f"{xxhash.xxh64_hexdigest(f'{where} {version}'.encode())}.parquet"
        with self._locked(target.name):
            if not target.is_file():
                with whole_file(target) as temporary:
                    _patiently(where, lambda: _download(where, temporary), MissingDatasetError)
        return target

    def fetch(self, name: str, size: int, xxh64: str) -> Path:
        """A file beside the manifest, as a local file with this many bytes and this hash. It may vanish when it is not used
        for long; who has it open keeps it.

        Raises DatasetError naming the file: missing, still damaged or unreachable after several attempts, or larger than
        the whole cache.
        """
        where = f"{self.url}/{name}"
        target = self.cache / "files" / f"{xxh64}-{size}.parquet"
        with self._locked(target.name):
            if target.is_file():
                os.utime(target, ns=(time.time_ns(), target.stat().st_mtime_ns))  # used now; nothing was written to it
                return target
            temporary = target.with_suffix(".tmp")
            self._make_room(temporary, size, where)
            try:
                _patiently(where, lambda: _download(where, temporary, (size, xxh64)), DatasetError)
                put_in_place(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
        return target

    def _make_room(self, temporary: Path, size: int, where: str) -> None:
        """Delete what was used longest ago until `size` bytes fit, and take them by a file of that length."""
        if size > self.cache_bytes:
            raise DatasetError(f"{where}: {size:,} bytes, but the cache holds {self.cache_bytes:,}; set FW_CACHE_GB higher")
        with self._locked("cache"):
            temporary.unlink(missing_ok=True)
            found = []
            for file in (self.cache / "files").iterdir():
                try:
                    found.append((file.stat().st_atime_ns, file.stat().st_size, file))
                except FileNotFoundError:  # another process finished or gave up this download
                    continue
            used = sum(length for _, length, _ in found)
            for _, length, file in sorted(found):
                if used + size <= self.cache_bytes:
                    break
                if file.suffix != ".tmp" or not self._in_use(file):
                    file.unlink(missing_ok=True)
                    used -= length
            with open(temporary, "wb") as handle:
                handle.truncate(size)

    def _in_use(self, temporary: Path) -> bool:
        """Whether a process is writing this download; a dead one holds no lock."""
        return is_locked(self._lock_file(temporary.with_suffix(".parquet").name))

    def _lock_file(self, name: str) -> Path:
        return self.cache / "locks" / f"{name}.lock"

    def _locked(self, name: str) -> AbstractContextManager[None]:
        return held_lock(self._lock_file(name))


def _filesystem(url: str) -> tuple[Any, str]:
    """A file system and the path in it."""
    folder, _, name = url.rpartition("/")
    filesystem, path = _opened(folder, os.getpid())
    return filesystem, f"{path}/{name}"


@lru_cache(maxsize=8)
def _opened(folder: str, process: int) -> tuple[Any, str]:
    """One for each process: the threads that a file system talks to its server with do not outlive a fork."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(folder, skip_instance_cache=True)
    except ImportError as error:
        raise DatasetError(f"{folder}: {error}; for s3://: pip install -c constraints.txt -e '.[remote]'") from error
    except ValueError as error:
        raise DatasetError(f"{folder}: {error}") from error


def _version(url: str) -> str:
    """What changes when a remote file is written again: its size with its ETag, checksum or time."""
    filesystem, path = _filesystem(url)
    info = filesystem.info(path)
    keys = ("size", "ETag", "etag", "md5Hash", "mtime", "LastModified", "created", "updated")
    return repr([(key, info[key]) for key in keys if key in info])


def _download(url: str, target: Path, expected: tuple[int, str] | None = None) -> None:
    """Copy a remote file; raises OSError when it is not what was expected."""
    filesystem, path = _filesystem(url)
    digest, size = xxhash.xxh64(), 0
    with filesystem.open(path, "rb", cache_type="none") as source, open(target, "wb") as copy:
        while chunk := source.read(_CHUNK):
            copy.write(chunk)
            digest.update(chunk)
            size += len(chunk)
    if expected is not None and (size, digest.hexdigest()) != expected:
        raise OSError(
            f"{size:,} bytes with xxh64 {digest.hexdigest()} arrived, the manifest says {expected[0]:,} and {expected[1]}"
        )


def _patiently(url: str, action: Callable[[], _T], missing: type[DatasetError]) -> _T:
    """Try several times, with pauses that grow; raises DatasetError with the last reason."""
    for pause in (*RETRY_SECONDS, None):
        try:
            return action()
        except FileNotFoundError as error:
            raise missing(f"{url}: missing; upload the whole dataset, manifest.parquet last") from error
        except (DatasetError, PermissionError):
            raise
        except Exception as error:  # every file system has errors of its own for a lost connection
            if pause is None:
                raise DatasetError(f"{url}: given up after {len(RETRY_SECONDS) + 1} attempts: {error}") from error
            log.warning("%s: %s; trying again", url, error)
            time.sleep(pause * random.uniform(0.5, 1.5))
    raise AssertionError("not reached")
