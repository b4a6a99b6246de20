"""A run whose process is dead holds nothing for long; who waits is told for whom, sleeps, and can be stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import dagster as dg
import psutil
import pytest

from fw_pipeline.definitions import defs
from fw_pipeline.slots import PROCESS, free_slots, holders, is_dead, pools_of, run_process, wait_for_slots
from tests.helpers.graph import PROJECT, environment_of


@pytest.fixture
def instance(environment: Path) -> dg.DagsterInstance:
    return dg.DagsterInstance.get()


def hold(instance: dg.DagsterInstance, process: str) -> str:
    """A run of some process that has the one slot of the pool."""
    run = instance.create_run_for_job(defs.resolve_job_def("stage1_training"), tags={PROCESS: process})
    storage = instance.event_log_storage
    storage.initialize_concurrency_limit_to_default("gpu")
    assert storage.claim_concurrency_slot("gpu", run.run_id, "stage1_checkpoint").is_claimed
    return run.run_id


def dead_process() -> str:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    found = psutil.Process(child.pid)
    host, said = run_process().split(" ")[0], f"{child.pid} {found.create_time():.0f}"
    child.kill()
    child.wait()
    return f"{host} {said}"


def test_a_dead_process_loses_its_slot_and_a_living_one_keeps_it(instance: dg.DagsterInstance) -> None:
    run_id = hold(instance, run_process())
    assert free_slots(instance) == {}
    assert holders(instance, "gpu") == [run_id]
    instance.add_run_tags(run_id, {PROCESS: dead_process()})
    assert free_slots(instance) == {"gpu": [run_id]}
    assert holders(instance, "gpu") == []
    run = instance.get_run_by_id(run_id)
    assert run is not None
    assert run.status == dg.DagsterRunStatus.FAILURE


def test_a_number_that_another_process_has_got_and_a_process_of_another_machine(instance: dg.DagsterInstance) -> None:
    host, pid, began = run_process().split(" ")
    run_id = hold(instance, f"{host} {pid} {float(began) - 1000:.0f}")  # began long before the one that has its number now
    run = instance.get_run_by_id(run_id)
    assert run is not None
    assert is_dead(run)
    instance.add_run_tags(run_id, {PROCESS: "elsewhere 1 0"})
    run = instance.get_run_by_id(run_id)
    assert run is not None
    assert not is_dead(run)


def test_a_launch_frees_the_slot_of_the_dead_and_says_so(instance: dg.DagsterInstance) -> None:
    run_id, said = hold(instance, dead_process()), []
    job = defs.resolve_job_def("stage1_training")
    assert pools_of(job) == {"gpu"}
    wait_for_slots(instance, job, said.append, sleep=lambda _: pytest.fail("there was nobody to wait for"))
    assert said == [f"pool gpu: freed the slot of {run_id}, whose process is gone"]


def test_waiting_says_for_whom_once_and_ends_when_the_slot_is_free(instance: dg.DagsterInstance) -> None:
    run_id, said, naps = hold(instance, run_process()), [], []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            instance.event_log_storage.free_concurrency_slots_for_run(run_id)

    wait_for_slots(instance, defs.resolve_job_def("stage1_training"), said.append, sleep)
    assert len(naps) == 3
    assert min(naps) >= 1
    (line,) = said
    assert f"waiting for run {run_id} of stage1_training, process {os.getpid()}" in line


def test_ctrl_c_ends_the_wait_of_a_launch(instance: dg.DagsterInstance, environment: Path) -> None:
    hold(instance, run_process())
    command = [sys.executable, "-m", "fw_pipeline.launch", "stage1_training"]
    settings = {**os.environ, **environment_of(environment), "PYTHONWARNINGS": "ignore"}
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what a shell starts in the background ignores it
    launched = subprocess.Popen(command, cwd=PROJECT, env=settings, stdout=subprocess.PIPE, text=True, preexec_fn=heed)
    assert launched.stdout is not None
    for line in launched.stdout:
        if "waiting for run" in line:
            break
    before = psutil.Process(launched.pid).cpu_times().user
    time.sleep(3)
    assert psutil.Process(launched.pid).cpu_times().user - before < 1.5  # asleep, not on a whole core
    launched.send_signal(signal.SIGINT)
    assert launched.wait(timeout=20) != 0
