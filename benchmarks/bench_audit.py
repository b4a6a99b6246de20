"""How many wrong annotations the audit finds, and how many right ones it refuses: faults put into geometry that is right.

    python benchmarks/bench_audit.py [--data FOLDER] [--quick] [--show]

Unspoilt geometry is (a) the exact truth of rendered rooms, with other camera moves than the demo's, (b) what the `tracks` engine
finds for the demo's videos, (c) what it finds for the RealEstate10K clips in FOLDER/re10k (see bench_real.py), of both those it
accepts. Then every fault is put into every clip. --quick leaves (a) out; --show prints every verdict.
A row each kind of fault: found, and named as what it is. The last line is JSON; exits with 1 when a bar is missed or nothing
was there to spoil.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from benchmarks.bench_real import re10k_clips
from fw_model.config import load_preset
from fw_model.errors import explain_errors
from fw_pipeline.annotate import clips as clip_io
from fw_pipeline.annotate.audit.audit import audit
from fw_pipeline.annotate.audit.epipolar import FLIP, inverted
from fw_pipeline.annotate.audit.verdict import Cause, Judgement
from fw_pipeline.annotate.audit.witness import follow_witnesses
from fw_pipeline.annotate.engines import TracksSettings
from fw_pipeline.annotate.quality import check_geometry
from fw_pipeline.annotate.tracks import Tracks
from fw_pipeline.annotate.types import Clip, ClipGeometry, ClipSetAside
from fw_pipeline.annotate.whole_video import WholeVideo
from fw_pipeline.demo.render import render_demo, render_frame
from fw_pipeline.demo.scenes import SCENES, Shot

MIN_FOUND, MAX_REFUSED = 0.95, 0.02
LONG_SIDE = 448


@dataclass(frozen=True)
class Right:
    """A clip whose geometry is right."""

    name: str
    tracks: Tracks
    geometry: ClipGeometry


# --------------------------------------------------------------------------------------------------------------- faults


def focal(factor: float) -> Callable[[ClipGeometry, ClipGeometry], ClipGeometry]:
    def spoil(right: ClipGeometry, _: ClipGeometry) -> ClipGeometry:
        lens = right.intrinsics.copy()
        lens[:, [0, 1], [0, 1]] *= factor
        return replace(right, intrinsics=lens)

    return spoil


def moved(w2c: np.ndarray, frames: np.ndarray, rng: np.random.Generator, share: float, degrees: float) -> np.ndarray:
    """Some frames' cameras [T, 3, 4] moved by a share of the path's extent and turned."""
    centre = -np.einsum("tji,tj->ti", w2c[:, :, :3], w2c[:, :, 3])
    extent = float(np.linalg.norm(np.ptp(centre, axis=0)))
    out = w2c.copy()
    for t in frames:
        axis = rng.standard_normal((2, 3))
        axis /= np.linalg.norm(axis, axis=1, keepdims=True)
        turned = Rotation.from_rotvec(np.radians(degrees) * axis[0]).as_matrix() @ w2c[t, :, :3]
        out[t] = np.c_[turned, -turned @ (centre[t] + share * extent * axis[1])]
    return out


def one_pose(right: ClipGeometry, _: ClipGeometry) -> ClipGeometry:
    rng = np.random.default_rng(1)
    return replace(right, w2c=moved(right.w2c, rng.integers(1, len(right.w2c), 1), rng, 0.1, 1.0))


def a_tenth(right: ClipGeometry, _: ClipGeometry) -> ClipGeometry:
    rng, count = np.random.default_rng(2), len(right.w2c)
    frames = 1 + rng.permutation(count - 1)[: max(1, round(0.1 * count))]
    return replace(right, w2c=moved(right.w2c, frames, rng, 0.1, 2.0))


def c2w(right: ClipGeometry, _: ClipGeometry) -> ClipGeometry:
    return replace(right, w2c=inverted(right.w2c))


def opengl(right: ClipGeometry, _: ClipGeometry) -> ClipGeometry:
    return replace(right, w2c=np.concatenate([FLIP @ right.w2c[:, :, :3] @ FLIP, FLIP @ right.w2c[:, :, 3:]], -1))


def deeper(right: ClipGeometry, _: ClipGeometry) -> ClipGeometry:
    return replace(right, depth=right.depth * np.float32(1.2))


def mirrored(right: ClipGeometry, _: ClipGeometry) -> ClipGeometry:
    """Far is near and near is far: the depths' order reversed, their distribution kept."""
    known = right.depth > 0
    values = np.sort(right.depth[known])
    rank = np.empty(len(values), int)
    rank[np.argsort(right.depth[known], kind="stable")] = np.arange(len(values))
    out = np.zeros_like(right.depth)
    out[known] = values[::-1][rank]
    return replace(right, depth=out)


