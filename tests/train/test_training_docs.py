"""docs/training.md cannot go stale: its lines parse, its keys exist, its launch files load, its arithmetic is right."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import launch_command_parser

from fw_model.config import load_preset
from fw_model.describe import __main__ as describe
from fw_model.train import __main__ as command_line
from fw_model.train.run import TrainingError, check_accumulation

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
LAUNCH = ROOT / "docs" / "launch"
VARIABLES = {"MACHINE_RANK": "3", "HEAD": "10.0.0.1"}


def command_lines() -> list[str]:
    """The lines of the page's bash blocks, continued ones joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


class Reached(Exception):
    """The command's arguments were accepted."""


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What `fw_model.train` was asked to do, instead of doing it."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(command_line, "train", lambda *args, **_: calls.append(args))
    return calls


def expand(line: str) -> list[str]:
    words = shlex.split(re.sub(r"\$(\w+)", lambda match: VARIABLES[match[1]], line))
    return words[next(i for i, word in enumerate(words) if "=" not in word) :]  # without FW_PROFILE=gpu


@pytest.mark.parametrize("line", command_lines())
def test_every_command_line_of_the_page_parses(
    line: str, trained: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = expand(line)
    match words:
        case ["accelerate", "launch", *rest]:
            parsed = launch_command_parser().parse_args(rest)
            assert (parsed.module, parsed.training_script) == (True, "fw_model.train")
            if parsed.config_file is not None:
                assert (ROOT / parsed.config_file).is_file()
                assert (parsed.num_machines or 1) * 8 == (parsed.num_processes or 8)
            assert command_line.main(parsed.training_script_args) == 0
        case ["sbatch", *rest]:
            script = rest.index("docs/launch/train.slurm")
            assert all(re.fullmatch(r"--nodes=\d+", option) for option in rest[:script])
            assert command_line.main(rest[script + 1 :]) == 0
        case ["python", "-m", "fw_model.describe", *rest]:
            monkeypatch.setattr(describe, "describe", _reached)
            with pytest.raises(Reached):
                describe.main(rest)
        case ["python", "-m", "fw_model.train", *rest]:
            assert command_line.main(rest) == 0
        case ["python", script, *options]:
            assert all(f'"{option}"' in (ROOT / script).read_text(encoding="utf-8") for option in options)
        case ["make", target]:
            assert re.search(rf"^{target}: ", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
        case ["dagster", "job", "execute", "-j", job]:
            assert f'"{job}"' in (ROOT / "fw_pipeline" / "jobs.py").read_text(encoding="utf-8")
        case ["source", file]:
            assert (ROOT / file).is_file()
        case ["export", variable]:
            assert variable.startswith("TORCH_ELASTIC_SHUTDOWN_TIMEOUT=")
        case ["tensorboard", "--logdir", _]:
            pass
        case _:
            pytest.fail(f"a kind of command that this test does not know: {line}")


def _reached(*args: Any) -> None:
    raise Reached


def test_stage_2_lines_start_from_the_checkpoint_that_stage_1_lines_end_with(trained: list[tuple[Any, ...]]) -> None:
    for line in command_lines():
        words = expand(line)
        if words[0] == "accelerate":
            command_line.main(launch_command_parser().parse_args(words[2:]).training_script_args)
        elif words[0] == "sbatch":
            command_line.main(words[words.index("docs/launch/train.slurm") + 1 :])
    last: dict[str, Path] = {}
    for preset, stage, _, output, start in (call[:5] for call in trained):
        if stage == "stage1":
            assert start is None
            last[preset.name] = output / f"step-{preset.stage1.steps}.safetensors"
        else:
            assert start == last[preset.name]
    assert len(trained) == sum(line.startswith(("accelerate", "sbatch")) for line in command_lines())


def test_every_key_on_the_page_is_a_knob(tmp_path: Path) -> None:
    keys = re.findall(r"`'?((?:stage[12]|clip)\.\w+=[^`']+)'?`", PAGE)
    assert len(keys) >= 7
    for key in keys:
        load_preset("wan2.1-fun-1.3b", [key])
    (block,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "my.yaml").write_text(block, encoding="utf-8")
    assert load_preset("wan2.1-fun-1.3b", config=tmp_path / "my.yaml").stage1.lr_schedule == "cosine"
    stage = load_preset("tiny").stage1.model_dump()
    knobs = re.findall(r"\| `(\w+)` \|$", PAGE, flags=re.MULTILINE)
    assert {"max_skipped", "spike_factor"} <= set(knobs) <= set(stage)


def test_defaults_on_the_page_are_the_presets() -> None:
    stage = load_preset("wan2.1-fun-1.3b").stage1
    shown = dict(re.findall(r"^\| `(\w+)` \| (\w+)\b[^|]*\|", PAGE, flags=re.MULTILINE))
    assert {"state_every", "keep_states", "save_every", "keep_checkpoints"} <= set(shown)
    assert {key: yaml.safe_load(value) for key, value in shown.items()} == {key: getattr(stage, key) for key in shown}


def test_batch_table_is_what_the_loop_accepts() -> None:
    rows = re.findall(r"^\| (\d+) \| ([\dx, ]+|none) \| ([\dx, ]+|none) \|$", PAGE, flags=re.MULTILINE)
    assert {row[0] for row in rows} >= {"1", "8", "64", "112"}
    preset = load_preset("wan2.1-fun-1.3b")
    for gpus, *cells in rows:
        for cell, config in zip(cells, (preset.stage1, preset.stage2), strict=True):
            if cell == "none":
                with pytest.raises(TrainingError, match="nearest"):
                    check_accumulation(config.global_batch, 1, int(gpus))
            for batch, accumulation in re.findall(r"(\d+) x (\d+)", cell):
                assert check_accumulation(config.global_batch, int(batch), int(gpus)) == int(accumulation)


@pytest.mark.parametrize(("name", "machines", "processes"), [("one_gpu", 1, 1), ("eight_gpus", 1, 8), ("eight_nodes", 8, 64)])
def test_launch_files_load(name: str, machines: int, processes: int) -> None:
    config = ClusterConfig.from_yaml_file(str(LAUNCH / f"{name}.yaml"))
    assert (config.num_machines, config.num_processes) == (machines, processes)
    assert config.mixed_precision == "no"  # another value would be a second home for the stage's precision
    assert (config.distributed_type.value == "NO") == (processes == 1)
    comment = (LAUNCH / f"{name}.yaml").read_text(encoding="utf-8").split("compute_environment")[0]
    assert f"docs/launch/{name}.yaml" in comment


@pytest.mark.parametrize(
    ("code", "state", "requeued"),
    [(0, 400, False), (1, 200, False), (1, 1000, True), (75, 200, True), (137, 200, False), (137, 1000, True)],
)
@pytest.mark.parametrize("output", [[], ["--output", "runs/b c"]])
def test_slurm_script_starts_every_rank_and_requeues_what_was_stopped_or_failed_after_a_newer_state(
    code: int, state: int, requeued: bool, output: list[str], tmp_path: Path
) -> None:
    """srun, scontrol and python are stand-ins; the script is the real one."""
    states = tmp_path / (output[1] if output else "outputs/fantasy_world_stage1") / "state"
    (states / "step-200").mkdir(parents=True)
    (states / ".step-9000.tmp").mkdir()
    programs = {
        "scontrol": f'if [ "$1" = show ]; then echo node-a; echo node-b; else echo "$@" >> {tmp_path}/requeue; fi',
        "srun": f'echo "$1" > {tmp_path}/cpus; mkdir -p "{states}/step-{state}"\n'
        "while [[ $1 == --* ]]; do shift; done\n"
        'for rank in 0 1; do SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NTASKS=2 "$@"; done\n'
        f"exit {code}",
        "python": f'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR:$MASTER_PORT $*" >> {tmp_path}/started',
    }
    (tmp_path / "env.sh").write_text("")
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path)}
    environment |= {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_CPUS_PER_TASK": "8"}
    done = subprocess.run(
        ["bash", str(LAUNCH / "train.slurm"), "--stage", "stage1", *output, "a=b c"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    started = (tmp_path / "started").read_text().splitlines()
    assert started == [
        f"{rank} {rank} 2 node-a:29500 -m fw_model.train {' '.join(['--stage stage1', *output])} a=b c" for rank in (0, 1)
    ]
    assert (tmp_path / "requeue").exists() == requeued
    assert (tmp_path / "cpus").read_text() == "--cpus-per-task=8\n"


def test_slurm_script_asks_for_a_process_per_gpu() -> None:
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", (LAUNCH / "train.slurm").read_text(encoding="utf-8"), re.MULTILINE))
    assert options["ntasks-per-node"] == options["gpus-per-node"] == "8"
    assert options["signal"].startswith("TERM@")  # "B:TERM" would reach the script alone
    assert yaml.safe_load((LAUNCH / "eight_nodes.yaml").read_text(encoding="utf-8"))["num_machines"] == int(options["nodes"])


def test_what_the_page_says_of_the_preset_tiny_is_so() -> None:
    sentence = re.search(r"^The preset tiny sets.*?\.$", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert sentence is not None
    told = re.findall(r"`(\w+)` to (\d+)\s+and (\d+)", sentence[0])
    assert {key for key, *_ in told} >= {"save_every", "validate_every", "log_every", "workers"}
    tiny = load_preset("tiny")
    for key, *values in told:
        assert [str(getattr(tiny.stage(stage), key)) for stage in ("stage1", "stage2")] == values, key
