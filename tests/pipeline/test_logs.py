"""What the project's modules warn of stands in the log of the run, where people look for it."""

import logging
from pathlib import Path

import dagster as dg
import pytest

from fw_pipeline.definitions import defs
from fw_pipeline.partitions import register
from fw_pipeline.resources import PIPELINE


def test_clips_that_are_dropped_are_a_warning_in_the_runs_log(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = environment / "quick.yaml"
    quick.write_text(quick.read_text() + "clip: {frames: 5, stride: 4, max_clips_per_video: 1}\n", encoding="utf-8")
    with dg.DagsterInstance.get() as instance:
        tags = register(instance, sorted(PIPELINE.build().videos))
        job = defs.resolve_job_def("annotate_videos").get_subset(asset_selection={dg.AssetKey("clips")})
        run = job.execute_in_process(instance=instance, tags=tags)
        entries = [entry for entry in instance.all_logs(run.run_id) if not entry.is_dagster_event]
    assert run.success
    warned = [entry for entry in entries if entry.level == logging.WARNING]
    told = [entry.user_message for entry in warned if "clip.max_clips_per_video=" in entry.user_message]
    assert len(told) == 2
    assert all("the first 1 are kept" in message and ".mp4" in message for message in told)
    # What steps say themselves stays there too: a line per video here, the training's progress elsewhere.
    assert len([entry for entry in entries if entry.level == logging.INFO and "1 clips" in entry.user_message]) == 2
