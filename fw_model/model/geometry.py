"""The trainable geometry branch: pose encoder, latent bridge, special tokens and GeoDiT.

Shape suffixes: B clips, F latent frames, h x w patch grid, N = F*h*w patch tokens, S special tokens per frame,
G = F*(S + h*w) geometry tokens, D = dim. Geometry tokens lie frame by frame: S special tokens, then h*w patch tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fw_model.config import GeometryConfig, ModelConfig, WanConfig
from fw_model.model.attention import Attention, Part, TransformerLayer, feed_forward, fp32, zero_init
from fw_model.model.backbone import WanBackbone
from fw_model.model.rope import Rotary, prepend_identity, rope_3d, split_frames

PATCH_PIXELS = 16  # one patch token covers 16 x 16 pixels of a latent frame


class PoseEncoder(nn.Module):
    """Folded Plücker rays -> one pose vector per patch token, through a low-rank projection (no activation)."""

    def __init__(self, wan: WanConfig, rank: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(wan.control_channels, rank, kernel_size=PATCH_PIXELS, stride=PATCH_PIXELS)
        self.up = nn.Linear(rank, wan.dim)

    def forward(self, camera: Tensor) -> Tensor:
        """camera [B, 24, F, H, W] control latents -> pose tokens [B, N, D]."""
        x = self.down(camera.to(self.down.weight.dtype).transpose(1, 2).flatten(0, 1))
        return self.up(x.unflatten(0, (camera.shape[0], -1)).permute(0, 1, 3, 4, 2).flatten(1, 3))


class LatentBridge(nn.Module):
    """Turns the base's hidden states after its last preconditioning block into geometry features."""

    def __init__(self, dim: int, config: GeometryConfig) -> None:
        super().__init__()
        self.head_dim = dim // config.bridge_heads
        self.layers = nn.ModuleList([TransformerLayer(dim, config.bridge_heads) for _ in range(config.bridge_layers)])

    def forward(self, hidden_BND: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """hidden_BND of a patch grid (F, h, w) -> [B, N, D], in the bridge's dtype."""
        x_BND = hidden_BND.to(next(self.parameters()).dtype)
        rotary = rope_3d(self.head_dim, grid, x_BND.device)
        for layer in self.layers:
            x_BND = layer(x_BND, rotary)
        return x_BND


class SpecialTokens(nn.Module):
    """One camera token and a few register tokens per latent frame.

    Two learned variants, as in VGGT: the first frame defines the world and gets its own, all later frames share the other.
    """

    def __init__(self, dim: int, registers: int) -> None:
        super().__init__()
        self.camera = nn.Parameter(torch.zeros(2, 1, dim))
        self.registers = nn.Parameter(torch.zeros(2, registers, dim))

    @property
    def count(self) -> int:
        return 1 + self.registers.shape[1]

    def forward(self, patches_BND: Tensor, frames: int) -> Tensor:
        """patches_BND -> geometry tokens [B, G, D]."""
        variants = torch.cat([self.camera, self.registers], dim=1)
        tokens = torch.cat([variants[:1], variants[1:].expand(frames - 1, -1, -1)]).to(patches_BND.dtype)
        tokens = tokens.expand(patches_BND.shape[0], -1, -1, -1)
        return torch.cat([tokens, patches_BND.unflatten(1, (frames, -1))], dim=2).flatten(1, 2)


class GeoDiTBlock(nn.Module):
    """Frame attention, global attention and feed-forward, each under AdaLN from the diffusion timestep.

    The nine modulation vectors are shift, scale and gate of the three, in that order: the block's own plus a projection
    of the time embedding shared by all blocks.
    """

    def __init__(self, wan: WanConfig) -> None:
        super().__init__()
        self.eps = wan.eps
        self.frame_attention = Attention(wan.dim, wan.num_heads, qk_norm=True, eps=wan.eps)
        self.global_attention = Attention(wan.dim, wan.num_heads, qk_norm=True, eps=wan.eps)
        self.ffn = feed_forward(wan.dim, wan.ffn_dim)
        self.modulation = nn.Parameter(torch.zeros(1, 9, wan.dim))
        self.pose_adapter = nn.Linear(wan.dim, wan.dim)

    def forward(
        self,
        tokens_BGD: Tensor,
        time: Tensor,
        rotary: Rotary,
        frames: int,
        pose_BND: Tensor | None = None,
        visible: Tensor | None = None,
        part: Part = None,
    ) -> Tensor:
        """Run the block, or one half of it: pose and both attentions, or the feed-forward.

        Args:
            tokens_BGD: geometry tokens.
            time: [B, 9, D] float32, the shared projection of the time embedding.
            rotary: of all G tokens.
            frames: F.
            pose_BND: pose tokens, added to the patch tokens through the adapter; None: no camera is known.
            visible: [B] bool, False hides a clip's pose tokens from this block; None: all are seen.
            part: which half; None: both.

        Returns:
            tokens [B, G, D].
        """
        vectors = (self.modulation.float() + time).chunk(9, dim=1)
        if part != "feed_forward":
            if pose_BND is not None:
                tokens_BGD = tokens_BGD + self._pose_shift(tokens_BGD, pose_BND, visible, frames)
            tokens_BGD = self._attend(tokens_BGD, vectors, rotary, frames)
        if part != "attention":
            x_BGD = self.ffn(self._modulated(tokens_BGD, vectors[6], vectors[7]))
            tokens_BGD = self._gated(tokens_BGD, x_BGD, vectors[8])
        return tokens_BGD

    def _attend(self, tokens_BGD: Tensor, vectors: Sequence[Tensor], rotary: Rotary, frames: int) -> Tensor:
        by_frame = self._modulated(tokens_BGD, vectors[0], vectors[1]).unflatten(1, (frames, -1)).flatten(0, 1)  # [B*F, G/F, D]
        by_frame = self.frame_attention(by_frame, split_frames(rotary, frames))
        x_BGD = by_frame.unflatten(0, (-1, frames)).flatten(1, 2)
        tokens_BGD = self._gated(tokens_BGD, x_BGD, vectors[2])
        x_BGD = self.global_attention(self._modulated(tokens_BGD, vectors[3], vectors[4]), rotary)
        return self._gated(tokens_BGD, x_BGD, vectors[5])

    def _pose_shift(self, tokens_BGD: Tensor, pose_BND: Tensor, visible: Tensor | None, frames: int) -> Tensor:
        shift_BND = self.pose_adapter(F.silu(pose_BND)).to(tokens_BGD.dtype)
        if visible is not None:  # masks the adapter's bias too: a hidden pose must leave no trace
            shift_BND = shift_BND * visible.to(shift_BND.dtype).view(-1, 1, 1)
        special = (tokens_BGD.shape[1] - pose_BND.shape[1]) // frames
        return F.pad(shift_BND.unflatten(1, (frames, -1)), (0, 0, special, 0)).flatten(1, 2)

    def _modulated(self, tokens_BGD: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        x = F.layer_norm(tokens_BGD.float(), tokens_BGD.shape[-1:], eps=self.eps)
        return (x * (1 + scale) + shift).to(tokens_BGD.dtype)

    @staticmethod
    def _gated(tokens_BGD: Tensor, x_BGD: Tensor, gate: Tensor) -> Tensor:
        return (tokens_BGD.float() + x_BGD.float() * gate).to(tokens_BGD.dtype)


class GeoDiT(nn.Module):
    """The geometry blocks, one beside each base block after the bridge, and the time projection they share."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList([GeoDiTBlock(config.wan) for _ in range(config.num_geodit)])
        self.time_projection = nn.Linear(config.wan.dim, 9 * config.wan.dim)

    def time_vectors(self, time: Tensor) -> Tensor:
        """Base's time embedding [B, D] -> [B, 9, D] float32, what each block adds to its own modulation."""
        layer = self.time_projection
        with fp32(time):
            return F.linear(F.silu(time.float()), layer.weight.float(), layer.bias.float()).unflatten(1, (9, -1))

    def rotary(self, grid: tuple[int, int, int], special: int, device: torch.device) -> Rotary:
        """Wan's 3-D positions for patch tokens, the identity rotation for `special` tokens before each frame."""
        return prepend_identity(rope_3d(self.config.wan.head_dim, grid, device), grid[0], special)

    @torch.no_grad()
    def init_from_base(self, base: WanBackbone) -> None:
        """Start as the base's own blocks: block i copies base block pcb_blocks + i.

        Global attention, feed-forward, their six modulation vectors and the matching rows of the time projection are
        copies. Frame attention copies the same self-attention with its gate (own vector and projected rows) at zero, and
        pose adapters give zero: at the start a geometry block is the base's block without text.
        """
        for i, block in enumerate(self.blocks):
            source = base.transformer.blocks[self.config.geometry.pcb_blocks + i]
            _copy_wan_block(cast(GeoDiTBlock, block), source)
        projection = base.transformer.condition_embedder.time_proj
        self.time_projection.weight.copy_(_nine_vectors(projection.weight.unflatten(0, (6, -1))).flatten(0, 1))
        self.time_projection.bias.copy_(_nine_vectors(projection.bias.unflatten(0, (6, -1))).flatten(0, 1))


def _copy_wan_block(block: GeoDiTBlock, source: Any) -> None:
    for attention in (block.frame_attention, block.global_attention):
        pairs: tuple[tuple[nn.Module, Any], ...] = (
            (attention.q, source.attn1.to_q),
            (attention.k, source.attn1.to_k),
            (attention.v, source.attn1.to_v),
            (attention.o, source.attn1.to_out[0]),
            (attention.norm_q, source.attn1.norm_q),
            (attention.norm_k, source.attn1.norm_k),
        )
        for own, theirs in pairs:
            _copy_layer(own, theirs)
    _copy_layer(block.ffn[0], source.ffn.net[0].proj)
    _copy_layer(block.ffn[2], source.ffn.net[2])
    block.modulation.copy_(_nine_vectors(source.scale_shift_table[0])[None])
    zero_init(block.pose_adapter)


def _copy_layer(own: nn.Module, source: nn.Module) -> None:
    for name, parameter in own.named_parameters():
        parameter.copy_(source.get_parameter(name))


def _nine_vectors(six: Tensor) -> Tensor:
    """[6, ...] shift, scale, gate of attention and feed-forward -> [9, ...] with frame attention (gate zero) first."""
    return torch.cat([six[:2], torch.zeros_like(six[:1]), six])
