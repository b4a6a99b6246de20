"""Training that encodes pictures on the way: augmentations resume exactly, validation has none, what cannot work is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fw_model.config import ConfigError, Preset
from fw_model.data.augment import AugmentDraw, RawClip, augment_clip, draw_augment
from fw_model.data.online import OnlineEncodedClips, decode_video, encode_video
from fw_model.data.opening import open_dataset, open_online
from fw_model.data.shard_writer import ShardWriter
from fw_model.errors import DatasetError, TrainingError
from fw_model.train import loop as train
from fw_model.train import run as training_run
from fw_model.train.checkpoints import read_metadata
from fw_model.train.identity import run_identity
from tests.helpers.made_scenes import made_scene, pack_scenes
from tests.helpers.training import no_model, numbers, small_preset, stop_at

AUGMENT = ("stage1.augment.flip=0.5", "stage1.augment.reverse=0.5", "stage1.augment.strides=[1, 2]")


def online_preset(*overrides: str) -> Preset:
    return small_preset("stage1.encode_online=true", "stage1.steps=4", "stage1.validate_every=4", *overrides)


def pack_pictures(path: Path, preset: Preset, frames: int, splits: dict[str, str]) -> Path:
    with ShardWriter(path) as writer:
        for name, split in splits.items():
            record = made_scene(name, preset, frames)
            rng = np.random.default_rng(list(name.encode()))
            pictures = rng.integers(0, 256, (frames, 32, 48, 3), dtype=np.uint8)
            kept = {key: array for key, array in record.arrays.items() if key not in ("latents", "image")}
            arrays = kept | {"video": encode_video(pictures, record.fps)}
            writer.add(replace(record, arrays=arrays, versions={"geometry": "truth:1"}), split)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of 9 frames: windows of 5, or every second one."""
    splits = {"train-0": "train", "train-1": "train", "train-2": "train", "val-0": "val"}
    return pack_pictures(tmp_path_factory.mktemp("pictures") / "dataset", small_preset(), 9, splits)


def test_an_augmented_run_resumes_exactly_and_with_any_number_of_workers(pictures: Path, tmp_path: Path) -> None:
    train.train(online_preset(*AUGMENT), "stage1", pictures, tmp_path / "whole")
    with pytest.raises(train.Interrupted):
        train.train(online_preset(*AUGMENT), "stage1", pictures, tmp_path / "cut", on_metrics=stop_at(2))  # 2 steps an epoch
    result = train.train(online_preset(*AUGMENT, "stage1.workers=1"), "stage1", pictures, tmp_path / "cut")
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    assert result.validation_split == "val"
    assert read_metadata(tmp_path / "cut" / result.checkpoint).preset.stage1.augment is not None
    report_clips = open_dataset(pictures, online_preset(*AUGMENT), "stage1")[1]
    assert len(report_clips) == 1


def test_each_epoch_draws_anew_and_validation_is_left_as_it_is(pictures: Path) -> None:
    preset = online_preset(*AUGMENT)
    clips, held_out = open_online(pictures, preset, preset.stage1, "cpu")
    assert clips.buckets == ["32x48x5"] * 3
    config = preset.stage1.augment
    assert config is not None

    def wanted(source: OnlineEncodedClips, index: int, draw: AugmentDraw) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        row = source.rows[index]
        arrays = dict(source._reader.read(row))
        stored = RawClip(decode_video(arrays.pop("video").tobytes()), **arrays, scale=row.scale, fps=row.fps)
        after = augment_clip(stored, draw)
        latents = source.encoders.encode_video(after.frames)
        return tuple(torch.from_numpy(a.astype(np.float32)) for a in (latents, after.depth, after.w2c))  # type: ignore[return-value]

    draws = [draw_augment(config, 5, 9, preset.stage1.seed, epoch, 1) for epoch in range(3)]
    assert len(set(draws)) == 3
    pairs = [(clips[epoch * len(clips) + 1], wanted(clips, 1, draw)) for epoch, draw in enumerate(draws)]
    pairs.append((held_out[0], wanted(held_out, 0, AugmentDraw(5))))
    for sample, expected in pairs:
        for name, value in zip(("latents", "depth", "w2c"), expected, strict=True):
            assert torch.equal(sample[name].float(), value), name


def test_what_cannot_work_is_refused_before_a_model_or_an_encoder_is_built(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_run.FantasyWorld, "from_preset", no_model)
    monkeypatch.setattr("fw_model.model.encoders.Encoders.from_config", no_model)

    def run(preset: Preset, dataset: Path = pictures) -> None:
        train.train(preset, "stage1", dataset, tmp_path / "run")

    with pytest.raises(DatasetError, match=r"has 9 frames, the preset's clips 5; train with clip.frames=9, or with augment"):
        run(online_preset())
    with pytest.raises(DatasetError, match=r"a stride of 3 needs clips of 13 frames to give 5, the longest has 9; leave 3 out"):
        run(online_preset("stage1.augment.strides=[1, 3]"))
    with pytest.raises(DatasetError, match=r"has 9 frames, a clip of 5 needs 13"):
        run(online_preset("stage1.augment.strides=[3]"))
    with pytest.raises(DatasetError, match=r"is in bucket 32x48x9, the preset's are .*clip.size=32x48"):
        run(online_preset("clip.size=48x64", *AUGMENT))
    with pytest.raises(DatasetError, match=r"not encoded yet .*encode_online: true"):
        run(small_preset())
    cached = pack_scenes(tmp_path / "cached", small_preset(), train=1, val=0)
    with pytest.raises(DatasetError, match=r"is encoded already .*encode_online: false"):
        run(online_preset(), cached)
    preset = online_preset(*AUGMENT, "stage1.workers=2")
    with pytest.raises(ConfigError, match=r"encoders run on cuda, .*set workers: 0"):
        open_online(pictures, preset, preset.stage1, "cuda")


def test_missing_encoder_weights_are_a_named_error(pictures: Path) -> None:
    hub = ("encoders.weights.source=hub", "encoders.weights.repo=/nowhere/encoders")
    with pytest.raises(TrainingError, match=r"could not load '/nowhere/encoders'"):
        open_dataset(pictures, online_preset(*AUGMENT, *hub), "stage1")


def test_without_validation_clips_the_training_clips_stand_in_unchanged(tmp_path: Path) -> None:
    dataset = pack_pictures(tmp_path / "d", small_preset(), 9, {"a": "train", "b": "train"})
    clips, held_out = open_dataset(dataset, online_preset(*AUGMENT), "stage1")
    assert isinstance(clips, OnlineEncodedClips)
    assert isinstance(held_out, OnlineEncodedClips)
    assert (held_out.split, len(held_out), held_out.augment) == ("train", 2, None)
    assert clips.augment is not None


def test_encoders_and_length_are_part_of_a_run_that_encodes() -> None:
    """Cached latents name their encoders in the dataset's digest; pictures cannot."""

    for change in ("encoders.weights.seed=1", "clip.frames=9"):
        for make, counts in ((online_preset, True), (small_preset, False)):
            before, after = (run_identity(preset, "stage1", "d").config_digest for preset in (make(), make(change)))
            assert (before != after) == counts, (change, make.__name__)
