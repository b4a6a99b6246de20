"""Worlds while training: alike every time, in the folder, the trackers and the report; training is untouched."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from fw_model.config import Preset, load_preset
from fw_model.export.save import is_saved
from fw_model.report.predict import write_report
from fw_model.train import loop as train
from fw_model.train.samples import newest_sheets, samples_folder
from tests.helpers.made_scenes import pack_scenes
from tests.helpers.training import FAST, small_preset, stop_at

SAMPLING = (
    "sample_every=2",
    "sample_clips=1",
    "sample_steps=2",
    "steps=4",
    "save_every=2",
    "ema_decay=0.5",
    'trackers=["tensorboard"]',
)


def preset(*items: str) -> Preset:
    return small_preset(*(f"stage2.{item}" for item in items), "stage1.steps=2")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dataset and a stage 1 checkpoint."""
    folder = tmp_path_factory.mktemp("start")
    dataset = pack_scenes(folder / "dataset", preset())
    train.train(preset(), "stage1", dataset, folder / "stage1")
    return dataset, folder / "stage1" / "step-2.safetensors"


def files(output: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(output)): path.read_bytes() for path in sorted((output / "samples").rglob("*")) if path.is_file()
    }


def test_samples_are_alike_after_a_resume_and_change_no_weight(start: tuple[Path, Path], tmp_path: Path) -> None:
    dataset, stage1 = start
    train.train(preset(*SAMPLING), "stage2", dataset, tmp_path / "a", stage1)
    step, sheets = newest_sheets(tmp_path / "a")
    assert step == 4
    (clip,) = sheets
    assert is_saved(samples_folder(tmp_path / "a", 2) / clip)
    with pytest.raises(train.Interrupted):
        train.train(preset(*SAMPLING), "stage2", dataset, tmp_path / "b", stage1, stop_at(1))
    train.train(preset(*SAMPLING), "stage2", dataset, tmp_path / "b", stage1)
    one, two = files(tmp_path / "a"), files(tmp_path / "b")
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []
    without = tuple(item for item in SAMPLING if not item.startswith("sample"))
    train.train(preset(*without), "stage2", dataset, tmp_path / "c", stage1)
    with_samples, plain = (load_file(tmp_path / run / "step-4.safetensors") for run in "ac")
    assert all((with_samples[name] == plain[name]).all() for name in plain)
    assert newest_sheets(tmp_path / "c") == (0, {})
    write_report(tmp_path / "a", dataset, tmp_path / "report.html", clips=1)
    assert "Generated at step 4" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert any("samples" in path.read_bytes().decode("latin1") for path in (tmp_path / "a" / "trackers").rglob("*tfevents*"))


def test_the_real_preset_samples_and_tiny_does_not() -> None:
    assert load_preset("wan2.1-fun-1.3b").stage2.sample_every == 1000
    assert load_preset("tiny").stage2.sample_every is None
    assert FAST
