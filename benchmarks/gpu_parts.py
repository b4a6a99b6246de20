"""The parts of gpu_check.py: generators of what they measured, as dictionaries. Every one also runs small, on a CPU."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from middle_model import FULL, MIDDLE, Size
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fw_model.config import Preset, Stage, StageConfig, load_preset
from fw_model.describe.memory_plan import static_bytes
from fw_model.describe.step_trace import ClipSize, step_inputs, store_in_bfloat16, trace_step
from fw_model.model.fantasy_world import FantasyWorld
from fw_model.train.checkpoints import save_state
from fw_model.train.flow import diffusion_loss
from fw_model.train.losses import geometry_losses, total_loss
from fw_model.train.objective import autocast
from fw_model.train.optimizers import make_optimizer, moments
from fw_model.train.sharding import data_mesh, shard, whole_on_main

Lines = Iterator[dict[str, Any]]
GIB = 2**30
SEED = 0
BATCHES: dict[Stage, tuple[int, ...]] = {"stage1": (1, 8), "stage2": (1, 2)}  # clips of a micro-batch whose memory is measured
SMALL = dataclasses.replace(MIDDLE, clip=ClipSize(5, 64, 96))  # for --cpu
KERNELS: dict[str, SDPBackend] = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


# -------------------------------------------------------------------------------------------------------------- helpers


def place(cpu: bool) -> tuple[torch.device, Size]:
    return (torch.device("cpu"), SMALL) if cpu else (torch.device("cuda"), FULL)


def random_world(preset: Preset, device: torch.device, stage: Stage) -> FantasyWorld:
    """The model with random weights made where it runs: seeded ones would take a minute of a CPU."""
    torch.manual_seed(SEED)
    with torch.device(device):
        world = FantasyWorld(preset.model)
    with torch.no_grad():
        for name, parameter in world.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_().mul_(0.8 / parameter[0].numel() ** 0.5)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    store_in_bfloat16(world.base)
    world.set_stage(stage).enable_gradient_checkpointing()
    return world.train()


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@dataclasses.dataclass
class Steps:
    """Training steps of a model on random clips."""

    world: FantasyWorld
    config: StageConfig
    device: torch.device
    size: Size
    batch: int = 1

    def __post_init__(self) -> None:
        self.parameters = self.world.trainable_parameters()
        self.optimizer = make_optimizer(self.parameters, self.config)
        self.called: nn.Module = self.world
        self.feed(self.batch)

    def feed(self, batch: int) -> None:
        with torch.device(self.device):
            self.inputs, self.targets = step_inputs(self.world.config.wan, dataclasses.replace(self.size.clip, batch=batch))

    def backward(self) -> float:
        with autocast(self.config, self.device):
            output = self.called(**self.inputs)
        losses = geometry_losses(output, self.targets)
        if output.velocity is not None:
            latents = self.inputs["latents"]
            losses["diffusion_loss"] = diffusion_loss(
                output.velocity, torch.zeros_like(latents), latents, self.inputs["timestep"]
            )
        loss = total_loss(losses, self.config.camera_weight, self.config.lambda_geometry)
        loss.backward()
        return float(loss.detach())

    def step(self, micro: int = 1) -> float:
        """Seconds of an optimizer step over `micro` micro-batches. Raises ValueError for a loss that is not finite."""
        sync(self.device)
        started = time.perf_counter()
        losses = [self.backward() for _ in range(micro)]
        nn.utils.clip_grad_norm_(self.parameters.values(), self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        sync(self.device)
        if not all(loss == loss and abs(loss) < 1e9 for loss in losses):
            raise ValueError(f"losses {losses}")
        return time.perf_counter() - started


def peak_gib(device: torch.device, run: Callable[[], object]) -> float | None:
    """Largest memory of tensors while `run` runs, all that was there before included; None on a CPU."""
    if device.type != "cuda":
        run()
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run()
    return round(torch.cuda.max_memory_allocated() / GIB, 2)


def attempt(what: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured, or why it could not be: the variants of a part do not end one another."""
    try:
        return {"what": what, **measure()}
    except (RuntimeError, ValueError) as error:  # torch.OutOfMemoryError is one
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return {"what": what, "error": str(error).strip().splitlines()[0][:300]}


# ---------------------------------------------------------------------------------------------------------------- parts


