"""Folders and videos that are no good are heard: a warning each, checks that say they saw nothing, advice that fits, no stack."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.graph import environment_of, shell

DEMO = "source env.sh && python -m fw_pipeline.demo.run --videos '{}'"


@pytest.mark.parametrize(("kind", "said"), [("missing", "no videos folder at"), ("empty", "no videos in"), ("file", "is a file")])
def test_a_folder_without_videos_is_one_message_with_what_to_do(environment: Path, kind: str, said: str) -> None:
    place = environment / kind
    if kind == "empty":
        place.mkdir()
    elif kind == "file":
        place.write_text("hello", encoding="utf-8")
    done = shell(DEMO.format(place), **environment_of(environment))
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert said in done.stderr
    assert str(place) in done.stderr
    assert "make demo VIDEOS=FOLDER" in done.stderr


def test_one_bad_video_alone_is_heard_and_nothing_is_called_passed(environment: Path) -> None:
    folder = environment / "bad"
    folder.mkdir()
    (folder / "bad.mp4").write_text("hello", encoding="utf-8")
    done = shell(DEMO.format(folder), **environment_of(environment))
    said = done.stdout + done.stderr
    assert done.returncode == 1
    warned = [line for line in said.splitlines() if "WARNING" in line and "set aside bad.mp4" in line]
    assert len(warned) == 1
    assert said.count("NOTHING TO CHECK") == 3
    assert "passed" not in said
    assert "every video in" in said
    assert "Stack Trace" not in said
    assert "Traceback" not in said
