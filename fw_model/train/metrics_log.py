"""`metrics.jsonl`: one JSON object a line, what the loss curves, the report and the pipeline's plots are drawn from.

Training lines carry the mean since the line before; validation lines have keys that start with `val/`. A resumed run
first drops the lines after its state, so that no step is written twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path

from fw_model.errors import BadFileError
from fw_model.files import write_text

OnMetrics = Callable[[dict[str, float]], None]


class MetricsLog:
    """Appends lines to `metrics.jsonl` and passes each on to `listeners`."""

    def __init__(self, path: Path, keep_until: int, listeners: list[OnMetrics]) -> None:
        """Open the file, keeping the lines whose step is at most `keep_until` (-1: none)."""
        kept = [line for line in read_metrics(path) if line["step"] <= keep_until]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.path = path
        self.listeners = listeners

    def write(self, step: int, values: Mapping[str, float]) -> None:
        line = {"step": step, **values}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        for listener in self.listeners:
            listener(line)


def in_words(values: Mapping[str, float]) -> str:
    """Numbers as a log line; what is left of the run as hours, minutes and seconds."""
    words = [f"{name.removeprefix('loss/')} {value:.4g}" for name, value in values.items() if name != "eta_seconds"]
    if "eta_seconds" in values:
        words.append(f"eta {timedelta(seconds=round(values['eta_seconds']))}")
    return " ".join(words)


class RunningMean:
    """Means of named numbers since they were last taken. Its `state` survives a restart exactly."""

    def __init__(self, state: Mapping[str, list[float]] | None = None) -> None:
        self._sums = {name: (float(total), int(count)) for name, (total, count) in (state or {}).items()}

    def add(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = total + value, count + 1

    def take(self) -> dict[str, float]:
        """The means, in the order the names first came; empties itself."""
        means = {name: total / count for name, (total, count) in self._sums.items()}
        self._sums = {}
        return means

    @property
    def state(self) -> dict[str, list[float]]:
        """JSON-able."""
        return {name: [total, count] for name, (total, count) in self._sums.items()}


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics file, oldest first; none if there is no file.

    A last line that a killed run left unfinished is dropped. Raises ValueError naming any other line that is not JSON.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    metrics = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            metrics.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):  # no newline after it
                break
            raise BadFileError(f"{path}:{number}: not a JSON line ({error})") from error
    return metrics
