"""A training run knows before it starts where it goes and what it starts from."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fw_pipeline.steps import training_plan as training
from fw_pipeline.steps.settings import Settings
from fw_pipeline.steps.training_plan import MissingPrerequisite, plan_training


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A data folder whose dataset has the digest written in dataset/digest."""
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "digest").write_text("aaaaaaaa11111111")
    monkeypatch.setattr("fw_model.data.manifest.dataset_digest", lambda path: (Path(path) / "digest").read_text())
    return Settings(data=tmp_path)


def finish(plan: training.TrainingPlan, step: int = 7) -> Path:
    plan.write_preset()
    checkpoint = plan.output / f"step-{step}.safetensors"
    checkpoint.write_bytes(b"weights")
    (plan.output / "result.json").write_text(json.dumps({"checkpoint": checkpoint.name}))
    return checkpoint


def test_a_retry_finds_its_own_folder_and_another_configuration_does_not(settings: Settings) -> None:
    first = plan_training(settings, "stage1").output
    assert plan_training(settings, "stage1").output == first
    changed = settings.model_copy(update={"overrides": ("stage1.learning_rate=0.1",)})
    assert plan_training(changed, "stage1").output != first
    watched = settings.model_copy(update={"overrides": ("stage1.save_every=1",)})  # decides no weight
    assert plan_training(watched, "stage1").output == first
    (settings.data / "dataset" / "digest").write_text("bbbbbbbb11111111")
    assert plan_training(settings, "stage1").output != first


def test_stage_2_starts_from_the_finished_stage_1_of_its_configuration(settings: Settings) -> None:
    checkpoint = finish(plan_training(settings, "stage1"))
    plan = plan_training(settings, "stage2")
    assert plan.stage1_checkpoint == checkpoint
    assert ["--stage1-checkpoint", str(checkpoint)] == plan.command()[-2:]
    changed = settings.model_copy(update={"overrides": ("stage1.steps=9",)})
    with pytest.raises(MissingPrerequisite, match="stage1_training"):
        plan_training(changed, "stage2")
    finish(plan_training(changed, "stage1"))
    assert plan_training(changed, "stage2").output != plan.output


def test_a_stage_1_that_has_only_been_started_is_not_enough(settings: Settings) -> None:
    plan_training(settings, "stage1").write_preset()
    with pytest.raises(MissingPrerequisite, match="has not finished"):
        plan_training(settings, "stage2")


def test_a_grown_dataset_keeps_the_stage_1_that_took_days(settings: Settings) -> None:
    checkpoint = finish(plan_training(settings, "stage1"))
    (settings.data / "dataset" / "digest").write_text("bbbbbbbb22222222")
    plan = plan_training(settings, "stage2")
    assert plan.stage1_checkpoint == checkpoint
    assert plan.output.name.endswith("-bbbbbbbb-from-aaaaaaaa")


def test_a_checkpoint_that_is_gone_is_named(settings: Settings) -> None:
    finish(plan_training(settings, "stage1")).unlink()
    with pytest.raises(MissingPrerequisite, match=r"step-7\.safetensors"):
        plan_training(settings, "stage2")


def test_a_stopped_launcher_leaves_the_training_as_long_to_save_as_dagster_waits(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dagster as dg

    from fw_pipeline.assets.training import run_training
    from fw_pipeline.resources import RESOURCES, TERMINATION_TIMEOUT_SECONDS

    started: list[dict[str, Any]] = []
    context: Any = SimpleNamespace(log=SimpleNamespace(info=lambda *_: None))
    pipes: Any = SimpleNamespace(run=lambda **how: started.append(how))
    with pytest.raises(dg.Failure, match="launch the job again to resume"):  # nothing was trained
        run_training(context, SimpleNamespace(settings=lambda: settings), pipes, "stage1")  # type: ignore[arg-type]
    grace = float(started[0]["env"]["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert 0.9 * TERMINATION_TIMEOUT_SECONDS < grace < TERMINATION_TIMEOUT_SECONDS
    assert RESOURCES["pipes"].termination_timeout_seconds == TERMINATION_TIMEOUT_SECONDS  # type: ignore[attr-defined]


def test_the_preset_beside_the_results_is_the_whole_configuration(settings: Settings) -> None:
    from fw_model.config import load_preset

    plan = plan_training(settings.model_copy(update={"overrides": ("stage1.steps=3",)}), "stage1")
    plan.write_preset()
    assert load_preset(str(plan.preset_file)) == plan.preset


@pytest.mark.parametrize(
    ("device", "processes", "flag", "count"),
    [
        ("cpu", 1, "--cpu", "--num_processes"),
        ("cpu", 2, "torch.distributed.run", "--nproc_per_node"),  # accelerate's launcher would start one
        ("cuda", 2, "--multi_gpu", "--num_processes"),
    ],
)
def test_the_launch_line_fits_the_machine(settings: Settings, device: str, processes: int, flag: str, count: str) -> None:
    command = plan_training(settings.model_copy(update={"device": device, "processes": processes}), "stage1").command()
    assert flag in command
    assert command[command.index(count) + 1] == str(processes)
