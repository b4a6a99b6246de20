"""The guide layout's numbers in other people's conventions: named and refused, or read for what they are, never quietly wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fw_model.config import load_preset
from fw_model.model.encoders import Encoders
from fw_pipeline.guide_layout import importer
from fw_pipeline.guide_layout.check import check_sample
from fw_pipeline.guide_layout.conventions import FLIP, inverse, require_given_rows
from fw_pipeline.guide_layout.far import far_value, near
from fw_pipeline.guide_layout.finish import GuideClip, finish, windows
from fw_pipeline.guide_layout.metadata import Entry, SampleError, read_metadata
from fw_pipeline.guide_layout.row_times import frames_of
from tests.helpers.made_guide import FRAMES, SIZE, MadeSample, run_import, write_layout

WRITTEN: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "camera-to-world, OpenCV axes": inverse,
    "world-to-camera, OpenGL axes": lambda w2c: FLIP @ w2c,
    "camera-to-world, OpenGL axes": lambda w2c: inverse(FLIP @ w2c),
}


def only_entry(root: Path) -> Entry:
    (entry,), faults = read_metadata(root)
    assert not faults
    return entry


def made_clip(root: Path) -> GuideClip:
    sample = check_sample(only_entry(root))
    return finish(sample, windows(sample, None)[0])


# ---- rows and points


@pytest.mark.parametrize("frame", ["world", "camera"])
@pytest.mark.parametrize("convention", WRITTEN)
def test_rows_of_another_convention_are_refused_by_its_name(tmp_path: Path, frame: str, convention: str) -> None:
    made = MadeSample("a", points_frame=frame)
    write_layout(tmp_path, made)
    made.write_cameras(tmp_path, WRITTEN[convention](made.w2c))
    with pytest.raises(SampleError, match=f"points/a: .*the rows are {convention}.* world-to-camera, OpenCV axes"):
        check_sample(only_entry(tmp_path))


def test_points_of_other_axes_are_refused_by_their_name(tmp_path: Path) -> None:
    made = MadeSample("a", points_frame="camera")
    write_layout(tmp_path, made)
    for file in (tmp_path / "points" / "a").iterdir():
        np.save(file, np.load(file) @ FLIP.astype(np.float32))
    with pytest.raises(SampleError, match="if the points are in each camera's own frame, the points with OpenGL axes"):
        check_sample(only_entry(tmp_path))


def wall(motion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, Callable[[int], np.ndarray]]:
    """Arguments of `require_given_rows` for a wall that faces a camera moving by motion [T, 3]."""
    made = MadeSample("wall", frames=len(motion))
    points = np.tile((made.rays * 3)[::4, ::4].reshape(1, -1, 3), (len(motion), 1, 1))
    rows = np.concatenate([np.tile(np.eye(3), (len(motion), 1, 1)), -motion[..., None]], 2)
    lens = np.tile([0.8, 0.8 * SIZE[1] / SIZE[0], 0.5, 0.5], (len(motion), 1))
    return points, rows, lens, lambda _: np.full(SIZE, 3.0)


def test_rows_that_nothing_tells_from_others_are_refused() -> None:
    """Sideways along a wall, and back: the depths are the same, the pictures are not."""
    with pytest.raises(ValueError, match="nothing tells clearly whether the rows are world-to-camera, OpenCV axes or the rows"):
        require_given_rows(*wall(np.linspace(0, 1, 9)[:, None] * [1.0, 0, 0]), *SIZE)


def test_conventions_that_come_to_the_same_are_no_rivals() -> None:
    """Less motion than two pixels: inverse rows would move no point by more than the import allows anyway."""
    require_given_rows(*wall(np.linspace(0, 0.05, 9)[:, None] * [1.0, 0, 0]), *SIZE)
    require_given_rows(*wall(np.zeros((9, 3))), *SIZE)


# ---- nothing there


def with_sky(made: MadeSample, value: float) -> MadeSample:
    """The upper third of every map stands for nothing, by the given value of depth."""
    made.depth[:, : SIZE[0] // 3] = value
    return made


@pytest.mark.parametrize("value", [np.inf, np.nan, 1e10, 65535.0, float(np.finfo(np.float16).max), 1000.0, 50.0])
def test_depth_that_stands_for_nothing_is_unknown_and_leaves_scale_and_foreground_alone(tmp_path: Path, value: float) -> None:
    write_layout(tmp_path / "without", with_sky(MadeSample("a"), 0))
    write_layout(tmp_path / "with", with_sky(MadeSample("a"), value))
    wanted, found = made_clip(tmp_path / "without"), made_clip(tmp_path / "with")
    assert np.array_equal(found.depth, wanted.depth)
    assert np.array_equal(found.confidence, wanted.confidence)
    assert found.scale == pytest.approx(wanted.scale, rel=1e-9)
    assert found.quality["valid_fraction"] == wanted.quality["valid_fraction"] < 0.7


def test_integers_at_the_end_of_their_range_are_unknown(tmp_path: Path) -> None:
    write_layout(tmp_path / "without", with_sky(MadeSample("a"), 0))
    made = with_sky(MadeSample("a"), 0)
    write_layout(tmp_path / "with", made)
    for t, file in enumerate(sorted((tmp_path / "with" / "depth" / "a").iterdir())):
        depth = made.depth[t] * 1000
        depth[: SIZE[0] // 3] = 65535
        np.save(file, depth.round().astype(np.uint16))
    wanted, found = made_clip(tmp_path / "without"), made_clip(tmp_path / "with")
    assert found.scale == pytest.approx(wanted.scale, rel=1e-4)
    assert found.quality["valid_fraction"] == wanted.quality["valid_fraction"]


def test_what_is_far_is_told_in_a_single_map_too() -> None:
    """A camera that stands still: no other frame says that the largest value is one that was filled in."""
    for nothing, kind in ((1e10, np.float64), (1e4, np.float32), (np.inf, np.float32), (np.nan, np.float32), (0, np.float32)):
        assert near(np.array([[1, 2, 3], [4, 5, nothing]], kind)).tolist() == [[True] * 3, [True, True, False]]
    for kind in (np.uint8, np.uint16, np.int32):
        top = np.iinfo(kind).max
        assert near(np.array([[top // 4, top // 3, top // 2], [top - 2, top - 1, top]], kind)).tolist() == [
            [True] * 3,
            [True, True, False],
        ]
    assert near(np.array([[1.0, 900.0]])).all()  # a mountain


def test_a_wall_that_keeps_its_distance_is_no_sky() -> None:
    """The largest depth to the last bit in every frame, but the camera only slides along it: a surface may be like that."""
    depth = np.tile(np.r_[np.linspace(1, 2, 80), np.full(20, 9.0)], (5, 1))
    sliding = np.tile(np.eye(3, 4), (5, 1, 1))
    sliding[:, 0, 3] = np.arange(5)
    points = np.random.default_rng(0).normal(size=(5, 100, 3))
    assert far_value(depth, sliding, points) is None
    closing = sliding.copy()
    closing[:, 2, 3] = np.arange(5)
    assert far_value(depth, closing, points) == 9.0


def test_what_the_stored_type_cannot_hold_is_unknown_and_not_part_of_the_scale(tmp_path: Path) -> None:
    """A speck in front of the lens rounds to nothing in clip units: depth, confidence and share agree on that."""
    made = MadeSample("a")
    made.depth[:, 10:14, 10:14] = 1e-6
    write_layout(tmp_path, made)
    clip = made_clip(tmp_path)
    assert not clip.depth[:, 10:14, 10:14].any()
    assert np.array_equal(clip.confidence > 0, clip.depth > 0)
    assert clip.quality["valid_fraction"] == (clip.depth > 0).mean()


# ---- rows with times


VIDEO = tuple(float(t) / 12 for t in range(24))


@pytest.mark.parametrize(
    ("times", "frames"),
    [
        ([3, 4, 5], [3, 4, 5]),
        ([0, 2, 4], [0, 2, 4]),
        ([6 / 12, 7 / 12, 9 / 12], [6, 7, 9]),
        ([500, 583, 667], [6, 7, 8]),  # milliseconds
        ([1_000_000, 1_083_333], [12, 13]),  # microseconds
        (list(range(1, 25)), list(range(24))),  # counted from one
        ([7_300_000 + round(t * 1e6) for t in VIDEO], list(range(24))),  # a piece of a longer film
        (list(range(1200, 1224)), list(range(24))),
    ],
)
def test_rows_with_times_are_matched_to_their_frames(times: list[float], frames: list[int]) -> None:
    assert frames_of(np.array(times, float), VIDEO).tolist() == frames


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([0, 1, 1], "do not ascend: 1 is followed by 1"),
        ([7.3, 7.4, 7.5], "match no frames of the video"),  # fewer rows than frames, on a clock of their own
        ([0, 0.01, 0.02], "match no frames"),
        ([1, 2, 3], "frame numbers from 0 .* or frame numbers from 1"),
    ],
)
def test_rows_whose_frames_cannot_be_known_are_refused(times: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frames_of(np.array(times, float), VIDEO)


def test_a_sample_takes_the_frames_of_the_video_that_its_rows_name(tmp_path: Path) -> None:
    longer = MadeSample("a", frames=20)
    longer.write(tmp_path / "longer")
    made = MadeSample("a", numbers=19)
    write_layout(tmp_path, made)
    (tmp_path / "longer" / "videos" / "a.mp4").replace(tmp_path / "videos" / "a.mp4")
    file = tmp_path / "camera_params" / "a.txt"
    rows = [line.split() for line in file.read_text().splitlines()]
    file.write_text("\n".join(" ".join([str(round((5 + i) / 12 * 1e6)), *row[1:]]) for i, row in enumerate(rows)))
    assert check_sample(only_entry(tmp_path)).times == pytest.approx([(5 + i) / 12 for i in range(FRAMES)], abs=1e-4)
    file.write_text("\n".join(" ".join([str(60 + i / 12), *row[1:]]) for i, row in enumerate(rows)))
    with pytest.raises(SampleError, match=r"camera_params/a.txt: the times of its 9 rows \(60 to .*\) match no frames"):
        check_sample(only_entry(tmp_path))


# ---- text as editors save it


def test_byte_order_marks_line_ends_and_commas_are_read(tmp_path: Path) -> None:
    write_layout(tmp_path, MadeSample("a", numbers=19))
    before = check_sample(only_entry(tmp_path))
    for file in (tmp_path / "metadata.json", tmp_path / "camera_params" / "a.txt"):
        text = file.read_bytes()
        if file.suffix == ".txt":
            text = text.replace(b" ", b", ").replace(b"\n", b"\r\n")
        file.write_bytes(b"\xef\xbb\xbf" + text)
    after = check_sample(only_entry(tmp_path))
    assert np.array_equal(after.w2c, before.w2c)
    assert np.array_equal(after.points.lens, before.points.lens)


# ---- imports of before


def test_what_an_older_version_imported_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = load_preset("tiny")
    encoders = Encoders.from_config(preset.encoders, preset.model.wan.text_len)
    write_layout(tmp_path / "guide", MadeSample("a"))
    with monkeypatch.context() as older:
        older.setattr(importer, "MADE_BY", "guide-layout:1")
        run_import(tmp_path / "guide", tmp_path / "dataset", encoders, preset)
    result = run_import(tmp_path / "guide", tmp_path / "dataset", encoders, preset)
    assert (result.clips, result.kept) == (1, 0)
    assert run_import(tmp_path / "guide", tmp_path / "dataset", encoders, preset).kept == 1
