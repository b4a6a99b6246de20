"""The order of clips: complete, never mixing buckets, the same for any number of ranks, exact on resume."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from fw_model.data.sampler import ResumableBucketSampler

BUCKETS = ["a"] * 13 + ["b"] * 5 + ["a"] * 6 + ["c"]

bucket_lists = st.lists(st.sampled_from("abc"), min_size=1, max_size=40)


def samplers(buckets: list[str], ranks: int, global_batch: int = 8, per_rank: int = 1, seed: int = 0) -> list:
    return [ResumableBucketSampler(buckets, global_batch, per_rank, rank, ranks, seed) for rank in range(ranks)]


def steps(group: list[ResumableBucketSampler], count: int) -> list[list[int]]:
    """The union over ranks of the next `count` global batches, sorted within each."""
    streams = [iter(sampler) for sampler in group]
    result = []
    for _ in range(count):
        batch: list[int] = []
        for sampler, stream in zip(group, streams, strict=True):
            for micro in islice(stream, sampler.accumulation):
                assert len(micro) == sampler.batch_per_rank
                batch += micro
        result.append(sorted(batch))
    return result


@given(buckets=bucket_lists, seed=st.integers(0, 2**40), per_rank=st.sampled_from([1, 2]))
@settings(deadline=None)
def test_union_over_ranks_is_the_same_for_any_number_of_ranks(buckets: list[str], seed: int, per_rank: int) -> None:
    one = steps(samplers(buckets, 1, 8, per_rank, seed), 7)
    assert steps(samplers(buckets, 2, 8, per_rank, seed), 7) == one
    assert steps(samplers(buckets, 4, 8, per_rank, seed), 7) == one
    assert steps(samplers(buckets, 1, 8, 8, seed), 7) == one


@given(buckets=bucket_lists, global_batch=st.integers(1, 12), seed=st.integers(0, 1000), epoch=st.integers(0, 3))
@settings(deadline=None)
def test_an_epoch_drops_no_clip_and_repeats_only_to_fill_the_last_batch(
    buckets: list[str], global_batch: int, seed: int, epoch: int
) -> None:
    sampler = ResumableBucketSampler(buckets, global_batch, 1, seed=seed)
    batches = sampler.global_batches(epoch)
    assert len(batches) == sampler.steps_per_epoch
    seen = Counter(batches.ravel().tolist())
    assert set(seen) == set(range(len(buckets)))
    for name, size in Counter(buckets).items():
        counts = [seen[i] for i, bucket in enumerate(buckets) if bucket == name]
        assert sum(counts) == -(-size // global_batch) * global_batch
        assert max(counts) - min(counts) <= 1


@given(buckets=bucket_lists, global_batch=st.integers(1, 12), seed=st.integers(0, 1000))
@settings(deadline=None)
def test_buckets_never_mix_within_a_global_batch(buckets: list[str], global_batch: int, seed: int) -> None:
    for batch in ResumableBucketSampler(buckets, global_batch, 1, seed=seed).global_batches(0):
        assert len({buckets[index] for index in batch.tolist()}) == 1


@given(
    buckets=bucket_lists,
    done=st.integers(0, 30),
    before=st.sampled_from([1, 2, 4]),
    after=st.sampled_from([1, 2, 4]),
)
@settings(deadline=None)
def test_resume_gives_the_same_batches_whatever_the_number_of_ranks(
    buckets: list[str], done: int, before: int, after: int
) -> None:
    uninterrupted = steps(samplers(buckets, 1), done + 5)
    first = samplers(buckets, before)
    assert steps(first, done) == uninterrupted[:done]
    for _ in range(done):
        first[0].advance()
    state = json.loads(json.dumps(first[0].state_dict()))
    second = samplers(buckets, after)
    for sampler in second:
        sampler.load_state_dict(state)
    assert steps(second, 5) == uninterrupted[done:]


def test_state_counts_what_was_trained_on_not_what_was_drawn_ahead() -> None:
    sampler = ResumableBucketSampler(BUCKETS, 4, 2)
    loader = DataLoader(list(range(len(BUCKETS))), batch_sampler=sampler, collate_fn=list, num_workers=1, prefetch_factor=4)
    stream = iter(loader)
    expected = list(islice(iter(sampler), 8))
    assert [next(stream), next(stream)] == expected[:2]
    assert sampler.state_dict()["consumed"] == 0
    sampler.advance()
    assert sampler.state_dict()["consumed"] == 4
    resumed = ResumableBucketSampler(BUCKETS, 4, 2)
    resumed.load_state_dict(sampler.state_dict())
    assert list(islice(iter(resumed), 6)) == expected[2:]


def test_epochs_and_seeds_differ() -> None:
    sampler = ResumableBucketSampler(BUCKETS, 4, 1)
    first = sampler.global_batches(0).tolist()
    assert first != sampler.global_batches(1).tolist()
    assert first != ResumableBucketSampler(BUCKETS, 4, 1, seed=1).global_batches(0).tolist()
    assert first == ResumableBucketSampler(BUCKETS, 4, 1).global_batches(0).tolist()


def test_order_is_this_one_on_every_machine() -> None:
    """Pinned: a changed shuffle would silently change what a resumed run sees."""
    batches = ResumableBucketSampler(["a"] * 5 + ["b"] * 2, 2, 1, seed=7).global_batches(3)
    assert batches.tolist() == [[0, 1], [3, 4], [5, 6], [2, 3]]


def test_indices_tell_the_epoch_when_asked_to() -> None:
    plain, telling = (ResumableBucketSampler(BUCKETS, 4, 2, tell_epoch=told) for told in (False, True))
    per_epoch = plain.steps_per_epoch * plain.accumulation
    for count, (indices, told) in enumerate(islice(zip(plain, telling, strict=True), 3 * per_epoch)):
        assert told == [count // per_epoch * len(BUCKETS) + index for index in indices]


def test_epoch_rolls_over() -> None:
    sampler = ResumableBucketSampler(BUCKETS, 4, 1)
    assert sampler.steps_per_epoch == 5 + 2 + 1
    sampler.advance(7)
    assert (sampler.epoch, sampler.state_dict()["consumed"]) == (0, 28)
    sampler.advance()
    assert (sampler.epoch, sampler.state_dict()["consumed"]) == (1, 0)


def test_shuffle_is_fair() -> None:
    """Every clip comes first about equally often."""
    sampler = ResumableBucketSampler(["a"] * 4, 4, 1)
    first = Counter(sampler.global_batches(epoch)[0][0] for epoch in range(2000))
    assert all(400 < first[i] < 600 for i in range(4))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("seed", 3, "another seed"), ("global_batch", 2, "another global batch"), ("buckets", "x", "another dataset")],
)
def test_a_state_of_another_order_is_refused(key: str, value: object, message: str) -> None:
    sampler = ResumableBucketSampler(BUCKETS, 4, 1)
    with pytest.raises(ValueError, match=message):
        sampler.load_state_dict({**sampler.state_dict(), key: value})


@pytest.mark.parametrize("change", [{"consumed": 2}, {"consumed": -4}, {"consumed": 32}, {"epoch": -1}])
def test_a_state_that_is_no_step_is_refused(change: dict[str, int]) -> None:
    sampler = ResumableBucketSampler(BUCKETS, 4, 1)
    with pytest.raises(ValueError, match="not a step"):
        sampler.load_state_dict({**sampler.state_dict(), **change})
    with pytest.raises(ValueError, match="expected the keys"):
        sampler.load_state_dict({"epoch": 0})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 4, 1), "no clips"),
        ((["a"], 4, 3), "not a multiple"),
        ((["a"], 4, 1, 0, 3), "not a multiple"),
        ((["a"], 4, 1, 2, 2), "within 0..1"),
        ((["a"], 0, 1), "must be positive"),
    ],
)
def test_impossible_batches_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResumableBucketSampler(*arguments)
