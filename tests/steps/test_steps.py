"""The steps behind the assets: what is skipped, what is set aside, what fails, what is packed. Geometry comes from an oracle."""

import os
from pathlib import Path

import numpy as np
import pytest

from fw_model.config import ConfigError
from fw_model.data.manifest import read_manifest, read_texts
from fw_model.data.online import decode_video
from fw_model.data.shard_reader import ShardReader
from fw_model.data.verify import verify
from fw_model.errors import MissingInput
from fw_pipeline.annotate import clips as clip_io
from fw_pipeline.annotate.types import ClipGeometry
from fw_pipeline.steps import packing as packing_module
from fw_pipeline.steps import pipeline as steps_module
from fw_pipeline.steps.packing import pack
from fw_pipeline.steps.pipeline import Pipeline
from fw_pipeline.steps.review import consistency_faults, truth_errors
from fw_pipeline.steps.settings import settings_from_env
from tests.helpers.oracle import STEPS, Oracle, run_all


@pytest.fixture
def pipeline(environment: Path) -> Pipeline:
    pipeline = Pipeline(settings_from_env(annotation_long_side=448))  # the default: the bars are for it
    pipeline.__dict__["geometry_engine"] = Oracle(pipeline)
    return pipeline


def test_the_truth_passes_through_every_step_unharmed(pipeline: Pipeline) -> None:
    run_all(pipeline)
    for numbers in truth_errors(pipeline).values():
        assert numbers["ate_percent"] < 0.01
        assert numbers["absrel"] < 0.003  # float16 on disk, and sampling between pixels
        assert numbers["auc30"] > 0.99
        assert numbers["valid_fraction"] > 0.99
    assert consistency_faults(pipeline) == {}
    assert pack(pipeline).clips == 2


def test_what_is_done_is_not_done_again_until_something_it_depends_on_changes(pipeline: Pipeline) -> None:
    run_all(pipeline)
    engine = pipeline.geometry_engine
    assert isinstance(engine, Oracle)
    run_all(pipeline)
    assert engine.calls == 2
    engine.version = "2"
    key = next(iter(pipeline.videos))
    assert pipeline.is_stale("geometry", key)
    pipeline.run("geometry", key)
    assert engine.calls == 3
    assert pipeline.is_stale("depth", key)
    assert not pipeline.is_stale("latents", key)


def test_a_replaced_video_makes_everything_after_it_stale(pipeline: Pipeline) -> None:
    run_all(pipeline)
    (key, video), (_, other) = pipeline.videos.items()
    path = pipeline.settings.videos / video
    path.write_bytes((pipeline.settings.videos / other).read_bytes())
    fresh = Pipeline(pipeline.settings)
    assert fresh.is_stale("clips", key)
    before = fresh.fingerprint("latents", key)
    fresh.run("clips", key)
    assert fresh.fingerprint("latents", key) != before


def test_a_rejected_clip_is_named_in_the_manifest_and_the_rest_is_packed(pipeline: Pipeline) -> None:
    first = next(iter(pipeline.videos.values()))
    engine = pipeline.geometry_engine
    assert isinstance(engine, Oracle)
    engine.refuse = first
    run_all(pipeline)
    result = pack(pipeline)
    assert result.clips == 1
    assert list(result.set_aside.values()) == ["the camera does not move"]
    rows = {row.video: row for row in read_manifest(pipeline.store.dataset)}
    assert rows[first].quarantine == "the camera does not move"
    assert not (pipeline.store.folder("depth", next(iter(pipeline.videos))) / f"{rows[first].clip_id}.npz").exists()


def test_a_fault_of_the_engine_is_no_quarantine_and_keeps_the_old_result(pipeline: Pipeline) -> None:
    run_all(pipeline)
    key = next(iter(pipeline.videos))
    before = pipeline.store.done("geometry", key)

    class Broken(Oracle):
        def estimate(self, frames: np.ndarray, intrinsics: np.ndarray | None = None) -> ClipGeometry:
            raise MemoryError("out of memory")

    pipeline.__dict__["geometry_engine"] = Broken(pipeline, version="3")
    with pytest.raises(MemoryError):
        pipeline.run("geometry", key)
    assert pipeline.store.done("geometry", key) == before


def test_a_step_without_its_input_names_the_job_that_makes_it(pipeline: Pipeline) -> None:
    key = next(iter(pipeline.videos))
    with pytest.raises(MissingInput, match="python -m fw_pipeline.launch annotate_videos"):
        pipeline.run("depth", key)
    with pytest.raises(MissingInput, match="python -m fw_pipeline.launch annotate_videos"):
        pack(pipeline)


def test_a_video_that_is_not_annotated_yet_is_left_out_and_said_so(pipeline: Pipeline) -> None:
    first, second = pipeline.videos
    for step in STEPS:
        pipeline.run(step, first)
    result = pack(pipeline)
    assert result.clips == 1
    assert result.not_annotated == [pipeline.videos[second]]


def test_a_caption_beside_the_video_becomes_the_prompt(pipeline: Pipeline) -> None:
    key, video = next(iter(pipeline.videos.items()))
    (pipeline.settings.videos / video).with_suffix(".txt").write_text("a room\n", encoding="utf-8")
    run_all(pipeline)
    pack(pipeline)
    rows = {row.video: row for row in read_manifest(pipeline.store.dataset)}
    assert rows[video].prompt == "a room"
    (pipeline.settings.videos / video).with_suffix(".txt").write_text("a hall", encoding="utf-8")
    assert pipeline.is_stale("latents", key)


