"""The model that benchmarks run where the full size does not fit: every proportion of the full one, its encoders included.

Widths and token counts are both divided by `shrink`; the number of layers stays. A product of matrices takes tokens x width x
width, attention tokens x tokens x width: each then takes 1/shrink^3 of the FLOPs and 1/shrink^2 of the weights. The same holds
for the VAE (pixels x channels x channels), for UMT5 and for CLIP, so that no part is cheap or dear beside another only because
the model is small. What does not divide evenly is rounded; `python benchmarks/middle_model.py` counts what came out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import ByT5Tokenizer, CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from fw_model.config import GeometryConfig, Preset, WanConfig, load_preset
from fw_model.describe.__main__ import PUBLISHED, STAGES
from fw_model.describe.step_trace import ClipSize, count_flops, trace_step
from fw_model.model.encoders import Encoders


@dataclass(frozen=True)
class Size:
    """One size of everything: model, encoders, clip."""

    name: str
    shrink: int
    clip: ClipSize

    def preset(self, *overrides: str) -> Preset:
        """The real preset at this size, with seeded weights; `overrides` as for `load_preset`."""
        clip = {"frames": self.clip.frames, "short_side": self.clip.height, "long_side": self.clip.width}
        keys: dict[str, Any] = {"name": self.name, "base.source": "seeded", "encoders.weights.source": "seeded"}
        keys |= {f"clip.{key}": value for key, value in clip.items()}
        if self.shrink > 1:
            keys |= self._model_keys()
        return load_preset(PUBLISHED, [*(f"{key}={value}" for key, value in keys.items()), *overrides])

    def _model_keys(self) -> dict[str, Any]:
        wan, geometry = WanConfig(), GeometryConfig()
        dim, cross = self.less(wan.dim), self.less(geometry.cross_dim)
        text, image = self.less(wan.text_dim), self.less(wan.image_dim)
        return {
            "model.wan.dim": dim,
            "model.wan.ffn_dim": self.less(wan.ffn_dim),
            "model.wan.num_heads": heads_of_width(dim, wan.head_dim),
            "model.wan.text_dim": text,
            "model.wan.freq_dim": self.less(wan.freq_dim),
            "model.wan.image_dim": image,
            "model.wan.image_tokens": self.image_side**2 + 1,
            "model.wan.text_len": self.less(wan.text_len),
            "model.geometry.bridge_heads": heads_of_width(dim, wan.dim // geometry.bridge_heads),
            "model.geometry.head_channels": [self.less(width) for width in geometry.head_channels],
            "model.geometry.head_features": self.less(geometry.head_features),
            "model.geometry.camera_dim": self.less(geometry.camera_dim),
            "model.geometry.pose_rank": self.less(geometry.pose_rank),
            "model.geometry.cross_dim": cross,
            "model.geometry.cross_heads": heads_of_width(cross, geometry.cross_dim // geometry.cross_heads),
            "encoders.text_dim": text,
            "encoders.image_dim": image,
        }

    def less(self, value: int) -> int:
        return max(1, round(value / self.shrink))

    @property
    def image_side(self) -> int:
        """CLIP's patches along a side of its image; 16 at full size."""
        return max(1, round(16 / self.shrink**0.5))

    # ---- encoders, in the published shapes (the made ones of `fw_model.model.encoders` have other proportions)

    def vae(self) -> nn.Module:
        return AutoencoderKLWan(base_dim=self.less(96))

    def text_encoder(self) -> nn.Module:
        return UMT5EncoderModel(
            UMT5Config(
                vocab_size=self.less(256384),
                d_model=self.less(4096),
                d_kv=64,
                d_ff=self.less(10240),
                num_layers=24,
                num_heads=self.less(64),
                feed_forward_proj="gated-gelu",
            )
        )

    def image_encoder(self) -> nn.Module:
        width = self.less(1280)
        return CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=32,
                num_attention_heads=heads_of_width(width, 80),
                image_size=14 * self.image_side,
                patch_size=14,
            )
        )

    def make_encoders(self, device: str, dtype: torch.dtype) -> Encoders:
        """All three with random weights."""
        with torch.device(device):
            vae, text, image = (make().to(dtype).eval() for make in (self.vae, self.text_encoder, self.image_encoder))
        for module in (vae, text, image):
            module.requires_grad_(False)
        side, length = 14 * self.image_side, self.less(512)
        return Encoders(vae, text, ByT5Tokenizer(), image, image_size=side, text_len=length, identities={})


FULL = Size("full", 1, ClipSize())
MIDDLE = Size("middle", 16, ClipSize(33, 128, 224))


def heads_of_width(dim: int, width: int) -> int:
    """How many heads of about `width` make `dim`; heads keep their width as far as they can."""
    return max(1, round(dim / width))


@dataclass(frozen=True)
class Part:
    """What one part of a training step takes for one clip."""

    parameters: int
    flops: int


def encoder_parts(size: Size) -> dict[str, Part]:
    """Weights and forward FLOPs of the three encoders for one clip, counted on tensors without data."""
    clip, side = size.clip, 14 * size.image_side
    runs: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], object]]] = {
        "VAE": (size.vae, lambda vae: vae.encode(torch.zeros(1, 3, clip.frames, clip.height, clip.width))),
        "UMT5": (size.text_encoder, lambda text: text(input_ids=torch.zeros(1, size.less(512), dtype=torch.long))),
        "CLIP": (size.image_encoder, lambda image: image(torch.zeros(1, 3, side, side))),
    }
    found = {}
    with FakeTensorMode(), torch.no_grad():
        for name, (make, run) in runs.items():
            module = make().eval()
            flops = count_flops(lambda module=module, run=run: run(module))
            found[name] = Part(sum(p.numel() for p in module.parameters()), flops)
    return found


def parts(size: Size) -> dict[str, Part]:
    """Every part of training on one clip: the encoders, and what each stage trains with its whole step."""
    found = encoder_parts(size)
    for stage in STAGES:
        trace = trace_step(size.preset().model, stage, size.clip)
        found[stage] = Part(trace.gradients // 4, trace.total_flops)
    return found


def main() -> None:
    full, middle = parts(FULL), parts(MIDDLE)
    shrink = MIDDLE.shrink
    print(f"full {FULL.clip}, middle {MIDDLE.clip}: its FLOPs times {shrink}^3 and weights times {shrink}^2 beside the full ones")
    print(f"{'part':10}{'full TFLOPs':>14}{'middle':>12}{'full M weights':>16}{'middle':>10}")
    for name, part in full.items():
        scaled = middle[name]
        flops, weights = scaled.flops * shrink**3, scaled.parameters * shrink**2
        print(f"{name:10}{part.flops / 1e12:14.1f}{flops / 1e12:12.1f}{part.parameters / 1e6:16.0f}{weights / 1e6:10.0f}")


if __name__ == "__main__":
    main()
