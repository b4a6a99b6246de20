"""The heads: as many frames as the video has, in order, causal in time, at full resolution."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fw_model.model.heads
from fw_model.config import GeometryConfig, ModelConfig
from fw_model.model.attention import init_weights
from fw_model.model.camera_head import CameraHead, activate
from fw_model.model.heads import CausalDoubling, DPTHead, coordinate_embedding, frames_of

DIM = 16
CONFIG = GeometryConfig(head_channels=(8, 8, 8, 8), head_features=8, camera_dim=16, camera_blocks=1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dpt(kind: fw_model.model.heads.OutputKind = "depth") -> DPTHead:
    head = DPTHead(DIM, CONFIG, kind)
    init_weights(head, torch.Generator().manual_seed(0))
    return head


def camera_head(dim: int = DIM) -> CameraHead:
    head = CameraHead(dim, CONFIG)
    init_weights(head, torch.Generator().manual_seed(0))
    return head


def features(grid: tuple[int, int, int], batch: int = 1) -> list[Tensor]:
    return [normal(batch, grid[0] * grid[1] * grid[2], DIM, seed=i) for i in range(4)]


def test_full_size_heads_have_50_million_parameters_within_10() -> None:
    config = ModelConfig().geometry
    with torch.device("meta"):
        heads = [DPTHead(1536, config, "depth"), DPTHead(1536, config, "points"), CameraHead(1536, config)]
    assert 40e6 <= sum(p.numel() for head in heads for p in head.parameters()) <= 60e6


@pytest.mark.parametrize("latent_frames", range(1, 7))
def test_frames_are_four_per_latent_frame_and_one_for_the_first(latent_frames: int) -> None:
    frames = 4 * (latent_frames - 1) + 1
    assert frames_of(latent_frames) == frames
    grid = (latent_frames, 2, 3)
    depth, confidence = dpt()(features(grid, batch=2), grid)
    assert depth.shape == confidence.shape == (2, frames, 32, 48)
    points, confidence = dpt("points")(features(grid, batch=2), grid)
    assert points.shape == (2, frames, 32, 48, 3)
    assert confidence.shape == (2, frames, 32, 48)
    encodings = camera_head()(normal(2, latent_frames, DIM))
    assert [e.shape for e in encodings] == [(2, frames, 9)] * 4


@pytest.mark.parametrize(("rows", "columns"), [(3, 5), (5, 3), (1, 1)])
def test_portrait_landscape_and_odd_grids_give_full_resolution(rows: int, columns: int) -> None:
    depth, _ = dpt()(features((2, rows, columns)), (2, rows, columns))
    assert depth.shape == (1, 5, 16 * rows, 16 * columns)


def first_changed(before: Tensor, after: Tensor) -> int:
    """Index along dimension 1 of the first frame that differs at all."""
    return int((before != after).flatten(2).any(-1)[0].nonzero()[0])


@pytest.mark.parametrize("latent_frame", range(4))
def test_every_head_is_causal_in_time_and_a_latent_frame_reaches_its_own_first_frame(latent_frame: int) -> None:
    expected = max(0, 4 * (latent_frame - 1) + 1)
    grid = (4, 2, 3)
    plain, moved = features(grid), features(grid)
    for x in moved:
        x.unflatten(1, grid)[:, latent_frame] += 1.0 + normal(2, 3, DIM, seed=9)
    for kind in ("depth", "points"):
        head = dpt(kind)  # type: ignore[arg-type]
        for a, b in zip(head(plain, grid), head(moved, grid), strict=True):
            assert first_changed(a, b) == expected
    tokens = normal(1, 4, DIM)
    other = tokens.clone()
    other[:, latent_frame] += normal(DIM, seed=9)
    for a, b in zip(camera_head()(tokens), camera_head()(other), strict=True):
        assert first_changed(a, b) == expected


def test_doubling_keeps_the_first_frame_single() -> None:
    double = CausalDoubling(4)
    nn.init.zeros_(double.conv.weight)
    assert double.conv.bias is not None
    nn.init.zeros_(double.conv.bias)
    x = torch.arange(3.0).view(1, 1, 3, 1, 1).expand(1, 4, 3, 2, 2)
    assert double(x)[0, 0, :, 0, 0].tolist() == [0, 1, 1, 2, 2]


def test_the_deepest_layer_is_upsampled_most_and_fusion_ends_at_the_finest() -> None:
    head, sizes = dpt(), []
    for module in [*head.resize, *head.fusions]:
        module.register_forward_hook(lambda m, i, out: sizes.append(tuple(out.shape[-2:])))
    grid = (1, 4, 6)
    head(features(grid), grid)
    assert sizes[:4] == [(2, 3), (4, 6), (8, 12), (16, 24)]
    assert sizes[4:] == [(4, 6), (8, 12), (16, 24), (32, 48)]


@pytest.mark.parametrize("layer", range(4))
def test_every_layer_reaches_the_output(layer: int) -> None:
    grid = (2, 2, 3)
    other = features(grid)
    other[layer] = other[layer] + normal(12, DIM, seed=9)
    assert not torch.allclose(dpt()(features(grid), grid)[0], dpt()(other, grid)[0])


@pytest.mark.parametrize(("kind", "channels"), [("depth", 2), ("points", 4)])
def test_outputs_are_activated_as_stated(kind: fw_model.model.heads.OutputKind, channels: int) -> None:
    head, grid = dpt(kind), (1, 1, 1)
    nn.init.zeros_(head.output3.weight)
    raw = torch.tensor([-1.5, 2.0, 0.0, 0.7])[-channels:]
    assert head.output3.bias is not None
    head.output3.bias.data.copy_(raw)
    value, confidence = head(features(grid), grid)
    expected = raw[:1].exp() if kind == "depth" else raw[:3].sign() * (raw[:3].abs().exp() - 1)
    torch.testing.assert_close(value.reshape(16, 16, -1), expected.expand(16, 16, -1))
    torch.testing.assert_close(confidence, torch.full_like(confidence, 1 + float(raw[-1].exp())))


def test_decoding_a_few_frames_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    head, grid = dpt(), (3, 2, 3)
    monkeypatch.setattr(fw_model.model.heads, "FRAMES_PER_CHUNK", 100)
    whole = head(features(grid, batch=2), grid)[0]
    monkeypatch.setattr(fw_model.model.heads, "FRAMES_PER_CHUNK", 2)
    torch.testing.assert_close(head(features(grid, batch=2), grid)[0], whole, rtol=1e-4, atol=1e-5)


def test_outputs_are_float32_and_close_under_bfloat16_autocast() -> None:
    head, grid = dpt(), (2, 2, 3)
    head.reset_output()
    exact = head(features(grid), grid)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = head(features(grid), grid)
        encodings = camera_head()(normal(1, 2, DIM))
    assert {x.dtype for x in [*rounded, *encodings]} == {torch.float32}
    torch.testing.assert_close(rounded[0], exact[0], rtol=0.02, atol=0.02)


def test_coordinates_are_symmetric_and_share_one_scale_between_orientations() -> None:
    wide = coordinate_embedding(8, 4, 6)
    assert wide.shape == (8, 4, 6)
    torch.testing.assert_close(wide[:2], -wide[:2].flip(-1))  # sin x is odd about the centre column
    torch.testing.assert_close(wide[:2], coordinate_embedding(8, 6, 4)[4:6].mT)


# ---- camera head


def test_upsampled_camera_tokens_are_in_time_order() -> None:
    head = camera_head()
    head.norm_in, head.norm = nn.Identity(), nn.Identity()  # type: ignore[assignment]
    for layer in (head.project, head.first):
        nn.init.eye_(layer.weight)
    head.later.weight.data.copy_(torch.eye(DIM).repeat(4, 1))
    head.later.bias.data.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]).repeat_interleave(DIM))
    tokens = torch.arange(4.0).view(1, 4, 1).expand(1, 4, DIM)
    times = head._upsample(tokens)[0, :, 0]
    expected = [0.0] + [f + k / 10 for f in (1, 2, 3) for k in (1, 2, 3, 4)]
    torch.testing.assert_close(times, torch.tensor(expected))


def test_every_upsampled_token_passes_the_norm() -> None:
    tokens = 1000 * normal(2, 3, DIM)
    up = camera_head()._upsample(tokens)
    torch.testing.assert_close(up.square().mean(-1), torch.ones(2, 9), atol=1e-2, rtol=0)


def test_estimates_are_unit_quaternions_and_angles() -> None:
    for encoding in camera_head()(10 * normal(2, 3, DIM)):
        torch.testing.assert_close(encoding[..., 3:7].norm(dim=-1), torch.ones(2, 9))
        assert (encoding[..., 7:] > 0).all()
        assert (encoding[..., 7:] < torch.pi).all()


def test_the_first_estimate_starts_near_the_identity_pose() -> None:
    head = camera_head()
    head.reset_output()
    for encoding in head(normal(1, 3, DIM)):
        expected = torch.tensor([0, 0, 0, 0, 0, 0, 1.0, 1, 1]).expand(1, 9, 9)
        torch.testing.assert_close(encoding, expected, atol=0.15, rtol=0)


def test_each_iteration_reads_the_previous_estimate_detached() -> None:
    head, seen = camera_head(), []
    head.embed.register_forward_pre_hook(lambda m, arguments: seen.append(arguments[0]))
    encodings = head(normal(1, 3, DIM))
    assert not any(x.requires_grad for x in seen)
    torch.testing.assert_close(seen[0], activate(head.start).expand(1, 9, 9))
    for previous, estimate in zip(seen[1:], encodings[:-1], strict=True):
        assert torch.equal(previous, estimate)


def test_frames_of_one_latent_frame_differ() -> None:
    encoding = camera_head()(normal(1, 2, DIM))[-1]
    assert all(not torch.allclose(encoding[:, i], encoding[:, i + 1]) for i in range(1, 4))
