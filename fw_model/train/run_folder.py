"""The output folder of a training run: whose run it is, whether it may go on, what it needs before it starts.

run.json                what decides the weights: stage, config, dataset, stage 1 checkpoint
metrics.jsonl           see fw_model.train.metrics_log
step-N.safetensors      see fw_model.train.checkpoints; step-N.ema.safetensors beside it when there is a moving average
state/step-N/           the same
result.json             written last: the run is complete
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import xxhash

from fw_model.config import Preset, Stage, WeightsConfig
from fw_model.errors import TRAIN_STAGE1, TrainingError
from fw_model.files import take_lock, update_from_file, write_json
from fw_model.train.checkpoints import check_usable, latest_checkpoint, latest_state
from fw_model.train.identity import CheckpointError, CheckpointMetadata, RunIdentity, flat, read_metadata

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What a complete run left behind; `result.json` in the output folder has the same fields."""

    stage: Stage
    steps: int
    checkpoint: str  # file name in the output folder, of the weights to use: the moving average where there is one
    validation: dict[str, dict[str, float]]  # "before" and "after" training: loss name -> value
    validation_split: str  # "val", or "train" for a dataset without validation clips
    seconds: float  # of training and validation, earlier parts of an interrupted run included
    config_digest: str
    dataset_digest: str


def base_hash(base: WeightsConfig, contents: bool = True) -> str:
    """Hash of the base's weight files, in order of their names; of the recipe where the weights are made.

    With `contents` false the files are looked for and not read, which gives "".

    Raises BaseModelError: not there, says what to download.
    """
    digest = xxhash.xxh3_128()
    if base.source == "seeded":
        digest.update(base.identity.encode())
        return digest.hexdigest()
    from fw_model.model.wan_weights import find_weight_files  # diffusers with it; who only wants to know the digests needs it not

    files = find_weight_files(base.repo, base.revision)
    if not contents:
        return ""
    for path in files:
        digest.update(path.name.encode())
        update_from_file(digest, path)
    return digest.hexdigest()


def check_base_hash(path: Path, metadata: CheckpointMetadata, found: str) -> None:
    """Raise TrainingError if a stage 1 checkpoint was trained on other weights of the same name."""
    if metadata.base_hash and metadata.base_hash != found:
        raise TrainingError(
            f"{path}: trained on weights of {metadata.base!r} with hash {metadata.base_hash}, the files of that name now have "
            f"{found}. Put the old files back (base.repo, base.revision), or train stage 1 on these: {TRAIN_STAGE1}"
        )


def stage1_result(folder: Path) -> Path | None:
    """The checkpoint that a complete stage 1 run in `folder` names, None if no stage 1 was ever trained there.

    Raises TrainingError for a run that is not complete: its newest checkpoint is not what stage 1 ends with.
    """
    result, newest = read_result(folder), latest_checkpoint(folder)
    if result is not None:
        return folder / result.checkpoint
    if newest is None and latest_state(folder / "state") is None:
        return None
    forced = f", or start from what there is with --stage1-checkpoint {newest}" if newest is not None else ""
    raise TrainingError(
        f"stage 2 starts from a complete stage 1, and the run in {folder} is not (it has no result.json). "
        f"Run its command again to complete it{forced}"
    )


def check_stage1_checkpoint(path: Path | None, preset: Preset) -> CheckpointMetadata:
    """Header of the stage 1 checkpoint that stage 2 needs, read without loading or building anything.

    Raises TrainingError, naming the file and the job that makes it: none given, missing, truncated, of another stage,
    base or model.
    """
    remedy = f"Train stage 1 with this preset first: {TRAIN_STAGE1}"
    if path is None:
        raise TrainingError(f"stage 2 starts from a stage 1 checkpoint and none was given (--stage1-checkpoint FILE). {remedy}")
    try:
        metadata = read_metadata(path)
        check_usable(path, metadata, "stage1", preset)
    except CheckpointError as error:
        raise TrainingError(f"stage 2 starts from a stage 1 checkpoint: {error}\n{remedy}") from error
    return metadata


def check_claim(output: Path, identity: RunIdentity) -> None:
    """Raise TrainingError if `output` holds another run; every key that differs is named with both values.

    More steps under a constant learning rate are the same run, which goes on: no step depends on how many follow.
    """
    path = output / "run.json"
    if not path.is_file():
        if latest_state(output / "state") or (output / "result.json").exists():
            raise TrainingError(f"{output} has training results but no run.json that says whose; give another --output")
        return
    theirs, ours = flat(json.loads(path.read_text(encoding="utf-8"))), flat(asdict(identity))
    differing = [
        f"{k.removeprefix('config.')}: the folder has {theirs.get(k)}, this run {ours.get(k)}"
        for k in sorted({*theirs, *ours})
        if theirs.get(k) != ours.get(k)
    ]
    if _grown(theirs, ours, identity.stage):
        log.info("%s: the run grows: %s", output, differing[0])
    elif differing:
        raise TrainingError(
            f"{output} holds another run:\n  " + "\n  ".join(differing) + "\nGive another --output (with --resume-as-new "
            f"{output} it goes on from this run's newest state), or remove that folder"
        )


def _grown(theirs: dict[str, Any], ours: dict[str, Any], stage: Stage) -> bool:
    steps = f"config.{stage}.steps"
    same = {**theirs, steps: 0} == {**ours, steps: 0} and ours[f"config.{stage}.lr_schedule"] == "constant"
    return same and theirs[steps] < ours[steps]


def read_identity(output: Path) -> RunIdentity | None:
    """Whose folder this is, None where no run has claimed it."""
    path = output / "run.json"
    return RunIdentity(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def claim(output: Path, identity: RunIdentity) -> None:
    """Write whose folder this is."""
    write_json(output / "run.json", asdict(identity))


def write_result(output: Path, result: TrainResult) -> None:
    """Write `result.json`, which says that the run is complete."""
    write_json(output / "result.json", asdict(result))


def read_result(output: Path) -> TrainResult | None:
    """The result of a complete run, None if there is none."""
    path = output / "result.json"
    return TrainResult(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def finished(output: Path, identity: RunIdentity) -> TrainResult | None:
    """The result of a complete run with this identity, if `output` has one whose checkpoint is still there and whole."""
    result = read_result(output)
    if result is None or (result.config_digest, result.dataset_digest) != (identity.config_digest, identity.dataset_digest):
        return None
    try:
        read_metadata(output / result.checkpoint)
    except CheckpointError as error:
        log.warning("%s; writing it again from the last state", error)
        return None
    return result


def locked(output: Path, patience: float = 60) -> IO[str]:
    """Hold the folder for this process until the file is closed, waiting `patience` seconds for one that is about to stop.

    Raises TrainingError when another process goes on training into it.
    """

    def refuse(owner: str) -> TrainingError:
        return TrainingError(f"{output}: process {owner} is training into it; wait for it or stop it")

    output.mkdir(parents=True, exist_ok=True)
    return take_lock(output / ".lock", refuse, patience)
