"""Ingest on real videos, where they are at hand."""

from pathlib import Path

import numpy as np
import pytest

from fw_model.config import ClipConfig, load_preset
from fw_pipeline.annotate.clips import cut_clips, find_videos, read_frames, video_key
from fw_pipeline.annotate.shots import scan
from fw_pipeline.annotate.types import VideoSetAside
from fw_pipeline.annotate.video import decode

VIDEOS = Path(__file__).parents[2].parent / "shared" / "data" / "videos"
pytestmark = pytest.mark.skipif(not VIDEOS.is_dir(), reason="no real videos beside the project")
TINY = load_preset("tiny").clip


def test_variable_frame_rate_video_is_cut_by_its_timestamps() -> None:
    video = VIDEOS / "vfr-robot.mp4"
    found = scan(video)
    assert len(found.times) == 174  # its metadata says 175
    assert (found.height, found.width) == (576, 1024)
    clips = cut_clips(video, VIDEOS, TINY, video_key(video.name))
    assert len(clips) == 2
    for index, clip in enumerate(clips):
        wanted = found.times[0] + (index * TINY.stride + np.arange(TINY.frames)) / TINY.fps
        assert np.abs(np.array(clip.timestamps) - wanted).max() <= 0.0101  # half of its 20 ms frames
        assert np.isin(clip.timestamps, found.times).all()


def test_a_slide_show_is_too_slow_for_a_clip() -> None:
    with pytest.raises(VideoSetAside, match=r"eight-frames-house\.mp4: .*8 frames at 1 fps.*17 frames at 12 fps"):
        cut_clips(VIDEOS / "eight-frames-house.mp4", VIDEOS, TINY, "key")


def test_a_long_walk_is_one_shot_and_read_back_frame_by_frame() -> None:
    video = VIDEOS / "tokyo-walk.mp4"
    clips = cut_clips(video, VIDEOS, TINY, video_key(video.name))
    assert len(clips) == TINY.max_clips_per_video
    assert {clip.shot for clip in clips} == {0}
    last = clips[-1]
    read = read_frames(video, last, 720, 1280)
    by_time = {frame.time: frame for frame in decode(video) if frame.time in (last.timestamps[0], last.timestamps[-1])}
    np.testing.assert_array_equal(read[0], by_time[last.timestamps[0]].rgb())
    np.testing.assert_array_equal(read[-1], by_time[last.timestamps[-1]].rgb())


def test_a_rate_below_the_presets_is_refused_rather_than_filled_up() -> None:
    with pytest.raises(VideoSetAside, match=r"too few frames a second: 195 frames at 15 fps .*81 frames at 16 fps"):
        cut_clips(VIDEOS / "tokyo-walk.mp4", VIDEOS, ClipConfig(), "key")


def test_every_other_real_video_gives_whole_clips() -> None:
    for name in set(find_videos(VIDEOS)) - {"eight-frames-house.mp4"}:
        for clip in cut_clips(VIDEOS / name, VIDEOS, TINY, video_key(name)):
            assert clip.frames == 17
            assert (clip.height, clip.width) == (64, 112)
