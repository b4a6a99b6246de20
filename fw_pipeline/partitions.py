"""One partition per video; the key is `video_key(relative path)`, safe as a file name and in every Dagster tag."""

from collections.abc import Sequence

import dagster as dg

video_partitions = dg.DynamicPartitionsDefinition(name="video")
# Dagster's names of them are private; a test holds these to its values.
RANGE_START, RANGE_END = "dagster/asset_partition_range_start", "dagster/asset_partition_range_end"

LAUNCH = "python -m fw_pipeline.launch"


def range_tags(known: Sequence[str], keys: Sequence[str]) -> dict[str, str]:
    """Run tags of the smallest range of partitions that holds all `keys`, new ones being added behind the `known` ones.

    What lies between them and is up to date is skipped by the assets. Raises ValueError without keys.
    """
    if not keys:
        raise ValueError("no videos to launch a run for")
    order = [*known, *sorted(set(keys) - set(known))]
    places = sorted(order.index(key) for key in keys)
    return {RANGE_START: order[places[0]], RANGE_END: order[places[-1]]}


def register(instance: dg.DagsterInstance, keys: Sequence[str]) -> dict[str, str]:
    """Add the videos as partitions and return the tags of a run over them."""
    name = video_partitions.name or "video"
    tags = range_tags(instance.get_dynamic_partitions(name), keys)
    instance.add_dynamic_partitions(name, sorted(set(keys) - set(instance.get_dynamic_partitions(name))))
    return tags
