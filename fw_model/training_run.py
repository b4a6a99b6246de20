"""Building a training run: everything the loop in `fw_model.train` works with, checked first, then made or restored."""

from __future__ import annotations

import logging
import math
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.utils.data import DataLoader

from fw_model.checkpoints import latest_state, load_checkpoint, load_state, read_progress, remove_leftovers
from fw_model.config import Preset, Stage, StageConfig
from fw_model.data.dataset import ClipDataset, collate
from fw_model.data.sampler import ResumableBucketSampler
from fw_model.data.schema import Batch
from fw_model.fantasy_world import FantasyWorld
from fw_model.metrics_log import MetricsLog, OnMetrics, RunningMean
from fw_model.run_folder import BUILD_DATASET, RunIdentity, TrainingError, check_claim, claim

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """Where a run is. With weights, moments and the sampler's state, all that a state folder holds."""

    step: int = 0  # done
    skipped: int = 0  # of them, passed over for a non-finite loss or gradient
    seconds: float = 0.0
    before: dict[str, float] = field(default_factory=dict)  # validation at step 0
    after: dict[str, float] = field(default_factory=dict)  # the latest validation
    window: RunningMean = field(default_factory=RunningMean)  # since the last line of metrics.jsonl

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "window": self.window.state}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Progress:
        return cls(**{**saved, "window": RunningMean(saved["window"])})


@dataclass
class Run:
    """Everything the loop works with."""

    preset: Preset
    stage: Stage
    config: StageConfig
    identity: RunIdentity
    output: Path
    accelerator: Accelerator
    model: FantasyWorld
    wrapped: torch.nn.Module  # what is called while training: the model, inside DDP when there are several processes
    parameters: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    sampler: ResumableBucketSampler
    batches: Iterator[Batch]
    validation_clips: ClipDataset
    empty_text: torch.Tensor  # [text_len, text_dim] on the accelerator's device: the empty prompt
    progress: Progress
    log: MetricsLog | None  # main process only

    @property
    def checkpoint(self) -> Path:
        return self.output / f"step-{self.progress.step}.safetensors"


def build_run(
    preset: Preset,
    stage: Stage,
    identity: RunIdentity,
    dataset: Path,
    output: Path,
    stage1_checkpoint: Path | None,
    accelerator: Accelerator,
    on_metrics: OnMetrics | None,
) -> Run:
    """Check what is cheap to check, then load data and model, and put back the last state if there is one.

    See `fw_model.train.train` for the arguments and errors.
    """
    config = preset.stage(stage)
    check_accumulation(config.global_batch, config.batch_per_device, accelerator.num_processes)
    check_claim(output, identity)
    clips, validation_clips = open_dataset(dataset, preset)
    rank, world = accelerator.process_index, accelerator.num_processes
    sampler = ResumableBucketSampler(clips.buckets, config.global_batch, config.batch_per_device, rank, world, config.seed)
    state = latest_state(output / "state")
    progress = Progress()
    if state is not None:
        saved = read_progress(state)
        sampler.load_state_dict(saved["sampler"])
        progress = Progress.from_json(saved["progress"])

    model = FantasyWorld.from_preset(preset)
    if stage1_checkpoint is not None:
        load_checkpoint(stage1_checkpoint, model, "stage1", preset)
    model.set_stage(stage, config.train_geometry)
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    model.to(accelerator.device).train()
    parameters = model.trainable_parameters()
    optimizer = make_optimizer(parameters, config)
    if state is not None:
        load_state(state, parameters, optimizer)
        log.info("going on from step %d (%s)", progress.step, state)

    metrics = None
    if accelerator.is_main_process:
        claim(output, identity)
        remove_leftovers(output)
        listeners = _listeners(accelerator, config, on_metrics)
        metrics = MetricsLog(output / "metrics.jsonl", progress.step if state else -1, listeners)
    accelerator.wait_for_everyone()
    loader = DataLoader(clips, batch_sampler=sampler, collate_fn=collate, num_workers=config.workers, worker_init_fn=_apart)
    return Run(
        preset=preset,
        stage=stage,
        config=config,
        identity=identity,
        output=output,
        accelerator=accelerator,
        model=model,
        wrapped=accelerator.prepare(model),
        parameters=parameters,
        optimizer=optimizer,
        sampler=sampler,
        batches=iter(loader),
        validation_clips=validation_clips,
        empty_text=clips.empty_text().to(accelerator.device),
        progress=progress,
        log=metrics,
    )


