"""What a report is made of: held-out clips, what the model predicts for them, and the numbers of both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fw_model.cameras import decode_pose
from fw_model.data.dataset import collate
from fw_model.data.manifest import dataset_digest
from fw_model.data.opening import Clips, open_dataset
from fw_model.files import write_json, write_text
from fw_model.metrics import (
    Array,
    absrel,
    agreement,
    ate,
    auc,
    calibration,
    delta125,
    depth_scale,
    flicker,
    fov_error,
    point_error,
    relative_pose_errors,
    rpe,
    rra,
    rta,
)
from fw_model.model.fantasy_world import FantasyWorld
from fw_model.report.evaluation import CAMERA_NUMBERS, Evaluation, means
from fw_model.report.figures import pick_frames, thumbnail_png
from fw_model.report.page import ClipResult, ReportData, page
from fw_model.train.checkpoints import CheckpointError, CheckpointMetadata, latest_checkpoint
from fw_model.train.losses import make_targets
from fw_model.train.objective import LOSS_NAMES, SCHEDULE, autocast, fixed_draws, generator_for, predict
from fw_model.train.run_folder import read_result
from fw_model.train.samples import newest_sheets
from fw_model.train.trained import check_trained, load_trained

NOISE_SHARE = 0.1  # clips are shown to the model with about this much noise
BANDS = {"low": NOISE_SHARE, "middle": 0.5, "high": 0.9}  # shares of noise at which all numbers are taken
_CALIBRATION_PIXELS = 20_000  # of each clip, evenly over it


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
        output: the HTML file, written atomically; all numbers also as JSON beside it.
        clips: how many to show.
        device: where the model runs.

    Raises:
        CheckpointError: no checkpoint in `run`, or a damaged one.
        DatasetError, TrainingError: a dataset that is missing or does not fit the model.
    """
    checkpoint = latest_checkpoint(run)
    if checkpoint is None:
        raise CheckpointError(f"{run}: no step-N.safetensors; train first, e.g. dagster job execute -j stage1_training")
    metadata = check_trained(checkpoint)
    _, held_out = open_dataset(dataset, metadata.preset, metadata.stage, device)
    model = load_trained(checkpoint, metadata, device)
    timesteps = {band: nearest_timestep(share) for band, share in BANDS.items()}
    timestep = timesteps["low"]
    chosen = pick_frames(len(held_out), clips)
    results = [_predict_clip(model, held_out, index, timestep, metadata, device) for index in chosen]
    evaluation = _evaluate(model, held_out, chosen, results, timesteps, metadata, device)
    result = read_result(run)
    if result is not None and result.checkpoint != checkpoint.name:
        result = None  # the numbers of another checkpoint
    sample_step, sheets = newest_sheets(run)
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
        evaluation=evaluation,
        samples=sheets,
        sample_step=sample_step,
    )
    write_text(output, page(data))
    write_json(output.with_suffix(".json"), evaluation.to_json(data))
    first = results[0]
    thumbnail = thumbnail_png(first.depth, first.predicted_depth, first.valid, title=f"{metadata.stage} step {metadata.step}")
    after = result.validation["after"] if result else {}
    losses = {f"val/{name}": after[name] for name in LOSS_NAMES[metadata.stage] if name in after}
    return ReportSummary(output, thumbnail, {**means([clip.numbers for clip in results]), **losses})


def nearest_timestep(share: float) -> float:
    """The timestep of the schedule whose share of noise is nearest."""
    return float(SCHEDULE.timesteps[int((SCHEDULE.sigmas - share).abs().argmin())])


def _evaluate(
    model: FantasyWorld,
    clips: Clips,
    chosen: Sequence[int],
    low: list[ClipResult],
    timesteps: dict[str, float],
    metadata: CheckpointMetadata,
    device: str,
) -> Evaluation:
    """The numbers of the shown clips at every band of noise, and their cameras without the true one, at the lowest."""

    def numbers(band: str, **changes: Any) -> list[dict[str, float]]:
        return [_predict_clip(model, clips, i, timesteps[band], metadata, device, **changes).numbers for i in chosen]

    given = [clip.numbers for clip in low]
    bands = {band: given if band == "low" else numbers(band) for band in timesteps}
    cameras = {"given": given, "withheld": numbers("low", camera="withheld")}
    if len(clips) > 1:
        cameras["other"] = numbers("low", camera="other")
    cameras["constant"] = [still_camera_numbers(clip.w2c) for clip in low]
    curves = [clip.calibration for clip in low]
    return Evaluation(
        bands=bands,
        buckets=[clip.bucket for clip in low],
        cameras={case: means(found, CAMERA_NUMBERS) for case, found in cameras.items()},
        calibration=np.nanmean([curve for curve, _ in curves], axis=0) if np.isfinite([r for _, r in curves]).any() else None,
        rank_correlation=means([{"rank": rank} for _, rank in curves]).get("rank", math.nan),
    )


