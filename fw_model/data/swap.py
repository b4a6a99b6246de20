"""One pack at a time, swapped in whole: the lock on a dataset's folder and the renames that replace it."""

from __future__ import annotations

from pathlib import Path
from typing import IO

from fw_model.data.manifest import MANIFEST, previous_folder
from fw_model.errors import DatasetError, PackInProgressError
from fw_model.files import fsync, remove, remove_temporaries, take_lock


def packing_folder(path: Path) -> Path:
    """Where a pack writes, and leaves what it had finished when it is interrupted."""
    return path.parent / f".{path.name}.packing"


def new_dataset(path: Path) -> Path:
    """Where a pack puts the new dataset together. It is whole once it has a manifest, which comes last."""
    return packing_folder(path) / "whole"


def take_pack_lock(path: Path) -> IO[str]:
    """An exclusive lock on `.dataset.lock`, which ends with the file object or with the process."""

    def refuse(owner: str) -> PackInProgressError:
        return PackInProgressError(f"{path}: process {owner} is packing this dataset; wait for it or stop it")

    return take_lock(path.parent / f".{path.name}.lock", refuse)


def clear_up(path: Path) -> None:
    """Make the place ready for a pack, after one that was killed too; the caller holds the lock.

    A pack that was whole when it was killed is put in place. A `previous_folder` without a successor (killed between the
    renames of `swap_in`) stays until this pack is in place.

    Raises DatasetError if the folder holds something that is not a dataset: it would be lost in the swap.
    """
    if path.exists() and not (path / MANIFEST).is_file():
        if not path.is_dir() or any(path.iterdir()):
            raise DatasetError(
                f"{path}: exists and is not a dataset (no {MANIFEST}); packing would replace it, so give another folder"
            )
        path.rmdir()
    if path.exists():
        remove(previous_folder(path))
    if (new_dataset(path) / MANIFEST).is_file():
        swap_in(path)
        remove(packing_folder(path))
    remove(new_dataset(path))
    remove_temporaries(packing_folder(path))


def swap_in(path: Path) -> None:
    """Put the packed folder in place. Between the two renames readers find the old one through `dataset_folder`."""
    if path.exists():
        path.rename(previous_folder(path))
    new_dataset(path).rename(path)
    fsync(path.parent)
    remove(previous_folder(path))
