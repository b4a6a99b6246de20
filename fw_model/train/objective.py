"""What a batch of clips is asked of the model: inputs, random draws, losses; shared by training, validation and reports.

B clips, F latent frames, h8 x w8 latent pixels.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fw_model.cameras import control_latents
from fw_model.config import Stage, StageConfig
from fw_model.data.schema import Batch
from fw_model.model.fantasy_world import FantasyWorldOutput
from fw_model.train.losses import FlowSchedule, diffusion_loss, geometry_loss, geometry_losses, make_targets

SCHEDULE = FlowSchedule()
LOSS_NAMES: dict[Stage, tuple[str, ...]] = {
    "stage1": ("depth_loss", "point_loss", "camera_loss", "total"),
    "stage2": ("depth_loss", "point_loss", "camera_loss", "diffusion_loss", "total"),
}


@dataclass(frozen=True)
class Draws:
    """The random part of a batch."""

    noise: Tensor  # [B, 16, F, h8, w8] float32
    timestep: Tensor  # [B] float32, 0..1000
    pose_mask: Tensor  # [B] bool: this clip's pose tokens reach the geometry branch
    text_mask: Tensor  # [B] bool: this clip's prompt reaches the model, not the empty one

    def to(self, device: torch.device | str) -> Draws:
        return Draws(*(tensor.to(device) for tensor in vars(self).values()))


def generator_for(*key: int | str) -> torch.Generator:
    """A CPU generator that is a function of `key` alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def training_draws(batch: Batch, config: StageConfig, step: int, first: int) -> Draws:
    """Noise, timestep, pose mask and text mask of a training batch.

    Each clip has its own generator, seeded by (seed, step, place in the global batch): nothing depends on the steps
    before, the device, or how many processes share the batch.

    Args:
        batch: B clips.
        config: gives `seed`, `pose_probability` and `text_dropout`.
        step: the training step, from 1.
        first: place of the first clip in the step's global batch.
    """
    noise, timesteps, masks, text_masks = [], [], [], []
    for place in range(first, first + len(batch)):
        generator = generator_for("train", config.seed, step, place)
        timesteps.append(SCHEDULE.sample(1, generator))
        masks.append(torch.rand(1, generator=generator) < config.pose_probability)
        noise.append(torch.randn(batch.latents.shape[1:], generator=generator))
        text_masks.append(torch.rand(1, generator=generator) >= config.text_dropout)
    return Draws(torch.stack(noise), torch.cat(timesteps), torch.cat(masks), torch.cat(text_masks))


def validation_draws(batch: Batch, seed: int, place: int, count: int) -> Draws:
    """The draws of validation clip `place` of `count` (a batch of one): the same at every validation.

    Timesteps are spread evenly over the schedule. Pose tokens are withheld: the camera loss then measures what the
    branch sees in the video, not what it copies from its input.
    """
    index = int((place + 0.5) / count * SCHEDULE.steps)
    return fixed_draws(batch, float(SCHEDULE.timesteps[index]), generator_for("val", seed, place))


def fixed_draws(batch: Batch, timestep: float, generator: torch.Generator) -> Draws:
    """One timestep for all clips of a batch, without pose tokens, with their prompts."""
    noise = torch.randn(batch.latents.shape, generator=generator)
    none = torch.zeros(len(batch), dtype=torch.bool)
    return Draws(noise, torch.full((len(batch),), timestep), pose_mask=none, text_mask=~none)


def drop_text(batch: Batch, draws: Draws, empty_text: Tensor) -> Batch:
    """The batch with the empty prompt's embedding [text_len, text_dim] in place of the prompts that `draws` withhold.

    A model that has seen both can be guided towards a prompt in generation (classifier-free guidance).
    """
    return replace(batch, text=torch.where(draws.text_mask[:, None, None], batch.text, empty_text))


def autocast(config: StageConfig, device: torch.device) -> torch.autocast:
    """The stage's precision, as a context for `predict`. Losses are computed outside it, in float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision == "bfloat16")


def predict(model: torch.nn.Module, batch: Batch, draws: Draws) -> FantasyWorldOutput:
    """Run the model on noised clips; batch, draws and model are on one device.

    The VAE is causal in time, so frame 0 of a clip's latents is the latent of its first image: the image latents are that
    frame followed by zeros, as the base was trained.
    """
    image_latents = torch.zeros_like(batch.latents)
    image_latents[:, :, 0] = batch.latents[:, :, 0]
    with torch.autocast(batch.latents.device.type, enabled=False):  # rays and noise levels need all their digits
        noisy = SCHEDULE.add_noise(batch.latents, draws.noise, draws.timestep)
        camera = control_latents(batch.w2c, batch.intrinsics, *batch.depth.shape[-2:])
    return model(noisy, image_latents, draws.timestep, batch.text, batch.image, camera, pose_mask=draws.pose_mask)


def compute_losses(
    output: FantasyWorldOutput, batch: Batch, draws: Draws, stage: Stage, config: StageConfig
) -> dict[str, Tensor]:
    """Scalar losses by the names of `LOSS_NAMES[stage]`; `total` is what is minimised (L_geo, or L_diff + lambda L_geo)."""
    losses = geometry_losses(output, make_targets(batch))
    total = geometry_loss(losses, config.camera_weight)
    if stage == "stage2":
        if output.velocity is None:
            raise RuntimeError("the model gave no velocity in stage 2: call set_stage('stage2') first")
        losses["diffusion_loss"] = diffusion_loss(output.velocity, draws.noise, batch.latents, draws.timestep, SCHEDULE)
        total = losses["diffusion_loss"] + config.lambda_geometry * total
    return {**losses, "total": total}


def base_dtype(config: StageConfig) -> torch.dtype:
    """What the frozen base is stored in while a stage runs."""
    return torch.bfloat16 if config.precision == "bfloat16" else torch.float32


TARGETS = {"depth_loss": 0.1, "point_loss": 0.5, "camera_loss": 0.05}  # the training guide's, on validation clips
