"""Flow matching: the noise schedule of the base, which timesteps are drawn, and the loss of the velocity."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fw_model.config import TimestepChoice
from fw_model.train.losses import wide


@dataclass(frozen=True)
class FlowSchedule:
    """Flow matching on a discrete schedule: x = (1 - sigma) latents + sigma noise, velocity = noise - latents.

    sigma_i = shift s_i / (1 + (shift - 1) s_i) for s_i = 1, 1 - 1/steps, ..., 1/steps, and timestep = steps * sigma, as the
    base model was trained.
    """

    steps: int = 1000
    shift: float = 5.0

    @cached_property
    def sigmas(self) -> Tensor:
        """[steps] float64, falling from 1."""
        s = torch.arange(self.steps, 0, -1, dtype=torch.float64) / self.steps
        return self.shift * s / (1 + (self.shift - 1) * s)

    @property
    def timesteps(self) -> Tensor:
        """[steps] float64, falling from `steps`."""
        return self.steps * self.sigmas

    def sample(self, count: int, generator: torch.Generator | None = None, choice: TimestepChoice = "shifted") -> Tensor:
        """`count` timesteps [count] float32 on the CPU.

        shifted: a uniform index into the schedule, as the base was trained; at shift 5, 2 % have sigma <= 0.1.
        uniform: sigma itself uniform over 1/steps, 2/steps, ..., 1. mixed: either of the two with probability 1/2.
        """
        shifted = self.timesteps[torch.randint(self.steps, (count,), generator=generator)]
        uniform = torch.randint(1, self.steps + 1, (count,), generator=generator).double()
        coin = torch.rand(count, generator=generator) < {"shifted": 0.0, "uniform": 1.0, "mixed": 0.5}[choice]
        return torch.where(coin, uniform, shifted).float()

    def sigma(self, timestep: Tensor) -> Tensor:
        """timestep [B] -> share of noise [B] in 0..1."""
        return timestep / self.steps

    def add_noise(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """latents, noise [B, ...], timestep [B] -> noisy latents [B, ...]."""
        sigma = _per_clip(self.sigma(timestep), latents)
        return (1 - sigma) * latents + sigma * noise

    def weight(self, timestep: Tensor) -> Tensor:
        """timestep [B] -> loss weight [B]: exp(-2 ((t - 500) / 1000)^2) minus its minimum, with mean 1 over the schedule."""
        bell = self._bell(self.timesteps)
        low = bell.min()
        return ((self._bell(timestep.double()) - low.to(timestep.device)) / (bell - low).mean().to(timestep.device)).float()

    def _bell(self, timestep: Tensor) -> Tensor:
        return torch.exp(-2 * ((timestep - self.steps / 2) / self.steps) ** 2)


def diffusion_loss(
    velocity: Tensor, noise: Tensor, latents: Tensor, timestep: Tensor, schedule: FlowSchedule | None = None
) -> Tensor:
    """Weighted MSE of velocity against noise - latents; all [B, 16, F, h, w], timestep [B]. Returns a scalar."""
    schedule = schedule or FlowSchedule()
    if velocity.shape != latents.shape:
        raise ValueError(f"velocity: predicted {list(velocity.shape)} but the latents are {list(latents.shape)}")
    with torch.autocast(velocity.device.type, enabled=False):
        error = (wide(velocity) - (wide(noise) - wide(latents))).square().flatten(1).mean(1)
        return (schedule.weight(timestep).to(error.dtype) * error).mean()


def _per_clip(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like).view(-1, *[1] * (like.ndim - 1))
