"""Pool slots and the processes that hold them.

A process that was killed with SIGKILL frees nothing, and its run stays "started" for ever. Every run says which process it is
(`claim`, from the resource that every step uses), so that the next launch on this machine knows the dead from the living.
"""

import multiprocessing
import socket
import time
from collections.abc import Callable

import dagster as dg
import psutil

PROCESS = "fantasyworld/process"  # run tag: host, process id, when that process began
PATIENCE = 2.0  # seconds between two looks at a pool that is taken


def run_process() -> str:
    """Host, process id and start of the process that runs this step's run; another one that gets its number later began later.

    Steps may have processes of their own, which end before the run does: then it is the one that started them.
    """
    parent = multiprocessing.parent_process()
    process = psutil.Process(parent.pid if parent is not None else None)
    return f"{socket.gethostname()} {process.pid} {process.create_time():.0f}"


def claim(instance: dg.DagsterInstance, run_id: str) -> None:
    """Tag a run with the process that runs it."""
    if instance.has_run(run_id):
        instance.add_run_tags(run_id, {PROCESS: run_process()})


def is_dead(run: dg.DagsterRun) -> bool:
    """Whether the run's process was on this machine and is no more. A run of another machine, or without a tag, may live."""
    host, _, rest = run.tags.get(PROCESS, "").partition(" ")
    if host != socket.gethostname():
        return False
    pid, _, began = rest.partition(" ")
    try:
        return abs(psutil.Process(int(pid)).create_time() - float(began)) > 2
    except psutil.NoSuchProcess:
        return True


def holders(instance: dg.DagsterInstance, pool: str) -> list[str]:
    """Ids of the runs that hold a pool's slots or stand before them."""
    info = instance.event_log_storage.get_concurrency_info(pool)
    return sorted(info.active_run_ids | info.pending_run_ids)


def free_slots(instance: dg.DagsterInstance) -> dict[str, list[str]]:
    """Free every slot held by a run that is finished, gone, or whose process is dead; pool -> run ids.

    A dead run is marked as failed: its results of before stay, and what it was at is done again.
    """
    freed: dict[str, list[str]] = {}
    for pool in sorted(instance.event_log_storage.get_concurrency_keys()):
        for run_id in holders(instance, pool):
            run = instance.get_run_by_id(run_id)
            if run is not None and not run.is_finished and is_dead(run):
                instance.report_run_failed(run, f"its process is gone: {run.tags[PROCESS]}")
                run = None
            if run is None or run.is_finished:
                instance.event_log_storage.free_concurrency_slots_for_run(run_id)
                freed.setdefault(pool, []).append(run_id)
    return freed


def pools_of(job: dg.JobDefinition) -> set[str]:
    """The pools that a job's steps take slots of."""
    return {pool for node in job.nodes for pool in [getattr(node.definition, "pool", None)] if pool}


def wait_for_slots(
    instance: dg.DagsterInstance, job: dg.JobDefinition, say: Callable[[str], None], sleep: Callable[[float], None] = time.sleep
) -> None:
    """Free the slots of the dead, then wait, asleep, until every pool of the job has one; says once for whom.

    Left to itself Dagster waits without a word, on a whole core, deaf to Ctrl-C. Here Ctrl-C ends it.
    """
    told: set[str] = set()
    while True:
        for pool, run_ids in free_slots(instance).items():
            say(f"pool {pool}: freed the slot of {', '.join(run_ids)}, whose process is gone")
        taken = {pool: found for pool in sorted(pools_of(job)) if (found := _in_the_way(instance, pool))}
        if not taken:
            return
        for pool, runs in taken.items():
            said = "; ".join(map(_in_words, runs))
            if said not in told:
                told.add(said)
                say(f"pool {pool} is taken: waiting for {said} (Ctrl-C ends the wait)")
        sleep(PATIENCE)


def _in_the_way(instance: dg.DagsterInstance, pool: str) -> list[dg.DagsterRun]:
    """The runs that hold all the slots of a pool; none while one is free."""
    if pool not in instance.event_log_storage.get_concurrency_keys():
        return []
    info = instance.event_log_storage.get_concurrency_info(pool)
    if info.active_slot_count < max(1, info.limit or info.slot_count):
        return []
    return [run for run_id in sorted(info.active_run_ids) if (run := instance.get_run_by_id(run_id)) is not None]


def _in_words(run: dg.DagsterRun) -> str:
    host, _, rest = run.tags.get(PROCESS, "").partition(" ")
    where = f", process {rest.partition(' ')[0]} on {host}" if host else ""
    return f"run {run.run_id} of {run.job_name}{where}"
