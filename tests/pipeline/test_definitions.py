"""The graph that people see is the one the documents name, and every way of loading it finds the same one."""

import tomllib
from pathlib import Path

import dagster as dg
import pytest
import yaml

from fw_pipeline.definitions import defs
from tests.helpers.graph import PROJECT, shell

GROUPS = {
    "ingest": {"clips"},
    "annotate": {"geometry", "depth"},
    "dataset": {"latents", "training_shards"},
    "train": {"stage1_checkpoint", "stage2_checkpoint"},
    "validate": {"stage1_report", "stage2_report"},
    "generate": {"generated_worlds"},
}


def test_groups_and_assets_are_those_of_the_documents() -> None:
    graph = defs.resolve_asset_graph()
    found: dict[str, set[str]] = {}
    for key in graph.get_all_asset_keys():
        found.setdefault(graph.get(key).group_name, set()).add(key.to_user_string())
    assert found == GROUPS


def test_jobs_sensor_and_schedule_are_there() -> None:
    jobs = {job.name for job in defs.resolve_all_job_defs()}
    assert {"annotate_videos", "build_dataset", "stage1_training", "stage2_training", "validation", "generate"} <= jobs
    assert defs.resolve_sensor_def("new_videos").job_name == "annotate_videos"
    assert defs.resolve_schedule_def("reannotate").cron_schedule == "0 3 * * *"


def test_training_depends_on_the_dataset_and_not_on_every_video() -> None:
    graph = defs.resolve_asset_graph()
    assert {key.to_user_string() for key in graph.get(dg.AssetKey("stage1_checkpoint")).parent_keys} == {"training_shards"}
    assert graph.get(dg.AssetKey("stage1_checkpoint")).partitions_def is None


def test_workspace_and_dg_point_at_the_same_module() -> None:
    workspace = yaml.safe_load((PROJECT / "workspace.yaml").read_text(encoding="utf-8"))
    module = workspace["load_from"][0]["python_module"]
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["dg"]["project"]
    assert module == {"module_name": project["code_location_target_module"], "working_directory": "."}


def test_the_makefile_line_for_every_command_exists() -> None:
    targets = Path(PROJECT / "Makefile").read_text(encoding="utf-8")
    for target in ("setup", "demo", "test", "dev", "bench", "lint", "free-slots"):
        assert f"\n{target}: " in targets


@pytest.mark.parametrize("command", ["dg check defs", "dagster definitions validate -w workspace.yaml"])
def test_dagsters_own_checkers_find_nothing_wrong(environment: Path, command: str) -> None:
    result = shell(f"source env.sh && {command}")
    assert result.returncode == 0, result.stdout + result.stderr
