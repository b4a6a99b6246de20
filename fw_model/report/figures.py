"""Pictures of geometry: depth strips and loss curves as PNG, point clouds, camera paths and loss curves as plotly figures.

Arrays are numpy. T frames, H x W pixels; depth and points are in clip units, world = first camera, w2c has OpenCV axes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import plotly.graph_objects as go
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from plotly.subplots import make_subplots

from fw_model.metrics import Array, Sim3, align_sim3, camera_centres
from fw_model.train.metrics_log import read_metrics

COLORMAP = "turbo"
_CURVES = ("_loss", "total")
TRUTH_COLOR, PREDICTION_COLOR = "#1f2937", "#e8590c"
_UNKNOWN = (222, 226, 230)  # pixels without a value
_MAX_THUMBNAIL = 60_000
_FRUSTUM = np.array([[-1, -0.6, 1.6], [1, -0.6, 1.6], [1, 0.6, 1.6], [-1, 0.6, 1.6]])  # image corners seen from the camera
_FRUSTUM_LINE = (0, 1, 2, 3, 4, 1, None, 0, 2, None, 0, 3, None, 0, 4)  # 0 is the camera's centre


# ----------------------------------------------------------------------------------------------------------- PNG


def depth_range(depth: Array, valid: Array) -> tuple[float, float]:
    """2nd and 98th percentile of the valid depths, a range of colours that outliers do not stretch; (0, 1) if none is valid."""
    values = np.asarray(depth)[np.asarray(valid, bool)]
    if not values.size:
        return 0.0, 1.0
    low, high = (float(x) for x in np.percentile(values, (2, 98)))
    return low, max(high, low + 1e-6)


def colourise(values: Array, low: float, high: float, valid: Array | None = None, colormap: str = COLORMAP) -> Array:
    """values [..., H, W] -> uint8 RGB [..., H, W, 3], `low` and `high` at the ends of the map; invalid pixels are grey."""
    scaled = np.clip((np.asarray(values, np.float64) - low) / (high - low), 0, 1)
    rgb = (matplotlib.colormaps[colormap](np.nan_to_num(scaled))[..., :3] * 255).round().astype(np.uint8)
    known = np.isfinite(values) if valid is None else np.isfinite(values) & valid
    rgb[~known] = _UNKNOWN
    return rgb


def colour_stops(count: int = 12, colormap: str = COLORMAP) -> list[str]:
    """`count` colours along the map as #rrggbb, for a colour bar."""
    return [matplotlib.colors.to_hex(matplotlib.colormaps[colormap](i / (count - 1))) for i in range(count)]


