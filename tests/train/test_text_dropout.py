"""Prompts give way to the empty one as often as `text_dropout` says, by a draw that depends on nothing else, and never in
validation; a run on features that its encoders would not make is refused with both sides named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fw_model.config import Preset, load_preset
from fw_model.data.dataset import ClipDataset, collate
from fw_model.data.opening import open_dataset
from fw_model.data.schema import Batch
from fw_model.errors import DatasetError, TrainingError
from fw_model.train import loop as train
from fw_model.train import objective
from fw_model.train.metrics_log import read_metrics
from tests.helpers.made_scenes import pack_scenes

SMALL = [
    *("clip.frames=5", "clip.short_side=32", "clip.long_side=48"),
    *("model.wan.dim=32", "model.wan.ffn_dim=32", "model.wan.num_heads=2", "model.wan.num_layers=4"),
    *("model.geometry.pcb_blocks=2", "model.geometry.head_layers=[1, 1, 2, 2]", "model.geometry.head_features=8"),
    *("model.geometry.head_channels=[4, 4, 8, 8]", "model.geometry.camera_dim=32", "model.geometry.cross_dim=24"),
    *("stage1.steps=1", "stage1.log_every=1", "stage1.validation_clips=1", "stage1.trackers=[]"),
]


def small_preset(*overrides: str) -> Preset:
    return load_preset("tiny", [*SMALL, *overrides])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_scenes(tmp_path_factory.mktemp("data") / "dataset", small_preset(), train=2, val=1)


def thin(dataset: Path) -> Batch:
    batch = collate([ClipDataset(dataset, "val", 32)[0]])
    return Batch(**{**vars(batch), "latents": batch.latents[..., :1, :1]})


def test_the_configured_share_of_clips_is_trained_on_with_the_empty_prompt(dataset: Path) -> None:
    batch, config = thin(dataset), small_preset("stage1.text_dropout=0.25").stage1
    draws = [objective.training_draws(batch, config, step, 0) for step in range(400)]
    assert 0.68 < sum(float(d.text_mask) for d in draws) / 400 < 0.82
    again = objective.training_draws(batch, config, 7, 0)
    assert torch.equal(draws[7].text_mask, again.text_mask)
    none = objective.training_draws(batch, small_preset("stage1.text_dropout=0").stage1, 7, 0)
    for name in ("noise", "timestep", "pose_mask"):  # the knob moves no other draw
        assert torch.equal(getattr(none, name), getattr(again, name))
    assert none.text_mask.all()
    assert objective.validation_draws(batch, 0, 0, 1).text_mask.all()


@pytest.mark.parametrize(
    ("knob", "mask"), [("image_dropout", "image_mask"), ("clip_dropout", "clip_mask"), ("camera_probability", "camera_mask")]
)
def test_the_configured_share_of_clips_is_trained_without_image_features_or_camera(dataset: Path, knob: str, mask: str) -> None:
    batch, config = thin(dataset), small_preset(f"stage1.{knob}=0.25").stage1
    draws = [objective.training_draws(batch, config, step, 0) for step in range(400)]
    share = sum(float(getattr(d, mask)) for d in draws) / 400
    expected = 0.25 if knob == "camera_probability" else 0.75
    assert share == pytest.approx(expected, abs=0.07)
    other = objective.training_draws(batch, small_preset(f"stage1.{knob}=0").stage1, 7, 0)
    for name in set(vars(other)) - {mask}:  # the knob moves no other draw
        assert torch.equal(getattr(other, name), getattr(draws[7], name))


def test_a_clip_without_image_is_asked_for_as_the_base_is_with_a_prompt_alone(dataset: Path) -> None:
    batch, seen = collate([ClipDataset(dataset, "val", 32)[0]]).to("cpu"), {}

    def model(
        noisy: torch.Tensor, image: torch.Tensor, time: torch.Tensor, text: torch.Tensor, features: torch.Tensor, *_, **masks
    ):
        seen.update(image=image, features=features, **masks)

    draws = objective.fixed_draws(batch, 500.0, torch.Generator())
    objective.predict(model, batch, draws)
    assert torch.equal(seen["image"][:, :, 0], batch.latents[:, :, 0])
    assert torch.equal(seen["features"], batch.image)
    for mask in ("image_mask", "clip_mask", "camera_mask"):
        getattr(draws, mask)[:] = False
    objective.predict(model, batch, draws)
    assert not seen["image"].any()
    assert not seen["features"].any()
    assert not seen["camera_mask"].any()


def test_the_empty_prompts_own_embedding_takes_the_place(dataset: Path) -> None:
    clips = ClipDataset(dataset, "train", 32)
    batch, empty = collate([clips[0], clips[0]]), clips.empty_text()
    assert empty.abs().sum() > 0
    draws = objective.fixed_draws(batch, 500.0, torch.Generator())
    draws.text_mask[1] = False
    dropped = objective.drop_text(batch, draws, empty)
    assert torch.equal(dropped.text[0], batch.text[0])
    assert torch.equal(dropped.text[1], empty)
    assert torch.equal(dropped.latents, batch.latents)


def test_training_reads_the_knob(dataset: Path, tmp_path: Path) -> None:
    losses = []
    for share in (0, 1):
        train.train(small_preset(f"stage1.text_dropout={share}"), "stage1", dataset, tmp_path / str(share))
        losses.append(next(m["loss/total"] for m in read_metrics(tmp_path / str(share) / "metrics.jsonl") if "loss/total" in m))
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("override", "both"),
    [
        ("encoders.weights.seed=1", r"made by vae 'seeded:0 vae .*', but this run needs 'seeded:1 vae"),
        ("encoders.dtype=bfloat16", r"made by vae '.*float32, v2\)', but this run needs '.*bfloat16, v2\)'"),
        ("encoders.vae_dim=12", r"made by vae '.*width 8.*', but this run needs '.*width 12"),
        ("encoders.text_layers=1", r"made by text '.*32 x 2.*', but this run needs '.*32 x 1"),
        ("encoders.image_size=64", r"made by image '.*32 px / 8.*', but this run needs '.*64 px / 8"),
        ("clip.frames=9", r"in bucket 32x48x5, the preset's are 32x48x9 and 48x32x9"),
        ("clip.long_side=64", r"in bucket (48x32|32x48)x5, the preset's are 32x64x5 and 64x32x5"),
    ],
)
def test_features_of_another_configuration_are_refused_with_both_sides(dataset: Path, override: str, both: str) -> None:
    open_dataset(dataset, small_preset())
    with pytest.raises((DatasetError, TrainingError), match=both):
        open_dataset(dataset, small_preset(override))
