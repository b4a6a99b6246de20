"""Several processes train what one process trains: data parallel, sharded, stopped and resumed by another number of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fw_model.config import Preset
from fw_model.errors import TrainingError
from fw_model.model.fantasy_world import FantasyWorld
from fw_model.train import __main__ as command_line
from fw_model.train import loop as train
from tests.helpers import processes
from tests.helpers.made_scenes import pack_scenes
from tests.helpers.training import numbers, small_preset, stop_at

# Validation lies between two training steps: what it leaves behind in a sharded model must not be trained on.
PER_DEVICE = ("global_batch=4", "batch_per_device=1", "steps=3", "validate_every=2", "ema_decay=0.5", "collective_timeout=555")
SAVING = ("save_every=100", "state_every=2")  # gathering a sharded model tensor by tensor is most of what these runs cost


def preset_of(*overrides: str) -> Preset:
    common = [f"{stage}.{item}" for stage in ("stage1", "stage2") for item in PER_DEVICE + SAVING]
    return small_preset(*common, *overrides)


FSDP = ("stage1.sharding=fsdp", "stage2.sharding=fsdp", "stage1.gradient_checkpointing=true")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs by one process and by two, on one dataset; see `with_one` and `with_two`."""
    folder = tmp_path_factory.mktemp("distributed")
    pack_scenes(folder / "dataset", small_preset())
    with_one(folder)
    codes = processes.run(with_two, folder, log=folder / "log", world=2)
    assert codes == [0, 0], processes.output(folder / "log", 0)[-3000:] + processes.output(folder / "log", 1)[-3000:]
    as_killed_after_step_2(folder / "fsdp", folder / "two to one")
    train.train(preset_of(), "stage1", folder / "dataset", folder / "two to one")
    return folder


def as_killed_after_step_2(run: Path, copy: Path) -> None:
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("step-3*", "result.json"))


def with_one(folder: Path) -> None:
    dataset = folder / "dataset"
    train.train(preset_of(), "stage1", dataset, folder / "one")
    train.train(preset_of("stage2.steps=1"), "stage2", dataset, folder / "one stage2", folder / "one" / "step-3.safetensors")
    as_killed_after_step_2(folder / "one", folder / "one to two")


def with_two(folder: Path) -> None:
    """In each of two processes."""
    dataset = folder / "dataset"
    with watched_gradients(folder):
        train.train(preset_of(), "stage1", dataset, folder / "ddp")
    with pytest.raises(train.Interrupted, match="after step 2"):  # the main process alone is told to stop
        train.train(preset_of(), "stage1", dataset, folder / "ddp resumed", on_metrics=stop_at(1))
    train.train(preset_of(), "stage1", dataset, folder / "ddp resumed")
    train.train(preset_of(*FSDP), "stage1", dataset, folder / "fsdp")
    train.train(preset_of(*FSDP), "stage1", dataset, folder / "one to two")
    stage1 = folder / "one" / "step-3.safetensors"
    train.train(preset_of("stage2.steps=1", *FSDP), "stage2", dataset, folder / "fsdp stage2", stage1)
    check_shards(folder)
    pass_over_on_both(folder)


@contextmanager
def watched_gradients(folder: Path) -> Iterator[None]:
    """Write, after every step, how many blocks of memory hold the gradients there are."""
    clear, counts = train._clear_gradients, []

    def watched(run: Any) -> None:
        clear(run)
        gradients = [p.grad for p in run.parameters.values() if p.grad is not None]
        counts.append([len(gradients), len({g.untyped_storage().data_ptr() for g in gradients})])

    train._clear_gradients = watched
    try:
        yield
    finally:
        train._clear_gradients = clear
    (folder / "gradients.json").write_text(json.dumps(counts))


