"""Validation says what one number hides: each band of noise, cameras given and not, and what seeing nothing would score."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from fw_model.data.dataset import ClipDataset, collate
from fw_model.model.fantasy_world import FantasyWorld
from fw_model.train.baseline import constant_prediction
from fw_model.train.losses import geometry_losses, make_targets, rotation_degrees
from fw_model.train.objective import LOSS_NAMES
from fw_model.train.validation import BANDS, validate
from tests.helpers.training import small_preset


@pytest.fixture(scope="module")
def watched(dataset: Path) -> tuple[dict[str, float], list[dict[str, Tensor]]]:
    """The numbers of two clips, and what the model was asked."""
    preset, asked = small_preset(), []
    model = FantasyWorld.from_preset(preset)

    def remember(module: FantasyWorld, args: tuple[Tensor, ...], masks: dict[str, Tensor]) -> None:
        asked.append({"timestep": args[2], "camera": args[5], **masks})

    model.register_forward_pre_hook(remember, with_kwargs=True)
    return validate(model, ClipDataset(dataset, "val", 32), "stage1", preset.stage1, Accelerator()), asked


def test_losses_are_the_mean_of_the_bands_and_each_band_is_seen(
    watched: tuple[dict[str, float], list[dict[str, Tensor]]],
) -> None:
    values, asked = watched
    for name in LOSS_NAMES["stage1"]:
        assert values[name] == pytest.approx(sum(values[f"{band}/{name}"] for band in BANDS) / len(BANDS))
    for low, high in BANDS.values():
        assert any(low < float(call["timestep"]) / 1000 < high for call in asked)


def test_cameras_are_read_with_the_true_one_given_withheld_and_with_another_clips(
    watched: tuple[dict[str, float], list[dict[str, Tensor]]],
) -> None:
    values, asked = watched
    first = asked[: len(BANDS) + 2]
    assert [bool(call["camera_mask"]) for call in first] == [True, True, True, False, True]
    assert torch.equal(first[0]["camera"], first[3]["camera"])
    assert not torch.equal(first[0]["camera"], first[4]["camera"])
    assert not any(call["pose_mask"].any() for call in asked)
    assert all(
        math.isfinite(values[f"camera_{case}/{name}"]) for case in ("given", "withheld", "other") for name in ("loss", "degrees")
    )
    assert values["camera_given/loss"] == pytest.approx(values["low/camera_loss"])
    assert values["camera_withheld/loss"] != values["camera_given/loss"] != values["camera_other/loss"]


def test_the_constant_is_a_wall_before_a_still_camera(dataset: Path) -> None:
    batch = collate([ClipDataset(dataset, "val", 32)[0]]).to("cpu")
    batch = replace(batch, depth=torch.full_like(batch.depth, 2.0), w2c=torch.eye(3, 4).expand_as(batch.w2c))
    losses = geometry_losses(constant_prediction(batch), make_targets(batch))
    assert losses["depth_error"] == losses["point_loss"] == losses["camera_loss"] == 0
    empty = replace(batch, depth=torch.zeros_like(batch.depth))
    assert all(value.isfinite() for value in geometry_losses(constant_prediction(empty), make_targets(empty)).values())


@pytest.mark.parametrize("degrees", [0.01, 5.0, 90.0, 179.0])
def test_degrees_are_the_angle_between_rotations(degrees: float) -> None:
    half = math.radians(degrees) / 2
    turned, still = torch.zeros(1, 3, 9), torch.zeros(1, 3, 9)
    turned[..., 4], turned[..., 6], still[..., 6] = -math.sin(half), -math.cos(half), 1.0
    assert float(rotation_degrees(turned, still)) == pytest.approx(degrees, rel=1e-3)
