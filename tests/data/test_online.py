"""Clips encoded while training give the batches that the cache gives, and pictures that are not the clip's are named."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fw_model.config import load_preset
from fw_model.data.dataset import ClipDataset, collate
from fw_model.data.online import OnlineEncodedClips, decode_video, encode_video
from fw_model.data.schema import ClipRecord
from fw_model.data.shard_writer import ShardWriter
from fw_model.data.verify import verify
from fw_model.errors import DatasetError
from fw_model.model.encoders import Encoders
from tests.helpers.made_clips import make_record


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    preset = load_preset("tiny")
    return Encoders.from_config(preset.encoders, preset.model.wan.text_len)


def frames_of(clip_id: str) -> np.ndarray:
    return np.random.default_rng(ord(clip_id)).integers(0, 256, (5, 32, 48, 3), dtype=np.uint8)


def raw_record(clip_id: str, frames: np.ndarray) -> ClipRecord:
    record = make_record(clip_id)
    kept = {name: array for name, array in record.arrays.items() if name not in ("latents", "image")}
    return replace(record, arrays={**kept, "video": encode_video(frames, 16.0)})


def test_a_clip_encoded_while_training_equals_the_cached_one(tmp_path: Path, encoders: Encoders) -> None:
    with ShardWriter(tmp_path / "raw") as writer:
        for clip_id in "ab":
            writer.add(raw_record(clip_id, frames_of(clip_id)), "train")
    with ShardWriter(tmp_path / "cached") as writer:
        for clip_id in "ab":
            record, frames = make_record(clip_id), frames_of(clip_id)
            encoded = {"latents": encoders.encode_video(frames), "image": encoders.encode_image(frames[0])}
            for prompt in ("", record.prompt):
                writer.add_text(prompt, encoders.encode_text(prompt), encoders.identities["text"])
            versions = {**record.versions, **encoders.identities}
            writer.add(replace(record, arrays={**record.arrays, **encoded}, versions=versions), "train")
    assert verify(tmp_path / "raw") == []
    online = OnlineEncodedClips(tmp_path / "raw", "train", encoders)
    cached = ClipDataset(tmp_path / "cached", "train", encoders.text_len, versions=encoders.identities)
    assert online.buckets == cached.buckets
    got, wanted = (collate([clips[0], clips[1]]).to("cpu") for clips in (online, cached))
    for name, value in vars(wanted).items():
        assert torch.equal(getattr(got, name), value) if isinstance(value, torch.Tensor) else getattr(got, name) == value, name
    assert torch.equal(online.empty_text(), cached.empty_text())


def test_frames_come_back_from_the_file_exactly() -> None:
    np.testing.assert_array_equal(decode_video(encode_video(frames_of("a"), 16.0).tobytes()), frames_of("a"))


def test_pictures_that_are_not_the_clips_are_named(tmp_path: Path, encoders: Encoders) -> None:
    with ShardWriter(tmp_path / "d") as writer:
        writer.add(raw_record("a", frames_of("a")[:4]), "train")
        record = raw_record("b", frames_of("b"))
        writer.add(replace(record, arrays={**record.arrays, "video": np.zeros(9, np.uint8)}), "train")
    clips = OnlineEncodedClips(tmp_path / "d", "train", encoders)
    with pytest.raises(DatasetError, match=r"clip a: its video is \[4, 32, 48\] .*its bucket 32x48x5"):
        clips[0]
    with pytest.raises(DatasetError, match="clip b: its video cannot be decoded"):
        clips[1]


def test_each_kind_of_dataset_says_how_the_other_is_read(tmp_path: Path, encoders: Encoders) -> None:
    with ShardWriter(tmp_path / "d") as writer:
        writer.add(raw_record("a", frames_of("a")), "train")
    with pytest.raises(DatasetError, match=r"clip a is not encoded yet .*OnlineEncodedClips"):
        ClipDataset(tmp_path / "d", "train", 8)


def test_threads_that_share_the_encoders_get_what_one_alone_gets(encoders: Encoders) -> None:
    """Wan's VAE keeps the frames before in itself while it encodes, and the tokenizer its settings."""
    frames = {clip_id: np.concatenate([frames_of(clip_id)] * 2)[:9] for clip_id in "abcd"}
    alone = {clip_id: (encoders.encode_video(video), encoders.encode_text(clip_id)) for clip_id, video in frames.items()}

    def same(clip_id: str) -> bool:
        latents, text = encoders.encode_video(frames[clip_id]), encoders.encode_text(clip_id)
        return np.array_equal(latents, alone[clip_id][0]) and np.array_equal(text, alone[clip_id][1])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(same, "abcd" * 4))
