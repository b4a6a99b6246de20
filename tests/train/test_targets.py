"""What the geometry branch should give: a clip's own depth, points on their pixels, its cameras, and where it counts."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import torch

from fw_model.cameras import decode_pose, project, relative_to_first
from fw_model.data.schema import Batch
from fw_model.train.losses import geometry_losses, make_targets, total_loss
from tests.helpers.poses import pinhole, random_poses


def made_batch() -> Batch:
    w2c = relative_to_first(random_poses(10).view(2, 5, 3, 4)).float()
    depth = 1 + torch.rand(2, 5, 32, 48)
    depth[:, :, :4] = 0
    return Batch(
        clip_ids=["a", "b"],
        latents=torch.zeros(2, 16, 2, 4, 6),
        text=torch.zeros(2, 3, 4),
        image=torch.zeros(2, 3, 4),
        depth=depth,
        intrinsics=pinhole(10).view(2, 5, 3, 3).float(),
        w2c=w2c,
    )


def test_target_points_project_onto_their_pixels() -> None:
    batch = made_batch()
    targets = make_targets(batch)
    pixels, z = project(targets.points.flatten(2, 3), batch.intrinsics, batch.w2c)
    torch.testing.assert_close(z.view_as(batch.depth), batch.depth, atol=1e-4, rtol=1e-4)
    u = pixels.view(2, 5, 32, 48, 2)[..., 0]
    expected = (torch.arange(48) + 0.5).expand_as(u)
    torch.testing.assert_close(u[batch.valid], expected[batch.valid], atol=1e-2, rtol=0)


def test_target_pose_decodes_to_the_clips_cameras_and_starts_at_the_identity() -> None:
    batch = made_batch()
    targets = make_targets(batch)
    w2c, intrinsics = decode_pose(targets.pose_encoding, 32, 48)
    torch.testing.assert_close(w2c, batch.w2c, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(intrinsics, batch.intrinsics, atol=1e-3, rtol=1e-5)
    assert torch.equal(targets.pose_encoding[:, 0, :7], torch.tensor([0, 0, 0, 0, 0, 0, 1.0]).expand(2, 7))


def test_targets_are_not_rescaled() -> None:
    batch = made_batch()
    assert torch.equal(make_targets(batch).depth, batch.depth)


def test_excluded_moving_things_get_a_gradient_of_exactly_zero() -> None:
    batch = made_batch()
    g = torch.Generator().manual_seed(1)
    batch = replace(batch, dynamic=torch.rand(batch.depth.shape, generator=g) < 0.3)
    dense = {
        name: torch.rand(*batch.depth.shape, *last, generator=g).add_(1.0).requires_grad_()
        for name, last in (("depth", ()), ("depth_conf", ()), ("points", (3,)), ("points_conf", ()))
    }
    pose = torch.zeros(2, 5, 9)
    for choice in ("keep", "exclude"):
        output = SimpleNamespace(**dense, pose_encodings=[pose])
        total_loss(geometry_losses(output, make_targets(batch, choice))).backward()
        touched = {name: bool(tensor.grad[batch.dynamic].any()) for name, tensor in dense.items()}
        assert set(touched.values()) == {choice == "keep"}
        assert all(tensor.grad[~batch.dynamic & batch.valid].any() for tensor in dense.values())
        for tensor in dense.values():
            tensor.grad = None
    still = replace(batch, dynamic=None)
    assert torch.equal(make_targets(still, "exclude").valid, still.valid)
    assert batch.to("cpu").dynamic.dtype == torch.bool
