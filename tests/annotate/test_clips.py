"""Ingest: what is cut from a video, what is refused and why, and that sizes, times and intrinsics map exactly."""

import json
import logging
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fw_model.config import ClipConfig
from fw_model.files import file_hash
from fw_pipeline.annotate.clips import (
    clips_from_json,
    clips_to_json,
    cut_clips,
    find_videos,
    read_frames,
    video_key,
)
from fw_pipeline.annotate.shots import scan
from fw_pipeline.annotate.types import VideoSetAside
from fw_pipeline.annotate.video import decode
from tests.helpers.made_videos import pan, write

CLIP = ClipConfig(frames=9, fps=12, short_side=32, long_side=64, stride=9)


def write_audio(path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 44100, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def cut(path, clip=CLIP):
    return cut_clips(path, path.parent, clip, video_key(path.name))


# ------------------------------------------------------------------------------------------------------ what is cut


def test_clips_take_every_second_frame_of_a_24_fps_video(tmp_path) -> None:
    video = write(tmp_path / "pan.mp4", pan(40))
    clips = cut(video)
    assert [clip.clip_id for clip in clips] == [f"{video_key('pan.mp4')}-s000-c{i:03d}" for i in range(2)]
    np.testing.assert_allclose(clips[0].timestamps, np.arange(0, 18, 2) / 24, atol=1e-9)
    np.testing.assert_allclose(clips[1].timestamps, np.arange(18, 36, 2) / 24, atol=1e-9)
    first = clips[0]
    assert (first.video, first.video_xxh64, first.fps, first.shot) == ("pan.mp4", file_hash(video)[1], 12, 0)
    assert (first.source_height, first.source_width, first.height, first.width, first.frames) == (48, 96, 32, 64, 9)


def test_the_frames_read_are_those_at_the_timestamps(tmp_path) -> None:
    frames = pan(60)
    video = write(tmp_path / "pan.mp4", frames)
    last = cut(video)[-1]
    read = read_frames(video, last, 48, 96)
    assert last.timestamps[0] == pytest.approx(36 / 24)
    for got, time in zip(read, last.timestamps, strict=True):
        errors = [np.abs(got.astype(float) - frame).mean() for frame in frames]
        assert np.argmin(errors) == round(time * 24)
        assert min(errors) < 4


def test_variable_frame_rate_goes_by_time_not_by_count(tmp_path) -> None:
    # 48 fps for half a second, then 24 fps: counting frames would stretch the first part.
    times = [*(i / 48 for i in range(24)), *(0.5 + i / 24 for i in range(16))]
    clips = cut(write(tmp_path / "vfr.mp4", pan(len(times)), times))
    np.testing.assert_allclose(clips[0].timestamps, np.arange(9) / 12, atol=1e-4)


def test_a_gap_in_the_frames_is_not_filled_by_repeating(tmp_path) -> None:
    times = [i / 24 for i in range(60) if not 6 < i < 14]
    clips = cut(write(tmp_path / "gap.mp4", pan(len(times)), times), CLIP.model_copy(update={"stride": 18}))
    assert [clip.timestamps[0] for clip in clips] == [pytest.approx(1.5)]


def test_no_clip_crosses_a_cut(tmp_path) -> None:
    clips = cut(write(tmp_path / "two.mp4", [*pan(27, seed=1), *pan(27, seed=2)]))
    assert [clip.shot for clip in clips] == [0, 1]
    assert clips[0].timestamps[-1] < 27 / 24 <= clips[1].timestamps[0]
    assert clips[1].clip_id.endswith("-s001-c000")


@pytest.mark.parametrize("position", [1, 39])
def test_a_cut_by_the_first_or_last_frame_is_seen(tmp_path, position) -> None:
    frames = [*pan(position, seed=1), *pan(40 - position, seed=2)]
    assert scan(write(tmp_path / "edge.mp4", frames)).shots == ((0, position), (position, 40))


def test_the_limit_of_clips_per_video_is_kept_and_said(tmp_path, caplog) -> None:
    video = write(tmp_path / "pan.mp4", pan(60))
    with caplog.at_level(logging.WARNING):
        clips = cut(video, CLIP.model_copy(update={"max_clips_per_video": 1}))
    assert len(clips) == 1
    assert "3 clips, the first 1 are kept" in caplog.text


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_rotated_videos_come_out_upright(tmp_path, turns) -> None:
    frames = pan(20)
    video = write(tmp_path / "turned.mp4", [np.rot90(frame, -turns) for frame in frames], turns=turns)
    (clip,) = cut(video)
    assert (clip.source_height, clip.source_width) == (48, 96)
    assert np.abs(read_frames(video, clip, 48, 96)[0].astype(float) - frames[0]).mean() < 4


def test_a_phones_portrait_matrix_turns_clockwise_into_the_portrait_bucket(tmp_path) -> None:
    # What phones write when held upright (a quarter turn clockwise), as FFmpeg lays the matrix out.
    matrix = (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    frames = pan(20)
    video = write(tmp_path / "phone.mp4", frames, matrix=matrix)
    (clip,) = cut(video)
    assert (clip.source_height, clip.source_width, clip.height, clip.width) == (96, 48, 64, 32)
    assert np.abs(read_frames(video, clip, 96, 48)[0].astype(float) - np.rot90(frames[0], -1)).mean() < 4


def test_pixels_that_are_not_square_are_made_square(tmp_path) -> None:
    frames = pan(20)
    video = write(tmp_path / "wide.mp4", [cv2.resize(f, (48, 48)) for f in frames], aspect=Fraction(2))
    (clip,) = cut(video)
    assert (clip.source_height, clip.source_width) == (48, 96)
    assert np.abs(read_frames(video, clip, 48, 96)[0].astype(float) - frames[0]).mean() < 6


@pytest.mark.parametrize("name", ["Ferien am Meer – Übung 3.mp4", "日本の散歩.mp4", "a b  c'$(x).MP4", "-dash.mp4", "%d.mp4"])
def test_unusual_names_work(tmp_path, name) -> None:
    folder = tmp_path / "sub folder"
    folder.mkdir()
    video = write(folder / "plain.mp4", pan(20)).rename(folder / name)
    assert find_videos(tmp_path) == [f"sub folder/{name}"]
    (clip,) = cut_clips(video, tmp_path, CLIP, video_key(f"sub folder/{name}"))
    assert clip.video == f"sub folder/{name}"
    assert read_frames(video, clip, 32, 64).shape == (9, 32, 64, 3)


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mkv", "libx264"), ("a.webm", "libvpx-vp9"), ("a.avi", "mpeg4"), ("a.mov", "libx264")]
)
def test_other_containers_give_the_same_clip(tmp_path, name, codec) -> None:
    frames = pan(20)
    video = write(tmp_path / name, frames, np.arange(20) / 24, codec)
    (clip,) = cut(video)
    np.testing.assert_allclose(np.diff(clip.timestamps), 1 / 12, atol=2e-3)
    assert np.abs(read_frames(video, clip, 48, 96)[3].astype(float) - frames[6]).mean() < 6


# ------------------------------------------------------------------------------------------------------ what is refused


def refusal(path, root=None, clip=CLIP) -> str:
    with pytest.raises(VideoSetAside) as caught:
        cut_clips(path, root or path.parent, clip, "key")
    return str(caught.value)


def test_files_that_are_no_video_are_named_with_their_fault(tmp_path) -> None:
    (tmp_path / "zero.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video at all")
    write_audio(tmp_path / "sound.mp4")
    assert refusal(tmp_path / "zero.mp4") == "zero.mp4: empty file (0 bytes)"
    assert "text.mp4: not a video" in refusal(tmp_path / "text.mp4")
    assert refusal(tmp_path / "sound.mp4") == "sound.mp4: audio only"


def test_a_playlist_named_like_a_video_opens_nothing_else(tmp_path) -> None:
    write(tmp_path / "other.mp4", pan(20))
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile other.mp4\n")
    (tmp_path / "hls.mp4").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother.mp4\n#EXT-X-ENDLIST\n")
    assert "not a video" in refusal(tmp_path / "list.mp4")
    assert "not a video" in refusal(tmp_path / "hls.mp4")


@pytest.mark.parametrize(
    ("name", "options"),
    [("plain.mp4", {}), ("fast.mp4", {"movflags": "faststart"}), ("a.mkv", {})],
    ids=["moov last", "moov first", "mkv"],
)
def test_a_truncated_video_is_refused_even_if_its_start_would_do(tmp_path, name, options) -> None:
    video = write(tmp_path / name, pan(72), options=options)
    assert len(cut(video)) == 4
    whole = video.read_bytes()
    video.write_bytes(whole[: int(0.7 * len(whole))])
    assert f"{name}: truncated" in refusal(video)


def test_damage_in_the_middle_is_refused(tmp_path) -> None:
    video = write(tmp_path / "bad.mp4", pan(72))
    data = bytearray(video.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 600] = bytes(600)
    video.write_bytes(data)
    assert "bad.mp4: damaged" in refusal(video)


def test_too_short_and_too_slow_say_what_was_found_and_needed(tmp_path) -> None:
    short = refusal(write(tmp_path / "short.mp4", pan(10)))
    assert "short.mp4: too short: 10 frames at 24 fps (0.38 s); a clip takes 9 frames at 12 fps (0.67 s)" in short
    slow = refusal(write(tmp_path / "slow.mp4", pan(40), np.arange(40) / 8))
    assert "slow.mp4: too few frames a second: 40 frames at 8 fps" in slow
    assert "too short: 1 frames" in refusal(write(tmp_path / "one.mp4", pan(1)))


def test_a_rate_just_below_the_target_is_not_too_slow(tmp_path) -> None:
    times = np.arange(12) * 1001 / 12000  # 11.988 fps for 12
    assert len(cut(write(tmp_path / "ntsc.mp4", pan(12), times))) == 1


def test_unsafe_paths_are_refused(tmp_path) -> None:
    root = tmp_path / "videos"
    (root / "sub").mkdir(parents=True)
    outside = write(tmp_path / "outside.mp4", pan(20))
    (root / "link.mp4").symlink_to(outside)
    assert "leads out of the videos folder" in refusal(root / "link.mp4", root)
    assert "'..'" in refusal(root / "sub" / ".." / ".." / "outside.mp4", root)
    assert "not inside the videos folder" in refusal(outside, root)
    weird = root / "a\nb.mp4"
    outside.rename(weird)
    assert refusal(weird, root) == "a\\nb.mp4: control or undecodable characters in its path; rename it"


def test_a_replaced_file_is_noticed_when_its_frames_are_read(tmp_path) -> None:
    video = write(tmp_path / "pan.mp4", pan(20))
    (clip,) = cut(video)
    write(video, pan(20), np.arange(20) / 25)
    with pytest.raises(ValueError, match=r"pan\.mp4: no frame at 0\.0833 s .*has changed"):
        read_frames(video, clip, 32, 64)


# ------------------------------------------------------------------------------------------------------ files and keys


def test_only_finished_visible_videos_are_found(tmp_path) -> None:
    wanted = ["b.MP4", "sub/a.mkv", "sub/deep/c.webm"]
    for name in [*wanted, ".hidden.mp4", ".cache/x.mp4", "x.part.mp4", "~tmp.mp4", "a.gt.npz", "note.txt", "a.mp4.part"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert find_videos(tmp_path) == wanted
    with pytest.raises(FileNotFoundError):
        find_videos(tmp_path / "nowhere")


@given(st.lists(st.text(min_size=1), min_size=2, max_size=6, unique=True))
@settings(max_examples=200)
def test_keys_are_safe_and_different(paths) -> None:
    keys = [video_key(path) for path in paths]
    assert len(set(keys)) == len(keys)
    for key in keys:
        assert set(key) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
        assert 10 <= len(key) <= 49
        assert not key.startswith("-")


def test_keys_stay_readable_and_never_change() -> None:
    # These are folder names and partitions of existing data: a new key would orphan both.
    assert video_key("Holiday 2024/Beach Day.MP4") == "holiday-2024-beach-day-" + video_key("Holiday 2024/Beach Day.MP4")[-8:]
    assert video_key("a.mp4") == "a-e6d48eab"
    assert video_key("日本.mp4").startswith("video-")


def test_clips_survive_json_exactly(tmp_path) -> None:
    clips = cut(write(tmp_path / "a.mp4", pan(40), np.arange(40) * 1001 / 24000))
    assert clips_from_json(json.loads(json.dumps(clips_to_json(clips)))) == clips
    broken = clips_to_json(clips)
    broken[0]["bucket"] = broken[0].pop("fps")
    with pytest.raises(ValueError, match=r"missing \['fps'\], unknown \['bucket'\]"):
        clips_from_json(broken)


def test_decoding_can_be_left_early(tmp_path) -> None:
    frames = decode(write(tmp_path / "a.mp4", pan(20)))
    assert next(frames).time == 0
    frames.close()
