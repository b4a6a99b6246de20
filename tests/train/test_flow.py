"""The flow schedule and the diffusion loss: the base's own timesteps, weights and velocity."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fw_model.config import TimestepChoice, load_preset
from fw_model.train.flow import (
    FlowSchedule,
    diffusion_loss,
)


def test_schedule_is_the_shifted_thousand_steps() -> None:
    schedule = FlowSchedule()
    s = np.linspace(1, 0, 1001)[:-1]
    np.testing.assert_allclose(schedule.sigmas.numpy(), 5 * s / (1 + 4 * s), rtol=1e-12)
    np.testing.assert_allclose(schedule.timesteps.numpy(), 1000 * schedule.sigmas.numpy())


def test_schedule_equals_the_schedulers_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=5.0)
    np.testing.assert_allclose(FlowSchedule().timesteps.numpy(), scheduler.timesteps.numpy(), rtol=1e-5)


def test_weights_are_a_bell_from_zero_with_mean_one() -> None:
    schedule = FlowSchedule()
    t = schedule.timesteps.numpy()
    bell = np.exp(-2 * ((t - 500) / 1000) ** 2)
    expected = bell - bell.min()
    expected *= 1000 / expected.sum()
    weights = schedule.weight(schedule.timesteps).numpy()
    np.testing.assert_allclose(weights, expected, atol=1e-5)
    assert weights.mean() == pytest.approx(1, abs=1e-5)
    assert weights.min() >= 0


def test_sampled_timesteps_belong_to_the_schedule_and_to_their_seed() -> None:
    schedule = FlowSchedule()
    a, b, c = (schedule.sample(4000, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert set(a.tolist()) <= set(schedule.timesteps.float().tolist())
    assert a.mean().item() == pytest.approx(schedule.timesteps.mean().item(), rel=0.03)


def test_noise_and_velocity_lead_back_to_the_latents() -> None:
    schedule = FlowSchedule()
    latents, noise = torch.randn(3, 16, 2, 4, 4), torch.randn(3, 16, 2, 4, 4)
    timestep = torch.tensor([1000.0, 500.0, 4.98])
    noisy = schedule.add_noise(latents, noise, timestep)
    torch.testing.assert_close(noisy[0], noise[0])
    sigma = schedule.sigma(timestep).view(3, 1, 1, 1, 1)
    torch.testing.assert_close(noisy - sigma * (noise - latents), latents)


def test_diffusion_loss_is_the_weighted_mean_square() -> None:
    latents, noise, velocity = (torch.randn(3, 16, 2, 4, 4, dtype=torch.float64) for _ in range(3))
    timestep = FlowSchedule().timesteps[[10, 500, 900]].float()
    weights = FlowSchedule().weight(timestep).double().numpy()
    errors = ((velocity - (noise - latents)) ** 2).mean(dim=(1, 2, 3, 4)).numpy()
    loss = diffusion_loss(velocity, noise, latents, timestep)
    assert loss.item() == pytest.approx((weights * errors).mean())
    assert diffusion_loss(noise - latents, noise, latents, timestep) == 0


def test_diffusion_gradient_agrees_with_finite_differences() -> None:
    latents, noise, velocity = (torch.randn(2, 2, 1, 2, 2, dtype=torch.float64) for _ in range(3))
    timestep = torch.tensor([300.0, 800.0])
    assert torch.autograd.gradcheck(lambda v: diffusion_loss(v, noise, latents, timestep), (velocity.requires_grad_(),))


def test_diffusion_loss_is_float32_under_autocast() -> None:
    latents, noise = torch.randn(2, 16, 2, 4, 4), torch.randn(2, 16, 2, 4, 4)
    velocity = torch.randn(2, 16, 2, 4, 4).bfloat16()
    timestep = torch.tensor([300.0, 800.0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = diffusion_loss(velocity, noise, latents, timestep)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, diffusion_loss(velocity.float(), noise, latents, timestep))


@pytest.mark.parametrize(("choice", "low", "high"), [("shifted", 0.02, 0.56), ("uniform", 0.10, 0.20), ("mixed", 0.06, 0.38)])
def test_the_choice_of_timesteps_decides_how_much_noise_is_drawn(choice: TimestepChoice, low: float, high: float) -> None:
    """Shares of draws at sigma <= 0.1, where geometry is read, and above 0.8."""
    sigma = FlowSchedule().sample(20_000, torch.Generator().manual_seed(0), choice) / 1000
    assert float((sigma <= 0.1).float().mean()) == pytest.approx(low, abs=0.01)
    assert float((sigma > 0.8).float().mean()) == pytest.approx(high, abs=0.015)
    assert sigma.min() > 0
    assert sigma.max() <= 1


def test_stage_1_of_every_preset_sees_little_noise_and_clips_without_cameras() -> None:
    for name in ("tiny", "wan2.1-fun-1.3b"):
        preset = load_preset(name)
        assert (preset.stage1.timesteps, preset.stage1.camera_probability) == ("mixed", 0.5)
        assert (preset.stage2.timesteps, preset.stage2.camera_probability) == ("shifted", 1)
