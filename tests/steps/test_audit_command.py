"""`python -m fw_pipeline.annotate.audit`: any folder with geometry, one line a clip, an honest exit code."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fw_pipeline.annotate.audit.__main__ import main
from fw_pipeline.annotate.types import ClipGeometry
from fw_pipeline.steps.pipeline import Pipeline
from fw_pipeline.steps.results import FinishedClip
from fw_pipeline.steps.review import audit_finished
from fw_pipeline.steps.settings import settings_from_env
from fw_pipeline.steps.store import load_arrays, save_arrays
from tests.helpers.made_guide import MadeSample, write_layout
from tests.helpers.oracle import Oracle, run_all


@pytest.fixture
def pipeline(environment: Path) -> Pipeline:
    pipeline = Pipeline(settings_from_env(annotation_long_side=448))
    pipeline.__dict__["geometry_engine"] = Oracle(pipeline)
    return pipeline


def spoil_one(pipeline: Pipeline) -> str:
    """Double the depth of one finished clip, as a step that mixes its units up would."""
    path = sorted((pipeline.settings.data / "depth").rglob("*.npz"))[0]
    finished = load_arrays(path, FinishedClip)
    save_arrays(path, replace(finished, depth=(finished.depth * 2).astype(np.float16)))
    return path.stem


def test_finished_clips_are_judged_as_they_would_be_packed(pipeline: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    run_all(pipeline)
    assert main([str(pipeline.settings.data)]) == 0
    assert "2 clips: 2 passed" in capsys.readouterr().out
    verdicts, finished = audit_finished(pipeline, most=1)
    assert (len(verdicts), finished) == (1, 2)
    bad = spoil_one(pipeline)
    assert main([str(pipeline.settings.data), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["counts"] == {"refuse": 1, "pass": 1}
    assert "depth in another unit than the path" in said["clips"][bad]["message"]
    assert said["clips"][bad]["numbers"]["audit_depth_scale"] == pytest.approx(2, rel=0.02)


def test_the_geometry_step_sets_a_clip_aside_that_the_audit_refuses(pipeline: Pipeline) -> None:
    class Wrong(Oracle):
        def estimate(self, frames: np.ndarray, intrinsics: np.ndarray | None = None) -> ClipGeometry:
            found = super().estimate(frames, intrinsics)
            lens = found.intrinsics.copy()
            lens[:, [0, 1], [0, 1]] *= 1.3
            return replace(found, intrinsics=lens)

    pipeline.__dict__["geometry_engine"] = Wrong(pipeline)
    for key in pipeline.videos:
        pipeline.run("clips", key)
        for status in pipeline.run("geometry", key).clips:
            assert status.set_aside is not None
            assert "audit: geometry not true: focal length" in status.set_aside
            assert status.quality["audit_tracks"] > 0  # the numbers are kept, also and above all of what is refused


def test_a_sample_that_cannot_be_read_costs_that_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_layout(tmp_path / "guide", MadeSample("good"), MadeSample("broken"))
    next((tmp_path / "guide").rglob("*broken*.txt")).write_text("no numbers\n", encoding="utf-8")
    assert main([str(tmp_path / "guide"), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)["clips"]
    assert said["broken"]["judgement"] == "unreadable"
    assert said["good"]["judgement"] in ("pass", "unjudged")


def test_a_folder_without_geometry_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 1
    assert "neither a pipeline's data folder" in capsys.readouterr().err
    (tmp_path / "depth").mkdir()
    assert main([str(tmp_path), "--videos", str(tmp_path)]) == 1
    assert "no finished clip" in capsys.readouterr().err
