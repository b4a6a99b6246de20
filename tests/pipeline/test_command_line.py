"""The lines in the README, typed as they stand."""

from pathlib import Path

import pytest

from fw_model.errors import Explained
from fw_pipeline.demo import run as run_demo
from fw_pipeline.demo.run import render
from fw_pipeline.launch import Outcome
from tests.helpers.graph import shell


@pytest.mark.parametrize(
    ("line", "needed"),
    [
        ("dagster job execute -j stage2_training", "python -m fw_pipeline.launch build_dataset"),
        ("dagster job execute -j validation", "python -m fw_pipeline.launch build_dataset"),
        ("dagster job execute -j annotate_videos", "python -m fw_pipeline.launch annotate_videos"),
        ("python -m fw_pipeline.launch stage1_training", "python -m fw_pipeline.launch build_dataset"),
    ],
)
def test_every_line_that_lacks_something_names_the_one_to_run(environment: Path, line: str, needed: str) -> None:
    result = shell(f"source env.sh && {line}")
    assert result.returncode != 0
    assert needed in result.stderr


def test_a_folder_without_videos_is_named(environment: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = shell("source env.sh && python -m fw_pipeline.launch annotate_videos", FW_VIDEOS=str(tmp_path / "empty"))
    assert result.returncode == 1
    assert f"no videos in {tmp_path / 'empty'}" in result.stderr


def test_an_unknown_profile_is_refused_with_the_known_ones(environment: Path) -> None:
    result = shell("source env.sh && dagster job execute -j stage1_training", FW_PROFILE="mainframe")
    assert result.returncode != 0
    assert "laptop, gpu" in result.stderr


def test_the_demo_never_mixes_with_somebodys_own_videos(tmp_path: Path) -> None:
    (tmp_path / "mine.mp4").write_bytes(b"x")
    with pytest.raises(Explained, match="videos of your own"):
        render(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.mp4"]


@pytest.mark.parametrize(
    ("failed", "warned", "own_videos", "code"),
    [([], [], False, 0), ([], ["w"], False, 1), ([], ["w"], True, 0), (["f"], [], True, 1), (["f"], [], False, 1)],
)
def test_the_demos_exit_code_is_honest(
    failed: list[str], warned: list[str], own_videos: bool, code: int, environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_demo, "render", lambda folder: None)
    monkeypatch.setattr(run_demo, "run_jobs", lambda settings: Outcome(failed, warned))
    monkeypatch.setattr(run_demo, "summary", lambda settings: {})
    assert run_demo.main(["--videos", str(environment / "videos")] if own_videos else []) == code
