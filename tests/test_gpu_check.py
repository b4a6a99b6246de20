"""The GPU check tells what it found as it finds it: whatever fails, hangs or is cut off, the rest is still said."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import gpu_check


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of Python: `agree` measures, `stage1` measures and fails, `stage2` measures and hangs."""
    script = tmp_path / "python"
    script.write_text(
        "#!/bin/bash\n"
        """echo 'a line that is no result'; echo 'RESULT {"what": "default", "seconds": 2.0, "tokens_per_second": 5}'\n"""
        """case $3 in stage1) echo "Traceback" >&2; echo "RuntimeError: broken" >&2; exit 1;; stage2) exec sleep 60;; esac\n"""
    )
    script.chmod(0o755)
    monkeypatch.setattr(gpu_check.sys, "executable", str(script))
    monkeypatch.setitem(gpu_check.LIMITS, "stage2", 5)


def test_what_fails_or_hangs_is_named_and_the_other_parts_go_on(
    stand_in: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log.jsonl"
    started = time.monotonic()
    code = gpu_check.main(["--cpu", "--parts", "stage1", "stage2", "agree", "--json", str(log)])
    assert time.monotonic() - started < 30
    assert code == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[-1]["failed"] == ["stage1", "stage2"]
    assert [json.loads(line) for line in log.read_text().splitlines()] == lines[:-1]
    said = {part: [line for line in lines[:-1] if line["part"] == part] for part in ("stage1", "stage2", "agree")}
    assert all(of_part[0]["seconds"] == 2.0 for of_part in said.values())
    assert said["stage1"][1]["error"].endswith("RuntimeError: broken")
    assert said["stage2"][1]["error"] == "stopped after 5 s"
    assert "part_seconds" in said["agree"][1]


def test_parts_for_which_no_time_is_left_are_named(stand_in: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--cpu", "--parts", "agree", "save", "--seconds", "0"]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["part"], line["error"]) for line in lines[:-1]] == [
        (part, "no time was left for it; raise --seconds") for part in ("agree", "save")
    ]


def test_mfu_is_of_the_card_that_ran_and_of_timed_steps_alone() -> None:
    result: dict[str, Any] = {
        "environment": [{"device": "NVIDIA H200"}],
        "plan": [{"stage": "stage1", "tflops": 989.0}],
        "stage1": [{"what": "build", "seconds": 1.0}, {"what": "default", "seconds": 4.0, "tokens_per_second": 1}],
    }
    assert gpu_check.utilisation(result) == [{"stage": "stage1", "what": "default", "mfu": 0.25}]
    result["environment"] = [{"device": "Some other card"}]
    assert gpu_check.utilisation(result) == []


def test_the_card_is_asked_what_it_is_before_anything_else() -> None:
    """`python benchmarks/gpu_check.py --cpu` runs every part for real, in some minutes."""
    assert next(iter(gpu_check.PARTS)) == "environment"
    assert next(gpu_check.PARTS["environment"](True))["device"] == "cpu"
