"""What the project's modules warn of stands in the log of the run, where people look for it."""

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
        warned = [entry for entry in instance.all_logs(run.run_id) if entry.level == 30]
    assert run.success
    told = [entry.user_message for entry in warned if "clip.max_clips_per_video=" in entry.user_message]
    assert len(told) == 2
    assert all("the first 1 are kept" in message and ".mp4" in message for message in told)
