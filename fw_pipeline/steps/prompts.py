"""The prompt of a video, as its owner wrote it down.

For `walks/park.mp4`, any of these:

    walks/park.txt      the text itself; or park.mp4.txt, park.caption
    walks/park.json     an object with the text under `caption`, `prompt` or `text`
    prompts.csv         columns `video` (path relative to the file) and `prompt`, in the videos folder or the video's own,
                        or one of the other tables of `caption_tables`

Files are UTF-8, with a byte order mark or without; names are compared in one Unicode form. Without any of them the prompt is
empty. Nothing is guessed: a file or row that cannot be understood, or two that say different things, set that video aside
with the reason; a text that is a table of numbers (a camera path) is no prompt.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

from fw_model.errors import Explained
from fw_model.files import printable
from fw_pipeline.steps.caption_tables import LIST_NAME, LIST_TEXTS, NAMES, Table, not_text, plain, read_table

JSON_KEYS = ("caption", "prompt", "text")
TEXT_SUFFIXES = (".txt", ".caption")
POSE_NUMBERS = 7  # in a row of the shortest table of camera poses: a position and a quaternion
CLOSE_NAMES = 5  # misspelt names that get the nearest real one: looking for it takes as long as there are videos


class PromptError(Explained, ValueError):
    """A prompt that cannot be read; the message names the file and the line or key."""


class Prompts:
    """The prompts of one videos folder. Tables and folders are read again when they change."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tables: dict[Path, tuple[tuple[int, int], Table | None]] = {}
        self._names: dict[Path, tuple[int, dict[str, Path]]] = {}

    def of(self, video: str) -> str:
        """The prompt of a video (path relative to the folder), without surrounding space; "" when there is none.

        Raises PromptError.
        """
        found = dict(self._sidecars(self.folder / video))  # where -> prompt
        faults: list[str] = []
        for table, name in self._tables_of(video):
            faults += [why for why in (table.broken, table.bad.get(name)) if why]
            found.update(table.prompts.get(name, ()))
        if len(set(found.values())) > 1:
            raise PromptError("prompts that differ: " + "; ".join(f"{where}: {prompt!r}" for where, prompt in found.items()))
        if faults and not found:  # what the video has of its own counts, whatever a table says
            raise PromptError(faults[0])
        return next(iter(found.values()), "")

    def unknown(self, videos: Collection[str]) -> dict[str, str]:
        """Videos that tables name and the folder lacks -> where, and the nearest name there is; most likely misspelt."""
        real = {plain(video): video for video in videos}
        stems = {name.rpartition(".")[0]: video for name, video in real.items()}  # equal endings make no names alike
        found: dict[str, str] = {}
        for folder in sorted({parent for video in videos for parent in PurePosixPath(video).parents}):
            for table in self._tables_in(self.folder / folder):
                for name, rows in table.prompts.items():
                    path = plain((folder / name).as_posix())
                    if path not in real:
                        stem = path.rpartition(".")[0] or path
                        close = difflib.get_close_matches(stem, stems, n=1) if len(found) < CLOSE_NAMES else []
                        found[path] = rows[0][0] + (f"; did you mean {printable(stems[close[0]])}?" if close else "")
        return found

    def faults(self, videos: Collection[str]) -> list[str]:
        """What is wrong with tables as a whole, and with rows that name no video."""
        folders = sorted({parent for video in videos for parent in PurePosixPath(video).parents})
        tables = [table for folder in folders for table in self._tables_in(self.folder / folder)]
        return [why for table in tables for why in (table.broken, *table.lost) if why]

    def is_table(self, path: Path) -> bool:
        """Whether a file of the folder is read as a table of prompts, or as one half of a pair of lists."""
        if path.name in LIST_TEXTS:
            return self.is_table(path.with_name(LIST_NAME))
        return path.name in NAMES and path.is_file() and self._table(path) is not None

    # ---- beside the video ------------------------------------------------------------------------------------------

    def _sidecars(self, video: Path) -> Iterator[tuple[str, str]]:
        beside = self._beside(video.parent)
        listed = {*LIST_TEXTS, LIST_NAME} if LIST_NAME in beside else set()
        *texts, described_in = map(plain, sidecar_names(video.name))
        for name in texts:
            if name in beside and name not in listed:
                text = self._read(beside[name])
                if not is_pose_table(text):
                    yield self._name(beside[name]), text.strip()
        if described := beside.get(described_in):
            for key, prompt in self._json(described).items():
                yield f"{self._name(described)}, key {key!r}", prompt.strip()

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
            if not_text(prompt):
                raise PromptError(f"{self._name(path)}, key {key!r}: not UTF-8 (a lone surrogate)")
        return found

    def _beside(self, folder: Path) -> dict[str, Path]:
        """The files of a folder by their `plain` names."""
        changed = folder.stat().st_mtime_ns
        if folder not in self._names or self._names[folder][0] != changed:
            self._names[folder] = changed, {plain(path.name): path for path in folder.iterdir() if path.is_file()}
        return self._names[folder][1]

    # ---- tables ----------------------------------------------------------------------------------------------------

    def _tables_of(self, video: str) -> Iterator[tuple[Table, str]]:
        """Every table that may speak of a video, and the name it would do it by."""
        path = PurePosixPath(video)
        for parent in path.parents:
            for table in self._tables_in(self.folder / parent):
                yield table, plain(path.relative_to(parent).as_posix())

    def _tables_in(self, folder: Path) -> list[Table]:
        found = [self._table(folder / name) for name in NAMES if (folder / name).is_file()]
        return [table for table in found if table is not None]

    def _table(self, path: Path) -> Table | None:
        try:
            status = path.stat()
            state = (status.st_mtime_ns, status.st_size)
            if path not in self._tables or self._tables[path][0] != state:
                self._tables[path] = state, read_table(path, self._name(path))
        except OSError as error:
            return Table(broken=f"{self._name(path)}: cannot be read ({error.strerror})")
        return self._tables[path][1]

    def _read(self, path: Path) -> str:
        try:
            return path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise PromptError(f"{self._name(path)}: not UTF-8 ({error.reason} at byte {error.start})") from error
        except OSError as error:
            raise PromptError(f"{self._name(path)}: cannot be read ({error.strerror})") from error

    def _name(self, path: Path) -> str:
        return printable(path.relative_to(self.folder).as_posix())


def sidecar_names(video: str) -> list[str]:
    """Names of the texts of a video of that name, the object in JSON last."""
    stem = PurePosixPath(video).stem
    return [name + suffix for name in (stem, video) for suffix in TEXT_SUFFIXES] + [stem + ".json"]


def is_pose_table(text: str) -> bool:
    """Whether a text is rows of numbers, as camera paths are written, below one line at most that says where they are from."""
    lines = [line.replace(",", " ").split() for line in text.splitlines() if line.strip()]
    rows = lines if lines and _numbers(lines[0]) else lines[1:]
    return bool(rows) and all(len(row) >= POSE_NUMBERS and _numbers(row) for row in rows)


def _numbers(fields: list[str]) -> bool:
    try:
        return bool([float(text) for text in fields])
    except ValueError:
        return False
