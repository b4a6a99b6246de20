"""From noise to latents along the flow: the steps of the shifted schedule, and the solvers that take them.

The model gives the velocity v = noise - latents at a share of noise sigma, so that d latents / d sigma = v; a sampler starts at
sigma 1 with noise alone and ends at 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from fw_model.train.flow import FlowSchedule

SchedulerName = Literal["euler", "unipc"]
SCHEDULERS: tuple[SchedulerName, ...] = ("euler", "unipc")
Velocity = Callable[[int, Tensor, float], Tensor]  # (number of the step, latents, sigma) -> velocity


def shifted_sigmas(steps: int, shift: float) -> Tensor:
    """[steps + 1] float64, falling from 1 to 0: s = 1, 1 - 1/steps, ..., 1/steps, shifted as in training, then 0.

    With 50 steps and shift 5 the last step starts at 0.0926, as the release's does.
    """
    return torch.cat([FlowSchedule(steps, shift).sigmas, torch.zeros(1, dtype=torch.float64)])


def sample(velocity: Velocity, noise: Tensor, steps: int, shift: float = 5.0, scheduler: SchedulerName = "euler") -> Tensor:
    """Latents like `noise`, float32.

    euler: straight steps along `shifted_sigmas`. unipc: diffusers' multistep predictor-corrector of order 2 on its own flow
    sigmas of the same shift; the same latents in fewer steps.
    """
    if scheduler == "euler":
        return _euler(velocity, noise, shifted_sigmas(steps, shift))
    return _unipc(velocity, noise, steps, shift)


def _euler(velocity: Velocity, noise: Tensor, sigmas: Tensor) -> Tensor:
    latents = noise.float()
    for i, (sigma, following) in enumerate(zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True)):
        latents = latents + (following - sigma) * velocity(i, latents, sigma).float()
    return latents


def _unipc(velocity: Velocity, noise: Tensor, steps: int, shift: float) -> Tensor:
    from diffusers import UniPCMultistepScheduler

    solver: Any = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    solver.set_timesteps(steps)
    latents = noise.float()
    for i, (timestep, sigma) in enumerate(zip(solver.timesteps, solver.sigmas[:-1].tolist(), strict=True)):
        latents = solver.step(velocity(i, latents, sigma).float(), timestep, latents, return_dict=False)[0]
    return latents
