"""The training loop of both stages.

    accelerate launch -m fw_model.train --preset tiny --stage stage1 --dataset DIR --output DIR [key=value ...]
    accelerate launch -m fw_model.train --preset tiny --stage stage2 --stage1-checkpoint FILE --dataset DIR --output DIR

Run the same command again to go on: an interrupted run continues from its last state exactly as if it had never stopped, a
complete one returns at once. SIGTERM and SIGINT finish the step, save the state and end with exit code 75 (which
`accelerate launch` turns into 1; `python -m fw_model.train` is the same for one process and keeps it).
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from fw_model.checkpoints import CheckpointError, CheckpointMetadata, checkpoint_parameters, save_checkpoint, save_state
from fw_model.config import ConfigError, Preset, Stage, load_preset
from fw_model.data.manifest import DatasetError, dataset_digest
from fw_model.data.schema import Batch
from fw_model.metrics_log import OnMetrics
from fw_model.objective import LOSS_NAMES, autocast, compute_losses, drop_text, predict, training_draws
from fw_model.run_folder import (
    TrainingError,
    TrainResult,
    check_stage1_checkpoint,
    finished,
    locked,
    run_identity,
    write_result,
)
from fw_model.training_run import Run, build_run, learning_rate, make_accelerator
from fw_model.validation import validate
from fw_model.wan_weights import BaseModelError

log = logging.getLogger(__name__)

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: stopped by a signal, state saved, run the same command again


class Interrupted(Exception):
    """A signal stopped the run after a whole step; the state is saved."""


def train(
    preset: Preset,
    stage: Stage,
    dataset: Path,
    output: Path,
    stage1_checkpoint: Path | None = None,
    on_metrics: OnMetrics | None = None,
) -> TrainResult:
    """Train a stage, or go on training it.

    Args:
        preset: model, base and the stage's section.
        stage: "stage1" or "stage2".
        dataset: folder with a manifest and shards.
        output: folder for checkpoints, state and metrics; see `fw_model.run_folder`.
        stage1_checkpoint: where stage 2 starts; stage 1 takes none.
        on_metrics: called on the main process with every line of `metrics.jsonl` as it is written.

    Raises:
        TrainingError: something missing or unfit, found before any model is built; an output folder of another run; too
            many steps without a finite loss.
        DatasetError: a missing or damaged dataset, found before any model is built.
        Interrupted: stopped by SIGTERM or SIGINT after saving.
    """
    if stage == "stage1" and stage1_checkpoint is not None:
        raise TrainingError("stage 1 starts from the base; a stage 1 checkpoint is for stage 2")
    stage1 = check_stage1_checkpoint(stage1_checkpoint, preset) if stage == "stage2" else None
    identity = run_identity(preset, stage, dataset_digest(dataset), stage1)
    if (result := finished(output, identity)) is not None:
        log.info("%s is complete: step %d, %s", output, result.steps, result.checkpoint)
        return result
    accelerator = make_accelerator(preset.stage(stage), output)
    with locked(output) if accelerator.is_main_process else nullcontext(), _stop_signals() as stop:
        run = build_run(preset, stage, identity, dataset, output, stage1_checkpoint, accelerator, on_metrics)
        complete = fit(run, stop)
        result = _finish(run) if complete else None
        accelerator.end_training()
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
            progress.window.add({"seconds": seconds})
            bar.update()
            last = progress.step == config.steps
            if progress.step % config.log_every == 0 or last:
                _log_window(run, bar)
            if progress.step % config.validate_every == 0 or last:
                progress.after = _validate(run)
            saving = progress.step % config.save_every == 0 or last
            if saving:
                _save_checkpoint(run)
            if saving or stopping:
                _save_state(run)
            if stopping:
                return last
    return True


def _step(run: Run, stop: threading.Event) -> bool:
    """One optimiser step; True when any process was told to stop."""
    accelerator, config, progress = run.accelerator, run.config, run.progress
    progress.step += 1
    names = LOSS_NAMES[run.stage]
    sums = torch.zeros(len(names), device=accelerator.device)
    clip_ids: list[str] = []
    tokens, accumulation = 0, run.sampler.accumulation
    for micro in range(accumulation):
        batch = next(run.batches)
        clip_ids += batch.clip_ids
        tokens += video_tokens(batch)
        place = (micro * accelerator.num_processes + accelerator.process_index) * config.batch_per_device
        draws = training_draws(batch, config, progress.step, place).to(accelerator.device)
        batch = drop_text(batch.to(accelerator.device), draws, run.empty_text)
        with nullcontext() if micro == accumulation - 1 else accelerator.no_sync(run.wrapped):
            with autocast(config, accelerator.device):
                output = predict(run.wrapped, batch, draws)
            losses = compute_losses(output, batch, draws, run.stage, config)
            accelerator.backward(losses["total"] / accumulation)
        sums += torch.stack([losses[name].detach() for name in names]) / accumulation
    run.sampler.advance()
    norm = float(torch.nn.utils.clip_grad_norm_(run.parameters.values(), config.max_grad_norm))
    # One exchange a step: the losses, and whether anyone was told to stop.
    shared = accelerator.reduce(torch.cat([sums, sums.new_tensor([float(_must_stop(stop))])]), "sum").tolist()
    means = {f"loss/{name}": value / accelerator.num_processes for name, value in zip(names, shared, strict=False)}
    rate = learning_rate(config, progress.step)
    if math.isfinite(sum(means.values())) and math.isfinite(norm):
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        run.optimizer.step()
        progress.window.add({**means, "lr": rate, "grad_norm": norm})
    run.optimizer.zero_grad(set_to_none=True)
    progress.window.add({"tokens_per_second": tokens * accelerator.num_processes})
    if not (math.isfinite(sum(means.values())) and math.isfinite(norm)):
        _skip(run, clip_ids, means, norm)
    return shared[-1] > 0


def video_tokens(batch: Batch) -> int:
    """Video tokens of a batch: 2 x 2 latent pixels each."""
    clips, _, frames, height, width = batch.latents.shape
    return clips * frames * (height // 2) * (width // 2)


def _skip(run: Run, clip_ids: list[str], means: dict[str, float], norm: float) -> None:
    """Pass over a step whose loss or gradient is not finite; stop when there have been too many."""
    progress, config = run.progress, run.config
    progress.skipped += 1
    what = (
        f"step {progress.step}: loss or gradient is not finite ({_words(means)}, gradient norm {norm:.4g}); "
        f"clips: {', '.join(gather_object(clip_ids))}"
    )
    log.warning("%s; passed over (%d of at most %d)", what, progress.skipped, config.max_skipped)
    if progress.skipped > config.max_skipped:
        _save_state(run)
        raise TrainingError(
            f"{what}\nThat is more than max_skipped={config.max_skipped} such steps. The state is saved. Look at these clips, "
            f"start anew with a lower {run.stage}.learning_rate, or go on with a higher {run.stage}.max_skipped"
        )


def _validate(run: Run) -> dict[str, float]:
    started = time.perf_counter()
    values = validate(run.model, run.validation_clips, run.stage, run.config, run.accelerator)
    run.progress.seconds += time.perf_counter() - started
    if run.log is not None:
        run.log.write(run.progress.step, {f"val/{name}": value for name, value in values.items()})
        log.info("step %d validation: %s", run.progress.step, _words(values))
    return values


def _log_window(run: Run, bar: tqdm) -> None:
    values = run.progress.window.take()
    values["tokens_per_second"] /= values["seconds"]
    values["memory_gib"] = _memory_gib(run.accelerator.device)
    if run.log is None:
        return
    run.log.write(run.progress.step, values)
    bar.set_postfix(loss=f"{values.get('loss/total', math.nan):.4g}")
    if bar.disable:
        log.info("step %d/%d: %s", run.progress.step, run.config.steps, _words(values))


def _words(values: dict[str, float]) -> str:
    return " ".join(f"{name.removeprefix('loss/')} {value:.4g}" for name, value in values.items())


def _memory_gib(device: torch.device) -> float:
    """Peak memory of this process: on the accelerator, or resident where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


