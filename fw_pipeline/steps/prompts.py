"""The prompt of a video, as its owner wrote it down.

For `walks/park.mp4`, any of these:

    walks/park.txt      the text itself
    walks/park.json     an object with the text under `caption`, `prompt` or `text`
    prompts.csv         in the videos folder: columns `video` (path relative to that folder) and `prompt`

Files are UTF-8. Without any of them the prompt is empty. Nothing is guessed: a file that cannot be understood, or two
that say different things, set that video aside with the reason.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from fw_model.errors import Explained

CSV_NAME = "prompts.csv"
JSON_KEYS = ("caption", "prompt", "text")


class PromptError(Explained, ValueError):
    """A prompt that cannot be read; the message names the file and the line or key."""


class Prompts:
    """The prompts of one videos folder. `prompts.csv` is read again when it changes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._csv: tuple[tuple[int, int], dict[str, list[tuple[int, str]]]] | None = None

    def of(self, video: str) -> str:
        """The prompt of a video (path relative to the folder), without surrounding space; "" when there is none.

        Raises PromptError.
        """
        path = self.folder / video
        found: dict[str, str] = {}  # where -> prompt
        if (text := path.with_suffix(".txt")).is_file():
            found[self._name(text)] = self._read(text).strip()
        if (described := path.with_suffix(".json")).is_file():
            for key, prompt in self._json(described).items():
                found[f"{self._name(described)}, key {key!r}"] = prompt.strip()
        for line, prompt in self._csv_rows().get(video, []):
            found[f"{CSV_NAME}, line {line}"] = prompt.strip()
        if len(set(found.values())) > 1:
            raise PromptError("prompts that differ: " + "; ".join(f"{where}: {prompt!r}" for where, prompt in found.items()))
        return next(iter(found.values()), "")

    def unknown(self, videos: set[str]) -> dict[str, str]:
        """Videos that `prompts.csv` names and the folder lacks -> where; most likely misspelt.

        Raises PromptError for a file that cannot be read.
        """
        rows = self._csv_rows()
        return {video: f"{CSV_NAME}, line {found[0][0]}" for video, found in rows.items() if video not in videos}

    def _json(self, path: Path) -> dict[str, str]:
        try:
            value = json.loads(self._read(path))
        except json.JSONDecodeError as error:
            raise PromptError(f"{self._name(path)}, line {error.lineno}: not JSON ({error.msg})") from error
        if not isinstance(value, dict):
            raise PromptError(f"{self._name(path)}: expected an object with one of the keys {', '.join(JSON_KEYS)}")
        found = {key: value[key] for key in JSON_KEYS if key in value}
        if not found:
            raise PromptError(f"{self._name(path)}: none of the keys {', '.join(JSON_KEYS)}; it has {sorted(value)[:10]}")
        for key, prompt in found.items():
            if not isinstance(prompt, str):
                raise PromptError(f"{self._name(path)}, key {key!r}: expected a text, got {type(prompt).__name__}")
            if any(0xD800 <= ord(char) < 0xE000 for char in prompt):  # JSON can escape half a character
                raise PromptError(f"{self._name(path)}, key {key!r}: not UTF-8 (a lone surrogate)")
        return found

    def _csv_rows(self) -> dict[str, list[tuple[int, str]]]:
        """Video -> (line, prompt) of each row about it."""
        path = self.folder / CSV_NAME
        if not path.is_file():
            return {}
        status = path.stat()
        state = (status.st_mtime_ns, status.st_size)
        if self._csv is None or self._csv[0] != state:
            self._csv = state, self._parse_csv(path)
        return self._csv[1]

    def _parse_csv(self, path: Path) -> dict[str, list[tuple[int, str]]]:
        reader = csv.DictReader(io.StringIO(self._read(path), newline=""), strict=True)
        rows: dict[str, list[tuple[int, str]]] = {}
        try:
            if not {"video", "prompt"} <= set(reader.fieldnames or ()):
                raise PromptError(f"{CSV_NAME}, line 1: expected the columns video,prompt, got {reader.fieldnames}")
            for row in reader:
                if None in row or row["video"] is None or row["prompt"] is None:
                    raise PromptError(
                        f"{CSV_NAME}, line {reader.line_num}: expected {len(reader.fieldnames or ())} values; "
                        'a prompt with commas needs "quotes"'
                    )
                rows.setdefault(row["video"].strip().removeprefix("./"), []).append((reader.line_num, row["prompt"]))
        except csv.Error as error:
            raise PromptError(f"{CSV_NAME}, line {reader.reader.line_num}: {error}") from error
        return rows

    def _read(self, path: Path) -> str:
        try:
            return path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise PromptError(f"{self._name(path)}: not UTF-8 ({error.reason} at byte {error.start})") from error

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()
