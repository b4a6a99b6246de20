"""Losses against plain loops in numpy, their masks, their gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fw_model.train import losses as losses_module
from fw_model.train.losses import (
    Targets,
    camera_loss,
    depth_error,
    depth_loss,
    geometry_losses,
    point_loss,
    total_loss,
)

B, T, H, W = 2, 4, 5, 6


@dataclass
class Output:
    depth: Tensor
    depth_conf: Tensor
    points: Tensor
    points_conf: Tensor
    pose_encodings: list[Tensor]


def random_case(seed: int = 0, dtype: torch.dtype = torch.float64, share: float = 0.7) -> tuple[Output, Targets]:
    """Predictions near targets; the target moves slowly in places and jumps in others."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    depth = 1 + 2 * rand(B, 1, H, W) + 0.2 * rand(B, T, H, W)
    points = rand(B, T, H, W, 3)
    quaternion = torch.nn.functional.normalize(rand(B, T, 4) - 0.5, dim=-1)
    quaternion = torch.where(quaternion[..., 3:] < 0, -quaternion, quaternion)
    pose = torch.cat([rand(B, T, 3), quaternion, 1 + rand(B, T, 2)], dim=-1)
    output = Output(
        depth=depth + 0.3 * rand(B, T, H, W),
        depth_conf=1 + rand(B, T, H, W),
        points=points + rand(B, T, H, W, 3) - 0.5,
        points_conf=1 + rand(B, T, H, W),
        pose_encodings=[pose + 3 * (rand(B, T, 9) - 0.5) for _ in range(4)],
    )
    targets = Targets(depth, rand(B, T, H, W) < share, points, pose)
    move = {k: v.to(dtype) if isinstance(v, Tensor) else [p.to(dtype) for p in v] for k, v in vars(output).items()}
    kept = {k: v.to(dtype) if v.is_floating_point() else v for k, v in vars(targets).items()}
    return Output(**move), Targets(**kept)


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def nearest_rank(values: np.ndarray, share: float) -> float:
    return float(np.sort(values)[round(share * (values.size - 1))])


def flicker_by_loops(p: np.ndarray, d: np.ndarray, valid: np.ndarray) -> list[float]:
    clips = []
    for b in range(len(d)):
        seen = d[b][valid[b]]
        reach = 0.05 * (nearest_rank(seen, 0.98) - nearest_rank(seen, 0.02)) if seen.size else 0.0
        change = []
        for t, v, u in np.ndindex(T - 1, H, W):
            moved = d[b, t + 1, v, u] - d[b, t, v, u]
            if valid[b, t, v, u] and valid[b, t + 1, v, u] and abs(moved) < reach:
                change.append(abs(p[b, t + 1, v, u] - p[b, t, v, u] - moved))
        clips.append(mean(change))
    return clips


def depth_error_by_loops(p: np.ndarray, d: np.ndarray, valid: np.ndarray) -> float:
    level = [mean([abs(p[i] - d[i]) for i in np.ndindex(d.shape) if i[0] == b and valid[i]]) for b in range(len(d))]
    return mean(level) + mean(flicker_by_loops(p, d, valid))


def points_by_loops(p: np.ndarray, conf: np.ndarray, g: np.ndarray, valid: np.ndarray) -> float:
    clips = []
    for b in range(len(g)):
        level, across, down = [], [], []
        for t, v, u in np.ndindex(T, H, W):
            if not valid[b, t, v, u]:
                continue
            c = conf[b, t, v, u]
            level.append(c * np.linalg.norm(p[b, t, v, u] - g[b, t, v, u]) - 0.2 * math.log(c))
            for other, terms in (((b, t, v, u + 1), across), ((b, t, v + 1, u), down)):
                if other[2] < H and other[3] < W and valid[other]:
                    grad_p, grad_g = p[other] - p[b, t, v, u], g[other] - g[b, t, v, u]
                    terms.append(c * np.linalg.norm(grad_p - grad_g))
        clips.append(mean(level) + mean(across) + mean(down))
    return mean(clips)


