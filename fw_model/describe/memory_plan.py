"""What a training step of a preset needs on a GPU, and what to change when it does not fit.

Bytes at the worst moment of one GPU = what is kept (weights, gradients, the optimizer's moments, a moving average, encoders
that run while training) + activations, traced beside all gradients (see `step_trace`): from the second micro-batch on they
are held through the forward pass, and DDP's buckets, of which they are views, always are. AdamW is fused and has no
temporaries. Sharding divides everything but encoders and activations, and gathers two blocks at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

from fw_model.config import ConfigError, EncodersConfig, ModelConfig, Preset, Stage, StageConfig
from fw_model.describe.step_trace import ClipSize, StepTrace, trace_step

Sharding = Literal["none", "fsdp"]
OptimizerChoice = Literal["adamw", "adamw in backward"]
GIB = 2**30
PUBLISHED_ENCODERS = 5.68e9 + 0.63e9 + 0.13e9  # parameters of UMT5-XXL's encoder, CLIP ViT-H/14's vision tower, Wan's VAE
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
        return trace_step(
            preset.model,
            stage,
            clips,
            bfloat16=config.precision == "bfloat16",
            train_geometry=config.train_geometry,
            held_gradients=True,
        )

    static = static_bytes(trace(1), config, gpus, sharding)
    if config.encode_online:
        static += encoder_bytes(preset.encoders)
    if config.offload_optimizer:
        static += 2 * _largest_tensor_bytes(preset.model)  # whose moments are on the GPU for the moment of their update
    if sharding == "fsdp" and gpus > 1:
        static += 2 * _largest_block_bytes(preset.model)

    def peak(batch: int) -> float:
        return (static + trace(batch).activations) / GIB

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
        first_clip_gib=trace(1).activations / GIB,
        further_clip_gib=growth / GIB,
        usable_gib=usable_gib,
        batch_per_gpu=batch,
        accumulation=share // batch if batch else 0,
        peak_gib=peak(max(batch, 1)),
        forward_flops=trace(1).forward_flops,
        total_flops=trace(1).total_flops,
    )


def static_bytes(trace: StepTrace, config: StageConfig, gpus: int = 1, sharding: Sharding = "none") -> float:
    """Weights, gradients, the optimizer's moments and a moving average on one GPU.

    Moments are two float32 a weight, two bytes in all with adamw8bit, none with `offload_optimizer`.
    """
    moments = 2.0 * trace.gradients
    if config.optimizer == "adamw8bit":
        moments = trace.gradients / 2
    elif config.offload_optimizer:
        moments = 0.0
    average = trace.gradients if config.ema_decay else 0
    total = trace.weights + trace.gradients + moments + average
    return total / gpus if sharding == "fsdp" else total


def encoder_bytes(encoders: EncodersConfig) -> float:
    """Weights of VAE, UMT5 and CLIP, which `encode_online` keeps beside the model. Seeded ones are too small to count."""
    width = 4 if encoders.dtype == "float32" else 2
    return 0.0 if encoders.weights.source == "seeded" else width * PUBLISHED_ENCODERS


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


def _largest_tensor_bytes(config: ModelConfig) -> int:
    """The shared time projection of the GeoDiT or a feed-forward's matrix, in float32."""
    dim, ffn = config.wan.dim, config.wan.ffn_dim
    return 4 * max(9 * dim * dim, dim * ffn)


def _largest_block_bytes(config: ModelConfig) -> int:
    """A GeoDiT block in float32: 2 x 4 projections, feed-forward and pose adapter. The largest unit that is gathered."""
    dim, ffn = config.wan.dim, config.wan.ffn_dim
    return 4 * (9 * dim * dim + 2 * dim * ffn)
