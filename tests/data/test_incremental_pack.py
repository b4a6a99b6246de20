"""A pack writes what is new and nothing else; what stays keeps its very file; an interrupted one goes on where it was."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fw_model.data.manifest import dataset_digest, read_manifest, read_texts
from fw_model.data.shard_reader import ShardReader
from fw_model.data.shard_writer import ShardWriter
from fw_model.data.verify import verify
from fw_model.errors import DatasetError
from tests.helpers.made_clips import CLIP_BYTES, TEXT_VERSION, add_clip, bring_up_to_date, make_record, make_text, version_of

ROOT = Path(__file__).parents[2]


def files(path: Path, split: str = "train") -> dict[int, str]:
    """inode -> name of the shards."""
    return {file.stat().st_ino: file.name for file in path.glob(f"{split}-*.parquet")}


def holds(path: Path, clips: Mapping[str, str]) -> None:
    rows = {row.clip_id: row for row in read_manifest(path)}
    assert set(rows) == set(clips)
    reader = ShardReader(path)
    for clip_id, version in clips.items():
        for name, array in version_of(clip_id, version).arrays.items():
            np.testing.assert_array_equal(reader.read(rows[clip_id])[name], array)
    assert verify(path) == []


SIX = dict.fromkeys("abcdef", "1")


def test_packing_the_same_again_writes_nothing_and_keeps_every_file(tmp_path: Path) -> None:
    assert bring_up_to_date(tmp_path / "d", SIX)[0] == 6
    before, digest = files(tmp_path / "d"), dataset_digest(tmp_path / "d")
    assert bring_up_to_date(tmp_path / "d", SIX) == (0, 0)
    assert files(tmp_path / "d") == before
    assert dataset_digest(tmp_path / "d") == digest


def test_a_new_clip_leaves_the_other_shards_alone(tmp_path: Path) -> None:
    bring_up_to_date(tmp_path / "d", SIX)
    before = files(tmp_path / "d")
    more = {**SIX, "g": "1"}
    assert bring_up_to_date(tmp_path / "d", more) == (1, 1)
    assert set(before) < set(files(tmp_path / "d"))
    assert set(files(tmp_path / "d").values()) == {f"train-0000{i}-of-00004.parquet" for i in range(4)}
    holds(tmp_path / "d", more)


@pytest.mark.parametrize("changed", [{"c": "2"}, {"c": None}])
def test_a_changed_or_removed_clip_rewrites_its_shard_alone(tmp_path: Path, changed: dict[str, str | None]) -> None:
    bring_up_to_date(tmp_path / "d", SIX)
    before = files(tmp_path / "d")
    wanted = {clip: version for clip, version in {**SIX, **changed}.items() if version}
    made, written = bring_up_to_date(tmp_path / "d", wanted)
    assert (made, written) == (len(wanted) - 5, 1 + made)  # c's neighbour is copied, not made again
    assert len(set(before) & set(files(tmp_path / "d"))) == 2
    holds(tmp_path / "d", wanted)


def test_many_small_packs_do_not_leave_many_small_shards(tmp_path: Path) -> None:
    for count in range(1, 8):
        bring_up_to_date(tmp_path / "d", dict.fromkeys("abcdefg"[:count], "1"), target=3 * CLIP_BYTES)
    assert len(files(tmp_path / "d")) == 3
    holds(tmp_path / "d", dict.fromkeys("abcdefg", "1"))


def test_a_clip_that_changes_its_split_moves(tmp_path: Path) -> None:
    bring_up_to_date(tmp_path / "d", SIX)
    bring_up_to_date(tmp_path / "d", SIX, split="val")
    assert {row.split for row in read_manifest(tmp_path / "d")} == {"val"}
    holds(tmp_path / "d", SIX)


def test_the_same_bytes_added_again_are_not_written_again(tmp_path: Path) -> None:
    for version in ("1", "1 again"):
        with ShardWriter(tmp_path / "d") as writer:
            add_clip(writer, make_record("a"), source=version)
    assert writer.bytes_written == 0
    assert [row.source for row in read_manifest(tmp_path / "d")] == ["1 again"]


def test_a_new_prompt_does_not_touch_the_clip(tmp_path: Path) -> None:
    bring_up_to_date(tmp_path / "d", SIX)
    before = files(tmp_path / "d")
    with ShardWriter(tmp_path / "d") as writer:
        for prompt in ("", "new"):
            if not writer.keep_text(prompt, TEXT_VERSION):
                writer.add_text(prompt, make_text(prompt), TEXT_VERSION)
        assert all(writer.keep(clip, "train", "1", "new") for clip in SIX)
    assert files(tmp_path / "d") == before
    assert set(read_texts(tmp_path / "d")) == {"", "new"}
    assert {row.prompt for row in read_manifest(tmp_path / "d")} == {"new"}
    assert verify(tmp_path / "d") == []


def test_a_prompt_is_stored_once_whoever_shares_it(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "d") as writer:
        for clip_id in "abc":
            add_clip(writer, replace(make_record(clip_id), prompt="a room"))
    texts = read_texts(tmp_path / "d")
    assert set(texts) == {"", "a room"}
    np.testing.assert_array_equal(ShardReader(tmp_path / "d").read(texts["a room"])["text"], make_text("a room"))


@pytest.mark.parametrize(
    ("prompts", "version", "message"),
    [
        ([], TEXT_VERSION, "empty prompt"),
        ([""], TEXT_VERSION, "clip a: no embedding of its prompt 'prompt of a' was added"),
        (["", "prompt of a"], "other", "clip a: its text encoder is 'seeded:0/text'.*embedded by 'other'"),
    ],
)
def test_clips_without_their_embeddings_are_refused(tmp_path: Path, prompts: list[str], version: str, message: str) -> None:
    def pack_it() -> None:
        with ShardWriter(tmp_path / "d") as writer:
            for prompt in prompts:
                writer.add_text(prompt, make_text(prompt), version)
            writer.add(make_record("a"), "train")

    with pytest.raises(DatasetError, match=message):
        pack_it()
    assert [entry.name for entry in tmp_path.iterdir()] == [".d.lock"]


def test_an_embedding_that_is_none_or_another_one_is_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "d") as writer:
        add_clip(writer, make_record("a"))
        with pytest.raises(ValueError, match="added twice, with different"):
            writer.add_text("", make_text("else"), TEXT_VERSION)
        with pytest.raises(ValueError, match=r"prompt 'x': expected a float16 embedding \[L, D\]"):
            writer.add_text("x", np.zeros(3), TEXT_VERSION)


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_shard_that_is_gone_or_cut_short_is_made_again_and_the_others_stay(tmp_path: Path, damage: str) -> None:
    bring_up_to_date(tmp_path / "d", SIX)
    shard = tmp_path / "d" / "train-00001-of-00003.parquet"
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-50])
    assert bring_up_to_date(tmp_path / "d", SIX) == (2, 2)
    holds(tmp_path / "d", SIX)


def test_a_damaged_clip_is_never_copied_on(tmp_path: Path) -> None:
    bring_up_to_date(tmp_path / "d", SIX)
    shard = tmp_path / "d" / "train-00001-of-00003.parquet"
    data = bytearray(shard.read_bytes())
    data[data.find(version_of("d", "1").arrays["depth"].tobytes())] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DatasetError, match=r"train-00001-of-00003.parquet: clip d .*hash"):
        bring_up_to_date(tmp_path / "d", {**SIX, "c": "2"})


KILLED = """
import os, sys
from pathlib import Path
from tests.helpers.made_clips import bring_up_to_date
from fw_model.data.shard_writer import ShardWriter
true_add, left = ShardWriter.add, [5]
def add(self, *args):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), 9)
    return true_add(self, *args)
