"""Files that hold the prompts of many videos, in the layouts people have:

    prompts.csv                    columns `video` and `prompt`
    metadata.csv, metadata.jsonl   a file and a text, under any of `FILE_KEYS` and `TEXT_KEYS`
    videos.txt and prompts.txt     (or captions.txt) line i of one belongs to line i of the other

Paths are relative to the file's own folder. A row that cannot be read costs the video it is about, and no other.
"""

from __future__ import annotations

import csv
import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fw_model.files import printable

CSV_NAME = "prompts.csv"
LIST_NAME, LIST_TEXTS = "videos.txt", ("prompts.txt", "captions.txt")
NAMES = (CSV_NAME, "metadata.csv", "metadata.jsonl", LIST_NAME)
FILE_KEYS = ("video", "file_name", "video_path", "file_path", "path", "file", "filename")
TEXT_KEYS = ("prompt", "caption", "text")


@dataclass
class Table:
    """What one file says, by `plain` path of the video."""

    prompts: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  # video -> (where, prompt) of each row about it
    bad: dict[str, str] = field(default_factory=dict)  # video -> where its row is and why it cannot be read
    lost: list[str] = field(default_factory=list)  # where and why, of rows that name no video
    broken: str = ""  # why nothing of the file can be read

    def add(self, video: str, where: str, prompt: str) -> None:
        self.prompts.setdefault(plain(video), []).append((where, prompt.strip()))

    def spoil(self, video: str | None, why: str) -> None:
        if video and video.strip():
            self.bad.setdefault(plain(video), why)
        else:
            self.lost.append(why)


def plain(video: str) -> str:
    """A path in the one form that paths are compared in: Unicode NFC, forward slashes, no `./` in front."""
    return unicodedata.normalize("NFC", video).strip().replace("\\", "/").removeprefix("./")


def read_table(path: Path, shown: str) -> Table | None:
    """A file named as one of `NAMES`, None when it is not such a table (a list without texts, other columns).

    shown: its path as messages give it. Raises OSError when it may not be read.
    """
    if path.name == LIST_NAME:
        return _lists(path, shown)
    text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    return _jsonl(text, shown) if path.suffix == ".jsonl" else _csv(text, shown, strict=path.name == CSV_NAME)


def not_text(value: str) -> bool:
    """Whether bytes that are no UTF-8, or half a character that JSON has escaped, are in a text."""
    return any(0xD800 <= ord(char) < 0xE000 for char in value)


# ----------------------------------------------------------------------------------------------------------------- CSV


def _csv(text: str, shown: str, strict: bool) -> Table | None:
    table = Table()
    lines = text.splitlines(keepends=True)
    header = lines[0] if lines else ""
    divider = max(",;\t", key=header.count)
    columns = [name.strip() for name in next(csv.reader([header], delimiter=divider), [])]
    file_keys, text_keys = (("video",), ("prompt",)) if strict else (FILE_KEYS, TEXT_KEYS)
    file = next((columns.index(key) for key in file_keys if key in columns), None)
    prompt = next((columns.index(key) for key in text_keys if key in columns), None)
    if file is None or prompt is None:
        table.broken = f"{shown}, line 1: expected the columns video,prompt, got {columns or None}"
        return table if strict else None
    for line, row, error in _rows(lines, divider):
        where, video = f"{shown}, line {line}", row[file] if file < len(row) else None
        if error:
            table.spoil(video, f"{where}: {error}")
        elif len(row) != len(columns):
            table.spoil(video, f'{where}: expected {len(columns)} values; a prompt with commas needs "quotes"')
        elif not_text(row[prompt]):
            table.spoil(video, f"{where}: not UTF-8")
        else:
            table.add(row[file], where, row[prompt])
    return table


def _rows(lines: list[str], divider: str) -> Iterator[tuple[int, list[str], str]]:
    """(number of its last line, values, what is wrong) of every row below the header.

    A row that is no CSV, such as one whose quotes do not close, ends with its first line: the next one is tried as a row.
    """
    start = 1
    while start < len(lines):
        reader = csv.reader(iter(lines[start:]), delimiter=divider, strict=True)
        done = 0  # lines of the rows that were whole
        try:
            for row in reader:
                done = reader.line_num
                if row:
                    yield start + done, row, ""
            return
        except csv.Error as error:
            broken = lines[start + done]
            yield start + done + 1, next(csv.reader([broken], delimiter=divider)), str(error)
            start += done + 1


# --------------------------------------------------------------------------------------------------------- other forms


def _jsonl(text: str, shown: str) -> Table:
    table = Table()
    for number, line in enumerate(text.splitlines(), 1):
        where = f"{shown}, line {number}"
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            named = re.search(rf'"(?:{"|".join(FILE_KEYS)})"\s*:\s*"([^"\\]+)"', line)
            table.spoil(named[1] if named else None, f"{where}: not JSON ({error.msg})")
            continue
        item = item if isinstance(item, dict) else {}
        video = next((item[key] for key in FILE_KEYS if isinstance(item.get(key), str)), None)
        prompt = next((item[key] for key in TEXT_KEYS if isinstance(item.get(key), str)), None)
        if video is None or prompt is None:
            table.spoil(video, f"{where}: expected a file under {FILE_KEYS[1]!r} and a text under {TEXT_KEYS[2]!r}")
        elif not_text(prompt):
            table.spoil(video, f"{where}: not UTF-8")
        else:
            table.add(video, where, prompt)
    return table


def _lists(path: Path, shown: str) -> Table | None:
    table = Table()
    texts = next((beside for name in LIST_TEXTS if (beside := path.with_name(name)).is_file()), None)
    if texts is None:
        return None
    lines = [file.read_bytes().decode("utf-8-sig", "surrogateescape").splitlines() for file in (path, texts)]
    videos, prompts = ([line.strip() for line in file] for file in lines)
    if len(videos) != len(prompts):
        why = f"{shown} has {len(videos)} lines, {texts.name} {len(prompts)}: which belongs to which cannot be known"
        for video in videos:
            table.spoil(video, why)
        return table
    for number, (video, prompt) in enumerate(zip(videos, prompts, strict=True), 1):
        where = f"{printable(texts.name)}, line {number}"
        if video and not_text(prompt):
            table.spoil(video, f"{where}: not UTF-8")
        elif video:
            table.add(video, where, prompt)
    return table
