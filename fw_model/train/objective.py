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
from fw_model.train.flow import FlowSchedule, diffusion_loss
from fw_model.train.losses import geometry_losses, make_targets, total_loss

SCHEDULE = FlowSchedule()
_PARTS = ("depth_error", "camera_translation", "camera_rotation", "camera_fov")
LOSS_NAMES: dict[Stage, tuple[str, ...]] = {
    "stage1": ("depth_loss", "point_loss", "camera_loss", *_PARTS, "total"),
    "stage2": ("depth_loss", "point_loss", "camera_loss", *_PARTS, "diffusion_loss", "total"),
}


@dataclass(frozen=True)
class Draws:
    """The random part of a batch."""

    noise: Tensor  # [B, 16, F, h8, w8] float32
    timestep: Tensor  # [B] float32, 0..1000
    pose_mask: Tensor  # [B] bool: this clip's pose tokens reach the geometry branch
    text_mask: Tensor  # [B] bool: this clip's prompt reaches the model, not the empty one
    camera_mask: Tensor  # [B] bool: this clip has a camera; else neither base nor branch is told one
    image_mask: Tensor  # [B] bool: its first image's latent reaches the model, not zeros
    clip_mask: Tensor  # [B] bool: its CLIP features reach the model, not zeros

    def to(self, device: torch.device | str) -> Draws:
        return Draws(*(tensor.to(device) for tensor in vars(self).values()))


def generator_for(*key: int | str) -> torch.Generator:
    """A CPU generator that is a function of `key` alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def training_draws(batch: Batch, config: StageConfig, step: int, first: int) -> Draws:
    """Noise, timestep and masks of a training batch.

    Each clip has its own generator, seeded by (seed, step, place in the global batch): nothing depends on the steps
    before, the device, or how many processes share the batch.

    Args:
        batch: B clips.
        config: gives `seed`, `timesteps` and the probabilities.
        step: the training step, from 1.
        first: place of the first clip in the step's global batch.
    """
    kept = torch.tensor(
        [
            config.pose_probability,
            1 - config.text_dropout,
            config.camera_probability,
            1 - config.image_dropout,
            1 - config.clip_dropout,
        ]
    )
    noise, timesteps, masks = [], [], []
    for place in range(first, first + len(batch)):
        generator = generator_for("train", config.seed, step, place)
        timesteps.append(SCHEDULE.sample(1, generator, config.timesteps))
        masks.append(torch.rand(len(kept), generator=generator) < kept)
        noise.append(torch.randn(batch.latents.shape[1:], generator=generator))
    return Draws(torch.stack(noise), torch.cat(timesteps), *torch.stack(masks, dim=1))


def validation_draws(batch: Batch, seed: int, place: int, count: int, band: tuple[float, float] = (0.0, 1.0)) -> Draws:
    """The draws of validation clip `place` of `count` (a batch of one): the same at every validation.

    Shares of noise are spread evenly over the band. Pose tokens are withheld: the camera loss then measures what the
    branch sees in the video and what the base gives away, not what it copies from its input.
    """
    low, high = band
    sigma = low + (place + 0.5) / count * (high - low)
    return fixed_draws(batch, SCHEDULE.steps * sigma, generator_for("val", seed, place, str(low)))


def fixed_draws(batch: Batch, timestep: float, generator: torch.Generator) -> Draws:
    """One timestep for all clips of a batch, without pose tokens, with everything else."""
    noise = torch.randn(batch.latents.shape, generator=generator)
    every = torch.ones(len(batch), dtype=torch.bool)
    timesteps = torch.full((len(batch),), timestep)
    return Draws(noise, timesteps, ~every, text_mask=every, camera_mask=every, image_mask=every, clip_mask=every)


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
    frame followed by zeros, as the base was trained. A clip whose image or features are masked has zeros: what a prompt
    without an image is.
    """
    image_latents = torch.zeros_like(batch.latents)
    image_latents[:, :, 0] = torch.where(draws.image_mask[:, None, None, None], batch.latents[:, :, 0], 0.0)
    image_features = torch.where(draws.clip_mask[:, None, None], batch.image, 0.0)
    with torch.autocast(batch.latents.device.type, enabled=False):  # rays and noise levels need all their digits
        noisy = SCHEDULE.add_noise(batch.latents, draws.noise, draws.timestep)
        camera = control_latents(batch.w2c, batch.intrinsics, *batch.depth.shape[-2:])
    masks = {"pose_mask": draws.pose_mask, "camera_mask": draws.camera_mask}
    return model(noisy, image_latents, draws.timestep, batch.text, image_features, camera, **masks)


def compute_losses(
    output: FantasyWorldOutput, batch: Batch, draws: Draws, stage: Stage, config: StageConfig
) -> dict[str, Tensor]:
    """Scalar losses by the names of `LOSS_NAMES[stage]`; `total` is what is minimised (L_geo, or L_diff + lambda L_geo)."""
    losses = geometry_losses(output, make_targets(batch, config.dynamic), config.loss_quantile)
    if stage == "stage2":
        if output.velocity is None:
            raise RuntimeError("the model gave no velocity in stage 2: call set_stage('stage2') first")
        losses["diffusion_loss"] = diffusion_loss(output.velocity, draws.noise, batch.latents, draws.timestep, SCHEDULE)
    return {**losses, "total": total_loss(losses, config.camera_weight, config.lambda_geometry)}


def base_dtype(config: StageConfig) -> torch.dtype:
    """What the frozen base is stored in while a stage runs."""
    return torch.bfloat16 if config.precision == "bfloat16" else torch.float32


TARGETS = {"depth_error": 0.1, "point_loss": 0.5, "camera_loss": 0.05}  # the training guide's, on validation clips
