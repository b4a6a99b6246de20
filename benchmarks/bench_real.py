"""Real clips, lens unknown: how many are accepted, whether these are right, and why the others are not.

    python benchmarks/bench_real.py [--engine tracks|colmap] [--data FOLDER] [--quick]

FOLDER has `re10k/` (RealEstate10K clips squeezed to 3:2, brought back to 16:9 here, with true cameras), `rgbd/` (frames with
true depth and cameras) and `videos/` with `ordinal.json`: for some of them pairs of points of which a person said which is
nearer. --quick leaves the videos out. Every clip goes the way it goes in the pipeline: `WholeVideo.accept`.
Prints a row a clip and a last line of JSON; exits with 1 when a bar is missed or there was nothing to look at.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np

from fw_model import metrics
from fw_model.config import load_preset
from fw_model.errors import explain_errors
from fw_pipeline.annotate import clips as clip_io
from fw_pipeline.annotate.engines import ColmapSettings, TracksSettings
from fw_pipeline.annotate.types import Clip, ClipGeometry, ClipSetAside, GeometryEngine, VideoSetAside
from fw_pipeline.annotate.whole_video import WholeVideo

LONG_SIDE = 448
MIN_AUC5, MAX_ATE = 0.7, 0.015  # of accepted RealEstate10K clips
MIN_ACCEPTED = 0.8  # of them
MIN_ORDER = 0.95  # of judged pairs that have the right order
WINDOW = 3  # pixels around a judged point, whose known depths' median counts


@dataclass(frozen=True)
class Truth:
    w2c: np.ndarray  # [T, 3, 4]
    focal: float  # over the long side
    depth: np.ndarray | None = None  # [T, h, w], 0 where unknown


@dataclass
class Row:
    clip: str
    seconds: float
    accepted: bool = False
    reason: str = ""
    motion: str = ""
    focal: float = float("nan")
    numbers: dict[str, float] | None = None  # against truth
    right: int = 0  # of the judged pairs
    judged: int = 0


@explain_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--engine", choices=("tracks", "colmap"), default="tracks")
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--quick", action="store_true", help="without the videos")
    args = parser.parse_args(argv)
    settings = TracksSettings() if args.engine == "tracks" else ColmapSettings()
    engine = settings.build("cpu", "float32")
    groups: dict[str, list[Row]] = {"re10k": re10k(engine, args.data / "re10k"), "rgbd": rgbd(engine, args.data / "rgbd")}
    groups["videos"] = [] if args.quick else videos(engine, args.data / "videos", args.data / "ordinal.json")
    result = {"engine": args.engine} | summary(groups)
    failed = bars(result)
    print(json.dumps(result | {"failed": failed}))
    return 1 if failed else 0


# ------------------------------------------------------------------------------------------------------- the three kinds


def re10k(engine: GeometryEngine, folder: Path) -> list[Row]:
    return [row for name, wide, truth in re10k_clips(folder) for row in solve(engine, {name: wide}, {name: truth})]


def re10k_clips(folder: Path) -> Iterator[tuple[str, np.ndarray, Truth]]:
    """(name, frames [T, 252, 448, 3] with square pixels, their cameras) of every clip."""
    for path in sorted((folder / "videos").glob("*.mp4")):
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        wide = np.stack([cv2.resize(frame, (LONG_SIDE, 252), interpolation=cv2.INTER_CUBIC) for frame in frames])
        lines = (folder / "poses" / f"{path.stem}.txt").read_text(encoding="utf-8").splitlines()[1:]
        poses = np.array([[float(x) for x in line.split()] for line in lines])
        yield path.stem, wide, Truth(poses[:, 7:].reshape(-1, 3, 4), float(poses[0, 1]))


def rgbd(engine: GeometryEngine, folder: Path) -> list[Row]:
    if not folder.is_dir():
        return []
    pictures = [cv2.imread(str(path))[..., ::-1] for path in sorted((folder / "color").iterdir())]
    depths = [cv2.imread(str(path), cv2.IMREAD_UNCHANGED) / 1000.0 for path in sorted((folder / "depth").iterdir())]
    size = (LONG_SIDE, LONG_SIDE * 3 // 4)
    frames = np.stack([cv2.resize(picture, size, interpolation=cv2.INTER_AREA) for picture in pictures])
    depth = np.stack([cv2.resize(image, size, interpolation=cv2.INTER_NEAREST) for image in depths])
    lines = (folder / "trajectory.log").read_text(encoding="utf-8").splitlines()
    c2w = np.array([[float(x) for x in line.split()] for i, line in enumerate(lines) if i % 5]).reshape(-1, 4, 4)
    return solve(engine, {"rgbd": frames}, {"rgbd": Truth(np.linalg.inv(c2w)[: len(frames), :3], 525 / 640, depth)})


def videos(engine: GeometryEngine, folder: Path, ordinal: Path) -> list[Row]:
    pairs = json.loads(ordinal.read_text(encoding="utf-8")) if ordinal.is_file() else {}
    rows = []
    for name in clip_io.find_videos(folder) if folder.is_dir() else []:
        try:
            clips = clip_io.cut_clips(folder / name, folder, load_preset("tiny").clip, Path(name).stem)
        except VideoSetAside as reason:
            rows.append(show(Row(name, 0.0, reason=str(reason))))
            continue

        def read(clip: Clip, path: Path = folder / name) -> np.ndarray:
            return clip_io.read_frames(path, clip, *clip_io.annotation_size(clip, LONG_SIDE))

        judge = [(item["t"], item["pairs"]) for item in pairs.get(name, ())]
        rows += each(engine, clips, read, lambda row, clip, found, judge=judge: order(row, clip, found, judge))
    return rows


# --------------------------------------------------------------------------------------------------------------- one clip


def solve(engine: GeometryEngine, frames: dict[str, np.ndarray], truth: dict[str, Truth]) -> list[Row]:
    """Clips that are no files, by name: each a video of its own."""
    clips = [Clip(name, "", "", 0, 12.0, (0.0,) * len(f), *f.shape[1:3], *f.shape[1:3]) for name, f in frames.items()]
    return each(engine, clips, lambda c: frames[c.clip_id], lambda row, c, found: compare(row, found, truth[c.clip_id]))


def each(
    engine: GeometryEngine,
    clips: Sequence[Clip],
    read: Callable[[Clip], np.ndarray],
    look: Callable[[Row, Clip, ClipGeometry], None],
) -> list[Row]:
    whole, rows = WholeVideo(engine, clips, read), []
    for clip in clips:
        started = time.perf_counter()
        row = Row(clip.clip_id, 0.0)
        try:
            found, measured = whole.accept(clip)
            row.motion, row.focal = measured.motion, float(found.intrinsics[0, 0, 0]) / max(found.depth.shape[1:])
            row.accepted = True
            look(row, clip, found)
        except ClipSetAside as reason:
            row.reason, row.motion = reason.message, row.motion or reason.measured.motion
        row.seconds = time.perf_counter() - started
        rows.append(show(row))
    return rows


def compare(row: Row, found: ClipGeometry, truth: Truth) -> None:
    rotation, translation = metrics.relative_pose_errors(found.w2c, truth.w2c)
    row.numbers = {
        "ate": metrics.ate(found.w2c, truth.w2c),
        "auc5": metrics.auc(rotation, translation, 5),
        "focal_error": row.focal / truth.focal - 1,
        "valid": float((found.depth > 0).mean()),
    }
    if truth.depth is not None:
        row.numbers["absrel"] = metrics.absrel(found.depth, truth.depth, (found.depth > 0) & (truth.depth > 0))


def order(row: Row, clip: Clip, found: ClipGeometry, judge: Sequence[tuple[float, Any]]) -> None:
    """Counts the pairs of the clip's frames, and those that have the nearer point nearer."""
    transform = clip_io.FrameTransform(clip.source_height, clip.source_width, *found.depth.shape[1:])
    times = np.asarray(clip.timestamps)
    for t, pairs in judge:
        frame = int(np.abs(times - t).argmin())
        if abs(times[frame] - t) > 0.5 / clip.fps:
            continue
        for pair in pairs:
            near, far = (depth_at(found.depth[frame], transform, *point) for point in pair)
            if near and far:
                row.judged += 1
                row.right += near < far


