"""The frozen video DiT: Wan2.1-Fun-Camera, as diffusers' Wan transformer plus the camera control adapter.

Run whole with `forward`, or in stages (`embed`, `block`, `head`) so that a geometry branch can run beside it.

Shape suffixes: B clips, F latent frames, h x w patch grid (16 x 16 pixels each), N = F*h*w tokens, D = dim. What passes from
module to module carries them (`hidden_BND`); a model's inputs are named plainly, with their shapes in the docstring.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor, nn

from fw_model.config import WanConfig
from fw_model.model.attention import Part, fp32
from fw_model.model.rope import Rotary, rope_3d
from fw_model.model.seeded_weights import fill_made_weights
from fw_model.model.wan_weights import (
    PATCH,
    SPATIAL_STRIDE,
    BaseModelError,
    check_is_base,
    find_weight_files,
    module_key,
    original_shapes,
    read_shapes,
    read_tensors,
)

__all__ = ["BaseModelError", "Conditioning", "ControlAdapter", "WanBackbone", "WanConfig"]


@dataclass(frozen=True)
class Conditioning:
    """What every block reads besides the video tokens."""

    context: Tensor  # [B, image_tokens + text_len, D] embedded CLIP tokens, then embedded text tokens
    time: Tensor  # [B, D] float32 time embedding
    modulation: Tensor  # [B, 6, D] float32 shift, scale, gate of self-attention, then of the feed-forward
    rotary: Rotary  # 3-D positions of the N tokens
    grid: tuple[int, int, int]  # (F, h, w)


class ControlAdapter(nn.Module):
    """Folded Plücker rays -> one vector per patch token, added to the patch embedding (as in Wan2.1-Fun-Camera)."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels * SPATIAL_STRIDE**2, dim, kernel_size=2, stride=2)
        self.residual_blocks = nn.ModuleList([_ResidualBlock(dim)])

    def forward(self, camera: Tensor) -> Tensor:
        """camera [B, C, F, H, W] -> [B, N, D]."""
        x = F.pixel_unshuffle(camera.transpose(1, 2).flatten(0, 1), SPATIAL_STRIDE)
        x = self.conv(x)
        for block in self.residual_blocks:
            x = block(x)
        return x.unflatten(0, (camera.shape[0], -1)).flatten(3).permute(0, 1, 3, 2).flatten(1, 2)


class _ResidualBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(x)))


class _CrossAttention:
    """Attention processor for Wan's text-and-image cross-attention with any number of text tokens.

    diffusers' own takes the last 512 context tokens as text whatever the configuration says.
    """

    def __init__(self, image_tokens: int) -> None:
        self.image_tokens = image_tokens

    def __call__(self, attn: Any, x: Tensor, context: Tensor, mask: None = None, rotary: None = None) -> Tensor:
        image, text = context[:, : self.image_tokens], context[:, self.image_tokens :]
        q = attn.norm_q(attn.to_q(x))
        out = _attend(q, attn.norm_k(attn.to_k(text)), attn.to_v(text), attn.heads)
        out = out + _attend(q, attn.norm_added_k(attn.add_k_proj(image)), attn.add_v_proj(image), attn.heads)
        return attn.to_out[0](out)


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2).to(v.dtype) for y in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class _Block(WanTransformerBlock):
    """Wan's block in two halves, with its arithmetic; the residual stream may be wider than the weights."""

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any, part: Part = None
    ) -> Tensor:
        x, dtype = hidden_states, self.attn1.to_q.weight.dtype
        vectors = (self.scale_shift_table + temb.float()).chunk(6, dim=1)
        if part != "feed_forward":
            y = (self.norm1(x.float()) * (1 + vectors[1]) + vectors[0]).to(dtype)
            x = (x.float() + self.attn1(y, None, None, rotary_emb) * vectors[2]).to(x.dtype)
            x = x + self.attn2(self.norm2(x.float()).to(dtype), encoder_hidden_states, None, None)
        if part != "attention":
            y = (self.norm3(x.float()) * (1 + vectors[4]) + vectors[3]).to(dtype)
            x = (x.float() + self.ffn(y).float() * vectors[5]).to(x.dtype)
        return x