def check_shards(folder: Path) -> None:
    """What torch.distributed.checkpoint gathers from a sharded model are the weights that were shared out."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.tensor import DTensor

    from fw_model.train.sharding import data_mesh, shard, whole_on_main

    model = FantasyWorld.from_preset(small_preset())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    shard(model, data_mesh(torch.device("cpu"), 2))
    gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    main = torch.distributed.get_rank() == 0
    ours = whole_on_main(dict(model.named_parameters()), main)
    for name, tensor in before.items() if main else ():
        assert torch.equal(gathered[name], tensor), name
        assert torch.equal(ours[name], tensor), name
    held = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in model.parameters())
    backend = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))  # type: ignore[union-attr]
    shares = {
        "timeout": backend.options._timeout.total_seconds(),
        "held": held,
        "whole": sum(tensor.numel() for tensor in before.values()),
    }
    if main:
        (folder / "shares.json").write_text(json.dumps(shares))


def pass_over_on_both(folder: Path) -> None:
    """One clip's loss is not finite, on one of the processes; each writes how many steps it passed over."""
    compute = train.compute_losses
    rank = torch.distributed.get_rank()

    def poisoned(output: Any, batch: Any, *rest: Any) -> dict[str, torch.Tensor]:
        losses = compute(output, batch, *rest)
        return {k: v * float("nan") if "train-2" in batch.clip_ids else v for k, v in losses.items()}

    train.compute_losses = poisoned  # type: ignore[assignment]
    try:
        preset = small_preset("stage1.batch_per_device=1", "stage1.max_skipped=1", "stage1.steps=40")
        train.train(preset, "stage1", folder / "dataset", folder / "poisoned")
    except TrainingError as error:
        (folder / f"poisoned.{rank}").write_text(str(error))
    finally:
        train.compute_losses = compute


def losses(output: Path) -> list[float]:
    return [value for line in numbers(output) for key, value in line.items() if key.startswith(("loss/", "val/", "grad"))]


@pytest.mark.parametrize("run", ["ddp", "fsdp", "one to two", "two to one"])
def test_two_processes_train_what_one_does_with_twice_the_accumulation(runs: Path, run: str) -> None:
    assert len(losses(runs / run)) > 18
    assert losses(runs / run) == pytest.approx(losses(runs / "one"), rel=1e-5, abs=1e-7)
    for name in ("step-3.safetensors", "step-3.ema.safetensors"):  # the same whole file, from sharded runs too
        ours, theirs = load_file(runs / run / name), load_file(runs / "one" / name)
        assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
        # AdamW divides by the gradient's size: where that is rounding, a weight may move the other way by a learning rate
        assert max(float((ours[k] - theirs[k]).abs().mean()) for k in ours) < 1e-4


def test_resume_with_two_processes_gives_the_uninterrupted_losses(runs: Path) -> None:
    assert losses(runs / "ddp resumed") == pytest.approx(losses(runs / "ddp"), rel=1e-6, abs=1e-8)


def test_sharded_stage_2_follows_the_unsharded_one(runs: Path) -> None:
    assert losses(runs / "fsdp stage2") == pytest.approx(losses(runs / "one stage2"), rel=1e-5, abs=1e-7)


def test_a_process_holds_half_of_the_sharded_weights(runs: Path) -> None:
    shares = json.loads((runs / "shares.json").read_text())
    assert 0.5 <= shares["held"] / shares["whole"] < 0.75  # at this size what stays whole of the base weighs more than at full


def test_gradients_of_data_parallel_stay_in_the_buckets_that_are_exchanged(runs: Path) -> None:
    first, *later = json.loads((runs / "gradients.json").read_text())
    assert first[0] == 0, "the first step's buckets are made anew in another order; gradients let go of them"
    for gradients, blocks in later:
        assert gradients > 100
        assert blocks < 5


def test_processes_wait_for_each_other_as_long_as_configured(runs: Path) -> None:
    assert json.loads((runs / "shares.json").read_text())["timeout"] == 555


def test_a_bad_clip_on_one_process_is_passed_over_by_both_alike(runs: Path) -> None:
    first, second = ((runs / f"poisoned.{rank}").read_text() for rank in (0, 1))
    assert first == second
    assert "clips: train-2\n" in first
    assert "max_skipped=1" in first


def die_at_step_2(dataset: Path, output: Path) -> int:
    common = ["--preset", "tiny", "--stage", "stage1", "--dataset", str(dataset), "--output", str(output)]
    if os.environ["RANK"] == "1":
        step = train._step

        def killed(run: Any, stop: Any) -> bool:
            if run.progress.step == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(run, stop)

        train._step = killed  # type: ignore[assignment]
    settings = [f"stage1.{key}" for key in ("batch_per_device=1", "trackers=[]", "steps=10", "save_every=1")]
    return command_line.main([*common, *settings, "clip.size=32x48", "clip.frames=5"])


def test_a_rank_that_dies_ends_the_job_with_an_error(runs: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    codes = processes.run(die_at_step_2, runs / "dataset", tmp_path / "run", log=tmp_path / "log", world=2, timeout=60)
    assert codes == [1, -signal.SIGKILL]
    assert time.monotonic() - started < 60
    said = processes.output(tmp_path / "log", 0)
    assert "error: rank 0 lost the other processes" in said
    assert "Traceback" not in said
    assert (tmp_path / "run" / "state" / "step-2").is_dir()  # from where the job goes on
