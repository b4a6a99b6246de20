"""The dataset from what the steps have made: what changed is written, the rest stays as it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from fw_model.data.schema import ClipRecord
from fw_model.data.shard_writer import ShardWriter
from fw_model.data.splits import assign_splits
from fw_model.errors import ANNOTATE_VIDEOS, BUILD_DATASET, BadFileError, MissingInput
from fw_pipeline.annotate.types import Clip, Measured
from fw_pipeline.steps.pipeline import CODE_VERSION, Pipeline
from fw_pipeline.steps.results import EncodedClip, EncodedText, FinishedClip, PicturesClip
from fw_pipeline.steps.store import load_arrays

LISTED = 20  # reasons that an error names; all of them are in the markers


@dataclass
class PackResult:
    """What went into the dataset and what did not."""

    clips: int = 0
    kept: int = 0  # of them, those that were packed before and have not changed: neither read nor written
    bytes_written: int = 0
    set_aside: dict[str, str] = field(default_factory=dict)  # clip id or video -> reason
    not_annotated: list[str] = field(default_factory=list)  # videos some step has not finished yet
    failed: dict[str, str] = field(default_factory=dict)  # clips or videos whose results cannot be read back -> why


def pack(pipeline: Pipeline, progress: Callable[[Iterable[str]], Iterable[str]] = iter) -> PackResult:
    """Bring the sharded dataset up to date: every annotated clip in it, every one set aside in its manifest with the reason.

    Clips that were packed before and have not changed are neither read nor written.
    Raises MissingInput when not a single clip is ready.
    """
    result = PackResult()
    ready: dict[str, str] = {}
    for key in pipeline.videos:
        video = pipeline.shown(key)
        if any(pipeline.is_stale(step, key) for step in ("clips", "geometry", "depth", "latents")):
            result.not_annotated.append(video)
        else:
            ready[key] = video
    reasons = {key: _reasons(pipeline, key) for key in ready}
    usable = {key: clips for key in ready if (clips := _good_clips(pipeline, key, reasons[key]))}
    if not usable:
        raise _nothing_to_pack(pipeline, {ready[key]: list(reasons[key].values()) for key in ready}, result.not_annotated)
    splits = assign_splits([ready[key] for key in sorted(usable)], pipeline.settings.val_percent)
    with ShardWriter(pipeline.store.dataset) as writer:
        for key in progress(ready):
            for name, reason in reasons[key].items():
                result.set_aside[name] = reason
                found = measured(pipeline, key).get(name, Measured())
                writer.quarantine(name, ready[key], reason, quality=found.numbers, motion=found.motion)
            if key in usable:
                _pack_video(pipeline, key, usable[key], splits[ready[key]], writer, result)
    result.bytes_written = writer.bytes_written
    return result


def _nothing_to_pack(pipeline: Pipeline, aside: dict[str, list[str]], unfinished: list[str]) -> MissingInput:
    """What keeps the dataset empty and what helps: an unfinished step is run, a video that was set aside is replaced."""
    videos = pipeline.settings.videos
    lines = [f"\n  {named(video, reason)}" for video, reasons in aside.items() for reason in reasons]
    listing = "".join(lines[:LISTED]) + (f"\n  and {len(lines) - LISTED} more" if len(lines) > LISTED else "")
    if unfinished:
        said = f"no clip to pack from {videos}: {len(unfinished)} videos are not finished, {len(aside)} were set aside{listing}"
        unannotated = any(pipeline.is_stale(step, key) for step in ("clips", "geometry", "depth") for key in pipeline.videos)
        return MissingInput(said, f"Run: {ANNOTATE_VIDEOS if unannotated else BUILD_DATASET}")
    if not aside:
        return MissingInput(f"no videos in {videos}, so there is no clip to pack", f"Put some there, then run: {ANNOTATE_VIDEOS}")
    said = f"no clip to pack: every video in {videos} was set aside ({len(aside)} of {len(aside)}){listing}"
    where = f"the reasons are also in {pipeline.store.root}/*/<video>/done.json"
    return MissingInput(said, f"Replace or mend these videos, or add others, then run: {ANNOTATE_VIDEOS}; {where}")


def named(video: str, reason: str) -> str:
    """A reason that begins with the file it is about."""
    return reason if reason.startswith(video) else f"{video}: {reason}"


def _pack_video(pipeline: Pipeline, key: str, clips: list[Clip], split: str, writer: ShardWriter, result: PackResult) -> None:
    """Add or keep the clips of a video. What cannot be read back costs the clip, or with its prompt's embedding the video."""
    source, prompt = _source(pipeline, key), pipeline.prompt_of(key)
    try:
        _pack_texts(pipeline, key, writer)
    except BadFileError as error:
        result.failed[pipeline.shown(key)] = str(error)
        return
    for clip in clips:
        if writer.keep(clip.clip_id, split, source, prompt):
            result.kept += 1
        else:
            try:
                record = _record(pipeline, key, clip)
            except BadFileError as error:
                result.failed[clip.clip_id] = str(error)
                continue
            writer.add(record, split, source)
        result.clips += 1


