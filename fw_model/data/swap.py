"""One pack at a time, swapped in whole: the lock on a dataset's folder and the renames that replace it."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from typing import IO

from fw_model.data.manifest import MANIFEST, DatasetError, PackInProgressError, previous_folder


def packing_folder(path: Path) -> Path:
    return path.parent / f".{path.name}.packing"


def take_lock(path: Path) -> IO[str]:
    """An exclusive lock on `.dataset.lock`, which ends with the file object or with the process."""
    lock = open(path.parent / f".{path.name}.lock", "a+", encoding="utf-8")  # noqa: SIM115 held until the pack is over
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        owner = lock.read().strip() or "unknown"
        lock.close()
        raise PackInProgressError(f"{path}: process {owner} is packing this dataset; wait for it or stop it") from error
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def clear_up(path: Path) -> None:
    """Make the place ready for a pack, after one that was killed too; the caller holds the lock.

    A `previous_folder` without its successor (killed between the renames of `swap_in`) stays until this pack is in place.

    Raises DatasetError if the folder holds something that is not a dataset: it would be lost in the swap.
    """
    remove(packing_folder(path))
    if (path / MANIFEST).is_file():
        remove(previous_folder(path))
        return
    if path.exists():
        if not path.is_dir() or any(path.iterdir()):
            raise DatasetError(
                f"{path}: exists and is not a dataset (no {MANIFEST}); packing would replace it, so give another folder"
            )
        path.rmdir()


def swap_in(path: Path) -> None:
    """Put the packed folder in place. Between the two renames readers find the old one through `dataset_folder`."""
    if path.exists():
        path.rename(previous_folder(path))
    packing_folder(path).rename(path)
    fsync(path.parent)
    remove(previous_folder(path))


def remove(folder: Path) -> None:
    """Delete a folder if it is there."""
    if folder.exists():
        shutil.rmtree(folder)


def fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