def make_accelerator(config: StageConfig, output: Path) -> Accelerator:
    """accelerate's idea of devices and processes, with the stage's trackers.

    The stage's precision is applied by `objective.autocast`: accelerate's own setting is per process, not per run.
    Raises TrainingError for a way of distributing that this loop does not know.
    """
    accelerator = Accelerator(mixed_precision="no", log_with=list(config.trackers) or None, project_dir=output)
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise TrainingError(
            f"this loop runs on one device or data-parallel (MULTI_GPU, MULTI_CPU), not {accelerator.distributed_type.value}; "
            "change distributed_type with `accelerate config`"
        )
    return accelerator


def check_accumulation(global_batch: int, batch_per_device: int, processes: int) -> int:
    """Micro-batches per step so that global_batch = batch_per_device x accumulation x processes, exactly.

    Raises TrainingError naming the nearest settings that can be met.
    """
    share = batch_per_device * processes
    if global_batch % share == 0:
        return global_batch // share
    near = sorted({max(share, global_batch // share * share), -(-global_batch // share) * share})
    fitting = [b for b in range(1, global_batch + 1) if global_batch % (b * processes) == 0]
    nearest = min(fitting, key=lambda b: abs(b - batch_per_device), default=None)
    raise TrainingError(
        f"global_batch {global_batch} is not a multiple of batch_per_device {batch_per_device} x {processes} process(es); "
        f"nearest: global_batch={' or '.join(map(str, near))}"
        + (f", or batch_per_device={nearest}" if nearest else f", or a number of processes that divides {global_batch}")
    )


def learning_rate(config: StageConfig, step: int) -> float:
    """Rate of a step, counted from 1: linear warm-up, then constant or a cosine down to 0 at the last step."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.learning_rate
    share = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def make_optimizer(parameters: dict[str, torch.nn.Parameter], config: StageConfig) -> torch.optim.AdamW:
    """AdamW; biases, norms and gates are not decayed."""
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate)


def open_dataset(dataset: Path, preset: Preset) -> tuple[ClipDataset, ClipDataset]:
    """(training clips, validation clips) of a dataset made for this preset's base and encoders.

    Without validation clips the training clips stand in, and a warning says so.

    Raises:
        DatasetError: missing, empty, or made by other encoders.
        TrainingError: clips of another size than the preset's, or features of another width than the base takes.
    """
    wan = preset.model.wan
    versions = preset.encoders.identities(wan.text_len)
    clips, validation_clips = (ClipDataset(dataset, split, wan.text_len, versions=versions) for split in ("train", "val"))
    sizes = {preset.clip.bucket(0, 1), preset.clip.bucket(1, 0)}
    for row in clips.rows + validation_clips.rows:
        if row.size not in sizes:
            buckets = " or ".join("x".join(map(str, size)) for size in sorted(sizes))
            raise TrainingError(
                f"{dataset}: clip {row.clip_id} is {row.bucket} (height x width x frames), preset {preset.name!r} trains on "
                f"{buckets}; set clip.frames, clip.short_side and clip.long_side, or pack the dataset with this preset: "
                f"{BUILD_DATASET}"
            )
        found = (clips.text_width, tuple(row.arrays["image"][1]))
        if found != (wan.text_dim, (wan.image_tokens, wan.image_dim)):
            raise TrainingError(
                f"{dataset}: clip {row.clip_id} has text features of width {found[0]} and image features {found[1]}, the base "
                f"of preset {preset.name!r} takes {wan.text_dim} and {(wan.image_tokens, wan.image_dim)}; pack the dataset with "
                f"this preset: {BUILD_DATASET}"
            )
    if not len(validation_clips):
        log.warning("%s has no validation clips (that takes two videos): validating on training clips", dataset)
        validation_clips = clips
    return clips, validation_clips


def _listeners(accelerator: Accelerator, config: StageConfig, on_metrics: OnMetrics | None) -> list[OnMetrics]:
    listeners = [on_metrics] if on_metrics else []
    if config.trackers:
        accelerator.init_trackers("trackers")

        def track(line: dict[str, float]) -> None:
            accelerator.log({k: v for k, v in line.items() if k != "step"}, step=int(line["step"]))

        listeners.append(track)
    return listeners


def _apart(worker: int) -> None:
    """Put a data worker into a process group of its own: a Ctrl-C, or a signal to the whole group, then reaches only the
    training process, which finishes its step. The worker ends with a plain SIGTERM, not with the handler it inherited."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