def test_a_video_is_read_for_its_hash_only_when_its_size_or_time_has_changed(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, video = next(iter(pipeline.videos.items()))
    before = pipeline.run("clips", key).fingerprint
    read: list[Path] = []
    true_hash = steps_module.file_hash
    monkeypatch.setattr(steps_module, "file_hash", lambda path: (read.append(path), true_hash(path))[1])

    assert not Pipeline(pipeline.settings).is_stale("clips", key)
    assert read == []
    path = pipeline.settings.videos / video
    os.utime(path)  # another time, the same bytes
    assert not Pipeline(pipeline.settings).is_stale("clips", key)
    assert read == [path]
    assert Pipeline(pipeline.settings).fingerprint("clips", key) == before
    assert read == [path]
    path.write_bytes(path.read_bytes() + b"\0")
    assert Pipeline(pipeline.settings).is_stale("clips", key)
    assert read == [path, path]


def test_packing_again_reads_and_writes_no_clip_that_has_not_changed(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    run_all(pipeline)
    assert pack(pipeline).bytes_written > 0
    read: list[str] = []
    true_load = packing_module.load_arrays
    monkeypatch.setattr(
        packing_module, "load_arrays", lambda path, kind: (read.append(path.parent.name), true_load(path, kind))[1]
    )
    again = pack(pipeline)
    assert (again.clips, again.kept, again.bytes_written, read) == (2, 2, 0, [])
    engine = pipeline.geometry_engine
    assert isinstance(engine, Oracle)
    key = next(iter(pipeline.videos))
    Path(pipeline.settings.videos / pipeline.videos[key]).touch()  # not a change
    assert pack(pipeline).kept == 2
    engine.version = "2"
    run_all(pipeline)
    assert (result := pack(pipeline)).kept == 0
    assert result.clips == 2


def test_a_new_prompt_is_embedded_alone_and_once(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    run_all(pipeline)
    pack(pipeline)
    videos = list(pipeline.videos.values())
    (pipeline.settings.videos / "prompts.csv").write_text(
        "video,prompt\n" + "".join(f"{video},a hall\n" for video in videos), encoding="utf-8"
    )
    assert all(pipeline.is_stale("latents", key) for key in pipeline.videos)
    embedded: list[str] = []
    true_encode = pipeline.encoders.encode_text
    monkeypatch.setattr(pipeline.encoders, "encode_text", lambda prompt: (embedded.append(prompt), true_encode(prompt))[1])
    monkeypatch.setattr(pipeline.encoders, "encode_video", None)
    run_all(pipeline)
    assert embedded == ["a hall"]
    result = pack(pipeline)
    assert result.kept == 2
    assert set(read_texts(pipeline.store.dataset)) == {"", "a hall"}
    assert {row.prompt for row in read_manifest(pipeline.store.dataset)} == {"a hall"}


def test_a_malformed_prompt_sets_its_video_aside_and_the_others_go_on(pipeline: Pipeline) -> None:
    key, video = next(iter(pipeline.videos.items()))
    sidecar = (pipeline.settings.videos / video).with_suffix(".json")
    sidecar.write_text('{"caption": 3}', encoding="utf-8")
    run_all(pipeline)
    result = pack(pipeline)
    assert result.clips == 1
    assert result.set_aside == {key: f"{sidecar.name}, key 'caption': expected a text, got int"}
    assert not pipeline.is_stale("latents", key)
    sidecar.write_text('{"caption": "a room"}', encoding="utf-8")
    assert pipeline.is_stale("latents", key)
    run_all(pipeline)
    assert pack(pipeline).clips == 2


def test_names_in_the_table_that_are_no_videos_are_told(pipeline: Pipeline) -> None:
    (pipeline.settings.videos / "prompts.csv").write_text("video,prompt\nmisspelt.mp4,x\n", encoding="utf-8")
    assert pipeline.misspelt_prompts() == {"misspelt.mp4": "prompts.csv, line 2"}


def test_pictures_are_packed_for_presets_that_encode_while_training(pipeline: Pipeline) -> None:
    run_all(pipeline)
    pack(pipeline)
    online = tuple(f"stage{n}.encode_online=true" for n in (1, 2))
    pictures = Pipeline(pipeline.settings.model_copy(update={"overrides": online}))
    pictures.__dict__.update(geometry_engine=pipeline.geometry_engine, encoders=None)  # no encoder runs
    key = next(iter(pictures.videos))
    assert pictures.is_stale("latents", key)
    assert not pictures.is_stale("depth", key)
    run_all(pictures)
    assert pack(pictures).kept == 0
    assert verify(pictures.store.dataset) == []
    clip = pictures.clips_of(key, pictures.store.done("depth", key))[0]  # type: ignore[arg-type]
    row = next(row for row in read_manifest(pictures.store.dataset) if row.clip_id == clip.clip_id)
    shown = decode_video(ShardReader(pictures.store.dataset).read(row)["video"].tobytes())
    wanted = clip_io.read_frames(pictures.settings.videos / clip.video, clip, clip.height, clip.width)
    np.testing.assert_array_equal(shown, wanted)
    assert set(row.versions) == {"geometry", "depth"}
    assert pack(pictures).kept == 2
    with pytest.raises(ConfigError, match="packs one dataset for both"):
        Pipeline(pipeline.settings.model_copy(update={"overrides": online[:1]}))