def pick_frames(count: int, wanted: int) -> list[int]:
    """Up to `wanted` frame indices spread over `count` frames, first and last included."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(wanted, count))})


def strip_png(frames: Array, width: int = 180, colors: int | None = None) -> bytes:
    """RGB frames [N, H, W, 3] side by side, each `width` pixels wide, as PNG; `colors` limits the palette."""
    height = max(1, round(frames.shape[1] * width / frames.shape[2]))
    gap = 3
    sheet = Image.new("RGB", (len(frames) * (width + gap) - gap, height), "white")
    for i, frame in enumerate(frames):
        sheet.paste(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC), (i * (width + gap), 0))
    return _png(sheet, colors)


def thumbnail_png(target: Array, predicted: Array, valid: Array, title: str = "") -> bytes:
    """True depth over predicted depth at a few frames, one colour range, below 60 kB.

    target, predicted [T, H, W]; valid [T, H, W] bool, applied to the truth alone.
    """
    low, high = depth_range(target, valid)
    frames = pick_frames(len(target), 5)
    rows = [colourise(target[frames], low, high, valid[frames]), colourise(predicted[frames], low, high)]
    for width in (132, 100, 72, 48):
        strips = [Image.open(io.BytesIO(strip_png(row, width))) for row in rows]
        margin = 14
        sheet = Image.new("RGB", (strips[0].width, margin + sum(s.height + margin for s in strips)), "white")
        draw, y = ImageDraw.Draw(sheet), 0
        labels = (f"{title}  depth: truth  ({low:.2f} .. {high:.2f} clip units)".strip(), "prediction")
        for strip, label in zip(strips, labels, strict=True):
            draw.text((2, y + 1), label, fill=TRUTH_COLOR)
            sheet.paste(strip, (0, y + margin))
            y += strip.height + margin
        for colors in (200, 64):
            data = _png(sheet, colors)
            if len(data) < _MAX_THUMBNAIL:
                return data
    return data


def loss_curve_png(metrics: Path) -> bytes:
    """Training and validation losses of a `metrics.jsonl` over the steps, one panel per loss, as a PNG below 100 kB."""
    curves = loss_curves(metrics)
    figure = Figure(figsize=(3.1 * max(1, len(curves)), 2.6), dpi=80, layout="constrained")
    for axes, (name, (train, val)) in zip(np.atleast_1d(figure.subplots(1, max(1, len(curves)))), curves.items(), strict=False):
        axes.plot(*zip(*train, strict=True), color="#adb5bd", linewidth=1.2, label="train") if train else None
        axes.plot(*zip(*val, strict=True), color=PREDICTION_COLOR, marker="o", markersize=3, label="validation") if val else None
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.set_xlabel("step", fontsize=7)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return _png(Image.open(buffer).convert("RGB"), colors=64)


def loss_curves(metrics: Path) -> dict[str, tuple[list[tuple[float, float]], list[tuple[float, float]]]]:
    """Loss name -> (training points, validation points), each (step, value), in the order the names are logged.

    Of the losses that are minimised; what they are made of, and validation's single bands, stay in the file.
    """
    curves: dict[str, tuple[list[tuple[float, float]], list[tuple[float, float]]]] = {}
    for line in read_metrics(metrics):
        for key, value in line.items():
            kind, _, name = key.partition("/")
            if kind in ("loss", "val") and name.endswith(_CURVES) and "/" not in name and math.isfinite(value):
                curves.setdefault(name, ([], []))[kind == "val"].append((line["step"], value))
    return curves


def _png(image: Image.Image, colors: int | None = None) -> bytes:
    buffer = io.BytesIO()
    if colors:
        image = image.quantize(colors, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


# --------------------------------------------------------------------------------------------------------- plotly


def loss_figure(metrics: Path) -> go.Figure:
    """Interactive loss curves, one panel per loss."""
    curves = loss_curves(metrics)
    figure = make_subplots(rows=1, cols=max(1, len(curves)), subplot_titles=list(curves), horizontal_spacing=0.05)
    for col, (train, val) in enumerate(curves.values(), start=1):
        for name, points, style in (
            ("train", train, {"mode": "lines", "line": {"color": "#adb5bd", "width": 1.5}}),
            ("validation", val, {"mode": "lines+markers", "line": {"color": PREDICTION_COLOR, "width": 2}}),
        ):
            x, y = (list(axis) for axis in zip(*points, strict=True)) if points else ([], [])
            figure.add_trace(go.Scatter(x=x, y=y, name=name, legendgroup=name, showlegend=col == 1, **style), row=1, col=col)
    figure.update_xaxes(title_text="step")
    figure.update_yaxes(rangemode="tozero")
    return _styled(figure, height=300).update_layout(margin_t=64, legend_y=1.14)


def calibration_figure(curve: Array) -> go.Figure:
    """Relative depth error [10] by decile of confidence, least confident first; a straight fall is what it should be."""
    deciles = [f"{10 * i}–{10 * (i + 1)} %" for i in range(len(curve))]
    figure = go.Figure(go.Bar(x=deciles, y=np.asarray(curve, np.float64), marker_color=PREDICTION_COLOR))
    figure.update_xaxes(title_text="confidence of depth, by rank")
    figure.update_yaxes(title_text="mean relative error", rangemode="tozero")
    return _styled(figure, height=260)


def points_figure(target: Array, predicted: Array, valid: Array, count: int = 4000, seed: int = 0) -> go.Figure:
    """True and predicted points side by side: the same `count` pixels of the clip, coloured by their true distance.

    target, predicted [T, H, W, 3]; valid [T, H, W]. Only valid pixels are drawn; both scenes get the truth's extent.
    """
    index = np.flatnonzero(valid)
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(index, min(count, len(index)), replace=False)) if len(index) else index
    truth, guess = (np.asarray(p, np.float32).reshape(-1, 3)[chosen] for p in (target, predicted))
    color = np.linalg.norm(truth, axis=1)
    low, high = (float(x) for x in np.percentile(color, (2, 98))) if len(color) else (0.0, 1.0)
    figure = make_subplots(
        rows=1, cols=2, specs=[[{"type": "scene"}] * 2], subplot_titles=["truth", "prediction"], horizontal_spacing=0.01
    )
    for col, cloud in enumerate((truth, guess), start=1):
        marker = {"size": 1.7, "color": color.astype(np.float32), "colorscale": colour_stops(), "cmin": low, "cmax": high}
        x, y, z = np.ascontiguousarray(cloud.T)
        figure.add_trace(
            go.Scatter3d(x=x, y=y, z=z, mode="markers", marker=marker, hoverinfo="skip", showlegend=False), row=1, col=col
        )
    figure.update_scenes(**_scene(truth))
    return _styled(figure, height=430)


def path_figure(w2c_true: Array, w2c_predicted: Array) -> go.Figure:
    """Camera paths with frusta: the truth, and the prediction after the Sim(3) that fits its centres to the truth.

    w2c_true, w2c_predicted [T, 3, 4].
    """
    true, predicted = camera_centres(w2c_true), camera_centres(w2c_predicted)
    fit = align_sim3(predicted, true)
    size = 0.07 * max(float(np.linalg.norm(np.ptp(true, axis=0))), 1e-3)
    identity = Sim3(1.0, np.eye(3), np.zeros(3))
    figure = go.Figure()
    for name, w2c, transform, color in (
        ("truth", w2c_true, identity, TRUTH_COLOR),
        ("prediction, aligned", w2c_predicted, fit, PREDICTION_COLOR),
    ):
        for points, label, width, shown in (
            (transform.apply(camera_centres(w2c)), name, 4, True),
            (_frusta(w2c, transform, size, pick_frames(len(w2c), 7)), name, 2, False),
        ):
            x, y, z = np.asarray(points, np.float32).T
            line = {"color": color, "width": width}
            figure.add_trace(
                go.Scatter3d(
                    x=x, y=y, z=z, mode="lines", line=line, name=label, legendgroup=name, showlegend=shown, hoverinfo="skip"
                )
            )
    figure.update_scenes(**_scene(np.concatenate([true, fit.apply(predicted)]), margin=2.5 * size))
    return _styled(figure, height=430)


def _frusta(w2c: Array, transform: Sim3, size: float, frames: Sequence[int]) -> Array:
    """Polyline [N, 3] of camera pyramids, NaN between strokes."""
    centres = transform.apply(camera_centres(w2c))
    strokes: list[Array] = []
    for t in frames:
        corners = size * _FRUSTUM @ np.asarray(w2c[t, :, :3], np.float64) @ transform.rotation.T + centres[t]
        vertices = np.concatenate([centres[t][None], corners])
        strokes += [np.full(3, np.nan) if k is None else vertices[k] for k in (*_FRUSTUM_LINE, None)]
    return np.stack(strokes)


def _scene(points: Array, margin: float = 0.0) -> dict[str, object]:
    """A 3-D scene in true proportions around points [N, 3], seen from behind the first camera (x right, y down, z forward)."""
    known = points[np.isfinite(points).all(axis=1)] if len(points) else np.zeros((1, 3))
    low, high = (np.percentile(known, (1, 99), axis=0)) if len(known) > 100 else (known.min(0), known.max(0))
    room = 0.05 * float((high - low).max()) + margin + 1e-6
    axes = {
        f"{name}axis": {"range": [float(low[i] - room), float(high[i] + room)], "title": {"text": name}, "showbackground": False,
                        "gridcolor": "#dee2e6", "tickfont": {"size": 9}}
        for i, name in enumerate("xyz")
    }  # fmt: skip
    camera = {"up": {"x": 0, "y": -1, "z": 0}, "eye": {"x": 0.7, "y": -0.7, "z": -1.7}}
    return {"aspectmode": "data", "camera": camera, **axes}


def _styled(figure: go.Figure, height: int) -> go.Figure:
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 40, "r": 10, "t": 40, "b": 30},
        font={"family": "system-ui, sans-serif", "size": 11},
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"},
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": "#adb5bd", "activecolor": "#495057"},
        paper_bgcolor="rgba(0,0,0,0)",
    )
    return figure
