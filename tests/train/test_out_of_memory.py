"""A GPU that is too small ends a run with one line: where, what was tried, the mildest thing that is left to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fw_model.config import load_preset
from fw_model.train import __main__ as command_line
from fw_model.train import loop
from fw_model.train.out_of_memory import remedy
from tests.helpers.training import FAST, SMALL

REAL = "wan2.1-fun-1.3b"


def test_out_of_memory_in_a_step_is_one_line_with_the_remedy_and_the_plans_command(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ...")

    monkeypatch.setattr(loop, "predict", full)
    small = [*SMALL, *(f"stage1.{item}" for item in FAST), "stage1.global_batch=4", "stage1.batch_per_device=4"]
    common = ["--preset", "tiny", "--stage", "stage1", "--dataset", str(dataset), "--output", str(tmp_path)]
    assert command_line.main([*common, *small]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    assert line.startswith("error: out of memory on ")
    assert "stage1, 4 clip(s) a micro-batch of 5x32x48 (CUDA out of memory)" in line
    assert "with stage1.batch_per_device=2. What fits: python -m fw_model.describe --preset tiny" in line
    assert line.endswith("--gpus 1")
    assert "Traceback" not in line


@pytest.mark.parametrize(
    ("overrides", "processes", "expected"),
    [
        (["stage1.batch_per_device=8"], 8, "stage1.batch_per_device=4"),
        (["stage1.batch_per_device=8", "stage1.global_batch=24"], 3, "stage1.batch_per_device=4"),
        (["stage1.gradient_checkpointing=false"], 1, "stage1.gradient_checkpointing=true"),
        ([], 8, "stage1.sharding=fsdp"),
        ([], 1, "stage1.offload_optimizer=true"),
        (["stage1.sharding=fsdp"], 8, "clip.frames=41"),
        (["stage1.offload_optimizer=true"], 1, "clip.frames=41"),
        (["stage1.offload_optimizer=true", "clip.frames=41"], 1, "GPUs with more memory"),
    ],
)
def test_remedy_is_the_mildest_that_is_left_and_a_preset_takes_it(overrides: list[str], processes: int, expected: str) -> None:
    said = remedy(load_preset(REAL, overrides), "stage1", processes)
    assert expected in said
    if said.startswith("Same result"):
        load_preset(REAL, [*overrides, said.rpartition(" ")[2]])
