"""What goes wrong while a dataset is packed or read leaves the last good one, and the next pack goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

from fw_model.data.dataset import ClipDataset, collate
from fw_model.data.manifest import dataset_digest, read_manifest, read_texts
from fw_model.data.shard_writer import ShardWriter
from fw_model.data.verify import verify
from fw_model.errors import DatasetError, MissingDatasetError, PackInProgressError
from tests.helpers.made_clips import add_clip, make_record, make_text, pack

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
    script = "import os, sys\nfrom tests.helpers.made_clips import add_clip, make_record, make_text, pack\n" + code
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
            f"from fw_model.errors import PackInProgressError\n"
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


# ---- a full disk

FULL = """
from fw_model.errors import (DatasetError)
{limit}
try:
    pack({path!r}, dict.fromkeys("abcdefgh", "train"), target_bytes=1)
except DatasetError as error:
    print(error)
    sys.exit(7)
"""


def test_a_file_that_may_not_grow_stops_the_pack_in_words_and_the_next_one_goes_on(dataset: Path) -> None:
    before = snapshot(dataset)
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
    code = FULL.format(limit=limit, path=str(dataset)).replace("target_bytes=1", "target_bytes=1e9")
    assert run_python(code) == 7
    assert snapshot(dataset) == before
    pack(dataset, dict.fromkeys("abcdefgh", "train"))
    assert len(read_manifest(dataset)) == 8
    assert verify(dataset) == []


def test_a_full_disk_stops_the_pack_in_words_and_the_next_one_goes_on(tmp_path: Path) -> None:
    """On a tmpfs of 300 kB: room for the old dataset and some of the new one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], check=False, capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting a tmpfs takes root: {mounted.stderr.decode().strip()}")
    try:
        path = disk / "dataset"
        pack(path, CLIPS)
        before = snapshot(path)
        with pytest.raises(DatasetError, match=r"the disk is full .*dataset that was there is untouched.*Free some space"):
            pack(path, {f"new {i}": "train" for i in range(40)}, target_bytes=1)
        assert snapshot(path) == before
        finished = list((disk / ".dataset.packing").glob("*.rows"))
        assert finished
        subprocess.run(["mount", "-o", "remount,size=3m", disk], check=True)
        with ShardWriter(path, target_bytes=1) as writer:
            for i in range(40):
                add_clip(writer, make_record(f"new {i}"))
        assert writer.bytes_written <= (81 - len(finished)) * max(row.bytes for row in read_manifest(path))
        assert len(read_manifest(path)) == 40
        assert verify(path) == []
    finally:
        subprocess.run(["umount", disk], check=True)


# ---- while a dataset is read


def test_a_shard_deleted_while_training_stops_with_its_name(dataset: Path) -> None:
    pack(dataset, dict.fromkeys("abcd", "train"), target_bytes=1)
    clips = ClipDataset(dataset, "train", 8)
    batches = iter(DataLoader(clips, batch_size=1, collate_fn=collate, num_workers=1, prefetch_factor=1))
    next(batches)
    gone = sorted(dataset.glob("train-*"))[-1]
    gone.unlink()
    with pytest.raises(DatasetError, match=rf"{gone.name}: missing; pack the dataset again"):
        list(batches)


def test_a_flipped_byte_in_a_manifest_never_goes_unnoticed(dataset: Path) -> None:
    """Whatever pyarrow makes of it, reading fails by name or gives the very same rows."""
    for read, name in ((read_manifest, "manifest.parquet"), (read_texts, "texts.parquet")):
        file, good_rows = dataset / name, list(read(dataset))
        good = file.read_bytes()
        for number, position in enumerate(np.random.default_rng(0).integers(4, len(good), 60).tolist()):
            data = bytearray(good)
            data[position] ^= 1 << (position % 8)
            file.write_bytes(data)
            os.utime(file, ns=(number, number))  # several writes within a tick of the file system's clock look like one
            try:
                rows = list(read(dataset))
            except DatasetError:
                continue
            assert rows == good_rows
        file.write_bytes(good)


def test_verify_lists_every_fault_at_once(dataset: Path) -> None:
    texts = dataset / "texts-00000-of-00001.parquet"
    data = bytearray(texts.read_bytes())
    data[data.find(make_text("prompt of v2").tobytes())] ^= 1
    texts.write_bytes(data)
    val = dataset / "val-00000-of-00001.parquet"
    val.write_bytes(val.read_bytes()[:-1])
    (dataset / ".left over").write_text("")
    faults = verify(dataset)
    assert [any(part in fault for fault in faults) for part in (".left over: not in", "val-00000", "prompt 'prompt of v2'")]
    assert len(faults) == 3
