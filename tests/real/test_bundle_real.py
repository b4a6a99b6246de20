"""The tracks engine on real clips, lens unknown: what it accepts is right, and what it refuses."""

from pathlib import Path

import pytest

from benchmarks import bench_real
from fw_model.config import load_preset
from fw_pipeline.annotate.bundle.engine import BundleEngine
from fw_pipeline.annotate.bundle.refuse import check
from fw_pipeline.annotate.clips import annotation_size, cut_clips, read_frames, video_key
from fw_pipeline.annotate.types import ClipSetAside

DATA = Path(__file__).parents[2].parent / "shared" / "data"
ENGINE = BundleEngine()
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="no real clips beside the project")


def test_what_is_accepted_of_real_clips_with_unknown_lenses_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    """The bars of the benchmark: ATE and AUC@5 of RealEstate10K, its share accepted, and the order of judged pairs of points."""
    missed = bench_real.main(["--data", str(DATA)])
    assert not missed, capsys.readouterr().out


def test_a_standing_camera_before_a_moving_animal_is_refused_for_that_reason() -> None:
    video = DATA / "videos" / "panda-static-camera.mp4"
    for clip in cut_clips(video, video.parent, load_preset("tiny").clip, video_key(video.name)):
        with pytest.raises(ClipSetAside, match="the camera does not move"):
            check(ENGINE.solve(read_frames(video, clip, *annotation_size(clip, 448))))
