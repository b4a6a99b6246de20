"""One training step on tensors without data: how much memory it takes and how many FLOPs, before any GPU is rented.

The real model and losses run under torch's FakeTensorMode, forward and backward, recomputation included: every operation
happens with its shapes and dtypes, none with numbers. What each tensor's storage would take is followed until it is freed.
So there is no second description of the model that could go out of date.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

from fw_model.config import ModelConfig, Stage, WanConfig
from fw_model.model.backbone import WanBackbone
from fw_model.model.fantasy_world import FantasyWorld, check_clip_size
from fw_model.train.flow import diffusion_loss
from fw_model.train.losses import Targets, geometry_losses, total_loss


@dataclass(frozen=True)
class ClipSize:
    """A batch of clips as the model sees it."""

    frames: int = 81
    height: int = 336
    width: int = 592
    batch: int = 1

    @property
    def latent_frames(self) -> int:
        return (self.frames - 1) // 4 + 1

    @property
    def video_tokens(self) -> int:
        """Patch tokens of one clip."""
        return self.latent_frames * (self.height // 16) * (self.width // 16)

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


@dataclass(frozen=True)
class StepTrace:
    """What one forward and backward pass takes, in bytes and FLOPs (two per multiply-add)."""

    weights: int  # base and new parameters
    gradients: int  # of everything that trains, all at once
    peak: int  # largest total at any moment: weights, inputs, activations, temporaries, and the gradients there are by then
    forward_flops: int
    total_flops: int  # forward, backward and recomputation
    seconds: float  # that tracing took

    @property
    def activations(self) -> int:
        """What has to be there beside the weights and all gradients at the worst moment."""
        return max(0, self.peak - self.weights - self.gradients)


_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    # torch counts attention by the names of its CUDA kernels only; the arguments lie in the same order
    _CPU_ATTENTION: sdpa_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}


class _Meter(TorchDispatchMode):
    """Counts FLOPs, and follows the bytes of all storages that operations give back until nothing refers to them.

    (torch's FlopCounterMode keeps recomputed activations alive, so that the two cannot be used together.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        count = _FLOPS.get(getattr(func, "_overloadpacket", None))
        if count is not None:
            self.flops += int(count(*args, **(kwargs or {}), out_val=result))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return result

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def freed(_: Any) -> None:
            del self._seen[key]
            self.now -= size

        self._seen[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


@contextmanager
def float32_of_cuda() -> Iterator[None]:
    """Under autocast CUDA runs these in float32, where a CPU stays in bfloat16; a step's largest temporaries are theirs.

    (A TorchFunctionMode would do, but is off while a backward pass recomputes.)
    """
    names = ("interpolate", "layer_norm", "rms_norm")
    plain = {name: getattr(F, name) for name in names}

    def run(name: str, *args: Any, **kwargs: Any) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(lambda x: x.float() if isinstance(x, Tensor) else x, (args, kwargs))
        return plain[name](*args, **kwargs)

    try:
        for name in names:
            setattr(F, name, partial(run, name))
        yield
    finally:
        for name, function in plain.items():
            setattr(F, name, function)


def trace_step(
    config: ModelConfig,
    stage: Stage,
    size: ClipSize,
    *,
    checkpointing: bool = True,
    bfloat16: bool = True,
    float32_products: bool = False,
    train_geometry: bool = True,
    held_gradients: bool = False,
    change: Callable[[FantasyWorld], object] | None = None,
) -> StepTrace:
    """Trace one step of a stage for a batch of clips of one size.

    Args:
        config: shapes of the model.
        stage: what runs and trains.
        size: the batch.
        checkpointing: recompute activations block by block.
        bfloat16: the base is stored in bfloat16 and the step runs under autocast, with the float32 functions of CUDA's; otherwise
            all is float32.
        float32_products: with `bfloat16`, no autocast, and the base computes as after `compute_in_float32`.
        train_geometry: as for `FantasyWorld.set_stage`.
        held_gradients: all gradients are there from the start, as in every micro-batch after the first and with DDP's buckets.
        change: called with the model before the step, to trace something other than what training does.

    Raises:
        ValueError: a clip size that does not fit; names the nearest that do.
    """
    check_clip_size(size.frames, size.height, size.width)
    started = time.perf_counter()
    with FakeTensorMode():
        world = FantasyWorld(config)
        if bfloat16:
            store_in_bfloat16(world.base)
        if float32_products:
            compute_in_float32(world.base)
        world.set_stage(stage, train_geometry).enable_gradient_checkpointing(checkpointing)
        if change is not None:
            change(world)
        parameters = list(world.parameters())
        weights = _bytes(parameters)
        with float32_of_cuda(), _Meter() as meter:
            for parameter in parameters:
                meter.add(parameter)
                if held_gradients and parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)
            inputs, targets = step_inputs(config.wan, size)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16 and not float32_products):
                output = world(**inputs)
            losses = geometry_losses(output, targets)
            if output.velocity is not None:
                latents = inputs["latents"]
                noise = torch.empty_like(latents)
                losses["diffusion_loss"] = diffusion_loss(output.velocity, noise, latents, inputs["timestep"])
            loss = total_loss(losses)
            forward = meter.flops
            del output, losses
            loss.backward()
        return StepTrace(
            weights=weights,
            gradients=_bytes([p.grad for p in parameters if p.grad is not None]),
            peak=meter.peak,
            forward_flops=forward,
            total_flops=meter.flops,
            seconds=time.perf_counter() - started,
        )