def environment(cpu: bool) -> Lines:
    """The card, the software, and what the card gives: a matrix product and a copy."""
    device, _ = place(cpu)
    yield {"device": "cpu" if cpu else torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
    side, count = (512, 3) if cpu else (8192, 20)
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    b = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    x = torch.randn(side * side, device=device)
    for name, work, amount in (
        ("matmul_tflops", lambda: a @ b, 2 * side**3 / 1e12),
        ("copy_tb_per_second", lambda: x.clone(), 2 * 4 * x.numel() / 1e12),
    ):
        for _ in range(3):
            work()
        sync(device)
        started = time.perf_counter()
        for _ in range(count):
            work()
        sync(device)
        yield {name: round(amount * count / (time.perf_counter() - started), 2)}


def agree(cpu: bool) -> Lines:
    """The tiny preset's output and gradients in float32, on the CPU and here."""
    device, _ = place(cpu)
    preset = load_preset("tiny")
    for stage in ("stage1", "stage2"):
        world = FantasyWorld.from_preset(preset, stage).set_stage(stage)
        inputs, targets = step_inputs(preset.model.wan, ClipSize(5, 64, 112, 2))
        found = []
        for where in (torch.device("cpu"), device):
            model = world.to(where)
            model.zero_grad()
            output = model(**{name: value.to(where) for name, value in inputs.items()})
            moved = dataclasses.replace(
                targets, **{k: v.to(where) for k, v in vars(targets).items() if isinstance(v, torch.Tensor)}
            )
            total_loss(geometry_losses(output, moved)).backward()
            outputs = [output.depth, output.points, output.pose_encodings[-1]]
            if output.velocity is not None:
                outputs.append(output.velocity)
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            found.append(([x.detach().cpu() for x in outputs], [g.cpu().clone() for g in gradients]))  # .to moves them in place
        (outputs, gradients), (others, other_gradients) = found
        worst = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(outputs, others, strict=True))
        norm = sum(float(g.square().sum()) for g in gradients) ** 0.5
        apart = sum(float((a - b).square().sum()) for a, b in zip(gradients, other_gradients, strict=True)) ** 0.5
        yield {"stage": stage, "outputs": worst, "gradients": apart / norm, "error": None if worst < 1e-3 else "they differ"}


def steps(stage: Stage, cpu: bool) -> Lines:
    """Seconds and memory of a step: attention kernels, batches, moments in ordinary memory, compiled, kernels by time."""
    device, size = place(cpu)
    preset = size.preset(*(f"{s}.precision={'float32' if cpu else 'bfloat16'}" for s in ("stage1", "stage2")))
    config = preset.stage(stage)
    started = time.perf_counter()
    training = Steps(random_world(preset, device, stage), config, device, size)
    yield {"what": "build", "seconds": round(time.perf_counter() - started, 2)}

    def timed(around: Callable[[], AbstractContextManager[Any]] = nullcontext) -> dict[str, Any]:
        with around():
            first = training.step()
            seconds = min(training.step() for _ in range(1 if cpu else 3))
        return {
            "seconds": round(seconds, 3),
            "first": round(first, 2),
            "tokens_per_second": round(size.clip.video_tokens / seconds),
        }

    yield attempt("default", timed)
    for batch in BATCHES[stage][:1] if cpu else BATCHES[stage]:
        training.feed(batch)
        yield attempt(f"memory of {batch} a micro-batch", lambda: {"peak_gib": peak_gib(device, partial(training.step, 2))})
    training.feed(1)
    if not cpu:
        yield attempt("kernels", lambda: {"by_time": kernels(training)})
        for name, backend in KERNELS.items() if stage == "stage2" else ():  # where attention is most of the work
            yield attempt(f"attention {name}", partial(timed, partial(sdpa_kernel, backend)))
    for block in [*training.world.base.transformer.blocks, *training.world.geodit.blocks]:
        block.compile()
    yield attempt("compiled", timed)
    if not cpu:
        yield attempt("compiled, attention cudnn", partial(timed, partial(sdpa_kernel, SDPBackend.CUDNN_ATTENTION)))
        yield attempt("compiled, memory", lambda: {"peak_gib": peak_gib(device, partial(training.step, 2))})


