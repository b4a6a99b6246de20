"""Launch jobs from the command line, one after the other, for all videos in the folder:

    python -m fw_pipeline.launch annotate_videos build_dataset

The per-video assets are partitioned, and one run for many videos is a run over a range of partitions; so are worlds, by request.
This registers what is in the folders and names the range; `dagster job execute` alone has no way to say it. Jobs without
partitions run as they do there. Runs are recorded in the instance at DAGSTER_HOME.
"""

import argparse
import os
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING

import dagster as dg
import yaml

from fw_model.errors import ConfigError, MissingInput, explain_errors
from fw_pipeline.partitions import LAUNCH, REQUEST, inventory_tags, register, request_partitions, retire
from fw_pipeline.slots import wait_for_slots

if TYPE_CHECKING:
    from fw_pipeline.steps.pipeline import Pipeline


@dataclass(frozen=True)
class Outcome:
    """How a launched job went, in words."""

    failed: list[str]  # steps, and checks that are errors
    warned: list[str]  # checks that are warnings
    unchecked: list[str] = field(default_factory=list)  # checks that had nothing to look at
    partly: bool = False  # all that failed are single videos or clips: what follows can go on with the others


def launch(instance: dg.DagsterInstance, job_name: str, log_level: str = "INFO") -> Outcome:
    """Run one job here and wait for it.

    Raises:
        MissingInput: there are no videos, or no requests.
    """
    from fw_pipeline.checks import NOTHING
    from fw_pipeline.definitions import defs
    from fw_pipeline.resources import PIPELINE

    job, pipeline = defs.resolve_job_def(job_name), PIPELINE.build()  # built first: settings are refused before the run starts
    tags = _partition_tags(instance, job, pipeline)
    wait_for_slots(instance, job, lambda line: print(line, flush=True))
    config = {"loggers": {"console": {"config": {"log_level": log_level}}}}
    result = job.execute_in_process(run_config=config, instance=instance, raise_on_error=False, tags=tags)
    warned: list[str] = []
    unchecked: list[str] = []
    failures = [event for event in result.all_events if event.is_step_failure]
    failed = [f"{job_name}: {_reason(event)}" for event in failures]
    for check in result.get_asset_check_evaluations():
        name = f"{check.asset_key.to_user_string()}: {check.check_name}"
        warning = check.severity == dg.AssetCheckSeverity.WARN
        nothing = (check.description or "").startswith(NOTHING)
        verdict = "passed" if check.passed else "NOTHING TO CHECK" if nothing else "WARNING" if warning else "FAILED"
        print(f"  check {name}: {verdict} {(check.description or '').removeprefix(NOTHING + ': ')}".rstrip(), flush=True)
        if not check.passed:
            (unchecked if nothing else warned if warning else failed).append(f"check {name} ({check.description})")
    if not result.success and not failed:
        failed.append(f"{job_name}: failed; see the log above")
    partly = len(failed) == len(failures) and all(map(_of_single_videos, failures))
    return Outcome(failed, warned, unchecked, partly=bool(failures) and partly)


def _partition_tags(instance: dg.DagsterInstance, job: dg.JobDefinition, pipeline: "Pipeline") -> dict[str, str]:
    """Register what the job has partitions for, videos or requests, retire those that are gone, and name all of them.

    Raises MissingInput when there are none.
    """
    from fw_pipeline.steps.inventory import take_inventory

    if job.partitions_def is None:
        return {}
    if job.partitions_def == request_partitions:
        from fw_pipeline.steps.worlds import read_folder

        requests = read_folder(pipeline.settings)
        retire(instance, requests.jobs, REQUEST)
        return register(instance, sorted(requests.jobs), REQUEST)
    videos = pipeline.require_videos()
    inventory = take_inventory(pipeline.settings)
    print("\n".join(inventory.lines()), flush=True)
    # Videos in a folder that cannot be read now are not gone.
    if not inventory.listing.closed and (old := retire(instance, videos)):
        print(f"{len(old)} partitions retired, whose videos are no longer in {pipeline.settings.videos}: {', '.join(old)}")
    return register(instance, sorted(videos)) | inventory_tags(inventory)


def _of_single_videos(event: dg.DagsterEvent) -> bool:
    """Whether a step failed for some videos or clips only, with the others finished."""
    from fw_pipeline.assets.each_video import FAULTS

    said = event.step_failure_data.user_failure_data
    return said is not None and FAULTS in said.metadata


def _reason(event: dg.DagsterEvent) -> str:
    """The message of a failed step; the stack of one that no message explains is in the log above."""
    error, said = event.step_failure_data.error, event.step_failure_data.user_failure_data
    if said is not None and said.description:
        return f"{event.step_key}: {said.description}"
    return f"{event.step_key}: {(error.cause or error).message.strip() if error else 'failed'}"


def open_instance() -> dg.DagsterInstance:
    """The instance at DAGSTER_HOME. Raises MissingInput when there is none, ConfigError when Dagster refuses it."""
    home = os.environ.get("DAGSTER_HOME", "")
    if not Path(home).is_dir() or not home:
        raise MissingInput(f"DAGSTER_HOME={home!r} is no folder, and runs are recorded there", "Run first: source env.sh")
    try:
        return dg.DagsterInstance.get()
    except (dg.DagsterError, yaml.YAMLError) as error:
        raise ConfigError(f"Dagster refuses {home}/dagster.yaml or DAGSTER_HOME={home!r}: {error}") from error


@explain_errors
def main(argv: list[str] | None = None) -> int:
    """Exits 0 when every job and check passed (warnings aside), else 1, at the first job that failed for more than single
    videos: what these leave goes on to the next job."""
    from fw_pipeline.jobs import JOBS

    parser = argparse.ArgumentParser(prog=LAUNCH, description="Launch jobs for all videos in the folder, in this order.")
    parser.add_argument("jobs", nargs="+", choices=[job.name for job in JOBS], metavar="JOB", help="%(choices)s")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", category=dg.BetaWarning)
    warnings.filterwarnings("ignore", category=dg.PreviewWarning)
    failed: list[str] = []
    with open_instance() as instance:
        for number, name in enumerate(args.jobs, 1):
            print(f"\n[{number}/{len(args.jobs)}] {name}", flush=True)
            outcome = launch(instance, name)
            failed += outcome.failed
            if outcome.failed and not outcome.partly:
                break
    if failed:
        print("\nfailed:\n" + indent("\n".join(failed), "  "), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
