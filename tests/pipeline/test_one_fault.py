"""A fault of one video in a run: the steps after it run for the others, and the run ends failed with its name."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
import pytest

from fw_pipeline.assets.each_video import FAULTS
from fw_pipeline.definitions import defs
from fw_pipeline.launch import main
from fw_pipeline.partitions import gone, register, retire, video_partitions
from fw_pipeline.steps.packing import PackResult
from fw_pipeline.steps.pipeline import Pipeline
from fw_pipeline.steps.settings import settings_from_env
from fw_pipeline.steps.store import Done


@pytest.fixture
def quick_steps(environment: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every step takes no time; clips fail for the first video, latents for the second."""
    first, second = sorted(Pipeline(settings_from_env()).videos)

    def work(step: str) -> object:
        def made(self: Pipeline, key: str, folder: Path) -> Done:
            if (step, key) in (("clips", first), ("latents", second)):
                raise RuntimeError(f"the {step} of {key} are a fault")
            return Done(video=self.shown(key), fingerprint="", made_by="test")

        return made

    for step in ("clips", "geometry", "depth", "latents"):
        monkeypatch.setattr(Pipeline, f"_{step}", work(step))
    monkeypatch.setattr(Pipeline, "_embed_texts", lambda self, key: None)
    return environment


def test_a_fault_of_one_video_leaves_the_steps_after_it_to_the_others(quick_steps: Path) -> None:
    pipeline = Pipeline(settings_from_env())
    first, second = sorted(pipeline.videos)
    with dg.DagsterInstance.get() as instance:
        instance.add_dynamic_partitions(video_partitions.name or "", ["aaa-gone"])
        tags = register(instance, ["aaa-gone", first, second])
        run = defs.resolve_job_def("annotate_videos").execute_in_process(instance=instance, tags=tags, raise_on_error=False)
        assert not run.success
        (failure,) = [event.step_failure_data for event in run.all_events if event.is_step_failure]
        assert failure.user_failure_data.metadata[FAULTS].value == 1
        assert f"clips: RuntimeError: the clips of {first} are a fault" in failure.user_failure_data.description
        assert second not in failure.user_failure_data.description
        assert {event.step_key for event in run.all_events if event.is_step_failure} == {"depth"}
        assert pipeline.store.done("depth", second) is not None
        assert pipeline.store.done("geometry", first) is None
        # The gone video was left out, and retires as soon as no run is under way.
        assert retire(instance, pipeline.videos) == ["aaa-gone"]
        assert sorted(instance.get_dynamic_partitions("video")) == [first, second]


def test_no_partition_retires_while_a_run_is_under_way(environment: Path) -> None:
    with dg.instance_for_test() as instance:
        register(instance, ["a", "b"])
        assert gone(instance, {"a"}) == ["b"]
        instance.create_run_for_job(defs.resolve_job_def("annotate_videos"), status=dg.DagsterRunStatus.STARTED)
        assert retire(instance, {"a"}) == []


def test_a_launch_goes_on_to_the_next_job_with_what_did_not_fail(
    quick_steps: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    packed: list[list[str]] = []

    def pack(pipeline: Pipeline, progress: object) -> PackResult:
        packed.append(list(pipeline.videos))
        return PackResult(failed={"some-clip": "damaged"})

    monkeypatch.setattr("fw_pipeline.steps.packing.pack", pack)
    monkeypatch.setattr("fw_model.data.manifest.dataset_digest", lambda folder: "digest")
    assert main(["annotate_videos", "build_dataset", "stage1_training"]) == 1
    out, said = capsys.readouterr()
    assert f"{quick_steps / 'videos'}: 2 videos, 0 with a prompt" in out  # every launch says what lies in the folder
    assert len(packed) == 1
    assert "are a fault" in said.partition("\nfailed:")[2]
    assert "some-clip: damaged" in said
    # Training has no dataset here: its failure is no single video's, so the launch ends with it.
    assert "stage1_training" in said.partition("\nfailed:")[2]
