"""Where a run starts when it is neither the base nor stage 1: another checkpoint's weights, or another run's state.

`--init-from FILE` takes the weights of a checkpoint of the same stage and nothing else: step 0, fresh moments.
`--resume-as-new DIR` branches: the new run goes on from the newest state of the run in DIR, with whatever differs.
Both are part of a run's identity.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from fw_model.config import Preset, Stage
from fw_model.errors import TrainingError
from fw_model.files import link, whole_folder, write_json
from fw_model.train.checkpoints import check_usable, latest_state, read_progress
from fw_model.train.identity import CheckpointError, CheckpointMetadata, RunIdentity, read_metadata
from fw_model.train.metrics_log import RunningMean
from fw_model.train.run_folder import claim, read_identity

log = logging.getLogger(__name__)

# What a state's tensors belong to, and the frozen weights around them, which it does not hold.
FIXED = ("stage", "model_version", "base", "model", "stage1_checkpoint", "init_from", "train_geometry", "optimizer")
ORDER = ("dataset_digest", "seed", "global_batch")  # with another one the clips come in another order


def check_init_from(path: Path, preset: Preset, stage: Stage) -> CheckpointMetadata:
    """Header of a checkpoint to start from, read without its tensors.

    Raises TrainingError: missing, damaged, of another stage, base or model.
    """
    try:
        metadata = read_metadata(path)
        check_usable(path, metadata, stage, preset)
    except CheckpointError as error:
        raise TrainingError(f"--init-from takes a {stage} checkpoint of this model: {error}") from error
    return metadata


def branch_point(folder: Path, output: Path) -> str:
    """Names the state that the run in `output` branched from, or is about to: the other run's digests and the step.

    Raises TrainingError: `folder` holds no run with a state, or is `output` itself.
    """
    theirs, state = read_identity(folder), latest_state(folder / "state")
    if theirs is None or state is None:
        raise TrainingError(f"--resume-as-new {folder}: no run with a state (run.json, state/step-N) is there to go on from")
    if folder.resolve() == output.resolve():
        raise TrainingError(f"--resume-as-new {folder}: that is the --output itself", "Give the new run another --output")
    ours = read_identity(output)
    recorded = str(ours.config.get("branched_from", "")) if ours else ""
    if recorded.rpartition(":")[0] == theirs.name:
        return recorded  # the other run may have gone on since
    return f"{theirs.name}:{read_progress(state)['step']}"


def branch(folder: Path, output: Path, identity: RunIdentity) -> None:
    """Claim `output` and put the state there that `identity` branches from, unless it has one; say all that differs.

    Where the clips come in another order they are drawn from the first epoch on.

    Raises TrainingError: the state does not fit the new run, is gone, or is at the new run's last step or beyond.
    """
    theirs = read_identity(folder)
    if theirs is None or latest_state(output / "state") is not None:
        return
    step = int(identity.config["branched_from"].rpartition(":")[2])
    state, steps = folder / "state" / f"step-{step}", identity.config[f"{identity.stage}.steps"]
    changes = differences(theirs, identity)
    unfit = [line for key, line in changes.items() if _knob(key) in FIXED]
    if identity.config[f"{identity.stage}.ema_decay"] and not (state / "ema.safetensors").is_file():
        unfit.append(f"{identity.stage}.ema_decay: the state has no moving average to go on with")
    if unfit:
        raise TrainingError(f"--resume-as-new {folder}: its state does not fit this run\n  " + "\n  ".join(unfit))
    if not state.is_dir():
        raise TrainingError(f"--resume-as-new: {state} is gone", "Give another --output to branch from the newest state")
    if step >= steps:
        raise TrainingError(
            f"{state} is at the new run's last step or beyond", f"Give {identity.stage}.steps of more than {step}"
        )
    reordered = [key for key in changes if _knob(key) in ORDER]
    claim(output, identity)
    with whole_folder(output / "state" / state.name) as temporary:
        for file in state.glob("*.safetensors"):
            link(file, temporary / file.name)
        write_json(temporary / "progress.json", _progress(read_progress(state), anew=bool(reordered)))
    log.info("branched from %s at step %d; what differs:\n  %s", folder, step, "\n  ".join(changes.values()) or "nothing")
    if reordered:
        log.info("clips are drawn from the first epoch on, in their new order (%s)", ", ".join(reordered))


def differences(theirs: RunIdentity, ours: RunIdentity) -> dict[str, str]:
    """Key -> "key: old -> new" of all that decides the weights; that one of them branched is no difference."""
    old, new = ({"stage": run.stage, "dataset_digest": run.dataset_digest, **run.config} for run in (theirs, ours))
    keys = sorted({*old, *new} - {"branched_from"})
    return {key: f"{key}: {old.get(key)} -> {new.get(key)}" for key in keys if old.get(key) != new.get(key)}


def _knob(key: str) -> str:
    """The knob of a stage's key, the section of any other."""
    section, _, knob = key.partition(".")
    return knob if section.startswith("stage") and knob else section


def _progress(saved: dict[str, Any], anew: bool) -> dict[str, Any]:
    """A state's JSON for the branch, whose own validation comes first: it may be of other clips."""
    progress = {**saved["progress"], "before": {}, "after": {}, "window": RunningMean().state, "recent": []}
    return {**saved, "progress": progress, "sampler": None if anew else saved["sampler"]}
