"""What a preset's model is and takes: parameters beside the guide's numbers, tensor shapes, FLOPs, and a memory plan.

    python -m fw_model.describe --preset wan2.1-fun-1.3b [--json] [--gpu-memory 80] [--gpus 8] [--sharding none|fsdp]

Nothing is loaded and nothing downloaded: the model is built without memory. A full-size answer takes about a minute, nearly
all of it for the plan, which runs the steps on tensors without data.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from fw_model.config import ModelConfig, Preset, Stage, load_preset
from fw_model.describe.memory_plan import Plan, Sharding, make_plans
from fw_model.describe.step_trace import ClipSize
from fw_model.errors import explain_errors
from fw_model.model.fantasy_world import FantasyWorld

# Row -> (module prefixes, this project's figure, the training guide's), of the full size.
ROWS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "base (frozen)": (("base",), "1616.3M", "~1616M"),
    "latent bridge": (("bridge",), "56.7M", "~5M"),
    "GeoDiT blocks": (("geodit.blocks",), "878.5M", "~900M with the row below"),
    "GeoDiT shared time projection": (("geodit.time_projection",), "21.2M", ""),
    "depth, point, camera heads": (("depth_head", "point_head", "camera_head"), "50M +- 10M", "~50M"),
    "pose encoder": (("pose_encoder",), "~1M", "~1M"),
    "special tokens": (("tokens",), "15360", "~0.01M"),
    "camera adapters (stage 2)": (("camera_adapters",), "28.33M", "~30M"),
    "IRG cross-attention (stage 2)": (("interaction",), "191.3M", "~200M"),
    "stage 1 total": ((), "~1.01B", "956M"),
    "stage 2 total": ((), "~1.23B", "1186M"),
}
STAGES: tuple[Stage, ...] = ("stage1", "stage2")
PUBLISHED = "wan2.1-fun-1.3b"


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Row of `ROWS` -> parameters, from the model built on the meta device."""
    with torch.device("meta"):
        world = FantasyWorld(config)
    named = list(world.named_parameters())
    counts = {
        row: sum(p.numel() for name, p in named if name.startswith(tuple(f"{prefix}." for prefix in prefixes)))
        for row, (prefixes, _, _) in ROWS.items()
        if prefixes
    }
    for stage in STAGES:
        world.set_stage(stage)
        counts[f"stage {stage[-1]} total"] = sum(p.numel() for p in world.trainable_parameters().values())
    return counts


