"""The COLMAP engine on real clips: RealEstate10K with its known cameras, and a camera that stands still."""

from pathlib import Path

import av
import numpy as np
import pytest

from fw_model import metrics
from fw_model.config import load_preset
from fw_pipeline.annotate.clips import annotation_size, cut_clips, read_frames, video_key
from fw_pipeline.annotate.colmap.engine import ColmapEngine
from fw_pipeline.annotate.colmap.mapping import Mapper
from fw_pipeline.annotate.colmap.plane_sweep import SweepSettings
from fw_pipeline.annotate.types import ClipSetAside

DATA = Path(__file__).parents[2].parent / "shared" / "data"
# The clips' own size and a bare sweep take a third of the time; with the defaults the paths are off by 0.12 to 0.45 %.
ENGINE = ColmapEngine(mapper=Mapper(enlarge_to=384), sweep=SweepSettings(planes=4))
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="no real clips beside the project")


def re10k(video: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frames [T, H, W, 3], K [3, 3] pixels (the clips were squeezed, so fx and fy differ), w2c [T, 3, 4]."""
    with av.open(str(video)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    lines = (DATA / "re10k" / "poses" / f"{video.stem}.txt").read_text(encoding="utf-8").splitlines()[1:]
    rows = np.array([[float(x) for x in line.split()] for line in lines])
    _, height, width, _ = frames.shape
    fx, fy, cx, cy = rows[0, 1:5] * [width, height, width, height]
    return frames, np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]]), rows[:, 7:].reshape(-1, 3, 4)


def test_re10k_with_known_lenses_places_every_frame_within_two_percent_of_the_path() -> None:
    errors = []
    for video in sorted((DATA / "re10k" / "videos").glob("*.mp4")):
        frames, intrinsics, truth = re10k(video)
        found = ENGINE.estimate(frames, intrinsics)
        assert not found.interpolated.any(), video.name
        errors.append(metrics.ate(found.w2c, truth))
    assert len(errors) == 5
    assert np.median(errors) <= 0.02


def test_a_standing_camera_before_a_moving_animal_is_refused_for_that_reason() -> None:
    video = DATA / "videos" / "panda-static-camera.mp4"
    for clip in cut_clips(video, video.parent, load_preset("tiny").clip, video_key(video.name)):
        with pytest.raises(ClipSetAside, match="the camera does not move"):
            ENGINE.estimate(read_frames(video, clip, *annotation_size(clip, 448)))
