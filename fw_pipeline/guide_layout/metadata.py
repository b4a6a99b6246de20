"""`metadata.json` of a guide-layout folder in its variants, read into entries with checked paths.

metadata.json                        a list of entries; {"videos" | "samples" | "data": [...]}; or {id: entry}
videos/<id>.mp4
depth/<id>/frame_0000.npy            [h, w]
points/<id>/frame_0000.npy           [h, w, 3]
camera_params/<id>.txt               a row of 12 (w2c), 16 (4 x 4) or 19 numbers (as in pose files) per frame
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fw_model.errors import Explained

METADATA = "metadata.json"
LISTS = ("videos", "samples", "data")
# What an entry says -> the keys it may say it under, the first one found counts. Other keys are left alone.
KEYS: dict[str, tuple[str, ...]] = {
    "id": ("video_id", "id", "clip_id", "name"),
    "video": ("video_path", "video", "file_path", "path"),
    "prompt": ("caption", "prompt", "text"),
    "frames": ("num_frames", "frames"),
    "fps": ("fps",),
    "depth": ("depth_path", "depth_paths", "depth_dir", "depth"),
    "points": ("points_path", "points_paths", "points_dir", "points"),
    "camera": ("camera_path", "camera_params_path", "camera_params", "camera", "pose_path"),
    "intrinsics": ("intrinsics",),
    "clip_scale": ("clip_scale",),
    "source_video": ("source_video",),
    "split": ("split",),
}
_SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class GuideLayoutError(Explained, ValueError):
    """A folder that cannot be read as the guide layout at all, or samples that keep it from being imported."""


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with one sample."""

    sample: str
    file: str  # relative to the layout's folder where it lies in it
    reason: str

    def __str__(self) -> str:
        return f"{self.sample}: {self.file}: {self.reason}"


class SampleError(Explained, ValueError):
    """A sample that cannot be used; `faults` lists everything that is wrong with it."""

    def __init__(self, *faults: Fault) -> None:
        super().__init__("\n".join(map(str, faults)))
        self.faults = faults


@dataclass(frozen=True)
class Entry:
    """One sample as `metadata.json` names it. Paths lie inside the layout's folder; whether they exist is checked later."""

    sample_id: str
    root: Path
    video: Path
    depth: Path | tuple[Path, ...]  # a folder of frame_*.npy, or the files in order
    points: Path | tuple[Path, ...]
    camera: Path
    prompt: str = ""
    frames: int | None = None
    fps: float | None = None
    intrinsics: np.ndarray | None = None  # [1 or T, 4] fx fy cx cy in pixels of the video
    clip_scale: float | None = None  # units of depth and poses per clip unit, where the sample was exported from a dataset
    source_video: str = ""  # clips of one source never straddle the splits; the sample's own video unless named
    split: str | None = None

    def shown(self, path: Path) -> str:
        """A path of this sample as messages show it."""
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)

    def fault(self, path: Path, reason: str) -> Fault:
        return Fault(self.sample_id, self.shown(path), reason)


def read_metadata(root: Path) -> tuple[list[Entry], list[Fault]]:
    """The entries of a folder's `metadata.json` that can be followed up, and what is wrong with the others.

    Raises GuideLayoutError when there is no such file, it is not JSON, or it is none of the variants.
    """
    root = root.absolute()
    file = root / METADATA
    try:
        raw = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise GuideLayoutError(
            f"{file}: not found; a guide-layout folder has videos/, depth/, points/, camera_params/ and it"
        ) from error
    except ValueError as error:
        raise GuideLayoutError(f"{file}: not JSON ({error})") from error
    entries: list[Entry] = []
    faults: list[Fault] = []
    seen: set[str] = set()
    for name, item in _items(file, raw):
        try:
            entry = _entry(root, name, item)
            if entry.sample_id in seen:
                raise ValueError("listed twice; ids must be unique")
        except ValueError as error:
            faults.append(Fault(name, METADATA, str(error)))
            continue
        seen.add(entry.sample_id)
        entries.append(entry)
    return entries, faults


