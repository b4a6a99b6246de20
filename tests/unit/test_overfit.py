"""The tiny preset can learn: on one clip of a made scene, with the real losses, the depth loss falls to a tenth."""

from __future__ import annotations

from pathlib import Path

import torch

from fw_model.config import load_preset
from fw_model.data.dataset import ClipDataset, collate
from fw_model.fantasy_world import FantasyWorld
from fw_model.objective import compute_losses, fixed_draws, generator_for, predict
from fw_model.training_run import make_optimizer
from tests.unit.made_scenes import pack_scenes

STEPS = 150


def test_depth_loss_of_one_clip_falls_by_ten(tmp_path: Path) -> None:
    preset = load_preset("tiny", ["clip.frames=5", "clip.short_side=32", "clip.long_side=48", "stage1.learning_rate=2e-3"])
    clips = ClipDataset(pack_scenes(tmp_path / "dataset", preset), "train", preset.model.wan.text_len)
    batch = collate([clips[0]])
    model = FantasyWorld.from_preset(preset)
    draws = fixed_draws(batch, 500.0, generator_for("overfit"))
    optimizer = make_optimizer(model.trainable_parameters(), preset.stage1)
    history = []
    for step in range(STEPS):
        losses = compute_losses(predict(model, batch, draws), batch, draws, "stage1", preset.stage1)
        history.append(float(losses["depth_loss"].detach()))
        losses["total"].backward()
        torch.nn.utils.clip_grad_norm_(model.trainable_parameters().values(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = preset.stage1.learning_rate * (1 - step / STEPS)
        optimizer.step()
        optimizer.zero_grad()
    assert history[-1] < history[0] / 10, f"from {history[0]:.3f} to {history[-1]:.3f}"
