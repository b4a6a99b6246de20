"""Seconds and memory of a training step of both stages against the plain way, data wait, tokens/s and, on a GPU, MFU.

    python benchmarks/bench_train.py [--quick] [--size middle|full]

Without a GPU it runs the middle size (see `middle_model.py`: every proportion of the full one, encoders included) in float32,
with one it runs the full size at 81 x 336 x 592 in bfloat16. Weights are made and clips random; nothing is downloaded.

"Ours" is `fw_model.train.train` itself, on a packed dataset, as its metrics report it. The plain way is what a first script for
this model does: it loads the whole pipeline, hands the new modules to the optimizer, and each step encodes the clip with the
VAE, the prompt with UMT5 and the first image with CLIP, runs all 30 blocks and the new modules under autograd, and calls
backward. The base is in the optimizer nowhere, but nothing froze it: its 30 blocks compute weight gradients that are thrown
away. Everything else is taken from this project, to leave no other difference: model, losses, draws, optimizer, loader and
activation checkpointing block by block (without it the full size needs 90 to 138 GiB for activations alone). It is spared what a
first script also does every step: decoding the video (frames lie on disk as arrays), and padding the prompt.

"plain, frozen" is the same with the base's weights frozen (in stage 2 gradients still pass through its 30 blocks, on their way to
the camera adapters): a more careful script, shown for comparison in a run without --quick. No bar is held against it.

A small VAE is further from a CPU's peak than a large one from a GPU's, so that at the middle size the encoders take more of a
plain step's seconds than of its FLOPs. The table says how much; the arithmetic for the full size is free of it.

Bars: plain / ours >= 2 in stage 1 and >= 1.3 in stage 2 (seconds), ours / plain <= 0.7 (peak memory), data wait <= 5 % of a step;
on a GPU whose peak is known, MFU >= 45 % in stage 2. Prints a table, the same ratios by arithmetic for the full size (FLOPs, and
bytes as GPUs hold them), and a last line of JSON; exits with 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from middle_model import FULL, MIDDLE, Size, encoder_parts
from random_clips import PROMPT, make_dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from fw_model.config import Preset, Stage
from fw_model.data.dataset import ClipDataset, collate
from fw_model.data.sampler import ResumableBucketSampler
from fw_model.data.schema import Batch
from fw_model.describe.step_trace import measured_peak, store_in_bfloat16, trace_step
from fw_model.model.fantasy_world import FantasyWorld
from fw_model.train import loop as training
from fw_model.train.metrics_log import read_metrics
from fw_model.train.objective import autocast, compute_losses, predict, training_draws
from fw_model.train.optimizers import make_optimizer

STAGES: tuple[Stage, ...] = ("stage1", "stage2")
SPEED_UP = {"stage1": 2.0, "stage2": 1.3}
MEMORY = 0.7
DATA_WAIT = 0.05
MFU = 0.45
Rows = dict[str, dict[str, float]]
# Dense bfloat16 peak of a GPU, FLOP/s, from its maker's data sheet.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "B200": 2250e12}


# ------------------------------------------------------------------------------------------------------------- the ways


@dataclass
class Setting:
    """What all ways share."""

    size: Size
    preset: Preset
    folder: Path
    device: torch.device

    @property
    def dataset(self) -> Path:
        return self.folder / "dataset"

    def for_steps(self, steps: int) -> Setting:
        stages = {stage: self.preset.stage(stage).model_copy(update={"steps": steps, "save_every": steps}) for stage in STAGES}
        return replace(self, preset=self.preset.model_copy(update=stages))


@dataclass
class Timing:
    """Seconds of every step, and how much of them went where."""

    steps: list[float]
    data: list[float]  # waiting for the loader
    encoders: list[float]

    def best(self, name: str) -> float:
        """The least of all steps: whatever else the machine does, and warming up, can only add."""
        return min(getattr(self, name))


def ours(setting: Setting, stage: Stage, stage1: Path | None, output: Path) -> Timing:
    """The project's own training, from the packed dataset to its checkpoint."""
    training.train(setting.preset, stage, setting.dataset, output, stage1)
    lines = [line for line in read_metrics(output / "metrics.jsonl") if "loss/total" in line]
    return Timing([line["seconds"] for line in lines], [line["data_seconds"] for line in lines], [0.0] * len(lines))


