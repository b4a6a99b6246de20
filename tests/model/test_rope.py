"""Rotations are Wan's, depend on distance only, and leave special tokens as they are."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from hypothesis import given, settings
from hypothesis import strategies as st

from fw_model.model.rope import apply_rope, prepend_identity, rope_1d, rope_3d, split_frames


@pytest.mark.parametrize("head_dim", [12, 24, 128, 192])
def test_the_3d_table_is_wans(head_dim: int) -> None:
    theirs = WanRotaryPosEmbed(head_dim, (1, 2, 2), 64)(torch.zeros(1, 16, 5, 6, 14))
    ours = rope_3d(head_dim, (5, 3, 7))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 20))
def test_attention_scores_depend_on_the_distance_only(first: int, second: int, moved: int) -> None:
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    cos, sin = rope_1d(16, 64)

    def at(x: torch.Tensor, position: int) -> torch.Tensor:
        return apply_rope(x, (cos[:, position : position + 1], sin[:, position : position + 1]))

    score = (at(q, first) * at(k, second)).sum()
    torch.testing.assert_close(score, (at(q, first + moved) * at(k, second + moved)).sum(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(at(q, first).norm(), q.norm())


def test_special_tokens_get_the_identity_rotation_not_zero() -> None:
    plain = rope_3d(24, (3, 2, 2))
    rotary = prepend_identity(plain, frames=3, count=5)
    x = torch.randn(2, 3 * (5 + 4), 4, 24)
    turned = apply_rope(x, rotary).unflatten(1, (3, 9))
    x = x.unflatten(1, (3, 9))
    assert torch.equal(turned[:, :, :5], x[:, :, :5])
    torch.testing.assert_close(turned[:, :, 5:].flatten(1, 2), apply_rope(x[:, :, 5:].flatten(1, 2), plain))


def test_frames_split_into_the_batch_keep_their_positions() -> None:
    rotary = rope_3d(24, (3, 2, 2))
    x = torch.randn(2, 12, 4, 24)
    per_frame = apply_rope(x.unflatten(1, (3, 4)).flatten(0, 1), split_frames(rotary, 3))
    assert torch.equal(per_frame.unflatten(0, (2, 3)).flatten(1, 2), apply_rope(x, rotary))


def test_the_dtype_of_the_input_is_kept() -> None:
    assert apply_rope(torch.ones(1, 12, 1, 24, dtype=torch.bfloat16), rope_3d(24, (3, 2, 2))).dtype == torch.bfloat16