def cameras_by_loops(predicted: list[np.ndarray], target: np.ndarray) -> float:
    total = 0.0
    for k, encoding in enumerate(predicted):
        terms = []
        for b, t in np.ndindex(target.shape[:2]):
            e = encoding[b, t].copy()
            if e[3:7] @ target[b, t, 3:7] < 0:
                e[3:7] *= -1
            x = np.abs(e - target[b, t])
            terms.append(mean(list(x[:3])) + mean(list(x[3:7])) + 0.5 * mean(list(x[7:])))
        total += 0.6 ** (3 - k) * mean(terms)
    return total


@pytest.mark.parametrize("seed", range(3))
def test_losses_are_what_plain_loops_give(seed: int) -> None:
    output, targets = random_case(seed)
    losses = geometry_losses(output, targets)
    valid = targets.valid.numpy()
    depth, target, confidence = output.depth.numpy(), targets.depth.numpy(), output.depth_conf.numpy()
    weighted = points_by_loops(depth[..., None], confidence, target[..., None], valid)
    assert losses["depth_loss"].item() == pytest.approx(weighted + mean(flicker_by_loops(depth, target, valid)))
    assert losses["depth_error"].item() == pytest.approx(depth_error_by_loops(depth, target, valid))
    by_loops = points_by_loops(output.points.numpy(), output.points_conf.numpy(), targets.points.numpy(), valid)
    assert losses["point_loss"].item() == pytest.approx(by_loops)
    predicted = [p.numpy() for p in output.pose_encodings]
    assert losses["camera_loss"].item() == pytest.approx(cameras_by_loops(predicted, targets.pose_encoding.numpy()))


def test_geometry_loss_weighs_the_camera() -> None:
    parts = {"depth_loss": torch.tensor(1.0), "point_loss": torch.tensor(2.0), "camera_loss": torch.tensor(4.0)}
    assert total_loss(parts).item() == 15
    assert total_loss(parts, camera_weight=0.5).item() == 5
    assert total_loss({**parts, "diffusion_loss": torch.tensor(8.0)}, geometry_weight=2.0).item() == 38


def test_exact_predictions_cost_nothing_but_the_confidence_term() -> None:
    _, targets = random_case()
    confidence = torch.full_like(targets.depth, 3.0)
    output = Output(targets.depth, confidence, targets.points, confidence, [targets.pose_encoding] * 4)
    losses = geometry_losses(output, targets)
    assert losses["depth_error"] == 0
    assert losses["depth_loss"].item() == pytest.approx(-0.2 * math.log(3))
    assert losses["camera_loss"] == 0
    assert losses["point_loss"].item() == pytest.approx(-0.2 * math.log(3))


def test_gradients_are_finite_at_exact_predictions() -> None:
    _, targets = random_case()
    leaves = [targets.depth.clone(), targets.points.clone(), torch.ones_like(targets.depth), targets.pose_encoding.clone()]
    depth, points, confidence, pose = (leaf.requires_grad_() for leaf in leaves)
    total_loss(geometry_losses(Output(depth, confidence, points, confidence, [pose]), targets)).backward()
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves)


@pytest.mark.parametrize("rubbish", [math.nan, math.inf, 1e30])
def test_invalid_pixels_have_no_say(rubbish: float) -> None:
    output, targets = random_case()
    clean = geometry_losses(output, targets)
    hole = ~targets.valid
    dirty = {
        "depth": output.depth.masked_fill(hole, rubbish).requires_grad_(),
        "depth_conf": output.depth_conf.masked_fill(hole, rubbish).requires_grad_(),
        "points": output.points.masked_fill(hole[..., None], rubbish).requires_grad_(),
        "points_conf": output.points_conf.masked_fill(hole, rubbish).requires_grad_(),
    }
    spoilt = replace(
        targets, depth=targets.depth.masked_fill(hole, rubbish), points=targets.points.masked_fill(hole[..., None], rubbish)
    )
    losses = geometry_losses(Output(**dirty, pose_encodings=output.pose_encodings), spoilt)
    for name, value in clean.items():
        torch.testing.assert_close(losses[name], value)
    total_loss(losses).backward()
    for tensor in dirty.values():
        assert torch.isfinite(tensor.grad).all()
        assert (tensor.grad[hole] == 0).all()


def test_empty_masks_give_zero_and_finite_gradients() -> None:
    output, targets = random_case()
    targets = replace(targets, valid=torch.zeros_like(targets.valid))
    leaves = [value.requires_grad_() for value in vars(output).values() if isinstance(value, Tensor)]
    losses = geometry_losses(output, targets)
    assert losses["depth_loss"] == 0
    assert losses["point_loss"] == 0
    total_loss(losses).backward()
    assert all((leaf.grad == 0).all() for leaf in leaves)