def kernels(training: Steps, count: int = 14) -> list[dict[str, Any]]:
    """The operations that took most of one step on the GPU."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        training.step()
    rows = [row for row in profiler.key_averages() if row.device_type == torch.autograd.DeviceType.CUDA]
    total = sum(row.self_device_time_total for row in rows)
    rows.sort(key=lambda row: -row.self_device_time_total)
    return [
        {"kernel": row.key[:110], "ms": round(row.self_device_time_total / 1e3, 1), "calls": row.count,
         "share": round(row.self_device_time_total / total, 4)}
        for row in rows[:count]
    ]  # fmt: skip


def plan(cpu: bool) -> Lines:
    """FLOPs without recomputation, and the memory plan with gradients held, as they are from the second micro-batch on."""
    _, size = place(cpu)
    preset = size.preset()
    for stage in BATCHES:
        yield {
            "stage": stage,
            "tflops": round(trace_step(preset.model, stage, size.clip, checkpointing=False).total_flops / 1e12, 3),
        }
    for stage, batches in BATCHES.items():
        for batch in batches[:1] if cpu else batches:
            clip = dataclasses.replace(size.clip, batch=batch)
            trace = trace_step(preset.model, stage, clip, held_gradients=True)
            planned = static_bytes(trace, preset.stage(stage)) + trace.activations
            yield {"stage": stage, "batch": batch, "planned_gib": round(planned / GIB, 2)}


def offload(cpu: bool) -> Lines:
    """AdamW's moments in ordinary memory; in 8 bits where bitsandbytes is."""
    device, size = place(cpu)
    preset = size.preset()
    for what, update in (
        ("moments in ordinary memory", {"offload_optimizer": True}),
        ("moments in 8 bits", {"optimizer": "adamw8bit"}),
    ):

        def measure(update: dict[str, Any] = update) -> dict[str, Any]:
            config = preset.stage1.model_copy(update=update)
            training = Steps(random_world(preset, device, "stage1"), config, device, size)
            training.step()
            return {"peak_gib": peak_gib(device, partial(training.step, 2)), "seconds": round(training.step(), 3)}

        if what == "moments in 8 bits" and (cpu or not has_bitsandbytes()):
            yield {"what": what, "skipped": "needs a GPU and bitsandbytes"}
        else:
            yield attempt(what, measure)


def has_bitsandbytes() -> bool:
    from importlib.util import find_spec

    return find_spec("bitsandbytes") is not None


def save(cpu: bool) -> Lines:
    """Seconds that saving a state of stage 1 stops training for."""
    device, size = place(cpu)
    preset = size.preset()
    training = Steps(random_world(preset, device, "stage1"), preset.stage1, device, size)
    training.step()
    with tempfile.TemporaryDirectory() as name:
        started = time.perf_counter()
        files = {
            "weights": whole_on_main(training.parameters, True),
            "optimizer": whole_on_main(moments(training.parameters, training.optimizer), True),
        }
        copied = time.perf_counter()
        save_state(Path(name), 1, files, {"progress": {}, "sampler": {}}, 1)
        done = time.perf_counter()
    size_gib = sum(x.nbytes for tensors in files.values() for x in tensors.values()) / GIB
    yield {"gib": round(size_gib, 2), "copy_seconds": round(copied - started, 2), "write_seconds": round(done - copied, 2)}


def distributed(cpu: bool) -> Lines:
    """One step under DDP and one under FSDP2, a group of one process: whether NCCL, hooks and shards work here at all."""
    device, _ = place(cpu)
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "LOCAL_RANK": "0"}
    torch.distributed.init_process_group("gloo" if cpu else "nccl")
    preset, size = SMALL.preset(), SMALL
    for stage in ("stage1", "stage2"):
        config = preset.stage(stage)
        plain = Steps(random_world(preset, device, stage), config, device, size)
        expected = plain.backward()
        data_parallel = Steps(random_world(preset, device, stage), config, device, size)
        data_parallel.called = nn.parallel.DistributedDataParallel(data_parallel.world, gradient_as_bucket_view=True)
        world = shard(random_world(preset, device, stage), data_mesh(device, 1))
        sharded = Steps(world, config, device, size)
        for what, training in (("ddp", data_parallel), ("fsdp2", sharded)):
            training.inputs, training.targets = plain.inputs, plain.targets
            loss = training.backward()
            training.step()
            wrong = abs(loss - expected) > 2e-2 * abs(expected)
            yield {"stage": stage, "what": what, "loss": loss, "alone": expected, "error": "losses differ" if wrong else None}
    torch.distributed.destroy_process_group()


