"""The sensor that notices new and replaced videos once their size has stopped changing."""

import json
from pathlib import Path

import dagster as dg

from fw_pipeline.jobs import annotate_videos
from fw_pipeline.partitions import NAME, gone, inventory_tags, range_tags, video_partitions
from fw_pipeline.resources import PipelineResource

INTERVAL_SECONDS = 60


@dg.sensor(job=annotate_videos, minimum_interval_seconds=INTERVAL_SECONDS)
def new_videos(context: dg.SensorEvaluationContext, pipeline: PipelineResource) -> dg.SensorResult | dg.SkipReason:
    """Annotate videos that are new or replaced and whose size and date are the same as a tick ago.

    The cursor holds what was seen at the last tick and what has been launched. One run takes all of a tick's videos; it
    skips those that are up to date. Videos that are gone retire their partitions.
    """
    from fw_pipeline.annotate.clips import video_key
    from fw_pipeline.annotate.folder import list_folder
    from fw_pipeline.steps.inventory import take_inventory

    settings = pipeline.settings()
    folder = settings.videos
    if not folder.is_dir():
        return dg.SkipReason(f"no videos folder at {folder}")
    state = json.loads(context.cursor) if context.cursor else {"seen": {}, "launched": {}}
    seen: dict[str, list[int]] = {}
    listing = list_folder(folder, settings.linked_folders)
    for path in listing.videos:
        seen[video_key(path)] = state_of(folder / path)
    stable = {key: value for key, value in seen.items() if state["seen"].get(key) == value}
    fresh = sorted(key for key, value in stable.items() if state["launched"].get(key) != value)
    launched = {key: value for key, value in state["launched"].items() if key in seen} | {key: stable[key] for key in fresh}
    cursor = json.dumps({"seen": seen, "launched": launched}, sort_keys=True)
    old = [] if listing.closed else gone(context.instance, seen)  # videos in a folder that cannot be read now are not gone
    retired = [video_partitions.build_delete_request(old)] if old else []
    if not fresh:
        idle = f"no new video in {folder} ({len(seen)} known)"
        return dg.SensorResult(skip_reason=idle, cursor=cursor, dynamic_partitions_requests=retired)
    known = [key for key in context.instance.get_dynamic_partitions(NAME) if key not in old]
    tags = range_tags(known, fresh) | {"fantasyworld/videos": str(len(fresh))} | inventory_tags(take_inventory(settings))
    request = dg.RunRequest(tags=tags)
    add = video_partitions.build_add_request(sorted(set(fresh) - set(known)))
    return dg.SensorResult(run_requests=[request], cursor=cursor, dynamic_partitions_requests=[*retired, add])


def state_of(video: Path) -> list[int]:
    """Size and time of change. What the system tells nothing of has a state, too: the run sets it aside with the reason."""
    try:
        found = video.stat()
    except OSError:
        return [-1, 0]
    return [found.st_size, found.st_mtime_ns]
