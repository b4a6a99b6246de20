"""The real architecture in the smallest widths that still have every part, for tests of the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fw_model.config import GeometryConfig, ModelConfig, Stage, WanConfig
from fw_model.model.backbone import WanBackbone
from fw_model.model.fantasy_world import FantasyWorld, FantasyWorldOutput

SMALL_WAN = WanConfig(
    dim=48, ffn_dim=64, num_heads=4, num_layers=6, text_dim=16, freq_dim=16, image_dim=12, image_tokens=3, text_len=5
)
SMALL = ModelConfig(
    wan=SMALL_WAN,
    geometry=GeometryConfig(
        pcb_blocks=2,
        bridge_heads=2,
        head_layers=(1, 2, 3, 4),
        head_channels=(8, 8, 8, 8),
        head_features=8,
        camera_blocks=1,
        camera_dim=32,
        pose_rank=4,
        cross_dim=24,
        cross_heads=2,
    ),
)


def small_world() -> FantasyWorld:
    """A freshly initialised FantasyWorld on a made base."""
    world = FantasyWorld(SMALL, WanBackbone.seeded(SMALL_WAN, seed=0))
    world.initialise(seed=0)
    return world


@torch.no_grad()
def open_gates(world: FantasyWorld) -> FantasyWorld:
    """Make everything that starts at zero act, as after some training."""
    generator = torch.Generator().manual_seed(1)

    def fill(tensor: Tensor, scale: float) -> None:
        tensor.copy_(scale * torch.randn(tensor.shape, generator=generator))

    for block in world.geodit.blocks:
        fill(block.pose_adapter.weight, 0.2)
        fill(block.pose_adapter.bias, 0.2)
        fill(block.modulation, 0.3)
    for adapter in world.camera_adapters:
        fill(adapter.linear.weight, 0.2)
        fill(adapter.linear.bias, 0.2)
    for exchange in world.interaction:
        fill(exchange.gamma_video, 0.5)
        fill(exchange.gamma_geometry, 0.5)
    return world


def inputs(batch: int = 1, frames: int = 3, height: int = 32, width: int = 48, wan: WanConfig = SMALL_WAN) -> dict[str, Any]:
    """Random inputs of `WanBackbone.forward` and `FantasyWorld.forward`; `frames` counts latent frames."""
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    latent = (batch, wan.in_dim // 2, frames, height // 8, width // 8)
    return {
        "latents": normal(*latent),
        "image_latents": normal(*latent),
        "timestep": torch.linspace(900.0, 300.0, batch),
        "text": normal(batch, wan.text_len, wan.text_dim),
        "image_features": normal(batch, wan.image_tokens, wan.image_dim),
        "camera": normal(batch, wan.control_channels, frames, height, width),
    }


def geometry(output: FantasyWorldOutput) -> list[Tensor]:
    return [output.depth, output.depth_conf, output.points, output.points_conf, *output.pose_encodings]


def scalar(output: FantasyWorldOutput) -> Tensor:
    """A loss every output contributes to."""
    total = sum((x * torch.linspace(0.5, 1.5, x.numel()).view_as(x)).mean() for x in geometry(output))
    assert isinstance(total, Tensor)
    return total if output.velocity is None else total + output.velocity.square().mean()


@torch.no_grad()
def run(world: FantasyWorld, stage: Stage, **changes: Any) -> FantasyWorldOutput:
    pose_mask = changes.pop("pose_mask", None)
    return world.set_stage(stage)(**{**inputs(), **changes}, pose_mask=pose_mask)
