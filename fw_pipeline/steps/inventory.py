"""What lies in the videos folder, told before anything runs: what will be read, and what will not for which reason.

Of the videos only those of equal length are opened, to find those that are the same.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fw_model.errors import MissingInput
from fw_model.files import file_hash, printable
from fw_pipeline.annotate.folder import Listing, list_folder, why_outside
from fw_pipeline.annotate.lens import CALIBRATION_ENDINGS, CALIBRATIONS
from fw_pipeline.steps.caption_tables import plain
from fw_pipeline.steps.prompts import PromptError, Prompts, sidecar_names
from fw_pipeline.steps.settings import Settings

NAMED = 3  # of each kind, names that a line gives; the others are counted
HEAD = 2**16  # bytes that tell most videos of equal length apart
PUT_VIDEOS = "Put videos there, or name a folder that has some: FW_VIDEOS=FOLDER, or make demo VIDEOS=FOLDER"
ABOUT = ("readme", "license", "licence", "notice", "changelog")  # texts of these names are about the folder


@dataclass(frozen=True)
class Inventory:
    """A folder of videos. Paths are relative to it, as they can be shown."""

    folder: Path
    listing: Listing
    copies: dict[str, str]  # videos of equal bytes -> the one of them that is kept
    outside: list[str]  # videos that are links out of the folder, or lie behind one, and are not read
    prompts: int  # videos that have one
    bad_prompts: list[str]  # why a video's prompt cannot be read; the video is set aside for it
    unread: list[str]  # texts that may hold captions and that nothing reads
    misspelt: dict[str, str]  # videos that tables of prompts name and that are not there -> where, and the nearest name

    @property
    def numbers(self) -> dict[str, int]:
        """Counts by name, those of what is amiss only where there is any."""
        found = {
            "copies of others": len(self.copies),
            "linked from outside": len(self.outside),
            "linked folders not entered": len(self.listing.linked),
            "folders that cannot be read": len(self.listing.closed),
            "of endings that are not read": self.listing.foreign.total(),
            "still being written": self.listing.unfinished,
            "trash and snapshot folders left out": len(self.listing.trash),
            "prompts that cannot be read": len(self.bad_prompts),
            "texts that are not read": len(self.unread),
            "misspelt in tables of prompts": len(self.misspelt),
        }
        return {"videos": len(self.listing.videos), "with a prompt": self.prompts} | {k: v for k, v in found.items() if v}

    def lines(self) -> list[str]:
        """A line for what there is and one for each kind of thing that is amiss, with what helps."""
        names: dict[str, tuple[Iterable[str], str]] = {
            "copies of others": ((f"{a} = {b}" for a, b in self.copies.items()), "the same bytes are kept once"),
            "linked from outside": (self.outside, "not read; FW_LINKED_FILES=1 and FW_LINKED_FOLDERS=1 allow it"),
            "linked folders not entered": (self.listing.linked, "FW_LINKED_FOLDERS=1 enters them"),
            "folders that cannot be read": (
                (f"{a} ({b})" for a, b in self.listing.closed.items()),
                "videos in them are not seen",
            ),
            "of endings that are not read": ((f"{n} {end}" for end, n in self.listing.foreign.items()), "convert them to MP4"),
            "still being written": ((), "looked at when they are whole"),
            "trash and snapshot folders left out": (self.listing.trash, ""),
            "prompts that cannot be read": (self.bad_prompts, "these videos are set aside"),
            "texts that are not read": (self.unread, "if they are captions: prompts.csv has columns video,prompt"),
            "misspelt in tables of prompts": ((f"{a} ({b})" for a, b in self.misspelt.items()), "no video has that name"),
        }
        counts = self.numbers
        first = f"{self.folder}: {counts.pop('videos')} videos, {counts.pop('with a prompt')} with a prompt"
        return [first, *(f"  {count} {what}{_some(count, *names[what])}" for what, count in counts.items())]


def _some(count: int, names: Iterable[str], hint: str) -> str:
    shown = [printable(name) for name, _ in zip(names, range(NAMED), strict=False)]
    more = [f"{count - len(shown)} more"] if shown and count > len(shown) else []
    return (": " + ", ".join([*shown, *more]) if shown else "") + (f"; {hint}" if hint else "")


def take_inventory(settings: Settings) -> Inventory:
    """The inventory of the settings' videos folder. Raises MissingInput when there is none."""
    root = require_folder(settings.videos)
    listing = list_folder(root, settings.linked_folders)
    outside = {path for path in listing.videos if why_outside(root / path, root, settings.links)}
    prompts, prompted, bad = Prompts(root), 0, []
    for path in listing.videos:
        try:
            prompted += bool(prompts.of(path))
        except PromptError as error:
            bad.append(str(error))
    return Inventory(
        folder=root,
        listing=listing,
        copies=equal_bytes(root, [path for path in listing.videos if path not in outside and printable(path) == path]),
        outside=sorted(outside),
        prompts=prompted,
        bad_prompts=sorted({*bad, *prompts.faults(listing.videos)}),
        unread=sorted(unread_texts(root, listing, prompts)),
        misspelt=prompts.unknown(listing.videos),
    )


def require_folder(folder: Path) -> Path:
    """The videos folder. Raises MissingInput when it is not there or no folder."""
    if not folder.is_dir():
        what = f"{folder} is a file, not a folder of videos" if folder.exists() else f"no videos folder at {folder}"
        raise MissingInput(what, PUT_VIDEOS)
    return folder


# --------------------------------------------------------------------------------------------------------- equal bytes


def equal_bytes(root: Path, videos: Collection[str], digest: Callable[[str], str] | None = None) -> dict[str, str]:
    """Videos whose bytes another has, too -> that one, the first of them by name. Empty files and unreadable ones have none.

    Only files of equal length are opened, and only those that begin alike are read whole.

    digest: path of a video -> a hash of its bytes; by default it is computed here.
    """
    whole = digest or (lambda path: file_hash(root / path)[1])
    groups = [sorted(videos)]
    for tell in (lambda path: (root / path).stat().st_size or None, lambda path: _head(root / path), whole):
        groups = [same for group in groups for same in _alike(group, tell)]
    return {path: kept for kept, *others in groups for path in others}


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD)


def _alike(paths: list[str], tell: Callable[[str], Hashable]) -> Iterator[list[str]]:
    """Groups of at least two that `tell` gives the same of, which is not None."""
    found: defaultdict[Hashable, list[str]] = defaultdict(list)
    for path in paths:
        try:
            found[tell(path)].append(path)
        except OSError:  # the step that reads it tells why
            continue
    found.pop(None, None)
    return (group for group in found.values() if len(group) > 1)


# ------------------------------------------------------------------------------------------------------------ captions


def unread_texts(root: Path, listing: Listing, prompts: Prompts) -> Iterator[str]:
    """Texts that may hold captions, but are neither beside a video under its name nor a table in a layout that is read."""
    known = {plain(f"{folder}/{name}") for folder, video in map(os.path.split, listing.videos) for name in names_beside(video)}
    for text in listing.texts:
        folder, name = os.path.split(text)
        mine = plain(f"{folder}/{name}") in known or name in CALIBRATIONS or name.lower().startswith(ABOUT)
        if not mine and not prompts.is_table(root / text):
            yield text


def names_beside(video: str) -> list[str]:
    """Names of the texts that belong to a video of that name."""
    return [*sidecar_names(video), *(os.path.splitext(video)[0] + ending for ending in CALIBRATION_ENDINGS)]
