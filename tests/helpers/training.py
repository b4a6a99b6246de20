"""A preset that trains in seconds, and what tests of training ask of a run."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from fw_model.config import Preset, load_preset
from fw_model.train.metrics_log import read_metrics

SMALL = [
    *("clip.frames=5", "clip.short_side=32", "clip.long_side=48"),
    *("model.wan.dim=32", "model.wan.ffn_dim=32", "model.wan.num_heads=2", "model.wan.num_layers=4"),
    *("model.geometry.pcb_blocks=2", "model.geometry.head_layers=[1, 1, 2, 2]", "model.geometry.head_features=8"),
    *("model.geometry.head_channels=[4, 4, 8, 8]", "model.geometry.camera_dim=32", "model.geometry.cross_dim=24"),
    *("clip.size=32x48", "clip.frames=5"),
]


FAST = ["steps=6", "save_every=2", "validate_every=3", "log_every=1", "validation_clips=2", "trackers=[]", "warmup_steps=2"]


def small_preset(*overrides: str) -> Preset:
    fast = [f"{stage}.{item}" for stage in ("stage1", "stage2") for item in FAST]
    return load_preset("tiny", [*SMALL, *fast, *overrides])


def numbers(output: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without what a clock or a memory gauge measured."""
    measured = {"seconds", "data_seconds", "eta_seconds", "tokens_per_second", "memory_gib"}
    return [{k: v for k, v in line.items() if k not in measured} for line in read_metrics(output / "metrics.jsonl")]


def stop_at(step: int, number: int = signal.SIGTERM) -> Any:
    def listen(line: dict[str, float]) -> None:
        if line["step"] == step and "loss/total" in line:
            os.kill(os.getpid(), number)

    return listen


def no_model(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("a model was built")
