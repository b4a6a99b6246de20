"""The model's ways of saving time and memory against what one would do otherwise, as ratios in one run.

A model with the full one's proportions (12 + 18 blocks, every width a quarter), on the CPU in float32 with gradient
checkpointing. A step is forward, losses, backward and AdamW. Measured are

- the stage 1 step as it is (blocks 12..29 of the base do not run), against the training guide's way (all 30 blocks,
  cross-attention active, gradients through the video blocks after the bridge) and against running all 30 under no_grad;
- attention through scaled_dot_product_attention against an explicit softmax, forward and backward;
- the dense heads a few frames at a time and checkpointed, against whole.

Times are medians of interleaved runs, memory is what torch's allocator reports at the worst moment, tokens are video tokens.
Prints tables, the FLOPs of the full size beside them, and a last line of JSON; exits with 1 when a bar is missed.
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
from torch import Tensor, nn

from fw_model.config import GeometryConfig, ModelConfig, WanConfig
from fw_model.describe.step_trace import ClipSize, measured_peak, step_inputs, trace_step
from fw_model.model import heads
from fw_model.model.backbone import WanBackbone
from fw_model.model.fantasy_world import FantasyWorld
from fw_model.train.losses import geometry_losses, total_loss

GUIDE_SPEED_UP = 1.5  # asked of the stage 1 step against the guide's way
Run = Callable[[], object]
Row = dict[str, float]


def middle_config() -> ModelConfig:
    """The full model, all 30 blocks of it, with every width divided by 4.

    Narrower models would say nothing: on a CPU the dense heads are bound by memory, the blocks by arithmetic, and below these
    widths the heads take over. Attention's share is smaller than at full size (fewer tokens for the width), in every way alike.
    """
    less = 4
    geometry = GeometryConfig(
        bridge_heads=2,
        head_channels=(256 // less, 256 // less, 192 // less, 96 // less),
        head_features=256 // less,
        camera_dim=128,
        pose_rank=128 // less,
        cross_dim=1152 // less,
        cross_heads=12 // less,
    )
    wan = WanConfig(
        dim=1536 // less,
        ffn_dim=8960 // less,
        num_heads=12 // less,
        text_dim=4096 // less,
        image_dim=1280 // less,
        image_tokens=257 // less,
        text_len=512 // less,
    )
    return ModelConfig(wan=wan, geometry=geometry)


class NoAdapter(nn.Module):
    """Stands in for a camera adapter: the guide's stage 1 has none, so that its gradients end at the bridge."""

    def forward(self, hidden: Tensor, pose: Tensor, visible: Tensor | None = None) -> Tensor:
        return hidden


def build(config: ModelConfig) -> FantasyWorld:
    world = FantasyWorld(config, WanBackbone.seeded(config.wan, seed=0))
    world.initialise(seed=0)
    world.enable_gradient_checkpointing()
    return world


def as_the_guide(world: FantasyWorld) -> None:
    """Make a model in stage 2 the guide's stage 1."""
    world.camera_adapters = nn.ModuleList([NoAdapter() for _ in world.camera_adapters])


def stage1_steps(config: ModelConfig, size: ClipSize) -> dict[str, Run]:
    """Name -> one optimizer step of stage 1, done that way; all on the same clip and losses."""
    inputs, targets = step_inputs(config.wan, size)
    ours, guides = build(config).set_stage("stage1"), build(config).set_stage("stage2")
    as_the_guide(guides)
    with torch.no_grad():
        embedded = ours.base.embed(**{key: value for key, value in inputs.items() if key != "pose_mask"})

    def stepper(world: FantasyWorld) -> Run:
        optimizer = torch.optim.AdamW(world.trainable_parameters().values(), lr=1e-5, fused=True)

        def step() -> None:
            total_loss(geometry_losses(world(**inputs), targets)).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    own_step = stepper(ours)

    def all_blocks() -> None:
        own_step()
        hidden, cond = embedded
        with torch.no_grad():
            for i in range(config.geometry.pcb_blocks, config.wan.num_layers):
                hidden = ours.base.block(i, hidden, cond)
            ours.base.head(hidden, cond)

    return {"as built": own_step, "guide's way": stepper(guides), "all blocks under no_grad": all_blocks}


def explicit_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v


