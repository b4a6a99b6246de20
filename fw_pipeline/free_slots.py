"""`make free-slots`: frees the pool slots of runs that are over.

A run under the daemon needs no help, and a launch frees the slots of this machine's dead processes by itself; this is for those
of others, and for a look.
"""

import sys

import dagster as dg

from fw_model.errors import MissingInput, explain_errors
from fw_pipeline.launch import open_instance
from fw_pipeline.slots import free_slots


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
