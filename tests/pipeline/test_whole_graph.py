"""From two videos to two reports, through the very jobs people launch. (One file: its tests share one finished graph.)"""

import shutil
from pathlib import Path

import dagster as dg
import pytest

from fw_model.data.manifest import read_manifest
from fw_model.export.save import is_saved
from fw_pipeline.definitions import defs
from fw_pipeline.partitions import register
from fw_pipeline.schedules import reannotate
from fw_pipeline.steps.pipeline import Pipeline
from fw_pipeline.steps.settings import Settings, settings_from_env
from fw_pipeline.steps.training_plan import plan_training
from fw_pipeline.steps.worlds import make_worlds, read_folder
from tests.helpers.graph import LONG_SIDE, FinishedGraph, environment_of, shell

STAGE2 = "source env.sh && dagster job execute -j stage2_training"


@pytest.fixture
def settings(finished_graph: FinishedGraph) -> Settings:
    root = finished_graph.root
    preset = str(root / "quick.yaml")
    folders = {"data": root / "data", "videos": root / "videos", "requests": root / "data" / "requests"}
    return settings_from_env(**folders, preset=preset, annotation_long_side=LONG_SIDE)


def test_every_job_runs_from_videos_to_reports(finished_graph: FinishedGraph, settings: Settings) -> None:
    assert all(run.success for run in finished_graph.runs.values())
    stage1, stage2 = plan_training(settings, "stage1"), plan_training(settings, "stage2")
    assert stage2.stage1_checkpoint == stage1.output / "step-4.safetensors"
    assert (stage2.output / "step-3.safetensors").is_file()
    for name in ("stage1.html", "stage2.html"):
        assert (settings.data / "reports" / name).stat().st_size > 10_000


def test_every_request_becomes_a_world_with_a_picture_in_the_ui(finished_graph: FinishedGraph, settings: Settings) -> None:
    events = [e for e in finished_graph.runs["generate"].all_events if e.is_step_materialization and e.partition]
    told = {event.partition: event.step_materialization_data.materialization.metadata for event in events}
    assert set(told) == {"list.pan_left", "list.spiral"}
    for key, metadata in told.items():
        assert is_saved(settings.data / "worlds" / Path(key.replace(".", "/", 1)))
        assert {"folder", "page", "picture", "rotation_degrees"} <= metadata.keys()
    requests = read_folder(settings)
    assert [made.kept for made in make_worlds(settings, requests, sorted(requests.jobs))] == [True, True]
    gone = next(make_worlds(settings, requests, ["list.gone"]))
    assert "any more" in gone.fault


def test_annotations_agree_with_the_exact_truth_and_with_themselves(finished_graph: FinishedGraph) -> None:
    checks = {check.check_name: check for run in finished_graph.runs.values() for check in run.get_asset_check_evaluations()}
    # validation_improved says nothing after a handful of steps; the demo shows it.
    for name in ("annotation_matches_truth", "clips_are_consistent", "geometry_is_true", "dataset_is_whole"):
        assert checks[name].passed, (checks[name].description, checks[name].metadata)
    assert checks["annotation_matches_truth"].metadata["clips with truth"].value == 2


def test_a_bad_video_is_set_aside_with_its_reason_and_the_others_go_on(settings: Settings) -> None:
    rows = read_manifest(Pipeline(settings).store.dataset)
    assert {row.split for row in rows if not row.quarantine} == {"train", "val"}
    reasons = [row.quarantine for row in rows if row.quarantine]
    assert len(reasons) == 1
    assert "vidéo" in reasons[0]


def test_each_video_is_recorded_as_its_own_partition(finished_graph: FinishedGraph) -> None:
    events = finished_graph.runs["annotate_videos"].all_events
    recorded = {event.partition for event in events if event.is_step_materialization and event.asset_key == dg.AssetKey("depth")}
    assert len(recorded - {None}) == 3


def test_a_second_run_recomputes_nothing(finished_graph: FinishedGraph, settings: Settings) -> None:
    def depth_files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (settings.data / "depth").glob("*/*.npz")}

    before = depth_files()
    folders = {"data": str(settings.data), "videos": str(settings.videos)}
    config = {**folders, "preset": settings.preset, "annotation_long_side": LONG_SIDE}
    with dg.DagsterInstance.ephemeral() as instance:
        run = defs.resolve_job_def("annotate_videos").execute_in_process(
            run_config={"resources": {"pipeline": {"config": config}}},
            instance=instance,
            tags=register(instance, list(Pipeline(settings).videos)),
        )
    assert run.success
    assert len(before) == 2
    assert depth_files() == before


def test_the_literal_line_trains_stage_2(finished_graph: FinishedGraph, tmp_path: Path) -> None:
    """On a copy of the finished graph without its stage 2."""
    root = tmp_path / "copy"
    shutil.copytree(finished_graph.root, root)
    shutil.rmtree(root / "data" / "outputs" / "fantasy_world_stage2")
    result = shell(STAGE2, **environment_of(root))
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(list((root / "data" / "outputs" / "fantasy_world_stage2").glob("*/step-3.safetensors"))) == 1


def test_stage_2_without_stage_1_fails_at_once_and_names_the_job_to_run(finished_graph: FinishedGraph, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(finished_graph.root, root)
    shutil.rmtree(root / "data" / "outputs")
    result = shell(STAGE2, **environment_of(root))
    assert result.returncode != 0
    assert "dagster job execute -j stage1_training" in result.stderr


def test_the_schedule_skips_when_everything_is_up_to_date(finished_graph: FinishedGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment_of(finished_graph.root).items():
        monkeypatch.setenv(name, value)
    with (
        dg.instance_for_test() as instance,
        dg.build_schedule_context(resources=defs.resources, instance=instance) as context,
    ):
        assert isinstance(reannotate(context), dg.SkipReason)


def test_one_partition_annotates_one_video(
    finished_graph: FinishedGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a copy of the finished graph without its depth: cameras need not be found again."""
    root = tmp_path / "copy"
    shutil.copytree(finished_graph.root, root)
    shutil.rmtree(root / "data" / "depth")
    for name, value in environment_of(root).items():
        monkeypatch.setenv(name, value)
    keys = sorted(Pipeline(settings_from_env()).videos)
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions("video", keys)
        run = defs.resolve_job_def("annotate_videos").execute_in_process(instance=instance, partition_key=keys[-1])
    assert run.success
    assert [path.name for path in (root / "data" / "depth").iterdir()] == [keys[-1]]
