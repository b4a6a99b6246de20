"""Clips as tensors: values, padding, batches, worker processes, refusals."""

from __future__ import annotations

import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from fw_model.data.dataset import ClipDataset, collate
from fw_model.data.manifest import MANIFEST, dataset_digest, read_manifest, write_table
from fw_model.data.sampler import ResumableBucketSampler
from fw_model.data.schema import Batch
from fw_model.data.shard_reader import ShardReader
from fw_model.data.shard_writer import ShardWriter
from fw_model.data.verify import verify
from fw_model.errors import DatasetError, MissingDatasetError
from fw_model.train.loading import Batches
from fw_model.train.losses import make_targets
from tests.helpers.made_clips import add_clip, bring_up_to_date, make_record, make_text, pack

CLIPS = {"v4": "train", "v1": "train", "v2": "train", "v3": "val"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "dataset"
    pack(path, CLIPS)
    return path


def damage(path: Path, clip_id: str, name: str = "depth") -> None:
    """Flip one byte of an array of a clip."""
    for shard in path.glob("*-of-*.parquet"):
        data = bytearray(shard.read_bytes())
        arrays = make_record(clip_id).arrays
        where = data.find(arrays[name].tobytes(), max(0, data.find(arrays["confidence"].tobytes())))
        if where >= 0:
            data[where + 5] ^= 1
            shard.write_bytes(data)


def test_splits_hold_their_clips_in_the_order_of_ids(dataset: Path) -> None:
    assert [row.clip_id for row in ClipDataset(dataset, "train", 8).rows] == ["v1", "v2", "v4"]
    assert [row.clip_id for row in ClipDataset(dataset, "val", 8).rows] == ["v3"]
    assert ClipDataset(dataset, "train", 8).buckets == ["32x48x5"] * 3


def test_a_sample_holds_the_clips_numbers_as_they_are_stored_and_the_device_widens_them(dataset: Path) -> None:
    sample, arrays = ClipDataset(dataset, "train", 8)[1], make_record("v2").arrays
    batch = collate([sample])
    assert sample["clip_id"] == "v2"
    for name in ("latents", "image", "depth", "intrinsics", "w2c"):
        np.testing.assert_array_equal(sample[name].numpy(), arrays[name], strict=True)
        moved = getattr(batch.to("cpu"), name)
        assert moved.dtype == torch.float32
        np.testing.assert_array_equal(moved[0].numpy(), arrays[name].astype(np.float32))
    assert torch.equal(batch.valid, batch.depth > 0)
    assert not batch.valid[:, :, :2].any()


def test_text_is_zero_padded(dataset: Path) -> None:
    text = ClipDataset(dataset, "train", 8)[0]["text"]
    assert text.shape == (8, 16)
    np.testing.assert_array_equal(text[:3].numpy(), make_text("prompt of v1"))
    assert (text[3:] == 0).all()


def test_samples_can_be_changed_without_changing_the_dataset(dataset: Path) -> None:
    clips = ClipDataset(dataset, "train", 8)
    for value in clips[0].values():
        if isinstance(value, torch.Tensor):
            value.zero_()
    assert clips[0]["depth"].any()


def test_a_batch_stacks_clips(dataset: Path) -> None:
    clips = ClipDataset(dataset, "train", 8)
    batch = collate([clips[0], clips[2]])
    assert batch.clip_ids == ["v1", "v4"]
    assert len(batch) == 2
    assert batch.latents.shape == (2, 16, 2, 4, 6)
    assert batch.text.shape == (2, 8, 16)
    assert batch.valid.dtype == torch.bool
    assert torch.equal(batch.depth[1], clips[2]["depth"])
    assert make_targets(batch).points.shape == (2, 5, 32, 48, 3)


def test_clips_of_different_buckets_do_not_stack(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "d") as writer:
        add_clip(writer, make_record("a"), "train")
        add_clip(writer, make_record("b", size=(48, 32, 5)), "train")
    clips = ClipDataset(tmp_path / "d", "train", 8)
    with pytest.raises(ValueError, match="clips a and b differ in latents"):
        collate([clips[0], clips[1]])
    with pytest.raises(ValueError, match="no clips"):
        collate([])


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> ClipDataset:
    """Seven clips of one bucket and three of another, in several shards: 3 steps of 4 in an epoch, both buckets filled up."""
    path = tmp_path_factory.mktemp("loader") / "dataset"
    with ShardWriter(path, target_bytes=60_000) as writer:
        for i in range(10):
            add_clip(writer, make_record(f"c{i}", size=(32, 48, 5) if i < 7 else (48, 32, 5)))
    return ClipDataset(path, "train", 8)


def load(clips: ClipDataset, sampler: ResumableBucketSampler, count: int, workers: int = 0) -> list[Batch]:
    """The next micro-batches by the loader that training uses."""
    batches = Batches(clips, sampler, workers, patience=60)
    found = list(islice(batches, count))
    batches.close()
    return found


def assert_equal(got: list[Batch], wanted: list[Batch]) -> None:
    assert [batch.clip_ids for batch in got] == [batch.clip_ids for batch in wanted]
    for one, other in zip(got, wanted, strict=True):
        for name, value in vars(other).items():
            assert not isinstance(value, torch.Tensor) or torch.equal(getattr(one, name), value), name


def test_any_number_of_workers_gives_the_same_batches(clips: ClipDataset) -> None:
    expected = load(clips, ResumableBucketSampler(clips.buckets, 4, 2), 10)
    assert {tuple(batch.depth.shape[2:]) for batch in expected} == {(32, 48), (48, 32)}
    for workers in (1, 2, 4):  # the shards are open here before the workers start
        assert_equal(load(clips, ResumableBucketSampler(clips.buckets, 4, 2), 10, workers), expected)


@pytest.mark.parametrize(("size", "start"), [(1, "fork"), (2, "fork"), (2, "spawn")])
def test_worker_processes_of_another_loader_give_the_same_batches(clips: ClipDataset, size: int, start: str) -> None:
    loader = DataLoader(clips, batch_size=size, collate_fn=collate, num_workers=1, multiprocessing_context=start)
    (batch,) = islice(loader, 1)
    assert_equal([batch], [collate([clips[i] for i in range(size)])])


def test_a_batch_of_one_clip_is_the_mapped_bytes_uncopied(clips: ClipDataset) -> None:
    sample = clips[0]
    batch = collate([sample])
    assert batch.depth.data_ptr() == sample["depth"].data_ptr()
    shard = str(Path(clips.path) / clips.rows[0].shard)
    assert shard in Path("/proc/self/maps").read_text(encoding="utf-8")


def test_a_sample_does_not_need_its_shards_name_any_more(tmp_path: Path) -> None:
    pack(tmp_path / "d", CLIPS)
    sample = ClipDataset(tmp_path / "d", "train", 8)[1]
    shutil.rmtree(tmp_path / "d")
    np.testing.assert_array_equal(sample["depth"].numpy(), make_record("v2").arrays["depth"])


def test_threads_that_share_a_dataset_get_the_right_clips_whatever_is_let_go_of_meanwhile(tmp_path: Path) -> None:
    pack(tmp_path / "d", dict.fromkeys("abcdefgh", "train"), target_bytes=1)  # a shard each
    clips = ClipDataset(tmp_path / "d", "train", 8)
    clips._shards.max_open = 1
    wanted = [make_record(name).arrays["depth"] for name in "abcdefgh"]

    def read(index: int) -> bool:
        return np.array_equal(clips[index]["depth"].numpy(), wanted[index])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, [i % 8 for i in range(400)]))


