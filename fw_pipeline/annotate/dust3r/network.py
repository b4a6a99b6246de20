"""The DUSt3R network (Wang et al. 2024): a shared ViT encoder, two decoders that read each other, two heads.

Attribute names are the published checkpoint's keys. It is only ever run, never trained: parameters are frozen.

Shapes: B images or pairs, H x W pixels, h x w = H/16 x W/16 tokens, D channels (encoder or decoder width), N = h * w.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from fw_model.model.seeded_weights import fill_made_weights
from fw_pipeline.annotate.dust3r.config import PATCH, DUSt3RConfig
from fw_pipeline.annotate.dust3r.heads import DPTHead, LinearHead
from fw_pipeline.annotate.dust3r.weights import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    DUSt3RWeightsError,
    complete_keys,
    read_checkpoint,
    without_aliases,
)

_EPS = 1e-6
Rotary = tuple[Tensor, Tensor]  # cos and sin, each [N, channels of a head]


@dataclass(frozen=True)
class Pointmap:
    """What the network says about one view of a pair, float32."""

    points: Tensor  # [B, H, W, 3] in the FIRST view's camera (x right, y down, z forward), in a scale unknown per pair
    confidence: Tensor  # [B, H, W], 1 (none) and up


class DUSt3R(nn.Module):
    """Two images -> two pointmaps. `dtype` bfloat16 runs encoder and decoders under autocast; heads are always float32."""

    def __init__(self, config: DUSt3RConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype is {dtype}; DUSt3R runs in torch.float32 or torch.bfloat16")
        self.config = config
        self.dtype = dtype
        enc, dec = config.enc_embed_dim, config.dec_embed_dim
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dec))  # from pre-training; published and never read
        self.patch_embed = _PatchEmbed(enc)
        self.enc_blocks = nn.ModuleList(
            _EncoderBlock(enc, config.enc_num_heads, config.mlp_ratio) for _ in range(config.enc_depth)
        )
        self.enc_norm = nn.LayerNorm(enc, eps=_EPS)
        self.decoder_embed = nn.Linear(enc, dec)
        self.dec_blocks, self.dec_blocks2 = (
            nn.ModuleList(_DecoderBlock(dec, config.dec_num_heads, config.mlp_ratio) for _ in range(config.dec_depth))
            for _ in range(2)
        )
        self.dec_norm = nn.LayerNorm(dec, eps=_EPS)
        head = DPTHead if config.head_type == "dpt" else LinearHead
        self.downstream_head1, self.downstream_head2 = head(config), head(config)
        self.requires_grad_(False)
        self.eval()

    # ---- weights

    @classmethod
    def from_config(cls, config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> DUSt3R:
        """The architecture a published config.json describes, with torch's random weights.

        Raises ValueError naming the key that is unknown or has a value this implementation does not have.
        """
        return cls(DUSt3RConfig.from_dict(config), dtype)

    @classmethod
    def seeded(cls, config: Mapping[str, Any], seed: int, dtype: torch.dtype = torch.float32) -> DUSt3R:
        """Weights filled from a seed and the published keys: reproducible anywhere, nothing downloaded."""
        with torch.device("meta"):
            model = cls.from_config(config, dtype)
        state = {key: torch.empty(value.shape) for key, value in model.state_dict().items()}
        fill_made_weights(state, seed)
        model.load_state_dict(state, assign=True)
        return model

    @classmethod
    def from_pretrained(
        cls, repo_or_dir: str | Path, revision: str = "main", device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> DUSt3R:
        """Published weights, ready to run.

        Args:
            repo_or_dir: a folder with config.json and model.safetensors, an original .pth file or a folder with one, or a
                repository of the Hugging Face hub, downloaded on first use (HF_HUB_OFFLINE=1: read from its cache only).
            revision: branch, tag or commit of the repository.
            device: torch device it runs on.
            dtype: torch.bfloat16 for autocast in encoder and decoders.

        Raises:
            DUSt3RWeightsError: missing (the message says what to download, its size and licence), damaged, or of another
                model. No pickled code is run and no text is evaluated.
        """
        checkpoint = read_checkpoint(repo_or_dir, revision)
        try:
            with torch.device("meta"):  # no memory and no random numbers for tensors that are replaced at once
                model = cls.from_config(checkpoint.config, dtype)
            model.load_state_dict({key: value.float() for key, value in checkpoint.state.items()}, assign=True)
        except (ValueError, RuntimeError) as error:
            raise DUSt3RWeightsError(f"{checkpoint.where}: {error}") from error
        return model.to(device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors in the published layout (a tensor with two names is stored once)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_FILE).write_text(json.dumps(self.config.to_dict(), indent=2) + "\n", encoding="utf-8")
        state = {key: value.contiguous() for key, value in without_aliases(self.state_dict()).items()}
        save_file(state, folder / WEIGHTS_FILE)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's, with published keys: either or both names of a tied tensor, `dec_blocks2` copied when absent.

        Where both names are there with different values, `scratch.layer_rn.{i}` wins, as in the original. Raises RuntimeError
        naming the keys that are missing, unknown or of another shape.
        """
        state = complete_keys(state_dict)
        if strict:
            _check_keys(state, self.state_dict())
        return super().load_state_dict(state, strict=strict, assign=assign)

    # ---- running

    def encode(self, images: Tensor) -> Tensor:
        """Images of one size -> tokens, to be kept and given to `decode` once per pair the image is in.

        Args:
            images: [B, 3, H, W] RGB in -1..1; H and W multiples of 16, either orientation.

        Returns:
            [B, h, w, D] float32.

        Raises:
            ValueError: another shape or integers; a size that is no multiple of 16 (the nearest one is named).
        """
        _check_images(images)
        with self._autocast(images.device):
            tokens = self.patch_embed(images)
            grid = tokens.shape[1:3]
            rotary = self._rotary(grid, "enc", images.device)
            # The sum over blocks is kept in float32 whatever the blocks compute in.
            x = tokens.flatten(1, 2).float()
            for block in self.enc_blocks:
                x = block(x, rotary)
            return self.enc_norm(x).float().unflatten(1, grid)

    def decode(self, tokens1: Tensor, tokens2: Tensor) -> tuple[Pointmap, Pointmap]:
        """Tokens of both images of B pairs -> their pointmaps, both in the first image's camera.

        Args:
            tokens1, tokens2: [B, h, w, D] from `encode`; the two images may differ in size.

        Returns:
            Pointmap of image 1 [B, 16 h, 16 w] and of image 2.

        Raises:
            ValueError: shapes that do not fit the network or each other.
        """
        width = self.config.enc_embed_dim
        for tokens in (tokens1, tokens2):
            if tokens.ndim != 4 or tokens.shape[-1] != width or len(tokens) != len(tokens1):
                raise ValueError(
                    f"tokens are {list(tokens1.shape)} and {list(tokens2.shape)}; expected [B, h, w, {width}] twice, same B"
                )
        wanted = self.downstream_head1.hooks
        with self._autocast(tokens1.device):
            states = [self.decoder_embed(tokens.flatten(1, 2)).float() for tokens in (tokens1, tokens2)]
            rotary = [self._rotary(tokens.shape[1:3], "dec", tokens.device) for tokens in (tokens1, tokens2)]
            kept: tuple[list[Tensor], list[Tensor]] = ([tokens1], [tokens2]) if 0 in wanted else ([], [])
            for layer, (block1, block2) in enumerate(zip(self.dec_blocks, self.dec_blocks2, strict=True), start=1):
                states = [  # both read the other's state from before this layer
                    block1(states[0], states[1], rotary[0], rotary[1]),
                    block2(states[1], states[0], rotary[1], rotary[0]),
                ]
                for features, state, tokens in zip(kept, states, (tokens1, tokens2), strict=True):
                    if layer in wanted:
                        state = self.dec_norm(state) if layer == self.config.dec_depth else state
                        features += [state.unflatten(1, tokens.shape[1:3])] * wanted.count(layer)
        return self._pointmap(self.downstream_head1, kept[0]), self._pointmap(self.downstream_head2, kept[1])

    def forward(self, image1: Tensor, image2: Tensor) -> tuple[Pointmap, Pointmap]:
        """Images [B, 3, H, W] in -1..1 of B pairs -> pointmaps of image 1 and of image 2, both in camera 1.

        A photograph that is in several pairs is cheaper through `encode` and `decode`. Raises ValueError as they do.
        """
        return self.decode(self.encode(image1), self.encode(image2))

    def _autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(device.type, self.dtype)

    def _rotary(self, grid: Sequence[int], side: str, device: torch.device) -> Rotary:
        channels = getattr(self.config, f"{side}_embed_dim") // getattr(self.config, f"{side}_num_heads")
        return rope_2d(grid[0], grid[1], channels, self.config.rope_base, device)

    def _pointmap(self, head: nn.Module, features: list[Tensor]) -> Pointmap:
        with torch.autocast(features[0].device.type, enabled=False):  # expm1 and exp below magnify every rounding
            raw = head([feature.float() for feature in features]).permute(0, 2, 3, 1)
        xyz, log_confidence = raw[..., :3], raw[..., 3]
        distance = xyz.norm(dim=-1, keepdim=True)
        points = xyz / distance.clamp_min(1e-8) * distance.expm1()
        confidence = self.config.confidence_min + log_confidence.exp()
        return Pointmap(points, confidence.clamp_max(self.config.confidence_max))


