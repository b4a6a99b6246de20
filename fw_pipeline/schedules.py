"""The nightly schedule that re-annotates what is missing, failed, or made by other code, settings or models."""

import dagster as dg

from fw_pipeline.jobs import annotate_videos
from fw_pipeline.partitions import register
from fw_pipeline.resources import PipelineResource


@dg.schedule(job=annotate_videos, cron_schedule="0 3 * * *")
def reannotate(context: dg.ScheduleEvaluationContext, pipeline: PipelineResource) -> dg.RunRequest | dg.SkipReason:
    """Launch one run for all stale videos; nothing runs when everything is up to date.

    The run covers the range of partitions from the first to the last stale one; those between that are up to date are skipped.
    """
    from fw_model.errors import MissingInput

    built = pipeline.build()
    try:
        stale = [key for key in built.videos if any(built.is_stale(step, key) for step in ("clips", "geometry", "depth"))]
    except MissingInput as error:
        return dg.SkipReason(str(error))
    if not stale:
        return dg.SkipReason(f"all {len(built.videos)} videos are up to date")
    return dg.RunRequest(tags=register(context.instance, stale) | {"fantasyworld/stale": str(len(stale))})
