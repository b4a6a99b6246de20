"""Losses on clips that are never trained on, with the same noise, timesteps and clips every time."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch.utils.data import Dataset

from fw_model.config import Stage, StageConfig
from fw_model.data.dataset import collate
from fw_model.train.objective import LOSS_NAMES, autocast, compute_losses, predict, validation_draws


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
        Loss name -> mean, for `LOSS_NAMES[stage]`; the same on every process.
    """
    count = min(config.validation_clips, len(clips))  # type: ignore[arg-type]
    sums = torch.zeros(len(LOSS_NAMES[stage]), device=accelerator.device)
    model.eval()
    for first in range(0, count, accelerator.num_processes):
        place = (first + accelerator.process_index) % count
        batch = collate([clips[place]])
        draws = validation_draws(batch, config.seed, place, count).to(accelerator.device)
        batch = batch.to(accelerator.device)
        with autocast(config, accelerator.device):
            output = predict(model, batch, draws)
        losses = compute_losses(output, batch, draws, stage, config)
        if first + accelerator.process_index < count:
            sums += torch.stack([losses[name] for name in LOSS_NAMES[stage]])
    model.train()
    means = accelerator.reduce(sums, "sum") / count
    return dict(zip(LOSS_NAMES[stage], means.tolist(), strict=True))
