"""The HTML of a report: one file, everything inside, no network."""

from __future__ import annotations

import base64
import html
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from fw_model.metrics import Array
from fw_model.report.figures import (
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
from fw_model.train.objective import TARGETS

_FRAMES = 6
_ERROR_MAP = "magma"
_COLUMNS = {  # metric -> (heading, explanation, digits)
    "absrel": ("AbsRel ↓", "mean |s·p − d| / d over valid pixels, one scale s per clip", 3),
    "delta125": ("δ < 1.25 ↑", "share of valid pixels within 25 %, one scale per clip", 3),
    "depth_scale": ("scale", "the s that fits predicted depth to the truth; 1 is right", 3),
    "ate": ("ATE ↓", "RMS distance of camera centres after Sim(3), as a share of the true path's extent", 3),
    "auc30": ("AUC@30 ↑", "mean over 1..30° of the share of frame pairs whose pose error is below", 3),
}


def page(data: ReportData) -> str:
    """The report as one HTML document."""
    metadata = data.metadata
    title = f"FantasyWorld {metadata.stage.replace('stage', 'stage ')} · step {metadata.step}"
    figures = {"losses": loss_figure(data.metrics)}
    sections = [_header(data, title), _losses(data), _clip_table(data)]
    for number, clip in enumerate(data.clips):
        figures[f"points-{number}"] = points_figure(clip.points, clip.predicted_points, clip.valid)
        figures[f"path-{number}"] = path_figure(clip.w2c, clip.predicted_w2c)
        sections.append(_clip(clip, number))
    return _DOCUMENT.format(
        title=html.escape(title),
        style=_STYLE,
        body="\n".join(sections),
        figures="\n".join(_figure_json(name, figure) for name, figure in figures.items()),
        plotly=get_plotlyjs(),
        script=_SCRIPT,
    )


def _header(data: ReportData, title: str) -> str:
    metadata = data.metadata
    facts = {
        "checkpoint": data.checkpoint.name,
        "preset": metadata.preset.name,
        "base": metadata.base,
        "configuration": metadata.config_digest,
        "trained on dataset": metadata.dataset_digest,
        "shown dataset": "the same" if data.dataset_digest == metadata.dataset_digest else data.dataset_digest,
        "training time": "not complete" if data.seconds is None else _duration(data.seconds),
    }
    items = "".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in facts.items())
    split = "validation clips, never trained on" if data.split == "val" else "training clips (this dataset has no others)"
    note = (
        f"{len(data.clips)} {split}. The model sees each clip's latents at timestep {data.timestep:.0f} of 1000 "
        f"({data.timestep / 10:.0f} % noise) and the camera through the base's control input; pose tokens are withheld from the "
        "geometry branch."
    )
    return f"<header><h1>{html.escape(title)}</h1><dl>{items}</dl><p class=note>{note}</p></header>"


def _losses(data: ReportData) -> str:
    table = "<p class=note>The run is not complete: its validation losses are in the curves.</p>"
    if data.validation is not None:
        before, after = data.validation["before"], data.validation["after"]
        rows = []
        for name, value in after.items():
            target = TARGETS.get(name)
            verdict = (
                ""
                if target is None
                else f"&lt; {target:g} {'<b class=yes>met</b>' if value < target else '<b class=no>not met</b>'}"
            )
            change = f"{(value / before[name] - 1) * 100:+.0f} %" if before[name] else ""
            rows.append(
                f"<tr><th>{name}</th><td>{before[name]:.4f}</td><td>{value:.4f}</td><td>{change}</td><td>{verdict}</td></tr>"
            )
        table = (
            "<table><thead><tr><th>validation loss</th><th>before training</th><th>after</th><th>change</th>"
            f"<th>guide's target</th></tr></thead><tbody>{''.join(rows)}</tbody></table>"
            "<p class=note>Same clips, noise and timesteps before and after; timesteps spread over the whole schedule.</p>"
        )
    return f"<section><h2>Losses</h2>{table}<div class=plot data-figure=losses style='height:300px'></div></section>"


