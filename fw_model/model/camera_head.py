"""Camera head: the camera token of every latent frame -> a pose encoding per video frame, refined in a few iterations."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fw_model.config import GeometryConfig
from fw_model.model.attention import TransformerLayer, fp32
from fw_model.model.rope import rope_1d

ENCODING = 9  # translation 3, unit quaternion xyzw 4, fov_h, fov_w in radians
_HEAD_DIM = 64
_START_FOV = 1.0  # radians, about 57 degrees; refined from there


class CameraHead(nn.Module):
    """Learned temporal x4, then iterative refinement as in VGGT's camera head.

    Latent frame 0 gives video frame 0; latent frame n >= 1 gives frames 4(n-1)+1 .. 4n, in that order, through four
    projections. Every upsampled token passes the norm. Each iteration embeds the previous estimate (detached), modulates
    the tokens with it (AdaLN), runs the trunk and adds a correction. The first estimate is learned and starts at the
    identity pose, which is frame 0's target. Attention is causal in time and knows frame times by 1-D RoPE (VGGT has
    neither, because its frames are unordered).
    """

    def __init__(self, dim: int, config: GeometryConfig) -> None:
        super().__init__()
        width = config.camera_dim
        self.iterations = config.camera_iterations
        self.heads = width // _HEAD_DIM if width % _HEAD_DIM == 0 else 1
        self.norm_in = nn.LayerNorm(dim)
        self.project = nn.Linear(dim, width)
        self.first = nn.Linear(width, width)
        self.later = nn.Linear(width, 4 * width)
        self.norm = nn.LayerNorm(width)
        self.start = nn.Parameter(torch.zeros(ENCODING))
        self.embed = nn.Linear(ENCODING, width)
        self.modulation = nn.Linear(width, 3 * width)
        self.blocks = nn.ModuleList([TransformerLayer(width, self.heads) for _ in range(config.camera_blocks)])
        self.norm_out = nn.LayerNorm(width)
        self.branch = nn.Linear(width, width // 2)
        self.output = nn.Linear(width // 2, ENCODING)

    @torch.no_grad()
    def reset_output(self) -> None:
        """Start at the identity pose and a fov of 1 radian, with small corrections."""
        share = _START_FOV / math.pi
        fov = math.log(share / (1 - share))
        self.start.copy_(torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, fov, fov]))
        self.output.weight.mul_(0.01)
        self.output.bias.zero_()

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """Camera tokens [B, F, D] -> estimates after each iteration, [B, T, 9] float32, the last one best.

        Encoding: w2c translation (clip units), unit quaternion xyzw, fov_h and fov_w in (0, pi). World = first camera.
        """
        x = self._upsample(tokens)
        rotary = rope_1d(x.shape[-1] // self.heads, x.shape[1], x.device)
        raw = self.start.float().expand(*x.shape[:2], -1)
        estimates: list[Tensor] = []
        for _ in range(self.iterations):
            shift, scale, gate = self._conditioning(activate(raw).detach().to(x.dtype)).chunk(3, dim=-1)
            y = x + (gate * (F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift)).to(x.dtype)
            for block in self.blocks:
                y = block(y, rotary, causal=True)
            raw = raw + self._correction(y)
            estimates.append(activate(raw))
        return estimates

    def _upsample(self, tokens: Tensor) -> Tensor:
        """[B, F, D] -> normalised [B, T, width]."""
        x = self.project(self.norm_in(tokens))
        later = self.later(x[:, 1:]).unflatten(-1, (4, -1)).flatten(1, 2)  # (latent frame, k) -> 4(f-1)+k: time order
        return self.norm(torch.cat([self.first(x[:, :1]), later], dim=1))

    def _conditioning(self, encoding: Tensor) -> Tensor:
        return self.modulation(F.silu(self.embed(encoding)))

    def _correction(self, y: Tensor) -> Tensor:
        y = F.gelu(self.branch(self.norm_out(y)))
        with fp32(y):
            return F.linear(y.float(), self.output.weight.float(), self.output.bias.float())


def activate(raw: Tensor) -> Tensor:
    """Raw [..., 9] -> encoding: translation as it is, quaternion normalised, fov squashed into (0, pi)."""
    quaternion = F.normalize(raw[..., 3:7], dim=-1)
    return torch.cat([raw[..., :3], quaternion, math.pi * raw[..., 7:].sigmoid()], dim=-1)
