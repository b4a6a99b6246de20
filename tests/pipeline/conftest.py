"""Small real input for the graph: two rendered videos, and an environment that points every command at a scratch folder."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import dagster as dg
import pytest

from fw_pipeline.demo import SHOTS, render_demo

PROJECT = Path(__file__).parents[2]
LONG_SIDE = 224  # small frames: what is tested is the graph; tests/unit/test_colmap.py and the demo hold annotators to their bars
# Seconds instead of minutes: the tiny preset's architecture, a handful of steps.
QUICK = """\
preset: tiny
name: quick
stage1: {steps: 4, validate_every: 4, save_every: 2}
stage2: {steps: 3, validate_every: 3, save_every: 3}
"""


@dataclass(frozen=True)
class FinishedGraph:
    """Every job launched once, in order, on two good videos and one that is none."""

    root: Path  # holds data/, videos/, dagster_home/, quick.yaml
    runs: dict[str, dg.ExecuteInProcessResult]


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
    from fw_pipeline.launch import register
    from fw_pipeline.pipeline import Pipeline
    from fw_pipeline.settings import settings_from_env

    root = tmp_path_factory.mktemp("graph")
    with pytest.MonkeyPatch.context() as patch:
        prepare(root, two_videos, patch)
        (root / "videos" / "not a vidéo.mp4").write_text("hello")
        with dg.DagsterInstance.get() as instance:
            tags = register(instance, list(Pipeline(settings_from_env()).videos))
            runs = {job.name: defs.resolve_job_def(job.name).execute_in_process(instance=instance, tags=tags) for job in JOBS}
    return FinishedGraph(root, runs)


@pytest.fixture
def environment(tmp_path: Path, two_videos: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """FW_DATA, FW_VIDEOS, FW_PRESET and the instance below a scratch folder, which is returned."""
    prepare(tmp_path, two_videos, monkeypatch)
    return tmp_path


def prepare(root: Path, videos: Path, patch: pytest.MonkeyPatch) -> None:
    home = root / "dagster_home"
    home.mkdir()
    shutil.copy(PROJECT / "dagster_home" / "dagster.yaml", home)
    shutil.copytree(videos, root / "videos")
    (root / "quick.yaml").write_text(QUICK, encoding="utf-8")
    for name, value in environment_of(root).items():
        patch.setenv(name, value)
    patch.delenv("FW_PROFILE", raising=False)


def environment_of(root: Path) -> dict[str, str]:
    home = str(root / "dagster_home")
    folders = {"FW_DATA": str(root / "data"), "FW_VIDEOS": str(root / "videos"), "FW_PRESET": str(root / "quick.yaml")}
    return folders | {"DAGSTER_HOME": home, "FW_DAGSTER_HOME": home, "FW_ANNOTATION_LONG_SIDE": str(LONG_SIDE)}


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line as a user would type it, with this interpreter's environment first on PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    full = {**os.environ, "PATH": path, "PYTHONWARNINGS": "ignore", **environment}
    return subprocess.run(["bash", "-c", line], cwd=PROJECT, env=full, capture_output=True, text=True, timeout=300)