def without_hash_for_training(path: Path) -> None:
    """A dataset as it was packed before there was a hash of what training reads."""
    manifest = pq.read_table(path / MANIFEST)
    write_table(path / MANIFEST, manifest.drop_columns(["training_xxh64"]))


def test_a_dataset_of_before_the_hash_for_training_is_read_verified_and_packed_on(tmp_path: Path) -> None:
    path = tmp_path / "d"
    pack(path, CLIPS)
    digest, new = dataset_digest(path), [*ClipDataset(path, "train", 8)]
    without_hash_for_training(path)
    assert {row.training_xxh64 for row in read_manifest(path)} == {""}
    assert dataset_digest(path) == digest  # it is the same dataset: a run goes on with it
    assert verify(path) == []
    for old, sample in zip(ClipDataset(path, "train", 8), new, strict=True):
        assert all(torch.equal(old[name], sample[name]) for name in old if name != "clip_id")
    bring_up_to_date(path, {"v1": "1", "v9": "1"})
    assert verify(path) == []


@pytest.mark.parametrize("old", [False, True])
def test_the_hash_of_confidence_is_checked_by_who_reads_it(tmp_path: Path, old: bool) -> None:
    path = tmp_path / "d"
    pack(path, CLIPS)
    if old:
        without_hash_for_training(path)
    damage(path, "v2", "confidence")
    clips = ClipDataset(path, "train", 8)
    if old:  # it has only the hash of all arrays together
        with pytest.raises(DatasetError, match="clip v2 .*hash"):
            clips[1]
    else:
        np.testing.assert_array_equal(clips[1]["depth"].numpy(), make_record("v2").arrays["depth"])
    with pytest.raises(DatasetError, match="clip v2 .*hash"):
        ShardReader(path).read(clips.rows[1])
    assert ["clip v2" in fault for fault in verify(path)] == [True]


@pytest.mark.parametrize("name", ["depth", "image", "intrinsics", "latents", "w2c"])
def test_a_flipped_byte_in_what_training_reads_is_named(tmp_path: Path, name: str) -> None:
    pack(tmp_path / "d", CLIPS)
    damage(tmp_path / "d", "v2", name)
    with pytest.raises(DatasetError, match=r"train-00000-of-00001.parquet: clip v2 .*hash"):
        ClipDataset(tmp_path / "d", "train", 8)[1]


