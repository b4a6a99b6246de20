"""Everything about one video - its name, link, rights, marker, results - costs that video, never the others."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from fw_pipeline.steps import pipeline as steps_module
from fw_pipeline.steps.packing import pack
from fw_pipeline.steps.pipeline import Pipeline
from fw_pipeline.steps.settings import settings_from_env
from tests.helpers.oracle import Oracle, run_all


@pytest.fixture
def pipeline(environment: Path) -> Pipeline:
    pipeline = Pipeline(settings_from_env(annotation_long_side=224))
    pipeline.__dict__["geometry_engine"] = Oracle(pipeline)
    return pipeline


def made(folder: Path, kind: str) -> Path:
    """A file named like a video that can give nothing."""
    path = folder / f"{kind}.mp4"
    if kind == "link to nowhere":
        path.symlink_to("/nowhere/unplugged.mp4")
    elif kind == "link in a circle":
        path.symlink_to(path.name)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "private":
        path.write_bytes(b"secret")
        path.chmod(0)
    elif kind == "no text":
        path = folder / os.fsdecode(b"\xff\xfe.mp4")
        path.write_bytes(b"x")
    else:
        path = folder / "two\nlines.mp4"
        path.write_bytes(b"x")
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("link to nowhere", "cannot be read (No such file or directory): a link to /nowhere/unplugged.mp4"),
        ("link in a circle", "Too many levels of symbolic links"),
        ("pipe", "not a file"),
        ("private", "cannot be read (Permission denied)"),
        ("no text", "undecodable characters"),
        ("control character", "control"),
    ],
)
def test_a_file_that_cannot_be_read_is_set_aside_with_its_reason_and_the_rest_is_packed(
    pipeline: Pipeline, kind: str, reason: str
) -> None:
    if kind == "private" and os.geteuid() == 0:
        pytest.skip("root may read everything")
    made(pipeline.settings.videos, kind)
    run_all(pipeline)
    result = pack(pipeline)
    assert result.clips == 2
    (told,) = result.set_aside.values()
    assert reason in told
    (done,) = [done for key in pipeline.videos if (done := pipeline.marker("clips", key)).set_aside]
    assert (done.video + done.set_aside).isprintable()


def test_a_file_that_can_be_read_again_is_cut_again(pipeline: Pipeline) -> None:
    good = next(iter(pipeline.videos.values()))
    link = pipeline.settings.videos / "link.mp4"
    link.symlink_to("not-yet.mp4")
    first = Pipeline(pipeline.settings)
    (key,) = [key for key, video in first.videos.items() if video == "link.mp4"]
    assert first.run("clips", key).set_aside
    assert not Pipeline(pipeline.settings).is_stale("clips", key)
    shutil.copy(pipeline.settings.videos / good, pipeline.settings.videos / "not-yet.mp4")
    assert not Pipeline(pipeline.settings).run("clips", key).set_aside


def test_a_fault_of_the_disk_fails_the_video_and_is_not_kept_as_its_reason(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path) -> tuple[int, str]:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(steps_module, "file_hash", broken)
    key = next(iter(pipeline.videos))
    with pytest.raises(OSError, match="Input/output"):
        pipeline.run("clips", key)
    assert pipeline.is_stale("clips", key)
    assert pipeline.store.done("clips", key) is None


def test_a_damaged_marker_counts_as_none_and_is_told(pipeline: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    key = next(iter(pipeline.videos))
    pipeline.run("clips", key)
    (pipeline.store.folder("clips", key) / "done.json").write_text('{"video": "a.m', encoding="utf-8")
    assert pipeline.is_stale("clips", key)
    assert "damaged" in caplog.text
    assert pipeline.run("clips", key).clips


@pytest.mark.parametrize("step", ["depth", "latents"])
def test_a_damaged_result_costs_its_clip_and_the_others_are_packed(pipeline: Pipeline, step: str) -> None:
    run_all(pipeline)
    file = next((pipeline.store.root / step).glob("*/*.npz"))
    os.truncate(file, file.stat().st_size // 2)
    result = pack(pipeline)
    assert result.clips == 1
    assert list(result.failed) == [file.stem]
    assert str(file) in result.failed[file.stem]


def test_a_fault_is_kept_until_the_step_succeeds(pipeline: Pipeline) -> None:
    key = next(iter(pipeline.videos))
    assert pipeline.store.fault("depth", key) == ""
    pipeline.store.note_fault("depth", key, "out of memory \udcff")
    assert pipeline.store.fault("depth", key) == "out of memory \\udcff"
    assert pipeline.store.fault("clips", key) == ""
    pipeline.store.note_fault("depth", key, "")
    assert pipeline.store.fault("depth", key) == ""
