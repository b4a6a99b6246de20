"""The training loop: exact resume, prerequisites before anything is built, what is written and when."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fw_model.data import opening
from fw_model.data.dataset import ClipDataset, collate
from fw_model.errors import DatasetError, TrainingError
from fw_model.train import __main__ as command_line
from fw_model.train import loop as train
from fw_model.train import objective, optimizers
from fw_model.train import run as training_run
from fw_model.train.checkpoints import latest_state, read_metadata
from fw_model.train.identity import run_identity
from fw_model.train.metrics_log import MetricsLog, RunningMean, read_metrics
from fw_model.train.run_folder import locked
from tests.helpers.made_scenes import pack_scenes
from tests.helpers.training import FAST, SMALL, no_model, numbers, small_preset, stop_at


@pytest.fixture(scope="module")
def stage1_run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted stage 1 run."""
    output = tmp_path_factory.mktemp("stage1")
    train.train(small_preset(), "stage1", dataset, output)
    return output


# ------------------------------------------------------------------------------------------------- what is written


def test_run_leaves_metrics_checkpoints_state_and_result(stage1_run: Path, dataset: Path) -> None:
    lines = read_metrics(stage1_run / "metrics.jsonl")
    training = [line for line in lines if "loss/total" in line]
    assert [line["step"] for line in training] == [1, 2, 3, 4, 5, 6]
    measured = {"seconds", "data_seconds", "eta_seconds", "tokens_per_second", "memory_gib"}
    assert set(training[0]) == measured | {"step", "lr", "grad_norm", *(f"loss/{n}" for n in objective.LOSS_NAMES["stage1"])}
    assert [line["step"] for line in lines if "val/total" in line] == [0, 3, 6]
    assert sorted(p.name for p in stage1_run.glob("*.safetensors")) == [f"step-{n}.safetensors" for n in (2, 4, 6)]
    assert sorted(p.name for p in (stage1_run / "state").iterdir()) == ["step-4", "step-6"]
    result = json.loads((stage1_run / "result.json").read_text(encoding="utf-8"))
    assert (result["stage"], result["steps"], result["checkpoint"]) == ("stage1", 6, "step-6.safetensors")
    assert result["validation_split"] == "val"
    assert result["validation"]["before"]["total"] == next(line["val/total"] for line in lines if line["step"] == 0)
    assert result["validation"]["after"]["total"] == lines[-1]["val/total"]
    metadata = read_metadata(stage1_run / result["checkpoint"])
    assert (metadata.stage, metadata.step) == ("stage1", 6)
    assert metadata.preset == small_preset()
    assert (metadata.config_digest, metadata.dataset_digest) == (result["config_digest"], result["dataset_digest"])


def test_complete_run_returns_at_once(stage1_run: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_run.FantasyWorld, "from_preset", no_model)
    before = (stage1_run / "metrics.jsonl").read_bytes()
    assert train.train(small_preset(), "stage1", dataset, stage1_run).steps == 6
    assert (stage1_run / "metrics.jsonl").read_bytes() == before


def test_checkpoint_has_only_trained_weights_and_the_base_is_untouched(stage1_run: Path) -> None:
    preset = small_preset()
    model = training_run.FantasyWorld.from_preset(preset)
    expected = model.trainable_parameters()
    tensors = load_file(stage1_run / "step-6.safetensors")
    assert tensors.keys() == expected.keys()
    assert not any(name.startswith("base.") for name in tensors)
    moved = [name for name in tensors if not torch.equal(tensors[name], expected[name])]
    assert len(moved) > 0.9 * len(tensors)


# ---------------------------------------------------------------------------------------------------------- resume


