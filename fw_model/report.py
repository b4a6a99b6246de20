"""The report of a run: ground truth beside prediction on held-out clips, in one HTML file that needs no network.

python -m fw_model.report --run OUTPUT_DIR --dataset DIR --output FILE.html [--clips 4]
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fw_model.cameras import decode_pose
from fw_model.checkpoints import (
    CheckpointError,
    CheckpointMetadata,
    latest_checkpoint,
    load_checkpoint,
    read_metadata,
    write_bytes,
)
from fw_model.data.dataset import collate
from fw_model.data.manifest import DatasetError, dataset_digest
from fw_model.data.online import Clips
from fw_model.fantasy_world import FantasyWorld
from fw_model.losses import make_targets
from fw_model.metrics import Array, absrel, ate, auc, delta125, depth_scale, relative_pose_errors
from fw_model.objective import SCHEDULE, autocast, fixed_draws, generator_for, predict
from fw_model.report_page import page
from fw_model.run_folder import TrainingError, read_result
from fw_model.training_run import base_dtype, open_dataset
from fw_model.visualize import pick_frames, thumbnail_png
from fw_model.wan_weights import BaseModelError

log = logging.getLogger(__name__)

NOISE_SHARE = 0.1  # clips are shown to the model with about this much noise


@dataclass(frozen=True)
class ClipResult:
    """One clip, as it is and as predicted. T frames of H x W."""

    clip_id: str
    depth: Array  # [T, H, W] clip units
    valid: Array  # [T, H, W] bool
    points: Array  # [T, H, W, 3]
    w2c: Array  # [T, 3, 4]
    predicted_depth: Array
    predicted_points: Array
    predicted_w2c: Array
    numbers: dict[str, float]  # absrel, delta125, depth_scale, ate, auc30; NaN where undefined


@dataclass(frozen=True)
class ReportData:
    """All that the page shows."""

    metadata: CheckpointMetadata
    checkpoint: Path
    metrics: Path
    dataset: str | Path
    dataset_digest: str
    split: str  # of the clips shown
    timestep: float
    validation: dict[str, dict[str, float]] | None  # "before" and "after"; None while the run is not complete
    seconds: float | None
    clips: list[ClipResult]


@dataclass(frozen=True)
class ReportSummary:
    """What a caller shows next to the link to a report."""

    path: Path
    thumbnail: bytes  # PNG below 60 kB: true over predicted depth of the first clip
    numbers: dict[str, float]  # means over the clips, finite ones only, and the validation losses


def write_report(run: Path, dataset: str | Path, output: Path, clips: int = 4, device: str = "cpu") -> ReportSummary:
    """Predict held-out clips with a run's last checkpoint and write the page.

    The model is rebuilt from the preset in the checkpoint. Clips are spread over the validation split (the training split
    where there is none, which the page says), noised to `NOISE_SHARE`, without pose tokens.

    Args:
        run: output folder of `fw_model.train`, complete or not.
        dataset: folder with a manifest, or the URL of one; need not be the one trained on.
        output: the HTML file, written atomically.
        clips: how many to show.
        device: where the model runs.

    Raises:
        CheckpointError: no checkpoint in `run`, or a damaged one.
        DatasetError, TrainingError: a dataset that is missing or does not fit the model.
    """
    checkpoint = latest_checkpoint(run)
    if checkpoint is None:
        raise CheckpointError(f"{run}: no step-N.safetensors; train first, e.g. dagster job execute -j stage1_training")
    metadata = read_metadata(checkpoint)
    _, held_out = open_dataset(dataset, metadata.preset, metadata.stage, device)
    model = FantasyWorld.from_preset(metadata.preset)
    load_checkpoint(checkpoint, model, metadata.stage, metadata.preset)
    model.base.to(base_dtype(metadata.preset.stage(metadata.stage)))  # as it was trained
    model.to(device).eval()
    timestep = float(SCHEDULE.timesteps[int((SCHEDULE.sigmas - NOISE_SHARE).abs().argmin())])
    chosen = pick_frames(len(held_out), clips)
    results = [_predict_clip(model, held_out, index, timestep, metadata, device) for index in chosen]
    result = read_result(run)
    if result is not None and result.checkpoint != checkpoint.name:
        result = None  # the numbers of another checkpoint
    data = ReportData(
        metadata=metadata,
        checkpoint=checkpoint,
        metrics=run / "metrics.jsonl",
        dataset=dataset,
        dataset_digest=dataset_digest(dataset),
        split=held_out.split,
        timestep=timestep,
        validation=result.validation if result else None,
        seconds=result.seconds if result else None,
        clips=results,
    )
    write_bytes(output, page(data).encode())
    first = results[0]
    thumbnail = thumbnail_png(first.depth, first.predicted_depth, first.valid, title=f"{metadata.stage} step {metadata.step}")
    losses = {f"val/{name}": value for name, value in (result.validation["after"] if result else {}).items()}
    return ReportSummary(output, thumbnail, {**mean_numbers(results), **losses})


def mean_numbers(clips: Sequence[ClipResult]) -> dict[str, float]:
    """Mean of each number over the clips where it is defined; numbers defined nowhere are left out."""
    means = {}
    for name in clips[0].numbers if clips else ():
        values = [clip.numbers[name] for clip in clips if math.isfinite(clip.numbers[name])]
        if values:
            means[name] = sum(values) / len(values)
    return means


@torch.no_grad()
def _predict_clip(
    model: FantasyWorld, clips: Clips, index: int, timestep: float, metadata: CheckpointMetadata, device: str
) -> ClipResult:
    batch = collate([clips[index]])
    draws = fixed_draws(batch, timestep, generator_for("report", index)).to(device)
    batch = batch.to(device)
    with autocast(metadata.preset.stage(metadata.stage), torch.device(device)):
        output = predict(model, batch, draws)
    targets = make_targets(batch)
    w2c, _ = decode_pose(output.pose_encodings[-1].float(), *batch.depth.shape[-2:])
    depth, valid, points, true_w2c, predicted_depth, predicted_points, predicted_w2c = (
        tensor[0].cpu().numpy()
        for tensor in (targets.depth, targets.valid, targets.points, batch.w2c, output.depth.float(), output.points.float(), w2c)
    )
    return ClipResult(
        clip_id=batch.clip_ids[0],
        depth=depth,
        valid=valid,
        points=points,
        w2c=true_w2c,
        predicted_depth=predicted_depth,
        predicted_points=predicted_points,
        predicted_w2c=predicted_w2c,
        numbers=clip_numbers(predicted_depth, depth, valid, predicted_w2c, true_w2c),
    )


def clip_numbers(predicted_depth: Array, depth: Array, valid: Array, predicted_w2c: Array, w2c: Array) -> dict[str, float]:
    """Depth and camera metrics of one clip; those of the camera path are NaN where the true camera does not move.

    depth [T, H, W], w2c [T, 3, 4]. Depth is compared after one scale per clip (also given), the path after a Sim(3).
    """
    moves = bool(np.ptp(w2c[:, :, 3], axis=0).max() > 1e-6)
    return {
        "absrel": absrel(predicted_depth, depth, valid),
        "delta125": delta125(predicted_depth, depth, valid),
        "depth_scale": depth_scale(predicted_depth, depth, valid),
        "ate": ate(predicted_w2c, w2c) if moves else math.nan,
        "auc30": auc(*relative_pose_errors(predicted_w2c, w2c), 30) if moves else math.nan,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fw_model.report", description="Ground truth beside prediction, as one HTML file."
    )
    parser.add_argument("--run", required=True, type=Path, help="output folder of fw_model.train")
    parser.add_argument("--dataset", required=True, help="folder with manifest.parquet, or its URL")
    parser.add_argument("--output", required=True, type=Path, help="HTML file to write")
    parser.add_argument("--clips", type=int, default=4, help="how many held-out clips to show (default 4)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.clips < 1:
        parser.error(f"--clips must be at least 1, got {args.clips}")
    try:
        summary = write_report(args.run, args.dataset, args.output, args.clips, args.device)
    except (CheckpointError, DatasetError, TrainingError, BaseModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    log.info("%s", summary.path)
    print(json.dumps(summary.numbers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
