"""A training run knows before it starts where it goes and what it starts from."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fw_model.config import load_preset
from fw_model.train.checkpoints import CheckpointMetadata, save_checkpoint
from fw_model.train.identity import run_identity
from fw_pipeline.steps import training_plan as training
from fw_pipeline.steps.settings import Settings
from fw_pipeline.steps.training_plan import OF_ANOTHER_LAUNCHER, MissingInput, plan_training
from tests.helpers.graph import PROJECT


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A data folder whose dataset has the digest written in dataset/digest."""
    (tmp_path / "dataset").mkdir()
    pack(tmp_path, "aaaaaaaa11111111")
    monkeypatch.setattr("fw_model.data.manifest.dataset_digest", lambda path: (Path(path) / "digest").read_text())
    return Settings(data=tmp_path)


def pack(data: Path, digest: str) -> None:
    (data / "dataset" / "digest").write_text(digest)


def changed(settings: Settings, *overrides: str) -> Settings:
    return settings.model_copy(update={"overrides": overrides})


def finish(settings: Settings, plan: training.TrainingPlan, step: int = 7) -> Path:
    """What the training process leaves of a complete stage 1."""
    plan.write_preset()
    checkpoint = plan.output / f"step-{step}.safetensors"
    identity = run_identity(plan.preset, "stage1", (settings.data / "dataset" / "digest").read_text())
    base = plan.preset.base.identity
    header = CheckpointMetadata("stage1", step, plan.preset, base, identity.dataset_digest, identity.config_digest)
    save_checkpoint(checkpoint, {"weight": torch.zeros(1)}, header)
    (plan.output / "result.json").write_text(json.dumps({"checkpoint": checkpoint.name}))
    return checkpoint


# --------------------------------------------------------------------------------------------------- is it the same run?

HUB = ("encoders.weights.source=hub", "encoders.weights.repo=somebody/encoders")
SAME = [  # decide no weight of stage 1, or decide them through the dataset, whose digest says so
    "clip.stride=40",
    "clip.max_clips_per_video=128",
    "encoders.image_layers=31",
    "encoders.dtype=bfloat16",
    "name=another",
    "stage1.save_every=1",
    "stage1.batch_per_device=4",
    "stage1.lambda_geometry=0.5",
    "stage1.train_geometry=false",
    "stage2.steps=9",
    "base.repo=not/read",
]
OTHER = [
    "stage1.learning_rate=0.1",
    "stage1.steps=9",
    "stage1.seed=3",
    "stage1.text_dropout=0.3",
    "stage1.ema_decay=0.9",
    "base.seed=5",
    "model.geometry.pose_rank=4",
    "model.wan.eps=1e-5",
]


def test_what_the_changes_below_are_measured_against_has_another_value() -> None:
    before = load_preset("tiny", list(HUB)).model_dump()
    for override in SAME + OTHER:
        assert load_preset("tiny", [*HUB, override]).model_dump() != before, override


@pytest.mark.parametrize("override", SAME)
def test_what_decides_no_weight_finds_the_same_stage_1(settings: Settings, override: str) -> None:
    checkpoint = finish(settings, plan_training(changed(settings, *HUB), "stage1"))
    other = changed(settings, *HUB, override)
    assert plan_training(other, "stage1").output == checkpoint.parent
    assert plan_training(other, "stage2").stage1_checkpoint == checkpoint


@pytest.mark.parametrize("override", OTHER)
def test_what_decides_the_weights_gives_another_run_of_both_stages(settings: Settings, override: str) -> None:
    first = finish(settings, plan_training(changed(settings, *HUB), "stage1"))
    second = plan_training(changed(settings, *HUB), "stage2").output
    other = changed(settings, *HUB, override)
    with pytest.raises(MissingInput, match="stage1_training"):
        plan_training(other, "stage2")
    assert finish(settings, plan_training(other, "stage1")).parent != first.parent
    assert plan_training(other, "stage2").output.name != second.name


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    st.lists(st.sampled_from([*SAME, *OTHER]), max_size=4),
    st.lists(st.sampled_from([*SAME, *OTHER]), max_size=4),
    st.sampled_from(["aaaaaaaa11111111", "aaaaaaaa22222222"]),
)
def test_two_runs_share_a_folder_exactly_when_they_are_one_run(
    settings: Settings, first: list[str], second: list[str], digest: str
) -> None:
    def planned(overrides: list[str], dataset: str) -> tuple[dict[str, Any], Path]:
        pack(settings.data, dataset)
        plan = plan_training(changed(settings, *HUB, *overrides), "stage1")
        return asdict(run_identity(plan.preset, "stage1", dataset)), plan.output

    (ours, our_folder), (theirs, their_folder) = planned(first, "aaaaaaaa11111111"), planned(second, digest)
    assert (ours == theirs) == (our_folder == their_folder)


