"""Files are whole or as they were, locks have one owner, hashes are those of always."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from safetensors.torch import save_file

from fw_model import files
from fw_model.files import file_hash, link, remove, remove_temporaries, take_lock, whole_file, whole_folder, write_json
from tests.helpers import processes


class Busy(RuntimeError):
    """The error that these tests choose."""


def refuse(owner: str) -> Busy:
    return Busy(f"process {owner} has it")


# ------------------------------------------------------------------------------------------------- whole or as it was


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def write_and_die(target: Path, moment: str) -> None:
    """SIGKILL before the flush, between flush and rename, or right after the rename."""
    if moment == "rename":
        Path.replace = Path.rename = die  # type: ignore[assignment,method-assign]
    elif moment == "flush":
        files.fsync = die  # type: ignore[assignment]
    if target.suffix:
        with whole_file(target) as temporary:
            temporary.write_text("new")
            if moment == "writing":
                die()
    else:
        with whole_folder(target) as folder:
            (folder / "a").write_text("new")
            if moment == "writing":
                die()


@pytest.mark.parametrize("moment", ["writing", "flush", "rename"])
@pytest.mark.parametrize("name", ["file.json", "folder"])
def test_a_kill_before_the_rename_leaves_the_old_whole_and_the_next_process_clears_up(
    tmp_path: Path, name: str, moment: str
) -> None:
    target = tmp_path / "here" / name
    old = target if target.suffix else target / "a"
    old.parent.mkdir(parents=True)
    old.write_text("old")
    assert processes.run(write_and_die, target, moment, log=tmp_path / "log") == [-signal.SIGKILL]
    assert old.read_text() == "old"
    (left,) = [path for path in target.parent.iterdir() if path != target]
    assert left.name.startswith(f".{name}.")
    assert left.name.endswith(".tmp")
    write_json(target.parent / "other.json", 1)
    assert sorted(path.name for path in target.parent.iterdir()) == sorted([name, "other.json"])


def test_what_a_living_process_is_writing_is_not_cleared(tmp_path: Path) -> None:
    with whole_file(tmp_path / "a") as mine:
        mine.write_text("being written")
        files._swept.clear()
        write_json(tmp_path / "b", 1)
        assert mine.is_file()
        other_machine = tmp_path / ".c.elsewhere-999999999-0.tmp"
        other_machine.touch()
        files._swept.clear()
        write_json(tmp_path / "b", 2)
        assert other_machine.is_file()
    remove_temporaries(tmp_path)  # of a folder that nobody else writes to
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("write", [whole_file, whole_folder])
def test_an_error_leaves_the_old_and_no_litter(tmp_path: Path, write: Callable[[Path], Any]) -> None:
    write_json(tmp_path / "file", "old")

    def fails() -> None:
        with write(tmp_path / "file") as temporary:
            (temporary if write is whole_file else temporary / "part").write_text("half")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fails()
    assert (tmp_path / "file").read_text() == '"old"'
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def write_on_a_full_disk(target: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    with pytest.raises(OSError, match=r"File too large: '.*/file\.bin'") as caught:
        files.write_bytes(target, bytes(5000))
    assert caught.value.errno == errno.EFBIG


def test_a_full_disk_leaves_the_old_and_an_error_that_names_the_file(tmp_path: Path) -> None:
    target = tmp_path / "here" / "file.bin"
    files.write_bytes(target, b"old")
    assert processes.run(write_on_a_full_disk, target, log=tmp_path / "log") == [0], processes.output(tmp_path / "log")
    assert target.read_bytes() == b"old"
    assert list(target.parent.iterdir()) == [target]


def test_a_folder_that_cannot_be_written_to_is_named_not_a_temporary(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"'.*/file'"):
        write_json(tmp_path / "file" / "x.json", 1)
    with pytest.raises(FileNotFoundError, match=r"'.*/x\.json'"), whole_file(tmp_path / "x.json"):
        pass  # nothing was written
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match=r"folder'"):
        write_json(tmp_path / "folder", 1)


def test_an_error_of_something_else_keeps_its_own_words(tmp_path: Path) -> None:
    with pytest.raises(ConnectionRefusedError) as caught, whole_folder(tmp_path / "folder"):
        raise ConnectionRefusedError(errno.ECONNREFUSED, "no engine there")
    assert "folder" not in str(caught.value)


def test_permissions_follow_the_umask_whoever_wrote(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with whole_file(tmp_path / "w.safetensors") as temporary:
            save_file({"w": torch.zeros(1)}, temporary)
        with whole_folder(tmp_path / "state") as folder:
            save_file({"w": torch.zeros(1)}, folder / "w.safetensors")
        write_json(tmp_path / "x.json", 1)
    finally:
        os.umask(before)
    found = {str(path.relative_to(tmp_path)): stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert found == {"w.safetensors": 0o640, "state": 0o750, "state/w.safetensors": 0o640, "x.json": 0o640}


def test_a_temporary_is_no_result_by_its_name(tmp_path: Path) -> None:
    with whole_file(tmp_path / "step-7.safetensors") as temporary:
        temporary.touch()
        assert temporary.name.startswith(".")
        assert temporary.suffix == ".tmp"
        assert not list(tmp_path.glob("*.safetensors"))


def test_a_new_folder_takes_the_place_of_the_old_one_with_all_that_was_in_it(tmp_path: Path) -> None:
    for name in ("old", "new"):
        with whole_folder(tmp_path / "k") as folder:
            (folder / "deep").mkdir()
            (folder / "deep" / name).touch()
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["k", "k/deep", "k/deep/new"]


def remove_and_die(folder: Path) -> None:
    files.shutil.rmtree = die  # type: ignore[assignment]
    remove(folder)


def test_a_kill_while_a_folder_is_removed_leaves_no_half_of_it_under_its_name(tmp_path: Path) -> None:
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-1" / "a").touch()
    assert processes.run(remove_and_die, tmp_path / "step-1", log=tmp_path / "log") == [-signal.SIGKILL]
    assert not (tmp_path / "step-1").exists()
    remove(tmp_path / "step-1")  # is not there: nothing to do


def test_a_second_name_is_a_copy_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"x")
    link(tmp_path / "a", tmp_path / "b")
    assert os.path.samefile(tmp_path / "a", tmp_path / "b")

    def no_links(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "no hard links here")

    monkeypatch.setattr(os, "link", no_links)
    link(tmp_path / "a", tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == b"x"


# ---------------------------------------------------------------------------------------------------------------- locks


def count_alone(folder: Path, rounds: int) -> None:
    """Read, wait, write one more: counts are lost as soon as two processes hold the lock."""
    for _ in range(rounds):
        with take_lock(folder / "lock", refuse, patience=60):
            count = int((folder / "count").read_text())
            time.sleep(0.001)
            (folder / "count").write_text(str(count + 1))


def test_two_processes_never_hold_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: time.sleep(0.0005))
    monkeypatch.setattr(files, "time", short)
    (tmp_path / "count").write_text("0")
    spawned = [multiprocessing.get_context("fork").Process(target=count_alone, args=(tmp_path, 50)) for _ in range(3)]
    for process in spawned:
        process.start()
    for process in spawned:
        process.join(60)
    assert [process.exitcode for process in spawned] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "150"


def test_a_held_lock_is_refused_with_its_owner_and_free_again_once_closed(tmp_path: Path) -> None:
    with take_lock(tmp_path / "lock", refuse):
        assert files.is_locked(tmp_path / "lock")
        with pytest.raises(Busy, match=f"process {os.getpid()} has it"):
            take_lock(tmp_path / "lock", refuse)
    assert not files.is_locked(tmp_path / "lock")
    take_lock(tmp_path / "lock", refuse).close()


def test_a_dead_process_holds_no_lock(tmp_path: Path) -> None:
    code = "import os, pathlib, sys, fw_model.files as f\nlock = f.take_lock(pathlib.Path(sys.argv[1]), None)\nos._exit(9)"
    owner = subprocess.run([sys.executable, "-c", code, str(tmp_path / "lock")], check=False, cwd=Path(__file__).parents[1])
    assert owner.returncode == 9
    assert (tmp_path / "lock").read_text() != str(os.getpid())
    take_lock(tmp_path / "lock", refuse).close()
    assert (tmp_path / "lock").read_text() == str(os.getpid())


def test_waiting_ends_when_the_owner_does(tmp_path: Path) -> None:
    lock = take_lock(tmp_path / "lock", refuse)
    processes_of_mine = multiprocessing.get_context("fork")
    waiter = processes_of_mine.Process(target=wait_for, args=(tmp_path, lock.fileno()))
    waiter.start()
    time.sleep(0.3)
    assert not (tmp_path / "got it").exists()
    lock.close()
    waiter.join(30)
    assert (tmp_path / "got it").exists()


def wait_for(folder: Path, inherited: int) -> None:
    os.close(inherited)  # or this process would hold what it waits for
    with files.held_lock(folder / "lock"):
        (folder / "got it").touch()


# --------------------------------------------------------------------------------------------------------------- hashes


@pytest.mark.parametrize("size", [0, 1, 8 * 2**20, 8 * 2**20 + 1])
def test_a_files_hash_is_xxh64_of_its_bytes_however_long_it_is(tmp_path: Path, size: int) -> None:
    data = np.random.default_rng(0).bytes(size)
    (tmp_path / "f").write_bytes(data)
    assert file_hash(tmp_path / "f") == (size, xxhash.xxh64_hexdigest(data))


def test_the_hash_of_a_known_file_is_what_it_was(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"fantasyworld")
    assert file_hash(tmp_path / "f")[1] == "de58ef8850605f1b"
