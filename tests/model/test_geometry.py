"""The geometry branch has the stated size, starts as the base's own blocks, and hides poses when told to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fw_model.config import ModelConfig
from fw_model.model.backbone import WanBackbone
from fw_model.model.geometry import GeoDiT, LatentBridge, PoseEncoder, SpecialTokens
from fw_model.model.rope import rope_3d
from tests.helpers.small_model import SMALL, SMALL_WAN, inputs, open_gates, small_world

GRID = (3, 2, 3)
TOKENS = 18


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_full_size_parts_have_the_stated_numbers_of_parameters() -> None:
    config = ModelConfig()
    with torch.device("meta"):
        geodit = GeoDiT(config)
        assert count(LatentBridge(1536, config.geometry)) == 56_663_040
        assert count(SpecialTokens(1536, config.geometry.num_registers)) == 15_360
        assert count(PoseEncoder(config.wan, config.geometry.pose_rank)) == pytest.approx(1e6, rel=0.05)
    assert len(geodit.blocks) == 18
    assert count(geodit.blocks) == 878_455_296
    assert count(geodit.time_projection) == 21_247_488


@pytest.fixture(scope="module")
def base() -> WanBackbone:
    return WanBackbone.seeded(SMALL_WAN, seed=0)


@pytest.fixture
def geodit(base: WanBackbone) -> GeoDiT:
    model = GeoDiT(SMALL)
    model.init_from_base(base)
    return model


def test_a_fresh_geometry_block_is_the_base_block_without_text(base: WanBackbone, geodit: GeoDiT) -> None:
    """Whatever the timestep: the frame attention's gate is closed in the block and in the shared projection."""
    wan = WanBackbone.seeded(SMALL_WAN, seed=0)
    x = normal(2, TOKENS, 48)
    _, cond = wan.embed(**inputs(batch=2))
    for i, block in enumerate(geodit.blocks):
        source = wan.transformer.blocks[2 + i]
        source.attn2.to_out[0].weight.zero_()
        source.attn2.to_out[0].bias.zero_()
        expected = source(x, cond.context, cond.modulation, cond.rotary)
        rotary = rope_3d(SMALL_WAN.head_dim, GRID)
        got = block(x, geodit.time_vectors(cond.time), rotary, GRID[0], normal(2, TOKENS, 48), None)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_the_nine_vectors_are_frame_global_and_feed_forward(base: WanBackbone, geodit: GeoDiT) -> None:
    for i, block in enumerate(geodit.blocks):
        table = base.transformer.blocks[2 + i].scale_shift_table[0]
        assert torch.equal(block.modulation[0, 3:], table)
        assert torch.equal(block.modulation[0, :2], table[:2])
        assert not block.modulation[0, 2].any()
    weight = geodit.time_projection.weight.unflatten(0, (9, -1))
    source = base.transformer.condition_embedder.time_proj.weight.unflatten(0, (6, -1))
    assert torch.equal(weight[3:], source)
    assert not weight[2].any()
    assert not geodit.time_projection.bias.unflatten(0, (9, -1))[2].any()


def with_gates(geodit: GeoDiT, frame: float, everywhere: float) -> Tensor:
    """Time vectors that open the frame and the global attention by this much, feed-forward closed."""
    for block in geodit.blocks:
        block.modulation.data.zero_()
    time = torch.zeros(1, 9, SMALL_WAN.dim)
    time[:, 2], time[:, 5] = frame, everywhere
    return time


@pytest.mark.parametrize(("frame", "everywhere", "reaches"), [(1.0, 0.0, False), (0.0, 1.0, True)])
def test_frame_attention_stays_in_its_frame_and_global_attention_does_not(
    geodit: GeoDiT, frame: float, everywhere: float, reaches: bool
) -> None:
    time, special = with_gates(geodit, frame, everywhere), 5
    rotary = geodit.rotary(GRID, special, torch.device("cpu"))
    x = normal(1, GRID[0] * (special + 6), 48)
    y = x.clone()
    y[:, -1] += 1  # one patch of the last frame
    a, b = (geodit.blocks[0](v, time, rotary, GRID[0], None, None).unflatten(1, (GRID[0], -1)) for v in (x, y))
    assert not torch.equal(a[:, 2], b[:, 2])
    assert torch.equal(a[:, :2], b[:, :2]) != reaches


def test_special_tokens_stand_before_each_frame_and_the_first_frame_has_its_own() -> None:
    tokens = SpecialTokens(48, registers=4)
    nn.init.normal_(tokens.camera)
    nn.init.normal_(tokens.registers)
    patches = normal(2, TOKENS, 48)
    out = tokens(patches, frames=3).unflatten(1, (3, -1))
    assert out.shape == (2, 3, 5 + 6, 48)
    assert torch.equal(out[:, :, 5:].flatten(1, 2), patches)
    assert torch.equal(out[0, 0, :1], tokens.camera[0])
    assert torch.equal(out[0, 1, :1], tokens.camera[1])
    assert torch.equal(out[:, 1, :5], out[:, 2, :5])
    assert not torch.equal(out[:, 0, :5], out[:, 1, :5])
    assert tokens(patches, frames=1).shape == (2, TOKENS + 5, 48)


def test_special_tokens_get_the_identity_rotation(geodit: GeoDiT) -> None:
    cos, sin = (table.unflatten(1, (3, -1)) for table in geodit.rotary(GRID, 5, torch.device("cpu")))
    assert (cos[:, :, :5] == 1).all()
    assert (sin[:, :, :5] == 0).all()
    assert (sin[:, 1:, 5:] != 0).any()


def test_pose_tokens_lie_in_the_order_of_the_patch_tokens() -> None:
    encoder = PoseEncoder(SMALL_WAN, rank=4)
    camera = normal(1, 24, 3, 32, 48)
    moved = camera.clone()
    moved[:, :, 1, 16:32, 32:48] += 1  # frame 1, row 1, column 2 of the 2 x 3 grid
    changed = (encoder(camera) != encoder(moved)).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [1 * 6 + 1 * 3 + 2]


def test_a_hidden_pose_leaves_no_trace_and_others_keep_theirs() -> None:
    geodit = open_gates(small_world()).geodit
    rotary = geodit.rotary(GRID, 5, torch.device("cpu"))
    x, time, pose = normal(2, 33, 48), torch.zeros(2, 9, 48), normal(2, TOKENS, 48)
    run = geodit.blocks[0]
    half = run(x, time, rotary, 3, pose, torch.tensor([False, True]))
    torch.testing.assert_close(half[0], run(x, time, rotary, 3, None, None)[0])
    torch.testing.assert_close(half[1], run(x, time, rotary, 3, pose, None)[1])
    assert not torch.allclose(half[0], run(x, time, rotary, 3, pose, None)[0])


def test_poses_are_added_to_patch_tokens_only() -> None:
    geodit = open_gates(small_world()).geodit
    shift = geodit.blocks[0]._pose_shift(normal(1, 33, 48), normal(1, TOKENS, 48), None, 3).unflatten(1, (3, -1))
    assert not shift[:, :, :5].any()
    assert shift[:, :, 5:].abs().amin() > 0


def test_the_bridge_uses_positions() -> None:
    bridge = small_world().bridge
    x = normal(1, 1, 48).expand(1, TOKENS, 48) + 0.1 * normal(1, TOKENS, 48, seed=1)
    order = torch.arange(TOKENS - 1, -1, -1)
    assert not torch.allclose(bridge(x, GRID)[:, order], bridge(x[:, order], GRID), atol=1e-4)
