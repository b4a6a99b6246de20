"""`make free-slots`: frees the pool slots of runs that are over.

A run under the daemon needs no help; a command-line run that was killed with SIGKILL keeps its slots for ever.
"""

import sys

import dagster as dg

from fw_model.errors import MissingInput, explain_errors
from fw_pipeline.launch import open_instance


def free_slots(instance: dg.DagsterInstance) -> dict[str, list[str]]:
    """Free every slot held by a run that is finished, gone, or no longer has a living process here; pool -> run ids."""
    storage = instance.event_log_storage
    freed: dict[str, list[str]] = {}
    for pool in sorted(storage.get_concurrency_keys()):
        info = storage.get_concurrency_info(pool)
        for run_id in sorted(info.active_run_ids | info.pending_run_ids):
            run = instance.get_run_by_id(run_id)
            if run is None or run.is_finished:
                storage.free_concurrency_slots_for_run(run_id)
                freed.setdefault(pool, []).append(run_id)
    return freed


@explain_errors
def main(argv: list[str]) -> int:
    with open_instance() as instance:
        for run_id in argv:  # a run named by its id is declared dead by whoever knows that it is
            run = instance.get_run_by_id(run_id)
            if run is None:
                raise MissingInput(f"{run_id}: no such run in {instance.root_directory}")
            if not run.is_finished:
                instance.report_run_failed(run, "declared dead with make free-slots")
        freed = free_slots(instance)
        for pool, run_ids in freed.items():
            print(f"{pool}: freed {', '.join(run_ids)}")
        if not freed:
            running = [run.run_id for run in instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED]))]
            print("no slot held by a finished run")
            if running:
                print(f"still marked as running: {', '.join(running)}. If one is dead: python -m fw_pipeline.free_slots RUN_ID")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