def test_the_point_loss_is_the_same_in_pieces_of_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    output, targets = random_case()
    found = []
    for frames in (T, 3, 1):
        monkeypatch.setattr(losses_module, "FRAMES_AT_ONCE", frames)
        points, confidence = output.points.clone().requires_grad_(), output.points_conf.clone().requires_grad_()
        loss = point_loss(points, confidence, targets.points, targets.valid)
        loss.backward()
        found.append((loss.detach(), points.grad, confidence.grad))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_losses_keep_no_more_for_the_backward_pass_than_what_they_compare() -> None:
    """They stand at a step's peak of memory: at 81 x 336 x 592 one more array as large as the points is 193 MB."""
    output, targets = random_case(dtype=torch.float32)
    predicted = {name: value.requires_grad_() for name, value in vars(output).items() if isinstance(value, Tensor)}
    compared = {x.untyped_storage().data_ptr() for x in (*predicted.values(), targets.depth, targets.points, targets.valid)}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        losses = geometry_losses(output, targets)
    assert total_loss(losses).isfinite()
    own = sum(size for place, size in kept.items() if place not in compared)
    assert own < 2 * targets.depth[0, 0].nbytes * T * B


def test_a_clip_without_valid_pixels_leaves_the_other_clips_share() -> None:
    output, targets = random_case()
    targets.valid[1] = False
    both = geometry_losses(output, targets)
    alone = depth_loss(output.depth[:1], output.depth_conf[:1], targets.depth[:1], targets.valid[:1])
    assert both["depth_loss"].item() == pytest.approx(alone.item() / 2)


def test_batch_loss_is_the_mean_of_its_clips() -> None:
    """So that accumulating micro-batches gives the gradient of the whole batch, however full their masks are."""
    output, targets = random_case()
    targets.valid[0, :, :3] = False
    whole = geometry_losses(output, targets)
    parts = [
        geometry_losses(
            Output(
                *(value[i] for value in vars(output).values() if isinstance(value, Tensor)),
                [p[i] for p in output.pose_encodings],
            ),
            Targets(*(value[i] for value in vars(targets).values())),
        )
        for i in (slice(0, 1), slice(1, 2))
    ]
    for name, value in whole.items():
        torch.testing.assert_close(value, (parts[0][name] + parts[1][name]) / 2)


def test_depth_loss_is_sensitive_to_scale() -> None:
    _, targets = random_case()
    assert depth_error(2 * targets.depth, targets.depth, targets.valid) > 0.5


def test_temporal_term_sees_flicker_only_where_the_target_is_still() -> None:
    target = torch.ones(1, 2, 1, 4, dtype=torch.float64)
    target[0, :, 0, 3] = torch.tensor([1.0, 2.0])  # jumps by the whole range
    predicted = target + torch.tensor([0.1, -0.1]).view(1, 2, 1, 1)
    everywhere = torch.ones_like(target, dtype=torch.bool)
    assert depth_error(predicted, target, everywhere).item() == pytest.approx(0.1 + 0.2)
    wrong_jump = target.clone()
    wrong_jump[0, 1, 0, 3] = 5.0
    assert depth_error(wrong_jump, target, everywhere).item() == pytest.approx(3 / 8)  # L1 alone


def test_one_far_pixel_does_not_make_everything_still() -> None:
    """At 60 times the depth of all others, 5 % of the range between the extremes would be 3: no motion is as large."""
    target = torch.ones(1, 2, 10, 10, dtype=torch.float64) + torch.linspace(0, 1, 10, dtype=torch.float64)
    target[0, 1] += 0.5  # the whole picture moves by half its range
    predicted = target + torch.tensor([0.1, -0.1], dtype=torch.float64).view(1, 2, 1, 1)
    everywhere = torch.ones_like(target, dtype=torch.bool)
    assert depth_error(predicted, target, everywhere).item() == pytest.approx(0.1)
    target[0, :, 0, 0], predicted[0, :, 0, 0] = 60.0, 60.1
    assert depth_error(predicted, target, everywhere).item() == pytest.approx(0.1, abs=0.01)  # and the far pixel is still