def tensor_shapes(config: ModelConfig, size: ClipSize) -> dict[str, list[int]]:
    """Name -> shape of what goes in, flows through and comes out for one clip."""
    wan = config.wan
    frames, rows, columns = size.latent_frames, size.height // 16, size.width // 16
    special = 1 + config.geometry.num_registers
    pixels = [1, size.frames, size.height, size.width]
    latents = [1, wan.in_dim // 2, frames, size.height // 8, size.width // 8]
    return {
        "latents": latents,
        "image latents": latents,
        "control latents": [1, wan.control_channels, frames, size.height, size.width],
        "text": [1, wan.text_len, wan.text_dim],
        "CLIP": [1, wan.image_tokens, wan.image_dim],
        "video tokens": [1, frames * rows * columns, wan.dim],
        "geometry tokens": [1, frames * (special + rows * columns), wan.dim],
        "velocity (stage 2)": latents,
        "depth": pixels,
        "points": [*pixels, 3],
        "pose encoding": [1, size.frames, 9],
    }


def describe(preset: Preset, gpu_gib: float = 80, gpus: int = 8, sharding: Sharding = "none") -> dict[str, Any]:
    """All that is printed, as plain data.

    Keys: preset, parameters {row: {built, project, guide}}, shapes {size: {name: shape}}, flops {stage: {...}}, memory.

    Raises:
        ConfigError: as for `make_plans`.
    """
    clip, model = preset.clip, preset.model
    landscape = ClipSize(clip.frames, clip.short_side, clip.long_side)
    portrait = ClipSize(clip.frames, clip.long_side, clip.short_side)
    plans = {stage: make_plans(preset, stage, gpu_gib, gpus, sharding) for stage in STAGES}
    flops = {
        stage: {
            "forward_per_clip": of_size[0].forward_flops,
            "step_per_clip": of_size[0].total_flops,
            "global_batch": preset.stage(stage).global_batch,
            "step": preset.stage(stage).global_batch * of_size[0].total_flops,
        }
        for stage, of_size in plans.items()
    }
    tables = {stage: [_plan_json(plan) for plan in of_size] for stage, of_size in plans.items()}
    published = model == ModelConfig()
    return {
        "preset": preset.name,
        "parameters": {
            row: {"built": count, "project": ROWS[row][1] if published else "", "guide": ROWS[row][2] if published else ""}
            for row, count in count_parameters(model).items()
        },
        "shapes": {str(size): tensor_shapes(model, size) for size in (landscape, portrait)},
        "flops": flops,
        "memory": {"gpu_gib": gpu_gib, "gpus": gpus, "sharding": sharding, "checkpointing": True, "plans": tables},
    }


def _plan_json(plan: Plan) -> dict[str, Any]:
    return {**asdict(plan), "size": str(plan.size), "fits": plan.fits}


def _print(found: dict[str, Any]) -> None:
    print(f"{found['preset']}\n\n{'parameters':34}{'built':>16}{'project':>14}  guide")
    for row, line in found["parameters"].items():
        print(f"{row:34}{line['built']:16,}{line['project']:>14}  {line['guide']}")
    landscape, portrait = found["shapes"]
    print(f"\n{'tensor':24}{'at ' + landscape:28}at {portrait}")
    for name, shape in found["shapes"][landscape].items():
        print(f"{name:24}{shape!s:28}{found['shapes'][portrait][name]}")
    print(f"\n{'TFLOPs at ' + landscape:24}{'forward':>10}{'step':>10}  of one clip (step: with backward and recomputation)")
    for stage, line in found["flops"].items():
        print(f"{stage:24}{line['forward_per_clip'] / 1e12:10.4g}{line['step_per_clip'] / 1e12:10.4g}", end="")
        print(f"  global batch of {line['global_batch']}: {line['step'] / 1e15:.4g} PFLOPs")
    memory = found["memory"]
    print(f"\nmemory: {memory['gpus']} x {memory['gpu_gib']:g} GiB, sharding {memory['sharding']}, checkpointing on; GiB per GPU")
    print(
        f"{'':8}{'clip':14}{'static':>8}{'1 clip':>8}{'each more':>10}{'peak':>8}{'usable':>8}{'batch':>7}{'accum.':>8}  remedy"
    )
    for plans in memory["plans"].values():
        for p in plans:
            numbers = f"{p['static_gib']:8.1f}{p['first_clip_gib']:8.1f}{p['further_clip_gib']:10.1f}{p['peak_gib']:8.1f}"
            verdict = p["remedy"] or "none needed" if p["fits"] else f"{p['remedy']} does not fit".strip()
            print(f"{p['stage']:8}{p['size']:14}{numbers}{p['usable_gib']:8.1f}{p['batch_per_gpu']:7}", end="")
            print(f"{p['accumulation']:8}  {verdict}")


@explain_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fw_model.describe", description="Parameters, shapes, FLOPs, memory plan.")
    parser.add_argument("--preset", default=PUBLISHED, help="name of a preset, or a YAML file")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--gpu-memory", type=float, default=80, help="GiB of one GPU (80)")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--sharding", choices=("none", "fsdp"), default="none", help="none: data parallel, as training runs")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted preset keys, e.g. clip.frames=41")
    args = parser.parse_intermixed_args(argv)
    found = describe(load_preset(args.preset, args.overrides), args.gpu_memory, args.gpus, args.sharding)
    if args.json:
        print(json.dumps(found))
    else:
        _print(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
