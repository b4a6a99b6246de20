"""Paths in words: "orbit_360deg", "forward 20, pan_left 15", "truck_right:0.3:ease 40, hold 8".

Moves one after the other, each `NAME[:AMOUNT[:EASING]] [LENGTH]`. Lengths are frames and are stretched together to the frames
asked for; without any, all moves are equally long. `NAME_360deg` is `NAME:360`, of an orbit to the right. Each move begins where
the one before ends, in the direction the camera then looks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fw_model.cameras import DEFAULT_LENS, Cameras, invert_pose, relative_to_first, with_lens
from fw_model.errors import Explained, did_you_mean
from fw_model.trajectory.formats import ReadPath, read_path_file
from fw_model.trajectory.moves import AHEAD, MOVES

EASINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda s: s,
    "ease": lambda s: s * s * (3 - 2 * s),  # slow at both ends
    "ease_in": lambda s: s * s,
    "ease_out": lambda s: s * (2 - s),
}
_PART = re.compile(
    r"(?P<name>[a-z_]+?)(?:_(?P<degrees>\d+(?:\.\d+)?)deg)?"
    r"(?::(?P<amount>[^:\s]+))?(?::(?P<easing>[^:\s]+))?(?:\s+(?P<length>\S+))?"
)


class PathError(Explained, ValueError):
    """A path in words that cannot be read; the message names the part and what there is."""


@dataclass(frozen=True)
class Segment:
    """One move of a path."""

    name: str  # of MOVES
    amount: float
    easing: str
    length: float | None  # frames, None: not said


def parse_path(text: str) -> list[Segment]:
    """Raises PathError naming the part that cannot be read."""
    parts = [part.strip() for part in text.split(",")]
    if not text.strip() or not all(parts):
        raise PathError(f"camera path {text!r}: a move is empty; a path looks like: forward 20, pan_left 15")
    segments = [_segment(part) for part in parts]
    said = [segment for segment in segments if segment.length is not None]
    if said and len(said) < len(segments):
        silent = next(segment.name for segment in segments if segment.length is None)
        raise PathError(f"camera path {text!r}: {silent} has no length, others have; give all of them or none")
    return segments


def _segment(part: str) -> Segment:
    found = _PART.fullmatch(part)
    if not found:
        raise PathError(f"camera path: {part!r} is no move; one looks like: pan_left, or truck_right:0.3:ease 40")
    name, degrees = found["name"], found["degrees"]
    name = f"{name}_right" if degrees and name not in MOVES and f"{name}_right" in MOVES else name
    if name not in MOVES:
        raise PathError(f"camera path: no move {name!r}{did_you_mean(name, MOVES)}", f"There are {', '.join(MOVES)}")
    move, easing = MOVES[name], found["easing"] or "linear"
    if degrees and (move.unit != "degrees" or found["amount"]):
        raise PathError(f"camera path: {part!r}: {name} takes {move.unit or 'no amount'}, once; write {name}:AMOUNT")
    amount = _number(found["amount"] or degrees, part, "amount") if found["amount"] or degrees else move.amount
    if easing not in EASINGS:
        raise PathError(f"camera path: {part!r}: no easing {easing!r}{did_you_mean(easing, EASINGS)}; {', '.join(EASINGS)}")
    length = None if found["length"] is None else _number(found["length"], part, "length")
    if length is not None and not length > 0:
        raise PathError(f"camera path: {part!r}: a length is above 0 frames")
    _check_amount(name, amount, part)
    return Segment(name, amount, easing, length)


def _number(text: str, part: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise PathError(f"camera path: {part!r}: {what} {text!r} is no number") from error
    if not math.isfinite(value):
        raise PathError(f"camera path: {part!r}: {what} {text!r} is not finite")
    return value


def _check_amount(name: str, amount: float, part: str) -> None:
    if name.startswith("zoom") and not 0.05 <= amount <= 20:
        raise PathError(f"camera path: {part!r}: a focal length grows 0.05 to 20 times")
    if (name == "dolly_zoom_in" and not amount < AHEAD) or (name == "dolly_zoom_out" and not -amount < AHEAD):
        raise PathError(f"camera path: {part!r}: less than {AHEAD:g} clip units, where the scene is")
    if name.startswith("arc") and not abs(amount) < 90:
        raise PathError(f"camera path: {part!r}: an arc is below 90 degrees")


def make_path(segments: list[Segment], frames: int) -> tuple[Tensor, Tensor]:
    """w2c [T, 3, 4] float64, the first camera the world, and focal lengths over the first one [T].

    Raises PathError when there are fewer frames than moves can be told apart in.
    """
    if frames < len(segments) + 1 and frames > 1:
        raise PathError(f"camera path: {len(segments)} moves in {frames} frames")
    lengths = torch.tensor([segment.length or 1.0 for segment in segments], dtype=torch.float64)
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0) / lengths.sum()])
    time = torch.linspace(0, 1, frames, dtype=torch.float64)
    which = torch.searchsorted(ends[1:-1].contiguous(), time, right=False)
    rotation, centre, focal = torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), 1.0
    c2w, zoom = torch.zeros(frames, 3, 4, dtype=torch.float64), torch.ones(frames, dtype=torch.float64)
    for i, segment in enumerate(segments):
        mine = (which == i).nonzero()[:, 0]
        share = torch.cat([(time[mine] - ends[i]) / (ends[i + 1] - ends[i]), time.new_ones(1)])  # last: where the next begins
        motion = MOVES[segment.name].run(EASINGS[segment.easing](share.clamp(0, 1)), segment.amount)
        turned, moved = rotation @ motion.rotation, centre + motion.centre @ rotation.T
        c2w[mine] = torch.cat([turned[:-1], moved[:-1, :, None]], dim=-1)
        zoom[mine] = focal * motion.zoom[:-1]
        rotation, centre, focal = turned[-1], moved[-1], focal * float(motion.zoom[-1])
    return relative_to_first(invert_pose(c2w)), zoom


def make_trajectory(text: str, frames: int, height: int, width: int) -> Cameras:
    """Cameras of a path in words, with `DEFAULT_LENS` on a height x width image. Raises PathError."""
    if frames < 1:
        raise PathError(f"a camera path needs at least one frame, got {frames}")
    w2c, zoom = make_path(parse_path(text), frames)
    lens = torch.tensor(DEFAULT_LENS, dtype=torch.float64).expand(frames, -1).clone()
    lens[:, :2] *= zoom[:, None]
    return with_lens(w2c.float(), lens, 720, 1280).resized(height, width)


def read_path(given: str | Path, frames: int | None, height: int, width: int) -> ReadPath:
    """A path in words, or a file of one; see `parse_path` and `formats.read_path_file`.

    Args:
        given: what is the name of a file or folder that exists is read, else it is words.
        frames: of a path in words; of a file those it has.
        height, width: of the image that the intrinsics are for, pixels.

    Raises PathError, PoseFileError.
    """
    if isinstance(given, Path) or Path(given).exists():
        return read_path_file(Path(given), height, width)
    return ReadPath(make_trajectory(given, frames or 1, height, width), f"{given}, with the base model's lens")
