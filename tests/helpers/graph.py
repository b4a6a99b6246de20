"""An environment that points every command at a scratch folder, and a shell in it."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import pytest

PROJECT = Path(__file__).parents[2]


# Small frames: what is tested is the graph; tests/annotate/test_colmap.py and the demo hold annotators to their bars.
LONG_SIDE = 224


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


def prepare(root: Path, videos: Path, patch: pytest.MonkeyPatch) -> None:
    home = root / "dagster_home"
    home.mkdir()
    shutil.copy(PROJECT / "dagster_home" / "dagster.yaml", home)
    shutil.copytree(videos, root / "videos")
    (root / "quick.yaml").write_text(QUICK, encoding="utf-8")
    for name, value in environment_of(root).items():
        patch.setenv(name, value)
    patch.delenv("FW_PROFILE", raising=False)


def write_requests(data: Path) -> list[str]:
    """A list of two small requests in a data folder; returns their keys."""
    (data / "requests").mkdir(parents=True)
    asked = [
        {"name": name, "prompt": "a room", "trajectory": name, "steps": 2, "guidance_scale": 1} for name in ("pan_left", "spiral")
    ]
    (data / "requests" / "list.jsonl").write_text("\n".join(map(json.dumps, asked)), encoding="utf-8")
    return [f"list.{one['name']}" for one in asked]


def environment_of(root: Path) -> dict[str, str]:
    home = str(root / "dagster_home")
    folders = {"FW_DATA": str(root / "data"), "FW_VIDEOS": str(root / "videos"), "FW_PRESET": str(root / "quick.yaml")}
    return folders | {"DAGSTER_HOME": home, "FW_DAGSTER_HOME": home, "FW_ANNOTATION_LONG_SIDE": str(LONG_SIDE)}


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line as a user would type it, with this interpreter's environment first on PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    full = {**os.environ, "PATH": path, "PYTHONWARNINGS": "ignore", **environment}
    return subprocess.run(["bash", "-c", line], cwd=PROJECT, env=full, capture_output=True, text=True, timeout=300)
