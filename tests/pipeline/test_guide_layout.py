"""The guide layout: what its files mean is found out, what is wrong with them is listed."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fw_model.config import Preset, load_preset
from fw_model.data.manifest import read_manifest
from fw_model.data.verify import verify
from fw_model.model.encoders import Encoders
from fw_pipeline.guide_layout.__main__ import main
from fw_pipeline.guide_layout.check import check_sample
from fw_pipeline.guide_layout.finish import windows
from fw_pipeline.guide_layout.importer import BadSamplesError
from fw_pipeline.guide_layout.metadata import Entry, GuideLayoutError, SampleError, read_metadata
from tests.helpers.made_clips import pack
from tests.helpers.made_guide import FRAMES, SIZE, MadeSample, run_import, write_layout


@pytest.fixture(scope="module")
def preset() -> Preset:
    return load_preset("tiny")


@pytest.fixture(scope="module")
def encoders(preset: Preset) -> Encoders:
    return Encoders.from_config(preset.encoders, preset.model.wan.text_len)


def only_entry(root: Path) -> Entry:
    (entry,), faults = read_metadata(root)
    assert not faults
    return entry


# ---- metadata


@pytest.mark.parametrize(
    "wrap",
    [
        lambda entries: entries,
        lambda entries: {"videos": entries},
        lambda entries: {"samples": entries},
        lambda entries: {"data": entries, "version": 1},
        lambda entries: {entry["video_id"]: {k: v for k, v in entry.items() if k != "video_id"} for entry in entries},
    ],
)
def test_metadata_is_read_in_all_its_variants(tmp_path: Path, wrap: Any) -> None:
    raw = [{"video_id": "a", "caption": "one", "num_frames": 9}, {"video_id": "b", "caption": "two"}]
    (tmp_path / "metadata.json").write_text(json.dumps(wrap(raw)))
    entries, faults = read_metadata(tmp_path)
    assert not faults
    assert [(e.sample_id, e.prompt, e.frames) for e in entries] == [("a", "one", 9), ("b", "two", None)]
    assert entries[0].video == tmp_path / "videos" / "a.mp4"
    assert entries[0].depth == tmp_path / "depth" / "a"


def test_other_names_of_keys_are_understood(tmp_path: Path) -> None:
    raw = [{"path": "v/x.mp4", "text": " t ", "depth_paths": ["d/0.npy"], "points_path": "p", "camera_path": "c.txt", "fps": 16}]
    (tmp_path / "metadata.json").write_text(json.dumps(raw))
    entry = only_entry(tmp_path)
    assert (entry.sample_id, entry.prompt, entry.fps) == ("x", "t", 16.0)
    assert entry.depth == (tmp_path / "d/0.npy",)
    assert (entry.points, entry.camera) == (tmp_path / "p", tmp_path / "c.txt")


@pytest.mark.parametrize("raw", ["{}", "[]", "3", '{"videos": 1}', "{", '{"videos": [], "data": []}'])
def test_what_is_no_metadata_is_refused(tmp_path: Path, raw: str) -> None:
    (tmp_path / "metadata.json").write_text(raw)
    with pytest.raises(GuideLayoutError, match="metadata.json"):
        read_metadata(tmp_path)


def test_all_bad_entries_are_listed_at_once(tmp_path: Path) -> None:
    (tmp_path / "link.mp4").symlink_to("/etc/hostname")
    raw = [
        {"video_id": "up", "video_path": "../x.mp4"},
        {"video_id": "root", "camera_path": "/etc/passwd"},
        {"video_id": "link", "video_path": "link.mp4"},
        {"video_id": "bad/name"},
        {"video_id": "twice"},
        {"video_id": "twice"},
        {"video_id": "many", "num_frames": "nine", "fps": -1, "caption": 3},
        "text",
    ]
    (tmp_path / "metadata.json").write_text(json.dumps(raw))
    entries, faults = read_metadata(tmp_path)
    assert [entry.sample_id for entry in entries] == ["twice"]
    assert [fault.sample for fault in faults] == ["up", "root", "link", "bad/name", "twice", "many", "entry 7"]
    assert all("leads out of the folder" in fault.reason for fault in faults[:3])
    assert all(word in faults[5].reason for word in ("frames", "fps", "prompt"))


# ---- what the numbers mean


@pytest.mark.parametrize("numbers", [12, 19])
@pytest.mark.parametrize("frame", ["world", "camera"])
def test_points_in_the_world_and_in_each_camera_are_told_apart(tmp_path: Path, frame: str, numbers: int) -> None:
    made = MadeSample("a", points_frame=frame, numbers=numbers)
    write_layout(tmp_path, made)
    sample = check_sample(only_entry(tmp_path))
    assert sample.points.frame == frame
    assert sample.points.error < 0.01
    height, width = SIZE
    k = made.intrinsics
    lens = [k[0, 0] / width, k[1, 1] / height, 0.5, 0.5]
    assert np.allclose(sample.points.lens, lens, atol=1e-4)
    assert sample.depth.kind == "z"


def test_points_that_fit_neither_frame_are_refused_with_both_errors(tmp_path: Path) -> None:
    made = MadeSample("a", numbers=19)
    write_layout(tmp_path, made)
    shifted = made.w2c.copy()
    shifted[:, :, 3] += [1.0, 0, 0]
    made.write_cameras(tmp_path, shifted)
    with pytest.raises(SampleError, match=r"points/a: .*world points \(\d+\.\d+ px.*own camera \(\d+\.\d+ px"):
        check_sample(only_entry(tmp_path))


def test_camera_to_world_rows_are_recognised_in_the_refusal(tmp_path: Path) -> None:
    made = MadeSample("a", numbers=19)
    write_layout(tmp_path, made)
    rotation = made.w2c[:, :, :3].transpose(0, 2, 1)
    made.write_cameras(tmp_path, np.concatenate([rotation, -rotation @ made.w2c[:, :, 3:]], 2))
    with pytest.raises(SampleError, match="if the rows are camera-to-world"):
        check_sample(only_entry(tmp_path))


def test_one_wrong_pose_is_found(tmp_path: Path) -> None:
    made = MadeSample("a", numbers=19)
    write_layout(tmp_path, made)
    wrong = made.w2c.copy()
    wrong[4, :, 3] += 0.5
    made.write_cameras(tmp_path, wrong)
    with pytest.raises(SampleError, match="frame 4 "):
        check_sample(only_entry(tmp_path))


def test_auto_tells_disparity_from_depth_and_says_so(tmp_path: Path) -> None:
    write_layout(tmp_path, MadeSample("a", depth_of_disparity=(0.02, 0.05)))
    sample = check_sample(only_entry(tmp_path))
    assert sample.depth.kind == "disparity"
    assert "with 1/z 1.000" in sample.depth.why
    with pytest.raises(SampleError, match="is not z of these points"):
        check_sample(only_entry(tmp_path), "z")


def test_depth_in_another_unit_than_the_points_is_brought_to_theirs(tmp_path: Path) -> None:
    write_layout(tmp_path, MadeSample("a", depth_unit=0.001))
    assert check_sample(only_entry(tmp_path)).depth.unit == pytest.approx(0.001, rel=1e-4)


def test_depth_that_has_nothing_to_do_with_the_points_is_refused(tmp_path: Path) -> None:
    write_layout(tmp_path, MadeSample("a"))
    rng = np.random.default_rng(0)
    for file in (tmp_path / "depth" / "a").iterdir():
        np.save(file, rng.uniform(1, 2, SIZE).astype(np.float32))
    with pytest.raises(SampleError, match="neither z-depth nor disparity"):
        check_sample(only_entry(tmp_path))


# ---- bad samples


def damage(root: Path) -> dict[str, str]:
    """Spoil one file of each sample a..k; returns sample -> what its fault must say."""

    def maps(kind: str, name: str, frame: int = 3) -> Path:
        return root / kind / name / f"frame_{frame:04d}.npy"

    maps("depth", "a").unlink()
    np.save(maps("depth", "b"), np.ones((5, 5), np.float32))
    np.save(maps("points", "c"), np.full((*SIZE, 3), np.nan, np.float32))
    (root / "camera_params" / "d.txt").write_text("one two three\n")
    np.save(maps("depth", "e"), np.array([{"a": 1}], object), allow_pickle=True)
    maps("points", "f").write_bytes(pickle.dumps([1, 2]))
    data = maps("points", "g").read_bytes()
    maps("points", "g").write_bytes(data[: len(data) // 2])
    (root / "videos" / "h.mp4").write_bytes(b"no video")
    cameras = root / "camera_params" / "i.txt"
    cameras.write_text("\n".join(cameras.read_text().splitlines()[:-1]))
    np.save(maps("depth", "j"), np.full(SIZE, -1, np.float32))
    maps("points", "k").unlink()
    maps("points", "k").symlink_to("/etc/hostname")
    return {
        "a": "depth/a/frame_0003.npy: missing",
        "b": "depth/b/frame_0003.npy: 5x5, but",
        "c": "points/c/frame_0003.npy: 9216 values are NaN",
        "d": "camera_params/d.txt: 1: could not convert string",
        "e": "depth/e/frame_0003.npy: a pickled npy",
        "f": "points/f/frame_0003.npy: a pickled npy",
        "g": "points/g/frame_0003.npy: not a whole npy file",
        "h": "videos/h.mp4: not a video",
        "i": "camera_params/i.txt: 8 poses, but metadata.json says 9 frames",
        "j": "depth/j/frame_0003.npy: negative depth",
        "k": "points/k/frame_0003.npy: a link that leads out",
    }


def test_bad_samples_are_all_listed_and_nothing_is_written_until_they_may_be_skipped(
    tmp_path: Path, encoders: Encoders, preset: Preset
) -> None:
    names = "abcdefghijk"
    good = [MadeSample("x"), MadeSample("y")]
    write_layout(tmp_path / "guide", *(MadeSample(n, entry={"num_frames": FRAMES}) for n in names), *good)
    expected = damage(tmp_path / "guide")
    dataset = tmp_path / "dataset"
    with pytest.raises(BadSamplesError, match="11 of 13 samples are bad, nothing was written") as caught:
        run_import(tmp_path / "guide", dataset, encoders, preset)
    assert {fault.sample for fault in caught.value.faults} == set(names)
    for name, words in expected.items():
        assert f"{name}: {words}" in str(caught.value)
    assert not dataset.exists()

    result = run_import(tmp_path / "guide", dataset, encoders, preset, skip_bad=True)
    rows = {row.clip_id: row for row in read_manifest(dataset)}
    assert result.clips == 2
    assert {name for name, row in rows.items() if not row.quarantine} == {"x", "y"}
    assert "a pickled npy" in rows["e"].quarantine
    assert verify(dataset) == []


def test_a_sample_found_bad_late_leaves_the_dataset_as_it_was(tmp_path: Path, encoders: Encoders, preset: Preset) -> None:
    """Depth that flickers by less than the points allow: that the frames disagree is seen only when the clip is made."""
    write_layout(tmp_path / "guide", MadeSample("a"), MadeSample("b"))
    for t, file in enumerate(sorted((tmp_path / "guide" / "depth" / "b").iterdir())):
        np.save(file, np.load(file) * np.float32(1.08 if t % 2 else 0.92))
    with pytest.raises(BadSamplesError, match="neighbouring frames disagree"):
        run_import(tmp_path / "guide", tmp_path / "dataset", encoders, preset)
    assert not (tmp_path / "dataset").exists()
    assert run_import(tmp_path / "guide", tmp_path / "dataset", encoders, preset, skip_bad=True).clips == 1


def test_a_dataset_of_other_origin_is_not_replaced(tmp_path: Path, encoders: Encoders, preset: Preset) -> None:
    pack(tmp_path / "dataset", {"v1": "train"})
    write_layout(tmp_path / "guide", MadeSample("a"))
    with pytest.raises(GuideLayoutError, match="not imported from a guide layout"):
        run_import(tmp_path / "guide", tmp_path / "dataset", encoders, preset)
    assert [row.clip_id for row in read_manifest(tmp_path / "dataset")] == ["v1"]


# ---- sizes


def test_a_size_that_no_clip_has_is_refused_with_the_nearest(tmp_path: Path) -> None:
    write_layout(tmp_path, MadeSample("a", frames=8, size=(40, 64), video_size=(40, 64)))
    sample = check_sample(only_entry(tmp_path))
    with pytest.raises(ValueError, match="nearest: --size 32x64x5"):
        windows(sample, None)
    with pytest.raises(ValueError, match="8 frames, a clip takes 9; nearest: 5"):
        windows(sample, (32, 64, 9))


def test_longer_samples_are_cut_into_clips_of_the_size(tmp_path: Path) -> None:
    write_layout(tmp_path, MadeSample("a", frames=11))
    found = windows(check_sample(only_entry(tmp_path)), (32, 48, 5))
    assert [(w.clip_id, w.first) for w in found] == [("a-c000", 0), ("a-c001", 5)]


def test_files_may_be_counted_from_one(tmp_path: Path) -> None:
    write_layout(tmp_path, MadeSample("a", first_number=1))
    assert check_sample(only_entry(tmp_path)).depth_files[0].name == "frame_0001.npy"


# ---- command line


def test_the_command_line_imports_exports_and_reports_honestly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FW_PROFILE", "laptop")
    monkeypatch.setenv("FW_DATA", str(tmp_path / "data"))
    write_layout(tmp_path / "guide", MadeSample("a"), MadeSample("b"))
    (tmp_path / "guide" / "camera_params" / "b.txt").unlink()
    arguments = ["import", str(tmp_path / "guide"), str(tmp_path / "dataset"), "--size", "32x48x9"]
    assert main(arguments) == 1
    assert "b: camera_params/b.txt: missing" in capsys.readouterr().err
    assert main([*arguments, "--skip-bad"]) == 0
    out = capsys.readouterr().out
    assert "a: depth read as z (correlation with the points' z 1.000" in out
    assert "1 clips of 2 samples (0 unchanged), 1 with z-depth, 1 left out" in out
    assert main(["export", str(tmp_path / "dataset"), str(tmp_path / "out"), "--videos", str(tmp_path / "guide")]) == 0
    assert main(["export", str(tmp_path / "dataset"), str(tmp_path / "out")]) == 1
    with pytest.raises(SystemExit, match="2"):
        main(["import", str(tmp_path), str(tmp_path), "--size", "big"])
