"""A run can grow, start from other weights, or branch from another run: what changed is said, what does not fit is refused."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fw_model.errors import TrainingError
from fw_model.train import __main__ as command_line
from fw_model.train import loop as train
from fw_model.train import run as training_run
from fw_model.train.metrics_log import read_metrics
from tests.helpers.made_scenes import pack_scenes
from tests.helpers.training import no_model, small_preset, stop_at


def same_weights(ours: Path, theirs: Path) -> bool:
    a, b = load_file(ours), load_file(theirs)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def stopped(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plain run, stopped after its third step of six."""
    output = tmp_path_factory.mktemp("stopped")
    with pytest.raises(train.Interrupted):
        train.train(small_preset(), "stage1", dataset, output, on_metrics=stop_at(2))
    return output


# --------------------------------------------------------------------------------------------------------- more steps


def test_run_that_grows_ends_with_the_weights_of_one_that_was_as_long_from_the_start(
    dataset: Path, plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    grown, whole = tmp_path / "grown", tmp_path / "whole"
    shutil.copytree(plain, grown)
    longer = small_preset("stage1.steps=8")
    with caplog.at_level(logging.INFO):
        result = train.train(longer, "stage1", dataset, grown)
    assert "the run grows: stage1.steps: the folder has 6, this run 8" in caplog.text
    assert "going on from step 6" in caplog.text
    train.train(longer, "stage1", dataset, whole)
    assert (result.steps, result.checkpoint) == (8, "step-8.safetensors")
    assert same_weights(grown / "step-8.safetensors", whole / "step-8.safetensors")
    with pytest.raises(TrainingError, match=r"stage1\.steps: the folder has 8, this run 6"):
        train.train(small_preset(), "stage1", dataset, grown)


@pytest.mark.parametrize("other", ["stage1.lr_schedule=cosine", "stage1.learning_rate=1e-3"])
def test_nothing_else_may_change_with_the_steps(
    other: str, dataset: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_run.FantasyWorld, "from_preset", no_model)
    shutil.copytree(plain, tmp_path / "run")
    with pytest.raises(TrainingError, match="holds another run"):
        train.train(small_preset("stage1.steps=8", other), "stage1", dataset, tmp_path / "run")


def test_cosine_run_does_not_grow_for_its_steps_followed_their_number(
    dataset: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_run.FantasyWorld, "from_preset", no_model)
    cosine = small_preset("stage1.lr_schedule=cosine")
    identity = train.run_identity(cosine, "stage1", train.dataset_digest(dataset))
    training_run.claim(tmp_path, identity)
    with pytest.raises(TrainingError, match=r"stage1\.steps: the folder has 6, this run 8"):
        train.train(small_preset("stage1.lr_schedule=cosine", "stage1.steps=8"), "stage1", dataset, tmp_path)


# -------------------------------------------------------------------------------------------------------- other weights


def test_stage_starts_from_a_checkpoint_of_its_own(dataset: Path, plain: Path, tmp_path: Path) -> None:
    file = plain / "step-6.safetensors"
    one_step = small_preset("stage1.steps=1", "stage1.learning_rate=1e-3")
    result = train.train(one_step, "stage1", dataset, tmp_path / "warm", init_from=file)
    (last,) = [line for line in read_metrics(plain / "metrics.jsonl") if line["step"] == 6 and "val/total" in line]
    assert result.validation["before"]["total"] == last["val/total"]
    stage1 = json.loads((tmp_path / "warm" / "run.json").read_text())["config"]
    assert stage1["init_from"].startswith("stage1:")
    with pytest.raises(TrainingError, match="init_from: the folder has stage1:"):
        train.train(one_step, "stage1", dataset, tmp_path / "warm")


def test_stage_2_starts_from_a_stage_2_checkpoint_alone(dataset: Path, plain: Path, tmp_path: Path) -> None:
    one_step = small_preset("stage2.steps=1")
    first = tmp_path / "first"
    train.train(one_step, "stage2", dataset, first, plain / "step-6.safetensors")
    file = first / "step-1.safetensors"
    result = train.train(one_step, "stage2", dataset, tmp_path / "second", init_from=file)
    before = json.loads((first / "result.json").read_text())["validation"]["after"]
    assert result.validation["before"] == before
    with pytest.raises(TrainingError, match="stage 2 starts from one file"):
        train.train(one_step, "stage2", dataset, tmp_path / "third", plain / "step-6.safetensors", init_from=file)
    with pytest.raises(TrainingError, match=r"--init-from takes a stage1 checkpoint .* a stage2 checkpoint"):
        train.train(small_preset(), "stage1", dataset, tmp_path / "third", init_from=file)
    with pytest.raises(TrainingError, match=r"--init-from takes .* no such checkpoint"):
        train.train(small_preset(), "stage1", dataset, tmp_path / "third", init_from=tmp_path / "none.safetensors")


# ------------------------------------------------------------------------------------------------------------ branching


def test_branch_without_a_change_ends_where_the_run_itself_does(
    dataset: Path, plain: Path, stopped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        train.train(small_preset(), "stage1", dataset, tmp_path / "branch", resume_as_new=stopped)
    assert "at step 3; what differs:\n  nothing" in caplog.text
    assert same_weights(tmp_path / "branch" / "step-6.safetensors", plain / "step-6.safetensors")
    assert not (stopped / "result.json").exists()
    assert sorted(path.name for path in (stopped / "state").iterdir()) == ["step-2", "step-3"]


def test_branch_says_what_changed_and_goes_on_as_one_run(
    dataset: Path, plain: Path, stopped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, output = tmp_path / "source", tmp_path / "branch"
    shutil.copytree(stopped, source)
    slower = small_preset("stage1.learning_rate=1e-6")
    with caplog.at_level(logging.INFO), pytest.raises(train.Interrupted):
        train.train(slower, "stage1", dataset, output, on_metrics=stop_at(4), resume_as_new=source)
    assert "at step 3; what differs:\n  stage1.learning_rate: " in caplog.text
    train.train(small_preset(), "stage1", dataset, source)  # the other run goes on; the branch stays where it branched
    assert train.train(slower, "stage1", dataset, output, resume_as_new=source).steps == 6
    assert [line["lr"] for line in read_metrics(output / "metrics.jsonl") if "lr" in line] == [1e-6, 1e-6, 1e-6]
    assert not same_weights(output / "step-6.safetensors", plain / "step-6.safetensors")


def test_branch_onto_a_grown_dataset_draws_its_clips_from_the_first_epoch(
    dataset: Path, stopped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    grown = pack_scenes(tmp_path / "dataset", small_preset(), train=7)
    with caplog.at_level(logging.INFO):
        result = train.train(small_preset(), "stage1", grown, tmp_path / "branch", resume_as_new=stopped)
    assert "clips are drawn from the first epoch on, in their new order (dataset_digest)" in caplog.text
    assert result.steps == 6
    progress = json.loads((tmp_path / "branch" / "state" / "step-6" / "progress.json").read_text())
    assert (progress["sampler"]["epoch"], progress["sampler"]["consumed"]) == (0, 3 * small_preset().stage1.global_batch)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage1.steps=3", "at the new run's last step"),
        ("stage1.ema_decay=0.9", "no moving average"),
        ("model.geometry.pose_rank=2", r"model\.geometry\.pose_rank: \d+ -> 2"),
    ],
)
def test_state_that_does_not_fit_is_refused_and_leaves_no_claim(
    override: str, message: str, dataset: Path, stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_run.FantasyWorld, "from_preset", no_model)
    with pytest.raises(TrainingError, match=message):
        train.train(small_preset(override), "stage1", dataset, tmp_path / "run", resume_as_new=stopped)
    assert not (tmp_path / "run" / "run.json").exists()


def test_folder_without_a_run_and_the_output_itself_are_refused(dataset: Path, stopped: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no run with a state"):
        train.train(small_preset(), "stage1", dataset, tmp_path, resume_as_new=tmp_path / "none")
    with pytest.raises(TrainingError, match="that is the --output itself"):
        train.train(small_preset(), "stage1", dataset, stopped, resume_as_new=stopped)


def test_command_line_hands_both_on(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(command_line, "train", lambda *args, **start: asked.update(start, stage1=args[4]))
    command_line.main(["--preset", "tiny", "--stage", "stage2", "--init-from", "a.safetensors", "--resume-as-new", "runs/b"])
    assert asked == {"init_from": Path("a.safetensors"), "resume_as_new": Path("runs/b"), "stage1": None}
