"""The inventory says what lies in a videos folder, and nothing of it goes unseen; equal bytes are kept once."""

from __future__ import annotations

import os
import shutil
import unicodedata
from pathlib import Path

import av
import numpy as np
import pytest

from fw_model.config import ClipConfig, ConfigError, load_preset
from fw_model.errors import MissingInput
from fw_pipeline import inventory
from fw_pipeline.annotate.clips import cut_clips, find_videos, read_frames, video_key
from fw_pipeline.annotate.folder import Links, list_folder
from fw_pipeline.annotate.lens import calibration_files
from fw_pipeline.annotate.types import VideoSetAside
from fw_pipeline.annotate.video import decode
from fw_pipeline.steps.inventory import equal_bytes, take_inventory
from fw_pipeline.steps.pipeline import Pipeline
from fw_pipeline.steps.settings import Settings, settings_from_env
from tests.helpers.made_videos import pan, write

CLIP = ClipConfig(frames=9, fps=12, short_side=32, long_side=64, stride=9)


def put(root: Path, *names: str, content: bytes | None = None) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode() if content is None else content)


def counts(root: Path, **more: object) -> dict[str, int]:
    return take_inventory(Settings(videos=root, data=root.parent / "data", **more)).numbers


# ---- what is there


def test_everything_in_the_folder_is_read_or_counted_by_its_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "videos"
    put(root, "a.mp4", "sub/b.MTS", "sub/c.flv", "d.rmvb", "e.vob", "f.part.mp4", "g.mp4.part", "README.txt")
    put(root, "sub/.Trash-1000/x.mp4", "@eaDir/x.mp4", "$RECYCLE.BIN/x.mp4", "lost+found/x.mp4", ".snapshot/x.mp4")
    put(root, "a.txt", content=b"a walk")
    put(root, "sub/b.camera.json", "sub/subtitles.srt", "captions.json", "prompts.txt")
    put(tmp_path / "elsewhere", "y.mp4")
    (root / "more").symlink_to(tmp_path / "elsewhere")
    assert counts(root) == {
        "videos": 3,
        "with a prompt": 1,
        "linked folders not entered": 1,
        "of endings that are not read": 2,
        "still being written": 2,
        "trash and snapshot folders left out": 5,
        "texts that are not read": 3,
    }
    assert inventory.main([str(root)]) == 0
    out = capsys.readouterr().out
    assert f"{root}: 3 videos, 1 with a prompt" in out
    assert "3 texts that are not read: captions.json, prompts.txt, sub/subtitles.srt" in out
    assert "1 linked folders not entered: more; FW_LINKED_FOLDERS=1" in out


def test_no_folder_is_said_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inventory.main([str(tmp_path / "nowhere")]) == 1
    assert "no videos folder at" in capsys.readouterr().err
    with pytest.raises(MissingInput, match="is a file"):
        take_inventory(Settings(videos=Path(__file__)))


def test_a_folder_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, "a.mp4", "closed/b.mp4")
    real = os.scandir

    def scandir(path: str | os.PathLike[str]) -> object:  # chmod keeps nothing from root
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert list_folder(tmp_path).closed == {"closed": "Permission denied"}
    assert find_videos(tmp_path) == ["a.mp4"]
    assert "closed: cannot be read (Permission denied)" in caplog.text


def test_captions_in_layouts_that_are_read_are_not_among_the_unread(tmp_path: Path) -> None:
    root = tmp_path / "videos"
    put(root, "a/x.mp4", "b/x.mp4", "c/x.mp4", "d/x.mp4", "e/x.mp4")
    put(root, "a/x.mp4.txt", content=b"one")
    put(root, "b/metadata.csv", content=b"\xef\xbb\xbffile_name;text\r\nx.mp4;two\r\n")
    put(root, "c/metadata.jsonl", content=b'{"file_name": "x.mp4", "text": "three"}\n')
    put(root, "d/videos.txt", content=b"x.mp4\r\n")
    put(root, "d/captions.txt", content=b"four\r\n")
    put(root, "e/metadata.csv", content=b"id,score\n1,2\n")
    found = take_inventory(Settings(videos=root))
    assert (found.prompts, found.unread) == (4, ["e/metadata.csv"])


def test_names_are_compared_in_one_unicode_form(tmp_path: Path) -> None:
    root = tmp_path / "videos"
    put(root, unicodedata.normalize("NFD", "café.mp4"))
    put(root, unicodedata.normalize("NFC", "café.txt"), content=b"a cafe")
    assert counts(root) == {"videos": 1, "with a prompt": 1}
    put(root, unicodedata.normalize("NFC", "café.camera.json"))
    assert len(calibration_files(root / find_videos(root)[0])) == 1


# ---- links


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A videos folder with a file linked from a hub's cache and a linked folder that links back to itself."""
    root, cache = tmp_path / "videos", tmp_path / "cache"
    (cache / "blobs").mkdir(parents=True)
    write(cache / "blobs" / "5a3f.mp4", pan(20)).rename(cache / "blobs" / "5a3f")
    (tmp_path / "shelf").mkdir()
    write(tmp_path / "shelf" / "b.mp4", pan(20, seed=1))
    (tmp_path / "shelf" / "again").symlink_to(tmp_path / "shelf")
    put(root, "c.mp4")
    (root / "a.mp4").symlink_to(cache / "blobs" / "5a3f")
    (root / "shelf").symlink_to(tmp_path / "shelf")
    (root / "self").symlink_to(root)
    return root


