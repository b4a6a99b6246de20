"""The training loop of both stages: setup, steps, validation, saving. `python -m fw_model.train` is its command line."""

from __future__ import annotations

import logging
import math
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from fw_model.config import Preset, Stage
from fw_model.data.manifest import dataset_digest
from fw_model.data.schema import Batch
from fw_model.errors import TrainingError
from fw_model.train.checkpoints import CheckpointMetadata, prune_checkpoints, save_checkpoint, save_state
from fw_model.train.guards import pass_over, report_spike
from fw_model.train.identity import run_identity
from fw_model.train.kernels import attention_kernel
from fw_model.train.metrics_log import OnMetrics, in_words
from fw_model.train.objective import LOSS_NAMES, autocast, compute_losses, drop_text, predict, training_draws
from fw_model.train.optimizers import learning_rate, moments
from fw_model.train.run import Run, Start, build_run, make_accelerator
from fw_model.train.run_folder import (
    TrainResult,
    check_stage1_checkpoint,
    finished,
    locked,
    read_result,
    write_result,
)
from fw_model.train.sharding import whole_on_main
from fw_model.train.starting import branch_point, check_init_from
from fw_model.train.validation import validate

log = logging.getLogger(__name__)

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: stopped by a signal, state saved, run the same command again


class Interrupted(Exception):
    """A signal stopped the run after a whole step; the state is saved."""


def train(
    preset: Preset,
    stage: Stage,
    dataset: str | Path,
    output: Path,
    stage1_checkpoint: Path | None = None,
    on_metrics: OnMetrics | None = None,
    *,
    init_from: Path | None = None,
    resume_as_new: Path | None = None,
) -> TrainResult:
    """Train a stage, or go on training it.

    Args:
        preset: model, base and the stage's section.
        stage: "stage1" or "stage2".
        dataset: folder with a manifest and shards, or the URL of one.
        output: folder for checkpoints, state and metrics; see `fw_model.train.run_folder`.
        stage1_checkpoint: where stage 2 starts; stage 1 takes none.
        on_metrics: called on the main process with every line of `metrics.jsonl` as it is written.
        init_from: checkpoint of the same stage whose weights it starts from; stage 2 then takes no stage 1 checkpoint.
        resume_as_new: output folder of another run, from whose newest state this one goes on with what differs.

    Raises:
        TrainingError: something missing or unfit, found before any model is built; an output folder of another run; too
            many steps without a finite loss.
        DatasetError: a missing or damaged dataset, found before any model is built.
        Interrupted: stopped by SIGTERM or SIGINT after saving.
    """
    if stage == "stage1" and stage1_checkpoint is not None:
        raise TrainingError("stage 1 starts from the base; a stage 1 checkpoint is for stage 2")
    if init_from is not None and stage1_checkpoint is not None:
        raise TrainingError("stage 2 starts from one file: --stage1-checkpoint, or a stage 2 checkpoint with --init-from")
    initial = check_init_from(init_from, preset, stage) if init_from is not None else None
    stage1 = check_stage1_checkpoint(stage1_checkpoint, preset) if stage == "stage2" and initial is None else None
    point = branch_point(resume_as_new, output) if resume_as_new is not None else None
    identity = run_identity(preset, stage, dataset_digest(dataset), stage1, initial, point)
    if (result := finished(output, identity)) is not None:
        log.info("%s is complete: step %d, %s", output, result.steps, result.checkpoint)
        return result
    accelerator = make_accelerator(preset.stage(stage), output)
    with locked(output) if accelerator.is_main_process else nullcontext(), _stop_signals() as stop:
        start = Start(stage1_checkpoint or init_from, resume_as_new)
        run = build_run(preset, stage, identity, dataset, output, start, accelerator, on_metrics)
        try:
            with attention_kernel(run.config.attention):
                complete = fit(run, stop)
        finally:
            run.batches.close()
        result = _finish(run) if complete else None
        accelerator.wait_for_everyone()
        for tracker in accelerator.trackers:
            tracker.finish()
    if result is None:
        raise Interrupted(f"stopped after step {run.progress.step}, state saved; run the same command again to go on")
    return result


