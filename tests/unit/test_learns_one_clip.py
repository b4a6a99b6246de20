"""The model learns: the whole objective of stage 1 on one clip of the demo's scenes, with its true depth and cameras."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from fw_model.cameras import relative_to_first, unproject
from fw_model.config import load_preset
from fw_model.data.schema import Batch
from fw_model.fantasy_world import FantasyWorld
from fw_model.objective import compute_losses, fixed_draws, predict
from fw_pipeline.demo_pairs import true_views
from fw_pipeline.demo_scenes import SHOTS

FRAMES, HEIGHT, WIDTH = 5, 32, 48


def demo_clip() -> Batch:
    """A shot of the demo in clip units; latents and embeddings are made, as for the tiny preset's."""
    wan = load_preset("tiny").model.wan
    truth = true_views(SHOTS[0].shots[0], FRAMES, HEIGHT, WIDTH)
    depth, w2c = (torch.from_numpy(np.asarray(x)).float() for x in (truth.depth, truth.w2c))
    intrinsics = torch.from_numpy(truth.intrinsics).float().expand(FRAMES, 3, 3)
    w2c = relative_to_first(w2c)
    scale = unproject(depth, intrinsics, w2c).norm(dim=-1).mean()
    w2c = torch.cat([w2c[..., :3], w2c[..., 3:] / scale], dim=-1)
    generator = torch.Generator().manual_seed(0)
    return Batch(
        clip_ids=["demo"],
        latents=torch.randn(1, 16, 1 + (FRAMES - 1) // 4, HEIGHT // 8, WIDTH // 8, generator=generator),
        text=torch.randn(1, wan.text_len, wan.text_dim, generator=generator),
        image=torch.randn(1, wan.image_tokens, wan.image_dim, generator=generator),
        depth=depth[None] / scale,
        intrinsics=intrinsics[None],
        w2c=w2c[None],
    )


def overfit(learning_rate: float, steps: int) -> list[dict[str, float]]:
    """Losses of every step."""
    preset = load_preset("tiny")
    world, batch = FantasyWorld.from_preset(preset), demo_clip()
    draws = fixed_draws(batch, 500.0, torch.Generator().manual_seed(1))
    parameters = list(world.trainable_parameters().values())
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    history = []
    for _ in range(steps):
        losses = compute_losses(predict(world, batch, draws), batch, draws, "stage1", preset.stage1)
        losses["total"].backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        history.append({name: float(loss.detach()) for name, loss in losses.items()})
    return history


def test_a_tiny_model_learns_one_demo_clip() -> None:
    """80 steps, 8 s on one core. Measured: depth to 0.29 of its first loss, points to 0.14, cameras to 0.02."""
    history = overfit(1e-3, 80)
    for name, share in (("depth_loss", 0.4), ("point_loss", 0.25), ("camera_loss", 0.1)):
        assert history[-1][name] < share * history[0][name], name