def test_links_out_of_the_folder_are_followed_only_when_asked(hub: Path) -> None:
    assert find_videos(hub) == ["a.mp4", "c.mp4"]
    assert find_videos(hub, linked_folders=True) == ["a.mp4", "c.mp4", "shelf/b.mp4"]
    assert counts(hub)["linked from outside"] == 1
    for name in ("a.mp4", "shelf/b.mp4"):
        with pytest.raises(VideoSetAside, match="link"):
            cut_clips(hub / name, hub, CLIP, video_key(name))
        assert cut_clips(hub / name, hub, CLIP, video_key(name), Links(folders=True, files=True))
    settings = Settings(videos=hub, linked_folders=True, linked_files=True)
    assert take_inventory(settings).numbers == {"videos": 3, "with a prompt": 0}


# ---- equal bytes


def test_equal_bytes_are_found_whatever_their_names_and_only_they(tmp_path: Path) -> None:
    put(tmp_path, "b.mp4", "z/a.mkv", "c.mp4", content=b"x" * 100_000)
    put(tmp_path, "same-length.mp4", content=b"x" * 99_999 + b"y")
    put(tmp_path, "empty.mp4", "void.mp4", content=b"")
    (tmp_path / "gone.mp4").symlink_to("nowhere")
    assert equal_bytes(tmp_path, find_videos(tmp_path)) == {"c.mp4": "b.mp4", "z/a.mkv": "b.mp4"}


def test_a_copy_is_set_aside_until_the_other_is_gone(tmp_path: Path) -> None:
    root = tmp_path / "videos"
    root.mkdir()
    write(root / "one.mp4", pan(20))
    shutil.copy(root / "one.mp4", root / "two.mp4")
    overrides = ("clip.frames=5", "clip.short_side=32", "clip.long_side=64", "clip.stride=5")
    settings = Settings(videos=root, data=tmp_path / "data", overrides=overrides)
    one, two = video_key("one.mp4"), video_key("two.mp4")
    pipeline = Pipeline(settings)
    assert pipeline.run("clips", one).set_aside is None
    assert pipeline.run("clips", two).set_aside == "two.mp4: the same bytes as one.mp4, and kept once"
    (root / "one.mp4").unlink()
    again = Pipeline(settings)
    assert again.is_stale("clips", two)
    assert again.run("clips", two).set_aside is None


# ---- endings of cameras and older recorders


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.ts", "libx264"),
        ("a.mts", "mpeg2video"),
        ("a.m2ts", "libx264"),
        ("a.mpg", "mpeg2video"),
        ("a.mpeg", "mpeg1video"),
        ("a.3gp", "mpeg4"),
        ("a.wmv", "wmv2"),
        ("a.flv", "flv"),
    ],
)
def test_endings_of_cameras_and_recorders_are_read_frame_by_frame(tmp_path: Path, name: str, codec: str) -> None:
    shown = pan(50)
    video = write_plain(tmp_path / name, shown, codec)
    frames = list(decode(video))
    assert len(frames) == 50
    np.testing.assert_allclose(np.diff([frame.time for frame in frames]), 1 / 25, atol=2e-3)
    clips = cut_clips(video, tmp_path, CLIP, "key")
    wanted = round((clips[-1].timestamps[2] - frames[0].time) * 25)
    found = read_frames(video, clips[-1], 48, 96)[2].astype(float)
    errors = [np.abs(found - shown[i]).mean() for i in range(50)]
    assert int(np.argmin(errors)) == wanted


def test_a_transport_stream_is_known_by_its_bytes(tmp_path: Path) -> None:
    video = write_plain(tmp_path / "a.ts", pan(20), "libx264").rename(tmp_path / "named.mp4")
    assert len(list(decode(video))) == 20


def write_plain(path: Path, frames: list[np.ndarray], codec: str) -> Path:
    """At 25 fps, which every one of these codecs knows."""
    with av.open(str(path), "w", format={".mts": "mpegts", ".m2ts": "mpegts", ".mpeg": "mpeg"}.get(path.suffix)) as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
        for index, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = index
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


# ---- misspelt names


def test_misspelt_names_are_told_with_the_nearest_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "videos", "park-walk.mp4")
    pipeline = Pipeline(Settings(videos=tmp_path / "videos", data=tmp_path / "data"))
    key = video_key("park-walk.mp4")
    with pytest.raises(MissingInput, match=f"did you mean {key}"):
        pipeline.video_path(key.replace("walk", "wlak"))
    with pytest.raises(ConfigError, match="did you mean geometry"):
        settings_from_env(geomtry="tracks")
    with pytest.raises(ConfigError, match=r"stage1\.stpes: .*did you mean steps"):
        load_preset("tiny", ["stage1.stpes=3"])
    monkeypatch.setenv("FW_VIDEO", "x")
    with pytest.raises(ConfigError, match="FW_VIDEO: no such variable; did you mean FW_VIDEOS"):
        settings_from_env()
