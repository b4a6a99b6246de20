"""The two heads that turn tokens into four numbers per pixel: three for the point, one for its confidence.

Attribute names are the published checkpoint's. Shapes: B pairs, h x w tokens, H = 16 h and W = 16 w pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fw_pipeline.annotate.dust3r.config import PATCH, DUSt3RConfig

OUTPUTS = 4
_WIDTHS = (96, 192, 384, 768)  # channels read from each of the four depths
_FUSED = 256
_LAST = 128


class LinearHead(nn.Module):
    """Every token's 16 x 16 pixels straight from its last state."""

    def __init__(self, config: DUSt3RConfig) -> None:
        super().__init__()
        self.hooks: tuple[int, ...] = (config.dec_depth,)  # decoder layers it reads; 0 is the encoder's output
        self.proj = nn.Linear(config.dec_embed_dim, OUTPUTS * PATCH**2)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """One feature [B, h, w, dec_embed_dim] -> [B, 4, H, W]."""
        return F.pixel_shuffle(self.proj(features[-1]).permute(0, 3, 1, 2), PATCH)


class DPTHead(nn.Module):
    """Dense prediction (Ranftl et al. 2021): four depths at four resolutions, fused from the deepest to the shallowest."""

    def __init__(self, config: DUSt3RConfig) -> None:
        super().__init__()
        depth = config.dec_depth
        self.hooks: tuple[int, ...] = (0, depth // 2, depth * 3 // 4, depth)
        self.dpt = _DPT((config.enc_embed_dim, *[config.dec_embed_dim] * 3))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Four features [B, h, w, C], encoder output first -> [B, 4, H, W]."""
        return self.dpt(features)


class _DPT(nn.Module):
    def __init__(self, inputs: tuple[int, ...]) -> None:
        super().__init__()
        resize: tuple[list[nn.Module], ...] = (
            [nn.ConvTranspose2d(_WIDTHS[0], _WIDTHS[0], 4, stride=4)],
            [nn.ConvTranspose2d(_WIDTHS[1], _WIDTHS[1], 2, stride=2)],
            [],
            [nn.Conv2d(_WIDTHS[3], _WIDTHS[3], 3, stride=2, padding=1)],
        )
        self.act_postprocess = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, width, 1), *layers)
            for channels, width, layers in zip(inputs, _WIDTHS, resize, strict=True)
        )
        self.scratch = _Scratch()
        self.head = nn.Sequential(
            nn.Conv2d(_FUSED, _LAST, 3, padding=1),
            _Double(),
            nn.Conv2d(_LAST, _LAST, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(_LAST, OUTPUTS, 1),
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Four [B, h, w, C] -> [B, 4, 16 h, 16 w]."""
        maps = [
            fuse(process(feature.permute(0, 3, 1, 2)))
            for fuse, process, feature in zip(self.scratch.layer_rn, self.act_postprocess, features, strict=True)
        ]
        scratch = self.scratch
        path = scratch.refinenet4(maps[3])
        # An odd token grid comes back from half its size one row or column too large; the surplus is at the far end.
        path = path[..., : maps[2].shape[-2], : maps[2].shape[-1]]
        path = scratch.refinenet3(path, maps[2])
        path = scratch.refinenet2(path, maps[1])
        return self.head(scratch.refinenet1(path, maps[0]))


class _Scratch(nn.Module):
    """The fusion part. Its input convolutions are published under two names each, which are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1_rn, self.layer2_rn, self.layer3_rn, self.layer4_rn = (
            nn.Conv2d(width, _FUSED, 3, padding=1, bias=False) for width in _WIDTHS
        )
        self.layer_rn = nn.ModuleList([self.layer1_rn, self.layer2_rn, self.layer3_rn, self.layer4_rn])
        self.refinenet1, self.refinenet2, self.refinenet3, self.refinenet4 = (_Refine() for _ in _WIDTHS)


class _Refine(nn.Module):
    """One step of the fusion: add the shallower map to what came from below, refine, double the resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.out_conv = nn.Conv2d(_FUSED, _FUSED, 1)
        self.resConfUnit1 = _ResidualUnit()  # the deepest step has one in the checkpoint and nothing to use it on
        self.resConfUnit2 = _ResidualUnit()

    def forward(self, path: Tensor, shallower: Tensor | None = None) -> Tensor:
        """[B, C, y, x] (twice) -> [B, C, 2y, 2x]."""
        if shallower is not None:
            path = path + self.resConfUnit1(shallower)
        return self.out_conv(_double(self.resConfUnit2(path)))


class _ResidualUnit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(_FUSED, _FUSED, 3, padding=1)
        self.conv2 = nn.Conv2d(_FUSED, _FUSED, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class _Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _double(x)


def _double(x: Tensor) -> Tensor:
    """[B, C, y, x] -> [B, C, 2y, 2x], corner pixels on corner pixels."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
