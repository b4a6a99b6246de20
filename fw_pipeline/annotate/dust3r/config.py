"""What a published config.json says, checked: every key is either used, known to change nothing here, or refused by name."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PATCH = 16  # pixels per token along each side; both heads give back 16 x 16 pixels per token
HEADS = ("dpt", "linear")

# Keys of published configurations that change nothing when the trained network is run.
_WITHOUT_EFFECT = {
    "architectures", "freeze", "landscape_only", "mask_ratio", "model_type", "torch_dtype", "dtype", "transformers_version",
}  # fmt: skip
# Keys with one value only; landscape images need no other patch embedding than portrait ones, since nothing is transposed.
_FIXED = {
    "output_mode": ("pts3d",),
    "patch_size": (PATCH, [PATCH, PATCH]),
    "patch_embed_cls": ("PatchEmbedDust3R", "ManyAR_PatchEmbed"),
    "norm_im2_in_dec": (True,),
}
_COUNTS = ("enc_embed_dim", "enc_depth", "enc_num_heads", "dec_embed_dim", "dec_depth", "dec_num_heads")


@dataclass(frozen=True)
class DUSt3RConfig:
    """Sizes of the network; the defaults are the published ViT-Large encoder, Base decoder and DPT head."""

    head_type: str = "dpt"  # "dpt" or "linear"
    img_size: tuple[int, int] = (512, 512)  # what it was trained on; decides how images are brought to size, see `network_size`
    enc_embed_dim: int = 1024
    enc_depth: int = 24
    enc_num_heads: int = 16
    dec_embed_dim: int = 768
    dec_depth: int = 12
    dec_num_heads: int = 12
    mlp_ratio: float = 4.0
    rope_base: float = 100.0
    confidence_min: float = 1.0
    confidence_max: float = math.inf

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> DUSt3RConfig:
        """From the keys of a published config.json (infinities as numbers or as text); keys left out take the defaults above.

        `landscape_only` is accepted and has no effect: it belongs to training, and images of either orientation are read as
        they are. Raises ValueError naming the key that is unknown or has a value this implementation does not have.
        """
        values = dict(config)
        for key, allowed in _FIXED.items():
            value = values.pop(key, allowed[0])
            if (list(value) if isinstance(value, tuple) else value) not in allowed:
                raise ValueError(f"{key} is {value!r}; this implementation has {' or '.join(map(repr, allowed))}")
        if _mode("depth_mode", values.pop("depth_mode", ("exp", -math.inf, math.inf))) != (-math.inf, math.inf):
            raise ValueError(f"depth_mode is {config['depth_mode']!r}; this implementation has ('exp', -inf, inf)")
        low, high = _mode("conf_mode", values.pop("conf_mode", ("exp", 1.0, math.inf)))
        if not 0 <= low < high:
            raise ValueError(f"conf_mode is {config['conf_mode']!r}; its bounds must be 0 <= low < high")
        found: dict[str, Any] = {"confidence_min": low, "confidence_max": high}
        if "pos_embed" in values:
            found["rope_base"] = _rope_base(values.pop("pos_embed"))
        if "img_size" in values:
            size = values.pop("img_size")
            height, width = size if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
            found["img_size"] = (_count("img_size", height), _count("img_size", width))
        for key in _COUNTS:
            if key in values:
                found[key] = _count(key, values.pop(key))
        for key in ("head_type", "mlp_ratio"):
            if key in values:
                found[key] = values.pop(key)
        unknown = sorted(values.keys() - _WITHOUT_EFFECT)
        if unknown:
            raise ValueError(f"not a DUSt3R configuration: unknown {', '.join(unknown)}")
        return cls(**found)

    def to_dict(self) -> dict[str, Any]:
        """The keys of the published config.json; `from_dict` gives the same configuration back."""
        return {
            "output_mode": "pts3d",
            "head_type": self.head_type,
            "depth_mode": ["exp", -math.inf, math.inf],
            "conf_mode": ["exp", self.confidence_min, self.confidence_max],
            "pos_embed": f"RoPE{self.rope_base:g}",
            "img_size": list(self.img_size),
            "patch_size": PATCH,
            "landscape_only": False,
            "mlp_ratio": self.mlp_ratio,
        } | {key: getattr(self, key) for key in _COUNTS}

    def __post_init__(self) -> None:
        if self.head_type not in HEADS:
            raise ValueError(f"head_type is {self.head_type!r}; this implementation has {' or '.join(map(repr, HEADS))}")
        if isinstance(self.mlp_ratio, bool) or not isinstance(self.mlp_ratio, int | float) or not 0 < self.mlp_ratio < math.inf:
            raise ValueError(f"mlp_ratio is {self.mlp_ratio!r}; expected a positive number")
        for side in ("enc", "dec"):
            dim, heads = getattr(self, f"{side}_embed_dim"), getattr(self, f"{side}_num_heads")
            if dim % (4 * heads):
                raise ValueError(
                    f"{side}_embed_dim {dim} does not split into {heads} heads of a multiple of 4 channels (for RoPE in 2-D)"
                )
        if self.head_type == "dpt" and self.dec_depth < 2:
            raise ValueError("dec_depth is 1; the DPT head reads three different depths of the decoder and needs at least 2")


def _mode(key: str, value: Any) -> tuple[float, float]:
    """("exp", low, high) -> (low, high)."""
    try:
        kind, low, high = value
        bounds = float(low), float(high)  # float reads "inf" and "-Infinity" too
    except (TypeError, ValueError) as error:
        raise ValueError(f"{key} is {value!r}; expected ['exp', low, high]") from error
    if kind != "exp":
        raise ValueError(f"{key} is {value!r}; this implementation has 'exp' only")
    return bounds


def _rope_base(value: Any) -> float:
    match = re.fullmatch(r"RoPE(\d+(?:\.\d+)?)", value) if isinstance(value, str) else None
    if match is None or float(match[1]) <= 1:
        raise ValueError(f"pos_embed is {value!r}; this implementation has rotary positions only, such as 'RoPE100'")
    return float(match[1])


def _count(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key} is {value!r}; expected a positive whole number")
    return value