def _items(file: Path, raw: Any) -> list[tuple[str, Any]]:
    """(name for messages, raw entry) of every sample."""
    if isinstance(raw, dict):
        lists = [key for key in LISTS if isinstance(raw.get(key), list)]
        if not lists and raw and all(isinstance(value, dict) for value in raw.values()):
            return [(key, {"id": key} | value) for key, value in raw.items()]
        if len(lists) == 1:
            raw = raw[lists[0]]
    if not isinstance(raw, list) or not raw:
        raise GuideLayoutError(f'{file}: expected a list of samples, {{"videos": [...]}} (or samples, data), or {{id: sample}}')
    return [
        (str(_get(item, "id") or f"entry {i}") if isinstance(item, dict) else f"entry {i}", item) for i, item in enumerate(raw)
    ]


def _get(item: Mapping[str, Any], what: str) -> Any:
    return next((item[key] for key in KEYS[what] if item.get(key) is not None), None)


def _entry(root: Path, name: str, item: Any) -> Entry:
    """One raw entry; raises ValueError with everything that is wrong in it."""
    if not isinstance(item, dict):
        raise ValueError(f"expected an object, got {json.dumps(item)[:60]}")
    found = {what: _get(item, what) for what in KEYS}
    video_text = found["video"]
    sample_id = str(found["id"] if found["id"] is not None else Path(str(video_text)).stem if video_text else "")
    if not _SAFE_ID.fullmatch(sample_id):
        raise ValueError(f"id {sample_id!r}: only letters, digits, '.', '_' and '-' (it names files)")
    wrong: list[str] = []

    def attempt(what: str, read: Any, default: Any) -> Any:
        if found[what] is None:
            return default
        try:
            return read(found[what])
        except (TypeError, ValueError) as error:
            wrong.append(f"{what}: {error}")
            return default

    def path(value: Any) -> Path:
        return _inside(root, value)

    def paths(value: Any) -> Path | tuple[Path, ...]:
        return tuple(map(path, value)) if isinstance(value, list) else path(value)

    entry = Entry(
        sample_id=sample_id,
        root=root,
        video=attempt("video", path, root / "videos" / f"{sample_id}.mp4"),
        depth=attempt("depth", paths, root / "depth" / sample_id),
        points=attempt("points", paths, root / "points" / sample_id),
        camera=attempt("camera", path, root / "camera_params" / f"{sample_id}.txt"),
        prompt=attempt("prompt", _text, ""),
        frames=attempt("frames", _count, None),
        fps=attempt("fps", _positive, None),
        intrinsics=attempt("intrinsics", _lens, None),
        clip_scale=attempt("clip_scale", _positive, None),
        source_video=attempt("source_video", _text, ""),
        split=attempt("split", _split, None),
    )
    if wrong:
        raise ValueError("; ".join(wrong))
    return entry


def _inside(root: Path, value: Any) -> Path:
    """A path from the metadata; ValueError when it, or what it links to, is not inside the layout's folder."""
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError(f"expected a path, got {json.dumps(value)[:60]}")
    path = root / value
    if ".." in Path(value).parts or not path.is_relative_to(root) or not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{value!r} leads out of the folder {root}")
    return path


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected text, got {json.dumps(value)[:60]}")
    return value.strip()


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"expected a number of frames, got {json.dumps(value)[:60]}")
    return value


def _positive(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"expected a positive number, got {json.dumps(value)[:60]}")
    return float(value)


def _split(value: Any) -> str:
    names = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
    if value not in names:
        raise ValueError(f"expected train or val, got {json.dumps(value)[:60]}")
    return names[value]


def _lens(value: Any) -> np.ndarray:
    """fx fy cx cy, a 3 x 3 matrix, either of them per frame, or an object with these four -> [1 or T, 4]."""
    if isinstance(value, dict):
        value = [value.get(key) for key in ("fx", "fy", "cx", "cy")]
    array = np.asarray(value, np.float64)
    if array.shape[-2:] == (3, 3):
        array = array[..., [0, 1, 0, 1], [0, 1, 2, 2]]
    array = np.atleast_2d(array)
    if array.ndim != 2 or array.shape[1] != 4 or not np.isfinite(array).all() or (array[:, :2] <= 0).any():
        raise ValueError("expected fx fy cx cy or a 3x3 matrix in pixels of the video, for all frames or for each")
    return array
