"""A GPU that ran out of memory, said in one line with what to change: the memory plan's remedies, mildest first."""

from __future__ import annotations

import torch

from fw_model.config import Preset, Stage
from fw_model.errors import TrainingError

GIB = 2**30


def explain_out_of_memory(error: torch.OutOfMemoryError, preset: Preset, stage: Stage, processes: int) -> TrainingError:
    """What to raise in place of `error`: what was tried where, the next remedy, and the command that plans with numbers."""
    config, clip = preset.stage(stage), preset.clip
    where, gib = "the GPU", 0.0
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(torch.cuda.current_device())
        where, gib = f"{device.name} of {device.total_memory / GIB:.0f} GiB", device.total_memory / GIB
    memory = f" --gpu-memory {gib:.0f}" if gib else ""
    tried = str(error).strip().split(". ")[0]
    return TrainingError(
        f"out of memory on {where}: {stage}, {config.batch_per_device} clip(s) a micro-batch of "
        f"{clip.frames}x{clip.short_side}x{clip.long_side} ({tried}). {remedy(preset, stage, processes)}. "
        f"What fits: python -m fw_model.describe --preset {preset.name}{memory} --gpus {processes}"
    )


def remedy(preset: Preset, stage: Stage, processes: int) -> str:
    """The mildest change that a stage has not made yet: first what gives the same result, then smaller clips."""
    config, clip = preset.stage(stage), preset.clip
    share = config.global_batch // processes
    smaller = [batch for batch in range(1, config.batch_per_device) if share % batch == 0]
    again = "run the same line again, it goes on from the last state, with"
    if smaller:
        return f"Same result in less memory: {again} {stage}.batch_per_device={smaller[-1]}"
    if not config.gradient_checkpointing:
        return f"Same result in less memory: {again} {stage}.gradient_checkpointing=true"
    if processes > 1 and config.sharding == "none" and config.optimizer == "adamw" and not config.offload_optimizer:
        return f"Same result in less memory: {again} {stage}.sharding=fsdp"
    if config.sharding == "none" and config.optimizer == "adamw" and not config.offload_optimizer:
        return f"Same result in less memory: {again} {stage}.offload_optimizer=true"
    if clip.frames > 41:
        return "Pack a dataset of shorter or smaller clips and train on it: clip.frames=41, clip.size=288x512"
    return "Pack a dataset of smaller clips and train on it (clip.size, clip.frames), or take GPUs with more memory"
