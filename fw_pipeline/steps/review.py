"""A second look at what the steps have finished: against ground truth where there is one, and against itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from fw_pipeline.annotate import clips as clip_io
from fw_pipeline.annotate import quality
from fw_pipeline.annotate.audit.audit import audit
from fw_pipeline.annotate.audit.verdict import Verdict
from fw_pipeline.annotate.truth import compare_with_truth
from fw_pipeline.annotate.types import Clip, ClipSetAside
from fw_pipeline.steps.pipeline import Pipeline
from fw_pipeline.steps.results import FinishedClip
from fw_pipeline.steps.store import load_arrays


def finished_clips(pipeline: Pipeline) -> Iterator[tuple[str, Clip, FinishedClip]]:
    """(video key, clip, arrays) of every clip in the folder that came through the depth step."""
    for key in pipeline.videos:
        done = pipeline.store.done("depth", key)
        for clip in pipeline.clips_of(key, done) if done is not None else []:
            yield key, clip, load_arrays(pipeline.store.folder("depth", key) / f"{clip.clip_id}.npz", FinishedClip)


def truth_errors(pipeline: Pipeline) -> dict[str, dict[str, float]]:
    """Clip id -> errors against ground truth, for the clips whose video has one."""
    errors = {
        clip.clip_id: compare_with_truth(pipeline.video_path(key), clip, finished.depth.astype(np.float32), finished.w2c)
        for key, clip, finished in finished_clips(pipeline)
    }
    return {clip_id: numbers for clip_id, numbers in errors.items() if numbers is not None}


def audit_clip(pipeline: Pipeline, key: str, clip: Clip, finished: FinishedClip) -> Verdict:
    """The audit of a finished clip at the annotation size: in the pictures of a small bucket points are followed too roughly.

    Depth is taken as it would be packed, a pixel for the pixels that it covers.
    """
    height, width = clip_io.annotation_size(clip, pipeline.settings.annotation_long_side)
    intrinsics = finished.intrinsics.astype(np.float64)
    intrinsics[:, :2] *= np.array([width / clip.width, height / clip.height])[:, None]
    row = (np.arange(height) * clip.height // height)[:, None]
    column = (np.arange(width) * clip.width // width)[None]
    larger = replace(
        finished, intrinsics=intrinsics, depth=finished.depth[:, row, column], confidence=finished.confidence[:, row, column]
    )
    return audit(clip_io.read_frames(pipeline.video_path(key), clip, height, width), larger)


def audit_finished(pipeline: Pipeline, most: int) -> tuple[dict[str, Verdict], int]:
    """(clip id -> the audit's verdict on what would be packed, number of finished clips). At most `most` clips are judged, spread
    evenly; the video's pictures are read again."""
    names = [clip.clip_id for _, clip, _ in finished_clips(pipeline)]
    chosen = {names[i] for i in np.unique(np.rint(np.linspace(0, len(names) - 1, min(most, len(names)))).astype(int))}
    verdicts = {
        clip.clip_id: audit_clip(pipeline, key, clip, finished)
        for key, clip, finished in finished_clips(pipeline)
        if clip.clip_id in chosen
    }
    return verdicts, len(names)


def consistency_faults(pipeline: Pipeline) -> dict[str, str]:
    """Clip id -> what is inconsistent, for the finished clips that are not."""
    faults = {}
    for _, clip, finished in finished_clips(pipeline):
        try:
            quality.check_consistency(finished.depth.astype(np.float32), finished.intrinsics, finished.w2c)
        except ClipSetAside as error:
            faults[clip.clip_id] = str(error)
    return faults
