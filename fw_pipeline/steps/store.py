"""The one object that owns every path below the data folder, and how results get there.

    hashes/<video_key>.json   size, time of change and xxh64 of a video, so that it is read again only when it has changed
    clips/<video_key>/        clips.json
    geometry/<video_key>/     <clip_id>.npz
    depth/<video_key>/        <clip_id>.npz
    latents/<video_key>/      <clip_id>.npz (with encode_online: its pictures)
    texts/<digest>.npz        embedding of a prompt by a text encoder, for all videos that share it
    dataset/                  manifest.parquet and shards
    faults/<step>/<video_key>.json    why a step failed for a video, until it succeeds
    outputs/fantasy_world_<stage>/<id>/    (`RunIdentity.name`) step-N.safetensors, metrics.jsonl, result.json
    reports/<stage>.html

A folder per video is written under a temporary name and renamed when whole; `done.json` inside says what it was made
from. Files are the truth: whatever the orchestrator remembers, a step is done when its folder says so.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import zipfile
import zlib
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from fw_model.config import Stage
from fw_model.errors import ANNOTATE_VIDEOS, BadFileError
from fw_model.files import printable, whole_folder, write_json

StepName = Literal["clips", "geometry", "depth", "latents"]
T = TypeVar("T")

log = logging.getLogger(__name__)


class ClipStatus(BaseModel):
    """How one clip fared in a step."""

    model_config = ConfigDict(extra="forbid")

    clip_id: str
    # The reason, if the clip was set aside; markers of before version 0.2 call it `quarantined`.
    set_aside: str | None = Field(default=None, validation_alias=AliasChoices("set_aside", "quarantined"))
    quality: dict[str, float] = {}
    motion: str = ""  # see `Measured`


class Done(BaseModel):
    """The marker of a finished step for one video."""

    model_config = ConfigDict(extra="forbid")

    video: str
    fingerprint: str  # hash of everything the result depends on; a different one means the result is stale
    made_by: str  # engine and version
    # The reason, if the whole video gives nothing; markers of before version 0.2 call it `rejected`.
    set_aside: str | None = Field(default=None, validation_alias=AliasChoices("set_aside", "rejected"))
    clips: list[ClipStatus] = []
    seconds: float = 0.0


class Store:
    """Paths and atomic writes below one data folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def dataset(self) -> Path:
        return self.root / "dataset"

    def hash_of(self, key: str) -> Path:
        return self.root / "hashes" / f"{_checked(key)}.json"

    def text(self, digest: str) -> Path:
        return self.root / "texts" / f"{digest}.npz"

    def outputs(self, stage: Stage) -> Path:
        return self.root / "outputs" / f"fantasy_world_{stage}"

    def report(self, stage: Stage) -> Path:
        return self.root / "reports" / f"{stage}.html"

    def folder(self, step: StepName, key: str) -> Path:
        return self.root / step / _checked(key)

    def done(self, step: StepName, key: str) -> Done | None:
        """The marker of a finished step, or None if the step never finished for this video.

        A marker that is damaged or of another version is told in a warning and counts as none: the step is made again.
        """
        path = self.folder(step, key) / "done.json"
        if not path.is_file():
            return None
        try:
            return Done.model_validate_json(path.read_bytes())
        except ValidationError as error:
            log.warning("%s: damaged or of another version, made again (%s)", path, error.errors()[0]["msg"])
            return None

    def fault(self, step: StepName, key: str) -> str:
        """Why a step failed for a video when it was last tried; "" when it did not."""
        path = self._fault(step, key)
        return str(json.loads(path.read_text(encoding="utf-8"))["reason"]) if path.is_file() else ""

    def note_fault(self, step: StepName, key: str, reason: str) -> None:
        """Keep why a step failed for a video; "" when it did not."""
        if reason:
            write_json(self._fault(step, key), {"reason": printable(reason)})
        else:
            self._fault(step, key).unlink(missing_ok=True)

    def _fault(self, step: StepName, key: str) -> Path:
        return self.root / "faults" / step / f"{_checked(key)}.json"

    def writing(self, step: StepName, key: str) -> AbstractContextManager[Path]:
        """A temporary folder that takes the place of the step's folder when the block ends without an error."""
        return whole_folder(self.folder(step, key))


def _checked(key: str) -> str:
    if not key or key.startswith(".") or any(c in key for c in "/\\\0"):
        raise ValueError(f"{key!r} is not a video key")
    return key


def write_done(folder: Path, done: Done) -> None:
    (folder / "done.json").write_text(done.model_dump_json(indent=1), encoding="utf-8")


def save_arrays(path: Path, value: Any) -> None:
    """Write a dataclass of arrays as .npz (no pickle)."""
    arrays: dict[str, Any] = {field.name: np.asarray(getattr(value, field.name)) for field in dataclasses.fields(value)}
    with path.open("wb") as file:  # by name, numpy would add an ending to a temporary one
        np.savez(file, **arrays)


def load_arrays(path: Path, kind: type[T]) -> T:
    """Read a dataclass of arrays back. Raises BadFileError for a file that is not there, damaged, or lacks an array."""
    remedy = f"Delete {path.parent} and run: {ANNOTATE_VIDEOS}"
    try:
        with np.load(path, allow_pickle=False) as data:
            missing = [f.name for f in dataclasses.fields(kind) if f.name not in data.files]  # type: ignore[arg-type]
            if missing:
                raise BadFileError(f"{path}: lacks {', '.join(missing)}", remedy)
            return kind(**{f.name: data[f.name] for f in dataclasses.fields(kind)})  # type: ignore[arg-type]
    except FileNotFoundError as error:
        raise BadFileError(f"{path}: is not there", remedy) from error
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        if isinstance(error, BadFileError):
            raise
        raise BadFileError(f"{path}: damaged ({error})", remedy) from error
