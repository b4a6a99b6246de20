"""A run that is killed, whenever it is, goes on as if it had never been: the same numbers, bit for bit."""

from __future__ import annotations

import itertools
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fw_model import files
from fw_model.train import __main__ as command_line
from fw_model.train import checkpoints
from fw_model.train import loop as train
from fw_model.train.checkpoints import latest_state
from fw_model.train.metrics_log import MetricsLog
from tests.helpers import processes
from tests.helpers.made_scenes import pack_scenes
from tests.helpers.training import FAST, SMALL, numbers, small_preset, stop_at

# A save after every step, and only one state is kept: most of the run is saving, and nothing covers up a save that fails.
SAVING = (
    "ema_decay=0.9",
    "keep_states=1",
    "save_every=1",
    "steps=4",
    "global_batch=1",
    "batch_per_device=1",
    "validation_clips=1",
)
PRESET = small_preset(*(f"stage1.{item}" for item in SAVING))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_scenes(tmp_path_factory.mktemp("data") / "dataset", PRESET)


@pytest.fixture(scope="module")
def whole(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    output = tmp_path_factory.mktemp("whole")
    train.train(PRESET, "stage1", dataset, output)
    return output


def train_and_die(dataset: Path, output: Path, event: int) -> None:
    """Train; SIGKILL at the event-th of everything that touches the disk, half-way through writing where that is a file."""
    count = itertools.count(1)

    def deadly(function: Callable[..., Any], half_way: Callable[..., None] | None = None) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(count) == event:
                if half_way is not None:
                    half_way(*args, **kwargs)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    def half_a_file(tensors: Any, path: Path, metadata: Any = None) -> None:
        path.write_bytes(b"half a file")

    def half_a_folder(path: Path, **_: Any) -> None:
        if path.is_dir():
            next(path.iterdir()).unlink()

    checkpoints.save_file = deadly(checkpoints.save_file, half_a_file)
    files.fsync = deadly(files.fsync)  # type: ignore[assignment]
    Path.rename = deadly(Path.rename)  # type: ignore[method-assign]
    Path.replace = deadly(Path.replace)  # type: ignore[method-assign]
    shutil.rmtree = deadly(shutil.rmtree, half_a_folder)  # type: ignore[assignment]
    MetricsLog.write = deadly(MetricsLog.write)  # type: ignore[method-assign]
    train.train(PRESET, "stage1", dataset, output)


def test_run_killed_again_and_again_ends_with_the_same_numbers_and_weights(dataset: Path, whole: Path, tmp_path: Path) -> None:
    """At every kind of moment: by disk operation, saves among them, and by the clock."""
    draw, kills, output = random.Random(6), 0, tmp_path / "run"
    for attempt in range(60):
        log = tmp_path / f"log{attempt}"
        if attempt % 4 == 3:
            (process,) = processes.start(train_and_die, dataset, output, 0, log=log)
            process.join(draw.uniform(0.5, 1.5))
            if process.exitcode is None:
                process.kill()
            process.join()
            code = process.exitcode
        else:
            (code,) = processes.run(train_and_die, dataset, output, draw.randrange(5, 45), log=log)
        if code == 0:
            break
        assert code == -signal.SIGKILL, processes.output(log)
        kills += 1
    assert kills >= 3
    assert numbers(output) == numbers(whole)
    for name in ("step-4.safetensors", "step-4.ema.safetensors"):
        ours, theirs = load_file(output / name), load_file(whole / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert not list(output.rglob("*.tmp"))


def test_training_neither_reads_nor_moves_torchs_global_generator(whole: Path, dataset: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train.train(PRESET, "stage1", dataset, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert numbers(tmp_path) == numbers(whole)


def train_on_a_full_disk(dataset: Path, output: Path) -> int:
    """From step 3 on no file may grow beyond 20 kB, which is what a full disk looks like to a writer."""

    def fill(line: dict[str, float]) -> None:
        if line["step"] == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    fast = [f"stage1.{item}" for item in FAST]
    command = ["--preset", "tiny", "--stage", "stage1", "--dataset", str(dataset), "--output", str(output)]
    return command_line.main([*command, *SMALL, *fast], on_metrics=fill)


def test_full_disk_ends_the_run_with_an_error_and_the_state_before_it(dataset: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert processes.run(train_on_a_full_disk, dataset, output, log=tmp_path / "log") == [1]
    said = processes.output(tmp_path / "log")
    assert "step-4.safetensors: could not be written" in said
    assert "Traceback" not in said
    assert latest_state(output / "state") == output / "state" / "step-2"
    assert not list(output.rglob("*.tmp"))
    train.train(small_preset(), "stage1", dataset, output)
    assert (output / "step-6.safetensors").is_file()


def interrupted_with_its_group(dataset: Path, output: Path) -> int:
    def stop_group(line: dict[str, float]) -> None:
        if line["step"] == 2 and "loss/total" in line:
            os.killpg(0, signal.SIGTERM)

    try:
        train.train(small_preset("stage1.workers=1"), "stage1", dataset, output, on_metrics=stop_group)
    except train.Interrupted:
        return 75
    return 0


def test_signal_to_the_whole_group_finishes_the_step_too(dataset: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert processes.run(interrupted_with_its_group, dataset, output, log=tmp_path / "log") == [75]
    assert latest_state(output / "state") == output / "state" / "step-3"


def fails_at_step_2(dataset: Path, output: Path) -> None:
    def fail(line: dict[str, float]) -> None:
        if line["step"] == 2:
            raise RuntimeError("listener failed")

    train.train(small_preset("stage1.workers=1"), "stage1", dataset, output, on_metrics=fail)


def test_error_ends_the_process_in_spite_of_data_workers(dataset: Path, tmp_path: Path) -> None:
    assert processes.run(fails_at_step_2, dataset, tmp_path / "run", log=tmp_path / "log", timeout=60) == [1]
    assert "listener failed" in processes.output(tmp_path / "log")


def test_sigint_finishes_the_step_too(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(train.Interrupted, match="after step 3"):
        train.train(PRESET, "stage1", dataset, tmp_path, on_metrics=stop_at(2, signal.SIGINT))