def frame_later(right: ClipGeometry, _: ClipGeometry) -> ClipGeometry:
    index = np.minimum(np.arange(len(right.depth)) + 1, len(right.depth) - 1)
    return replace(right, depth=right.depth[index], confidence=right.confidence[index])


def other_path(right: ClipGeometry, other: ClipGeometry) -> ClipGeometry:
    index = np.rint(np.linspace(0, len(other.w2c) - 1, len(right.w2c))).astype(int)
    w2c = other.w2c[index].copy()
    sizes = [np.sqrt((w[:, :, 3] ** 2).sum(-1).mean()) for w in (right.w2c, w2c)]
    w2c[:, :, 3] *= sizes[0] / sizes[1]
    return replace(right, w2c=w2c)


FAULTS: dict[str, tuple[Callable[[ClipGeometry, ClipGeometry], ClipGeometry], tuple[Cause, ...]]] = {
    "focal x1.3": (focal(1.3), (Cause.FOCAL,)),
    "focal x0.75": (focal(0.75), (Cause.FOCAL,)),
    "depth x1.2": (deeper, (Cause.SCALE,)),
    "one pose jumped": (one_pose, (Cause.POSE,)),
    "a tenth of the frames": (a_tenth, (Cause.POSE,)),
    "c2w for w2c": (c2w, (Cause.C2W,)),
    "OpenGL axes": (opengl, (Cause.OPENGL,)),
    "depth mirrored": (mirrored, (Cause.MIRRORED,)),
    "depth a frame later": (frame_later, (Cause.DEPTH_SHIFT,)),
    "path of another clip": (other_path, (Cause.PATH,)),
}


# --------------------------------------------------------------------------------------------------------- what is right


def made(count: int = 12) -> Iterator[Right]:
    """Exact truth of moves through the demo's rooms that the demo does not make: other lengths, lenses and shapes."""
    rng = np.random.default_rng(20)
    for i in range(count):
        room = list(SCENES)[i % len(SCENES)]
        eye = np.array([rng.uniform(-0.8, 0.8), rng.uniform(-1.7, -1.2), rng.uniform(0.2, 0.8)])
        step = rng.uniform(-1, 1, (2, 3)) * [0.6, 0.25, 0.5]
        path = tuple(tuple(eye + s) for s in (np.zeros(3), step[0], step[0] + step[1]))
        target = tuple((rng.uniform(-0.4, 0.4), -1.0, rng.uniform(3.6, 4.6)) for _ in range(2))
        frames, fov = int(rng.choice([13, 17, 33])), float(rng.uniform(45, 80))
        shot = Shot(room, path, target, frames, *((256, 448) if i % 3 else (448, 256)), fov)  # type: ignore[arg-type]
        seen = [render_frame(SCENES[room](), shot, t / (frames - 1)) for t in range(frames)]
        pictures, depth, w2c = (np.stack([s[k] for s in seen]) for k in range(3))
        yield Right(f"made {i} {room}", follow_witnesses(pictures), exact(depth, w2c, shot))


def exact(depth: np.ndarray, w2c: np.ndarray, shot: Shot) -> ClipGeometry:
    from fw_pipeline.demo.render import intrinsics_of

    rotation = w2c[:, :, :3] @ w2c[0, :, :3].T
    moved = np.concatenate([rotation, (w2c[:, :, 3] - rotation @ w2c[0, :, 3])[..., None]], -1)
    depth = np.where(np.isfinite(depth), depth, 0).astype(np.float32)
    one = np.ones(len(depth), np.float32)
    lens = np.repeat(intrinsics_of(shot)[None], len(depth), 0)
    return ClipGeometry(moved, lens, depth, (depth > 0).astype(np.float32), one, 0 * one, one < 0)


