"""Which run it is, and which weights: the one answer for whoever trains, names a folder or looks for a stage 1.

Free of torch, so that a step of the pipeline knows where a stage goes without loading it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from fw_model.config import ConfigError, Preset, Stage, StageConfig, parse_preset
from fw_model.errors import Explained

FORMAT = "fantasyworld-checkpoint"
FORMAT_VERSION = 1
MODEL_VERSION = (
    2  # raise it when the same weights no longer give the same numbers. 2: the exchange has positions, inside the pair
)

# Knobs that change what is watched, stored or how fast it goes, never what is learnt: a run may go on with other values.
OPERATIONAL = {
    "batch_per_device",
    "save_every",
    "keep_checkpoints",
    "state_every",
    "keep_states",
    "validate_every",
    "log_every",
    "sample_every",
    "sample_clips",
    "sample_steps",
    "workers",
    "max_skipped",
    "trackers",
    "gradient_checkpointing",
    "offload_optimizer",
    "compile",
    "attention",
    "sharding",
    "spike_factor",
    "stall_seconds",
    "collective_timeout",
}
# Not `validation_clips`, though it decides no weight: a result's losses before and after must be of the same clips.

STAGE2_ONLY = ("lambda_geometry", "train_geometry")  # stage 1 has no use for them, so they do not tell two of it apart


@dataclass(frozen=True)
class RunIdentity:
    """What decides a run's weights, as flat keys; two runs with the same identity are one run."""

    stage: Stage
    config: dict[str, Any]
    dataset_digest: str

    @property
    def config_digest(self) -> str:
        return hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        """Of the run's folder among those of its stage. Runs of one configuration on several datasets begin alike."""
        return f"{self.config_digest}-{self.dataset_digest}"


def run_identity(
    preset: Preset,
    stage: Stage,
    dataset_digest: str,
    stage1: CheckpointMetadata | None = None,
    init_from: CheckpointMetadata | None = None,
    branched_from: str | None = None,
) -> RunIdentity:
    """The identity of a run.

    Args:
        preset: the base, the model and the stage's section count, knobs in `OPERATIONAL` and those of the other stage do
            not. How clips are cut and encoded is for the dataset's digest to say; only with `encode_online` the encoders and
            the clips' length count here.
        stage: "stage1" or "stage2".
        dataset_digest: of the manifest.
        stage1: header of the checkpoint that stage 2 starts from.
        init_from: header of a checkpoint of the same stage to start from.
        branched_from: names the state of another run to go on from; see `starting.branch_point`.
    """
    knobs = preset.stage(stage).model_dump(mode="json", exclude=OPERATIONAL)
    if stage == "stage1":
        knobs |= {name: StageConfig.model_fields[name].default for name in STAGE2_ONLY}
    sections = {
        "model_version": MODEL_VERSION,
        "base": preset.base.identity,
        "model": preset.model.model_dump(mode="json"),
        stage: knobs,
        "stage1_checkpoint": stage1.identity if stage1 else None,
    }
    if init_from is not None:
        sections["init_from"] = init_from.identity
    if branched_from is not None:
        sections["branched_from"] = branched_from
    if preset.stage(stage).encode_online:
        identities = preset.encoders.identities(preset.model.wan.text_len)
        sections |= {"encoders": identities, "clip": {"frames": preset.clip.frames}}
    return RunIdentity(stage, flat(sections), dataset_digest)


class CheckpointError(Explained, RuntimeError):
    """A checkpoint or state that is missing, damaged, or made for something else; the message names the file and the remedy."""


@dataclass(frozen=True)
class CheckpointMetadata:
    """The header of a checkpoint."""

    stage: Stage
    step: int
    preset: Preset  # the whole of it, so that the file alone is enough to rebuild the model
    base: str  # identity of the frozen base the weights belong to
    dataset_digest: str
    config_digest: str  # of everything that decides the weights; see `RunIdentity`
    base_hash: str = ""  # of the base's weights; "" in files of before it was stored
    weights: Literal["trained", "ema"] = "trained"  # as the last step left them, or their moving average

    @property
    def identity(self) -> str:
        """Names these weights in what is derived from them."""
        return f"{self.stage}:{self.config_digest}:{self.dataset_digest}:{self.step}{':ema' * (self.weights == 'ema')}"


def read_metadata(path: Path) -> CheckpointMetadata:
    """Read a checkpoint's header without its tensors; a file shorter than its header promises is noticed here.

    Raises CheckpointError: no such file, truncated, not one of ours, of a newer format, or weights of another model version.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged or truncated ({error}); delete it and train again from the last state") from error
    if header.get("format") != FORMAT:
        raise CheckpointError(f"{path}: a safetensors file, but not a {FORMAT} (format is {header.get('format')!r})")
    if int(header["format_version"]) > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {header['format_version']}, this code reads up to {FORMAT_VERSION}; update the code"
        )
    check_model_version(path, header)
    try:
        preset = parse_preset(json.loads(header["preset"]), where=str(path))
    except ConfigError as error:
        raise CheckpointError(f"{error}\nThe file was made by another version of this code") from error
    stage: Stage = "stage2" if header["stage"] == "stage2" else "stage1"
    return CheckpointMetadata(
        stage=stage,
        step=int(header["step"]),
        preset=preset,
        base=header["base"],
        dataset_digest=header["dataset_digest"],
        config_digest=header["config_digest"],
        base_hash=header.get("base_hash", ""),
        weights="ema" if header.get("weights") == "ema" else "trained",
    )


def check_model_version(path: Path, header: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless weights were trained in the model as this code builds it; without a version, they are 1."""
    if (version := int(header.get("model_version", 1))) != MODEL_VERSION:
        raise CheckpointError(
            f"{path}: weights of model version {version}, this code builds version {MODEL_VERSION}, in which they would give "
            "other numbers without a word. Train again, or read them with the code that made them"
        )


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
