"""What joins the two branches in stage 2: bidirectional cross-attention and the camera adapters of the base.

Both give exactly zero until trained, so that stage 2 starts from the base's velocity and stage 1's geometry.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fw_model.config import GeometryConfig
from fw_model.model.attention import zero_init


class BiCrossAttention(nn.Module):
    """MM-BiCrossAttention: both branches read each other through one shared query/key pair.

    Q comes from the video, K from the geometry; o_video = softmax(QK^T) V_geometry, o_geometry = softmax(KQ^T) V_video.
    It runs after the pair of blocks it stands beside and adds to both streams, so that the last pair still reaches the
    velocity and the heads. The paper (arXiv 2509.21657) leaves positions open; as in GLIP's fusion block, whose form
    this is, there are none here beyond what the tokens carry.
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

    def forward(self, video: Tensor, geometry: Tensor) -> tuple[Tensor, Tensor]:
        """video [B, N, D], geometry [B, G, D] -> the same two, each in the dtype it came in."""
        x = F.layer_norm(video.to(geometry.dtype), video.shape[-1:], eps=self.eps)
        y = F.layer_norm(geometry, geometry.shape[-1:], eps=self.eps).to(x.dtype)
        q, k = self._heads(self.q(x)), self._heads(self.k(y))
        to_video = F.scaled_dot_product_attention(q, k, self._heads(self.v_geometry(y)))
        to_geometry = F.scaled_dot_product_attention(k, q, self._heads(self.v_video(x)))
        to_video = self.o_video(to_video.transpose(1, 2).flatten(2)) * self.gamma_video
        to_geometry = self.o_geometry(to_geometry.transpose(1, 2).flatten(2)) * self.gamma_geometry
        return video + to_video.to(video.dtype), geometry + to_geometry.to(geometry.dtype)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

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

    def forward(self, hidden: Tensor, pose: Tensor) -> Tensor:
        """hidden [B, N, D], pose tokens [B, N, D] -> hidden."""
        return hidden + self.linear(F.silu(pose)).to(hidden.dtype)

    def reset(self) -> None:
        """Make the shift exactly zero."""
        zero_init(self.linear)
