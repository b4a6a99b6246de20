"""What training leaves on disk: weights to use (`step-N.safetensors`) and state to go on from (`state/step-N/`).

A checkpoint is one safetensors file: every weight that is not the base's, float32, under the model's own names, with what
is needed to rebuild the model around it in the header. `step-N.ema.safetensors` is the same of their moving average. A state
is a folder: the trained weights, the optimizer's moments, the moving average if there is one, and a small JSON. Tensors are
stored whole whatever they are sharded over, so any number of processes reads what any other number wrote. All is written under
a temporary name, flushed and renamed, so what has a final name is whole. (Not torch.distributed.checkpoint's folders: their
index is a pickle.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fw_model.config import Preset, Stage
from fw_model.files import remove, whole_file, whole_folder, write_json
from fw_model.train.ema import MovingAverage
from fw_model.train.identity import (
    FORMAT,
    FORMAT_VERSION,
    MODEL_VERSION,
    CheckpointError,
    CheckpointMetadata,
    check_model_version,
    flat,
    read_metadata,
)
from fw_model.train.optimizers import put_moments_back
from fw_model.train.sharding import laid_out_as

_STEP_FILE = re.compile(r"step-(\d+)(\.ema)?\.safetensors")
_STEP_FOLDER = re.compile(r"step-(\d+)")


class StagedModel(Protocol):
    """The part of FantasyWorld that checkpoints need."""

    def set_stage(self, stage: Stage, train_geometry: bool = True) -> object: ...

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]: ...


def checkpoint_parameters(model: StagedModel, stage: Stage) -> dict[str, torch.nn.Parameter]:
    """The weights a checkpoint of this stage holds: all the stage can train. Leaves the model in that stage."""
    model.set_stage(stage, train_geometry=True)
    return model.trainable_parameters()


def save_checkpoint(path: Path, tensors: Mapping[str, torch.Tensor], metadata: CheckpointMetadata) -> None:
    """Write `tensors` as float32 with their metadata; the file appears whole or not at all."""
    fields = {**asdict(metadata), "preset": metadata.preset.model_dump_json()}
    header = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "model_version": str(MODEL_VERSION),
        **{k: str(v) for k, v in fields.items()},
    }
    with _explained(path), whole_file(path) as temporary:
        _save_tensors(temporary, {k: v.detach().to("cpu", torch.float32) for k, v in tensors.items()}, header)


def check_usable(path: Path, metadata: CheckpointMetadata, expected_stage: Stage, preset: Preset) -> None:
    """Raise CheckpointError unless the checkpoint is of this stage, this base and this model shape; both sides are named."""
    if metadata.stage != expected_stage:
        raise CheckpointError(f"{path}: a {metadata.stage} checkpoint, a {expected_stage} checkpoint is needed")
    if metadata.base != preset.base.identity:
        raise CheckpointError(f"{path}: trained on base {metadata.base!r}, this run uses base {preset.base.identity!r}")
    theirs, ours = flat(metadata.preset.model.model_dump()), flat(preset.model.model_dump())
    if differing := [f"model.{k}: checkpoint {theirs[k]}, this run {ours[k]}" for k in ours if theirs[k] != ours[k]]:
        raise CheckpointError(f"{path}: made for another model\n  " + "\n  ".join(differing))


def load_checkpoint(path: Path, model: StagedModel, expected_stage: Stage, preset: Preset) -> CheckpointMetadata:
    """Copy a checkpoint's weights into `model`, which is left in the checkpoint's stage.

    Names and shapes must match exactly what that stage trains: a stage 1 file fills the geometry branch and leaves
    stage 2's own modules as they are.

    Args:
        path: a `step-N.safetensors`.
        model: its base must be `preset.base`, already loaded.
        expected_stage: the stage the file must be of.
        preset: what `model` was built from.

    Raises:
        CheckpointError: damaged file, other stage, base or model, or names or shapes that differ; all are listed.
    """
    metadata = read_metadata(path)
    check_usable(path, metadata, expected_stage, preset)
    copy_weights(load_file(path), checkpoint_parameters(model, expected_stage), str(path))
    return metadata


def copy_weights(tensors: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.Tensor], where: str) -> None:
    """Fill parameters from whole tensors of the same names and shapes, or raise CheckpointError listing all that differ."""
    missing, unexpected = sorted(parameters.keys() - tensors.keys()), sorted(tensors.keys() - parameters.keys())
    shapes = [
        f"{k} {tuple(tensors[k].shape)} for {tuple(p.shape)}"
        for k, p in parameters.items()
        if k in tensors and tensors[k].shape != p.shape
    ]
    problems = [("missing", missing), ("unexpected", unexpected), ("other shape", shapes)]
    if any(names for _, names in problems):
        lines = [
            f"  {kind} ({len(names)}): {', '.join(names[:8])}{', …' * (len(names) > 8)}" for kind, names in problems if names
        ]
        raise CheckpointError(f"{where}: does not fit the model\n" + "\n".join(lines))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(laid_out_as(tensors[name], parameter))


def latest_checkpoint(directory: Path) -> Path | None:
    """The `step-N.safetensors` with the highest N, its moving average where there is one, or None."""
    return _latest(directory, _STEP_FILE)


def prune_checkpoints(directory: Path, keep: int, spare: str | None = None) -> None:
    """Remove the checkpoints of all but the newest `keep` steps, moving averages with them.

    Args:
        directory: an output folder; the caller is the only one writing there.
        keep: at least 1.
        spare: name of a file that stays whatever its step is.
    """
    found = [path for path in directory.iterdir() if _STEP_FILE.fullmatch(path.name)]
    newest = sorted({_step_of(path) for path in found})[-keep:]
    for path in found:
        if _step_of(path) not in newest and path.name != spare:
            path.unlink()


def latest_state(directory: Path) -> Path | None:
    """The `step-N` state folder with the highest N below `directory` (an output's `state`), or None."""
    return _latest(directory, _STEP_FOLDER)


def save_state(directory: Path, step: int, files: Mapping[str, Mapping[str, torch.Tensor]], progress: Any, keep: int) -> Path:
    """Write `directory/step-N` and prune all but the newest `keep`.

    The learning rate and every random draw are functions of the step, so neither a scheduler nor a generator is stored.

    Args:
        directory: an output's `state`; the caller is the only one writing there.
        step: N.
        files: name -> tensors, all whole and in ordinary memory; each becomes `name.safetensors`.
        progress: what else there is, as JSON.
        keep: at least 1.

    Raises:
        CheckpointError: it could not be written, a full disk for instance; the states before it are as they were.
    """
    final = directory / f"step-{step}"
    with _explained(final), whole_folder(final) as temporary:  # in place of one of the same step, if a run was stopped at it
        for name, tensors in files.items():
            _save_tensors(temporary / f"{name}.safetensors", dict(tensors))
        write_json(
            temporary / "progress.json",
            {"format_version": FORMAT_VERSION, "model_version": MODEL_VERSION, "step": step, **progress},
        )
    states = sorted((s for s in directory.iterdir() if _STEP_FOLDER.fullmatch(s.name)), key=_step_of)
    for old in states[: max(0, len(states) - keep)]:
        remove(old)
    return final


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: could not be written ({error}). What was saved before it is whole: make room and run the same command again"
        ) from error


