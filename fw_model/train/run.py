"""Building a training run: everything the loop in `fw_model.train` works with, checked first, then made or restored."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs, gather_object

from fw_model.config import Preset, Stage, StageConfig
from fw_model.data.opening import Clips, open_dataset
from fw_model.data.sampler import ResumableBucketSampler
from fw_model.errors import TrainingError
from fw_model.files import remove_temporaries
from fw_model.model.fantasy_world import FantasyWorld
from fw_model.train.checkpoints import (
    checkpoint_parameters,
    latest_state,
    load_checkpoint,
    load_state,
    read_metadata,
    read_progress,
)
from fw_model.train.ema import MovingAverage
from fw_model.train.identity import RunIdentity
from fw_model.train.kernels import chosen_attention
from fw_model.train.loading import Batches
from fw_model.train.metrics_log import MetricsLog, OnMetrics, RunningMean
from fw_model.train.objective import base_dtype
from fw_model.train.optimizers import check_optimizer, make_optimizer
from fw_model.train.run_folder import base_hash, check_base_hash, check_claim, claim
from fw_model.train.sharding import data_mesh, shard
from fw_model.train.starting import branch

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
    recent: list[float] = field(default_factory=list)  # total losses of the last steps, against which a spike is told

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
    base_hash: str
    output: Path
    accelerator: Accelerator
    model: FantasyWorld
    wrapped: torch.nn.Module  # what is called while training: the model, inside DDP when several processes hold all of it
    parameters: dict[str, torch.nn.Parameter]  # what this run trains
    stored: dict[str, torch.nn.Parameter]  # what a checkpoint holds: all that the stage can train
    optimizer: torch.optim.Optimizer
    average: MovingAverage | None  # of `stored`
    sampler: ResumableBucketSampler
    batches: Batches
    validation_clips: Clips
    empty_text: torch.Tensor  # [text_len, text_dim] on the accelerator's device: the empty prompt
    progress: Progress
    log: MetricsLog | None  # main process only

    @property
    def checkpoint(self) -> Path:
        return self.output / f"step-{self.progress.step}.safetensors"

    @property
    def averaged_checkpoint(self) -> Path:
        return self.checkpoint.with_suffix(".ema.safetensors")


@dataclass(frozen=True)
class Start:
    """Where a new run starts; without either from the base."""

    checkpoint: Path | None  # of stage 1 for stage 2, or of the same stage
    branch: Path | None  # output folder of another run


def build_run(
    preset: Preset,
    stage: Stage,
    identity: RunIdentity,
    dataset: str | Path,
    output: Path,
    start: Start,
    accelerator: Accelerator,
    on_metrics: OnMetrics | None,
) -> Run:
    """Check what is cheap to check, then load data and model, and put back the last state if there is one.

    See `fw_model.train.train` for the arguments and errors.
    """
    config, device = preset.stage(stage), accelerator.device
    rank, world = accelerator.process_index, accelerator.num_processes
    accumulation = check_accumulation(config.global_batch, config.batch_per_device, world)
    log.info(
        "global batch %d = %d a device x %d accumulated x %d process(es); %d clips in %d steps",
        *(config.global_batch, config.batch_per_device, accumulation, world, config.global_batch * config.steps, config.steps),
    )
    check_claim(output, identity)
    check_optimizer(config, device)
    attention = chosen_attention(config, preset.model.wan, device)
    chosen = " (torch's choice)" if config.attention == "auto" else ""
    log.info("attention: %s%s on %s; blocks %scompiled", attention, chosen, device_name(device), "" if config.compile else "not ")
    clips, validation_clips = open_dataset(dataset, preset, stage, device)
    sampler = ResumableBucketSampler(
        *(clips.buckets, config.global_batch, config.batch_per_device, rank, world, config.seed),
        tell_epoch=config.augment is not None,
    )
    if start.branch is not None and accelerator.is_main_process:
        branch(start.branch, output, identity)
    accelerator.wait_for_everyone()
    state = latest_state(output / "state")
    progress = Progress()
    if state is not None:
        saved = read_progress(state)
        if saved["sampler"] is not None:  # a branch with its clips in another order begins it
            sampler.load_state_dict(saved["sampler"])
        progress = Progress.from_json(saved["progress"])

    # One process of a machine reads the base's files; what they hold is compared over machines.
    base = base_hash(preset.base, contents=accelerator.is_local_main_process)
    base = _check_same_everywhere(output, (progress.step, identity.config_digest, identity.dataset_digest, base))
    if start.checkpoint is not None:
        check_base_hash(start.checkpoint, read_metadata(start.checkpoint), base)

    model = FantasyWorld.from_preset(preset, stage)
    if start.checkpoint is not None:
        load_checkpoint(start.checkpoint, model, read_metadata(start.checkpoint).stage, preset)
    wrapped = place(model, stage, config, accelerator)
    stored = checkpoint_parameters(model, stage)
    model.set_stage(stage, config.train_geometry)
    parameters = model.trainable_parameters()
    optimizer = make_optimizer(parameters, config)
    average = MovingAverage(stored, config.ema_decay) if config.ema_decay else None
    if state is not None:
        load_state(state, parameters, optimizer, average)
        log.info("going on from step %d (%s)", progress.step, state)

    metrics = None
    if accelerator.is_main_process:
        claim(output, identity)
        for folder in (output, output / "state"):
            remove_temporaries(folder)
        listeners = _listeners(accelerator, stage, config, identity, on_metrics)
        metrics = MetricsLog(output / "metrics.jsonl", progress.step if state else -1, listeners)
    accelerator.wait_for_everyone()
    return Run(
        preset=preset,
        stage=stage,
        config=config,
        identity=identity,
        base_hash=base,
        output=output,
        accelerator=accelerator,
        model=model,
        wrapped=wrapped,
        parameters=parameters,
        stored=stored,
        optimizer=optimizer,
        average=average,
        sampler=sampler,
        batches=Batches(clips, sampler, config.workers, config.stall_seconds, pin_memory=device.type == "cuda"),
        validation_clips=validation_clips,
        empty_text=clips.empty_text().to(accelerator.device),
        progress=progress,
        log=metrics,
    )


def _check_same_everywhere(output: Path, seen: tuple[int, str, str, str]) -> str:
    """Raise TrainingError unless all processes are about to go on with the same run from the same step.

    Args:
        output: for the message.
        seen: step, digests of configuration and dataset, hash of the base or "" where this process did not read it.

    Returns the base's hash.
    """
    everyone = gather_object([seen])
    hashes = {base for *_, base in everyone if base}
    if len(hashes) > 1 or len({tuple(rest) for *rest, _ in everyone}) > 1:
        lines = [
            f"process {rank}: step {step}, config {c}, dataset {d}, base {b or 'not read'}"
            for rank, (step, c, d, b) in enumerate(everyone)
        ]
        raise TrainingError(
            f"the processes do not see the same run in {output}:\n  "
            + "\n  ".join(lines)
            + "\nOutput, dataset and base must be on "
            "storage that all machines share, or equal copies"
        )
    return hashes.pop()


def place(model: FantasyWorld, stage: Stage, config: StageConfig, accelerator: Accelerator) -> torch.nn.Module:
    """Put a model on its device as the stage's knobs say, and give back what to call while training.

    The base gets the dtype of the computation (it never trains); all else stays float32. With `sharding: fsdp` the model's
    parameters are replaced, so hold on to none of before.
    """
    model.set_stage(stage, config.train_geometry)
    model.enable_gradient_checkpointing(config.gradient_checkpointing)
    model.base.to(base_dtype(config))
    model.to(accelerator.device).train()
    if config.compile:
        for block in [*model.base.transformer.blocks, *model.geodit.blocks]:
            block.compile()
    if config.sharding == "fsdp" and accelerator.num_processes > 1:
        return shard(model, data_mesh(accelerator.device, accelerator.num_processes))
    return accelerator.prepare(model)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def make_accelerator(config: StageConfig, output: Path) -> Accelerator:
    """accelerate's idea of devices and processes, with the stage's trackers.

    The stage's precision is applied by `objective.autocast`: accelerate's own setting is per process, not per run.
    Raises TrainingError for a tracker that is not there, a way of distributing that this loop does not know, and processes
    that do not know of each other.
    """
    installed = sorted(tracker.value for tracker in get_available_trackers())
    if missing := [tracker for tracker in config.trackers if tracker not in installed]:
        raise TrainingError(
            f"trackers: {', '.join(missing)}: not installed or not known. Installed: {', '.join(installed)}; accelerate knows "
            f"{', '.join(sorted(LOGGER_TYPE_TO_CLASS))}"
        )
    timeout = InitProcessGroupKwargs(timeout=timedelta(seconds=config.collective_timeout))
    parallel = DistributedDataParallelKwargs(gradient_as_bucket_view=True)  # gradients are not copied to be exchanged
    accelerator = Accelerator(
        mixed_precision="no", log_with=list(config.trackers) or None, project_dir=output, kwargs_handlers=[timeout, parallel]
    )
    if (started := int(os.environ.get("WORLD_SIZE", "1"))) != accelerator.num_processes:
        raise TrainingError(
            f"the launcher started {started} processes, of which accelerate sees {accelerator.num_processes}: each would train "
            "by itself. On CPUs start them with ACCELERATE_USE_CPU=true in the environment"
        )
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise TrainingError(
            f"accelerate is set to {accelerator.distributed_type.value}; this loop runs on one device or with plain processes "
            "(MULTI_GPU, MULTI_CPU) and shards by itself (stage1.sharding=fsdp); change distributed_type with `accelerate config`"
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
    counts = [n for n in range(1, global_batch + 1) if global_batch % (n * batch_per_device) == 0]
    below = max((n for n in counts if n < processes), default=None)
    above = min((n for n in counts if n > processes), default=None)
    places = " or ".join(str(n) for n in (below, above) if n)
    raise TrainingError(
        f"global_batch {global_batch} is not a multiple of batch_per_device {batch_per_device} x {processes} process(es); "
        f"nearest: global_batch={' or '.join(map(str, near))}"
        + (f", or batch_per_device={nearest}" if nearest else "")
        + (f", or {places} processes" if places else "")
    )


def _listeners(
    accelerator: Accelerator, stage: Stage, config: StageConfig, identity: RunIdentity, on_metrics: OnMetrics | None
) -> list[OnMetrics]:
    listeners = [on_metrics] if on_metrics else []
    if config.trackers:
        shown = {key: value for key, value in identity.config.items() if isinstance(value, (bool, int, float, str))}
        accelerator.init_trackers("trackers", config={**shown, "stage": stage, "dataset": identity.dataset_digest})

        def track(line: dict[str, float]) -> None:
            accelerator.log({k: v for k, v in line.items() if k != "step"}, step=int(line["step"]))

        listeners.append(track)
    return listeners