ShardWriter.add = add
bring_up_to_date(Path(sys.argv[1]), dict.fromkeys("abcdef", "2"))
"""


def test_a_pack_killed_in_the_middle_goes_on_with_what_it_had_finished(tmp_path: Path) -> None:
    path = tmp_path / "d"
    bring_up_to_date(path, {"a": "1", "x": "1"})
    before = dataset_digest(path)
    assert subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=ROOT, check=False, timeout=60).returncode == -9
    assert dataset_digest(path) == before
    assert verify(path) == []
    finished = {file.stat().st_ino for file in (tmp_path / ".d.packing").glob("*.shard") if file.with_suffix(".rows").exists()}
    assert len(finished) == 2  # of two clips each
    again = dict.fromkeys("abcdef", "2")
    assert bring_up_to_date(path, again) == (2, 2)
    assert finished < set(files(path))
    holds(path, again)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".d.lock", "d"]


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.dictionaries(st.sampled_from("abcdef"), st.sampled_from("12"), min_size=1), min_size=2, max_size=4))
def test_any_sequence_of_packs_holds_what_the_last_one_asked_for(
    tmp_path_factory: pytest.TempPathFactory, packs: list[dict[str, str]]
) -> None:
    path = tmp_path_factory.mktemp("any") / "d"
    for wanted in packs:
        made, _ = bring_up_to_date(path, wanted)
    holds(path, packs[-1])
    assert made == sum(packs[-2].get(clip) != version for clip, version in packs[-1].items())
