"""The clips of a video have one lens: the one written down beside it, or the one they share."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fw_model.config import ClipConfig
from fw_model.data.online import encode_video
from fw_pipeline.annotate.clips import clips_from_json, clips_to_json, cut_clips, known_intrinsics, read_frames
from fw_pipeline.annotate.lens import Lens
from fw_pipeline.annotate.types import Clip, ClipGeometry, ClipSetAside, Measured, VideoSetAside
from fw_pipeline.annotate.whole_video import WholeVideo

LENS = Lens(fx=60, fy=60, cx=40, cy=24, height=48, width=80)
READ: list[str] = []


def clip(name: str, lens: Lens | None = None) -> Clip:
    return Clip(name, "v.mp4", "0", 0, 12.0, (0.0,), 48, 80, 48, 80, lens)


def read(one: Clip) -> np.ndarray:
    READ.append(one.clip_id)
    return np.full((1, 48, 80, 3), ord(one.clip_id), np.uint8)


class Engine:
    """A SharedLensEngine whose solutions are (the clip's letter, focal length given, shared or None)."""

    name, version = "test", "1"

    def estimate(self, frames: np.ndarray, intrinsics: np.ndarray | None = None) -> ClipGeometry:
        raise AssertionError("a video's clips are solved before any is finished")

    def solve(self, frames: np.ndarray, intrinsics: np.ndarray | None = None) -> Any:
        letter = chr(frames[0, 0, 0, 0])
        if letter == "x":
            raise ClipSetAside("too few tracks")
        return letter, None if intrinsics is None else intrinsics[0, 0]

    def share_lens(self, solutions: Sequence[Any]) -> list[Any]:
        return [ClipSetAside("another lens") if letter == "z" else (letter, 99.0) for letter, _ in solutions]

    def measured(self, solution: Any) -> Measured:
        return Measured({"focal": solution[1] or 0.0}, "mixed")

    def finish(self, frames: np.ndarray, solution: Any) -> Any:
        if solution[0] == "w":
            raise ClipSetAside("ambiguous")
        return solution


def test_clips_share_a_lens_and_one_that_is_set_aside_takes_no_other_with_it() -> None:
    READ.clear()
    clips = [clip(name) for name in "abxzw"]
    whole = WholeVideo(Engine(), clips, read)  # type: ignore[arg-type]
    for name in "ab":
        _, geometry, measured = whole.estimate(clip(name))
        assert geometry == (name, 99.0)
        assert measured == Measured({"focal": 99.0}, "mixed")
    for name, reason, focal in (("x", "too few", None), ("z", "another lens", 0.0), ("w", "ambiguous", 99.0)):
        with pytest.raises(ClipSetAside, match=reason) as raised:
            whole.estimate(clip(name))
        assert raised.value.measured.numbers.get("focal") == focal
    assert max(READ.count(name) for name in READ) == 2  # to be solved and to be finished


def test_a_lens_beside_the_video_is_taken_as_it_is() -> None:
    whole = WholeVideo(Engine(), [clip("a", LENS), clip("b")], read)  # type: ignore[arg-type]
    assert whole.estimate(clip("a", LENS))[1] == ("a", 60.0)
    assert whole.estimate(clip("b"))[1] == ("b", 99.0)


def test_an_engine_without_solutions_gets_the_known_lens() -> None:
    class Plain:
        name, version = "plain", "1"

        def estimate(self, frames: np.ndarray, intrinsics: np.ndarray | None = None) -> Any:
            return None if intrinsics is None else intrinsics[0, 0]

    for one, expected in ((clip("a", LENS), 60.0), (clip("a"), None)):
        assert WholeVideo(Plain(), [one], read).estimate(one)[1:] == (expected, Measured())  # type: ignore[arg-type]


CONFIG = ClipConfig(frames=5, fps=12, short_side=96, long_side=160, stride=5)


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """A smooth picture, lossless, so that a pixel can be looked for between its neighbours."""
    y, x = np.mgrid[:96, :160]
    picture = np.stack([x * 1.5, y * 2.5, 255 - x * 0.7 - y], -1).clip(0, 255).astype(np.uint8)
    path = tmp_path / "a.mp4"
    path.write_bytes(encode_video(np.repeat(picture[None], 20, 0), 12).tobytes())
    return path


def test_frames_are_read_through_the_pinhole_of_a_calibration(video: Path) -> None:
    plain = cut_clips(video, video.parent, CONFIG, "key")[0]
    (video.parent / "a.camera.json").write_text(json.dumps({"fx": 110, "k1": -0.2}), encoding="utf-8")
    calibrated = cut_clips(video, video.parent, CONFIG, "key")[0]
    assert clips_from_json(json.loads(json.dumps(clips_to_json([plain, calibrated])))) == [plain, calibrated]
    assert known_intrinsics(plain, 48, 80) is None
    assert calibrated.lens is not None
    pinhole, map_x, map_y = calibrated.lens.undistortion()
    found = known_intrinsics(calibrated, 48, 80)
    assert found is not None
    np.testing.assert_allclose(found[0, 0], pinhole.fx / 2)
    before, after = read_frames(video, plain, 96, 160)[0], read_frames(video, calibrated, 96, 160)[0]
    assert np.abs(before.astype(int) - after).max() > 10
    source = before[map_y.round().astype(int), map_x.round().astype(int)]
    assert np.abs(after.astype(int) - source).max() <= 4  # half a pixel of its slope, and rounding


def test_a_calibration_that_cannot_be_used_sets_its_video_aside(video: Path) -> None:
    (video.parent / "a.camera.json").write_text('{"fx": 0.8}', encoding="utf-8")
    with pytest.raises(VideoSetAside, match=r"a\.mp4: its calibration cannot be used: a\.camera\.json: fx: 0\.8"):
        cut_clips(video, video.parent, CONFIG, "key")
