"""What the parts of gpu_check.py measure with: the model with random weights, training steps, peaks, kernels."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from middle_model import FULL, MIDDLE, Size
from torch import nn

from fw_model.config import Preset, Stage, StageConfig
from fw_model.describe.step_trace import ClipSize, step_inputs, store_in_bfloat16
from fw_model.model.fantasy_world import FantasyWorld
from fw_model.train.flow import diffusion_loss
from fw_model.train.losses import geometry_losses, total_loss
from fw_model.train.objective import autocast
from fw_model.train.optimizers import make_optimizer

GIB = 2**30
SEED = 0
SMALL = dataclasses.replace(MIDDLE, clip=ClipSize(5, 64, 96))  # for --cpu


def place(cpu: bool) -> tuple[torch.device, Size]:
    return (torch.device("cpu"), SMALL) if cpu else (torch.device("cuda"), FULL)


def random_world(preset: Preset, device: torch.device, stage: Stage) -> FantasyWorld:
    """The model with random weights made where it runs: seeded ones would take a minute of a CPU."""
    torch.manual_seed(SEED)
    with torch.device(device):
        world = FantasyWorld(preset.model)
    with torch.no_grad():
        for name, parameter in world.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_().mul_(0.8 / parameter[0].numel() ** 0.5)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    store_in_bfloat16(world.base)
    world.set_stage(stage).enable_gradient_checkpointing()
    return world.train()


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@dataclasses.dataclass
class Steps:
    """Training steps of a model on random clips."""

    world: FantasyWorld
    config: StageConfig
    device: torch.device
    size: Size
    batch: int = 1

    def __post_init__(self) -> None:
        self.parameters = self.world.trainable_parameters()
        self.optimizer = make_optimizer(self.parameters, self.config)
        self.called: nn.Module = self.world
        self.feed(self.batch)

    def feed(self, batch: int) -> None:
        with torch.device(self.device):
            self.inputs, self.targets = step_inputs(self.world.config.wan, dataclasses.replace(self.size.clip, batch=batch))

    def backward(self) -> float:
        with autocast(self.config, self.device):
            output = self.called(**self.inputs)
        losses = geometry_losses(output, self.targets)
        if output.velocity is not None:
            latents = self.inputs["latents"]
            losses["diffusion_loss"] = diffusion_loss(
                output.velocity, torch.zeros_like(latents), latents, self.inputs["timestep"]
            )
        loss = total_loss(losses, self.config.camera_weight, self.config.lambda_geometry)
        loss.backward()
        return float(loss.detach())

    def step(self, micro: int = 1) -> float:
        """Seconds of an optimizer step over `micro` micro-batches. Raises ValueError for a loss that is not finite."""
        sync(self.device)
        started = time.perf_counter()
        losses = [self.backward() for _ in range(micro)]
        nn.utils.clip_grad_norm_(self.parameters.values(), self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        sync(self.device)
        if not all(loss == loss and abs(loss) < 1e9 for loss in losses):
            raise ValueError(f"losses {losses}")
        return time.perf_counter() - started


def peak_gib(device: torch.device, run: Callable[[], object]) -> float | None:
    """Largest memory of tensors while `run` runs, all that was there before included; None on a CPU."""
    if device.type != "cuda":
        run()
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run()
    return round(torch.cuda.max_memory_allocated() / GIB, 2)


def attempt(what: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured, or why it could not be: the variants of a part do not end one another."""
    try:
        return {"what": what, **measure()}
    except (RuntimeError, ValueError) as error:  # torch.OutOfMemoryError is one
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return {"what": what, "error": str(error).strip().splitlines()[0][:300]}


def kernels(training: Steps, count: int = 14) -> list[dict[str, Any]]:
    """The operations that took most of one step on the GPU."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        training.step()
    rows = [row for row in profiler.key_averages() if row.device_type == torch.autograd.DeviceType.CUDA]
    total = sum(row.self_device_time_total for row in rows)
    rows.sort(key=lambda row: -row.self_device_time_total)
    return [
        {"kernel": row.key[:110], "ms": round(row.self_device_time_total / 1e3, 1), "calls": row.count,
         "share": round(row.self_device_time_total / total, 4)}
        for row in rows[:count]
    ]  # fmt: skip
