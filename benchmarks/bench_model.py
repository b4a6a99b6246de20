"""Speed and memory of the model against other ways of doing the same, as ratios in one run on one machine.

A middle-size model with the full model's proportions (15 base blocks, 6 of them before the bridge, a sixth of the width),
float32, gradient checkpointing, the ways taking turns; seconds are medians. Peak memory is what torch's CPU allocator reports.
FLOPs of the full size at 81x336x592 are traced. Prints tables and a last line of JSON; exits with 1 when the stage 1 step is
not 1.5 times as fast as the guide's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fw_model import heads
from fw_model.backbone import WanBackbone
from fw_model.config import GeometryConfig, ModelConfig, WanConfig
from fw_model.fantasy_world import FantasyWorld, FantasyWorldOutput
from fw_model.losses import Targets, geometry_loss, geometry_losses
from fw_model.step_trace import ClipSize, measured_peak, step_inputs, trace_step

AIM = 1.5  # stage 1 step against the guide's way
MIDDLE = ModelConfig(
    wan=WanConfig(dim=256, ffn_dim=1488, num_heads=4, num_layers=15, text_dim=512, image_dim=256),
    geometry=GeometryConfig(
        pcb_blocks=6,
        bridge_heads=4,
        head_layers=(3, 5, 6, 9),
        head_channels=(44, 44, 32, 16),
        head_features=44,
        camera_dim=128,
        pose_rank=24,
        cross_dim=192,
    ),
)
Inputs = dict[str, Tensor]


def make_world() -> FantasyWorld:
    world = FantasyWorld(MIDDLE, WanBackbone.made(MIDDLE.wan, seed=0))
    world.initialise(seed=0)
    world.enable_gradient_checkpointing()
    return world


def stage1(world: FantasyWorld, inputs: Inputs) -> FantasyWorldOutput:
    return world.set_stage("stage1")(**inputs)


def guide(world: FantasyWorld, inputs: Inputs) -> FantasyWorldOutput:
    """All blocks, cross-attention active, gradients through the video blocks; trained on the geometry loss."""
    return world.set_stage("stage2")(**inputs)


def all_blocks_no_grad(world: FantasyWorld, inputs: Inputs) -> FantasyWorldOutput:
    """Stage 1 and, under no_grad, what it leaves out: the base's remaining blocks and its head."""
    output = stage1(world, inputs)
    with torch.no_grad():
        base_inputs = {name: x for name, x in inputs.items() if name != "pose_mask"}
        hidden, cond = world.base.embed(**base_inputs)  # stands for what the bridge read: the same shape
        for i in range(MIDDLE.geometry.pcb_blocks, MIDDLE.wan.num_layers):
            hidden = world.base.block(i, hidden, cond)
        world.base.head(hidden, cond)
    return output


def step(run: Callable[[FantasyWorld, Inputs], FantasyWorldOutput], world: FantasyWorld, inputs: Inputs, goal: Targets) -> None:
    world.zero_grad(set_to_none=True)
    geometry_loss(geometry_losses(run(world, inputs), goal)).backward()


def seconds_of(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each way; one round to warm up, then all take turns."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if turn:
                taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in taken.items()}


def explicit_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1) @ v


def bench_steps(quick: bool) -> dict[str, dict[str, float]]:
    size = ClipSize(9, 64, 96) if quick else ClipSize(17, 96, 160)
    world, (inputs, goal) = make_world(), step_inputs(MIDDLE.wan, size)
    runs = {"stage 1": stage1, "all blocks under no_grad": all_blocks_no_grad, "the guide's way": guide}
    ways = {name: lambda run=run: step(run, world, inputs, goal) for name, run in runs.items()}
    seconds = seconds_of(ways, 3 if quick else 5)
    return {
        name: {"seconds": s, "tokens_per_second": size.video_tokens / s, "ratio": s / seconds["stage 1"]}
        for name, s in seconds.items()
    }


def bench_attention(quick: bool) -> dict[str, dict[str, float]]:
    tokens = 1024 if quick else 3000
    q, k, v = (torch.randn(1, 12, tokens, 128, requires_grad=True) for _ in range(3))
    kinds = {"SDPA": F.scaled_dot_product_attention, "explicit softmax": explicit_attention}
    ways = {name: lambda attend=attend: attend(q, k, v).sum().backward() for name, attend in kinds.items()}
    seconds = seconds_of(ways, 3)
    peaks = {name: measured_peak(way) / 1e6 for name, way in ways.items()}
    return {
        name: {"seconds": seconds[name], "tokens_per_second": tokens / seconds[name], "peak_mb": peaks[name]} for name in ways
    }


def bench_heads(quick: bool) -> dict[str, dict[str, float]]:
    """One dense head, forward and backward: decoded a few frames at a time and recomputed, against all frames whole."""
    grid = (9, 4, 6) if quick else (21, 6, 10)
    head = make_world().depth_head
    tokens = grid[0] * grid[1] * grid[2]
    features = [torch.randn(1, tokens, MIDDLE.wan.dim, requires_grad=True) for _ in range(4)]
    chunk = heads.FRAMES_PER_CHUNK

    def run(chunked: bool) -> None:
        head.gradient_checkpointing = chunked
        heads.FRAMES_PER_CHUNK = chunk if chunked else heads.frames_of(grid[0])
        head.zero_grad(set_to_none=True)
        depth, confidence = head(features, grid)
        (depth.mean() + confidence.mean()).backward()

    try:
        ways = {"chunked and checkpointed": lambda: run(True), "whole": lambda: run(False)}
        seconds = seconds_of(ways, 1 if quick else 3)
        peaks = {name: measured_peak(way) / 1e6 for name, way in ways.items()}
    finally:
        heads.FRAMES_PER_CHUNK = chunk
    return {
        name: {"seconds": seconds[name], "tokens_per_second": tokens / seconds[name], "peak_mb": peaks[name]} for name in ways
    }


def show(title: str, rows: dict[str, dict[str, float]]) -> None:
    keys = list(next(iter(rows.values())))
    print(f"\n{title:28}" + "".join(f"{key:>20}" for key in keys))
    for name, row in rows.items():
        print(f"{name:28}" + "".join(f"{row[key]:20.4g}" for key in keys), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer tokens and repetitions, under 90 seconds")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    steps = bench_steps(quick)
    show("training step", steps)
    attention = bench_attention(quick)
    show("attention", attention)
    dense = bench_heads(quick)
    show("dense head", dense)
    traces = {stage: trace_step(ModelConfig(), stage, ClipSize()) for stage in ("stage1", "stage2")}
    flops = {name: {"forward_tflops": t.forward_flops / 1e12, "step_tflops": t.total_flops / 1e12} for name, t in traces.items()}
    show("full size, 81x336x592", flops)
    ok = steps["the guide's way"]["ratio"] >= AIM
    if not ok:
        print(f"MISSED  stage 1 is less than {AIM} times as fast as the guide's way", file=sys.stderr)
    result = {"steps": steps, "attention": attention, "heads": dense, "full_size": flops}
    print(json.dumps({"benchmark": "model", "ok": ok, **result}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
