"""What a training run needs before it starts: dataset, stage 1 checkpoint, output folder, command. Free of Dagster."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fw_model.config import Preset, Stage
from fw_model.errors import TRAIN_STAGE1, DatasetError, MissingInput
from fw_model.files import write_text
from fw_model.train.identity import CheckpointError, RunIdentity, read_metadata, run_identity
from fw_pipeline.steps.settings import Settings
from fw_pipeline.steps.store import Store

_TRAIN_STAGE1 = f"Run: {TRAIN_STAGE1}"


# What a launcher around Dagster (torchrun, a Slurm job) leaves in the environment. A training that Dagster starts is none of its
# processes, and would wait for the others until they time out.
OF_ANOTHER_LAUNCHER = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE"),
    *("GROUP_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"),
    *("TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_USE_AGENT_STORE"),
)


@dataclass(frozen=True)
class TrainingPlan:
    """One training run. The output folder is named from its identity, so a retry finds its own state there."""

    stage: Stage
    preset: Preset
    dataset: Path
    output: Path
    stage1_checkpoint: Path | None
    device: str
    processes: int

    @property
    def preset_file(self) -> Path:
        return self.output / "preset.yaml"

    def write_preset(self) -> None:
        """Keep the whole configuration beside its results; the training process reads it from there."""
        write_text(self.preset_file, yaml.safe_dump(self.preset.model_dump(mode="json"), sort_keys=False))

    def command(self) -> list[str]:
        """The `accelerate launch` line, as a list (no shell); torchrun's for several processes on CPUs.

        `env` before it takes another launcher's variables away.

        There `accelerate launch --cpu --num_processes 2` starts a single process (seen in 1.15) and says nothing.
        """
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--dynamo_backend", "no"]
        launch += ["--num_processes", str(self.processes), "--mixed_precision", "no"]  # the stage's own `precision` decides
        # One thread: with two, a step of the tiny preset on 2 cores took 0.4 to 19 s as soon as anything else ran, against a
        # steady 0.36 s; on GPUs the CPU's threads do not matter.
        launch += ["--num_cpu_threads_per_process", "1"]
        if self.device == "cpu" and self.processes > 1:
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(self.processes)]
        elif self.device == "cpu":
            launch.append("--cpu")
        elif self.processes > 1:
            launch.append("--multi_gpu")
        script = ["-m", "fw_pipeline.train_with_pipes", "--preset", str(self.preset_file), "--stage", self.stage]
        script += ["--dataset", str(self.dataset), "--output", str(self.output)]
        if self.stage1_checkpoint is not None:
            script += ["--stage1-checkpoint", str(self.stage1_checkpoint)]
        return ["env", *(word for name in OF_ANOTHER_LAUNCHER for word in ("-u", name)), *launch, *script]

    def environment(self, grace: float) -> dict[str, str]:
        """What the launcher needs beside its command. When stopped it gives its processes `grace` seconds to save, not 30."""
        on_cpu = {"ACCELERATE_USE_CPU": "true"} if self.device == "cpu" else {}
        return {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": f"{grace:.0f}", **on_cpu}

    def result(self) -> dict[str, Any] | None:
        """The finished run's result.json, or None while it is not finished."""
        return read_result(self.output)


def plan_training(settings: Settings, stage: Stage) -> TrainingPlan:
    """Check what a stage needs and say where it goes.

    Raises MissingInput when the dataset or, for stage 2, a finished stage 1 is missing.
    """
    from fw_model.data.manifest import dataset_digest

    store, preset = Store(settings.data), settings.load_preset()
    try:
        dataset_id = dataset_digest(store.dataset)
    except DatasetError as error:
        raise MissingInput(f"{stage} needs the packed dataset: {error}") from error
    identity, checkpoint = run_identity(preset, "stage1", dataset_id), None
    if stage == "stage2":
        checkpoint = _stage1_checkpoint(store.outputs("stage1"), identity)
        try:
            identity = run_identity(preset, stage, dataset_id, read_metadata(checkpoint))
        except CheckpointError as error:
            raise MissingInput(f"{stage} starts from a stage 1 checkpoint: {error}", _TRAIN_STAGE1) from error
    output = store.outputs(stage) / identity.name
    return TrainingPlan(stage, preset, store.dataset, output, checkpoint, settings.device, settings.processes)


def read_result(output: Path) -> dict[str, Any] | None:
    path = output / "result.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _stage1_checkpoint(runs: Path, identity: RunIdentity) -> Path:
    """The checkpoint that the finished stage 1 of this configuration names: of this dataset, else of the newest other one.

    A dataset that has grown since does not make a stage 1 of days worthless; a changed configuration does.
    """
    same_configuration = f"{identity.config_digest}-*"
    found = {
        path.parent: result for path in runs.glob(f"{same_configuration}/result.json") if (result := read_result(path.parent))
    }
    if not found:
        started = [path.name for path in runs.glob(same_configuration)]
        state = f"a run was started but has not finished ({', '.join(started)})" if started else "no such run was started"
        raise MissingInput(
            f"stage 2 needs a finished stage 1 of the same configuration as {runs / identity.name}: {state}", _TRAIN_STAGE1
        )
    run = runs / identity.name
    if run not in found:
        run = max(found, key=lambda run: (run / "result.json").stat().st_mtime)
    return run / str(found[run]["checkpoint"])
