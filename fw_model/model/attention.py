"""Layers shared by the bridge, the GeoDiT and the camera head, and how new weights start."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fw_model.model.rope import Rotary, apply_rope

# What a block runs when something stands between its two halves; None: all of it.
Part = Literal["attention", "feed_forward"] | None


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions.

    `qk_norm` adds Wan's RMSNorm over all heads together to queries and keys.
    """

    def __init__(self, dim: int, heads: int, qk_norm: bool = False, eps: float = 1e-6) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q: nn.Module = nn.RMSNorm(dim, eps=eps) if qk_norm else nn.Identity()
        self.norm_k: nn.Module = nn.RMSNorm(dim, eps=eps) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, rotary: Rotary, causal: bool = False) -> Tensor:
        """x [B, N, dim] -> [B, N, dim]. `causal`: token n sees tokens 0..n only."""
        q, k = _normalised(self.norm_q, self.q(x)), _normalised(self.norm_k, self.k(x))
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in (q, k, self.v(x)))
        q, k = apply_rope(q, rotary).to(v.dtype), apply_rope(k, rotary).to(v.dtype)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal)
        return self.o(out.transpose(1, 2).flatten(2))


def _normalised(norm: nn.Module, x: Tensor) -> Tensor:
    """Normalise in the precision of the gain: under autocast x is bf16 and the gain float32."""
    return norm(x.to(norm.weight.dtype)) if isinstance(norm, nn.RMSNorm) else x


class TransformerLayer(nn.Module):
    """Pre-norm layer: self-attention with rotary positions, then a feed-forward of 4 * dim."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.ffn = feed_forward(dim, 4 * dim)

    def forward(self, x: Tensor, rotary: Rotary, causal: bool = False) -> Tensor:
        """x [B, N, dim] -> [B, N, dim]."""
        x = x + self.attention(self.norm1(x), rotary, causal).to(x.dtype)
        return x + self.ffn(self.norm2(x)).to(x.dtype)


def feed_forward(dim: int, hidden: int) -> nn.Sequential:
    """Linear, GELU (tanh), Linear: Wan's."""
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim))


def fp32(tensor: Tensor) -> AbstractContextManager[None]:
    """A region in which autocast does not lower the precision; inputs must be cast to float32 by the caller."""
    return torch.autocast(tensor.device.type, enabled=False)


@torch.no_grad()
def init_weights(module: nn.Module, generator: torch.Generator) -> None:
    """Start every layer of `module`: weights normal with std 1/sqrt(fan-in), biases 0, norm gains 1.

    One rule for all widths (at 1536 it gives the usual 0.02). What must start elsewhere (zero-initialised outputs,
    copies of the base, tokens) is set afterwards by its owner. Only `generator` is used, never torch's global one.
    """
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)):
            weight = layer.weight
            # a transposed convolution of stride = kernel reads one input pixel per output pixel
            fan_in = weight.shape[0] if isinstance(layer, nn.ConvTranspose2d) else weight[0].numel()
            weight.normal_(generator=generator).div_(math.sqrt(fan_in))
            if layer.bias is not None:
                layer.bias.zero_()
        elif isinstance(layer, (nn.LayerNorm, nn.RMSNorm)) and layer.weight is not None:
            layer.weight.fill_(1.0)
            if isinstance(layer, nn.LayerNorm) and layer.bias is not None:
                layer.bias.zero_()


@torch.no_grad()
def zero_init(layer: nn.Linear) -> None:
    """Make a linear layer give exactly zero, so that adding its output changes nothing before the first step."""
    layer.weight.zero_()
    layer.bias.zero_()
