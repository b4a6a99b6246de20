"""AdamW in three ways (plain, 8-bit, moments in ordinary memory), its learning rate, and its moments as tensors to store."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from fw_model.config import StageConfig
from fw_model.errors import TrainingError


def learning_rate(config: StageConfig, step: int) -> float:
    """Rate of a step, counted from 1: linear warm-up, then constant or a cosine down to 0 at the last step."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.learning_rate
    share = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def check_optimizer(config: StageConfig, device: torch.device) -> None:
    """Raise TrainingError if the configured optimizer cannot run on this device or is not installed."""
    if config.optimizer != "adamw8bit":
        return
    if device.type != "cuda":
        raise TrainingError(f"optimizer: adamw8bit runs on CUDA GPUs, this run is on {device.type!r}; set optimizer=adamw")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise TrainingError("optimizer: adamw8bit needs bitsandbytes: pip install -e '.[gpu]', or set optimizer=adamw")


def make_optimizer(parameters: Mapping[str, nn.Parameter], config: StageConfig) -> torch.optim.Optimizer:
    """The configured AdamW; what is not `decayed` keeps its size. See `check_optimizer` for where it can run.

    Fused: one kernel a step, without the temporaries of torch's default, which are as large as all gradients.
    """
    matrices = [p for name, p in parameters.items() if decayed(name, p)]
    rest = [p for name, p in parameters.items() if not decayed(name, p)]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    if config.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, lr=config.learning_rate)
    return (OffloadedAdamW if config.offload_optimizer else torch.optim.AdamW)(groups, lr=config.learning_rate, fused=True)


def decayed(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to the matrices of layers, not to biases, norms, gates, tokens and modulation vectors."""
    return parameter.ndim >= 2 and name.rpartition(".")[2] == "weight"


class OffloadedAdamW(torch.optim.AdamW):
    """AdamW whose two moments stay in ordinary (pinned) memory; a step streams them through the device, weight by weight.

    The arithmetic and the state are `torch.optim.AdamW`'s, so a run may change from one to the other at a resume. It saves
    8 bytes a weight on the device and the optimizer's temporaries, and costs 16 bytes a weight of transfers per step.
    """

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step. Raises ValueError for a closure: nothing here needs one."""
        if closure is not None:
            raise ValueError("OffloadedAdamW takes no closure")
        devices = set()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    devices.add(parameter.device)
                    self._update(parameter, group)
        for device in devices:  # the copies back to pinned memory do not wait
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return None

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            step = torch.zeros((), device=parameter.device)
            state |= {"step": step, "exp_avg": host_zeros(parameter), "exp_avg_sq": host_zeros(parameter)}
        moments = [state[name].to(parameter.device, non_blocking=True) for name in ("exp_avg", "exp_avg_sq")]
        adamw(
            [parameter],
            [parameter.grad],  # type: ignore[list-item]
            [moments[0]],
            [moments[1]],
            [],
            [state["step"]],
            foreach=False,
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        if parameter.device.type != "cpu":
            state["exp_avg"].copy_(moments[0], non_blocking=True)
            state["exp_avg_sq"].copy_(moments[1], non_blocking=True)


def host_zeros(like: Tensor) -> Tensor:
    """Zeros of the same shape in ordinary memory, pinned where `like` is on a GPU."""
    return torch.zeros(like.shape, dtype=like.dtype, pin_memory=like.device.type == "cuda")


def moments(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as "weight's name/field" -> tensor. A plain integer (bitsandbytes counts so) becomes int64 []."""
    return {
        f"{name}/{field}": value if isinstance(value, Tensor) else torch.tensor(int(value))
        for name, parameter in parameters.items()
        for field, value in optimizer.state.get(parameter, {}).items()
    }


def put_moments_back(
    tensors: Iterable[tuple[str, Tensor]],
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    place: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Undo `moments`.

    Args:
        tensors: its items, on the CPU.
        parameters: the same weights.
        optimizer: of the same kind; its state is replaced.
        place: (tensor, weight) -> a copy of the tensor laid out as the weight is, on its device.
    """
    optimizer.state.clear()
    for key, tensor in tensors:
        name, _, field = key.rpartition("/")
        parameter = parameters[name]
        value: Tensor | int
        if tensor.ndim == 0:  # step counters; the fused kernel wants them beside the weight
            value = int(tensor) if tensor.dtype == torch.int64 else tensor.to(parameter.device, copy=True)
        elif isinstance(optimizer, OffloadedAdamW):
            value = host_zeros(parameter).copy_(tensor)
        else:
            value = place(tensor, parameter)
        optimizer.state[parameter][field] = value
