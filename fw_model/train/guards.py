"""What a run does about a step that looks wrong: pass over what is not finite, report a loss that jumps."""

from __future__ import annotations

import logging
import math
from statistics import median

from accelerate.utils import gather_object
from torch import Tensor

from fw_model.errors import TrainingError
from fw_model.train.metrics_log import in_words
from fw_model.train.run import Run

log = logging.getLogger(__name__)

WINDOW = 100  # losses whose median a spike is told against
ENOUGH = 10  # of them, before anything is called a spike

Parts = list[tuple[list[str], Tensor]]  # of each micro-batch of this process: its clips, its losses with the total last


def pass_over(run: Run, parts: Parts, means: dict[str, float], norm: float) -> TrainingError | None:
    """Count and report a step whose loss or gradient is not finite. All processes must call it together.

    The clips named are those of the micro-batches with such a loss, on whatever process; all of the step's when the losses
    are finite and only the gradient is not.

    Returns the error to stop with, once there have been more than `max_skipped`.
    """
    progress, config = run.progress, run.config
    progress.skipped += 1
    bad = gather_object([clip for clips, losses in parts if not losses.isfinite().all() for clip in clips])
    clips = bad or gather_object([clip for clips, _ in parts for clip in clips])
    what = (
        f"step {progress.step}: loss or gradient is not finite ({in_words(means)}, gradient norm {norm:.4g}); "
        f"clips: {', '.join(clips)}"
    )
    log.warning("%s; passed over (%d of at most %d)", what, progress.skipped, config.max_skipped)
    if progress.skipped <= config.max_skipped:
        return None
    return TrainingError(
        f"{what}\nThat is more than max_skipped={config.max_skipped} such steps. The state is saved. Look at these clips, "
        f"go on from here with a lower {run.stage}.learning_rate (--resume-as-new {run.output} --output ANOTHER), or in the same "
        f"run with a higher {run.stage}.max_skipped"
    )


def report_spike(run: Run, parts: Parts, total: float) -> None:
    """Log a total loss of more than `spike_factor` times the median of the last steps, with this process' highest clips.

    A line with `spike/total` and `spike/median` goes to the metrics. The step itself has been taken: clipping bounds it.
    """
    recent = run.progress.recent
    usual = median(recent) if len(recent) >= ENOUGH else math.inf
    if 0 < run.config.spike_factor * usual < total:
        clips = max(parts, key=lambda part: float(part[1][-1]))[0]
        log.warning(
            "step %d: loss %.4g is %.1f times the median of the last %d steps (%.4g); highest on process %d: %s",
            *(run.progress.step, total, total / usual, len(recent), usual, run.accelerator.process_index, ", ".join(clips)),
        )
        if run.log is not None:
            run.log.write(run.progress.step, {"spike/total": total, "spike/median": usual})
    run.progress.recent = [*recent, total][-WINDOW:]
