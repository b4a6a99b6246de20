"""The proof that training can learn: it learns from the exact truth, measures what was written, and its exit code is honest."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fw_model.config import Preset, load_preset
from fw_model.data.dataset import ClipDataset
from fw_pipeline.annotate.truth import load_ground_truth
from fw_pipeline.demo import overfit
from fw_pipeline.demo.scenes import SHOTS, VideoPlan
from tests.helpers.training import SMALL

SHORT = VideoPlan("short", (replace(SHOTS[0].shots[0], frames=9, height=96, width=160),))


@pytest.fixture(scope="module")
def preset() -> Preset:
    size = ["clip.frames=5", "clip.stride=5", "clip.short_side=32", "clip.long_side=48"]
    return load_preset("tiny", [*overfit.OVERRIDES, *SMALL, *size, "stage1.steps=3", "stage1.warmup_steps=0"])


@pytest.fixture(scope="module")
def run(preset: Preset, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("overfit")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overfit, "DRAWS", 2)
        yield folder, overfit.overfit(folder, preset, SHORT)


def test_the_clip_it_learns_is_the_exact_truth(run: tuple[Path, dict[str, Any]], preset: Preset) -> None:
    folder, found = run
    clips = ClipDataset(folder / "dataset", "train", preset.model.wan.text_len)
    (row,) = clips.rows
    truth = load_ground_truth(folder / "videos" / "short.mp4")
    assert truth is not None
    assert row.clip_id == found["clip"]
    clip = clips[0]
    assert bool((clip["depth"] > 0).all())
    # 96 x 160 becomes 32 x 53.3, of which the middle 48 columns stay; every second frame, for 24 fps become 12
    rows, columns = (np.arange(32) + 0.5) * 3, (np.arange(48) + 0.5 + (160 / 3 - 48) / 2) * 3
    expected = truth.depth[::2][:, rows.astype(int)[:, None], columns.astype(int)] / row.scale
    assert (np.abs(clip["depth"].numpy() / expected - 1) < 0.02).mean() > 0.95  # edges are sampled on one side or the other
    poses = np.tile(np.eye(4), (len(truth.w2c), 1, 1))
    poses[:, :3] = truth.w2c
    moved = (poses @ np.linalg.inv(poses[0]))[::2, :3, 3] / row.scale
    assert np.allclose(clip["w2c"][:, :, 3], moved, atol=1e-5)


def test_it_measures_the_checkpoint_that_training_wrote(run: tuple[Path, dict[str, Any]], preset: Preset) -> None:
    folder, found = run
    again = overfit.measure(preset, folder / "dataset", folder / "stage1" / "step-3.safetensors")
    assert again == {name: found[name] for name in again}
    assert found["total"] != found["before"]["total"]
    assert overfit.measure(preset, folder / "dataset", None) == found["before"]


@pytest.mark.parametrize(
    ("depth", "camera", "code"), [(0.05, 0.004, 0), (0.15, 0.004, 1), (0.05, 0.009, 1), (float("nan"), 0.004, 1)]
)
def test_exit_code_says_whether_every_loss_got_there(
    depth: float, camera: float, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {"depth_error": 0.21, "point_loss": 2.0, "camera_loss": 0.016}
    found = {"depth_error": depth, "point_loss": 0.3, "camera_loss": camera, "before": before}
    monkeypatch.setattr(overfit, "overfit", lambda folder, preset: found)
    assert overfit.main([]) == code
    out, err = capsys.readouterr()
    line = json.loads(out.splitlines()[-1])
    assert line["ok"] == (code == 0)
    assert {"depth_error", "point_loss", "camera_loss"} <= set(line)
    assert bool(err) == (code == 1)
