"""Whether a file holds all that it declares. Judged by its bytes where the container allows it, else by its times."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
from av.video.stream import VideoStream

from fw_pipeline.annotate.types import VideoSetAside

SEGMENT = 0x18538067
# What may stand directly in a Matroska segment (RFC 9559).
LEVEL_ONE = {0x114D9B74, 0x1549A966, 0x1654AE6B, 0x1F43B675, 0x1C53BB6B, 0x1941A469, 0x1043A770, 0x1254C367, 0xEC, 0xBF}


def check_whole(path: Path, container: av.container.InputContainer, stream: VideoStream, tick: Fraction, end: float) -> None:
    """Refuse a file whose frames end before the length it declares: the rest is missing.

    MP4 and MOV are exempt: their index has been held against the file's size, and an edit list may rightly shorten them. So is
    a Matroska file whose elements fill it to the last byte: its last frame stays, and does not say for how long.

    Args:
        path: the file.
        container: the file, opened.
        stream: its video track.
        tick: unit of the track's times, seconds.
        end: seconds, the latest end of any frame by its packet's own duration.

    Raises VideoSetAside.
    """
    if "mp4" in container.format.name:
        return
    tag = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))  # Matroska, per track
    if stream.duration:
        declared = float(stream.duration * tick)
    elif tag:
        declared = 3600 * int(tag[1]) + 60 * int(tag[2]) + float(tag[3])
    elif len(container.streams) == 1 and container.duration:
        declared = container.duration / av.time_base
    else:
        return
    short = end < declared - 0.25 - 0.01 * declared
    if short and not ("matroska" in container.format.name and fills_its_file(path)):
        raise VideoSetAside(f"{path.name}: truncated: its frames end at {end:.2f} s of {declared:.2f} s")


def fills_its_file(path: Path) -> bool:
    """Whether a Matroska file's elements follow one another, all known and of known length, to the end of its bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = _element(file)
        if header is None:
            return False
        file.seek(header[2])
        segment = _element(file)
        if segment is None or segment[0] != SEGMENT or segment[2] > size:
            return False
        file.seek(segment[1])
        while file.tell() < segment[2]:
            element = _element(file)
            if element is None or element[0] not in LEVEL_ONE or element[2] > segment[2]:
                return False
            file.seek(element[2])
    return True


def _element(file: BinaryIO) -> tuple[int, int, int] | None:
    """(id, first byte of its content, one past its last) of the EBML element here; None where none is, or of open length."""
    name = _number(file, keep_marker=True)
    length = _number(file, keep_marker=False)
    return None if name is None or length is None else (name, file.tell(), file.tell() + length)


def _number(file: BinaryIO, keep_marker: bool) -> int | None:
    """A number of variable length (RFC 8794); None at the end, for a damaged one, and for "unknown", all bits set."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    more = 8 - first[0].bit_length()
    rest = file.read(more)
    if len(rest) < more:
        return None
    value = int.from_bytes(first + rest, "big")
    bare = value - (1 << (7 * (more + 1)))
    return value if keep_marker else (None if bare == (1 << (7 * (more + 1))) - 1 else bare)
