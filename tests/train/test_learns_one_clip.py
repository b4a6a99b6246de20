"""The model learns: the depth of one clip of the demo's scenes, by heart. (`make overfit` shows the whole objective.)"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from fw_model.cameras import relative_to_first, unproject
from fw_model.config import load_preset
from fw_model.data.schema import Batch
from fw_model.model.fantasy_world import FantasyWorld
from fw_model.train.losses import depth_error
from fw_model.train.objective import fixed_draws, predict
from fw_pipeline.demo.scenes import SHOTS
from fw_pipeline.demo.true_pairs import true_views

FRAMES, HEIGHT, WIDTH = 5, 32, 48
# At this size much of the picture is edges: the tiny preset's head of 16 channels needs 400 steps for a factor of 9.4.
WIDER_HEAD = ("head_features=48", "head_channels=[64, 48, 48, 32]")


def demo_clip() -> Batch:
    """A shot of the demo in clip units; latents and embeddings are made, as for the tiny preset's."""
    wan = load_preset("tiny").model.wan
    truth = true_views(SHOTS[5].shots[0], FRAMES, HEIGHT, WIDTH)
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


def depth_losses(steps: int) -> list[float]:
    """The depth error of every step, minimised alone: warm-up, cosine, moments short enough for some hundred steps."""
    preset = load_preset("tiny", [f"model.geometry.{key}" for key in WIDER_HEAD])
    world, batch = FantasyWorld.from_preset(preset), demo_clip()
    draws = fixed_draws(batch, 500.0, torch.Generator().manual_seed(1))
    parameters = list(world.trainable_parameters().values())
    optimizer = torch.optim.AdamW(parameters, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.04)
    history = []
    for _ in range(steps):
        loss = depth_error(predict(world, batch, draws).depth, batch.depth, batch.valid)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 10.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        history.append(float(loss.detach()))
    return history


def test_a_tiny_model_overfits_one_demo_clip() -> None:
    """Its depth error falls to less than a tenth."""
    history = depth_losses(320)
    assert history[-1] < 0.1 * history[0]
