"""What lies in a folder of videos, told by names alone: no file is opened."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fw_model.files import printable

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v"} | {".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".3gp", ".wmv", ".flv"}
)
# Videos, or what is made of them, that nothing here reads.
FOREIGN_SUFFIXES = frozenset(
    {".ogv", ".vob", ".mxf", ".asf", ".f4v", ".3g2", ".m2v", ".divx", ".rm", ".rmvb", ".dv", ".mod", ".tod", ".insv", ".360"}
    | {".r3d", ".braw", ".y4m", ".h264", ".h265", ".hevc", ".gif", ".m3u8"}
)
UNFINISHED = (".part", ".tmp", ".temp", ".download")  # "name.part.mp4": somebody is still writing it
# What desktops, network storage and file systems keep beside people's files: thumbnails, deleted and older copies.
TRASH = frozenset(
    {"@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@sharebin", "~snapshot", "$recycle.bin", "recycler"}
    | {"recycled", "lost+found", "system volume information", "found.000", "__macosx", "network trash folder"}
)
# Text that may hold captions; which of it is read, `steps.prompts` knows.
TEXT_SUFFIXES = frozenset({".txt", ".caption", ".csv", ".tsv", ".json", ".jsonl", ".parquet", ".xlsx", ".srt", ".vtt", ".yaml"})


@dataclass(frozen=True)
class Links:
    """Which links that lead out of the videos folder are followed."""

    folders: bool = False
    files: bool = False


NO_LINKS = Links()


@dataclass
class Listing:
    """Paths are relative to the folder, with forward slashes."""

    videos: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)  # that may hold captions
    linked: list[str] = field(default_factory=list)  # folders that are links and were not entered
    trash: list[str] = field(default_factory=list)  # folders of `TRASH`, and hidden ones that are named like trash or snapshots
    closed: dict[str, str] = field(default_factory=dict)  # folders that could not be read -> why
    foreign: Counter[str] = field(default_factory=Counter)  # files by ending, of `FOREIGN_SUFFIXES`
    unfinished: int = 0  # videos that somebody is still writing


def list_folder(root: Path, linked_folders: bool = False) -> Listing:
    """Everything below a folder that is named like a video or may belong to one; hidden files and folders are left out.

    linked_folders: enter folders that are links out of `root`, each once; what links that stay in it lead to is there already.
    Raises FileNotFoundError when there is no such folder.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    found = Listing()
    entered: set[Path] = {_real(root)}

    def closed(error: OSError) -> None:
        found.closed[_relative(root, error.filename)] = error.strerror or str(error)

    for folder, folders, files in os.walk(root, onerror=closed, followlinks=True):
        folders[:] = list(_to_enter(root, Path(folder), sorted(folders), entered if linked_folders else None, found))
        for name in files:
            _sort_in(found, _relative(root, os.path.join(folder, name)), name)
    found.videos.sort()
    return found


def _to_enter(root: Path, folder: Path, names: list[str], entered: set[Path] | None, found: Listing) -> Iterator[str]:
    """Those of a folder's folders that are looked into. entered: what linked folders led to so far, None to enter none."""
    for name in names:
        path = folder / name
        low = name.lower()
        if low in TRASH or low.startswith((".trash", ".snapshot", ".zfs", ".recycle")):
            found.trash.append(_relative(root, path))
        elif not name.startswith("."):
            if not path.is_symlink():
                yield name
                continue
            real = _real(path)
            if entered is None:
                found.linked.append(_relative(root, path))
            elif not any(real.is_relative_to(place) for place in entered) and not _real(root).is_relative_to(real):
                entered.add(real)
                yield name


def _sort_in(found: Listing, path: str, name: str) -> None:
    stem, suffix = os.path.splitext(name)
    suffix = suffix.lower()
    if name.startswith((".", "~")):
        return
    if suffix in VIDEO_SUFFIXES:
        if stem.lower().endswith(UNFINISHED):
            found.unfinished += 1
        else:
            found.videos.append(path)
    elif suffix in FOREIGN_SUFFIXES:
        found.foreign[suffix] += 1
    elif suffix in TEXT_SUFFIXES:
        found.texts.append(path)
    elif suffix in UNFINISHED and os.path.splitext(stem)[1].lower() in VIDEO_SUFFIXES:
        found.unfinished += 1


def _relative(root: Path, path: str | Path) -> str:
    return os.path.relpath(path, root).replace(os.sep, "/")


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # unlike Path.resolve, links in a circle are no error


def why_outside(video: Path, root: Path, links: Links) -> str:
    """Why a file inside `root` may not be read for where it really is; "" when it may."""
    if _real(video).is_relative_to(_real(root)):
        return ""
    if video.is_symlink():
        return "" if links.files else f"a link that leads out of the videos folder {printable(str(root))} (see linked_files)"
    return "" if links.folders else f"in a folder that is a link out of the videos folder {printable(str(root))}"
