"""How far annotations are from exact ground truth, for videos that have one (the demo's). Annotators never see it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fw_model import metrics
from fw_pipeline.annotate.clips import FrameTransform
from fw_pipeline.annotate.types import Clip
from fw_pipeline.demo import ground_truth_for_clip, load_ground_truth


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