def depth_at(depth: np.ndarray, transform: clip_io.FrameTransform, x: float, y: float) -> float:
    """Median of the known depths around a point given in shares of the source picture; 0 where none is known."""
    column = int(x * transform.source_width * transform.scale - transform.left)
    row = int(y * transform.source_height * transform.scale - transform.top)
    around = depth[max(0, row - WINDOW) : row + WINDOW + 1, max(0, column - WINDOW) : column + WINDOW + 1]
    return float(np.median(around[around > 0])) if (around > 0).any() else 0.0


# ---------------------------------------------------------------------------------------------------------------- results


def show(row: Row) -> Row:
    said = "accepted" if row.accepted else row.reason
    numbers = " ".join(f"{name} {value:.4f}" for name, value in (row.numbers or {}).items())
    pairs = f"order {row.right}/{row.judged} " if row.judged else ""
    print(f"{row.clip:<36.36} {row.seconds:5.1f} s  {row.motion:<8} f {row.focal:5.3f}  {numbers} {pairs}{said:.160}", flush=True)
    return row


def summary(groups: dict[str, list[Row]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, rows in groups.items():
        accepted = [row for row in rows if row.accepted]
        result[name] = {"clips": len(rows), "accepted": len(accepted), "seconds": round(sum(row.seconds for row in rows), 1)}
        for key in ("ate", "absrel"):
            if values := [row.numbers[key] for row in accepted if row.numbers and key in row.numbers]:
                result[name][f"worst_{key}"] = round(max(values), 5)
        if values := [row.numbers["auc5"] for row in accepted if row.numbers]:
            result[name]["worst_auc5"] = round(min(values), 4)
    judged = [row for rows in groups.values() for row in rows if row.judged]
    result["pairs"] = {"judged": sum(row.judged for row in judged), "right": sum(row.right for row in judged)}
    return result


def bars(result: dict[str, Any]) -> list[str]:
    found, pairs = result["re10k"], result["pairs"]
    failed = [f"no clips of {name}" for name in ("re10k", "rgbd") if not result[name]["clips"]]
    if found["clips"] and found["accepted"] < MIN_ACCEPTED * found["clips"]:
        failed.append(f"re10k: {found['accepted']} of {found['clips']} accepted")
    if found["accepted"] and (found["worst_ate"] > MAX_ATE or found["worst_auc5"] < MIN_AUC5):
        failed.append(f"re10k: worst ATE {found['worst_ate']}, AUC@5 {found['worst_auc5']} of the accepted")
    if pairs["right"] < MIN_ORDER * pairs["judged"]:
        failed.append(f"videos: {pairs['right']} of {pairs['judged']} pairs in the right order")
    return failed


if __name__ == "__main__":
    sys.exit(main())