def test_stage_2_of_another_stage_1_is_another_run(settings: Settings) -> None:
    plan = plan_training(settings, "stage1")
    finish(settings, plan)
    first = plan_training(settings, "stage2").output
    finish(settings, plan, step=8)
    assert plan_training(settings, "stage2").output != first


def test_the_folder_is_the_one_that_the_training_process_takes_for_its_own(settings: Settings) -> None:
    """The process reads the preset that was written beside the results, and computes its identity from that."""
    for stage in ("stage1", "stage2"):
        plan = plan_training(changed(settings, "clip.stride=40", "stage1.steps=9"), stage)  # type: ignore[arg-type]
        plan.write_preset()
        header = training.read_metadata(plan.stage1_checkpoint) if plan.stage1_checkpoint else None
        theirs = run_identity(load_preset(str(plan.preset_file)), plan.stage, "aaaaaaaa11111111", header)
        assert plan.output.name == theirs.name
        if stage == "stage1":
            finish(settings, plan)


def test_naming_a_folder_loads_neither_torch_nor_diffusers() -> None:
    modules = "fw_pipeline.steps.training_plan, fw_model.data.manifest"
    code = f"import sys, {modules}; assert not {{'torch', 'diffusers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120, cwd=PROJECT)


# ------------------------------------------------------------------------------------------------- what stage 2 starts from


def test_stage_2_starts_from_the_finished_stage_1_of_its_configuration(settings: Settings) -> None:
    checkpoint = finish(settings, plan_training(settings, "stage1"))
    plan = plan_training(settings, "stage2")
    assert plan.stage1_checkpoint == checkpoint
    assert ["--stage1-checkpoint", str(checkpoint)] == plan.command()[-2:]


def test_a_stage_1_that_has_only_been_started_is_not_enough(settings: Settings) -> None:
    plan_training(settings, "stage1").write_preset()
    with pytest.raises(MissingInput, match="has not finished"):
        plan_training(settings, "stage2")


def test_a_grown_dataset_keeps_the_newest_stage_1_that_took_days(settings: Settings) -> None:
    old = finish(settings, plan_training(settings, "stage1"))
    pack(settings.data, "bbbbbbbb22222222")
    first = plan_training(settings, "stage2")
    assert first.stage1_checkpoint == old
    newer = finish(settings, plan_training(settings, "stage1"))
    os.utime(old.parent / "result.json", (1, 1))
    pack(settings.data, "cccccccc33333333")
    second = plan_training(settings, "stage2")
    assert second.stage1_checkpoint == newer
    pack(settings.data, "aaaaaaaa11111111")
    assert plan_training(settings, "stage2").stage1_checkpoint == old  # of this very dataset, though not the newest
    assert first.output != second.output


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(b"half")], ids=["gone", "truncated"])
def test_a_checkpoint_that_is_gone_or_damaged_is_named(settings: Settings, spoil: Any) -> None:
    spoil(finish(settings, plan_training(settings, "stage1")))
    with pytest.raises(MissingInput, match=r"step-7\.safetensors(.|\n)*stage1_training"):
        plan_training(settings, "stage2")


# ------------------------------------------------------------------------------------------------------- how it is started


def test_a_stopped_launcher_leaves_the_training_as_long_to_save_as_dagster_waits(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dagster as dg

    from fw_pipeline.assets.training import run_training
    from fw_pipeline.resources import RESOURCES, TERMINATION_TIMEOUT_SECONDS

    started: list[dict[str, Any]] = []
    context: Any = SimpleNamespace(log=SimpleNamespace(info=lambda *_: None))
    pipes: Any = SimpleNamespace(run=lambda **how: started.append(how))
    with pytest.raises(dg.Failure, match="Launch the job again to resume"):  # nothing was trained
        run_training(context, SimpleNamespace(settings=lambda: settings), pipes, "stage1")  # type: ignore[arg-type]
    grace = float(started[0]["env"]["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert 0.9 * TERMINATION_TIMEOUT_SECONDS < grace < TERMINATION_TIMEOUT_SECONDS
    assert RESOURCES["pipes"].termination_timeout_seconds == TERMINATION_TIMEOUT_SECONDS  # type: ignore[attr-defined]


def test_the_preset_beside_the_results_is_the_whole_configuration(settings: Settings) -> None:
    plan = plan_training(changed(settings, "stage1.steps=3"), "stage1")
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


def test_another_launchers_variables_do_not_reach_the_training(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torchrun or in a Slurm job a training that Dagster starts waited eleven minutes for processes not its own."""
    command = plan_training(settings, "stage1").command()
    before = command[: command.index(sys.executable)]
    for name in OF_ANOTHER_LAUNCHER:
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    script = f"import os; print(sorted(n for n in os.environ if n in {(*OF_ANOTHER_LAUNCHER, 'CUDA_VISIBLE_DEVICES')}))"
    told = subprocess.run([*before, sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "['CUDA_VISIBLE_DEVICES']"
