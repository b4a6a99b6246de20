"""The packed dataset: what goes in comes out, damage is named, and an interrupted pack leaves the last good one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fw_model.data.__main__ import main
from fw_model.data.manifest import ClipRow, dataset_digest, read_manifest, write_table
from fw_model.data.schema import ARRAYS
from fw_model.data.shard_reader import ShardReader
from fw_model.data.shard_writer import ShardWriter
from fw_model.data.verify import verify
from fw_model.errors import DatasetError, MissingDatasetError
from tests.helpers.made_clips import TEXT_VERSION, add_clip, make_record, pack

ROOT = Path(__file__).parents[2]
CLIPS = {"v1": "train", "v2": "train", "v3": "val", "v4": "train"}
CLIP_BYTES = sum(array.nbytes for array in make_record("v1").arrays.values())


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    pack(tmp_path / "dataset", CLIPS)
    return tmp_path / "dataset"


def row_of(path: Path, clip_id: str) -> ClipRow:
    return next(row for row in read_manifest(path) if row.clip_id == clip_id)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


# ---- round trip and layout


def test_every_array_comes_back_bit_for_bit(dataset: Path) -> None:
    reader = ShardReader(dataset)
    for clip_id in CLIPS:
        record, arrays = make_record(clip_id), reader.read(row_of(dataset, clip_id))
        assert set(arrays) == set(ARRAYS)
        for name, array in record.arrays.items():
            assert arrays[name].dtype == array.dtype
            np.testing.assert_array_equal(arrays[name], array)


def test_manifest_says_what_was_packed(dataset: Path) -> None:
    record, row = make_record("v3"), row_of(dataset, "v3")
    assert (row.video, row.split, row.bucket, row.size) == ("v3.mp4", "val", "32x48x5", (32, 48, 5))
    assert (row.fps, row.scale, row.prompt) == (record.fps, record.scale, record.prompt)
    assert (row.versions, row.quality, row.quarantine) == (record.versions, record.quality, "")
    assert row.arrays["latents"] == ("float16", (16, 2, 4, 6))
    assert row.bytes == CLIP_BYTES


def test_byte_order_and_layout_in_memory_do_not_matter(tmp_path: Path) -> None:
    plain = make_record("a")
    odd = {name: np.asfortranarray(array.astype(array.dtype.newbyteorder(">"))) for name, array in plain.arrays.items()}
    for name, record in (("plain", plain), ("odd", replace(plain, arrays=odd))):
        with ShardWriter(tmp_path / name) as writer:
            add_clip(writer, record, "train")
    assert row_of(tmp_path / "plain", "a").xxh64 == row_of(tmp_path / "odd", "a").xxh64
    assert verify(tmp_path / "odd") == []


def test_one_row_group_is_one_clip_uncompressed_and_plain(dataset: Path) -> None:
    meta = pq.ParquetFile(dataset / "train-00000-of-00001.parquet").metadata
    assert (meta.num_rows, meta.num_row_groups) == (3, 3)
    for group in range(3):
        for column in range(len(ARRAYS) + 1):
            chunk = meta.row_group(group).column(column)
            assert chunk.compression == "UNCOMPRESSED"
            assert not chunk.has_dictionary_page
            assert chunk.statistics is None


def test_shards_hold_one_split_and_one_bucket_and_are_numbered_within_the_split(tmp_path: Path) -> None:
    path = tmp_path / "dataset"
    with ShardWriter(path, target_bytes=2 * CLIP_BYTES) as writer:
        for i in range(6):
            portrait = i % 2 == 1
            add_clip(writer, make_record(f"v{i}", size=(48, 32, 5) if portrait else (32, 48, 5)), "val" if i == 5 else "train")
    shards = sorted(file.name for file in path.glob("*-of-*"))
    train = [f"train-0000{i}-of-00003.parquet" for i in range(3)]
    assert shards == ["texts-00000-of-00001.parquet", *train, "val-00000-of-00001.parquet"]
    assert sorted(file.name for file in path.iterdir()) == sorted(["manifest.parquet", "texts.parquet", *shards])
    kinds: dict[str, set] = {}
    for row in read_manifest(path):
        kinds.setdefault(row.shard, set()).add((row.split, row.bucket))
        assert row.shard.startswith(row.split)
    assert all(len(kind) == 1 for kind in kinds.values())
    assert verify(path) == []


def test_quarantined_clips_are_listed_with_their_reason_and_not_packed(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "d") as writer:
        add_clip(writer, make_record("good"), "train")
        writer.quarantine("bad", "bad.mp4", "camera does not move")
    row = row_of(tmp_path / "d", "bad")
    assert (row.quarantine, row.shard, row.row_group, row.split) == ("camera does not move", "", -1, "")
    assert verify(tmp_path / "d") == []


def test_nothing_but_the_dataset_is_left_beside_it(dataset: Path) -> None:
    assert sorted(entry.name for entry in dataset.parent.iterdir()) == [".dataset.lock", "dataset"]


# ---- digest


def test_digest_does_not_depend_on_the_order_or_size_of_shards(tmp_path: Path) -> None:
    pack(tmp_path / "a", CLIPS)
    pack(tmp_path / "b", dict(reversed(CLIPS.items())), target_bytes=1)
    assert dataset_digest(tmp_path / "a") == dataset_digest(tmp_path / "b")


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "x"},
        {"scale": 2.0},
        {"versions": {"vae": "seeded:1", "text": TEXT_VERSION}},
        {"arrays": make_record("other").arrays},
    ],
)
def test_digest_changes_with_what_training_sees(tmp_path: Path, change: dict) -> None:
    for name, changes in (("a", {}), ("b", change)):
        with ShardWriter(tmp_path / name) as writer:
            add_clip(writer, replace(make_record("c"), **changes), "train")
    assert dataset_digest(tmp_path / "a") != dataset_digest(tmp_path / "b")


# ---- refusal on the way in


def bad(name: str, edit: Callable[[np.ndarray], np.ndarray]) -> dict[str, np.ndarray]:
    return {name: edit(make_record("c").arrays[name].copy())}


def put(value: float, *index: int) -> Callable[[np.ndarray], np.ndarray]:
    def edit(array: np.ndarray) -> np.ndarray:
        array[index] = value
        return array

    return edit


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (bad("depth", lambda a: a.astype(np.float32)), "depth: expected float16, got float32"),
        (bad("latents", lambda a: a[:, :1]), r"latents: expected \[16, 2, 4, 6\]"),
        (bad("confidence", lambda a: a[..., None]), "confidence: expected"),
        (bad("w2c", lambda a: a[:3]), "w2c: expected"),
        (bad("depth", lambda a: a[:4]), "frames must be 4k"),
        (bad("depth", lambda a: a[0]), r"depth: expected \[T, H, W\]"),
        (bad("depth", put(np.nan, 0, 0, 0)), "depth: holds NaN or infinity"),
        (bad("latents", put(np.inf, 0, 0, 0, 0)), "latents: holds NaN or infinity"),
        (bad("depth", put(-1, 0, 0, 0)), "depth: negative"),
        (bad("w2c", put(0.1, 0, 0, 3)), "frame 0 must be the identity"),
        (bad("w2c", put(2.0, 3, 0, 0)), "frame 3 is not a rotation"),
        (bad("intrinsics", put(0.0, 1, 0, 0)), "positive focal lengths"),
        ({"points": np.zeros(3)}, "arrays"),
    ],
)
def test_a_clip_that_does_not_fit_is_refused_by_name_and_discards_the_pack(dataset: Path, changes: dict, message: str) -> None:
    before = snapshot(dataset)
    with pytest.raises(ValueError, match=f"clip c: .*{message}"), ShardWriter(dataset) as writer:
        add_clip(writer, make_record("c", **changes), "train")
    assert snapshot(dataset) == before


@pytest.mark.parametrize(("field", "value"), [("fps", 0.0), ("scale", float("nan")), ("clip_id", ""), ("video", "")])
def test_bad_numbers_and_names_are_refused(tmp_path: Path, field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field.split("_")[0]), ShardWriter(tmp_path / "d") as writer:
        add_clip(writer, replace(make_record("c"), **{field: value}), "train")


def test_a_clip_id_may_not_come_twice(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "d") as writer:
        add_clip(writer, make_record("a"), "train")
        with pytest.raises(ValueError, match="clip a: added twice"):
            writer.quarantine("a", "a.mp4", "reason")


def test_clips_of_one_video_may_not_straddle_the_splits(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "d") as writer:
        add_clip(writer, make_record("a", "v.mp4"), "train")
        with pytest.raises(ValueError, match="already has clips in the other split"):
            add_clip(writer, make_record("b", "v.mp4"), "val")


def test_an_empty_pack_is_refused_and_says_why_clips_are_missing(dataset: Path) -> None:
    before = snapshot(dataset)
    with pytest.raises(DatasetError, match=r"1 set aside.*\n.*bad: static"), ShardWriter(dataset) as writer:
        writer.quarantine("bad", "bad.mp4", "static")
    assert snapshot(dataset) == before


def test_a_folder_that_is_not_a_dataset_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "precious.mp4").write_bytes(b"x")
    for _ in range(2):  # a refused pack gives the lock back
        with pytest.raises(DatasetError, match="is not a dataset"), ShardWriter(tmp_path / "videos"):
            pass
    assert (tmp_path / "videos" / "precious.mp4").read_bytes() == b"x"


def test_writer_outside_its_context_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="context manager"):
        ShardWriter(tmp_path / "d").add(make_record("a"), "train")


# ---- damage


def test_a_missing_dataset_names_the_folder_and_the_job(tmp_path: Path) -> None:
    with pytest.raises(MissingDatasetError, match=r"no dataset at .*nowhere.*python -m fw_pipeline.launch build_dataset"):
        read_manifest(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ARRAYS)
def test_a_flipped_byte_in_any_array_is_found_and_named(dataset: Path, name: str) -> None:
    row = row_of(dataset, "v2")
    shard = dataset / row.shard
    data = bytearray(shard.read_bytes())
    arrays = make_record("v2").arrays
    where = data.find(arrays[name].tobytes(), data.find(arrays["confidence"].tobytes()))
    assert where > 0
    data[where + 5] ^= 0x10
    shard.write_bytes(data)
    with pytest.raises(DatasetError, match=rf"{row.shard}: clip v2 \(row group 1\): the bytes do not have the hash"):
        ShardReader(dataset).read(row)
    assert [fault.split(": ")[1] for fault in verify(dataset)] == ["clip v2 (row group 1)"]
    ShardReader(dataset).read(row_of(dataset, "v1"))


def test_flipped_bytes_anywhere_in_a_shard_never_go_unnoticed_or_crash(dataset: Path) -> None:
    """Page headers and footer too: whatever pyarrow makes of them, the reader raises DatasetError or gives the right bytes."""
    shard = dataset / row_of(dataset, "v1").shard
    good = shard.read_bytes()
    rng = np.random.default_rng(0)
    footer = range(len(good) - 600, len(good), 13)
    for position in [*rng.integers(4, len(good), 25).tolist(), *footer]:
        data = bytearray(good)
        data[position] ^= 1 << int(rng.integers(8))
        shard.write_bytes(data)
        for clip_id in ("v1", "v2", "v4"):
            try:
                arrays = ShardReader(dataset).read(row_of(dataset, clip_id))
            except DatasetError:
                continue
            for name, array in make_record(clip_id).arrays.items():
                np.testing.assert_array_equal(arrays[name], array)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_truncated_shard_is_named(dataset: Path, keep: float) -> None:
    row = row_of(dataset, "v1")
    shard = dataset / row.shard
    shard.write_bytes(shard.read_bytes()[: int(keep * shard.stat().st_size)])
    with pytest.raises(DatasetError, match=rf"{row.shard}: damaged or truncated"):
        ShardReader(dataset).read(row)
    assert len(verify(dataset)) == 3


def test_a_missing_shard_is_named(dataset: Path) -> None:
    row = row_of(dataset, "v3")
    (dataset / row.shard).unlink()
    with pytest.raises(DatasetError, match=rf"{row.shard}: missing"):
        ShardReader(dataset).read(row)


def test_shards_of_another_pack_are_noticed(dataset: Path, tmp_path: Path) -> None:
    pack(tmp_path / "other", {"w1": "train", "w2": "train", "w3": "train"})
    name = row_of(dataset, "v1").shard
    (tmp_path / "other" / name).replace(dataset / name)
    with pytest.raises(DatasetError, match="holds clip w1 instead"):
        ShardReader(dataset).read(row_of(dataset, "v1"))


def test_verify_finds_shards_that_do_not_belong(dataset: Path) -> None:
    (dataset / "val-00007-of-00008.parquet").write_bytes(b"")
    assert [fault.split(": ")[1] for fault in verify(dataset)] == ["not in the manifest"]


def rewrite_manifest(dataset: Path, edit: Callable[[list[dict]], None], version: bytes | None = None) -> None:
    table = pq.read_table(dataset / "manifest.parquet")
    rows = table.to_pylist()
    edit(rows)
    schema = table.schema if version is None else table.schema.with_metadata({"format_version": version})
    write_table(dataset / "manifest.parquet", pa.Table.from_pylist(rows, schema=schema))


@pytest.mark.parametrize("shard", ["../train-00000-of-00001.parquet", "/etc/passwd", "", "manifest.parquet"])
def test_a_manifest_may_not_point_outside_its_shards(dataset: Path, shard: str) -> None:
    rewrite_manifest(dataset, lambda rows: rows[0].update(shard=shard))
    with pytest.raises(DatasetError, match="not a shard's name"):
        read_manifest(dataset)


def test_a_manifest_of_another_format_is_refused(dataset: Path) -> None:
    rewrite_manifest(dataset, lambda rows: None, version=b"99")
    with pytest.raises(DatasetError, match="format version 99, this code reads 2"):
        read_manifest(dataset)


def test_a_manifest_with_broken_json_is_refused(dataset: Path) -> None:
    rewrite_manifest(dataset, lambda rows: rows[1].update(arrays="{"))
    with pytest.raises(DatasetError, match="clip v2: bad JSON"):
        read_manifest(dataset)


def test_a_damaged_manifest_is_refused(dataset: Path) -> None:
    (dataset / "manifest.parquet").write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(DatasetError, match=r"manifest.parquet: damaged"):
        verify(dataset)


def test_verify_finds_a_video_in_both_splits_and_a_clip_listed_twice(dataset: Path) -> None:
    def edit(rows: list[dict]) -> None:
        rows[2]["video"] = rows[0]["video"]
        rows.append(dict(rows[0]))

    rewrite_manifest(dataset, edit)
    faults = "\n".join(verify(dataset))
    assert "has clips in both splits" in faults
    assert "clip v1 is listed twice" in faults


# ---- command line


def test_command_line_verifies_with_honest_exit_codes(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(dataset)]) == 0
    assert "4 clips read, 0 faults" in capsys.readouterr().out
    shard = dataset / row_of(dataset, "v3").shard
    shard.write_bytes(shard.read_bytes()[:-100])
    assert main(["verify", str(dataset)]) == 1
    assert shard.name in capsys.readouterr().err
    assert main(["verify", str(dataset / "nowhere")]) == 1
    assert "build_dataset" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["repair"])
    assert stop.value.code == 2


def test_command_line_tells_what_is_in_a_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ShardWriter(tmp_path / "d") as writer:
        add_clip(writer, make_record("a-0", "a.mp4"), "train")
        add_clip(writer, make_record("a-1", "a.mp4"), "train")
        writer.quarantine("b", "b.mp4", "static camera")
    assert main(["info", str(tmp_path / "d")]) == 0
    printed = capsys.readouterr().out
    assert dataset_digest(tmp_path / "d") in printed
    assert "2 clips of 1 videos" in printed
    assert "set aside b (b.mp4): static camera" in printed
