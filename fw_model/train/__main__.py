"""Training from the command line: both stages, exit codes.

    accelerate launch -m fw_model.train --preset tiny --stage stage1 [--config my.yaml] [key=value ...]
    accelerate launch -m fw_model.train --preset tiny --stage stage2 [--config my.yaml] [key=value ...]

By default it trains on data/dataset into outputs/fantasy_world_stage1 (or 2), and stage 2 starts from what a complete stage 1
left there; --dataset, --output and --stage1-checkpoint say otherwise.

Run the same command again to go on: an interrupted run continues from its last state exactly as if it had never stopped, a
complete one returns at once. SIGTERM and SIGINT finish the step, save the state and end with exit code 75 (which
`accelerate launch` turns into 1; `python -m fw_model.train` is the same for one process and keeps it).
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from fw_model.config import Stage, load_preset
from fw_model.errors import Explained, TrainingError, explain_errors
from fw_model.train.loop import EXIT_INTERRUPTED, Interrupted, train
from fw_model.train.metrics_log import OnMetrics
from fw_model.train.out_of_memory import explain_out_of_memory
from fw_model.train.run_folder import stage1_result

log = logging.getLogger(__name__)


def default_output(stage: Stage) -> Path:
    """Where a stage goes, and where stage 2 looks for stage 1, unless told otherwise."""
    return Path("outputs") / f"fantasy_world_{stage}"


@explain_errors
def main(argv: Sequence[str] | None = None, on_metrics: OnMetrics | None = None) -> int:
    """Command line; returns the exit code: 0 complete, 1 an error that is explained on stderr, 75 interrupted and saved."""
    parser = argparse.ArgumentParser(
        prog="python -m fw_model.train", description="Train one stage of FantasyWorld, or go on with it."
    )
    parser.add_argument("--preset", required=True, help="name of a preset, or a YAML file")
    parser.add_argument("--stage", required=True, choices=("stage1", "stage2"))
    parser.add_argument("--config", type=Path, help="a YAML file with what differs from the preset")
    parser.add_argument(
        "--dataset", default="data/dataset", help="folder with manifest.parquet, or its URL: s3://, gs://, ... (%(default)s)"
    )
    parser.add_argument("--output", type=Path, help="folder for checkpoints, state and metrics (outputs/fantasy_world_STAGE)")
    parser.add_argument("--stage1-checkpoint", type=Path, help="stage 2 starts here (the result in outputs/fantasy_world_stage1)")
    parser.add_argument("--init-from", type=Path, metavar="FILE", help="start from the weights of a checkpoint of the same stage")
    parser.add_argument(
        "--resume-as-new", type=Path, metavar="DIR", help="go on from the newest state of the run in DIR, as a new run"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted preset keys, e.g. stage1.steps=100")
    args = parser.parse_intermixed_args(argv)
    main_process = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if main_process else logging.WARNING, format="%(asctime)s %(message)s")
    code = 0
    try:
        preset = load_preset(args.preset, args.overrides, args.config)
        stage1 = args.stage1_checkpoint
        if args.stage == "stage2" and stage1 is None and args.init_from is None:
            stage1 = stage1_result(default_output("stage1"))
        output = args.output or default_output(args.stage)
        start = {"init_from": args.init_from, "resume_as_new": args.resume_as_new}
        train(preset, args.stage, args.dataset, output, stage1, on_metrics, **start)
    except Interrupted as stopped:
        log.warning("%s", stopped)
        code = EXIT_INTERRUPTED
    except torch.OutOfMemoryError as error:
        raise explain_out_of_memory(error, preset, args.stage, int(os.environ.get("WORLD_SIZE", "1"))) from error
    except RuntimeError as error:
        if not isinstance(error, Explained) and torch.distributed.is_initialized() and (reason := lost_process(error)):
            raise TrainingError(
                f"rank {torch.distributed.get_rank()} lost the other processes: {reason}",
                "One of them ended or hangs; its own output says why. Run the same command again to go on from the last state",
            ) from error
        raise
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return code


def lost_process(error: RuntimeError) -> str:
    """First line of an error of the communication between processes; "" for any other error."""
    text = str(error)
    if not isinstance(error, torch.distributed.DistError) and "gloo" not in text.lower():
        return ""
    return text.splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
