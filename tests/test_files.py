"""A file or folder is there whole, as it was or as it is to be; a lock has one holder; a hash is of all the bytes."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import xxhash

from fw_model import files


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    files.write_json(path, {"a": 1})

    def write() -> None:
        with files.whole_file(path) as temporary:
            temporary.write_bytes(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write()
    assert path.read_text() == '{\n "a": 1\n}'
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_while_writing_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "step"
    with files.whole_folder(folder) as temporary:
        (temporary / "a").write_text("old")

    def write() -> None:
        with files.whole_folder(folder) as temporary:
            (temporary / "a").write_text("new")
            raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"):
        write()
    assert (folder / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_new_folder_takes_the_place_of_the_old_one_whole(tmp_path: Path) -> None:
    folder = tmp_path / "step"
    for name in ("a", "b"):
        with files.whole_folder(folder) as temporary:
            (temporary / name).write_text(name)
    assert [path.name for path in folder.iterdir()] == ["b"]
    assert list(tmp_path.iterdir()) == [folder]


def die_before_the_rename(path: Path) -> None:
    files.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    files.write_bytes(path, b"new")


def test_a_kill_before_the_rename_leaves_the_old_file_and_a_temporary_that_is_cleared(tmp_path: Path) -> None:
    path = tmp_path / "x"
    files.write_bytes(path, b"old")
    process = multiprocessing.get_context("fork").Process(target=die_before_the_rename, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 2
    files.remove_temporaries(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_lock_has_one_holder_and_ends_with_its_file(tmp_path: Path) -> None:
    place = tmp_path / "lock"
    with place.open("a+") as first, place.open("a+") as second:
        assert files.try_lock(first)
        files.own_lock(first)
        assert not files.try_lock(second)
        assert files.lock_owner(second) == str(os.getpid())
        assert files.is_locked(place)
    assert not files.is_locked(place)
    with files.held_lock(place):
        assert files.is_locked(place)


@pytest.mark.parametrize("size", [0, 1, files._BLOCK, files._BLOCK + 1])
def test_a_hash_is_of_all_the_bytes(size: int, tmp_path: Path) -> None:
    data = bytes(i % 251 for i in range(1000)) * (size // 1000 + 1)
    (tmp_path / "x").write_bytes(data[:size])
    assert files.file_hash(tmp_path / "x") == (size, xxhash.xxh64_hexdigest(data[:size]))
