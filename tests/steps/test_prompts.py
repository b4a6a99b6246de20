"""Prompts come from what stands beside the videos; what cannot be understood is named, never guessed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fw_pipeline.steps.prompts import PromptError, Prompts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "walks").mkdir()
    return tmp_path


def write(path: Path, content: str | bytes) -> None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_a_video_without_a_prompt_has_the_empty_one(folder: Path) -> None:
    assert Prompts(folder).of("walks/park.mp4") == ""


@pytest.mark.parametrize("key", ["caption", "prompt", "text"])
def test_sidecars_are_read(folder: Path, key: str) -> None:
    write(folder / "walks/park.txt", "\ufeff a park,\nseen walking \n")
    write(folder / "walks/lake.json", json.dumps({"fps": 3, key: "a lake – still"}))
    prompts = Prompts(folder)
    assert prompts.of("walks/park.mp4") == "a park,\nseen walking"
    assert prompts.of("walks/lake.mov") == "a lake – still"


def test_the_table_is_read_and_read_again_when_it_changes(folder: Path) -> None:
    write(folder / "prompts.csv", 'id,video,prompt\n1,walks/park.mp4,"a park, seen\nwalking"\n2,./b.mp4,b\n3,gone.mp4,?\n')
    prompts = Prompts(folder)
    assert prompts.of("walks/park.mp4") == "a park, seen\nwalking"
    assert prompts.of("b.mp4") == "b"
    assert prompts.unknown({"walks/park.mp4", "b.mp4"}) == {"gone.mp4": "prompts.csv, line 5"}
    write(folder / "prompts.csv", "video,prompt\nb.mp4,changed\n")
    assert prompts.of("b.mp4") == "changed"


def test_places_that_agree_are_one_prompt(folder: Path) -> None:
    write(folder / "a.txt", "a room\n")
    write(folder / "a.json", '{"text": "a room"}')
    write(folder / "prompts.csv", "video,prompt\na.mp4,a room\n")
    assert Prompts(folder).of("a.mp4") == "a room"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xfea", r"a\.txt: not UTF-8 .*byte 0"),
        ("a.json", "{\n'x'}", r"a\.json, line 2: not JSON"),
        ("a.json", "[]", r"a\.json: expected an object with one of the keys caption, prompt, text"),
        ("a.json", '{"title": "x"}', r"a\.json: none of the keys .*title"),
        ("a.json", '{"caption": 3}', r"a\.json, key 'caption': expected a text, got int"),
        ("a.json", '{"caption": "\\ud800"}', r"a\.json, key 'caption': not UTF-8"),
        ("a.json", '{"caption": "x", "text": "y"}', r"differ: a\.json, key 'caption': 'x'; a\.json, key 'text': 'y'"),
        ("prompts.csv", "file,prompt\n", r"prompts\.csv, line 1: expected the columns video,prompt, got \['file', 'prompt'\]"),
        ("prompts.csv", "video,prompt\nb.mp4,b\na.mp4,one, two\n", r"prompts\.csv, line 3: expected 2 values"),
        ("prompts.csv", "video,prompt\na.mp4\n", r"prompts\.csv, line 2: expected 2 values"),
        ("prompts.csv", "video,prompt\na.mp4,x\na.mp4,y\n", r"differ: prompts\.csv, line 2: 'x'; prompts\.csv, line 3: 'y'"),
        ("prompts.csv", 'video,prompt\na.mp4,"open', r"prompts\.csv, line 2: unexpected end"),
    ],
)
def test_what_cannot_be_understood_is_named_with_its_place(folder: Path, name: str, content: str | bytes, message: str) -> None:
    write(folder / name, content)
    with pytest.raises(PromptError, match=message):
        Prompts(folder).of("a.mp4")
