"""Every knob of a stage does what it says, and what cannot work is refused before a model is built."""

from __future__ import annotations

import logging
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import accelerate.tracking
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from fw_model.config import ConfigError, StageConfig, load_preset
from fw_model.data.dataset import ClipDataset
from fw_model.errors import TrainingError
from fw_model.model.fantasy_world import FantasyWorld
from fw_model.train import guards, optimizers
from fw_model.train import loop as train
from fw_model.train import run as training_run
from fw_model.train.checkpoints import read_metadata
from fw_model.train.metrics_log import in_words, read_metrics
from tests.helpers.training import no_model, numbers, small_preset, stop_at

ONE_STEP = ("stage1.steps=1", "stage1.warmup_steps=0")


def config_of(**knobs: Any) -> StageConfig:
    return StageConfig(steps=10, global_batch=2, **knobs)


# ------------------------------------------------------------------------------------------------------- optimizer


def test_offloaded_moments_give_the_same_numbers_and_state(dataset: Path, plain: Path, tmp_path: Path) -> None:
    """Even when the run changes to them half-way: it is the same optimizer with the same state."""
    offloaded = small_preset("stage1.offload_optimizer=true")
    with pytest.raises(train.Interrupted):
        train.train(offloaded, "stage1", dataset, tmp_path / "a", on_metrics=stop_at(2))
    train.train(small_preset(), "stage1", dataset, tmp_path / "a")
    with pytest.raises(train.Interrupted):
        train.train(small_preset(), "stage1", dataset, tmp_path / "b", on_metrics=stop_at(2))
    train.train(offloaded, "stage1", dataset, tmp_path / "b")
    for run in ("a", "b"):
        assert numbers(tmp_path / run) == numbers(plain)
        for file in ("weights", "optimizer"):
            ours, theirs = (load_file(folder / "state" / "step-6" / f"{file}.safetensors") for folder in (tmp_path / run, plain))
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_adamw8bit_is_refused_without_a_gpu_or_without_bitsandbytes(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_run.FantasyWorld, "from_preset", no_model)
    preset = small_preset("stage1.optimizer=adamw8bit")
    with pytest.raises(TrainingError, match="adamw8bit runs on CUDA GPUs, this run is on 'cpu'"):
        train.train(preset, "stage1", dataset, tmp_path)
    monkeypatch.setattr(optimizers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TrainingError, match=r"pip install -e '\.\[gpu\]'"):
        optimizers.check_optimizer(preset.stage1, torch.device("cuda"))


