"""A model as training left it, from its checkpoint alone: what reports and generation run."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from fw_model.config import Stage
from fw_model.model.fantasy_world import FantasyWorld
from fw_model.train.checkpoints import CheckpointError, latest_checkpoint, load_checkpoint
from fw_model.train.identity import CheckpointMetadata, read_metadata
from fw_model.train.objective import base_dtype
from fw_model.train.run_folder import base_hash, check_base_hash

WhichWeights = Literal["raw", "ema"]


def find_checkpoint(path: Path, weights: WhichWeights | None = None) -> Path:
    """The file to read: `path` itself or, of a folder, its newest; `weights` chooses between a step's own and their average.

    Raises CheckpointError when there is none such.
    """
    if path.is_dir():
        newest = latest_checkpoint(path)
        if newest is None:
            raise CheckpointError(f"{path}: no step-N.safetensors; train first, e.g. dagster job execute -j stage2_training")
        path = newest
    if weights is None:
        return path
    stem = path.name.removesuffix(".safetensors").removesuffix(".ema")
    chosen = path.with_name(f"{stem}.ema.safetensors" if weights == "ema" else f"{stem}.safetensors")
    if weights == "ema" and not chosen.is_file() and path.is_file():
        raise CheckpointError(f"{chosen}: no moving average was kept", "Train with ema_decay above 0, or take the raw weights")
    return chosen


def check_trained(path: Path, stage: Stage | None = None, base: str | None = None) -> CheckpointMetadata:
    """A checkpoint's header, before anything big is read.

    Args:
        path: a `step-N.safetensors`.
        stage: the stage it must be of; None: either.
        base: another place, folder or hub id, where the base's published weights lie.

    Raises CheckpointError: not ours, damaged, another model version or stage, a base that is not the one trained on.
    """
    metadata = read_metadata(path)
    if stage is not None and metadata.stage != stage:
        raise CheckpointError(
            f"{path}: a {metadata.stage} checkpoint; a {stage} checkpoint is needed",
            "Stage 1 trains geometry on a frozen video model and has no video of its own: train stage 2 from it"
            if metadata.stage == "stage1"
            else "",
        )
    if base is None:
        return metadata
    given = metadata.preset.base
    if given.source == "seeded":
        raise CheckpointError(f"{path}: trained on base {given.identity!r}, which is drawn from its seed; give no other base")
    moved = given.model_copy(update={"repo": base})
    if metadata.base_hash:
        check_base_hash(path, metadata, base_hash(moved))
    preset = metadata.preset.model_copy(update={"base": moved})
    return CheckpointMetadata(**{**vars(metadata), "preset": preset})


def load_trained(path: Path, metadata: CheckpointMetadata, device: torch.device | str = "cpu") -> FantasyWorld:
    """The model of a checkpoint in its stage, in evaluation mode, its base stored as it was while training.

    metadata: of `check_trained`. Raises CheckpointError, BaseModelError.
    """
    model = FantasyWorld.from_preset(metadata.preset)
    trained_on = metadata.preset.model_copy(update={"base": read_metadata(path).preset.base})
    load_checkpoint(path, model, metadata.stage, trained_on)
    model.base.to(base_dtype(metadata.preset.stage(metadata.stage)))
    return model.to(device).eval()
