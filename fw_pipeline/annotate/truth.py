"""Exact ground truth beside a video (`name.gt.npz`), and how far annotations are from it. Annotators never see it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fw_model import metrics
from fw_model.errors import BadFileError
from fw_pipeline.annotate.clips import FrameTransform
from fw_pipeline.annotate.types import Clip


@dataclass(frozen=True)
class Bars:
    """What annotations of the demo must reach."""

    ate_percent: float = 2.0  # of the camera path's extent, after Sim(3)
    auc30: float = 0.9
    absrel: float = 0.08  # one scale per clip
    valid_fraction: float = 0.6

    def failures(self, numbers: dict[str, float]) -> list[str]:
        """Which bars the numbers miss, in words."""
        below = ("ate_percent", "absrel")
        missed = []
        for name, bar in vars(self).items():
            value, good = numbers[name], "<=" if name in below else ">="
            if not (value <= bar if name in below else value >= bar):
                missed.append(f"{name} {value:.4g}, wanted {good} {bar:g}")
        return missed


def compare_with_truth(video: Path, clip: Clip, depth: np.ndarray, w2c: np.ndarray) -> dict[str, float] | None:
    """Errors of one annotated clip, or None when its video has no ground truth.

    Args:
        video: the video's file; its truth lies beside it as `*.gt.npz`.
        clip: which frames, and the bucket's size.
        depth: [T, H, W] z-depth at the bucket's size, 0 = invalid, any one unit.
        w2c: [T, 3, 4].

    Returns:
        ate_percent (of the path's extent), auc30, absrel, valid_fraction.
    """
    truth = load_ground_truth(video)
    if truth is None:
        return None
    true_depth, _, true_w2c = ground_truth_for_clip(truth, clip)
    transform = FrameTransform(clip.source_height, clip.source_width, clip.height, clip.width)
    true_depth = transform.depth_to_target(true_depth)
    valid = depth > 0
    return {
        "ate_percent": 100 * metrics.ate(w2c, true_w2c),
        "auc30": metrics.auc(*metrics.relative_pose_errors(w2c, true_w2c), 30),
        "absrel": metrics.absrel(depth, true_depth, valid),
        "valid_fraction": float(valid.mean()),
    }


@dataclass(frozen=True)
class GroundTruth:
    """Exact geometry of one demo video, frame by frame, at the video's own size h x w.

    The world is the scene's (metres); `ground_truth_for_clip` moves it to a clip's first camera.
    """

    depth: np.ndarray  # [N, h, w] float32 z-depth at pixel centres (kept on disk as float16: relative error <= 0.05 %)
    intrinsics: np.ndarray  # [N, 3, 3] float64 pixels
    w2c: np.ndarray  # [N, 3, 4] float64
    timestamps: np.ndarray  # [N] float64 seconds
    shot: np.ndarray  # [N] int64, counts up at every cut


def ground_truth_path(video: Path) -> Path:
    """Where the ground truth of a video lies: `NAME.gt.npz` beside `NAME.mp4`."""
    return video.with_name(video.stem + ".gt.npz")


def load_ground_truth(video: Path) -> GroundTruth | None:
    """Ground truth of a rendered video, or None for a video that has none. Raises BadFileError for a broken file."""
    path = ground_truth_path(video)
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as data:
        missing = {"depth", "intrinsics", "w2c", "timestamps", "shot"} - set(data.files)
        if missing:
            raise BadFileError(f"{path}: not a ground-truth file, it lacks {', '.join(sorted(missing))}")
        return GroundTruth(
            depth=data["depth"].astype(np.float32),
            intrinsics=data["intrinsics"].astype(np.float64),
            w2c=data["w2c"].astype(np.float64),
            timestamps=data["timestamps"].astype(np.float64),
            shot=data["shot"].astype(np.int64),
        )


def ground_truth_for_clip(truth: GroundTruth, clip: Clip) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The truth at a clip's frames -> (depth [T, h, w], intrinsics [T, 3, 3], w2c [T, 3, 4] with w2c[0] = identity).

    Depth and intrinsics are at the video's own size h x w (`FrameTransform` maps them to a bucket). Raises BadFileError
    when a clip's timestamp is more than half a frame from every frame of the truth.
    """
    wanted = np.asarray(clip.timestamps)
    nearest = np.abs(truth.timestamps[None] - wanted[:, None]).argmin(1)
    off = np.abs(truth.timestamps[nearest] - wanted)
    if off.max() > 0.5 * np.median(np.diff(truth.timestamps)) + 1e-9:
        worst = int(off.argmax())
        raise BadFileError(
            f"{clip.clip_id}: no ground truth within half a frame of {wanted[worst]:.4f} s (off by {off[worst]:.4f} s)"
        )
    full = np.tile(np.eye(4), (len(nearest), 1, 1))
    full[:, :3] = truth.w2c[nearest]
    relative = full @ np.linalg.inv(full[0])
    return truth.depth[nearest], truth.intrinsics[nearest], relative[:, :3]
