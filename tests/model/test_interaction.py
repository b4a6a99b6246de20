"""The exchange between the branches: its formula, its size, and that it starts as nothing."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fw_model.config import GeometryConfig, ModelConfig
from fw_model.model.interaction import BiCrossAttention, CameraAdapter
from fw_model.model.rope import apply_rope, prepend_identity, rope_3d

CONFIG = GeometryConfig(cross_dim=24, cross_heads=3)
GRID = (2, 2, 2)
VIDEO_AT = rope_3d(8, GRID)  # 8 video tokens
GEOMETRY_AT = prepend_identity(VIDEO_AT, 2, 1)  # 10 geometry tokens


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def exchange() -> BiCrossAttention:
    torch.manual_seed(0)
    module = BiCrossAttention(16, CONFIG, eps=1e-6)
    nn.init.normal_(module.gamma_video)
    nn.init.normal_(module.gamma_geometry)
    return module


def test_full_size_has_the_stated_number_of_parameters() -> None:
    config = ModelConfig()
    with torch.device("meta"):
        exchange, adapter = BiCrossAttention(1536, config.geometry, 1e-6), CameraAdapter(1536)
    assert 18 * sum(p.numel() for p in exchange.parameters()) == 191_296_512
    assert 12 * sum(p.numel() for p in adapter.parameters()) == 28_329_984


def test_both_directions_read_one_shared_score_matrix(exchange: BiCrossAttention) -> None:
    video, geometry = normal(2, 8, 16), normal(2, 10, 16, seed=1)
    x, y = F.layer_norm(video, (16,), eps=1e-6), F.layer_norm(geometry, (16,), eps=1e-6)

    def heads(z: Tensor) -> Tensor:
        return z.unflatten(-1, (3, 8)).transpose(1, 2)

    def turned(z: Tensor, at: tuple[Tensor, Tensor]) -> Tensor:
        return apply_rope(z.unflatten(-1, (3, 8)), at).transpose(1, 2)

    scores = turned(exchange.q(x), VIDEO_AT) @ turned(exchange.k(y), GEOMETRY_AT).mT / math.sqrt(8)
    to_video = (scores.softmax(-1) @ heads(exchange.v_geometry(y))).transpose(1, 2).flatten(2)
    to_geometry = (scores.mT.softmax(-1) @ heads(exchange.v_video(x))).transpose(1, 2).flatten(2)
    got_video, got_geometry = exchange(video, geometry, VIDEO_AT, GEOMETRY_AT)
    torch.testing.assert_close(got_video, video + exchange.o_video(to_video) * exchange.gamma_video)
    torch.testing.assert_close(got_geometry, geometry + exchange.o_geometry(to_geometry) * exchange.gamma_geometry)


def test_the_exchange_knows_where_tokens_are(exchange: BiCrossAttention) -> None:
    """Shuffled patch tokens are another geometry; special tokens, which are nowhere, may change places among themselves."""
    video, geometry = normal(2, 8, 16), normal(2, 10, 16, seed=1)
    plain, _ = exchange(video, geometry, VIDEO_AT, GEOMETRY_AT)
    patches = [0, 4, 3, 2, 1, 5, 9, 8, 7, 6]
    shuffled, _ = exchange(video, geometry[:, patches], VIDEO_AT, GEOMETRY_AT)
    assert (shuffled - plain).abs().max() > 1e-2
    special = [5, *range(1, 5), 0, *range(6, 10)]
    swapped, _ = exchange(video, geometry[:, special], VIDEO_AT, GEOMETRY_AT)
    torch.testing.assert_close(swapped, plain)


def test_reset_makes_both_parts_add_exactly_nothing(exchange: BiCrossAttention) -> None:
    video, geometry = normal(2, 8, 16), normal(2, 10, 16, seed=1)
    exchange.reset()
    assert all(
        torch.equal(a, b) for a, b in zip(exchange(video, geometry, VIDEO_AT, GEOMETRY_AT), (video, geometry), strict=True)
    )
    adapter = CameraAdapter(16)
    assert not torch.equal(adapter(video, normal(2, 8, 16)), video)
    adapter.reset()
    assert torch.equal(adapter(video, normal(2, 8, 16)), video)


def test_each_stream_keeps_its_dtype(exchange: BiCrossAttention) -> None:
    video, geometry = exchange(normal(1, 8, 16).bfloat16(), normal(1, 10, 16), VIDEO_AT, GEOMETRY_AT)
    assert (video.dtype, geometry.dtype) == (torch.bfloat16, torch.float32)
