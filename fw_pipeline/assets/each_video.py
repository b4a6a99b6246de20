"""The loop that every per-video asset is: one run, many videos, each reported as soon as it is finished."""

from collections.abc import Callable, Mapping, Sequence
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

# The steps that must have come through for a video, the nearest last, and those assets that go on from there.
BEFORE: dict[StepName, tuple[StepName, ...]] = {
    "clips": (),
    "geometry": ("clips",),
    "depth": ("clips", "geometry"),
    "latents": ("clips",),
}
AFTER: dict[StepName, tuple[str, ...]] = {
    "clips": ("geometry", "latents"),
    "geometry": ("depth",),
    "depth": ("training_shards",),
    "latents": ("training_shards",),
}
FAULTS = "faults"  # key of a failure's metadata: how many videos or clips failed while the others were finished


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

    A video that fails stops neither the others nor the steps that follow: these leave it out, and the run's last step fails
    at its end naming all of them (`raise_for_faults`). A video that is gone, or failed in an earlier step, is left out with a
    line. What is finished is recorded per video at once, because a run records nothing by itself until its end.
    """
    if not (context.has_partition_key or context.has_partition_key_range):
        raise MissingInput(
            f"{step}: the run names no videos", f"Choose partitions in the UI, or run: {LAUNCH} {context.job_name}"
        )
    pipeline = resource.build()
    keys = context.partition_keys
    for key in tqdm(keys, desc=step, unit="video", disable=None):
        if key not in pipeline.videos:
            context.log.info("%s: left out %s, whose video is no longer in %s", step, key, pipeline.settings.videos)
            continue
        if broken := next((earlier for earlier in BEFORE[step] if pipeline.store.fault(earlier, key)), None):
            context.log.warning("%s: left out %s, for which %s failed", step, pipeline.shown(key), broken)
            continue
        try:
            done = pipeline.run(step, key)
        except (EngineError, EncoderError) as error:  # no video is to blame, and the next one would fail likewise
            raise type(error)(f"{step} cannot run: {error.message}", error.remedy) from error
        except Exception as error:
            reason = explanation(error)
            if reason is None:
                context.log.exception("%s failed for %s", step, key)
            pipeline.store.note_fault(step, key, reason or f"{type(error).__name__}: {error}")
            continue
        pipeline.store.note_fault(step, key, "")
        for name, why in newly_set_aside(pipeline, step, key, done).items():
            context.log.warning("set aside %s: %s", name, why)
        metadata = describe(done)
        context.add_asset_metadata(metadata, partition_key=key)
        context.log_event(dg.AssetMaterialization(asset_key=context.asset_key, partition=key, metadata=metadata))
        aside = "the video is set aside" if done.set_aside else f"{metadata['clips set aside']} set aside"
        context.log.info("%s %s: %d clips, %s", step, done.video, metadata["clips"], aside)
    if not in_run(context).intersection(AFTER[step]):
        raise_for_faults(context, pipeline, [key for key in keys if key in pipeline.videos])


def in_run(context: dg.AssetExecutionContext) -> set[str]:
    """Names of the assets that this run makes."""
    return {key.to_user_string() for key in context.job_def.asset_layer.executable_asset_keys}


def raise_for_faults(
    context: dg.AssetExecutionContext, pipeline: "Pipeline", keys: Sequence[str], more: Mapping[str, str] | None = None
) -> None:
    """Fail when steps of this run failed for some of its videos, naming each with step and reason; the others are finished.

    more: what else failed, a clip or video -> why.
    """
    steps = [step for step in BEFORE if step in in_run(context)]
    failed = {key: told for key in keys if (told := [(s, why) for s in steps if (why := pipeline.store.fault(s, key))])}
    lines = [f"  {pipeline.shown(key)}: {step}: {why}" for key, told in failed.items() for step, why in told]
    lines += [f"  {name}: {why}" for name, why in (more or {}).items()]
    if lines:
        raise dg.Failure(
            f"{len(lines)} failures in {len(keys)} videos; what is not named is finished:\n" + "\n".join(lines),
            metadata={FAULTS: len(lines)},
            allow_retries=False,
        )


def newly_set_aside(pipeline: "Pipeline", step: StepName, key: str, done: Done) -> dict[str, str]:
    """Video or clip id -> why this step sets it aside. What an earlier step set aside was said there."""
    before = pipeline.marker(BEFORE[step][-1], key) if BEFORE[step] else None
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
