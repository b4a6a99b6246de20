"""Checkpoints and states: whole or absent, only what was trained, and refused where they do not belong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fw_model.config import Preset, Stage, load_preset
from fw_model.train import checkpoints
from fw_model.train.checkpoints import CheckpointError, CheckpointMetadata, load_state
from fw_model.train.optimizers import moments


class TwoPartModel(torch.nn.Module):
    """The least that has a base, a part for each stage, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.base = torch.nn.Linear(3, 3)
        self.geometry = torch.nn.Linear(3, 2)
        self.adapter = torch.nn.Linear(3, 4)
        self.set_stage("stage1")

    def set_stage(self, stage: Stage, train_geometry: bool = True) -> None:
        self.requires_grad_(False)
        self.geometry.requires_grad_(stage == "stage1" or train_geometry)
        self.adapter.requires_grad_(stage == "stage2")

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def preset() -> Preset:
    return load_preset("tiny")


def metadata_of(preset: Preset, stage: Stage = "stage1") -> CheckpointMetadata:
    return CheckpointMetadata(stage, 7, preset, preset.base.identity, "dataset", "config")


def saved(folder: Path, preset: Preset, stage: Stage = "stage1") -> tuple[Path, TwoPartModel]:
    model, path = TwoPartModel(), folder / "step-7.safetensors"
    checkpoints.save_checkpoint(path, checkpoints.checkpoint_parameters(model, stage), metadata_of(preset, stage))
    return path, model


@pytest.mark.parametrize("version", [None, "1", "99"])
def test_weights_of_another_model_version_are_refused_by_name(tmp_path: Path, preset: Preset, version: str | None) -> None:
    path, model = saved(tmp_path, preset)
    with safe_open(path, "pt") as file:
        header = {**file.metadata(), "model_version": version or ""}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if version is None:
        del header["model_version"]
    save_file(tensors, path, metadata=header)
    with pytest.raises(CheckpointError, match=rf"step-7.safetensors: weights of model version {version or 1}, .*Train again"):
        checkpoints.load_checkpoint(path, model, "stage1", preset)


def test_a_state_of_another_model_version_is_refused_by_name(tmp_path: Path) -> None:
    state = checkpoints.save_state(tmp_path, 3, {}, {}, keep=1)
    progress = json.loads((state / "progress.json").read_text())
    assert checkpoints.read_progress(state)["step"] == 3
    del progress["model_version"]
    (state / "progress.json").write_text(json.dumps(progress))
    with pytest.raises(CheckpointError, match="step-3: weights of model version 1"):
        checkpoints.read_progress(state)


def test_checkpoint_holds_only_what_its_stage_trains(tmp_path: Path, preset: Preset) -> None:
    path, _ = saved(tmp_path, preset)
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {"geometry.weight", "geometry.bias"}
    path, _ = saved(tmp_path, preset, "stage2")
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {"geometry.weight", "geometry.bias", "adapter.weight", "adapter.bias"}


def test_checkpoint_is_float32_and_gives_weights_and_metadata_back(tmp_path: Path, preset: Preset) -> None:
    path = tmp_path / "step-7.safetensors"
    model = TwoPartModel().to(torch.bfloat16)
    checkpoints.save_checkpoint(path, model.trainable_parameters(), metadata_of(preset))
    with safe_open(path, "pt") as file:
        assert all(file.get_tensor(name).dtype == torch.float32 for name in file.keys())  # noqa: SIM118 not a dict
    other = TwoPartModel()
    assert checkpoints.load_checkpoint(path, other, "stage1", preset) == metadata_of(preset)
    assert torch.equal(other.geometry.weight, model.geometry.weight.float())


def test_stage1_checkpoint_leaves_stage2_modules_as_they_were(tmp_path: Path, preset: Preset) -> None:
    path, model = saved(tmp_path, preset)
    other = TwoPartModel()
    before = other.adapter.weight.clone()
    other.set_stage("stage2")
    checkpoints.load_checkpoint(path, other, "stage1", preset)
    assert torch.equal(other.geometry.weight, model.geometry.weight)
    assert torch.equal(other.adapter.weight, before)


def test_failed_save_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, preset: Preset, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = saved(tmp_path, preset)
    before = path.read_bytes()

    def fails(tensors: dict[str, torch.Tensor], target: Path, metadata: dict[str, str]) -> None:
        target.write_bytes(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoints, "save_file", fails)
    with pytest.raises(CheckpointError, match=r"step-7\.safetensors: could not be written \(disk full\)"):
        saved(tmp_path, preset)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("size", [0, 5, 200, -1])
def test_truncated_checkpoint_is_noticed_from_its_header(tmp_path: Path, preset: Preset, size: int) -> None:
    path, _ = saved(tmp_path, preset)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"step-7\.safetensors: damaged or truncated"):
        checkpoints.read_metadata(path)


def test_other_files_are_refused_with_what_they_are(tmp_path: Path, preset: Preset) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        checkpoints.read_metadata(tmp_path / "step-1.safetensors")
    foreign = tmp_path / "step-2.safetensors"
    save_file({"x": torch.zeros(1)}, foreign)
    with pytest.raises(CheckpointError, match="not a fantasyworld-checkpoint"):
        checkpoints.read_metadata(foreign)
    path, _ = saved(tmp_path, preset, "stage2")
    with pytest.raises(CheckpointError, match="a stage2 checkpoint, a stage1 checkpoint is needed"):
        checkpoints.load_checkpoint(path, TwoPartModel(), "stage1", preset)