def _save_checkpoint(run: Run) -> None:
    """Write all that the stage can train, also where `train_geometry: false` left some of it as stage 1 made it."""
    if run.accelerator.is_main_process:
        metadata = CheckpointMetadata(
            stage=run.stage,
            step=run.progress.step,
            preset=run.preset,
            base=run.preset.base.identity,
            dataset_digest=run.identity.dataset_digest,
            config_digest=run.identity.config_digest,
        )
        save_checkpoint(run.checkpoint, checkpoint_parameters(run.model, run.stage), metadata)
        run.model.set_stage(run.stage, run.config.train_geometry)
    run.accelerator.wait_for_everyone()


def _save_state(run: Run) -> None:
    if run.accelerator.is_main_process:
        saved = {"progress": run.progress.to_json(), "sampler": run.sampler.state_dict()}
        save_state(run.output / "state", run.progress.step, run.parameters, run.optimizer, saved, run.config.keep_states)
    run.accelerator.wait_for_everyone()


def _finish(run: Run) -> TrainResult:
    if not run.checkpoint.is_file():  # removed by someone after the last step
        _save_checkpoint(run)
    result = TrainResult(
        stage=run.stage,
        steps=run.progress.step,
        checkpoint=run.checkpoint.name,
        validation={"before": run.progress.before, "after": run.progress.after},
        validation_split=run.validation_clips.split,
        seconds=round(run.progress.seconds, 3),
        config_digest=run.identity.config_digest,
        dataset_digest=run.identity.dataset_digest,
    )
    if run.accelerator.is_main_process:
        write_result(run.output, result)
        log.info("complete: %s", run.checkpoint)
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


# ---------------------------------------------------------------------------------------------------- command line


def main(argv: Sequence[str] | None = None, on_metrics: OnMetrics | None = None) -> int:
    """Command line; returns the exit code: 0 complete, 1 an error that is explained on stderr, 75 interrupted and saved."""
    parser = argparse.ArgumentParser(
        prog="python -m fw_model.train", description="Train one stage of FantasyWorld, or go on with it."
    )
    parser.add_argument("--preset", required=True, help="name of a preset, or a YAML file")
    parser.add_argument("--stage", required=True, choices=("stage1", "stage2"))
    parser.add_argument("--dataset", required=True, type=Path, help="folder with manifest.parquet")
    parser.add_argument("--output", required=True, type=Path, help="folder for checkpoints, state and metrics")
    parser.add_argument("--stage1-checkpoint", type=Path, help="stage 2 starts from this step-N.safetensors")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted preset keys, e.g. stage1.steps=100")
    args = parser.parse_intermixed_args(argv)
    main_process = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if main_process else logging.WARNING, format="%(asctime)s %(message)s")
    try:
        preset = load_preset(args.preset, args.overrides)
        train(preset, args.stage, args.dataset, args.output, args.stage1_checkpoint, on_metrics)
    except Interrupted as stopped:
        log.warning("%s", stopped)
        return EXIT_INTERRUPTED
    except (TrainingError, CheckpointError, ConfigError, DatasetError, BaseModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