class WanBackbone(nn.Module):
    """Wan2.1-Fun-V1.1-1.3B-Control-Camera (or the same architecture in other widths). Parameters are frozen.

    Give weights with `from_pretrained`, `load_original_state_dict` or `seeded`; `from_config` leaves torch's random ones.
    """

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        transformer: Any = WanTransformer3DModel(
            in_channels=config.in_dim,
            out_channels=config.out_dim,
            num_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            attention_head_dim=config.head_dim,
            ffn_dim=config.ffn_dim,
            image_dim=config.image_dim,
            added_kv_proj_dim=config.dim,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            freq_dim=config.freq_dim,
            text_dim=config.text_dim,
            eps=config.eps,
        )
        del transformer.rope  # fw_model.model.rope gives the same numbers, for any length and without buffers
        for block in transformer.blocks:
            block.__class__ = _Block
            block.attn2.set_processor(_CrossAttention(config.image_tokens))
        self.transformer: Any = transformer
        self.control_adapter = ControlAdapter(config.control_channels, config.dim)
        self.requires_grad_(False)

    # ---- weights

    @classmethod
    def from_config(cls, config: WanConfig) -> WanBackbone:
        """The architecture with torch's random initial weights."""
        return cls(config)

    @classmethod
    def seeded(cls, config: WanConfig, seed: int) -> WanBackbone:
        """Weights filled from a seed and the published keys: reproducible anywhere, nothing downloaded."""
        with torch.device("meta"):
            model = cls(config)
        model.to_empty(device="cpu")
        fill_made_weights(model, seed, model.original_keys())
        return model

    @classmethod
    def from_pretrained(cls, path_or_repo: str, config: WanConfig | None = None, revision: str = "main") -> WanBackbone:
        """Load published weights; they keep the dtype they are stored in.

        Args:
            path_or_repo: .safetensors or .pth file, folder (single file or shards with an index), or hub repository.
                The hub's cache and HF_HUB_OFFLINE are honoured.
            config: the expected shape; the published base's by default.
            revision: of the hub repository.

        Raises:
            BaseModelError: not found (says what to download), unreadable, or another model (says which).
        """
        config = config or WanConfig()
        files = find_weight_files(path_or_repo, revision)
        check_is_base(read_shapes(files), config, where=path_or_repo)
        with torch.device("meta"):
            model = cls(config)
        model._assign(read_tensors(files))
        return model

    def load_original_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take the tensors of `state_dict` (published names, or diffusers') as this model's own, without copying them.

        Raises:
            BaseModelError: any key or shape differs from this configuration's.
        """
        shapes = {key: tuple(tensor.shape) for key, tensor in state_dict.items()}
        check_is_base(shapes, self.config, where="the state dict")
        self._assign(state_dict.items())

    def original_keys(self) -> dict[str, str]:
        """Key of this module's state dict -> key of the published checkpoint."""
        return {module_key(key): key for key in original_shapes(self.config)}

    def _assign(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        for key, tensor in tensors:
            path, _, name = module_key(key).rpartition(".")
            setattr(self.get_submodule(path), name, nn.Parameter(tensor, requires_grad=False))

    # ---- running

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.patch_embedding.weight.dtype

    def forward(
        self,
        latents: Tensor,
        image_latents: Tensor,
        timestep: Tensor,
        text: Tensor,
        image_features: Tensor,
        camera: Tensor | None,
    ) -> Tensor:
        """Predict the flow velocity (noise - clean latents).

        Args:
            latents: [B, 16, F, H/8, W/8] noisy latents.
            image_latents: same shape; frame 0 holds the first image, the rest is zero (all zero: no image).
            timestep: [B] in 0..1000.
            text: [B, up to text_len, text_dim] prompt embeddings; shorter ones are padded with zeros, as the base was trained.
            image_features: [B, image_tokens, image_dim] CLIP features of the first image (zeros: no image).
            camera: [B, 24, F, H, W] control latents, or None for no camera control.

        Returns:
            velocity [B, 16, F, H/8, W/8] in the weights' dtype.
        """
        hidden_BND, cond = self.embed(latents, image_latents, timestep, text, image_features, camera)
        for i in range(self.config.num_layers):
            hidden_BND = self.block(i, hidden_BND, cond)
        return self.head(hidden_BND, cond)

    def embed(
        self,
        latents: Tensor,
        image_latents: Tensor,
        timestep: Tensor,
        text: Tensor,
        image_features: Tensor,
        camera: Tensor | None,
        camera_mask: Tensor | None = None,
    ) -> tuple[Tensor, Conditioning]:
        """Inputs as for `forward` -> (tokens [B, N, D], conditioning of every block).

        `camera_mask` [B] bool: False embeds that clip as without a camera; None: all have theirs.

        Raises:
            ValueError: shapes that do not go together.
        """
        self._check_inputs(latents, image_latents, text, image_features, camera)
        dtype, model = self.dtype, self.transformer
        x = model.patch_embedding(torch.cat([latents, image_latents], dim=1).to(dtype))
        grid = (x.shape[2], x.shape[3], x.shape[4])
        hidden_BND = x.flatten(2).transpose(1, 2)
        if camera is not None:
            control_BND = self.control_adapter(camera.to(dtype))
            if camera_mask is not None:
                control_BND = control_BND * camera_mask.to(control_BND.dtype).view(-1, 1, 1)
            hidden_BND = hidden_BND + control_BND
        text = F.pad(text, (0, 0, 0, self.config.text_len - text.shape[1]))
        embedder = model.condition_embedder
        context = torch.cat([embedder.image_embedder(image_features.to(dtype)), embedder.text_embedder(text.to(dtype))], dim=1)
        time, modulation = self._time(timestep)
        rotary = rope_3d(self.config.head_dim, grid, hidden_BND.device)
        return hidden_BND.contiguous(), Conditioning(context, time, modulation, rotary, grid)

    def block(self, i: int, hidden_BND: Tensor, cond: Conditioning, part: Part = None) -> Tensor:
        """Run block i, or one half of it: [B, N, D] -> [B, N, D], in the dtype it came in."""
        return self.transformer.blocks[i](hidden_BND, cond.context, cond.modulation, cond.rotary, part)

    def head(self, hidden_BND: Tensor, cond: Conditioning) -> Tensor:
        """Tokens after the last block [B, N, D] -> velocity [B, 16, F, H/8, W/8]."""
        model = self.transformer
        shift, scale = (model.scale_shift_table.float() + cond.time.unsqueeze(1)).chunk(2, dim=1)
        x = (model.norm_out(hidden_BND.float()) * (1 + scale) + shift).to(self.dtype)
        x = model.proj_out(x).unflatten(1, cond.grid).unflatten(-1, (*PATCH, -1))
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)  # B C F pt h ph w pw
        return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def _time(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """timestep [B] -> time embedding [B, D] and block modulation [B, 6, D], in float32 whatever the weights are.

        The original runs this part in float32 too: in bf16 neighbouring timesteps would become one.
        """
        embedder = self.transformer.condition_embedder
        with fp32(timestep):
            x = embedder.timesteps_proj(timestep.float())
            x = F.silu(_linear_fp32(embedder.time_embedder.linear_1, x))
            time = _linear_fp32(embedder.time_embedder.linear_2, x)
            modulation = _linear_fp32(embedder.time_proj, F.silu(time))
        return time, modulation.unflatten(1, (6, -1))

    def _check_inputs(
        self, latents: Tensor, image_latents: Tensor, text: Tensor, image_features: Tensor, camera: Tensor | None
    ) -> None:
        config = self.config
        if latents.shape != image_latents.shape or latents.ndim != 5 or 2 * latents.shape[1] != config.in_dim:
            raise ValueError(
                f"latents {list(latents.shape)} and image_latents {list(image_latents.shape)} must both be "
                f"[B, {config.in_dim // 2}, F, H/8, W/8]"
            )
        batch, _, frames, rows, columns = latents.shape
        if rows % PATCH[1] or columns % PATCH[2]:
            raise ValueError(f"latents of {rows} x {columns}: both must be even (the video's sides multiples of 16)")
        if text.ndim != 3 or text.shape[1] > config.text_len or text.shape[2] != config.text_dim:
            raise ValueError(f"text {list(text.shape)} must be [B, at most {config.text_len}, {config.text_dim}]")
        if image_features.shape[1:] != (config.image_tokens, config.image_dim):
            raise ValueError(
                f"image_features {list(image_features.shape)} must be [B, {config.image_tokens}, {config.image_dim}]"
            )
        expected = (batch, config.control_channels, frames, rows * SPATIAL_STRIDE, columns * SPATIAL_STRIDE)
        if camera is not None and camera.shape != expected:
            raise ValueError(f"camera {list(camera.shape)} must be {list(expected)} to go with latents {list(latents.shape)}")


def _linear_fp32(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.float(), None if layer.bias is None else layer.bias.float())
