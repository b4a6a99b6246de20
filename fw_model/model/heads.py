"""Dense heads: a 3-D DPT that turns GeoDiT features into one depth or point map per video frame.

Shape suffixes: B clips, F latent frames, T = 4(F-1)+1 video frames, h x w patch grid, H x W = 16h x 16w pixels, D = dim,
C channels.
Causal in time: video frame t of latent frame n (t = 4(n-1)+1 .. 4n; latent frame 0 gives frame 0 alone) depends on
latent frames 0..n only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fw_model.config import GeometryConfig
from fw_model.model.attention import fp32

# Video frames decoded at once. At 336 x 592 a 128-channel activation of all 81 frames is 4.1 GB in bf16; of 8, 0.4 GB.
FRAMES_PER_CHUNK = 8
# Features come shallow to deep; the deepest is the finest.
SCALES = (0.5, 1, 2, 4)
_POSITION_WEIGHT = 0.1  # of the coordinate embedding beside the features, as in VGGT's DPT head

OutputKind = Literal["depth", "points"]


def frames_of(latent_frames: int) -> int:
    """Video frames T = 4(F-1)+1 of F latent frames."""
    return 4 * (latent_frames - 1) + 1


class CausalDoubling(nn.Module):
    """[B, C, F, h, w] -> [B, C, 2F-1, h, w]: every frame but the first is doubled, then convolved causally.

    Before the first frame stands the first frame again, so that it is not darkened by zeros.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, channels, kernel_size=3, padding=(0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x[:, :, :1], x[:, :, 1:].repeat_interleave(2, dim=2)], dim=2)
        return x + self.conv(F.pad(F.silu(x), (0, 0, 0, 0, 2, 0), mode="replicate"))


class ResidualUnit(nn.Module):
    """Pre-activation residual pair of 3 x 3 convolutions (RefineNet).

    SiLU instead of RefineNet's ReLU, as everywhere in this head: it has no normalisation, and with the large gradients
    of exp-activated outputs ReLU channels die within a hundred steps of a small model.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class Fusion(nn.Module):
    """RefineNet fusion: adds a finer stream to what came from the coarser ones and moves to the next size."""

    def __init__(self, channels: int, first: bool) -> None:
        super().__init__()
        self.stream = None if first else ResidualUnit(channels)
        self.merged = ResidualUnit(channels)
        self.project = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor | None, stream: Tensor, size: tuple[int, int]) -> Tensor:
        """x: fused so far, at the stream's size (None for the coarsest); `size` (rows, columns) of the result."""
        if self.stream is not None and x is not None:
            stream = x + self.stream(stream)
        return self.project(_resize(self.merged(stream), size))


