"""What a training step of a preset needs on a GPU, and what to change when it does not fit.

Bytes at the worst moment of one GPU = weights + gradients + AdamW's two moments + (several GPUs, not sharded) the gradient
buckets of DDP + the larger of activations (traced, see `step_trace`) and the optimizer's temporaries, which torch's
multi-tensor AdamW needs once for everything that trains. Sharding divides everything but the activations, and gathers two
blocks at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

from fw_model.config import ConfigError, ModelConfig, Preset, Stage
from fw_model.describe.step_trace import ClipSize, StepTrace, trace_step

Sharding = Literal["none", "fsdp"]
OptimizerChoice = Literal["adamw", "adamw in backward"]
GIB = 2**30
RESERVE = 0.1  # of a GPU: CUDA's context, convolution workspaces, fragmentation


@dataclass(frozen=True)
class Plan:
    """How one stage fits at one clip size."""

    stage: Stage
    size: ClipSize
    remedy: str  # what was changed against the preset, in words; "" for nothing
    static_gib: float  # there whatever the batch is
    first_clip_gib: float  # activations and temporaries of one clip
    further_clip_gib: float
    usable_gib: float
    batch_per_gpu: int  # the largest that fits and divides the global batch; 0: not even one clip does
    accumulation: int  # micro-batches for the preset's global batch
    peak_gib: float  # at batch_per_gpu (at one clip when that does not fit)
    forward_flops: int  # of one clip
    total_flops: int  # of one clip: forward, backward and recomputation

    @property
    def fits(self) -> bool:
        return self.batch_per_gpu > 0


def make_plans(preset: Preset, stage: Stage, gpu_gib: float, gpus: int, sharding: Sharding) -> list[Plan]:
    """Plans for the preset's clip size, then for the training guide's smaller ones until one fits.

    The guide's remedies, mildest first: a smaller batch with gradient accumulation (part of every plan), 288 x 512, 41
    frames, both. Gradient checkpointing is always on.

    Args:
        preset: model, clip size and global batch.
        stage: "stage1" or "stage2".
        gpu_gib: memory of one GPU.
        gpus: number of GPUs; must divide the global batch.
        sharding: "none" is data parallel; "fsdp" shares weights, gradients and moments out over the GPUs (the key `sharding`).

    Raises:
        ConfigError: a number of GPUs that does not divide the global batch, or a size that is not positive.
    """
    config = preset.stage(stage)
    if gpus < 1 or gpu_gib <= 0:
        raise ConfigError(f"a plan needs at least one GPU with memory, got {gpus} of {gpu_gib} GiB")
    if config.global_batch % gpus:
        raise ConfigError(f"{stage}.global_batch {config.global_batch} cannot be shared by {gpus} GPUs; choose a divisor of it")
    plans: list[Plan] = []
    for size, remedy in _remedies(preset):
        plans.append(_plan(preset, stage, size, remedy, gpu_gib * (1 - RESERVE), gpus, sharding))
        if plans[-1].fits:
            break
    return plans


def _plan(preset: Preset, stage: Stage, size: ClipSize, remedy: str, usable_gib: float, gpus: int, sharding: Sharding) -> Plan:
    config = preset.stage(stage)

    @cache
    def trace(batch: int) -> StepTrace:
        clips = ClipSize(size.frames, size.height, size.width, batch)
        bfloat16 = config.precision == "bfloat16"
        return trace_step(preset.model, stage, clips, bfloat16=bfloat16, train_geometry=config.train_geometry)

    static = static_bytes(trace(1), gpus, sharding)
    temporaries = trace(1).gradients / (gpus if sharding == "fsdp" else 1)
    if sharding == "fsdp" and gpus > 1:
        static += 2 * _largest_block_bytes(preset.model)

    def peak(batch: int) -> float:
        return (static + max(trace(batch).activations, temporaries)) / GIB

    share = config.global_batch // gpus
    # Other moments of the step may become the worst one in a larger batch, so growth from one clip to two can only be too
    # little: it picks a first candidate, which is then traced itself, and gives way to the next smaller if it does not fit.
    growth = trace(2).activations - trace(1).activations
    candidates = (b for b in range(share, 0, -1) if share % b == 0 and peak(1) + (b - 1) * growth / GIB <= usable_gib)
    batch = next((b for b in candidates if peak(b) <= usable_gib), 0)
    return Plan(
        stage=stage,
        size=size,
        remedy=_words(remedy, batch, share),
        static_gib=static / GIB,
        first_clip_gib=max(trace(1).activations, temporaries) / GIB,
        further_clip_gib=growth / GIB,
        usable_gib=usable_gib,
        batch_per_gpu=batch,
        accumulation=share // batch if batch else 0,
        peak_gib=peak(max(batch, 1)),
        forward_flops=trace(1).forward_flops,
        total_flops=trace(1).total_flops,
    )


def static_bytes(trace: StepTrace, gpus: int = 1, sharding: Sharding = "none") -> float:
    """Weights, gradients and AdamW's moments on one GPU; with DDP its gradient buckets, which are a second copy."""
    total = trace.weights + 3 * trace.gradients
    if sharding == "fsdp":
        return total / gpus
    return total + (trace.gradients if gpus > 1 else 0)


def choose_optimizer(trace: StepTrace, limit_gib: float) -> tuple[OptimizerChoice, dict[OptimizerChoice, float]]:
    """How AdamW's step fits into `limit_gib` of ordinary memory, and what each way needs in GiB.

    "adamw": torch's, tensor by tensor (no multi-tensor temporaries). "adamw in backward": the same arithmetic, applied to
    each tensor as soon as its gradient is complete and the gradient freed, so that gradients never exist together; what it
    cannot do is clip by the norm of all gradients. Moments stay float32 in both.
    """
    moments = 2 * trace.gradients
    needs: dict[OptimizerChoice, float] = {
        "adamw": (trace.weights + trace.gradients + moments + trace.activations) / GIB,
        "adamw in backward": (trace.weights + moments + trace.activations) / GIB,
    }
    return ("adamw" if needs["adamw"] <= limit_gib * (1 - RESERVE) else "adamw in backward"), needs


def _remedies(preset: Preset) -> Iterator[tuple[ClipSize, str]]:
    clip = preset.clip
    yield ClipSize(clip.frames, clip.short_side, clip.long_side), ""
    short, long = min(288, clip.short_side), min(512, clip.long_side)
    if (short, long) != (clip.short_side, clip.long_side):
        yield ClipSize(clip.frames, short, long), f"{short}x{long}"
    if clip.frames > 41:
        yield ClipSize(41, clip.short_side, clip.long_side), "41 frames"
        yield ClipSize(41, short, long), f"{short}x{long} and 41 frames"


def _words(remedy: str, batch: int, clips: int) -> str:
    accumulate = f"batch {batch} with {clips // batch} accumulated micro-batches" if 0 < batch < clips else ""
    return ", ".join(part for part in (remedy, accumulate) if part)


def _largest_block_bytes(config: ModelConfig) -> int:
    """A GeoDiT block in float32: 2 x 4 projections, feed-forward and pose adapter. The largest unit that is gathered."""
    dim, ffn = config.wan.dim, config.wan.ffn_dim
    return 4 * (9 * dim * dim + 2 * dim * ffn)
