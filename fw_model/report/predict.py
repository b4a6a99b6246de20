"""What a report is made of: held-out clips, what the model predicts for them, and the numbers of both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fw_model.cameras import decode_pose
from fw_model.data.dataset import collate
from fw_model.data.manifest import dataset_digest
from fw_model.data.opening import Clips, open_dataset
from fw_model.files import write_text
from fw_model.metrics import Array, absrel, ate, auc, delta125, depth_scale, relative_pose_errors
from fw_model.model.fantasy_world import FantasyWorld
from fw_model.report.figures import pick_frames, thumbnail_png
from fw_model.report.page import ClipResult, ReportData, page
from fw_model.train.checkpoints import (
    CheckpointError,
    CheckpointMetadata,
    latest_checkpoint,
    load_checkpoint,
    read_metadata,
)
from fw_model.train.losses import make_targets
from fw_model.train.objective import SCHEDULE, autocast, base_dtype, fixed_draws, generator_for, predict
from fw_model.train.run_folder import read_result

NOISE_SHARE = 0.1  # clips are shown to the model with about this much noise


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
    write_text(output, page(data))
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
