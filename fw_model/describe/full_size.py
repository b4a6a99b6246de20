"""The real 1.3B configuration on an ordinary machine: one optimizer step of each stage and one of denoising, with seeded weights.

    python -m fw_model.describe.full_size

5 frames of 64 x 96, the base stored in bfloat16, trained weights in float32, gradient checkpointing. The memory plan decides
how AdamW runs: see `memory_plan.choose_optimizer`. Prints seconds, peak memory and parameters, and a last line of JSON; exits
with 1 when memory went over the limit or a weight is not finite.

Products are computed in float32 and rounded to bfloat16 where the base stores it, which is what bfloat16 hardware gives. A CPU
without such hardware has only slow bfloat16 kernels: a 48 x 8960 x 1536 product of the backward pass took 6.9 s on one core of
an AVX2 machine, and 0.16 s in float32; the two steps took 984 s under autocast.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from fw_model.config import Preset, Stage, load_preset
from fw_model.describe.__main__ import PUBLISHED, STAGES
from fw_model.describe.memory_plan import OptimizerChoice, choose_optimizer
from fw_model.describe.step_trace import ClipSize, compute_in_float32, step_inputs, store_in_bfloat16, trace_step
from fw_model.errors import explain_errors
from fw_model.model.fantasy_world import FantasyWorld
from fw_model.train.flow import diffusion_loss
from fw_model.train.losses import geometry_losses, total_loss
from fw_model.train.optimizers import decayed, make_optimizer

LIMIT_GIB = 20.0
SIZE = ClipSize(frames=5, height=64, width=96)


class AdamWInBackward:
    """AdamW, one tensor at a time, as soon as its gradient is complete; the gradient is freed at once.

    The numbers are torch.optim.AdamW's, fused: half the time of its loop over tensors on a CPU, and no temporaries. The global
    gradient norm is never known, so it cannot be clipped. `close` takes the hooks off.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], learning_rate: float, weight_decay: float) -> None:
        self._optimizers: dict[nn.Parameter, torch.optim.AdamW] = {}
        self._hooks = []
        for name, p in parameters.items():
            decay = weight_decay if decayed(name, p) else 0.0
            self._optimizers[p] = torch.optim.AdamW([p], lr=learning_rate, weight_decay=decay, fused=True)
            self._hooks.append(p.register_post_accumulate_grad_hook(self._update))

    def _update(self, parameter: torch.Tensor) -> None:
        optimizer = self._optimizers[parameter]  # type: ignore[index]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def take_step(world: FantasyWorld, preset: Preset, stage: Stage, choice: OptimizerChoice, size: ClipSize) -> float:
    """One optimizer step of a stage on a made clip; returns the loss before it."""
    config = preset.stage(stage)
    world.set_stage(stage).enable_gradient_checkpointing()
    parameters = world.trainable_parameters()
    inputs, targets = step_inputs(preset.model.wan, size)
    in_backward = None
    if choice == "adamw in backward":
        in_backward = AdamWInBackward(parameters, config.learning_rate, config.weight_decay)
    output = world(**inputs)
    losses = geometry_losses(output, targets)
    if output.velocity is not None:
        latents = inputs["latents"]
        losses["diffusion_loss"] = diffusion_loss(output.velocity, torch.randn_like(latents), latents, inputs["timestep"])
    loss = total_loss(losses, config.camera_weight, config.lambda_geometry)
    del output, losses
    loss.backward()
    if in_backward is not None:
        in_backward.close()
        return float(loss.detach())
    nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm)
    make_optimizer(parameters, config.model_copy(update={"optimizer": "adamw", "offload_optimizer": False})).step()
    for parameter in parameters.values():
        parameter.grad = None
    return float(loss.detach())


@torch.no_grad()
def denoise(world: FantasyWorld, preset: Preset, size: ClipSize) -> bool:
    """One step of generation with guidance: two passes, the first with its geometry. Whether all of it is finite."""
    world.set_stage("stage2").enable_gradient_checkpointing(False)
    inputs, _ = step_inputs(preset.model.wan, size)
    del inputs["pose_mask"]  # all are seen, and generation says nothing of it
    output = world(**inputs)
    without = world.velocity(**{**inputs, "text": torch.zeros_like(inputs["text"])})
    assert output.velocity is not None
    guided = without + 5.0 * (output.velocity - without)
    return all(bool(found.isfinite().all()) for found in (guided, output.depth, output.points, output.pose_encodings[-1]))


def peak_gib() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


@explain_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fw_model.describe.full_size", description="One step of each stage at full size."
    )
    parser.add_argument("--preset", default=PUBLISHED, help="name of a preset, or a YAML file; its base is always seeded")
    preset = load_preset(parser.parse_args(argv).preset, ["base.source=seeded"])
    torch.manual_seed(0)

    choices: dict[Stage, OptimizerChoice] = {}
    for stage in STAGES:
        trace = trace_step(preset.model, stage, SIZE, float32_products=True)
        choices[stage], needs = choose_optimizer(trace, LIMIT_GIB)
        words = ", ".join(f"{name} {need:.1f} GiB" for name, need in needs.items())
        print(f"plan for {stage} in {LIMIT_GIB:g} GiB: {words}; uses {choices[stage]}", flush=True)

    started = time.perf_counter()
    world = FantasyWorld.from_preset(preset)
    store_in_bfloat16(world.base)
    compute_in_float32(world.base)
    result: dict[str, object] = {"build_seconds": round(time.perf_counter() - started, 1)}
    print(f"built in {result['build_seconds']} s, peak {peak_gib():.1f} GiB", flush=True)
    finite = True
    for stage in STAGES:
        started = time.perf_counter()
        loss = take_step(world, preset, stage, choices[stage], SIZE)
        seconds = time.perf_counter() - started
        trained = world.trainable_parameters().values()
        finite &= all(bool(p.isfinite().all()) for p in trained)
        line = {
            "seconds": round(seconds, 1),
            "loss": round(loss, 4),
            "optimizer": choices[stage],
            "parameters": sum(p.numel() for p in trained),
            "peak_gib": round(peak_gib(), 2),
        }
        result[stage] = line
        print(f"{stage}: {line}", flush=True)
    started = time.perf_counter()
    finite &= denoise(world, preset, SIZE)
    result["denoise"] = {"seconds": round(time.perf_counter() - started, 1), "peak_gib": round(peak_gib(), 2)}
    print(f"denoise: {result['denoise']}", flush=True)
    result["base_parameters"] = sum(p.numel() for p in world.base.parameters())
    result["peak_gib"], result["limit_gib"] = round(peak_gib(), 2), LIMIT_GIB
    result["ok"] = finite and peak_gib() < LIMIT_GIB
    print(json.dumps(result))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