class Apart(nn.Module):
    """In the place of what joins the branches: each stays as it is."""

    def forward(self, own: Tensor, other: Tensor, *positions: Any) -> Any:
        return own, other


class NoShift(nn.Module):
    """In the place of a camera adapter."""

    def forward(self, hidden: Tensor, pose: Tensor, visible: Tensor | None = None) -> Tensor:
        return hidden


def make_plain(world: FantasyWorld, stage: Stage, frozen: bool) -> None:
    """Make `world` run and train the plain way: all 30 blocks in stage 1 too, which has nothing else of stage 2."""
    world.set_stage("stage2")
    if stage == "stage1":
        world.interaction = nn.ModuleList([Apart() for _ in world.interaction])
        world.camera_adapters = nn.ModuleList([NoShift() for _ in world.camera_adapters])
    world.base.requires_grad_(not frozen)


def plain(setting: Setting, stage: Stage, frozen: bool) -> Timing:
    """The plain way's loop; see the module's docstring."""
    preset, device = setting.preset, setting.device
    config = preset.stage(stage)
    dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    encoders = setting.size.make_encoders(str(device), dtype)
    model = FantasyWorld.from_preset(preset)
    if dtype == torch.bfloat16:
        store_in_bfloat16(model.base)
    make_plain(model, stage, frozen)
    model.enable_gradient_checkpointing(config.gradient_checkpointing)
    model.to(device).train()
    new = {name: p for name, p in model.named_parameters() if not name.startswith("base.")}
    optimizer = make_optimizer(new, config)
    clips = ClipDataset(setting.dataset, "train", preset.model.wan.text_len)
    sampler = ResumableBucketSampler(clips.buckets, config.global_batch, config.batch_per_device)
    loader = iter(DataLoader(clips, batch_sampler=sampler, collate_fn=collate, num_workers=config.workers))
    found = Timing([], [], [])
    for step in range(1, config.steps + 1):
        started = time.perf_counter()
        batch = next(loader)
        waited = time.perf_counter()
        frames = np.load(setting.folder / "frames" / f"{batch.clip_ids[0]}.npy")
        batch = encode(batch, frames, encoders)
        encoded = time.perf_counter()
        draws = training_draws(batch, config, step, 0).to(device)
        batch = batch.to(device)
        with autocast(config, device):
            output = predict(model, batch, draws)
        losses = compute_losses(output, batch, draws, "stage2", config)
        losses["total"].backward()
        float(nn.utils.clip_grad_norm_(new.values(), config.max_grad_norm))
        optimizer.step()
        model.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.steps.append(time.perf_counter() - started)
        found.data.append(waited - started)
        found.encoders.append(encoded - waited)
    return found


def encode(batch: Batch, frames: np.ndarray, encoders: Any) -> Batch:
    """The batch (of one clip) with what the encoders make of its frames and prompt."""
    latents = torch.from_numpy(encoders.encode_video(frames)).float()[None]
    text = torch.from_numpy(encoders.encode_text(PROMPT)).float()[None]
    image = torch.from_numpy(encoders.encode_image(frames[0])).float()[None]
    return replace(batch, latents=latents, text=text, image=image)


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Largest memory of tensors while `run` runs, weights included: it builds everything itself."""
    if device.type != "cuda":
        return measured_peak(run)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


# ------------------------------------------------------------------------------------------------------ the full size


def full_size_arithmetic(stage: Stage, frozen_too: bool) -> dict[str, float]:
    """FLOPs and bytes of one clip's step at the published size, ours and the plain way's, counted without any data.

    Bytes as a GPU holds them: base and encoders in bfloat16, new weights, their gradients and two moments in float32, and
    the activations of the worst moment.
    """

    model, clip = FULL.preset().model, FULL.clip
    encoders = encoder_parts(FULL).values()
    encoder_flops, encoder_bytes = sum(part.flops for part in encoders), 2 * sum(part.parameters for part in encoders)
    own = trace_step(model, stage, clip)
    found = {"ours_tflops": own.total_flops, "ours_gib": own.weights + 3 * own.gradients + own.activations}
    for name, frozen in (("plain", False), ("plain_frozen", True))[: 1 + frozen_too]:
        trace = trace_step(model, stage, clip, change=lambda world, frozen=frozen: make_plain(world, stage, frozen))
        found[f"{name}_tflops"] = trace.total_flops + encoder_flops
        found[f"{name}_gib"] = trace.weights + trace.gradients + 2 * own.gradients + trace.activations + encoder_bytes
    unit = {"tflops": 1e12, "gib": 2**30}
    return {name: value / unit[name.rpartition("_")[2]] for name, value in found.items()}


def model_flops(size: Size, stage: Stage) -> int:
    """FLOPs of one clip's forward and backward pass; recomputation is not counted, as is usual for MFU."""
    return trace_step(size.preset().model, stage, size.clip, checkpointing=False).total_flops


