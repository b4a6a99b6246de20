"""The colmap engine as a judge of generated video: cameras alone, with the lens held. An entry point of `fw_model.evaluate`."""

from __future__ import annotations

import numpy as np

from fw_pipeline.annotate.colmap.engine import ColmapEngine


def cameras_of(frames: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    """frames [T, h, w, 3] uint8 RGB, intrinsics [3, 3] pixels -> w2c [T, 3, 4].

    Raises ClipSetAside, which is a ValueError, where there are no cameras to be trusted.
    """
    return ColmapEngine().cameras(frames, intrinsics)