def read_progress(state: Path) -> dict[str, Any]:
    """The JSON of a state folder. Raises CheckpointError if it cannot be read or is of another model version."""
    path = state / "progress.json"
    try:
        progress = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path}: not readable ({error}); delete the folder {state} to go on from the state before it"
        ) from error
    if progress.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format version {progress.get('format_version')}, this code reads {FORMAT_VERSION}")
    check_model_version(state, progress)
    return progress


def load_tensors(state: Path, name: str) -> dict[str, torch.Tensor]:
    """The tensors of a state's `name.safetensors`, mapped from the file: memory is only taken by what is read of them.

    Raises CheckpointError: missing or damaged.
    """
    try:
        return load_file(state / f"{name}.safetensors")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{state}: damaged ({error}); delete the folder to go on from the state before it") from error


def _save_tensors(path: Path, tensors: dict[str, torch.Tensor], header: dict[str, str] | None = None) -> None:
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata=header)


def _latest(directory: Path, pattern: re.Pattern[str]) -> Path | None:
    found = [p for p in directory.iterdir() if pattern.fullmatch(p.name)] if directory.is_dir() else []
    return max(found, key=lambda path: (_step_of(path), ".ema" in path.name), default=None)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-").partition(".")[0])


def load_state(
    state: Path,
    parameters: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    average: MovingAverage | None = None,
) -> None:
    """Put weights, moments and moving average back exactly as `fw_model.train` saved them, whatever they were sharded over.

    Raises CheckpointError: a damaged file, or one that does not fit the model.
    """
    copy_weights(load_tensors(state, "weights"), parameters, f"{state / 'weights.safetensors'}")
    moments = load_tensors(state, "optimizer")
    if unknown := sorted({key.rpartition("/")[0] for key in moments} - parameters.keys()):
        raise CheckpointError(f"{state}: optimizer moments of unknown weights: {', '.join(unknown[:8])}")
    put_moments_back(moments.items(), parameters, optimizer, laid_out_as)
    if average is not None:
        copy_weights(load_tensors(state, "ema"), average.average, f"{state / 'ema.safetensors'}")