def mfu(flops: float, seconds: float, gpu: str) -> float | None:
    """Share of a GPU's peak that `flops` in `seconds` are; None for a GPU that is not in `PEAK_FLOPS`."""
    peak = next((peak for name, peak in PEAK_FLOPS.items() if name in gpu), None)
    return None if peak is None else flops / seconds / peak


# ----------------------------------------------------------------------------------------------------------- the run


Way = Callable[[Setting, str], Timing]


def ways_of(setting: Setting, frozen_too: bool) -> dict[str, Way]:
    """Row of the table -> how to run it for some steps, under a name that tells its folders apart."""
    found: dict[str, Way] = {}
    for stage in STAGES:

        def own(setting: Setting, run: str, stage: Stage = stage) -> Timing:
            steps = setting.preset.stage1.steps
            start = setting.folder / f"stage1-{run}" / f"step-{steps}.safetensors" if stage == "stage2" else None
            return ours(setting, stage, start, setting.folder / f"{stage}-{run}")

        found[f"{stage} ours"] = own
        found[f"{stage} plain"] = lambda setting, run, stage=stage: plain(setting, stage, frozen=False)
        if frozen_too:
            found[f"{stage} plain, frozen"] = lambda setting, run, stage=stage: plain(setting, stage, frozen=True)
    return found


def measure(setting: Setting, steps: int, frozen_too: bool) -> tuple[Rows, dict[str, dict[str, float]]]:
    """(the table's rows, the full size's arithmetic by stage).

    The arithmetic is a minute of Python; it goes on beside the memory runs, whose allocations no clock measures.
    """
    ways = ways_of(setting, frozen_too)
    timings = {name: way(setting.for_steps(steps), "time") for name, way in tqdm(ways.items(), desc="timing", disable=None)}
    rows = {}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        arithmetic = {stage: pool.submit(full_size_arithmetic, stage, frozen_too) for stage in STAGES}
        for name, way in ways.items():
            peak = peak_bytes(lambda way=way: way(setting.for_steps(2), "memory"), setting.device)
            seconds = timings[name].best("steps")
            rows[name] = {
                "seconds": seconds,
                "encoder_seconds": timings[name].best("encoders"),
                "data_seconds": max(timings[name].data[1:]),  # the first waits for the data workers to start
                "peak_gib": peak / 2**30,
                "tokens_per_second": setting.size.clip.video_tokens / seconds,
            }
            print_row(name, rows[name])
        return rows, {stage: future.result() for stage, future in arithmetic.items()}


def print_row(name: str, row: dict[str, float]) -> None:
    print(
        f"{name:22}{row['seconds']:10.3f}{row['encoder_seconds']:12.3f}{row['data_seconds']:11.4f}{row['peak_gib']:10.3f}"
        f"{row['tokens_per_second']:11.0f}",
        flush=True,
    )