def fit(run: Run, stop: threading.Event) -> bool:
    """Train to the last step, or until `stop` is set: then the state is saved and False returned."""
    config, progress = run.config, run.progress
    if not progress.before:
        progress.before = progress.after = _validate(run)
    terminal = run.accelerator.is_main_process and sys.stderr.isatty()
    with tqdm(total=config.steps, initial=progress.step, desc=run.stage, unit="step", disable=not terminal) as bar:
        while progress.step < config.steps:
            started = time.perf_counter()
            stopping = _step(run, stop)
            seconds = time.perf_counter() - started
            progress.seconds += seconds
            progress.window.add({"seconds": seconds, "data_seconds": run.batches.take_wait()})
            bar.update()
            last = progress.step == config.steps
            if progress.step % config.log_every == 0 or last:
                _log_window(run, bar)
            if progress.step % config.validate_every == 0 or last:
                progress.after = _validate(run)
            if run.stage == "stage2" and config.sample_every and (progress.step % config.sample_every == 0 or last):
                _sample(run)
            saving = progress.step % config.save_every == 0 or last
            if saving:
                _save_checkpoint(run)
            if saving or stopping or progress.step % config.state_every == 0:
                _save_state(run)
            if stopping:
                return last
    return True


def _step(run: Run, stop: threading.Event) -> bool:
    """One optimiser step; True when any process was told to stop."""
    accelerator, config, progress = run.accelerator, run.config, run.progress
    progress.step += 1
    names = LOSS_NAMES[run.stage]
    parts: list[tuple[list[str], Tensor]] = []  # of each micro-batch: its clips, its losses [len(names)]
    tokens, accumulation = 0, run.sampler.accumulation
    for micro in range(accumulation):
        batch = next(run.batches)
        tokens += video_tokens(batch)
        place = (micro * accelerator.num_processes + accelerator.process_index) * config.batch_per_device
        draws = training_draws(batch, config, progress.step, place).to(accelerator.device)
        batch = drop_text(batch.to(accelerator.device), draws, run.empty_text)
        with nullcontext() if micro == accumulation - 1 else accelerator.no_sync(run.wrapped):
            with autocast(config, accelerator.device):
                output = predict(run.wrapped, batch, draws)
            losses = compute_losses(output, batch, draws, run.stage, config)
            accelerator.backward(losses["total"] / accumulation)
        parts.append((batch.clip_ids, torch.stack([losses[name].detach() for name in names])))
    run.sampler.advance()
    norm = _clip_gradients(run)
    # One exchange a step, so that all processes decide alike: the losses, whose gradient is not finite, who was told to stop.
    sums = torch.stack([part for _, part in parts]).mean(dim=0)
    flags = sums.new_tensor([float(not norm.isfinite()), float(_must_stop(stop))])
    *shared, not_finite, stopping = accelerator.reduce(torch.cat([sums, flags]), "sum").tolist()
    means = {f"loss/{name}": value / accelerator.num_processes for name, value in zip(names, shared, strict=True)}
    rate = learning_rate(config, progress.step)
    progress.window.add({"tokens_per_second": tokens * accelerator.num_processes})
    if not_finite or not all(map(math.isfinite, means.values())):
        _clear_gradients(run)
        if too_many := pass_over(run, parts, means, float(norm)):
            _save_state(run)
            raise too_many
        return stopping > 0
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.step()
    _clear_gradients(run)
    if run.average is not None:
        run.average.update()
    progress.window.add({**means, "lr": rate, "grad_norm": float(norm)})
    report_spike(run, parts, means["loss/total"])
    return stopping > 0


