"""The sensor that notices new and replaced videos once their size has stopped changing."""

import json

import dagster as dg

from fw_pipeline.jobs import annotate_videos
from fw_pipeline.partitions import range_tags, video_partitions
from fw_pipeline.resources import PipelineResource

INTERVAL_SECONDS = 60


@dg.sensor(job=annotate_videos, minimum_interval_seconds=INTERVAL_SECONDS)
def new_videos(context: dg.SensorEvaluationContext, pipeline: PipelineResource) -> dg.SensorResult | dg.SkipReason:
    """Annotate videos that are new or replaced and whose size and date are the same as a tick ago.

    The cursor holds what was seen at the last tick and what has been launched. One run takes all of a tick's videos; it
    skips those that are up to date.
    """
    from fw_pipeline.annotate.clips import find_videos, video_key

    folder = pipeline.settings().videos
    if not folder.is_dir():
        return dg.SkipReason(f"no videos folder at {folder}")
    state = json.loads(context.cursor) if context.cursor else {"seen": {}, "launched": {}}
    seen: dict[str, list[int]] = {}
    for path in find_videos(folder):
        stat = (folder / path).stat()
        seen[video_key(path)] = [stat.st_size, stat.st_mtime_ns]
    stable = {key: value for key, value in seen.items() if state["seen"].get(key) == value}
    fresh = sorted(key for key, value in stable.items() if state["launched"].get(key) != value)
    launched = {key: value for key, value in state["launched"].items() if key in seen} | {key: stable[key] for key in fresh}
    cursor = json.dumps({"seen": seen, "launched": launched}, sort_keys=True)
    if not fresh:
        return dg.SensorResult(skip_reason=f"no new video in {folder} ({len(seen)} known)", cursor=cursor)
    known = context.instance.get_dynamic_partitions(video_partitions.name or "video")
    request = dg.RunRequest(tags=range_tags(known, fresh) | {"fantasyworld/videos": str(len(fresh))})
    add = video_partitions.build_add_request(sorted(set(fresh) - set(known)))
    return dg.SensorResult(run_requests=[request], cursor=cursor, dynamic_partitions_requests=[add])