def test_other_model_or_base_is_refused_with_both_sides(tmp_path: Path, preset: Preset) -> None:
    path, _ = saved(tmp_path, preset)
    wider = load_preset("tiny", ["model.geometry.pose_rank=8"])
    with pytest.raises(CheckpointError, match=r"model\.geometry\.pose_rank: checkpoint 16, this run 8"):
        checkpoints.load_checkpoint(path, TwoPartModel(), "stage1", wider)
    other_base = load_preset("tiny", ["base.seed=5"])
    with pytest.raises(CheckpointError, match=r"'seeded:0'.*'seeded:5'"):
        checkpoints.load_checkpoint(path, TwoPartModel(), "stage1", other_base)


def test_names_and_shapes_that_differ_are_all_listed(tmp_path: Path, preset: Preset) -> None:
    path = tmp_path / "step-7.safetensors"
    tensors = {"geometry.weight": torch.zeros(9, 3), "geometry.extra": torch.zeros(1)}
    checkpoints.save_checkpoint(path, tensors, metadata_of(preset))
    with pytest.raises(CheckpointError) as error:
        checkpoints.load_checkpoint(path, TwoPartModel(), "stage1", preset)
    for part in ("missing (1): geometry.bias", "unexpected (1): geometry.extra", "geometry.weight (9, 3) for (2, 3)"):
        assert part in str(error.value)


def test_newer_format_is_refused(tmp_path: Path, preset: Preset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "FORMAT_VERSION", 2)
    path, _ = saved(tmp_path, preset)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format version 2, this code reads up to 1"):
        checkpoints.read_metadata(path)


def test_latest_is_by_number_and_ignores_unfinished_files(tmp_path: Path) -> None:
    assert checkpoints.latest_checkpoint(tmp_path / "none") is None
    for name in ("step-9.safetensors", "step-10.safetensors", ".step-11.safetensors.1.tmp", "step-12.safetensors.part"):
        (tmp_path / name).touch()
    assert checkpoints.latest_checkpoint(tmp_path) == tmp_path / "step-10.safetensors"
    (tmp_path / "step-10.ema.safetensors").touch()
    (tmp_path / "step-9.ema.safetensors").touch()
    assert checkpoints.latest_checkpoint(tmp_path) == tmp_path / "step-10.ema.safetensors"


def test_pruning_keeps_the_newest_steps_their_averages_and_the_named_result(tmp_path: Path) -> None:
    for name in ("step-2", "step-2.ema", "step-9", "step-9.ema", "step-10", "step-10.ema", "step-11"):
        (tmp_path / f"{name}.safetensors").touch()
    (tmp_path / "result.json").touch()
    checkpoints.prune_checkpoints(tmp_path, 2, spare="step-2.ema.safetensors")
    left = {"step-2.ema.safetensors", "step-10.safetensors", "step-10.ema.safetensors", "step-11.safetensors", "result.json"}
    assert {path.name for path in tmp_path.iterdir()} == left
    checkpoints.prune_checkpoints(tmp_path, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"step-11.safetensors", "result.json"}


def trained(steps: int) -> tuple[dict[str, torch.nn.Parameter], torch.optim.Optimizer]:
    torch.manual_seed(0)
    parameters = TwoPartModel().trainable_parameters()
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    for _ in range(steps):
        step(parameters, optimizer)
    return parameters, optimizer


def save(folder: Path, step: int, parameters: Any, optimizer: torch.optim.Optimizer, note: Any = None) -> Path:
    files = {"weights": {k: p.detach() for k, p in parameters.items()}, "optimizer": moments(parameters, optimizer)}
    return checkpoints.save_state(folder, step, files, note or {}, keep=2)


def step(parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    sum((p - i).square().sum() for i, p in enumerate(parameters.values())).backward()  # type: ignore[union-attr]
    optimizer.step()
    optimizer.zero_grad()


def test_state_brings_weights_and_moments_back_exactly(tmp_path: Path) -> None:
    parameters, optimizer = trained(3)
    state = save(tmp_path, 3, parameters, optimizer, {"note": 1.1})
    restored, other = trained(1)
    load_state(state, restored, other)
    assert checkpoints.read_progress(state)["note"] == 1.1
    for _ in range(2):
        step(parameters, optimizer)
        step(restored, other)
    assert all(torch.equal(parameters[name], restored[name]) for name in parameters)


def test_states_are_pruned_to_the_newest(tmp_path: Path) -> None:
    parameters, optimizer = trained(1)
    for number in (8, 9, 10, 11):
        save(tmp_path, number, parameters, optimizer)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-10", "step-11"]
    assert checkpoints.latest_state(tmp_path) == tmp_path / "step-11"


def test_damaged_state_is_named(tmp_path: Path) -> None:
    parameters, optimizer = trained(1)
    state = save(tmp_path, 1, parameters, optimizer)
    (state / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="step-1: damaged"):
        load_state(state, parameters, optimizer)
    (state / "progress.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"progress\.json: not readable"):
        checkpoints.read_progress(state)


def test_no_file_needs_pickle(tmp_path: Path, preset: Preset) -> None:
    parameters, optimizer = trained(1)
    state = save(tmp_path / "state", 1, parameters, optimizer)
    saved(tmp_path, preset)
    kinds = {path.suffix for path in [*tmp_path.iterdir(), *state.iterdir()] if path.is_file()}
    assert kinds == {".safetensors", ".json"}
    assert json.loads((state / "progress.json").read_text(encoding="utf-8"))["step"] == 1


def test_identity_names_stage_config_dataset_and_step(preset: Preset) -> None:
    metadata = metadata_of(preset)
    assert len({metadata.identity, replace(metadata, step=8).identity, replace(metadata, dataset_digest="x").identity}) == 3