def demo() -> Iterator[Right]:
    with tempfile.TemporaryDirectory() as folder:
        for path in render_demo(Path(folder)):
            clips = clip_io.cut_clips(path, path.parent, load_preset("tiny").clip, path.stem)
            yield from accepted(clips, lambda c, path=path: clip_io.read_frames(path, c, *clip_io.annotation_size(c, LONG_SIDE)))


def real(folder: Path) -> Iterator[Right]:
    for name, frames, _ in re10k_clips(folder):
        clip = Clip(name, "", "", 0, 12.0, (0.0,) * len(frames), *frames.shape[1:3], *frames.shape[1:3])
        yield from accepted([clip], lambda _, frames=frames: frames)


def accepted(clips: Sequence[Clip], read: Callable[[Clip], np.ndarray]) -> Iterator[Right]:
    """Those clips that the engine and the geometry's own checks let through."""
    whole = WholeVideo(TracksSettings().build("cpu", "float32"), clips, read)
    for clip in clips:
        try:
            frames, geometry, _ = whole.estimate(clip)
            check_geometry(geometry)
        except ClipSetAside:
            continue  # nothing to spoil
        yield Right(clip.clip_id, follow_witnesses(frames), geometry)


# --------------------------------------------------------------------------------------------------------------- results


@dataclass
class Count:
    tried: int = 0
    found: int = 0
    named: int = 0


def judge(rights: Sequence[Right], counts: dict[str, Count], show: bool) -> float:
    """Seconds an audit takes, tracks already followed."""
    started, audits = time.perf_counter(), 0
    for i, right in enumerate(rights):
        other = rights[(i + 1) % len(rights)].geometry
        for name, (spoil, causes) in {"none": (lambda g, _: g, ()), **FAULTS}.items():
            verdict = audit(right.tracks, spoil(right.geometry, other))
            audits += 1
            count = counts.setdefault(name, Count())
            count.tried += 1
            count.found += verdict.judgement is not Judgement.PASS
            count.named += verdict.cause in causes
            if show or (verdict.judgement is Judgement.PASS) == (name != "none"):
                print(f"  {right.name:<28.28} {name:<22} {verdict!s:.150}", flush=True)
                if show:
                    print(
                        "    " + " ".join(f"{k.removeprefix('audit_')} {v:.3g}" for k, v in verdict.numbers.items()), flush=True
                    )
    return (time.perf_counter() - started) / max(1, audits)


@explain_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--quick", action="store_true", help="without the made moves")
    parser.add_argument("--show", action="store_true", help="every verdict with its numbers")
    args = parser.parse_args(argv)
    sources = {"made": [] if args.quick else list(made()), "demo": list(demo()), "re10k": list(real(args.data / "re10k"))}
    total: dict[str, Count] = {}
    result: dict[str, object] = {"clips": {name: len(rights) for name, rights in sources.items()}, "seconds_a_clip": {}}
    for name, rights in sources.items():
        if rights:
            seconds = judge(rights, total, args.show)
            result["seconds_a_clip"] |= {name: round(seconds, 2)}  # type: ignore[operator]
    for name, count in total.items():
        print(f"{name:<24} {count.found:>3} of {count.tried:>3} refused, {count.named:>3} under its name")
    unspoilt = total.pop("none", Count())
    tried, found = sum(c.tried for c in total.values()), sum(c.found for c in total.values())
    result |= {
        "faults": tried,
        "found": found,
        "named": sum(c.named for c in total.values()),
        "unspoilt": unspoilt.tried,
        "unspoilt_refused": unspoilt.found,
    }
    failed = ["nothing to spoil"] if not tried else []
    if found < MIN_FOUND * tried:
        failed.append(f"{found} of {tried} faults found")
    if unspoilt.found > MAX_REFUSED * unspoilt.tried:
        failed.append(f"{unspoilt.found} of {unspoilt.tried} unspoilt clips refused")
    print(json.dumps(result | {"failed": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
