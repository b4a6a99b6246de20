"""The clips of a folder with their pictures, to be audited: what the pipeline finished, or a guide-layout folder's samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fw_model.errors import BadFileError, Explained, MissingInput
from fw_pipeline.annotate.audit.audit import audit
from fw_pipeline.annotate.audit.verdict import Verdict
from fw_pipeline.annotate.types import ClipSetAside, VideoSetAside
from fw_pipeline.guide_layout.check import Sample, check_sample
from fw_pipeline.guide_layout.finish import Window, finish, read_pictures, windows
from fw_pipeline.guide_layout.metadata import SampleError, read_metadata
from fw_pipeline.steps.pipeline import Pipeline
from fw_pipeline.steps.review import audit_clip, finished_clips
from fw_pipeline.steps.settings import settings_from_env


class NothingToAudit(Explained, ValueError):
    """A folder that holds no geometry."""


@dataclass(frozen=True)
class Item:
    """A clip, and how to come to its verdict. A clip that cannot be read raises one of `UNREADABLE`."""

    name: str
    judge: Callable[[], Verdict]


UNREADABLE = (ClipSetAside, VideoSetAside, SampleError, BadFileError, MissingInput, OSError, ValueError)


def items(folder: Path, videos: Path | None) -> Iterator[Item]:
    """Everything in `folder` that can be audited, one after the other.

    videos: the folder of the videos that a pipeline's data folder was made from; None: the pipeline's own.
    Raises NothingToAudit.
    """
    if (folder / "metadata.json").is_file():
        yield from _guide(folder)
    elif (folder / "depth").is_dir():
        yield from _data(folder, videos)
    else:
        raise NothingToAudit(
            f"{folder}: neither a pipeline's data folder with finished clips (it has no depth/) nor a guide-layout folder "
            "(it has no metadata.json)",
            "Name one of them",
        )


def _data(folder: Path, videos: Path | None) -> Iterator[Item]:
    pipeline = Pipeline(settings_from_env(data=folder.absolute(), videos=videos and videos.absolute()))

    for key, clip, finished in finished_clips(pipeline):
        yield Item(clip.clip_id, partial(audit_clip, pipeline, key, clip, finished))


def _guide(folder: Path) -> Iterator[Item]:
    entries, faults = read_metadata(folder)
    for fault in faults:
        yield Item(fault.sample, partial(_raise, SampleError(fault)))
    for entry in entries:
        try:
            sample = check_sample(entry)
            cut = windows(sample, None)
        except ValueError as error:
            yield Item(entry.sample_id, partial(_raise, error))
            continue
        for window in cut:
            yield Item(window.clip_id, partial(_judge_sample, sample, window))


def _judge_sample(sample: Sample, window: Window) -> Verdict:
    return audit(read_pictures(sample, window), finish(sample, window))


def _raise(error: Exception) -> Verdict:
    raise error
