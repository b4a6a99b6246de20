"""Losses on clips that are never trained on, with the same noise, timesteps and clips every time.

Beside the losses stand what they hide: each band of noise by itself, the cameras with the true camera given to the base,
withheld and another clip's, and what a constant scores.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset

from fw_model.config import Stage, StageConfig
from fw_model.data.dataset import collate
from fw_model.data.schema import Batch
from fw_model.model.fantasy_world import FantasyWorldOutput
from fw_model.train.baseline import constant_prediction
from fw_model.train.losses import camera_loss, geometry_losses, make_targets, rotation_degrees
from fw_model.train.objective import LOSS_NAMES, Draws, autocast, compute_losses, predict, validation_draws

# By share of noise. Geometry is read in the first; the base's shifted schedule has 2 % of its draws there and 56 % in the last.
BANDS = {"low": (0.0, 0.1), "middle": (0.1, 0.8), "high": (0.8, 1.0)}


@torch.no_grad()
def validate(
    model: torch.nn.Module, clips: Dataset, stage: Stage, config: StageConfig, accelerator: Accelerator
) -> dict[str, float]:
    """Mean losses over the first `config.validation_clips` clips, one at a time, shared out over the processes.

    Every process runs the same number of clips (some a clip again, not counted): a sharded model is gathered by all together.
    Pose tokens are withheld from the geometry branch (see `objective.validation_draws`).

    Args:
        model: on `accelerator.device`, not wrapped; comes back in training mode.
        clips: a ClipDataset.
        stage: decides which losses there are.
        config: gives `validation_clips`, `seed`, precision and loss weights.
        accelerator: gives the device and the processes.

    Returns:
        The same on every process. By name: each of `LOSS_NAMES[stage]`, the mean over `BANDS`; "low/depth_loss" and so on, a
        band alone; "camera_given/loss", "camera_withheld/..." and "camera_other/..." with "degrees" of rotation, in the lowest
        band, against the clip's true camera ("other" only where there are two clips); "constant/..." of `constant_prediction`.
    """
    count = min(config.validation_clips, len(clips))  # type: ignore[arg-type]
    sums: dict[str, Tensor] = {}
    model.eval()
    for first in range(0, count, accelerator.num_processes):
        place = (first + accelerator.process_index) % count
        batch = collate([clips[place]]).to(accelerator.device)
        other = collate([clips[(place + 1) % count]]).w2c.to(accelerator.device).float() if count > 1 else None
        values = _clip_values(model, batch, other, stage, config, (place, count))
        counted = float(first + accelerator.process_index < count)
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + counted * value
    model.train()
    means = accelerator.reduce(torch.stack(list(sums.values())), "sum") / count
    return dict(zip(sums, means.tolist(), strict=True))


def _clip_values(
    model: torch.nn.Module, batch: Batch, other: Tensor | None, stage: Stage, config: StageConfig, place: tuple[int, int]
) -> dict[str, Tensor]:
    """The numbers of one clip; `other`: w2c of another one."""
    device, targets = batch.latents.device, make_targets(batch, config.dynamic)

    def read(shown: Batch, draws: Draws) -> FantasyWorldOutput:
        with autocast(config, device):
            return predict(model, shown, draws)

    def camera_numbers(encodings: list[Tensor]) -> dict[str, Tensor]:
        truth = targets.pose_encoding
        return {"loss": camera_loss(encodings, truth), "degrees": rotation_degrees(encodings[-1], truth)}

    drawn = {band: validation_draws(batch, config.seed, *place, limits).to(device) for band, limits in BANDS.items()}
    bands, cameras, low = {}, {}, drawn["low"]
    for band, draws in drawn.items():
        output = read(batch, draws)
        bands[band] = compute_losses(output, batch, draws, stage, config)
        if draws is low:
            cameras["given"] = camera_numbers(output.pose_encodings)
    blind = replace(low, camera_mask=torch.zeros_like(low.camera_mask))
    cameras["withheld"] = camera_numbers(read(batch, blind).pose_encodings)
    if other is not None:
        cameras["other"] = camera_numbers(read(replace(batch, w2c=other), low).pose_encodings)
    constant = constant_prediction(batch)
    constants = geometry_losses(constant, targets, config.loss_quantile)
    return {
        **{name: torch.stack([losses[name] for losses in bands.values()]).mean() for name in LOSS_NAMES[stage]},
        **{f"{band}/{name}": losses[name] for band, losses in bands.items() for name in LOSS_NAMES[stage]},
        **{f"camera_{case}/{name}": value for case, values in cameras.items() for name, value in values.items()},
        **{f"constant/{name}": value for name, value in constants.items()},
        "constant/degrees": camera_numbers(constant.pose_encodings)["degrees"],
    }