def test_run_stopped_by_sigterm_goes_on_as_if_never_stopped(stage1_run: Path, dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(train.Interrupted, match="after step 3"):
        train.train(small_preset(), "stage1", dataset, tmp_path, on_metrics=stop_at(2))
    state = latest_state(tmp_path / "state")
    assert state is not None
    assert state.name == "step-3"
    assert not (tmp_path / "result.json").exists()
    lines: list[dict[str, float]] = []
    train.train(small_preset(), "stage1", dataset, tmp_path, on_metrics=lines.append)
    assert [line["step"] for line in lines if "loss/total" in line] == [4, 5, 6]
    assert numbers(tmp_path) == numbers(stage1_run)
    ours, theirs = load_file(tmp_path / "step-6.safetensors"), load_file(stage1_run / "step-6.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_resume_gives_the_same_batches_and_draws(dataset: Path) -> None:
    """Batches and noise are functions of the step, not of what ran before."""
    preset = small_preset()
    clips, _ = opening.open_dataset(dataset, preset)

    def batches(state: dict[str, Any] | None, count: int) -> list[Any]:
        sampler = training_run.ResumableBucketSampler(clips.buckets, 2, 2, seed=0)
        if state:
            sampler.load_state_dict(state)
        loader = iter(torch.utils.data.DataLoader(clips, batch_sampler=sampler, collate_fn=collate))
        return [next(loader) for _ in range(count)]

    sampler = training_run.ResumableBucketSampler(clips.buckets, 2, 2, seed=0)
    sampler.advance(4)
    whole, rest = batches(None, 6), batches(sampler.state_dict(), 2)
    for step, (expected, resumed) in enumerate(zip(whole[4:], rest, strict=True), start=5):
        assert expected.clip_ids == resumed.clip_ids
        assert torch.equal(expected.latents, resumed.latents)
        draws = [objective.training_draws(batch, preset.stage1, step, 0) for batch in (expected, resumed)]
        assert torch.equal(draws[0].noise, draws[1].noise)
        assert torch.equal(draws[0].timestep, draws[1].timestep)
        assert torch.equal(draws[0].pose_mask, draws[1].pose_mask)


def test_draws_do_not_depend_on_how_a_global_batch_is_cut(dataset: Path) -> None:
    config, clips = small_preset().stage1, ClipDataset(dataset, "val", 32)
    whole = objective.training_draws(collate([clips[0], clips[1]]), config, 3, 0)
    second = objective.training_draws(collate([clips[1]]), config, 3, 1)
    assert torch.equal(whole.noise[1:], second.noise)
    assert torch.equal(whole.timestep[1:], second.timestep)
    assert torch.equal(whole.pose_mask[1:], second.pose_mask)


def test_pose_tokens_are_given_to_the_configured_share_of_clips(dataset: Path) -> None:
    config, batch = small_preset("stage1.pose_probability=0.25").stage1, collate([ClipDataset(dataset, "val", 32)[0]])
    small = replace(batch, latents=batch.latents[..., :1, :1])
    share = sum(float(objective.training_draws(small, config, step, 0).pose_mask) for step in range(400)) / 400
    assert 0.18 < share < 0.32
    assert not objective.validation_draws(small, 0, 0, 1).pose_mask.any()


def test_other_run_in_the_folder_is_refused_with_both_sides(
    stage1_run: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_run.FantasyWorld, "from_preset", no_model)
    with pytest.raises(TrainingError, match=r"stage1\.learning_rate: the folder has 0\.0002, this run 0\.5"):
        train.train(small_preset("stage1.learning_rate=0.5"), "stage1", dataset, stage1_run)
    other = pack_scenes(tmp_path / "other", small_preset(), train=3)
    with pytest.raises(TrainingError, match="dataset_digest: the folder has"):
        train.train(small_preset(), "stage1", other, stage1_run)


def test_knobs_that_do_not_change_what_is_learnt_do_not_change_the_run() -> None:
    def digest(*overrides: str) -> str:
        return run_identity(small_preset(*overrides), "stage1", "data").config_digest

    assert digest("stage1.save_every=5", "stage1.log_every=3", "stage1.batch_per_device=1", "stage2.steps=3") == digest()
    assert digest("stage1.steps=7") != digest()
    assert digest("model.geometry.pose_rank=8") != digest()


def test_leftovers_of_a_killed_run_are_removed(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "state" / ".step-1.99.tmp").mkdir(parents=True)
    (tmp_path / ".step-1.safetensors.99.tmp").touch()
    train.train(small_preset("stage1.steps=1"), "stage1", dataset, tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))


def test_folder_in_use_is_refused(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(TrainingError, match=f"process {os.getpid()} is training into it"), locked(tmp_path, 0):
        pass
    with locked(tmp_path, 0):
        pass


# --------------------------------------------------------------------------------------------------------- stage 2


def test_stage2_trains_from_a_stage1_checkpoint(stage1_run: Path, dataset: Path, tmp_path: Path) -> None:
    checkpoint = stage1_run / "step-6.safetensors"
    result = train.train(small_preset("stage2.steps=2"), "stage2", dataset, tmp_path, checkpoint)
    geometry = ("depth_loss", "point_loss", "camera_loss")
    stage1 = json.loads((stage1_run / "result.json").read_text(encoding="utf-8"))["validation"]["after"]
    # Adapters and cross-attention start at zero, so before its first step stage 2 predicts what stage 1 did.
    assert [result.validation["before"][k] for k in geometry] == pytest.approx([stage1[k] for k in geometry], rel=1e-4)
    assert "loss/diffusion_loss" in read_metrics(tmp_path / "metrics.jsonl")[1]
    tensors = load_file(tmp_path / result.checkpoint)
    assert load_file(checkpoint).keys() < tensors.keys()
    assert any(name.startswith("interaction.") for name in tensors)


def test_stage2_checkpoint_is_whole_when_the_geometry_does_not_train(stage1_run: Path, dataset: Path, tmp_path: Path) -> None:
    checkpoint = stage1_run / "step-6.safetensors"
    preset = small_preset("stage2.steps=1", "stage2.train_geometry=false")
    before, after = (
        load_file(checkpoint),
        load_file(tmp_path / train.train(preset, "stage2", dataset, tmp_path, checkpoint).checkpoint),
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(name.startswith("camera_adapters.") for name in after)


@pytest.mark.parametrize("fault", ["none given", "missing", "truncated", "stage2", "other model"])
def test_stage2_refuses_a_bad_stage1_checkpoint_before_building_a_model(
    fault: str, stage1_run: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_run.FantasyWorld, "from_preset", no_model)
    preset, path = small_preset(), tmp_path / "step-6.safetensors"
    good = stage1_run / "step-6.safetensors"
    if fault == "truncated":
        path.write_bytes(good.read_bytes()[:-100])
    elif fault == "stage2":
        from fw_model.train.checkpoints import save_checkpoint

        save_checkpoint(path, {"x": torch.zeros(1)}, replace(read_metadata(good), stage="stage2"))
    elif fault == "other model":
        preset, path = small_preset("model.geometry.pose_rank=8"), good
    words = {"none given": "none was given", "missing": "no such", "truncated": "truncated", "stage2": "a stage2 checkpoint"}
    with pytest.raises(TrainingError, match=words.get(fault, "pose_rank: checkpoint 16, this run 8")) as error:
        train.train(preset, "stage2", dataset, tmp_path / "out", None if fault == "none given" else path)
    assert "dagster job execute -j stage1_training" in str(error.value)


def test_missing_dataset_names_the_job_before_building_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_run.FantasyWorld, "from_preset", no_model)
    with pytest.raises(DatasetError, match="python -m fw_pipeline.launch build_dataset"):
        train.train(small_preset(), "stage1", tmp_path / "nothing", tmp_path / "out")


def test_dataset_of_other_encoders_is_refused_before_building_a_model(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_run.FantasyWorld, "from_preset", no_model)
    with pytest.raises(DatasetError, match="'seeded:0 vae .*', but this run needs 'seeded:3 vae "):
        train.train(small_preset("encoders.weights.seed=3"), "stage1", dataset, tmp_path)
    with pytest.raises(TrainingError, match=r"image features \(17, 32\), the base .* takes 32 and \(9, 32\)"):
        train.train(small_preset("model.wan.image_tokens=9"), "stage1", dataset, tmp_path)


# -------------------------------------------------------------------------------------------------------- the loop


def test_non_finite_steps_are_named_and_passed_over_then_stop_the_run(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compute = train.compute_losses

    def poisoned(output: Any, batch: Any, draws: Any, stage: Any, config: Any) -> dict[str, torch.Tensor]:
        losses = compute(output, batch, draws, stage, config)
        bad = "train-2" in batch.clip_ids
        return {name: value * float("nan") if bad else value for name, value in losses.items()}

    monkeypatch.setattr(train, "compute_losses", poisoned)
    with pytest.raises(TrainingError, match=r"train-2[\s\S]*max_skipped=1"):
        train.train(small_preset("stage1.max_skipped=1", "stage1.steps=40"), "stage1", dataset, tmp_path)
    assert any("passed over (1 of at most 1)" in record.getMessage() for record in caplog.records)
    state = latest_state(tmp_path / "state")
    assert state is not None
    assert all(tensor.isfinite().all() for tensor in load_file(state / "weights.safetensors").values())


def test_losses_fall_on_the_validation_clips(dataset: Path, tmp_path: Path) -> None:
    preset = small_preset("stage1.steps=12", "stage1.learning_rate=1e-3", "stage1.validate_every=100", "stage1.save_every=100")
    validation = train.train(preset, "stage1", dataset, tmp_path).validation
    assert validation["after"]["total"] < 0.8 * validation["before"]["total"]


def test_bfloat16_with_checkpointing_follows_float32(stage1_run: Path, dataset: Path, tmp_path: Path) -> None:
    """Close to the float32 run: cameras and losses keep their digits under autocast, recomputed activations are the same."""
    half = small_preset("stage1.precision=bfloat16", "stage1.gradient_checkpointing=true", "stage1.steps=3")
    train.train(half, "stage1", dataset, tmp_path)
    ours, theirs = ([line["loss/total"] for line in numbers(run) if "loss/total" in line] for run in (tmp_path, stage1_run))
    assert ours == pytest.approx(theirs[:3], rel=0.02)
    assert ours != theirs[:3]


def test_accumulation_makes_the_same_update_as_one_large_batch(dataset: Path, tmp_path: Path) -> None:
    common = ("stage1.global_batch=4", "stage1.steps=1", "stage1.save_every=1")
    runs = []
    for size in (1, 4):
        output = tmp_path / str(size)
        train.train(small_preset(*common, f"stage1.batch_per_device={size}"), "stage1", dataset, output)
        runs.append(numbers(output)[1])
    assert runs[0]["loss/total"] == pytest.approx(runs[1]["loss/total"], rel=1e-5)
    assert runs[0]["grad_norm"] == pytest.approx(runs[1]["grad_norm"], rel=1e-3)


@pytest.mark.parametrize(
    ("global_batch", "per_device", "processes", "words"),
    [
        (7, 2, 1, "global_batch=6 or 8, or batch_per_device=1"),
        (112, 3, 8, "batch_per_device=2"),
        (2, 1, 4, "global_batch=4, or 2 processes"),
        (112, 1, 64, "global_batch=64 or 128, or 56 or 112 processes"),
    ],
)
def test_global_batch_that_cannot_be_met_is_refused_with_the_nearest(
    global_batch: int, per_device: int, processes: int, words: str
) -> None:
    with pytest.raises(TrainingError, match=words):
        training_run.check_accumulation(global_batch, per_device, processes)


def test_guide_batches_are_met_on_eight_devices() -> None:
    assert training_run.check_accumulation(64, 1, 8) == 8
    assert training_run.check_accumulation(112, 2, 8) == 7


def test_learning_rate_warms_up_then_follows_its_schedule() -> None:
    config = small_preset("stage1.lr_schedule=cosine", "stage1.warmup_steps=4", "stage1.steps=14").stage1
    rates = [optimizers.learning_rate(config, step) / config.learning_rate for step in (1, 4, 9, 14)]
    assert rates == pytest.approx([0.25, 1, 0.5, 0])


def test_unknown_key_or_missing_input_ends_with_code_1_and_an_explanation(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--preset", "tiny", "--dataset", str(dataset), "--output", str(tmp_path)]
    assert command_line.main([*common, "--stage", "stage1", "stage1.stepps=3"]) == 1
    assert "stage1.stepps" in capsys.readouterr().err
    assert command_line.main([*common, "--stage", "stage2"]) == 1
    assert "stage1_training" in capsys.readouterr().err


def test_interrupted_command_ends_with_code_75_and_goes_on_with_0(dataset: Path, tmp_path: Path) -> None:
    fast = [f"stage1.{item}" for item in FAST if not item.startswith("trackers")]
    command = ["--preset", "tiny", "--stage", "stage1", "--dataset", str(dataset), "--output", str(tmp_path), *SMALL, *fast]
    assert command_line.main(command, on_metrics=stop_at(2)) == train.EXIT_INTERRUPTED == 75
    assert command_line.main(command) == 0
    assert list(tmp_path.glob("trackers/events.out.tfevents.*"))


def test_short_command_finds_dataset_output_and_stage_1_by_itself(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset").symlink_to(dataset)
    quick = {"steps": 1, "warmup_steps": 0, "validation_clips": 1, "trackers": [], "ema_decay": 0.9}
    (tmp_path / "my.yaml").write_text(json.dumps({"stage1": quick, "stage2": quick}), encoding="utf-8")
    for stage in ("stage1", "stage2"):
        assert command_line.main(["--preset", "tiny", "--stage", stage, "--config", "my.yaml", *SMALL]) == 0
        result = json.loads((tmp_path / "outputs" / f"fantasy_world_{stage}" / "result.json").read_text(encoding="utf-8"))
        assert result["checkpoint"] == "step-1.ema.safetensors"
    run = json.loads((tmp_path / "outputs" / "fantasy_world_stage2" / "run.json").read_text(encoding="utf-8"))
    assert run["config"]["stage1_checkpoint"].endswith(":1:ema")


# --------------------------------------------------------------------------------------------------------- metrics


def test_metrics_after_the_state_are_dropped_and_a_torn_line_too(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1.0}\n{"step": 2, "a": 2.0}\n{"step": 3, "a"', encoding="utf-8")
    MetricsLog(path, 1, []).write(2, {"a": 5.0})
    assert read_metrics(path) == [{"step": 1, "a": 1.0}, {"step": 2, "a": 5.0}]


def test_running_mean_survives_a_restart() -> None:
    mean = RunningMean()
    mean.add({"a": 0.1, "b": 1.0})
    again = RunningMean(json.loads(json.dumps(mean.state)))
    for one in (mean, again):
        one.add({"a": 0.2})
    assert mean.take() == again.take() == {"a": (0.1 + 0.2) / 2, "b": 1.0}
    assert mean.take() == {}