class _PatchEmbed(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, PATCH, stride=PATCH)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, h, w, D]."""
        return self.proj(images).permute(0, 2, 3, 1)


class _EncoderBlock(nn.Module):
    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=_EPS)
        self.attn = _SelfAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=_EPS)
        self.mlp = _MLP(dim, mlp_ratio)

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        """x [B, N, D] -> [B, N, D]."""
        x = x + self.attn(self.norm1(x), rotary)
        return x + self.mlp(self.norm2(x))


class _DecoderBlock(nn.Module):
    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=_EPS)
        self.attn = _SelfAttention(dim, heads)
        self.cross_attn = _CrossAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=_EPS)
        self.norm3 = nn.LayerNorm(dim, eps=_EPS)
        self.mlp = _MLP(dim, mlp_ratio)
        self.norm_y = nn.LayerNorm(dim, eps=_EPS)

    def forward(self, x: Tensor, y: Tensor, rotary_x: Rotary, rotary_y: Rotary) -> Tensor:
        """x [B, N, D] of this view, y [B, M, D] of the other -> [B, N, D]."""
        x = x + self.attn(self.norm1(x), rotary_x)
        x = x + self.cross_attn(self.norm2(x), self.norm_y(y), rotary_x, rotary_y)
        return x + self.mlp(self.norm3(x))


class _SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        q, k, v = (_split(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        return self.proj(_attend(rotate(q, rotary), rotate(k, rotary), v))


class _CrossAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.projq = nn.Linear(dim, dim)
        self.projk = nn.Linear(dim, dim)
        self.projv = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, y: Tensor, rotary_x: Rotary, rotary_y: Rotary) -> Tensor:
        q, k, v = (_split(part, self.heads) for part in (self.projq(x), self.projk(y), self.projv(y)))
        return self.proj(_attend(rotate(q, rotary_x), rotate(k, rotary_y), v))


class _MLP(nn.Module):
    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, int(dim * ratio))
        self.fc2 = nn.Linear(int(dim * ratio), dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def _split(x: Tensor, heads: int) -> Tensor:
    """[B, N, D] -> [B, heads, N, D / heads]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Three [B, heads, N, d] -> [B, N, heads * d]."""
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def rope_2d(height: int, width: int, channels: int, base: float, device: torch.device | None = None) -> Rotary:
    """Rotation table of a token grid, row by row: the first half of a head's channels turns with y, the second with x.

    With Q = channels / 4, channels i and i + Q of each half are a pair that turns by position * base^(-i / Q), positions
    counted from 0. Returns (cos, sin), each [height * width, channels] float32.
    """
    quarter = channels // 4
    frequencies = base ** (-torch.arange(quarter, dtype=torch.float32, device=device) / quarter)
    y = torch.arange(height, dtype=torch.float32, device=device)[:, None, None] * frequencies
    x = torch.arange(width, dtype=torch.float32, device=device)[None, :, None] * frequencies
    angles = torch.cat([part.expand(height, width, quarter) for part in (y, y, x, x)], dim=-1).flatten(0, 1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn queries or keys [B, heads, N, channels] by a table of `rope_2d`, in float32; their own dtype comes back."""
    cos, sin = rotary
    wide = x.float()
    y0, y1, x0, x1 = wide.chunk(4, dim=-1)
    return (wide * cos + torch.cat([-y1, y0, -x1, x0], dim=-1) * sin).to(x.dtype)


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"images are {images.dtype} {list(images.shape)}; expected floats in -1..1, [B, 3, H, W]")
    height, width = images.shape[2:]
    nearest = [max(round(side / PATCH), 1) * PATCH for side in (height, width)]
    if [height, width] != nearest:
        raise ValueError(
            f"images are {height}x{width} (height x width); DUSt3R takes multiples of {PATCH}: the nearest is "
            f"{nearest[0]}x{nearest[1]}"
        )


def _check_keys(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise RuntimeError with the first few offending keys: torch's own message lists all thousand."""
    wrong = [
        f"{key} {list(found[key].shape)} instead of {list(expected[key].shape)}"
        for key in expected.keys() & found.keys()
        if found[key].shape != expected[key].shape
    ]
    groups = {
        "missing": [key for key in expected if key not in found],
        "not part of this DUSt3R": [key for key in found if key not in expected],
        "wrong shape": sorted(wrong),
    }
    lines = [
        f"{title} ({len(keys)}): {', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''}"
        for title, keys in groups.items()
        if keys
    ]
    if lines:
        raise RuntimeError("weights do not fit the configuration; " + "; ".join(lines))
