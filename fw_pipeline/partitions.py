"""One partition per video, and one per request for a world.

A video's key is `video_key(relative path)`, safe as a file name and in every Dagster tag; a request's is the name of its list and
its own.
"""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import dagster as dg

if TYPE_CHECKING:
    from fw_pipeline.steps.inventory import Inventory

NAME = "video"
video_partitions = dg.DynamicPartitionsDefinition(name=NAME)
REQUEST = "request"
request_partitions = dg.DynamicPartitionsDefinition(name=REQUEST)
# Dagster's names of them are private; a test holds these to its values.
RANGE_START, RANGE_END = "dagster/asset_partition_range_start", "dagster/asset_partition_range_end"

UNDER_WAY = [
    status
    for status in dg.DagsterRunStatus
    if status not in (dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED)
]

INVENTORY = "fantasyworld/inventory"
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


def register(instance: dg.DagsterInstance, keys: Sequence[str], name: str = NAME) -> dict[str, str]:
    """Add the videos (or requests) as partitions and return the tags of a run over them."""
    known = instance.get_dynamic_partitions(name)
    tags = range_tags(known, keys)
    instance.add_dynamic_partitions(name, sorted(set(keys) - set(known)))
    return tags


def inventory_tags(inventory: "Inventory") -> dict[str, str]:
    """A run tag that says in the UI how many of what lie in the videos folder; `python -m fw_pipeline.inventory` gives names."""
    return {INVENTORY: ", ".join(f"{count} {what}" for what, count in inventory.numbers.items())}


def gone(instance: dg.DagsterInstance, keys: Collection[str], name: str = NAME) -> list[str]:
    """Partitions whose video (or request) is not among `keys`, those in the folder; none while a run is under way, whose range
    could end with one of them. Results stay on the disk: what is put back is a partition again, and up to date."""
    known = [key for key in instance.get_dynamic_partitions(name) if key not in keys]
    return [] if known and instance.get_runs_count(dg.RunsFilter(statuses=UNDER_WAY)) else known


def retire(instance: dg.DagsterInstance, keys: Collection[str], name: str = NAME) -> list[str]:
    """Delete the partitions that are `gone`; returns them."""
    old = gone(instance, keys, name)
    for key in old:
        instance.delete_dynamic_partition(name, key)
    return old
