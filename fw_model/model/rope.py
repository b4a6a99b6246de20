"""Rotary position embeddings: Wan's 3-D frequencies for patch tokens, the identity rotation for special tokens.

A rotation table is a pair (cos, sin), each [1, N, 1, head_dim] float32: entry 2i and 2i+1 belong to the pair of channels
(2i, 2i+1), as diffusers' Wan blocks expect. It broadcasts over batch and heads of x [B, N, heads, head_dim].
"""

from __future__ import annotations

import torch
from torch import Tensor

THETA = 10000.0

Rotary = tuple[Tensor, Tensor]


def rope_1d(width: int, length: int, device: torch.device | None = None) -> Rotary:
    """Table for positions 0..length-1 on one axis; `width` (even) is the number of channels it rotates.

    Angles are computed in float64 (position * theta^(-2i/width)) and rounded once, as in the original Wan.
    """
    frequencies = THETA ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies).repeat_interleave(2, dim=1)
    shape = (1, length, 1, width)
    return angles.cos().float().view(shape).to(device), angles.sin().float().view(shape).to(device)


def rope_3d(head_dim: int, grid: tuple[int, int, int], device: torch.device | None = None) -> Rotary:
    """Table for a grid (F, h, w) flattened frame by frame, row by row.

    Height and width each rotate 2 * (head_dim // 6) channels, time the rest (Wan2.1's split).
    """
    frames, height, width = grid
    across = 2 * (head_dim // 6)
    axes = (
        rope_1d(head_dim - 2 * across, frames, device),
        rope_1d(across, height, device),
        rope_1d(across, width, device),
    )
    views = ((frames, 1, 1, -1), (1, height, 1, -1), (1, 1, width, -1))

    def assemble(part: int) -> Tensor:
        expanded = [axis[part].view(view).expand(*grid, -1) for axis, view in zip(axes, views, strict=True)]
        return torch.cat(expanded, dim=-1).reshape(1, frames * height * width, 1, head_dim)

    return assemble(0), assemble(1)


def prepend_identity(rotary: Rotary, frames: int, count: int) -> Rotary:
    """Put `count` special tokens before each frame's patch tokens: [1, F*n, 1, D] -> [1, F*(count+n), 1, D].

    Their rotation is the identity (cos 1, sin 0). A zero "rotation" would erase their queries and keys.
    """
    cos, sin = (table.reshape(frames, -1, 1, table.shape[-1]) for table in rotary)
    ones = cos.new_ones(frames, count, 1, cos.shape[-1])
    cos, sin = torch.cat([ones, cos], dim=1), torch.cat([torch.zeros_like(ones), sin], dim=1)
    return cos.reshape(1, -1, 1, cos.shape[-1]), sin.reshape(1, -1, 1, sin.shape[-1])


def split_frames(rotary: Rotary, frames: int) -> Rotary:
    """[1, F*n, 1, D] -> [F, n, 1, D]: the same table, one row of the batch per frame."""
    cos, sin = (table.reshape(frames, -1, 1, table.shape[-1]) for table in rotary)
    return cos, sin


def apply_rope(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate x [B, N, heads, head_dim] in float32 and give it back in its own dtype.

    The table's first dimension is 1, or divides B: row b uses table row b % len(table).
    """
    cos, sin = rotary
    if cos.shape[0] not in (1, x.shape[0]):
        repeats = x.shape[0] // cos.shape[0]
        cos, sin = cos.repeat(repeats, 1, 1, 1), sin.repeat(repeats, 1, 1, 1)
    pairs = x.float().unflatten(-1, (-1, 2))
    turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    return (x.float() * cos + turned * sin).to(x.dtype)
