"""Worlds -> a table: each path against the model's own cameras and an independent estimate, with what guessing scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from fw_model.errors import BadFileError
from fw_model.evaluate.consistency import consistency
from fw_model.evaluate.estimators import Estimator
from fw_model.evaluate.obey import path_errors, random_path, still_path
from fw_model.export.reading import read_world
from fw_model.export.world import World

SHOWN = (
    "rot_err_per_frame",
    "trans_err_per_frame",
    "cam_mc_per_frame",
    "rot_err",
    "trans_err",
    "cam_mc",
    "rotation_degrees",
    "translation",
    "camera_score",
    "auc5",
    "auc30",
)


@dataclass
class Row:
    """One way of finding cameras, over all worlds."""

    name: str
    tried: int = 0
    numbers: list[dict[str, float]] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)  # world -> why

    def mean(self, key: str) -> float:
        """Over the worlds where it was found; nan where there is none."""
        found = [n[key] for n in self.numbers if math.isfinite(n.get(key, math.nan))]
        return fmean(found) if found else math.nan


@dataclass
class Result:
    rows: list[Row]
    consistency: dict[str, dict[str, float]]  # world -> its numbers
    unreadable: dict[str, str]  # folder -> why


def evaluate(
    folders: Sequence[Path],
    estimator: Estimator | None,
    floor: Sequence[Path] = (),
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Result:
    """
    Args:
        folders: saved worlds; one that cannot be read, or that nobody asked a path of, costs itself.
        estimator: finds cameras with the requested lens held; None: none.
        floor: saved worlds of real video with known cameras, for what the estimator itself has wrong.
    """
    own, independent = Row("the model's own cameras"), Row("independent estimate")
    still, guess, floor_row = Row("a camera that stands"), Row("a random guess"), Row("the estimator on known cameras")
    result = Result([], {}, {})
    for folder, known in progress([(f, False) for f in folders] + [(f, True) for f in floor]):
        try:
            world = read_world(folder)
        except BadFileError as error:
            result.unreadable[str(folder)] = str(error)
            continue
        name = str(folder)
        path = world.cameras if known else world.requested
        if path is None:
            result.unreadable[name] = f"{folder}: no path was asked for; as real video with known cameras give it to --floor"
            continue
        asked = path.w2c.double().numpy()
        if estimator is not None:
            _estimate(floor_row if known else independent, name, world, asked, path.intrinsics[0].double().numpy(), estimator)
        if known:
            continue
        for row, found in (
            (own, world.cameras.w2c.double().numpy()),
            (still, still_path(len(asked))),
            (guess, random_path(len(asked), asked)),
        ):
            row.tried += 1
            row.numbers.append(path_errors(asked, found).numbers())
        result.consistency[name] = consistency(world)
    result.rows = [row for row in (own, independent, floor_row, still, guess) if row.tried]
    return result


def _estimate(row: Row, name: str, world: World, asked: Any, lens: Any, estimator: Estimator) -> None:
    row.tried += 1
    try:
        row.numbers.append(path_errors(asked, estimator(world.video.numpy(), lens)).numbers())
    except ValueError as error:  # no cameras to be trusted: counted, never dropped
        row.failures[name] = str(error)


def as_text(result: Result) -> str:
    """Tables for people. Means are over what was found; how much was not stands before them."""
    head = ["cameras", "failed", *SHOWN]
    lines = [" | ".join(head), "|".join(["---"] * len(head))]
    for row in result.rows:
        mark = "*" if row.failures else ""
        numbers = [f"{row.mean(key):.4g}{mark}" for key in SHOWN]
        lines.append(" | ".join([row.name, f"{len(row.failures)} / {row.tried}", *numbers]))
    if any(row.failures for row in result.rows):
        lines.append("* mean over the worlds whose cameras were found; a failure is worse than any of them")
    for row in result.rows:
        lines += [f"no cameras ({row.name}): {name}: {why}" for name, why in row.failures.items()]
    for name, found in result.consistency.items():
        lines.append(f"{name}: " + ", ".join(f"{key} {value:.3g}" for key, value in found.items()))
    return "\n".join([*lines, *(f"left out: {why}" for why in result.unreadable.values())])


def as_json(result: Result) -> dict[str, Any]:
    """Plain values; what is not finite is None."""

    def plain(numbers: dict[str, float]) -> dict[str, float | None]:
        return {key: value if math.isfinite(value) else None for key, value in numbers.items()}

    rows = {
        row.name: {"tried": row.tried, "failed": len(row.failures), **plain({key: row.mean(key) for key in SHOWN})}
        for row in result.rows
    }
    worlds = {name: plain(numbers) for name, numbers in result.consistency.items()}
    return {"cameras": rows, "consistency": worlds, "left_out": len(result.unreadable)}
