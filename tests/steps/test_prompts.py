"""Prompts come from what stands beside the videos; what cannot be understood is named, never guessed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal
from unicodedata import normalize

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


@pytest.mark.parametrize("bad", ["b.mp4,a studio, lit", 'b.mp4,"a studio', b"b.mp4,caf\xe9", "b.mp4", 'b.mp4,"a "studio" lit"'])
def test_a_bad_row_costs_its_video_and_no_other(folder: Path, bad: str | bytes) -> None:
    row = bad if isinstance(bad, bytes) else bad.encode()
    write(folder / "prompts.csv", b"video,prompt\r\na.mp4,a shelf\r\n" + row + b'\r\nc.mp4,"a room,\r\nwide"\r\n')
    prompts = Prompts(folder)
    assert prompts.of("a.mp4") == "a shelf"
    assert prompts.of("c.mp4").split() == ["a", "room,", "wide"]
    with pytest.raises(PromptError, match=r"prompts\.csv, line 3: "):
        prompts.of("b.mp4")
    write(folder / "b.txt", "a studio of its own")
    assert prompts.of("b.mp4") == "a studio of its own"


def test_a_table_without_its_columns_costs_only_videos_without_a_prompt_of_their_own(folder: Path) -> None:
    write(folder / "prompts.csv", "name;words\na.mp4;x\n")
    write(folder / "a.txt", "a shelf")
    prompts = Prompts(folder)
    assert prompts.of("a.mp4") == "a shelf"
    with pytest.raises(PromptError, match="expected the columns"):
        prompts.of("b.mp4")
    assert len(prompts.faults(["a.mp4", "b.mp4"])) == 1


@pytest.mark.parametrize(
    "files",
    [
        {"prompts.csv": "\ufeffvideo;prompt\r\nwalks/a.mp4;a shelf\r\n"},
        {"walks/prompts.csv": "video,prompt\na.mp4,a shelf\n"},
        {"walks/metadata.csv": "file_name,width,text\na.mp4,448,a shelf\n"},
        {"metadata.jsonl": '{"file_name": "walks/a.mp4", "text": "a shelf"}\n\n'},
        {"walks/videos.txt": "\ufeffa.mp4\r\nb.mp4\r\n", "walks/captions.txt": "a shelf\r\na studio\r\n"},
        {"videos.txt": "./walks/a.mp4\n", "prompts.txt": "a shelf\n"},
        {"walks/a.mp4.txt": "a shelf\n"},
        {"walks/a.caption": "a shelf\r\n"},
    ],
    ids=lambda files: " and ".join(files),
)
def test_every_common_layout_of_captions_is_read(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        write(folder / name, text)
    assert Prompts(folder).of("walks/a.mp4") == "a shelf"


def test_lists_of_unequal_length_set_their_videos_aside(folder: Path) -> None:
    write(folder / "videos.txt", "a.mp4\nb.mp4\n")
    write(folder / "prompts.txt", "a shelf\n")
    with pytest.raises(PromptError, match=r"videos\.txt has 2 lines, prompts\.txt 1"):
        Prompts(folder).of("a.mp4")
    assert Prompts(folder).of("c.mp4") == ""


def test_a_broken_line_of_json_costs_the_video_it_names(folder: Path) -> None:
    write(folder / "metadata.jsonl", '{"file_name": "a.mp4", "text": "a shelf"}\n{"file_name": "b.mp4", "text": "a st\n[]\n')
    prompts = Prompts(folder)
    assert prompts.of("a.mp4") == "a shelf"
    with pytest.raises(PromptError, match=r"metadata\.jsonl, line 2: not JSON"):
        prompts.of("b.mp4")
    assert prompts.faults(["a.mp4"]) == ["metadata.jsonl, line 3: expected a file under 'file_name' and a text under 'text'"]


@pytest.mark.parametrize("forms", [("NFD", "NFC"), ("NFC", "NFD")])
def test_names_are_compared_in_one_unicode_form(folder: Path, forms: tuple[Literal["NFC", "NFD"], Literal["NFC", "NFD"]]) -> None:
    there, written = (normalize(form, "café.mp4") for form in forms)
    write(folder / "prompts.csv", f"video,prompt\n{written},at noon\n")
    assert Prompts(folder).of(there) == "at noon"
    (folder / "prompts.csv").unlink()
    write(folder / f"{written.removesuffix('.mp4')}.txt", "at night")
    assert Prompts(folder).of(there) == "at night"
    assert Prompts(folder).unknown([there]) == {}


@pytest.mark.parametrize("header", ["", "# t fx fy cx cy 0 0 w2c\n", "https://example.org/watch?v=a\n", "\ufeff\n"])
@pytest.mark.parametrize("row", ["0 " * 18 + "1e-3", ", ".join("1.5" for _ in range(12)), "1 2 3 0 0 0 1"])
def test_a_table_of_camera_poses_is_no_prompt(folder: Path, header: str, row: str) -> None:
    write(folder / "a.txt", header + f"{row}\r\n" * 3)
    assert Prompts(folder).of("a.mp4") == ""


@pytest.mark.parametrize("text", ["24", "1984", "3 2 1 go", "a room\n1 2 3\n", "2001: a space odyssey\nseen twice"])
def test_a_prompt_with_numbers_is_one(folder: Path, text: str) -> None:
    write(folder / "a.txt", text)
    assert Prompts(folder).of("a.mp4") == text.strip()


def test_a_misspelt_name_is_told_with_the_nearest_real_one(folder: Path) -> None:
    write(folder / "prompts.csv", "video,prompt\nwalks/prak.mp4,x\nzzz.mp4,y\n")
    assert Prompts(folder).unknown(["walks/park.mp4"]) == {
        "walks/prak.mp4": "prompts.csv, line 2; did you mean walks/park.mp4?",
        "zzz.mp4": "prompts.csv, line 3",
    }
