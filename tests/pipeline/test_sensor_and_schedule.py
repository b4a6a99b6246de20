"""New videos are annotated once they are whole; the nightly schedule launches only when something is stale."""

import json
import os
from pathlib import Path

import dagster as dg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fw_pipeline.definitions import defs
from fw_pipeline.partitions import RANGE_END, RANGE_START, range_tags
from fw_pipeline.resources import PipelineResource
from fw_pipeline.schedules import reannotate
from fw_pipeline.sensors import new_videos


def tick(instance: dg.DagsterInstance, cursor: str | None) -> dg.SensorResult:
    result = new_videos(dg.build_sensor_context(instance=instance, cursor=cursor, resources=defs.resources))
    assert isinstance(result, dg.SensorResult)
    return result


@pytest.fixture
def folder(environment: Path) -> Path:
    return environment / "videos"


def test_a_video_is_launched_once_its_size_has_been_the_same_for_two_ticks(folder: Path) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        first = tick(instance, None)
        assert not first.run_requests
        second = tick(instance, first.cursor)
        (request,) = second.run_requests or []
        assert request.tags["fantasyworld/inventory"].startswith("2 videos, ")
        assert len((second.dynamic_partitions_requests or [])[0].partition_keys) == 2
        assert not tick(instance, second.cursor).run_requests


def test_a_folder_that_cannot_be_read_retires_no_video(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.scandir

    def scandir(path: str) -> object:  # chmod keeps nothing from root
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions("video", ["video-in-it"])
        (folder / "closed").mkdir()
        with monkeypatch.context() as closed:
            closed.setattr(os, "scandir", scandir)
            assert not tick(instance, None).dynamic_partitions_requests
        assert [request.partition_keys for request in tick(instance, None).dynamic_partitions_requests or []] == [["video-in-it"]]


def test_the_sensor_looks_where_the_runs_resource_looks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FW_VIDEOS", str(folder / "elsewhere"))
    resources = {"pipeline": PipelineResource(videos=str(folder))}
    with dg.DagsterInstance.ephemeral() as instance:
        result = new_videos(dg.build_sensor_context(instance=instance, resources=resources))
        skipped = new_videos(dg.build_sensor_context(instance=instance, resources=defs.resources))
    assert isinstance(result, dg.SensorResult)
    assert len(json.loads(result.cursor or "")["seen"]) == 2
    assert isinstance(skipped, dg.SkipReason)
    assert "elsewhere" in str(skipped.skip_message)


def test_a_video_still_being_copied_waits_and_a_replaced_one_runs_again(folder: Path) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        growing = folder / "growing.mp4"
        growing.write_bytes(b"1")
        result = tick(instance, None)
        growing.write_bytes(b"12")
        result = tick(instance, result.cursor)
        assert len((result.dynamic_partitions_requests or [])[0].partition_keys) == 2
        result = tick(instance, result.cursor)
        assert [key.split("-")[0] for key in (result.dynamic_partitions_requests or [])[0].partition_keys] == ["growing"]
        os.utime(growing, ns=(1, 1))
        result = tick(instance, tick(instance, result.cursor).cursor)
        assert [key.split("-")[0] for key in (result.dynamic_partitions_requests or [])[0].partition_keys] == ["growing"]


def test_the_schedule_launches_when_a_video_has_no_annotation(environment: Path) -> None:
    with (
        dg.instance_for_test() as instance,
        dg.build_schedule_context(resources=defs.resources, instance=instance) as context,
    ):
        request = reannotate(context)
    assert isinstance(request, dg.RunRequest)
    assert request.tags["fantasyworld/stale"] == "2"


@given(st.lists(st.sampled_from("abcdefgh"), unique=True), st.lists(st.sampled_from("abcdefghij"), unique=True, min_size=1))
def test_the_range_of_a_run_holds_every_video_asked_for(known: list[str], keys: list[str]) -> None:
    tags = range_tags(known, keys)
    order = [*known, *sorted(set(keys) - set(known))]
    first, last = (order.index(tags[name]) for name in (RANGE_START, RANGE_END))
    assert set(keys) <= set(order[first : last + 1])
    assert {order[first], order[last]} <= set(keys)


def test_the_tags_of_a_range_are_those_that_dagster_reads() -> None:
    assert dg.RunRequest(tags=range_tags(["a", "b", "c"], ["a", "c"])).partition_key_range == dg.PartitionKeyRange("a", "c")