def test_depth_confidence_is_trained_towards_the_error() -> None:
    """The best confidence is 0.2 / error: certain pixels gain by more of it, wrong ones by less."""
    output, targets = random_case()
    output.depth = targets.depth.clone()
    output.depth[..., 0] += 1.0
    confidence = output.depth_conf.clone().requires_grad_()
    geometry_losses(replace(output, depth_conf=confidence), targets)["depth_loss"].backward()
    valid = targets.valid
    assert (confidence.grad[..., 2:][valid[..., 2:]] < 0).all()
    assert (confidence.grad[..., 0][valid[..., 0]] > 0).all()


def test_a_constant_camera_does_not_meet_the_guides_bar_on_a_clip_that_turns() -> None:
    """5 degrees and 10 % of translation cost 0.0005 by Huber, which any constant met."""
    target = torch.zeros(1, 9, 9)
    half = torch.linspace(0, math.radians(20) / 2, 9)
    target[0, :, 0], target[0, :, 4], target[0, :, 6], target[..., 7:] = torch.linspace(0, 0.3, 9), half.sin(), half.cos(), 1.0
    constant = torch.tensor([0, 0, 0, 0, 0, 0, 1.0, 1.0, 1.0]).expand(1, 9, 9)
    assert camera_loss([constant] * 4, target) > 0.05
    assert (constant - target).square().mean() * 0.5 * 2.176 < 0.05


def test_trimming_leaves_out_the_largest_errors_and_hides_no_broken_ones() -> None:
    output, targets = random_case(share=1.1)
    spoilt = output.depth.clone()
    spoilt[:, :, 0, 0] = 1e6  # 1 pixel of 30
    confidence, target = output.depth_conf, targets.depth
    whole, trimmed = (point_loss(spoilt[..., None], confidence, target[..., None], targets.valid, q) for q in (1.0, 0.96))
    assert whole > 1e4
    assert trimmed < 2
    for broken in (math.nan, math.inf):
        spoilt[0, 0, 0, 0] = broken
        assert not depth_loss(spoilt, confidence, target, targets.valid, 0.96).isfinite()


def test_opposite_quaternions_cost_the_same() -> None:
    output, targets = random_case()
    flipped = [p.clone() for p in output.pose_encodings]
    for p in flipped:
        p[..., 3:7] *= -1
    a, b = camera_loss(output.pose_encodings, targets.pose_encoding), camera_loss(flipped, targets.pose_encoding)
    torch.testing.assert_close(a, b)


def test_later_refinements_weigh_more() -> None:
    _, targets = random_case()
    exact, off = targets.pose_encoding, targets.pose_encoding + 0.1
    costs = [camera_loss([off if k == i else exact for k in range(4)], exact).item() for i in range(4)]
    assert costs == pytest.approx([costs[3] * 0.6 ** (3 - i) for i in range(4)])
    assert costs[3] == pytest.approx(2.5 * 0.1)  # translation, rotation, half the field of view


@pytest.mark.parametrize("which", ["depth", "depth_conf", "points", "points_conf", "pose"])
def test_gradients_agree_with_finite_differences(which: str) -> None:
    output, targets = random_case(3)
    leaf = output.pose_encodings[1] if which == "pose" else getattr(output, which)

    def loss_of(x: Tensor) -> Tensor:
        changed = replace(output, **({which: x} if which != "pose" else {"pose_encodings": [*output.pose_encodings[:1], x]}))
        return total_loss(geometry_losses(changed, targets))

    assert torch.autograd.gradcheck(loss_of, (leaf.clone().requires_grad_(),), eps=1e-6, atol=1e-6)


def test_losses_are_float32_under_autocast_and_from_half_precision() -> None:
    output, targets = random_case(dtype=torch.float32)
    exact = geometry_losses(output, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = geometry_losses(output, targets)
    half = replace(output, depth=output.depth.bfloat16(), pose_encodings=[p.bfloat16() for p in output.pose_encodings])
    for losses in (under, geometry_losses(half, targets)):
        assert all(value.dtype == torch.float32 for value in losses.values())
    for name, value in exact.items():
        assert torch.equal(under[name], value)


def test_a_prediction_of_another_shape_is_refused() -> None:
    output, targets = random_case()
    with pytest.raises(ValueError, match=r"points_conf: predicted"):
        geometry_losses(replace(output, points_conf=output.points_conf[:, :1]), targets)