def _clip_table(data: ReportData) -> str:
    head = "".join(f"<th title='{html.escape(why)}'>{heading}</th>" for heading, why, _ in _COLUMNS.values())
    rows = [_numbers_row(f"<a href='#clip-{i}'>{html.escape(c.clip_id)}</a>", c.numbers) for i, c in enumerate(data.clips)]
    means = {}
    for name in _COLUMNS:
        values = [c.numbers[name] for c in data.clips if math.isfinite(c.numbers[name])]
        means[name] = sum(values) / len(values) if values else math.nan
    explanations = "; ".join(
        f"<b>{heading.split(' ↓')[0].split(' ↑')[0]}</b> {html.escape(why)}" for heading, why, _ in _COLUMNS.values()
    )
    return (
        f"<section><h2>Depth and cameras</h2><table><thead><tr><th>clip</th>{head}</tr></thead><tbody>{''.join(rows)}"
        f"</tbody><tfoot>{_numbers_row('mean', means)}</tfoot></table><p class=note>{explanations}.</p></section>"
    )


def _numbers_row(label: str, numbers: dict[str, float]) -> str:
    cells = (
        f"<td>{numbers[name]:.{digits}f}</td>" if math.isfinite(numbers[name]) else "<td title='undefined'>–</td>"
        for name, (_, _, digits) in _COLUMNS.items()
    )
    return f"<tr><th>{label}</th>{''.join(cells)}</tr>"


def _clip(clip: ClipResult, number: int) -> str:
    low, high = depth_range(clip.depth, clip.valid)
    frames = pick_frames(len(clip.depth), _FRAMES)
    target, predicted, valid = clip.depth[frames], clip.predicted_depth[frames], clip.valid[frames]
    error = np.abs(predicted - target) / np.where(valid, target, 1)
    rows = (
        ("truth", colourise(target, low, high, valid)),
        ("prediction", colourise(predicted, low, high)),
        ("relative error", colourise(error, 0, 0.5, valid, _ERROR_MAP)),
    )
    strips = "".join(
        f"<figure><figcaption>{name}</figcaption><img alt='depth: {name}' src='{_data_uri(strip_png(rgb))}'></figure>"
        for name, rgb in rows
    )
    bars = _bar(f"{low:.2f}", f"{high:.2f} depth, clip units", colour_stops()) + _bar(
        "0", "50 % error", colour_stops(colormap=_ERROR_MAP)
    )
    times = ", ".join(str(t) for t in frames)
    return (
        f"<section id=clip-{number}><h2>{html.escape(clip.clip_id)}</h2>"
        f"<div>{strips}</div>"
        f"<div class=bars>{bars}<span class=note>frames {times} of {len(clip.depth)}; grey: no value</span></div>"
        "<div class=pair>"
        f"<div><h3>Points <small>same pixels, coloured by their true distance; views move together</small></h3>"
        f"<div class=plot data-figure=points-{number} style='height:430px'></div></div>"
        f"<div><h3>Camera path <small>prediction after Sim(3)</small></h3>"
        f"<div class=plot data-figure=path-{number} style='height:430px'></div></div></div></section>"
    )


def _bar(low: str, high: str, stops: list[str]) -> str:
    return f"<span class=bar>{low}<i style='background:linear-gradient(90deg,{','.join(stops)})'></i>{high}</span>"


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _figure_json(name: str, figure: go.Figure) -> str:
    # "<" cannot end the script element when it is written as an escape
    text = figure.to_json().replace("<", "\\u003c")
    return f"<script type='application/json' id='figure-{name}'>{text}</script>"


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


