"""The HTML of a report: one file, everything inside, no network. Its looks are `page.html.j2`, beside this file."""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from fw_model.metrics import Array
from fw_model.report.evaluation import Evaluation
from fw_model.report.figures import (
    calibration_figure,
    colour_stops,
    colourise,
    depth_range,
    loss_figure,
    path_figure,
    pick_frames,
    points_figure,
    strip_png,
)
from fw_model.train.checkpoints import CheckpointMetadata
from fw_model.train.objective import LOSS_NAMES, TARGETS

_FRAMES = 6
_ERROR_MAP = "magma"
_ERROR_LIMIT = 0.5  # relative error at the end of the colours; the page says 50 %


class _Column(NamedTuple):
    name: str
    arrow: str  # which way is better
    explanation: str
    digits: int


_CASES = {  # by what stands in the names of `validation.validate`
    "given": "the clip's camera given to the base",
    "withheld": "no camera given",
    "other": "another clip's camera given",
}
_COLUMNS = {  # by metric
    "absrel": _Column("AbsRel", " ↓", "mean |s·p − d| / d over valid pixels, one scale s per clip", 3),
    "delta125": _Column("δ < 1.25", " ↑", "share of valid pixels within 25 %, one scale per clip", 3),
    "depth_scale": _Column("scale", "", "the s that fits predicted depth to the truth; 1 is right", 3),
    "ate": _Column("ATE", " ↓", "RMS distance of camera centres after Sim(3), as a share of the true path's extent", 3),
    "auc30": _Column("AUC@30", " ↑", "mean over 1..30° of the share of frame pairs whose pose error is below", 3),
}

_MORE = {  # by metric; of the bands' table alone
    "rotation_degrees": _Column("rotation", " ↓", "mean angle between predicted and true relative rotations, degrees", 2),
    "direction_degrees": _Column("direction", " ↓", "mean angle between relative translations, degrees; 90 is chance", 1),
    "rpe": _Column("RPE", " ↓", "RMS step error as a share of the true path's extent", 3),
    "rpe_degrees": _Column("RPE rotation", " ↓", "RMS of a step's rotation error, degrees", 2),
    "rra15": _Column("RRA@15", " ↑", "share of frame pairs whose rotation error is below 15°", 3),
    "rta15": _Column("RTA@15", " ↑", "share of frame pairs whose direction error is below 15°", 3),
    "point_error": _Column("points", " ↓", "mean distance of points, clip units", 3),
    "point_ratio": _Column("points, relative", " ↓", "mean |s·P − G| / |G|, one scale per clip", 3),
    "agreement": _Column("agreement", " ↑", "share of pixels at which depth, points and cameras agree within 5 %", 3),
    "fov_degrees": _Column("lens", " ↓", "mean error of the field of view, degrees", 2),
    "flicker": _Column("flicker", " ↓", "mean relative change of depth from frame to frame that is not the scene's", 4),
}


def page(data: ReportData) -> str:
    """The report as one HTML document. Whatever comes from a dataset or a run is escaped."""
    metadata = data.metadata
    figures = {"losses": loss_figure(data.metrics)}
    if data.evaluation.calibration is not None:
        figures["calibration"] = calibration_figure(data.evaluation.calibration)
    for number, clip in enumerate(data.clips):
        figures[f"points-{number}"] = points_figure(clip.points, clip.predicted_points, clip.valid)
        figures[f"path-{number}"] = path_figure(clip.w2c, clip.predicted_w2c)
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return pages.get_template("page.html.j2").render(
        title=f"FantasyWorld {metadata.stage.replace('stage', 'stage ')} · step {metadata.step}",
        facts=_facts(data),
        split=data.split,
        timestep=data.timestep,
        losses=_losses(data),
        camera_cases=_camera_cases(data),
        columns=list(_COLUMNS.values()),
        bands=_bands(data.evaluation),
        paths=_paths(data.evaluation),
        rank_correlation=data.evaluation.rank_correlation,
        clips=[_clip(clip) for clip in data.clips],
        means=_cells(_means(data.clips)),
        depth_stops=colour_stops(),
        error_stops=colour_stops(colormap=_ERROR_MAP),
        samples={name: _jpeg(picture) for name, picture in data.samples.items()},
        sample_step=data.sample_step,
        figures={name: _json(figure) for name, figure in figures.items()},
        plotly=Markup(get_plotlyjs()),
    )