def judge(rows: Rows) -> tuple[dict[str, float], list[str]]:
    """(ratios, bars that were missed in words)."""
    ratios, missed = {}, []
    for stage in STAGES:
        own, other = rows[f"{stage} ours"], rows[f"{stage} plain"]
        ratios[f"{stage}_speed_up"] = speed = other["seconds"] / own["seconds"]
        if frozen := rows.get(f"{stage} plain, frozen"):
            ratios[f"{stage}_speed_up_over_frozen"] = frozen["seconds"] / own["seconds"]
        ratios[f"{stage}_memory"] = memory = own["peak_gib"] / other["peak_gib"]
        ratios[f"{stage}_data_wait"] = wait = own["data_seconds"] / own["seconds"]
        if not speed >= SPEED_UP[stage]:
            missed.append(f"{stage}: {speed:.2f} times faster than the plain way, wanted >= {SPEED_UP[stage]:g}")
        if not memory <= MEMORY:
            missed.append(f"{stage}: {memory:.2f} of the plain way's peak memory, wanted <= {MEMORY:g}")
        if not wait <= DATA_WAIT:
            missed.append(f"{stage}: {100 * wait:.1f} % of a step waits for data, wanted <= {100 * DATA_WAIT:g} %")
    return ratios, missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three timed steps a way instead of five, no frozen plain way")
    parser.add_argument("--size", choices=("middle", "full"), help="default: full with a GPU, middle without")
    args = parser.parse_args()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    size = {"middle": MIDDLE, "full": FULL}[args.size or ("full" if gpu else "middle")]
    device = torch.device("cuda" if gpu else "cpu")
    logging.disable(logging.WARNING)
    overrides = [
        f"{stage}.{item}"
        for stage in STAGES
        for item in (
            *("global_batch=1", "validation_clips=1", "validate_every=1000", "log_every=1", "trackers=[]"),
            f"precision={'bfloat16' if gpu else 'float32'}",
        )
    ]
    with tempfile.TemporaryDirectory() as name:
        setting = Setting(size, size.preset(*overrides), Path(name), device)
        make_dataset(setting.folder, size, setting.preset)
        print(f"{size.name} size, {size.clip}, {gpu or f'CPU, {torch.get_num_threads()} threads'}; one clip a step")
        print(f"{'way':22}{'s / step':>10}{'of it enc.':>12}{'data wait':>11}{'peak GiB':>10}{'tokens/s':>11}")
        rows, full = measure(setting, 3 if args.quick else 5, frozen_too=not args.quick)
    ratios, missed = judge(rows)
    result: dict[str, Any] = {"size": size.name, "device": gpu or "cpu", "rows": rows, "ratios": ratios}
    if gpu:
        shares = {stage: mfu(model_flops(size, stage), rows[f"{stage} ours"]["seconds"], gpu) for stage in STAGES}
        print("MFU", {stage: "unknown peak" if share is None else f"{100 * share:.1f} %" for stage, share in shares.items()})
        result["mfu"] = shares
        if size is FULL and shares["stage2"] is not None and shares["stage2"] < MFU:
            missed.append(f"stage2: MFU {100 * shares['stage2']:.1f} %, wanted >= {100 * MFU:g} %")
    result["full_size"] = full
    print_ratios(ratios, full)
    for line in missed:
        print(f"MISSED  {line}", file=sys.stderr)
    print(json.dumps({"benchmark": "train", "ok": not missed, "missed": missed, **rounded(result)}))
    return 1 if missed else 0


def print_ratios(ratios: dict[str, float], full: Rows) -> None:
    print(f"\n{'':34}{'measured':>10}{'full size by arithmetic':>26}")
    for stage, numbers in full.items():
        own = numbers["ours_tflops"]
        for name, key in (("plain", "speed_up"), ("plain_frozen", "speed_up_over_frozen")):
            if (other := numbers.get(f"{name}_tflops")) is not None:
                what = f"{stage} {name.replace('_', ', ')} / ours, time"
                print(f"{what:34}{ratios[f'{stage}_{key}']:10.2f}{other / own:8.2f}  {other:.0f} / {own:.0f} TFLOPs")
        own, other = numbers["ours_gib"], numbers["plain_gib"]
        what = f"{stage} ours / plain, memory"
        print(f"{what:34}{ratios[f'{stage}_memory']:10.2f}{own / other:8.2f}  {own:.1f} / {other:.1f} GiB")


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