class CountingOptimizer(torch.optim.SGD):
    """Keeps its state as bitsandbytes does: a plain integer, bytes, and scales per block."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["step"] = state.get("step", 0) + 1
                state["state1"] = torch.full(p.shape, state["step"], dtype=torch.uint8)
                state["absmax1"] = torch.ones(1)


def test_adamw8bit_is_bitsandbytes_and_its_state_survives(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("bitsandbytes.optim")
    module.AdamW8bit = CountingOptimizer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)
    weights = {"a": torch.nn.Parameter(torch.ones(2, 3)), "b": torch.nn.Parameter(torch.ones(3))}
    first, second = (optimizers.make_optimizer(weights, config_of(optimizer="adamw8bit")) for _ in range(2))
    assert isinstance(first, CountingOptimizer)
    first.step()
    optimizers.put_moments_back(
        optimizers.moments(weights, first).items(), weights, second, lambda tensor, weight: tensor.clone()
    )
    second.step()
    assert second.state[weights["a"]]["step"] == 2
    assert isinstance(second.state[weights["a"]]["step"], int)
    assert second.state[weights["b"]]["state1"].dtype == torch.uint8


@pytest.mark.parametrize(
    "knobs",
    [
        {"optimizer": "adamw8bit", "offload_optimizer": True},
        {"sharding": "fsdp", "offload_optimizer": True},
        {"sharding": "fsdp", "optimizer": "adamw8bit"},
        {"stall_seconds": 60, "collective_timeout": 60},
    ],
)
def test_knobs_that_exclude_each_other_are_refused(knobs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"choose one|goes with optimizer: adamw|must be less than"):
        config_of(**knobs)


def test_only_matrices_are_decayed() -> None:
    weights = {"layer.weight": torch.nn.Parameter(torch.ones(2, 2)), "layer.bias": torch.nn.Parameter(torch.ones(2))}
    optimizer = optimizers.make_optimizer(weights, config_of(learning_rate=0.1, weight_decay=0.5))
    for parameter in weights.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(weights["layer.weight"], torch.tensor(0.95))
    assert torch.equal(weights["layer.bias"], torch.ones(2))


def test_gradients_are_clipped_to_the_norm_and_the_norm_before_is_reported() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    run: Any = SimpleNamespace(parameters={"w": weight}, config=config_of(max_grad_norm=0.5))
    assert float(train._clip_gradients(run)) == pytest.approx(5)
    assert float(weight.grad.norm()) == pytest.approx(0.5)


def test_moving_average_is_saved_and_is_what_is_validated(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    validate = train.validate

    def watched(model: FantasyWorld, *rest: Any) -> dict[str, float]:
        seen.append(model.tokens.camera.detach().clone())
        return validate(model, *rest)

    monkeypatch.setattr(train, "validate", watched)
    preset = small_preset(*ONE_STEP, "stage1.ema_decay=0.75")
    train.train(preset, "stage1", dataset, tmp_path)
    start = FantasyWorld.from_preset(preset).tokens.camera.detach()
    end = load_file(tmp_path / "step-1.safetensors")["tokens.camera"]
    average = load_file(tmp_path / "step-1.ema.safetensors")["tokens.camera"]
    assert not torch.equal(start, end)
    assert torch.allclose(average, 0.75 * start + 0.25 * end, atol=1e-7)
    assert torch.equal(seen[0], start)
    assert torch.equal(seen[1], average)
    assert read_metadata(tmp_path / "step-1.ema.safetensors").weights == "ema"
    assert read_metadata(tmp_path / "step-1.safetensors").weights == "trained"


def test_adamw_is_fused_and_goes_on_from_the_state_of_the_plain_one() -> None:
    weights = {
        "a.weight": torch.nn.Parameter(torch.linspace(-1, 1, 35).reshape(5, 7)),
        "b.bias": torch.nn.Parameter(torch.ones(3)),
    }
    plain = torch.optim.AdamW([{"params": [weights["a.weight"]]}, {"params": [weights["b.bias"]], "weight_decay": 0.0}], lr=0.1)
    for knobs in ({}, {"offload_optimizer": True}):
        fused = optimizers.make_optimizer(weights, config_of(learning_rate=0.1, **knobs))
        assert fused.defaults["fused"]
        for parameter in weights.values():
            parameter.grad = parameter.detach().cos()
        plain.step()
        saved = {key: tensor.clone() for key, tensor in optimizers.moments(weights, plain).items()}
        optimizers.put_moments_back(saved.items(), weights, fused, lambda tensor, weight: tensor.clone())
        before = {name: parameter.detach().clone() for name, parameter in weights.items()}
        fused.step()
        after = {name: parameter.detach().clone() for name, parameter in weights.items()}
        for name, parameter in weights.items():
            parameter.data = before[name]
        plain.step()
        assert all(torch.allclose(after[name], parameter, rtol=1e-5) for name, parameter in weights.items())
        assert all(int(state["step"]) == int(plain.state[p]["step"]) for p, state in fused.state.items())


# ---------------------------------------------------------------------------------------------------- what is saved


def test_states_are_saved_at_their_own_steps_and_with_every_checkpoint(dataset: Path, tmp_path: Path) -> None:
    keys = ("steps=5", "save_every=2", "state_every=3", "keep_states=9", "keep_checkpoints=1", "ema_decay=0.5")
    train.train(small_preset(*(f"stage1.{key}" for key in keys)), "stage1", dataset, tmp_path)
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["step-2", "step-3", "step-4", "step-5"]
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == ["step-5.ema.safetensors", "step-5.safetensors"]


# ------------------------------------------------------------------------------------------------ precision, compile


@pytest.mark.parametrize(("precision", "dtype"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
def test_frozen_weights_have_the_dtype_of_the_computation_and_trained_ones_float32(precision: str, dtype: torch.dtype) -> None:
    preset = small_preset(f"stage1.precision={precision}")
    model = FantasyWorld.from_preset(preset)
    model.base.to(torch.float16)  # whatever the file had
    training_run.place(model, "stage1", preset.stage1, Accelerator(cpu=True))
    assert {p.dtype for p in model.base.parameters()} == {dtype}
    assert {p.dtype for p in model.trainable_parameters().values()} == {torch.float32}


def test_compile_reaches_every_base_and_geodit_block_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda function, *_, **__: compiled.append(function.__self__) or function)
    for knob, expected in (("false", 0), ("true", 1)):
        preset = small_preset(f"stage1.compile={knob}")
        model = FantasyWorld.from_preset(preset)
        training_run.place(model, "stage1", preset.stage1, Accelerator(cpu=True))
        assert compiled == expected * [*model.base.transformer.blocks, *model.geodit.blocks]


# ----------------------------------------------------------------------------------------------------------- guards


def test_loss_far_above_the_median_of_the_last_steps_is_reported_with_its_clips(caplog: pytest.LogCaptureFixture) -> None:
    lines: list[tuple[int, dict[str, float]]] = []
    progress = training_run.Progress(step=50)
    run: Any = SimpleNamespace(
        config=config_of(spike_factor=3.0),
        progress=progress,
        log=SimpleNamespace(write=lambda step, values: lines.append((step, values))),
        accelerator=SimpleNamespace(process_index=0),
    )
    parts = [(["quiet"], torch.tensor([1.0, 1.0])), (["loud"], torch.tensor([1.0, 9.0]))]
    for _ in range(guards.ENOUGH):
        guards.report_spike(run, parts, 1.0)
    guards.report_spike(run, parts, 2.9)
    assert not caplog.records
    guards.report_spike(run, parts, 3.1)
    assert "step 50: loss 3.1 is 3.1 times the median of the last 11 steps (1); highest on process 0: loud" in caplog.text
    assert lines == [(50, {"spike/total": 3.1, "spike/median": 1.0})]
    for _ in range(2 * guards.WINDOW):
        guards.report_spike(run, parts, 3.1)
    assert len(progress.recent) == guards.WINDOW  # and after a while the new height is the usual one
    assert guards.median(progress.recent) == 3.1


@pytest.mark.parametrize("workers", [0, 1])
def test_stalled_loader_names_the_clip_and_its_shard(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    read, forever = ClipDataset.__getitem__, threading.Event()

    def stalls(self: ClipDataset, index: int) -> dict[str, Any]:
        if self.rows[index].clip_id == "train-3":
            forever.wait(30)
        return read(self, index)

    monkeypatch.setattr(ClipDataset, "__getitem__", stalls)
    preset = small_preset("stage1.stall_seconds=2", "stage1.batch_per_device=1", f"stage1.workers={workers}")
    with pytest.raises(TrainingError, match=r"no batch for 2 s .*waiting for clip train-3 in .*train-0000\d-of-0000\d\.parquet"):
        train.train(preset, "stage1", dataset, tmp_path)
    forever.set()


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_data_worker_meets_is_raised_as_it_is(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    def fails(self: ClipDataset, index: int) -> dict[str, Any]:
        raise MemoryError("no room for a clip")

    monkeypatch.setattr(ClipDataset, "__getitem__", fails)
    with pytest.raises(MemoryError, match="no room for a clip"):
        train.train(small_preset(f"stage1.workers={workers}"), "stage1", dataset, tmp_path)


# -------------------------------------------------------------------------------------------------- what one can see


def test_global_batch_is_spelled_out_at_the_start(dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    train.train(small_preset(*ONE_STEP, "stage1.global_batch=6"), "stage1", dataset, tmp_path)
    assert "global batch 6 = 2 a device x 3 accumulated x 1 process(es)" in caplog.text


def test_log_lines_and_metrics_say_how_long_it_will_take(plain: Path) -> None:
    line = next(line for line in read_metrics(plain / "metrics.jsonl") if "loss/total" in line)
    assert line["eta_seconds"] == pytest.approx(line["seconds"] * 5)
    assert in_words({"loss/total": 0.5, "eta_seconds": 3_723.4}) == "total 0.5 eta 1:02:03"


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match="started 2 processes, of which accelerate sees 1: .*ACCELERATE_USE_CPU=true"):
        training_run.make_accelerator(small_preset().stage1, tmp_path)


def test_tracker_that_is_not_installed_is_refused_by_name(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_run.FantasyWorld, "from_preset", no_model)
    for name in ("aim", "nonsense"):
        with pytest.raises(TrainingError, match=rf"trackers: {name}: not installed or not known\. Installed: .*tensorboard"):
            train.train(small_preset(f"stage1.trackers=[{name}]"), "stage1", dataset, tmp_path)


def test_any_tracker_of_accelerate_gets_the_configuration_and_every_line(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[tuple[int, dict[str, float]]] = []

    class FakeWandb(accelerate.tracking.GeneralTracker):
        name = "wandb"
        requires_logging_directory = False
        tracker = None

        def __init__(self, run_name: str, **_: Any) -> None:
            super().__init__()

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            lines.append((-1, values))

        def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
            lines.append((step or 0, values))

    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "wandb", FakeWandb)
    for module in (accelerate.tracking, training_run):
        monkeypatch.setattr(module, "get_available_trackers", lambda: [accelerate.tracking.LoggerType.WANDB])
    accelerate.tracking._available_trackers.append(accelerate.tracking.LoggerType.WANDB)
    try:
        train.train(small_preset(*ONE_STEP, "stage1.trackers=[wandb]"), "stage1", dataset, tmp_path)
    finally:
        accelerate.tracking._available_trackers.remove(accelerate.tracking.LoggerType.WANDB)
    assert lines[0][1]["stage1.learning_rate"] == small_preset().stage1.learning_rate
    assert {step for step, _ in lines[1:]} == {0, 1}
    assert any("loss/total" in values for _, values in lines)


def test_one_key_makes_clips_smaller(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("preset: wan2.1-fun-1.3b\nclip: {size: 512x288}\n")
    assert load_preset(str(tmp_path / "mine.yaml")).clip.bucket(9, 16) == (288, 512, 81)
    changed = load_preset(str(tmp_path / "mine.yaml"), ["clip.short_side=240", "clip.frames=41"])  # what comes last counts
    assert changed.clip.bucket(9, 16) == (240, 512, 41)
    with pytest.raises(ConfigError, match="two sides in pixels like 288x512"):
        small_preset("clip.size=288")
