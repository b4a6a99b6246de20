"""Commands and steps that cannot go on say why in words: no stack in the terminal, whichever way they were started."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest

from fw_model.errors import EncoderError, MissingInput
from fw_pipeline.assets.each_video import set_aside
from fw_pipeline.definitions import defs
from fw_pipeline.jobs import JOBS
from fw_pipeline.partitions import register
from fw_pipeline.steps.packing import LISTED, pack
from fw_pipeline.steps.pipeline import Pipeline
from fw_pipeline.steps.settings import settings_from_env
from fw_pipeline.steps.store import Done
from tests.helpers.graph import shell, write_requests

STACK = re.compile(r"Stack Trace|Traceback|^ +File \"", re.MULTILINE)


def run_job(name: str) -> dg.ExecuteInProcessResult:
    with dg.DagsterInstance.get() as instance:
        tags = register(instance, sorted(Pipeline(settings_from_env()).videos))
        return defs.resolve_job_def(name).execute_in_process(instance=instance, tags=tags, raise_on_error=False)


def failures(run: dg.ExecuteInProcessResult) -> list[Any]:
    return [event.step_failure_data for event in run.all_events if event.is_step_failure]


@pytest.mark.parametrize("job", [job.name for job in JOBS if job.name not in ("annotate_videos", "generate")])
def test_a_job_that_lacks_something_names_what_makes_it_and_shows_no_stack(environment: Path, job: str) -> None:
    (environment / "videos").rename(environment / "kept")
    (environment / "videos").mkdir()
    (environment / "videos" / "bad.mp4").write_text("no video", encoding="utf-8")
    done = shell(f"source env.sh && python -m fw_pipeline.launch {job}")
    assert done.returncode == 1
    assert "Run: python -m fw_pipeline.launch" in done.stderr.replace("make it with", "Run")
    assert not STACK.search(done.stdout + done.stderr)


def test_generation_names_what_it_lacks(environment: Path) -> None:
    """First a list of requests, then a finished stage 2."""
    line = "source env.sh && python -m fw_pipeline.launch generate"
    without_list = shell(line)
    write_requests(environment / "data")
    without_stage2 = shell(line)
    for done, said in ((without_list, "no lists of requests"), (without_stage2, "stage2 needs the packed dataset")):
        assert done.returncode == 1
        assert said in done.stderr
        assert not STACK.search(done.stdout + done.stderr)


@pytest.mark.parametrize(
    ("home", "said"), [("", "source env.sh"), ("nowhere", "is no folder"), (".", "absolute path"), ("broken", "dagster.yaml")]
)
def test_a_dagster_folder_that_is_no_good_is_named(environment: Path, tmp_path: Path, home: str, said: str) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "dagster.yaml").write_text("nonsense: [", encoding="utf-8")
    place = str(tmp_path / home) if home not in ("", ".") else home
    done = shell("python -m fw_pipeline.free_slots", DAGSTER_HOME=place)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert not STACK.search(done.stderr)


def test_encoders_that_are_not_there_stop_the_step_at_the_first_video(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline(settings_from_env())
    for key in pipeline.videos:
        pipeline.run("clips", key)
    asked = []

    def encoders(*_: object) -> None:
        asked.append(1)
        raise EncoderError("no weights of the encoders", "Fetch them")

    monkeypatch.setattr("fw_model.model.encoders.Encoders.from_config", encoders)
    failed, *_ = failures(run_job("build_dataset"))
    assert failed.user_failure_data.description == "latents cannot run: no weights of the encoders\nFetch them"
    assert len(asked) == 1


def test_training_processes_that_fail_are_one_message_that_says_where_to_look(
    environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = SimpleNamespace(
        output=environment / "run",
        stage1_checkpoint=None,
        write_preset=lambda: None,
        environment=lambda grace: {},
        command=lambda: [sys.executable, "-c", "raise SystemExit('error: the disk is full')"],
    )
    monkeypatch.setattr("fw_pipeline.steps.training_plan.plan_training", lambda *_: plan)
    with dg.DagsterInstance.get() as instance:
        run = defs.resolve_job_def("stage1_training").execute_in_process(instance=instance, raise_on_error=False)
    (failed,) = failures(run)
    assert failed.error.cause is None
    assert "their own output" in failed.user_failure_data.description
    assert str(plan.output) in failed.user_failure_data.description


def test_of_many_reasons_an_error_lists_some_and_counts_the_rest(environment: Path) -> None:
    for path in (environment / "videos").iterdir():
        path.unlink()
    for number in range(LISTED + 5):
        (environment / "videos" / f"{number:02}.mp4").write_text("no video", encoding="utf-8")
    pipeline = Pipeline(settings_from_env())
    for key in pipeline.videos:
        for step in ("clips", "geometry", "depth", "latents"):
            pipeline.run(step, key)
    with pytest.raises(MissingInput, match="and 5 more") as error:
        pack(pipeline)
    assert str(error.value).count("not a video") == LISTED


def test_a_reason_does_not_repeat_the_name_of_its_video() -> None:
    done = Done(video="walks/bad.mp4", fingerprint="", made_by="clips:1", set_aside="bad.mp4: not a video")
    assert set_aside(done) == {"walks/bad.mp4": "not a video"}
