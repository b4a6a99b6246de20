"""A DUSt3R small enough for tests."""

from __future__ import annotations

from typing import Any

TINY: dict[str, Any] = {
    "head_type": "linear",
    "img_size": [64, 64],
    "enc_embed_dim": 32,
    "enc_depth": 1,
    "enc_num_heads": 2,
    "dec_embed_dim": 16,
    "dec_depth": 2,
    "dec_num_heads": 2,
}