def attentions(tokens: int) -> dict[str, Run]:
    """Name -> forward and backward of the full model's attention (12 heads of 128) over so many tokens."""
    q, k, v = (torch.randn(1, 12, tokens, 128, requires_grad=True) for _ in range(3))
    up = torch.randn(1, 12, tokens, 128)

    def runner(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Run:
        return lambda: torch.autograd.grad(attend(q, k, v), (q, k, v), up)

    return {"scaled_dot_product_attention": runner(F.scaled_dot_product_attention), "explicit softmax": runner(explicit_softmax)}


def dense_heads(config: ModelConfig, size: ClipSize) -> dict[str, Run]:
    """Name -> forward and backward of the depth head over a clip."""
    head = heads.DPTHead(config.wan.dim, config.geometry, "depth")
    grid = (size.latent_frames, size.height // 16, size.width // 16)
    features = [torch.randn(1, size.video_tokens, config.wan.dim, requires_grad=True) for _ in range(4)]
    usual = heads.FRAMES_PER_CHUNK

    def runner(chunk: int, checkpointing: bool) -> Run:
        def run() -> None:
            heads.FRAMES_PER_CHUNK, head.gradient_checkpointing = chunk, checkpointing
            depth, confidence = head(features, grid)
            torch.autograd.grad(depth.mean() + confidence.mean(), [*features, *head.parameters()])
            heads.FRAMES_PER_CHUNK = usual

        return run

    return {
        f"{usual} frames at a time, checkpointed": runner(usual, True),
        f"{usual} frames at a time": runner(usual, False),
        "whole": runner(10**9, False),
    }


def measure(ways: dict[str, Run], tokens: int, repeats: int) -> dict[str, Row]:
    """Name -> seconds, tokens per second and peak memory; each way's ratios are against the first."""
    for run in ways.values():
        run()  # warms up, and makes the optimizer's moments
    peaks = {name: measured_peak(run) for name, run in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, run in ways.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    first = next(iter(ways))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        name: {
            "seconds": median[name],
            "tokens_per_second": tokens / median[name],
            "peak_mb": peaks[name] / 1e6,
            "times_slower": median[name] / median[first],
            "times_memory": peaks[name] / peaks[first],
        }
        for name in ways
    }


def show(title: str, rows: dict[str, Row]) -> None:
    print(f"\n{title:42}{'seconds':>9}{'tokens/s':>10}{'peak MB':>9}{'slower':>8}{'memory':>8}")
    for name, row in rows.items():
        print(
            f"{name:42}{row['seconds']:9.3f}{row['tokens_per_second']:10.1f}{row['peak_mb']:9.0f}"
            f"{row['times_slower']:8.2f}{row['times_memory']:8.2f}",
            flush=True,
        )


def full_size_flops() -> dict[str, float]:
    """TFLOPs of one clip of 81 x 336 x 592 through the full model, traced (see fw_model.describe.step_trace)."""
    found = {}
    for stage in ("stage1", "stage2"):
        trace = trace_step(ModelConfig(), stage, ClipSize())
        found |= {f"{stage}_forward": trace.forward_flops / 1e12, f"{stage}_step": trace.total_flops / 1e12}
    guides = trace_step(ModelConfig(), "stage2", ClipSize(), change=as_the_guide)
    return found | {"stage1_step_guides_way": guides.total_flops / 1e12}


def missed_bars(found: dict[str, dict[str, Row]]) -> list[str]:
    """What was aimed at and not reached, in words."""
    speed_up = found["stage1"]["guide's way"]["times_slower"]
    missed = [] if speed_up >= GUIDE_SPEED_UP else [f"the guide's way takes {speed_up:.2f} times the stage 1 step, wanted 1.5"]
    for part, other in (("attention", "explicit softmax"), ("heads", "whole")):
        if found[part][other]["times_memory"] <= 1:
            missed.append(f"{part}: {other} takes no more memory")
    return missed


def rounded(table: dict[str, Row]) -> dict[str, Row]:
    return {name: {key: float(f"{value:.4g}") for key, value in row.items()} for name, row in table.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller clips for attention and heads; stage 1 as without it")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    config = middle_config()
    size = ClipSize(21, 128, 160)
    head_size = ClipSize(41, 64, 96) if quick else ClipSize(81, 96, 160)
    tokens, repeats = (1024, 3) if quick else (2048, 3)
    found = {}
    for part, title, ways, count in (
        ("stage1", f"stage 1 step at {size}", stage1_steps(config, size), size.video_tokens),
        ("attention", f"attention over {tokens} tokens", attentions(tokens), tokens),
        ("heads", f"depth head at {head_size}", dense_heads(config, head_size), head_size.video_tokens),
    ):
        found[part] = measure(ways, count, repeats)
        show(title, found[part])
    flops = full_size_flops()
    print(f"\nfull size, one clip of {ClipSize()}: " + ", ".join(f"{name} {x:.4g} TFLOPs" for name, x in flops.items()))
    missed = missed_bars(found)
    for line in missed:
        print(f"MISSED  {line}", file=sys.stderr)
    tables = {part: rounded(rows) for part, rows in found.items()}
    summary = {"benchmark": "model", "ok": not missed, "missed": missed, "threads": torch.get_num_threads()}
    print(json.dumps({**summary, **tables, "full_size_tflops": flops}))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
