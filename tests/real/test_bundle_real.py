"""The tracks engine's cameras on real clips with true ones, lens unknown, and what it refuses."""

from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from fw_model import metrics
from fw_model.config import load_preset
from fw_pipeline.annotate.bundle.engine import BundleEngine
from fw_pipeline.annotate.bundle.refuse import check
from fw_pipeline.annotate.clips import annotation_size, cut_clips, read_frames, video_key
from fw_pipeline.annotate.types import ClipSetAside

DATA = Path(__file__).parents[2].parent / "shared" / "data"
ENGINE = BundleEngine()
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="no real clips beside the project")


def re10k(video: Path) -> tuple[np.ndarray, np.ndarray]:
    """Frames [T, 252, 448, 3] with square pixels (the clips were squeezed from 16:9), w2c [T, 3, 4]."""
    with av.open(str(video)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    lines = (DATA / "re10k" / "poses" / f"{video.stem}.txt").read_text(encoding="utf-8").splitlines()[1:]
    rows = np.array([[float(x) for x in line.split()] for line in lines])
    wide = np.stack([cv2.resize(frame, (448, 252), interpolation=cv2.INTER_CUBIC) for frame in frames])
    return wide, rows[:, 7:].reshape(-1, 3, 4)


def test_re10k_with_unknown_lenses_is_right_wherever_it_is_accepted_and_mostly_is() -> None:
    accepted = 0
    for video in sorted((DATA / "re10k" / "videos").glob("*.mp4")):
        frames, truth = re10k(video)
        found = ENGINE.solve(frames)
        try:
            check(found)
        except ClipSetAside:
            continue
        accepted += 1
        rotation, translation = metrics.relative_pose_errors(found.w2c, truth)
        assert metrics.ate(found.w2c, truth) <= 0.015, video.name
        assert metrics.auc(rotation, translation, 5) >= 0.7, video.name
    assert accepted >= 4


def test_a_standing_camera_before_a_moving_animal_is_refused_for_that_reason() -> None:
    video = DATA / "videos" / "panda-static-camera.mp4"
    for clip in cut_clips(video, video.parent, load_preset("tiny").clip, video_key(video.name)):
        with pytest.raises(ClipSetAside, match="the camera does not move"):
            check(ENGINE.solve(read_frames(video, clip, *annotation_size(clip, 448))))
