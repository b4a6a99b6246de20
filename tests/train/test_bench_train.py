"""The training benchmark compares what it says it compares, and misses a bar when it should."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fw_model.config import ModelConfig
from fw_model.describe.step_trace import ClipSize
from tests.helpers.small_model import inputs, small_world

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import bench_train
from middle_model import FULL, MIDDLE, Size

PUBLISHED = {"vae": 126.9e6, "text_encoder": 5680.9e6, "image_encoder": 630.8e6}  # parameters of the published encoders


def test_full_size_is_the_published_model_with_its_encoders() -> None:
    assert FULL.preset().model == ModelConfig()
    for name, parameters in PUBLISHED.items():
        with torch.device("meta"):
            module = getattr(FULL, name)()
        assert sum(p.numel() for p in module.parameters()) == pytest.approx(parameters, rel=1e-3)


def test_middle_size_keeps_every_proportion() -> None:
    full, middle, shrink = FULL.preset().model, MIDDLE.preset().model, MIDDLE.shrink
    assert (middle.wan.num_layers, middle.geometry.pcb_blocks, middle.num_geodit) == (30, 12, 18)
    assert middle.geometry.head_layers == full.geometry.head_layers
    assert MIDDLE.clip.video_tokens * shrink == pytest.approx(FULL.clip.video_tokens, rel=0.05)
    pixels = [size.clip.frames * size.clip.height * size.clip.width for size in (FULL, MIDDLE)]
    assert pixels[1] * shrink == pytest.approx(pixels[0], rel=0.1)
    for name, parameters in PUBLISHED.items():
        module = getattr(MIDDLE, name)()
        assert sum(p.numel() for p in module.parameters()) * shrink**2 == pytest.approx(parameters, rel=0.1)
    for key in ("dim", "ffn_dim", "text_dim", "image_dim", "text_len", "freq_dim"):
        assert getattr(middle.wan, key) * shrink == getattr(full.wan, key)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
@pytest.mark.parametrize("frozen", [True, False])
def test_plain_way_runs_all_blocks_and_only_what_its_stage_trains(stage: Any, frozen: bool) -> None:
    world = small_world()
    ran: list[torch.nn.Module] = []
    for block in world.base.transformer.blocks:
        block.register_forward_hook(lambda block, *_: ran.append(block))
    bench_train.make_plain(world, stage, frozen)
    output = world(**inputs())
    assert output.velocity is not None
    (output.velocity.square().mean() + output.depth.mean() + output.points.mean() + output.pose_encodings[-1].mean()).backward()
    assert list(dict.fromkeys(ran)) == list(world.base.transformer.blocks)  # the later ones in two halves
    for block in ran:
        assert all((p.grad is None) == frozen for p in block.parameters())
    own = {name for name, p in world.named_parameters() if not name.startswith("base.") and p.grad is not None}
    world = small_world().set_stage(stage)
    assert own <= set(world.trainable_parameters())
    assert any(name.startswith("geodit.") for name in own)


def test_both_ways_take_steps_and_say_where_the_seconds_went(tmp_path: Path) -> None:
    size = Size("small", 32, ClipSize(5, 32, 48))
    common = ("global_batch=1", "validation_clips=1", "log_every=1", "trackers=[]", "precision=float32", "workers=0")
    setting = bench_train.Setting(size, size.preset(*(f"stage1.{item}" for item in common)), tmp_path, torch.device("cpu"))
    bench_train.make_dataset(tmp_path, size, setting.preset)
    setting = setting.for_steps(2)
    own = bench_train.ours(setting, "stage1", None, tmp_path / "stage1-time")
    plain = bench_train.plain(setting, "stage1", frozen=False)
    for timing in (own, plain):
        assert len(timing.steps) == len(timing.data) == len(timing.encoders) == 2
        assert all(step >= data + encoder for step, data, encoder in zip(timing.steps, timing.data, timing.encoders, strict=True))
    assert min(plain.encoders) > 0
    assert max(own.encoders) == 0


def rows(**changes: float) -> dict[str, dict[str, float]]:
    own = {"seconds": 1.0, "peak_gib": 0.5, "data_seconds": 0.01}
    return {
        f"{stage} {way}": {**own, **({"seconds": 2.5, "peak_gib": 1.0} if way == "plain" else changes)}
        for stage in ("stage1", "stage2")
        for way in ("ours", "plain")
    }


def test_bars_are_missed_by_what_is_too_slow_too_large_or_waits() -> None:
    assert bench_train.judge(rows())[1] == []
    assert [line.split(":")[0] for line in bench_train.judge(rows(seconds=1.5))[1]] == ["stage1"]
    assert len(bench_train.judge(rows(seconds=2.0))[1]) == 2
    assert len(bench_train.judge(rows(peak_gib=0.71))[1]) == 2
    assert len(bench_train.judge(rows(data_seconds=0.06))[1]) == 2
    assert len(bench_train.judge(rows(seconds=float("nan")))[1]) == 4


def test_mfu_is_the_share_of_the_data_sheet_peak() -> None:
    assert bench_train.mfu(989e12, 2.0, "NVIDIA H100 80GB HBM3") == pytest.approx(0.5)
    assert bench_train.mfu(989e12, 1.0, "NVIDIA H200") == pytest.approx(1.0)
    assert bench_train.mfu(1e12, 1.0, "Some other card") is None
