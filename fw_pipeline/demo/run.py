"""`make demo`: the whole graph on small real input, through the same Dagster jobs that everything else uses.

    python -m fw_pipeline.demo.run [--videos FOLDER]

Renders the demo videos (or takes one's own), then launches annotate_videos, build_dataset, stage1_training,
stage2_training, validation and generate in this process, recorded in the instance at DAGSTER_HOME, so `make dev` shows them.
The world at the end begins with the first frame of the first clip and turns around it.
Prints one JSON object last. Exits 1 when a job or an asset check fails; that training improved the validation losses is such a
check for the rendered videos and a warning for one's own.
"""

import argparse
import json
import os
import sys
import time
import warnings
from pathlib import Path
from statistics import fmean
from typing import Any

import dagster as dg

from fw_model.errors import Explained, explain_errors
from fw_pipeline.launch import Outcome, launch, open_instance
from fw_pipeline.resources import PIPELINE
from fw_pipeline.steps.review import truth_errors
from fw_pipeline.steps.settings import Settings


@explain_errors
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make demo", description="Videos to reports, end to end, with the laptop's defaults.")
    parser.add_argument("--videos", type=Path, help="a folder of one's own videos; without it the demo's are rendered")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", category=dg.BetaWarning)
    warnings.filterwarnings("ignore", category=dg.PreviewWarning)
    if args.videos is not None:
        os.environ["FW_VIDEOS"] = str(args.videos.resolve())
    settings = PIPELINE.settings()
    if args.videos is None:
        render(settings.videos)
    started = time.perf_counter()
    outcome = run_jobs(settings)
    if outcome.failed:
        print(f"\nmake demo: failed: {'; '.join(outcome.failed)}", file=sys.stderr)
        return 1
    if outcome.warned:
        print(f"\nmake demo: not as it should be: {'; '.join(outcome.warned)}", file=sys.stderr)
    if outcome.unchecked:
        print(f"\nmake demo: nothing to look at: {'; '.join(outcome.unchecked)}", file=sys.stderr)
    print(json.dumps(summary(settings) | {"seconds": round(time.perf_counter() - started, 1)}))
    # The rendered videos have a ground truth and are known to be enough to learn from; of somebody's own that cannot be asked.
    return 1 if (outcome.warned or outcome.unchecked) and args.videos is None else 0


def render(folder: Path) -> None:
    """Render the demo's videos; refuses a folder that holds somebody's own."""
    from fw_pipeline.annotate.clips import find_videos
    from fw_pipeline.demo.render import DEMO_VIDEOS, render_demo

    others = [path for path in (find_videos(folder) if folder.is_dir() else []) if path not in DEMO_VIDEOS]
    if others:
        raise Explained(
            f"{folder} holds {len(others)} videos of your own (e.g. {others[0]})",
            f"To run the pipeline on them: make demo VIDEOS={folder}. To see the rendered demo: FW_DATA=another/folder make demo",
        )
    render_demo(folder)


def run_jobs(settings: Settings) -> Outcome:
    """Launch every job in order, up to the first that fails for more than single videos; the warnings of all are kept."""
    from fw_pipeline.jobs import JOBS
    from fw_pipeline.steps.worlds import write_example

    failed: list[str] = []
    warned: list[str] = []
    unchecked: list[str] = []
    with open_instance() as instance:
        for number, job in enumerate(JOBS, 1):
            print(f"\n[{number}/{len(JOBS)}] {job.name}: {job.description}", flush=True)
            if job.name == "generate":
                write_example(settings)
            outcome = launch(instance, job.name)
            warned += outcome.warned
            unchecked += outcome.unchecked
            failed += outcome.failed
            if outcome.failed and not outcome.partly:
                break
    return Outcome(failed, warned, unchecked)


def summary(settings: Settings) -> dict[str, Any]:
    """The measured numbers of what now lies in the data folder."""
    from fw_model.data.manifest import read_manifest
    from fw_pipeline.steps.pipeline import Pipeline
    from fw_pipeline.steps.training_plan import plan_training

    pipeline = Pipeline(settings)
    errors = list(truth_errors(pipeline).values())
    rows = read_manifest(pipeline.store.dataset)
    names = ("ate_percent", "auc30", "absrel", "valid_fraction")
    numbers: dict[str, Any] = {name: round(fmean(e[name] for e in errors), 4) if errors else None for name in names}
    for stage in ("stage1", "stage2"):
        plan = plan_training(settings, stage)  # type: ignore[arg-type]
        result = plan.result() or {}
        numbers[stage] = {"checkpoint": str(plan.output / result["checkpoint"]), **result["validation"]}
    report = pipeline.store.report("stage2")
    world = settings.data / "worlds" / "demo" / "first"
    print("\nreports:", pipeline.store.report("stage1"), report, sep="\n  ")
    print("checkpoints:", numbers["stage1"]["checkpoint"], numbers["stage2"]["checkpoint"], sep="\n  ")
    print("a world to turn, in any browser:", world / "scene.html", sep="\n  ")
    print("see it all in the Dagster UI: make dev\n")
    return {
        "clips": sum(not row.quarantine for row in rows),
        "set_aside": sum(bool(row.quarantine) for row in rows),
        **numbers,
        "report": str(report),
        "world": str(world),
    }


if __name__ == "__main__":
    sys.exit(main())
