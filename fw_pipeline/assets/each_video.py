"""The loop that every per-video asset is: one run, many videos, each reported as soon as it is finished."""

from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from statistics import fmean
from typing import TYPE_CHECKING, Any

import dagster as dg
from tqdm import tqdm

from fw_model.errors import EncoderError, MissingInput, explanation
from fw_pipeline.annotate.types import EngineError
from fw_pipeline.failures import explained
from fw_pipeline.partitions import LAUNCH, video_partitions
from fw_pipeline.resources import PipelineResource
from fw_pipeline.steps.store import Done, StepName

if TYPE_CHECKING:
    from fw_pipeline.steps.pipeline import Pipeline

BEFORE: dict[StepName, StepName] = {"geometry": "clips", "depth": "geometry", "latents": "clips"}


def per_video_asset(group: str, deps: Sequence[dg.AssetsDefinition] = (), pool: str | None = None) -> Callable[..., Any]:
    """`dg.asset` for a step that is made video by video: one partition each, and one run for as many as are asked for."""
    return dg.asset(
        deps=deps,
        group_name=group,
        pool=pool,
        kinds={"python"},
        partitions_def=video_partitions,
        backfill_policy=dg.BackfillPolicy.single_run(),
    )


@explained()
def for_each_video(context: dg.AssetExecutionContext, resource: PipelineResource, step: StepName) -> None:
    """Run one step for the run's partitions.

    A video that fails does not stop the others; the step then fails at its end naming all of them. What is finished is
    recorded per video at once, because a run records nothing by itself until its end.
    """
    if not (context.has_partition_key or context.has_partition_key_range):
        raise MissingInput(
            f"{step}: the run names no videos", f"Choose partitions in the UI, or run: {LAUNCH} {context.job_name}"
        )
    pipeline = resource.build()
    keys = context.partition_keys
    failed: dict[str, str] = {}
    for key in tqdm(keys, desc=step, unit="video", disable=None):
        try:
            done = pipeline.run(step, key)
        except (EngineError, EncoderError) as error:  # no video is to blame, and the next one would fail likewise
            raise type(error)(f"{step} cannot run: {error.message}", error.remedy) from error
        except Exception as error:
            reason = explanation(error)
            if reason is None:
                context.log.exception("%s failed for %s", step, key)
            failed[key] = reason or f"{type(error).__name__}: {error}"
            continue
        for name, why in newly_set_aside(pipeline, step, key, done).items():
            context.log.warning("set aside %s: %s", name, why)
        metadata = describe(done)
        context.add_asset_metadata(metadata, partition_key=key)
        context.log_event(dg.AssetMaterialization(asset_key=context.asset_key, partition=key, metadata=metadata))
        aside = "the video is set aside" if done.set_aside else f"{metadata['clips set aside']} set aside"
        context.log.info("%s %s: %d clips, %s", step, done.video, metadata["clips"], aside)
    if failed:
        listing = "\n".join(f"  {key}: {reason}" for key, reason in failed.items())
        raise dg.Failure(f"{step} failed for {len(failed)} of {len(keys)} videos; the others are finished:\n{listing}")


def newly_set_aside(pipeline: "Pipeline", step: StepName, key: str, done: Done) -> dict[str, str]:
    """Video or clip id -> why this step sets it aside. What an earlier step set aside was said there."""
    before = pipeline.marker(BEFORE[step], key) if step in BEFORE else None
    known = set_aside(before) if before else {}
    return {name: reason for name, reason in set_aside(done).items() if name not in known}


def set_aside(done: Done) -> dict[str, str]:
    """The video, or those of its clips, that give nothing -> why."""
    if done.set_aside:
        return {done.video: done.set_aside.removeprefix(f"{PurePosixPath(done.video).name}: ")}
    return {status.clip_id: status.set_aside for status in done.clips if status.set_aside}


def describe(done: Done) -> dict[str, int | float | str]:
    """Metadata of one finished video: counts, reasons, and the mean of every quality number over its clips."""
    good = [status for status in done.clips if not status.set_aside]
    names = sorted({name for status in good for name in status.quality})
    numbers = {name: fmean(s.quality[name] for s in good if name in s.quality) for name in names}
    return {
        "video": done.video,
        "clips": len(good),
        "clips set aside": len(done.clips) - len(good),
        "set aside": "; ".join(f"{name}: {reason}" for name, reason in set_aside(done).items()),
        "made by": done.made_by,
        "seconds": done.seconds,
        **numbers,
    }
