"""What a training run needs before it starts: dataset, stage 1 checkpoint, output folder, command. Free of Dagster."""

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fw_model.config import Preset, Stage
from fw_pipeline.steps.settings import Settings
from fw_pipeline.steps.store import Store


class MissingPrerequisite(RuntimeError):
    """Something an earlier job makes is not there; the message names that job."""


@dataclass(frozen=True)
class TrainingPlan:
    """One training run. The output folder follows from configuration and dataset, so a retry finds its own state there."""

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
        self.output.mkdir(parents=True, exist_ok=True)
        self.preset_file.write_text(yaml.safe_dump(self.preset.model_dump(mode="json"), sort_keys=False), encoding="utf-8")

    def command(self) -> list[str]:
        """The `accelerate launch` line, as a list (no shell); torchrun's for several processes on CPUs.

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
        return launch + script

    def environment(self, grace: float) -> dict[str, str]:
        """What the launcher needs beside its command. When stopped it gives its processes `grace` seconds to save, not 30."""
        on_cpu = {"ACCELERATE_USE_CPU": "true"} if self.device == "cpu" else {}
        return {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": f"{grace:.0f}", **on_cpu}

    def result(self) -> dict[str, Any] | None:
        """The finished run's result.json, or None while it is not finished."""
        return read_result(self.output)


def plan_training(settings: Settings, stage: Stage) -> TrainingPlan:
    """Check what a stage needs and say where it goes.

    Raises MissingPrerequisite when the dataset or, for stage 2, a finished stage 1 is missing.
    """
    from fw_model.data.manifest import dataset_digest
    from fw_model.errors import DatasetError

    store, preset = Store(settings.data), settings.load_preset()
    try:
        dataset_id = dataset_digest(store.dataset)
    except DatasetError as error:
        raise MissingPrerequisite(f"{stage} needs the packed dataset: {error}") from error
    stage1_checkpoint = _stage1_checkpoint(settings, preset, dataset_id) if stage == "stage2" else None
    name = f"{_config_id(preset, stage)}-{dataset_id[:8]}"
    if stage1_checkpoint is not None and stage1_checkpoint.parent.name.partition("-")[2] != dataset_id[:8]:
        name += f"-from-{stage1_checkpoint.parent.name.partition('-')[2]}"
    output = store.outputs(stage) / name
    return TrainingPlan(stage, preset, store.dataset, output, stage1_checkpoint, settings.device, settings.processes)


def read_result(output: Path) -> dict[str, Any] | None:
    path = output / "result.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _config_id(preset: Preset, stage: Stage) -> str:
    """Hash of all that decides a stage's weights; knobs that do not (see OPERATIONAL) may change between retries.

    Stage 2 starts from stage 1, so stage 1's knobs decide its weights too.
    """
    from fw_model.train.run_folder import OPERATIONAL

    stages: tuple[Stage, ...] = ("stage1",) if stage == "stage1" else ("stage1", "stage2")
    knobs = [preset.stage(name).model_dump(mode="json", exclude=OPERATIONAL) for name in stages]
    everything = [preset.digest("base", "model", "encoders", "clip"), *knobs]
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:12]


def _stage1_checkpoint(settings: Settings, preset: Preset, dataset_id: str) -> Path:
    """The checkpoint of the finished stage 1 of this configuration: of this dataset, else of the newest other one.

    A dataset that has grown since does not make a stage 1 of days worthless; a changed configuration does.
    """
    runs = Store(settings.data).outputs("stage1")
    config_id = _config_id(preset, "stage1")
    found = {path.parent: read_result(path.parent) for path in runs.glob(f"{config_id}-*/result.json")}
    if not found:
        started = [path.name for path in runs.glob(f"{config_id}-*")]
        state = f"a run was started but has not finished ({', '.join(started)})" if started else "no such run was started"
        raise MissingPrerequisite(
            f"stage 2 needs a finished stage 1 of the same configuration ({config_id}) under {runs}: {state}.\n"
            f"Run: dagster job execute -j stage1_training"
        )
    same = [run for run in found if run.name.endswith(f"-{dataset_id[:8]}")]
    run = same[0] if same else max(found, key=lambda run: (run / "result.json").stat().st_mtime)
    checkpoint = run / str((found[run] or {}).get("checkpoint", ""))
    if not checkpoint.is_file():
        raise MissingPrerequisite(
            f"{run / 'result.json'} names {checkpoint.name!r}, which is gone.\nRun: dagster job execute -j stage1_training"
        )
    return checkpoint
