"""What goes wrong while a dataset is packed or read leaves the last good one, and the next pack goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fw_model.data.manifest import (
    MissingDatasetError,
    PackInProgressError,
    dataset_digest,
    read_manifest,
)
from fw_model.data.shard_writer import ShardWriter
from fw_model.data.verify import verify
from tests.unit.made_clips import add_clip, make_record, pack

ROOT = Path(__file__).parents[2]
CLIPS = {"v1": "train", "v2": "train", "v3": "val", "v4": "train"}


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    pack(tmp_path / "dataset", CLIPS)
    return tmp_path / "dataset"


def snapshot(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


# ---- interruption and concurrency


def run_python(code: str) -> int:
    script = "import os, sys\nfrom tests.unit.made_clips import add_clip, make_record, pack\n" + code
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, check=False, timeout=60).returncode


KILLED_WHILE_ADDING = """
from fw_model.data.shard_writer import ShardWriter
with ShardWriter({path!r}) as writer:
    add_clip(writer, make_record("new"), "train")
    os._exit(9)
"""
KILLED_BETWEEN_THE_RENAMES = """
from fw_model.data import swap
true_rename = swap.Path.rename
def rename(self, target):
    if self.name == "whole":
        os._exit(9)
    return true_rename(self, target)
swap.Path.rename = rename
pack({path!r}, {{"new": "train"}})
"""


@pytest.mark.parametrize("code", [KILLED_WHILE_ADDING, KILLED_BETWEEN_THE_RENAMES])
def test_a_killed_pack_leaves_the_last_good_dataset_and_the_next_pack_works(dataset: Path, code: str) -> None:
    digest = dataset_digest(dataset)
    assert run_python(code.format(path=str(dataset))) == 9
    assert dataset_digest(dataset) == digest
    assert verify(dataset) == []
    pack(dataset, {"later": "train"})
    assert [row.clip_id for row in read_manifest(dataset)] == ["later"]
    assert sorted(entry.name for entry in dataset.parent.iterdir()) == [".dataset.lock", "dataset"]


def test_a_killed_first_pack_leaves_no_dataset(tmp_path: Path) -> None:
    assert run_python(KILLED_WHILE_ADDING.format(path=str(tmp_path / "dataset"))) == 9
    with pytest.raises(MissingDatasetError):
        read_manifest(tmp_path / "dataset")


def test_an_exception_leaves_the_last_good_dataset_and_nothing_else(dataset: Path) -> None:
    before = snapshot(dataset)
    writer = ShardWriter(dataset)

    def interrupted_pack() -> None:
        with writer:
            add_clip(writer, make_record("new"), "train")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_pack()
    assert snapshot(dataset) == before
    assert sorted(entry.name for entry in dataset.parent.iterdir()) == [".dataset.lock", "dataset"]


def test_two_packs_at_once_are_refused_with_the_owner(dataset: Path) -> None:
    with ShardWriter(dataset) as writer:
        with pytest.raises(PackInProgressError, match=rf"process {os.getpid()} is packing"), ShardWriter(dataset):
            pass
        in_another_process = run_python(
            f"from fw_model.data.manifest import PackInProgressError\n"
            f"try:\n    pack({str(dataset)!r}, {{'x': 'train'}})\nexcept PackInProgressError:\n    sys.exit(7)"
        )
        assert in_another_process == 7
        add_clip(writer, make_record("new"), "train")
    assert [row.clip_id for row in read_manifest(dataset)] == ["new"]


def test_a_lock_file_of_a_dead_process_does_not_block(tmp_path: Path) -> None:
    (tmp_path / ".dataset.lock").write_text("999999")
    pack(tmp_path / "dataset", CLIPS)
    assert (tmp_path / ".dataset.lock").read_text() == str(os.getpid())


def test_the_old_dataset_is_readable_until_the_new_one_is_in_place(dataset: Path) -> None:
    with ShardWriter(dataset) as writer:
        add_clip(writer, make_record("new"), "train")
        assert verify(dataset) == []
        assert len(read_manifest(dataset)) == 4
    assert len(read_manifest(dataset)) == 1
