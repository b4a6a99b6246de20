"""The guide layout, in and out: imported clips hold the sample's truth, and a round trip loses nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fw_model.config import ClipConfig, Preset, load_preset
from fw_model.data.shard_writer import ShardWriter
from fw_model.data.verify import verify
from fw_model.model.encoders import Encoders
from fw_pipeline.annotate.clips import clips_to_json, cut_clips, read_frames, video_key
from fw_pipeline.annotate.video import decode
from fw_pipeline.guide_layout.exporter import VideoSource, export_guide
from fw_pipeline.guide_layout.importer import ImportPlan, ImportResult, import_guide
from fw_pipeline.guide_layout.metadata import GuideLayoutError
from fw_pipeline.steps.store import Store
from tests.helpers.made_clips import add_clip, make_record
from tests.helpers.made_guide import FRAMES, SIZE, MadeSample, read_all, run_import, write_layout


@pytest.fixture(scope="module")
def preset() -> Preset:
    return load_preset("tiny")


@pytest.fixture(scope="module")
def encoders(preset: Preset) -> Encoders:
    return Encoders.from_config(preset.encoders, preset.model.wan.text_len)


# ---- import


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, MadeSample]]:
    root = tmp_path_factory.mktemp("layout") / "guide"
    samples = {
        "world": MadeSample("world"),
        "camera": MadeSample("camera", points_frame="camera", numbers=19),
        "disparity": MadeSample("disparity", depth_of_disparity=(0.02, 0.05)),
        "smaller": MadeSample("smaller", size=(36, 48), video_size=(96, 128)),
    }
    write_layout(root, *samples.values())
    return root, samples


@pytest.fixture(scope="module")
def imported(layout: tuple[Path, dict[str, MadeSample]], encoders: Encoders, preset: Preset) -> tuple[Path, ImportResult]:
    dataset = layout[0].parent / "dataset"
    return dataset, run_import(layout[0], dataset, encoders, preset, size=(*SIZE, FRAMES))


def test_imported_clips_hold_the_true_depth_poses_and_lens_in_clip_units(
    layout: tuple[Path, dict[str, MadeSample]], imported: tuple[Path, ImportResult]
) -> None:
    clips = read_all(imported[0])
    assert set(clips) == set(layout[1])
    for name, made in layout[1].items():
        row, arrays = clips[name]
        stretch = SIZE[1] / made.size[1]
        assert np.allclose(arrays["intrinsics"][:, :2], made.intrinsics[:2] * stretch, rtol=2e-3, atol=0.05)
        full = np.concatenate([made.w2c, np.tile([[[0, 0, 0, 1]]], (FRAMES, 1, 1))], 1)
        relative = (full @ np.linalg.inv(full[0]))[:, :3]
        relative[:, :, 3] /= row.scale
        assert np.abs(arrays["w2c"] - relative).max() < 1e-5
        if made.size == SIZE:
            known = arrays["depth"] > 0
            assert known.mean() > 0.9
            ratio = arrays["depth"].astype(float) * row.scale / np.where(made.depth > 0, made.depth, 1)
            assert np.abs(ratio[known] - 1).max() < (0.02 if made.depth_of_disparity else 6e-4)
        assert (row.fps, row.prompt) == (pytest.approx(12), f"a corner, {name}")
    assert verify(imported[0]) == []


def test_the_notes_say_how_each_sample_was_read(imported: tuple[Path, ImportResult]) -> None:
    notes = "\n".join(imported[1].notes)
    assert "disparity: depth read as disparity" in notes
    assert "world: depth read as z (" in notes
    assert "camera points" in notes
    assert "lens from a fit to the points" in notes


def test_an_unchanged_sample_is_not_encoded_again(
    layout: tuple[Path, dict[str, MadeSample]], imported: tuple[Path, ImportResult], preset: Preset
) -> None:
    def no_encoders() -> Encoders:
        raise AssertionError("nothing is new")

    before = {name: row.xxh64 for name, (row, _) in read_all(imported[0]).items()}
    plan = ImportPlan(val_percent=50, size=(*SIZE, FRAMES))
    result = import_guide(layout[0], imported[0], no_encoders, preset.encoders, preset.model.wan.text_len, plan)
    assert (result.clips, result.kept) == (4, 4)
    assert {name: row.xxh64 for name, (row, _) in read_all(imported[0]).items()} == before


# ---- export and round trip


@pytest.mark.parametrize("camera_numbers", [12, 19])
def test_a_round_trip_gives_the_same_depth_and_cameras(
    tmp_path: Path,
    layout: tuple[Path, dict[str, MadeSample]],
    imported: tuple[Path, ImportResult],
    encoders: Encoders,
    preset: Preset,
    camera_numbers: Any,
) -> None:
    source = VideoSource(layout[0], Store(tmp_path / "data"))
    assert export_guide(imported[0], tmp_path / "guide", source, camera_numbers=camera_numbers) == 4
    run_import(tmp_path / "guide", tmp_path / "dataset", encoders, preset)
    before, after = read_all(imported[0]), read_all(tmp_path / "dataset")
    assert set(before) == set(after)
    for name, (row, arrays) in before.items():
        again, values = after[name]
        assert np.array_equal(values["depth"], arrays["depth"])  # float16, to the last bit
        assert np.array_equal(values["confidence"], arrays["confidence"])
        for key in ("intrinsics", "w2c"):
            assert np.allclose(values[key], arrays[key], rtol=3e-7, atol=3e-7)  # float32
        assert (again.scale, again.split, again.video, again.prompt) == (row.scale, row.split, row.video, row.prompt)
        assert again.fps == pytest.approx(row.fps)


def test_exported_files_are_plain_float32_in_the_annotators_units(
    tmp_path: Path, layout: tuple[Path, dict[str, MadeSample]], imported: tuple[Path, ImportResult]
) -> None:
    export_guide(imported[0], tmp_path / "guide", VideoSource(layout[0], Store(tmp_path / "data")))
    made = layout[1]["world"]
    depth = np.load(tmp_path / "guide" / "depth" / "world" / "frame_0005.npy", allow_pickle=False)
    points = np.load(tmp_path / "guide" / "points" / "world" / "frame_0005.npy", allow_pickle=False)
    poses = np.loadtxt(tmp_path / "guide" / "camera_params" / "world.txt")
    assert (depth.dtype, depth.shape, points.dtype, points.shape) == (np.float32, SIZE, np.float32, (*SIZE, 3))
    assert poses.shape == (FRAMES, 12)
    assert np.allclose(depth, made.depth[5], rtol=6e-4)
    own = np.einsum("ij,hwj->hwi", poses[5].reshape(3, 4)[:, :3], points) + poses[5].reshape(3, 4)[:, 3]
    assert np.allclose(own[depth > 0][:, 2], depth[depth > 0], rtol=1e-5)
    assert (tmp_path / "guide" / "videos" / "world.mp4").is_file()


def test_pictures_of_the_pipelines_own_clips_are_cut_anew_from_their_videos(tmp_path: Path) -> None:
    MadeSample("long", frames=16, fps=12).write(tmp_path / "made")
    videos, store = tmp_path / "made" / "videos", Store(tmp_path / "data")
    key = video_key("long.mp4")
    config = ClipConfig(frames=5, fps=12, short_side=32, long_side=48, stride=5)
    clips = cut_clips(videos / "long.mp4", videos, config, key)
    assert len(clips) > 1
    with store.writing("clips", key) as folder:
        (folder / "clips.json").write_text(json.dumps(clips_to_json(clips)))
    with ShardWriter(tmp_path / "dataset") as writer:
        for clip in clips:
            add_clip(writer, make_record(clip.clip_id, "long.mp4"))
    export_guide(tmp_path / "dataset", tmp_path / "guide", VideoSource(videos, store))
    for clip in clips:
        wanted = read_frames(videos / "long.mp4", clip, 32, 48).astype(float)
        found = np.stack([frame.rgb() for frame in decode(tmp_path / "guide" / "videos" / f"{clip.clip_id}.mp4")])
        # Brightness: an mp4 keeps colour at half the resolution, which these hard-edged blocks are not made for.
        wanted, found = wanted.mean(-1), found.astype(float).mean(-1)
        assert found.shape == wanted.shape
        assert np.abs(found - wanted).mean() < 0.5 * np.abs(found - np.roll(wanted, 1, 0)).mean()  # these frames, no others


def test_an_export_that_fails_leaves_nothing(tmp_path: Path, imported: tuple[Path, ImportResult]) -> None:
    source = VideoSource(tmp_path / "nowhere", Store(tmp_path / "data"))
    with pytest.raises(GuideLayoutError, match="no video .* --without-videos"):
        export_guide(imported[0], tmp_path / "guide", source)
    assert list(tmp_path.iterdir()) == []