def _jpeg(data: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(data).decode("ascii")


def _facts(data: ReportData) -> dict[str, str]:
    metadata = data.metadata
    return {
        "checkpoint": data.checkpoint.name,
        "preset": metadata.preset.name,
        "base": metadata.base,
        "configuration": metadata.config_digest,
        "trained on dataset": metadata.dataset_digest,
        "shown dataset": "the same" if data.dataset_digest == metadata.dataset_digest else data.dataset_digest,
        "training time": "not complete" if data.seconds is None else _duration(data.seconds),
    }


def _losses(data: ReportData) -> list[dict[str, Any]] | None:
    """Validation losses before and after, each with a constant's and the guide's target where there is one.

    A target is met only by a model that beats the constant. None while a run is not complete.
    """
    if data.validation is None:
        return None
    before, after = data.validation["before"], data.validation["after"]
    return [
        {
            "name": name,
            "before": before[name],
            "after": after[name],
            "constant": after.get(f"constant/{name}"),
            "target": TARGETS.get(name),
            "met": name in TARGETS and after[name] < min(TARGETS[name], after[f"constant/{name}"]),
        }
        for name in LOSS_NAMES[data.metadata.stage]
    ]


def _camera_cases(data: ReportData) -> list[dict[str, Any]] | None:
    """What the cameras are worth with the true one given to the base, withheld, and another clip's; after training."""
    if data.validation is None:
        return None
    after = data.validation["after"]
    gap = after["camera_withheld/degrees"] - after["camera_given/degrees"]
    cases = [(words, f"camera_{case}/loss", f"camera_{case}/degrees") for case, words in _CASES.items()]
    cases.append(("a camera that stands still", "constant/camera_loss", "constant/degrees"))
    rows = [{"name": words, "loss": after[loss], "degrees": after[turn]} for words, loss, turn in cases if loss in after]
    return [*rows, {"name": "gap between given and withheld", "loss": None, "degrees": gap}]


def _bands(evaluation: Evaluation) -> dict[str, Any]:
    """Means of every number by band of noise: its name, how it is read, a value per band."""
    found = evaluation.band_means()
    rows = [
        {"name": column.name + column.arrow, "values": [_number(values.get(key), column.digits) for values in found.values()]}
        for key, column in {**_COLUMNS, **_MORE}.items()
    ]
    return {"names": list(found), "rows": rows}


def _paths(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Camera numbers by what the base was told, a still camera's last."""
    wanted = ("rotation_degrees", "direction_degrees", "ate", "auc30")
    names = {**_CASES, "constant": "a camera that stands still"}
    return [
        {"name": names[case], "values": [_number(found.get(key), {**_COLUMNS, **_MORE}[key].digits) for key in wanted]}
        for case, found in evaluation.cameras.items()
    ]


def _number(value: float | None, digits: int) -> str | None:
    return None if value is None else f"{value:.{digits}f}"


def _means(clips: list[ClipResult]) -> dict[str, float]:
    """Of every metric over the clips where it is defined; NaN where it is nowhere."""
    values = {name: [clip.numbers[name] for clip in clips if math.isfinite(clip.numbers[name])] for name in _COLUMNS}
    return {name: sum(found) / len(found) if found else math.nan for name, found in values.items()}


def _cells(numbers: dict[str, float]) -> list[str | None]:
    """A row of the table of metrics; None where a number is undefined."""
    return [f"{numbers[name]:.{column.digits}f}" if math.isfinite(numbers[name]) else None for name, column in _COLUMNS.items()]


def _clip(clip: ClipResult) -> dict[str, Any]:
    """What the page shows of a clip beside its figures."""
    low, high = depth_range(clip.depth, clip.valid)
    frames = pick_frames(len(clip.depth), _FRAMES)
    target, predicted, valid = clip.depth[frames], clip.predicted_depth[frames], clip.valid[frames]
    error = np.abs(predicted - target) / np.where(valid, target, 1)
    rows = {
        "truth": colourise(target, low, high, valid),
        "prediction": colourise(predicted, low, high),
        "relative error": colourise(error, 0, _ERROR_LIMIT, valid, _ERROR_MAP),
    }
    return {
        "name": clip.clip_id,
        "cells": _cells(clip.numbers),
        "strips": {name: _data_uri(strip_png(rgb)) for name, rgb in rows.items()},
        "low": low,
        "high": high,
        "shown": frames,
        "frames": len(clip.depth),
    }


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _json(figure: go.Figure) -> Markup:
    # "<" cannot end the script element when it is written as an escape
    return Markup(figure.to_json().replace("<", "\\u003c"))


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


@dataclass(frozen=True)
class ClipResult:
    """One clip, as it is and as predicted. T frames of H x W."""

    clip_id: str
    depth: Array  # [T, H, W] clip units
    valid: Array  # [T, H, W] bool
    points: Array  # [T, H, W, 3]
    w2c: Array  # [T, 3, 4]
    predicted_depth: Array
    predicted_points: Array
    predicted_w2c: Array
    numbers: dict[str, float]  # see `predict.all_numbers`; NaN where undefined
    bucket: str  # "HxWxT"
    calibration: tuple[Array, float]  # see `metrics.calibration`


@dataclass(frozen=True)
class ReportData:
    """All that the page shows."""

    metadata: CheckpointMetadata
    checkpoint: Path
    metrics: Path
    dataset: str | Path
    dataset_digest: str
    split: str  # of the clips shown
    timestep: float
    validation: dict[str, dict[str, float]] | None  # "before" and "after"; None while the run is not complete
    seconds: float | None
    clips: list[ClipResult]
    evaluation: Evaluation
    samples: dict[str, bytes] = field(default_factory=dict)  # clip -> JPEG of what was generated while training
    sample_step: int = 0  # at which step