def test_a_hash_for_training_that_is_not_of_the_bytes_is_found_by_verify(tmp_path: Path) -> None:
    pack(tmp_path / "d", {"a": "train"})
    table = pq.read_table(tmp_path / "d" / MANIFEST)
    number = table.column_names.index("training_xxh64")
    write_table(tmp_path / "d" / MANIFEST, table.set_column(number, "training_xxh64", pa.array(["0" * 16])))
    (fault,) = verify(tmp_path / "d")
    assert "clip a: the hash of what training reads is not that of its bytes" in fault


def by_all_ranks(clips: ClipDataset, world: int, state: dict[str, Any] | None, steps: int) -> list[Batch]:
    """What `world` ranks load together in the next steps, in the order of micro-step and rank."""
    each = []
    for rank in range(world):
        sampler = ResumableBucketSampler(clips.buckets, 4, 1, rank, world, seed=3)
        if state is not None:
            sampler.load_state_dict(state)
        each.append(load(clips, sampler, steps * sampler.accumulation))
    return [batch for together in zip(*each, strict=True) for batch in together]


def test_ranks_together_load_the_same_whatever_their_number(clips: ClipDataset) -> None:
    expected = by_all_ranks(clips, 1, None, 5)
    for world in (2, 4):
        assert_equal(by_all_ranks(clips, world, None, 5), expected)


@pytest.mark.parametrize("done", range(7))
def test_resumed_after_any_step_the_rest_is_the_same_on_any_number_of_ranks(clips: ClipDataset, done: int) -> None:
    uninterrupted = by_all_ranks(clips, 1, None, done + 2)[4 * done :]
    sampler = ResumableBucketSampler(clips.buckets, 4, 2, seed=3)
    drawn_ahead = Batches(clips, sampler, 0, patience=60)
    for _ in range(done):
        next(drawn_ahead), next(drawn_ahead)
        sampler.advance()
    next(drawn_ahead)  # loaded, not trained on
    drawn_ahead.close()
    state = json.loads(json.dumps(sampler.state_dict()))
    for world in (1, 2, 4):
        assert_equal(by_all_ranks(clips, world, state, 2), uninterrupted)


def test_a_pickled_dataset_carries_no_open_files(dataset: Path) -> None:
    clips = ClipDataset(dataset, "train", 8)
    fresh = len(pickle.dumps(clips))
    first = clips[0]
    assert len(pickle.dumps(clips)) == fresh
    assert torch.equal(pickle.loads(pickle.dumps(clips))[0]["depth"], first["depth"])


def test_a_damaged_clip_stops_with_shard_and_clip_named(tmp_path: Path) -> None:
    pack(tmp_path / "d", CLIPS)
    damage(tmp_path / "d", "v2")
    clips = ClipDataset(tmp_path / "d", "train", 8)
    assert clips[0]["clip_id"] == "v1"
    with pytest.raises(DatasetError, match=r"train-00000-of-00001.parquet: clip v2 .*hash"):
        clips[1]
    assert ClipDataset(tmp_path / "d", "train", 8, verify_hash=False)[1]["clip_id"] == "v2"


def test_quarantined_clips_are_not_trained_on(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "d") as writer:
        add_clip(writer, make_record("a"), "train")
        writer.quarantine("b", "b.mp4", "static", split="train")
    assert len(ClipDataset(tmp_path / "d", "train", 8)) == 1


def test_an_empty_train_split_is_refused_and_an_empty_val_split_is_empty(tmp_path: Path) -> None:
    pack(tmp_path / "train", {"a": "train"})
    assert len(ClipDataset(tmp_path / "train", "val", 8)) == 0
    pack(tmp_path / "val", {"a": "val"})
    with pytest.raises(DatasetError, match="no clip in its train split"):
        ClipDataset(tmp_path / "val", "train", 8)


def test_a_missing_dataset_names_the_job_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(MissingDatasetError, match="python -m fw_pipeline.launch build_dataset"):
        ClipDataset(tmp_path / "nowhere", "train", 8)


def test_text_longer_than_the_model_takes_is_refused(dataset: Path) -> None:
    with pytest.raises(DatasetError, match="clip v1 has 3 text tokens, the model takes 2"):
        ClipDataset(dataset, "train", 2)


def test_clips_of_other_encoders_are_refused(dataset: Path) -> None:
    ClipDataset(dataset, "train", 8, versions={"vae": "seeded:0"})
    with pytest.raises(DatasetError, match="clip v1 was made by vae 'seeded:0', but this run needs 'hub@1'"):
        ClipDataset(dataset, "train", 8, versions={"vae": "hub@1"})


def test_an_unknown_split_is_refused(dataset: Path) -> None:
    with pytest.raises(ValueError, match="split must be one of"):
        ClipDataset(dataset, "test", 8)
