"""Batches come in the sampler's order, a few ahead and no more; what goes wrong in a worker is heard."""

from __future__ import annotations

import threading
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from fw_model.data.dataset import ClipDataset
from fw_model.data.sampler import ResumableBucketSampler
from fw_model.errors import DatasetError, TrainingError
from fw_model.train.loading import AHEAD, Batches
from tests.helpers.made_clips import pack


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "dataset"
    pack(path, dict.fromkeys("abcdefghijkl", "train"), target_bytes=1)
    return path


class Watched(ClipDataset):
    """Notes what is read, by which thread, and does `before` first."""

    def __init__(self, path: Path, before: Any = lambda index: None) -> None:
        super().__init__(path, "train", 8)
        self.read: list[int] = []
        self.before = before

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.read.append(index)
        self.before(index)
        return super().__getitem__(index)


def sampler_of(clips: ClipDataset) -> ResumableBucketSampler:
    return ResumableBucketSampler(clips.buckets, 2, 1)


def settle(clips: Watched) -> int:
    """Reads, once there are no more of them."""
    before = -1
    while before != len(clips.read):
        before = len(clips.read)
        time.sleep(0.2)
    return before


def test_the_order_is_the_samplers_however_long_single_reads_take(dataset: Path) -> None:
    clips = Watched(dataset, lambda index: time.sleep(0.02 * (index % 3)))
    wanted = [[clips.rows[i].clip_id for i in indices] for indices in islice(iter(sampler_of(clips)), 20)]
    with Batches(clips, sampler_of(clips), 4, patience=60) as batches:
        assert [batch.clip_ids for batch in islice(batches, 20)] == wanted


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_workers_read_ahead_so_far_and_no_further_and_without_any_nothing_is(dataset: Path, workers: int) -> None:
    clips = Watched(dataset)
    with Batches(clips, sampler_of(clips), workers, patience=60) as batches:
        assert settle(clips) == 0  # nothing before the first is asked for
        for asked in (1, 2, 3):
            next(batches)
            assert settle(clips) == asked + AHEAD * workers


def test_as_many_clips_are_read_at_once_as_there_are_workers(dataset: Path) -> None:
    together = threading.Barrier(3, timeout=30)  # breaks, and fails the read, unless three meet
    clips = Watched(dataset, lambda index: together.wait())
    with Batches(clips, sampler_of(clips), 3, patience=60) as batches:
        for _ in range(3):
            next(batches)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("error", [DatasetError("clip c: damaged"), TimeoutError("the network"), KeyboardInterrupt()])
def test_an_error_comes_in_its_turn_and_is_the_error_itself(dataset: Path, workers: int, error: BaseException) -> None:
    def fails(index: int) -> None:
        if index == third:
            raise error

    clips = Watched(dataset, fails)
    third = list(islice(iter(sampler_of(clips)), 3))[2][0]
    with Batches(clips, sampler_of(clips), workers, patience=60) as batches:
        next(batches), next(batches)
        with pytest.raises(type(error)) as caught:
            next(batches)
    assert caught.value is error


def test_a_read_that_never_returns_is_named_and_holds_nobody_up_for_long(dataset: Path) -> None:
    forever = threading.Event()
    clips = Watched(dataset, lambda index: forever.wait(60))
    first = clips.rows[next(iter(sampler_of(clips)))[0]]
    started = time.monotonic()
    with (
        pytest.raises(TrainingError, match=rf"no batch for 0.2 s .*waiting for clip {first.clip_id} in .*{first.shard}"),
        Batches(clips, sampler_of(clips), 2, patience=0.2) as batches,
    ):
        next(batches)
    forever.set()
    assert time.monotonic() - started < 20


def test_closing_ends_the_threads_and_drops_what_was_read_ahead(dataset: Path) -> None:
    clips = Watched(dataset)
    batches = Batches(clips, sampler_of(clips), 3, patience=60)
    next(batches)
    batches.close()
    assert not any(thread.is_alive() for thread in batches._threads)
    count = len(clips.read)
    time.sleep(0.1)
    assert len(clips.read) == count


def test_waiting_is_counted(dataset: Path) -> None:
    clips = Watched(dataset, lambda index: time.sleep(0.1))
    with Batches(clips, sampler_of(clips), 0, patience=60) as batches:
        next(batches)
        assert batches.take_wait() >= 0.1
        assert batches.take_wait() == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory takes a GPU")
def test_batches_for_a_gpu_are_pinned(dataset: Path) -> None:
    clips = Watched(dataset)
    with Batches(clips, sampler_of(clips), 2, patience=60, pin_memory=True) as batches:
        batch = next(batches)
        assert all(value.is_pinned() for value in vars(batch).values() if isinstance(value, torch.Tensor))
        assert torch.equal(batch.to("cuda").depth[0].cpu(), clips[clips.read[0]]["depth"].float())