class DPTHead(nn.Module):
    """Four GeoDiT layers -> a map and its confidence for every video frame.

    Per stream: LayerNorm, 1 x 1 projection, temporal x4 by two causal doublings at patch resolution (where it is cheap),
    then, a few frames at a time: resize (x1/2, x1, x2, x4; the deepest layer is the finest), fusion from coarse to fine,
    output convolutions at full H x W. Bilinear resizing aligns pixel centres. A fixed embedding of the image coordinates
    is added to streams and output features, since points depend on where a pixel is and RoPE tells only differences.

    `kind` "depth": exp(x), always positive. "points": sign(x)(e^|x| - 1), three channels. Confidence: 1 + exp(x).
    """

    def __init__(self, dim: int, config: GeometryConfig, kind: OutputKind) -> None:
        super().__init__()
        self.kind = kind
        self.gradient_checkpointing = False
        widths, features = config.head_channels, config.head_features
        self.norm = nn.LayerNorm(dim)
        self.project = nn.ModuleList([nn.Linear(dim, width) for width in widths])
        self.temporal = nn.ModuleList([nn.Sequential(CausalDoubling(w), CausalDoubling(w)) for w in widths])
        self.resize = nn.ModuleList([_resize_layer(width, scale) for width, scale in zip(widths, SCALES, strict=True)])
        self.streams = nn.ModuleList([nn.Conv2d(width, features, 3, padding=1, bias=False) for width in widths])
        self.fusions = nn.ModuleList([Fusion(features, first=i == 0) for i in range(len(widths))])
        self.output1 = nn.Conv2d(features, features // 2, 3, padding=1)
        self.output2 = nn.Conv2d(features // 2, max(features // 8, 8), 3, padding=1)
        self.output3 = nn.Conv2d(self.output2.out_channels, 4 if kind == "points" else 2, 1)

    @torch.no_grad()
    def reset_output(self) -> None:
        """Start near depth 1 (the clip's unit: the mean distance), points 0 and confidence 2, whatever the features are."""
        self.output3.weight.mul_(0.1)
        if self.output3.bias is not None:
            self.output3.bias.zero_()

    def forward(self, features: Sequence[Tensor], grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """Decode.

        Args:
            features: patch tokens [B, F*h*w, D] of the four layers, shallow to deep.
            grid: (F, h, w).

        Returns:
            (map, confidence), float32: depth [B, T, H, W] or points [B, T, H, W, 3]; confidence [B, T, H, W].
        """
        streams = [self._run(self._stream, i, x, grid) for i, x in enumerate(features)]
        batch, frames = streams[0].shape[:2]
        streams = [stream.flatten(0, 1) for stream in streams]
        outputs = [
            self._run(self._decode, *(stream[start : start + FRAMES_PER_CHUNK] for stream in streams))
            for start in range(0, batch * frames, FRAMES_PER_CHUNK)
        ]
        raw_BTCHW = torch.cat(outputs).unflatten(0, (batch, frames))
        with fp32(raw_BTCHW):
            confidence = 1 + raw_BTCHW[:, :, -1].exp()
            if self.kind == "depth":
                return raw_BTCHW[:, :, 0].exp(), confidence
            points = raw_BTCHW[:, :, :3]
            return (points.sign() * torch.expm1(points.abs())).movedim(2, -1), confidence

    def _stream(self, i: int, tokens_BND: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """[B, N, D] -> [B, T, C, h, w]."""
        x_BCFhw = self.project[i](self.norm(tokens_BND)).unflatten(1, grid).movedim(-1, 1)
        return self.temporal[i](x_BCFhw).transpose(1, 2)

    def _decode(self, *streams: Tensor) -> Tensor:
        """Streams [n, C, h, w] of a few frames -> raw output [n, channels, H, W] float32."""
        rows, columns = streams[0].shape[-2:]
        maps = []
        for stream, resize, convolution in zip(streams, self.resize, self.streams, strict=True):
            # Channels last: the layout that kernels compute in. It saves 22 to 28 % of a head's step on 2 CPU cores.
            stream = stream.contiguous(memory_format=torch.channels_last)
            maps.append(convolution(_with_position(resize(stream))))
        sizes = [(m.shape[-2], m.shape[-1]) for m in maps[1:]] + [(8 * rows, 8 * columns)]
        x: Tensor | None = None
        for stream, fusion, size in zip(maps, self.fusions, sizes, strict=True):
            x = fusion(x, stream, size)
        x = _resize(self.output1(x), (16 * rows, 16 * columns))
        x = F.silu(self.output2(_with_position(x)))
        with fp32(x):
            layer = self.output3
            return F.conv2d(x.float(), layer.weight.float(), None if layer.bias is None else layer.bias.float())

    def _run(self, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
        return function(*inputs)


def _resize_layer(channels: int, scale: float) -> nn.Module:
    if scale < 1:
        return nn.Conv2d(channels, channels, 3, stride=round(1 / scale), padding=1)
    if scale == 1:
        return nn.Identity()
    return nn.ConvTranspose2d(channels, channels, kernel_size=int(scale), stride=int(scale))


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def _with_position(x: Tensor) -> Tensor:
    """Add the coordinate embedding of x's [n, C, rows, columns] own pixels."""
    return x + _POSITION_WEIGHT * coordinate_embedding(x.shape[1], x.shape[2], x.shape[3], x.device).to(x.dtype)


def coordinate_embedding(channels: int, rows: int, columns: int, device: torch.device | None = None) -> Tensor:
    """Sine and cosine of the image coordinates of pixel centres -> [channels, rows, columns] float32.

    Coordinates are divided by half the diagonal, so that portrait and landscape share one scale; a quarter of the
    channels (rounded up) goes to each of sin x, cos x, sin y, cos y, at frequencies from 1 to 100 radians per unit.
    """
    count = math.ceil(channels / 4)
    diagonal = math.hypot(rows, columns) / 2
    frequencies = torch.logspace(0, 2, count, device=device).view(-1, 1)

    def axis(length: int) -> Tensor:
        return frequencies * (torch.arange(length, device=device) + 0.5 - length / 2) / diagonal

    x, y = axis(columns)[:, None, :].expand(-1, rows, -1), axis(rows)[:, :, None].expand(-1, -1, columns)
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()])[:channels]
