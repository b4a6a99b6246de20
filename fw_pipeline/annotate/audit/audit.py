"""The audit: an independent judge of a clip's cameras, lens and depth, whatever made them."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from fw_pipeline.annotate.audit.cameras import judge_cameras
from fw_pipeline.annotate.audit.depth import judge_depth, path_size
from fw_pipeline.annotate.audit.halves import judge_halves
from fw_pipeline.annotate.audit.verdict import Cause, Finding, Verdict
from fw_pipeline.annotate.audit.witness import follow_witnesses, witness
from fw_pipeline.annotate.bundle.solve import MIN_TRACKS, SEARCH_FRAMES
from fw_pipeline.annotate.tracks import Tracks

MIN_SHOWN = 12  # tracks that a frame must show to be judged


class Geometry(Protocol):
    """What is judged: one world and one unit for path and depth. `ClipGeometry` is one, and so is what the dataset holds."""

    @property
    def w2c(self) -> np.ndarray: ...  # [T, 3, 4]
    @property
    def intrinsics(self) -> np.ndarray: ...  # [T, 3, 3] pixels of h x w
    @property
    def depth(self) -> np.ndarray: ...  # [T, h, w] z-depth, 0 = unknown
    @property
    def confidence(self) -> np.ndarray: ...  # [T, h, w], larger is surer


def audit(frames: np.ndarray | Tracks, geometry: Geometry) -> Verdict:
    """Hold a clip's geometry against points followed through its pictures.

    Args:
        frames: [T, h, w, 3] uint8 RGB at the size of the geometry, or tracks of them that the engine did not choose.
        geometry: see `Geometry`.

    Raises ValueError when sizes differ or a value is not finite.
    """
    _require_sizes(frames, geometry)
    tracks = frames if isinstance(frames, Tracks) else follow_witnesses(frames)
    numbers: dict[str, float] = {"tracks": float(len(tracks))}
    shown = tracks.seen.sum(0)
    if tracks.frames < 3 or len(tracks) < MIN_TRACKS or shown.min() < MIN_SHOWN:
        where = f"{len(tracks)} points could be followed, {shown.min()} of them in frame {int(shown.argmin())}"
        words = f"{where} (at least {MIN_TRACKS} and {MIN_SHOWN} in each of at least 3 frames)"
        return _verdict(numbers, [Finding(Cause.FEW_TRACKS, words, judged=False)])
    w2c, intrinsics = geometry.w2c.astype(np.float64), geometry.intrinsics.astype(np.float64)
    depth = geometry.depth.astype(np.float32)
    path = path_size(w2c, tracks.frames // 2)
    if not path > 1e-6 * _typical(depth):
        words = "the given camera does not move: nothing can be held against its depth"
        return _verdict(numbers, [Finding(Cause.NO_DEPTH, words, judged=False)])
    whole = witness(tracks, w2c, intrinsics)
    some = np.unique(np.rint(np.linspace(0, tracks.frames - 1, min(tracks.frames, SEARCH_FRAMES))).astype(int))
    part = tracks.subset(tracks.seen[:, some].sum(1) >= 3).at(some)
    few = whole if len(some) == tracks.frames else witness(part, w2c[some], intrinsics[some])
    found = judge_cameras(whole, few, w2c, intrinsics)
    numbers |= found.numbers
    findings = found.findings
    if not findings:  # wrong cameras put the points elsewhere: nothing can be held against them
        for more, said in (judge_halves(few), judge_depth(whole, depth, geometry.confidence, path)):
            numbers |= more
            findings = findings + said
    return _verdict(numbers, findings)


def _verdict(numbers: dict[str, float], findings: list[Finding]) -> Verdict:
    return Verdict({f"audit_{name}": float(value) for name, value in numbers.items() if np.isfinite(value)}, findings)


def _typical(depth: np.ndarray) -> float:
    return float(np.median(depth[depth > 0])) if (depth > 0).any() else 1.0


def _require_sizes(frames: np.ndarray | Tracks, geometry: Geometry) -> None:
    shape = (frames.frames, frames.height, frames.width) if isinstance(frames, Tracks) else frames.shape[:3]
    wanted = {"depth": shape, "confidence": shape, "w2c": (shape[0], 3, 4), "intrinsics": (shape[0], 3, 3)}
    for name, expected in wanted.items():
        value = getattr(geometry, name)
        if value.shape != expected:
            raise ValueError(f"audit: {name} is {list(value.shape)}, expected {list(expected)}")
        if not np.isfinite(value).all():
            raise ValueError(f"audit: {name} has values that are not finite")