_STYLE = """
:root { --ink:#1f2937; --soft:#6b7280; --line:#e5e7eb; --paper:#ffffff; --ground:#f6f7f9; --accent:#e8590c; }
* { box-sizing:border-box; }
body { margin:0; background:var(--ground); color:var(--ink); font:15px/1.5 system-ui,"Segoe UI",Roboto,sans-serif; }
main { max-width:1240px; margin:0 auto; padding:28px 24px 64px; }
header, section { background:var(--paper); border:1px solid var(--line); border-radius:12px; padding:20px 24px;
  margin-bottom:18px; }
header { border-top:4px solid var(--accent); }
h1 { font-size:25px; margin:0 0 12px; letter-spacing:-.01em; }
h2 { font-size:18px; margin:0 0 12px; overflow-wrap:anywhere; }
h3 { font-size:14px; margin:0; } h3 small { color:var(--soft); font-weight:400; margin-left:6px; }
dl { display:flex; flex-wrap:wrap; gap:10px 28px; margin:0 0 12px; }
dt { color:var(--soft); font-size:11.5px; text-transform:uppercase; letter-spacing:.05em; }
dd { margin:0; font-variant-numeric:tabular-nums; }
.note { color:var(--soft); font-size:13px; margin:8px 0 0; }
table { border-collapse:collapse; min-width:60%; font-variant-numeric:tabular-nums; }
th, td { padding:6px 18px 6px 0; border-bottom:1px solid var(--line); text-align:right; white-space:nowrap; }
th:first-child { text-align:left; font-weight:500; } thead th { color:var(--soft); font-weight:500; font-size:13px; }
tfoot th, tfoot td { border-bottom:0; font-weight:600; }
a { color:inherit; text-decoration-color:var(--accent); }
.yes { color:#2b8a3e; } .no { color:#c92a2a; } .yes, .no { font-weight:600; margin-left:6px; }
figure { margin:0 0 4px; display:flex; align-items:center; gap:10px; }
figcaption { width:74px; flex:none; color:var(--soft); font-size:13px; }
figure img { width:100%; min-width:0; border-radius:4px; display:block; }
.bars { display:flex; flex-wrap:wrap; gap:6px 26px; align-items:center; margin:6px 0 14px 84px;
  font-size:12.5px; color:var(--soft); }
.bars .note { margin:0; font-size:12.5px; }
.bar i { display:inline-block; width:150px; height:10px; border-radius:5px; margin:0 8px; vertical-align:-1px; }
.pair { display:grid; grid-template-columns:1.75fr 1fr; gap:18px; }
.pair > div { min-width:0; }
@media (max-width:900px) { .pair { grid-template-columns:1fr; } }
"""

# Figures are drawn when they come into view and dropped when they leave it: browsers keep about sixteen WebGL canvases.
_SCRIPT = """
const config = {displaylogo: false, responsive: true, modeBarButtonsToRemove: ['toImage', 'sendDataToCloud']};
function draw(element) {
  const figure = JSON.parse(document.getElementById('figure-' + element.dataset.figure).textContent);
  Plotly.newPlot(element, figure.data, figure.layout, config).then(() => {
    if (!figure.layout.scene2) return;
    let busy = false;
    element.on('plotly_relayout', change => {
      if (busy) return;
      for (const [from, to] of [['scene', 'scene2'], ['scene2', 'scene']]) {
        const camera = change[from + '.camera'];
        if (camera) { busy = true; Plotly.relayout(element, {[to + '.camera']: camera}).then(() => { busy = false; }); }
      }
    });
  });
}
const watcher = new IntersectionObserver(entries => {
  for (const entry of entries) {
    const drawn = entry.target.classList.contains('js-plotly-plot');
    if (entry.isIntersecting && !drawn) draw(entry.target);
    if (!entry.isIntersecting && drawn) { Plotly.purge(entry.target); entry.target.classList.remove('js-plotly-plot'); }
  }
}, {rootMargin: '300px'});
document.querySelectorAll('.plot').forEach(element => watcher.observe(element));
"""

# The policy lets the page reach nothing outside itself, whatever plotly.js could load for maps.
_DOCUMENT = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; \
style-src 'unsafe-inline'; img-src data: blob:; font-src data:; worker-src blob:">
<style>{style}</style></head>
<body><main>{body}</main>
{figures}
<script>{plotly}</script>
<script>{script}</script>
</body></html>
"""


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
    numbers: dict[str, float]  # absrel, delta125, depth_scale, ate, auc30; NaN where undefined


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