def _reasons(pipeline: Pipeline, key: str) -> dict[str, str]:
    """Clip id, or the video's key for the whole of it -> why it is set aside."""
    depth, latents = pipeline.marker("depth", key), pipeline.marker("latents", key)
    if reason := depth.set_aside or latents.set_aside:
        return {key: reason}
    return {status.clip_id: status.set_aside for status in (*latents.clips, *depth.clips) if status.set_aside}


def measured(pipeline: Pipeline, key: str) -> dict[str, Measured]:
    """Clip id -> what the annotating steps measured of it, also of clips that they set aside."""
    return {s.clip_id: Measured(s.quality, s.motion) for s in pipeline.marker("depth", key).clips}


def _good_clips(pipeline: Pipeline, key: str, reasons: dict[str, str]) -> list[Clip]:
    if key in reasons:
        return []
    return [clip for clip in pipeline.clips_of(key, pipeline.marker("depth", key)) if clip.clip_id not in reasons]


def _source(pipeline: Pipeline, key: str) -> str:
    """Digest of all that the packed clips of a video are made from, but for the prompt, which is no part of them."""
    parts = [CODE_VERSION, *(pipeline.marker(step, key).fingerprint for step in ("depth", "latents"))]
    parts += [] if pipeline.pictures else [pipeline.encoder_ids["text"]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _pack_texts(pipeline: Pipeline, key: str, writer: ShardWriter) -> None:
    for prompt in pipeline.texts_of(key):
        if not writer.keep_text(prompt, pipeline.encoder_ids["text"]):
            writer.add_text(prompt, load_arrays(pipeline.text_file(prompt), EncodedText).text, pipeline.encoder_ids["text"])


def _record(pipeline: Pipeline, key: str, clip: Clip) -> ClipRecord:
    geometry, depth = pipeline.marker("geometry", key), pipeline.marker("depth", key)
    found = measured(pipeline, key)[clip.clip_id]
    finished = load_arrays(pipeline.store.folder("depth", key) / f"{clip.clip_id}.npz", FinishedClip)
    kind = PicturesClip if pipeline.pictures else EncodedClip
    encoded = load_arrays(pipeline.store.folder("latents", key) / f"{clip.clip_id}.npz", kind)
    names = ("depth", "confidence", "intrinsics", "w2c")
    return ClipRecord(
        clip_id=clip.clip_id,
        video=clip.video,
        fps=clip.fps,
        scale=float(finished.scale),
        prompt=pipeline.prompt_of(key),
        arrays={name: getattr(finished, name) for name in names} | vars(encoded),
        quality=dict(found.numbers),
        motion=found.motion,
        versions={"geometry": geometry.made_by, "depth": depth.made_by} | ({} if pipeline.pictures else pipeline.encoder_ids),
    )
