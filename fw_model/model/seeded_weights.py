"""Made weights: every tensor filled from its own key, so that two implementations can be compared without a download."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn


@torch.no_grad()
def fill_made_weights(target: nn.Module | Mapping[str, Tensor], seed: int, key_map: Mapping[str, str] | None = None) -> None:
    """Fill a module or a state dict in place; the same key, shape and seed always give the same numbers.

    Matrices get 0.8 / sqrt(fan-in) times a normal sample, 1-d tensors whose key ends in "weight" (norm gains) 1 + 0.1
    times one, everything else 0.1 times one. Integer tensors stay as they are. The samples are drawn in float32 on the
    CPU, so dtype and device of the target do not change them, and torch's global generator is not touched.

    Args:
        target: what to fill. A module must not be on the meta device.
        seed: added to the checksum of each key.
        key_map: the target's key -> the ORIGINAL checkpoint's key, which is the one that decides the values. Keys that
            are not in it stand for themselves.
    """
    state = target.state_dict() if isinstance(target, nn.Module) else target
    for own_key, tensor in state.items():
        if not tensor.is_floating_point():
            continue
        key = (key_map or {}).get(own_key, own_key)
        generator = torch.Generator().manual_seed((zlib.crc32(key.encode()) + seed) & 0x7FFFFFFF)
        # In place where that gives the same bits: at full size the copies would take longer than the numbers.
        in_place = tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.is_contiguous()
        x = (tensor if in_place else torch.empty(tensor.shape)).normal_(generator=generator)
        if tensor.ndim >= 2:
            x.mul_(0.8).div_(math.sqrt(tensor[0].numel()))
        else:
            x.mul_(0.1)
            if key.endswith("weight"):
                x.add_(1)
        if not in_place:
            tensor.copy_(x)
