"""Small real input for the graph: two rendered videos, and an environment that points every command at a scratch folder."""

from dataclasses import replace
from pathlib import Path

import dagster as dg
import pytest

from fw_pipeline.demo.render import SHOTS, render_demo
from tests.helpers.graph import FinishedGraph, prepare, write_requests


@pytest.fixture(scope="session")
def two_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two rendered videos of one clip each."""
    folder = tmp_path_factory.mktemp("rendered")
    single = [plan for plan in SHOTS if len(plan.shots) == 1][:2]
    render_demo(folder, tuple(replace(plan, shots=(replace(plan.shots[0], frames=36),)) for plan in single))
    return folder


@pytest.fixture(scope="session")
def finished_graph(tmp_path_factory: pytest.TempPathFactory, two_videos: Path) -> FinishedGraph:
    from fw_pipeline.definitions import defs
    from fw_pipeline.jobs import JOBS
    from fw_pipeline.partitions import REQUEST, register
    from fw_pipeline.steps.pipeline import Pipeline
    from fw_pipeline.steps.settings import settings_from_env

    root = tmp_path_factory.mktemp("graph")
    with pytest.MonkeyPatch.context() as patch:
        prepare(root, two_videos, patch)
        (root / "videos" / "not a vidéo.mp4").write_text("hello")
        with dg.DagsterInstance.get() as instance:
            videos = register(instance, list(Pipeline(settings_from_env()).videos))
            worlds = register(instance, write_requests(root / "data"), REQUEST)
            runs = {
                job.name: defs.resolve_job_def(job.name).execute_in_process(
                    instance=instance, tags=worlds if job.name == "generate" else videos
                )
                for job in JOBS
            }
    return FinishedGraph(root, runs)


@pytest.fixture
def environment(tmp_path: Path, two_videos: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """FW_DATA, FW_VIDEOS, FW_PRESET and the instance below a scratch folder, which is returned."""
    prepare(tmp_path, two_videos, monkeypatch)
    return tmp_path
