"""What joins the two branches in stage 2: bidirectional cross-attention and the camera adapters of the base.

Both give exactly zero until trained, so that stage 2 starts from the base's velocity and stage 1's geometry.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fw_model.config import GeometryConfig
from fw_model.model.attention import zero_init
from fw_model.model.rope import Rotary, apply_rope


class BiCrossAttention(nn.Module):
    """MM-BiCrossAttention: both branches read each other through one shared query/key pair.

    Q comes from the video, K from the geometry; o_video = softmax(QK^T) V_geometry, o_geometry = softmax(KQ^T) V_video.
    It runs between attention and feed-forward of the pair of blocks it stands beside and adds to both streams. Q and K are
    rotated by 3-D positions, the identity for special tokens, so that a patch finds the tokens of its own place: the form is
    GLIP's fusion block, which has none, and without them shuffling all geometry tokens leaves the video as it is.
    """

    def __init__(self, dim: int, config: GeometryConfig, eps: float) -> None:
        super().__init__()
        width = config.cross_dim
        self.heads, self.eps = config.cross_heads, eps
        self.q = nn.Linear(dim, width)  # video
        self.k = nn.Linear(dim, width)  # geometry
        self.v_video = nn.Linear(dim, width)
        self.v_geometry = nn.Linear(dim, width)
        self.o_video = nn.Linear(width, dim)
        self.o_geometry = nn.Linear(width, dim)
        self.gamma_video = nn.Parameter(torch.zeros(dim))
        self.gamma_geometry = nn.Parameter(torch.zeros(dim))

    def forward(self, video: Tensor, geometry: Tensor, video_at: Rotary, geometry_at: Rotary) -> tuple[Tensor, Tensor]:
        """video [B, N, D], geometry [B, G, D], positions in the heads' width -> the two, in their dtypes."""
        x = F.layer_norm(video.to(geometry.dtype), video.shape[-1:], eps=self.eps)
        y = F.layer_norm(geometry, geometry.shape[-1:], eps=self.eps).to(x.dtype)
        q, k = self._heads(self.q(x), video_at), self._heads(self.k(y), geometry_at)
        to_video = F.scaled_dot_product_attention(q, k, self._heads(self.v_geometry(y)))
        to_geometry = F.scaled_dot_product_attention(k, q, self._heads(self.v_video(x)))
        to_video = self.o_video(to_video.transpose(1, 2).flatten(2)) * self.gamma_video
        to_geometry = self.o_geometry(to_geometry.transpose(1, 2).flatten(2)) * self.gamma_geometry
        return video + to_video.to(video.dtype), geometry + to_geometry.to(geometry.dtype)

    def _heads(self, x: Tensor, rotary: Rotary | None = None) -> Tensor:
        x = x.unflatten(-1, (self.heads, -1))
        return (x if rotary is None else apply_rope(x, rotary)).transpose(1, 2)

    @torch.no_grad()
    def reset(self) -> None:
        """Make the exchange add exactly nothing."""
        self.gamma_video.zero_()
        self.gamma_geometry.zero_()


class CameraAdapter(nn.Module):
    """Shift of the base's hidden states before one preconditioning block: f_i = f_{i-1} + Linear(SiLU(pose tokens))."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, hidden: Tensor, pose: Tensor, visible: Tensor | None = None) -> Tensor:
        """hidden [B, N, D], pose tokens [B, N, D] -> hidden; `visible` [B] bool: False leaves that clip as it is."""
        shift = self.linear(F.silu(pose)).to(hidden.dtype)
        return hidden + (shift if visible is None else shift * visible.to(shift.dtype).view(-1, 1, 1))

    def reset(self) -> None:
        """Make the shift exactly zero."""
        zero_init(self.linear)