def _clip_gradients(run: Run) -> Tensor:
    """Scale the gradients down to `max_grad_norm`; their norm before, over all processes that share them."""
    norm = torch.nn.utils.clip_grad_norm_(run.parameters.values(), run.config.max_grad_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _clear_gradients(run: Run) -> None:
    """Zero the gradients of data parallel in place: they live in the buckets that are exchanged, which stay anyway.

    Only from the second step on: the first one's buckets are made anew in another order, and gradients would keep the old.
    """
    wrapped = run.wrapped
    stay = isinstance(wrapped, DistributedDataParallel) and wrapped._has_rebuilt_buckets
    run.optimizer.zero_grad(set_to_none=not stay)


def video_tokens(batch: Batch) -> int:
    """Video tokens of a batch: 2 x 2 latent pixels each."""
    clips, _, frames, height, width = batch.latents.shape
    return clips * frames * (height // 2) * (width // 2)


def _validate(run: Run) -> dict[str, float]:
    """Losses on the validation clips, of the moving average where there is one: it is what will be used."""
    started = time.perf_counter()
    with run.average.in_place() if run.average is not None else nullcontext():
        values = validate(run.model, run.validation_clips, run.stage, run.config, run.accelerator)
    run.progress.seconds += time.perf_counter() - started
    if run.log is not None:
        run.log.write(run.progress.step, {f"val/{name}": value for name, value in values.items()})
        log.info("step %d validation: %s", run.progress.step, in_words(values))
    return values


def _sample(run: Run) -> None:
    from fw_model.train.samples import write_samples  # it loads a VAE and draws pictures: only where it is asked for

    started = time.perf_counter()
    write_samples(run)
    run.progress.seconds += time.perf_counter() - started


def _log_window(run: Run, bar: tqdm) -> None:
    values = run.progress.window.take()
    values["tokens_per_second"] /= values["seconds"]
    values["memory_gib"] = _memory_gib(run.accelerator.device)
    values["eta_seconds"] = values["seconds"] * (run.config.steps - run.progress.step)
    if run.log is None:
        return
    run.log.write(run.progress.step, values)
    bar.set_postfix(loss=f"{values.get('loss/total', math.nan):.4g}")
    if bar.disable:
        log.info("step %d/%d: %s", run.progress.step, run.config.steps, in_words(values))


def _memory_gib(device: torch.device) -> float:
    """Peak memory of this process: on the accelerator, or resident where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


def _save_checkpoint(run: Run) -> None:
    """Write all that the stage can train, also where `train_geometry: false` left some of it as stage 1 made it."""
    main = run.accelerator.is_main_process
    metadata = CheckpointMetadata(
        stage=run.stage,
        step=run.progress.step,
        preset=run.preset,
        base=run.preset.base.identity,
        dataset_digest=run.identity.dataset_digest,
        config_digest=run.identity.config_digest,
        base_hash=run.base_hash,
    )
    tensors = whole_on_main(run.stored, main)
    if main:
        save_checkpoint(run.checkpoint, tensors, metadata)
    del tensors
    if run.average is not None:
        tensors = whole_on_main(run.average.average, main)
        if main:
            save_checkpoint(run.averaged_checkpoint, tensors, replace(metadata, weights="ema"))
    if main and run.config.keep_checkpoints is not None:
        result = read_result(run.output)
        prune_checkpoints(run.output, run.config.keep_checkpoints, spare=result.checkpoint if result else None)
    run.accelerator.wait_for_everyone()


def _save_state(run: Run) -> None:
    main = run.accelerator.is_main_process
    files = {
        "weights": whole_on_main(run.parameters, main),
        "optimizer": whole_on_main(moments(run.parameters, run.optimizer), main),
    }
    if run.average is not None:
        files["ema"] = whole_on_main(run.average.average, main)
    if main:
        saved = {"progress": run.progress.to_json(), "sampler": run.sampler.state_dict()}
        save_state(run.output / "state", run.progress.step, files, saved, run.config.keep_states)
    run.accelerator.wait_for_everyone()


def _finish(run: Run) -> TrainResult:
    used = run.checkpoint if run.average is None else run.averaged_checkpoint
    if not used.is_file():  # removed by someone after the last step
        _save_checkpoint(run)
    result = TrainResult(
        stage=run.stage,
        steps=run.progress.step,
        checkpoint=used.name,
        validation={"before": run.progress.before, "after": run.progress.after},
        validation_split=run.validation_clips.split,
        seconds=round(run.progress.seconds, 3),
        config_digest=run.identity.config_digest,
        dataset_digest=run.identity.dataset_digest,
    )
    if run.accelerator.is_main_process:
        write_result(run.output, result)
        log.info("complete: %s", used)
    return result


# --------------------------------------------------------------------------------------------------------- signals

_PARENT = os.getppid()


def _must_stop(stop: threading.Event) -> bool:
    """True after a signal, or when `accelerate launch` is gone: for one process it does not pass signals on."""
    return stop.is_set() or ("ACCELERATE_MIXED_PRECISION" in os.environ and os.getppid() != _PARENT)


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that the first SIGTERM or SIGINT sets; a second one acts as it did before.

    Outside the main thread, which alone receives signals in Python, the event stays unset.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def handle(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
