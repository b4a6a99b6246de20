"""Which split a video belongs to: by its path alone, stable, and never empty."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fw_model.data.splits import assign_splits, split_of

names = st.lists(st.text("abcdef/", min_size=1, max_size=12), max_size=30, unique=True)


@given(videos=names, percent=st.sampled_from([1, 10, 50, 99]))
@settings(deadline=None)
def test_neither_split_is_empty_when_there_are_two_videos(videos: list[str], percent: int) -> None:
    splits = assign_splits(videos, percent)
    assert set(splits) == set(videos)
    if len(videos) >= 2:
        assert set(splits.values()) == {"train", "val"}
    elif videos:
        assert splits[videos[0]] == "train"


@given(videos=names, more=names)
@settings(deadline=None)
def test_adding_videos_moves_at_most_the_one_that_stood_in(videos: list[str], more: list[str]) -> None:
    before, after = assign_splits(videos), assign_splits([*videos, *more])
    moved = [video for video in before if before[video] != after[video]]
    assert len(moved) <= 1
    assert all(before[video] != split_of(video) or after[video] != split_of(video) for video in moved)


@given(videos=names)
@settings(deadline=None)
def test_split_does_not_depend_on_the_order_of_videos(videos: list[str]) -> None:
    assert assign_splits(videos) == assign_splits(videos[::-1])


def test_split_shares_are_as_asked() -> None:
    videos = [f"folder/{i}.mp4" for i in range(5000)]
    for percent in (0, 10, 50, 100):
        share = sum(split == "val" for split in assign_splits(videos, percent).values()) / len(videos)
        assert share == pytest.approx(percent / 100, abs=0.02)
    assert assign_splits(videos[:3], 0) == dict.fromkeys(videos[:3], "train")


def test_split_of_a_path_is_this_one_on_every_machine() -> None:
    assert [split_of(f"{name}.mp4", 50) for name in "abcdef"] == ["val", "val", "train", "val", "train", "train"]


def test_an_impossible_share_is_refused() -> None:
    with pytest.raises(ValueError, match="val_percent"):
        assign_splits(["a"], 101)