def train(cpu: bool) -> Lines:
    """The training command itself: an interrupted run exits with 75, goes on, and ends where an uninterrupted one does."""
    from random_clips import make_dataset
    from safetensors.torch import load_file

    size = SMALL
    device = "cpu" if cpu else "cuda"
    preset = size.preset()
    count = 6 if cpu else 24
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataset = make_dataset(folder, size, preset)
        config = folder / "preset.yaml"
        config.write_text(yaml_of(preset, count), encoding="utf-8")
        command = [
            sys.executable,
            "-m",
            "fw_model.train",
            "--preset",
            str(config),
            "--stage",
            "stage1",
            "--dataset",
            str(dataset),
        ]
        whole, cut = folder / "whole", folder / "cut"
        started = time.perf_counter()
        subprocess.run([*command, "--output", str(whole)], check=True)
        yield {"what": f"{count} steps, {device}", "seconds": round(time.perf_counter() - started, 1)}
        process = subprocess.Popen([*command, "--output", str(cut)])
        wait_for(cut / "state" / "step-2", process)
        process.send_signal(signal.SIGTERM)
        code = process.wait()
        yield {"what": "SIGTERM", "exit_code": code, "error": None if code == 75 else "wanted 75"}
        subprocess.run([*command, "--output", str(cut)], check=True)
        a, b = (load_file(path / f"step-{count}.safetensors") for path in (whole, cut))
        apart = max(float((a[key].float() - b[key].float()).abs().max()) for key in a)
        yield {"what": "resumed against uninterrupted", "largest_difference": apart}


def yaml_of(preset: Preset, count: int) -> str:
    import yaml

    stage = {"steps": count, "global_batch": 1, "validation_clips": 1, "validate_every": 1000, "log_every": 1, "state_every": 2}
    keys = preset.model_dump(mode="json")
    keys["stage1"] |= {**stage, "trackers": []}
    return yaml.safe_dump(keys)


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    while not path.exists() and process.poll() is None:
        time.sleep(0.05)


def annotate(cpu: bool) -> Lines:
    """DUSt3R and Depth Anything Large, seeded weights, 81 frames of 512x288: frames a second of the networks."""
    from bench_depth import bench_gpu
    from bench_dust3r import MIDDLE as SMALL_NETWORK
    from bench_dust3r import time_passes

    from fw_pipeline.annotate.dust3r import DUSt3R, DUSt3RConfig

    config, dtype, clip = (SMALL_NETWORK, torch.float32, (5, 64, 96)) if cpu else ({}, torch.bfloat16, (81, 288, 512))
    network = DUSt3R.seeded({**DUSt3RConfig().to_dict(), **config}, SEED, dtype).to("cpu" if cpu else "cuda")
    if not cpu:
        time_passes(9, 288, 512, network, "cuda")  # warms up
    yield {"what": "dust3r", **{k: round(v, 3) for k, v in time_passes(*clip, network, "cpu" if cpu else "cuda").items()}}
    del network
    if cpu:
        yield {"what": "depth anything large", "skipped": "needs a GPU"}
        return
    with tempfile.TemporaryDirectory() as name:
        yield {"what": "depth anything large", **bench_gpu(Path(name))}


def generate(cpu: bool) -> Lines:
    """One denoising step of a trained model without gradients, with and without its geometry heads' work counted."""
    device, size = place(cpu)
    preset = size.preset(f"stage2.precision={'float32' if cpu else 'bfloat16'}")
    training = Steps(random_world(preset, device, "stage2"), preset.stage2, device, size)
    training.world.eval()

    def forward() -> dict[str, Any]:
        times = []
        for _ in range(3):
            sync(device)
            started = time.perf_counter()
            with torch.no_grad(), autocast(preset.stage2, device):
                training.world(**training.inputs)
            sync(device)
            times.append(time.perf_counter() - started)
        return {"seconds": round(min(times), 3)}

    found = attempt("denoising step", forward)
    yield found | {"peak_gib": peak_gib(device, forward)}


# In the order they run: the most telling first. `plan` runs beside the others.
PARTS: dict[str, Callable[[bool], Lines]] = {
    "environment": environment,
    "agree": agree,
    "stage1": partial(steps, "stage1"),
    "stage2": partial(steps, "stage2"),
    "generate": generate,
    "annotate": annotate,
    "train": train,
    "distributed": distributed,
    "save": save,
    "offload": offload,
    "plan": plan,
}
