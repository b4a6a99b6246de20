"""Networks with seeded weights in the published layout (config.json, model.safetensors, preprocessor_config.json).

They run the real code paths where no published weights are at hand: tests and benchmarks. What they predict means nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

# The published sizes of Depth Anything V2, and a tiny one. Reading: DINOv2 width, layers, heads; the layers whose tokens the
# head reads; its channels at the four scales; channels of the fusion; channels before the last convolution.
DEPTH_ANYTHING_SIZES: dict[str, tuple[int, int, int, tuple[int, ...], tuple[int, ...], int, int]] = {
    "tiny": (32, 4, 2, (1, 2, 3, 4), (8, 8, 16, 16), 16, 8),
    "small": (384, 12, 6, (3, 6, 9, 12), (48, 96, 192, 384), 64, 32),
    "base": (768, 12, 12, (3, 6, 9, 12), (96, 192, 384, 768), 128, 32),
    "large": (1024, 24, 16, (5, 12, 18, 24), (256, 512, 1024, 1024), 256, 32),
}
PREPROCESSOR = {
    "do_normalize": True,
    "do_pad": False,
    "do_rescale": True,
    "do_resize": True,
    "ensure_multiple_of": 14,
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "DPTImageProcessor",
    "image_std": [0.229, 0.224, 0.225],
    "keep_aspect_ratio": True,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"height": 518, "width": 518},
    "size_divisor": None,
}


def depth_anything_config(size: str = "tiny", metric: bool = False) -> Any:
    """transformers' configuration of Depth Anything V2 in one of `DEPTH_ANYTHING_SIZES`, as the hub's config.json has it.

    `metric`: the variant for indoor scenes, whose output is z-depth in metres (at most 20) instead of disparity.
    """
    from transformers import DepthAnythingConfig, Dinov2Config

    width, layers, heads, read, channels, fusion, last = DEPTH_ANYTHING_SIZES[size]
    backbone: dict[str, Any] = {
        "image_size": 518,
        "patch_size": 14,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "out_indices": list(read),
        "apply_layernorm": True,
        "reshape_hidden_states": False,
    }
    return DepthAnythingConfig(
        backbone_config=Dinov2Config(**backbone),
        reassemble_hidden_size=width,
        neck_hidden_sizes=list(channels),
        fusion_hidden_size=fusion,
        head_hidden_size=last,
        depth_estimation_type="metric" if metric else "relative",
        max_depth=20 if metric else 1,
    )


def make_depth_anything(folder: Path, seed: int = 0, size: str = "tiny", metric: bool = False) -> Path:
    """Write a Depth Anything V2 with weights from a seed, as its repository on the hub is laid out, and return the folder.

    Its output is positive, finite and depends on the picture. The generator of the caller is left as it was.
    """
    from transformers import DepthAnythingForDepthEstimation

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DepthAnythingForDepthEstimation(depth_anything_config(size, metric))
        with torch.no_grad():
            for name, value in model.named_parameters():
                if value.ndim > 1 and not name.endswith(("position_embeddings", "cls_token")):
                    value.normal_(0, value[0].numel() ** -0.5)
                elif name == "head.conv3.bias" and not metric:
                    value.fill_(2.0)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n", encoding="utf-8")
    return folder