def count_flops(run: Callable[[], object]) -> int:
    """FLOPs of everything `run` does; on tensors without data inside FakeTensorMode, nothing is computed."""
    with _Meter() as meter:
        run()
    return meter.flops


def measured_peak(run: Callable[[], object]) -> int:
    """Bytes that `run` holds at its worst moment beyond what was there before, as torch's own CPU allocator reports them.

    Every allocation and release of tensors and kernels is counted: unlike resident memory it comes out the same each time.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    recorded = profiler.profiler
    if recorded is None or recorded.kineto_results is None:
        raise RuntimeError("torch's profiler recorded nothing: is another profiler running?")
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    sums = accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(sums, default=0)


def store_in_bfloat16(base: WanBackbone) -> None:
    """Round the frozen base's weights, as its published file has them; tensor by tensor, so that never two copies exist."""
    for module in base.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().to(torch.bfloat16), requires_grad=False))


def compute_in_float32(base: WanBackbone) -> None:
    """Let the base's linear layers and convolutions compute in float32; their outputs are in their inputs' dtype, as before."""
    for layer in base.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.Conv3d):
            layer.forward = partial(_in_float32, layer)  # type: ignore[method-assign]


def _in_float32(layer: nn.Linear | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    weight, bias = layer.weight.float(), None if layer.bias is None else layer.bias.float()
    if isinstance(layer, nn.Linear):
        return F.linear(x.float(), weight, bias).to(x.dtype)
    return layer._conv_forward(x.float(), weight, bias).to(x.dtype)


def step_inputs(wan: WanConfig, size: ClipSize) -> tuple[dict[str, Tensor], Targets]:
    """Random inputs of `FantasyWorld.forward` and targets of the losses, of one size."""
    batch, frames, height, width = size.batch, size.frames, size.height, size.width
    latent = (batch, wan.in_dim // 2, size.latent_frames, height // 8, width // 8)
    inputs = {
        "latents": torch.randn(latent),
        "image_latents": torch.randn(latent),
        "timestep": torch.linspace(900.0, 300.0, batch),
        "text": torch.randn(batch, wan.text_len, wan.text_dim),
        "image_features": torch.randn(batch, wan.image_tokens, wan.image_dim),
        "camera": torch.randn(batch, wan.control_channels, size.latent_frames, height, width),
        "pose_mask": torch.ones(batch, dtype=torch.bool),
    }
    pose = torch.zeros(batch, frames, 9)
    pose[..., 6:] = 1.0
    targets = Targets(
        depth=1 + torch.rand(batch, frames, height, width),
        valid=torch.ones(batch, frames, height, width, dtype=torch.bool),
        points=torch.randn(batch, frames, height, width, 3),
        pose_encoding=pose,
    )
    return inputs, targets


def _bytes(tensors: list[Any]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