@torch.no_grad()
def _predict_clip(
    model: FantasyWorld,
    clips: Clips,
    index: int,
    timestep: float,
    metadata: CheckpointMetadata,
    device: str,
    camera: Literal["given", "withheld", "other"] = "given",
) -> ClipResult:
    """`camera`: what the base is told; "other" is the path of the clip after it."""
    batch = collate([clips[index]])
    draws = fixed_draws(batch, timestep, generator_for("report", index)).to(device)
    batch = batch.to(device)
    shown = batch
    if camera == "other":
        shown = replace(batch, w2c=collate([clips[(index + 1) % len(clips)]]).to(device).w2c)
    elif camera == "withheld":
        draws = replace(draws, camera_mask=torch.zeros_like(draws.camera_mask))
    with autocast(metadata.preset.stage(metadata.stage), torch.device(device)):
        output = predict(model, shown, draws)
    targets = make_targets(batch)
    height, width = batch.depth.shape[-2:]
    w2c, intrinsics = decode_pose(output.pose_encodings[-1].float(), height, width)
    arrays = {
        "depth": targets.depth,
        "valid": targets.valid,
        "points": targets.points,
        "w2c": batch.w2c,
        "intrinsics": batch.intrinsics,
        "predicted_depth": output.depth.float(),
        "predicted_points": output.points.float(),
        "predicted_w2c": w2c,
        "predicted_intrinsics": intrinsics,
    }
    found = {name: tensor[0].cpu().numpy() for name, tensor in arrays.items()}
    confidence = output.depth_conf[0].float().cpu().numpy()
    shown_arrays = {name: array for name, array in found.items() if "intrinsics" not in name}
    return ClipResult(
        clip_id=batch.clip_ids[0],
        bucket=f"{height}x{width}x{batch.depth.shape[1]}",
        numbers=all_numbers(**found),
        calibration=_calibration(found["predicted_depth"], found["depth"], found["valid"], confidence),
        **shown_arrays,
    )


def _calibration(predicted: Array, depth: Array, valid: Array, confidence: Array) -> tuple[Array, float]:
    """Relative error of depth against its confidence, of one clip; see `metrics.calibration`."""
    places = np.flatnonzero(valid)
    places = places[:: max(1, len(places) // _CALIBRATION_PIXELS) | 1]
    error = np.abs(predicted.ravel()[places] - depth.ravel()[places]) / depth.ravel()[places]
    return calibration(error, confidence.ravel()[places])


def all_numbers(
    depth: Array,
    valid: Array,
    points: Array,
    w2c: Array,
    intrinsics: Array,
    predicted_depth: Array,
    predicted_points: Array,
    predicted_w2c: Array,
    predicted_intrinsics: Array,
) -> dict[str, float]:
    """`clip_numbers` and, of points, lens, agreement and stillness, what `fw_model.metrics` says; NaN where undefined."""
    distance, ratio = point_error(predicted_points, points, valid)
    return {
        **clip_numbers(predicted_depth, depth, valid, predicted_w2c, w2c),
        "point_error": distance,
        "point_ratio": ratio,
        "agreement": agreement(predicted_depth, predicted_points, predicted_w2c, predicted_intrinsics),
        "fov_degrees": fov_error(predicted_intrinsics, intrinsics, *depth.shape[-2:]),
        "flicker": flicker(predicted_depth, depth, valid),
    }


def clip_numbers(predicted_depth: Array, depth: Array, valid: Array, predicted_w2c: Array, w2c: Array) -> dict[str, float]:
    """Depth and camera metrics of one clip; those of the camera path are NaN where the true camera does not move.

    depth [T, H, W], w2c [T, 3, 4]. Depth is compared after one scale per clip (also given), the path after a Sim(3).
    """
    return {
        "absrel": absrel(predicted_depth, depth, valid),
        "delta125": delta125(predicted_depth, depth, valid),
        "depth_scale": depth_scale(predicted_depth, depth, valid),
        **camera_numbers(predicted_w2c, w2c),
    }


def camera_numbers(predicted_w2c: Array, w2c: Array) -> dict[str, float]:
    """The numbers `CAMERA_NUMBERS` of one path; all but the rotation's are NaN where the true camera does not move."""
    rotation, direction = relative_pose_errors(predicted_w2c, w2c)
    moves = bool(np.ptp(w2c[:, :, 3], axis=0).max() > 1e-6)
    step, turn = rpe(predicted_w2c, w2c) if moves else (math.nan, math.nan)
    return {
        "rotation_degrees": float(rotation.mean()),
        "direction_degrees": float(direction.mean()) if moves else math.nan,
        "ate": ate(predicted_w2c, w2c) if moves else math.nan,
        "rpe": step,
        "rpe_degrees": turn,
        "rra15": rra(rotation) if moves else math.nan,
        "rta15": rta(direction) if moves else math.nan,
        "auc30": auc(rotation, direction, 30) if moves else math.nan,
    }


def still_camera_numbers(w2c: Array) -> dict[str, float]:
    """What a camera that stands still scores against a path [T, 3, 4]: the bar under the camera numbers."""
    return camera_numbers(np.broadcast_to(np.eye(3, 4), w2c.shape), w2c)
