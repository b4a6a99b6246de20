"""What FantasyWorld's parts hear of each other: every input and branch that should move an output does, no other does."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fw_model.config import Stage
from fw_model.model.fantasy_world import (
    FantasyWorldOutput,
)
from tests.helpers.small_model import SMALL, geometry, inputs, open_gates, run, small_world


def changed(before: FantasyWorldOutput, after: FantasyWorldOutput) -> dict[str, bool]:
    pairs = {
        field.name: (getattr(before, field.name), getattr(after, field.name))
        for field in dataclasses.fields(before)
        if field.name != "pose_encodings" and before.velocity is not None
    }
    pairs["pose"] = (before.pose_encodings[-1], after.pose_encodings[-1])
    return {name: not torch.allclose(a, b, atol=1e-6) for name, (a, b) in pairs.items()}


def test_the_bridge_is_called() -> None:
    world = small_world()
    before = run(world, "stage1")
    with torch.no_grad():
        world.bridge.layers[1].ffn[2].bias.normal_()
    assert not torch.allclose(before.depth, run(world, "stage1").depth)


def test_every_geometry_layer_reaches_depth_points_and_poses() -> None:
    for i in range(SMALL.num_geodit):
        world = small_world()
        before = run(world, "stage2")
        with torch.no_grad():
            world.geodit.blocks[i].ffn[2].bias.normal_(std=10.0)
        after = changed(before, run(world, "stage2"))
        assert after["depth"]
        assert after["points"]
        assert after["pose"]


def test_the_camera_head_reads_the_camera_token_of_every_latent_frame() -> None:
    world, seen = small_world(), {}
    world.geodit.blocks[-1].register_forward_hook(lambda m, i, out: seen.update(tokens=out))
    world.camera_head.register_forward_pre_hook(lambda m, i: seen.update(read=i[0]))
    run(world, "stage1")
    assert torch.equal(seen["read"], seen["tokens"].unflatten(1, (3, -1))[:, :, 0])


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_clip_whose_camera_is_masked_runs_as_without_one(stage: Stage) -> None:
    world = open_gates(small_world()).set_stage(stage)
    both = inputs(batch=2)
    with torch.no_grad():
        masked = world(**both, camera_mask=torch.tensor([True, False]))
        given, without = world(**both), world(**{**both, "camera": None})
    for got, first, second in zip(geometry(masked), geometry(given), geometry(without), strict=True):
        torch.testing.assert_close(got[0], first[0], atol=2e-4, rtol=2e-4)
        torch.testing.assert_close(got[1], second[1], atol=2e-4, rtol=2e-4)
        assert not torch.allclose(got[1], first[1], atol=1e-3)


def test_hidden_poses_do_not_reach_the_geometry_and_visible_ones_do() -> None:
    """Only the pose encoder's way is looked at: the base's own control adapter sees the same camera in all runs."""
    world = open_gates(small_world())
    hidden, visible = torch.tensor([False]), torch.tensor([True])
    before_hidden, before_visible = (run(world, "stage1", pose_mask=m) for m in (hidden, visible))
    assert torch.equal(run(world, "stage1").depth, before_visible.depth)
    with torch.no_grad():
        world.pose_encoder.up.weight.mul_(-1)
    after_hidden, after_visible = (run(world, "stage1", pose_mask=m) for m in (hidden, visible))
    assert all(torch.equal(a, b) for a, b in zip(geometry(before_hidden), geometry(after_hidden), strict=True))
    assert not any(torch.allclose(a, b) for a, b in zip(geometry(before_visible), geometry(after_visible), strict=True))


def test_poses_reach_the_camera_adapters_even_when_hidden_from_the_geometry() -> None:
    world = small_world()
    with torch.no_grad():
        for adapter in world.camera_adapters:
            adapter.linear.weight.normal_()
        world.base.control_adapter.conv.weight.zero_()
    hidden = torch.tensor([False])
    before = run(world, "stage2", pose_mask=hidden)
    after = run(world, "stage2", pose_mask=hidden, camera=-inputs()["camera"])
    assert changed(before, after)["velocity"]


@pytest.mark.parametrize("index", [0, 1])
def test_each_preconditioning_block_has_its_camera_adapter(index: int) -> None:
    world = small_world()
    before = run(world, "stage2")
    with torch.no_grad():
        world.camera_adapters[index].linear.bias.normal_()
    assert all(changed(before, run(world, "stage2")).values())


def test_geometry_influences_the_video_and_the_video_the_geometry_through_the_exchange_alone() -> None:
    for gamma, moved in (("gamma_video", "velocity"), ("gamma_geometry", "depth")):
        world = small_world()
        before = run(world, "stage2")
        with torch.no_grad():  # the last pair: its exchange comes after the blocks, so it must still count
            getattr(world.interaction[-1], gamma).normal_()
        after = changed(before, run(world, "stage2"))
        assert after["velocity"] == (moved == "velocity")
        assert after["depth"] == (moved == "depth")


def test_geometry_follows_the_timestep() -> None:
    world = small_world()
    assert not torch.allclose(run(world, "stage1").depth, run(world, "stage1", timestep=torch.tensor([100.0])).depth)


def test_no_camera_is_allowed() -> None:
    world = open_gates(small_world())
    output = run(world, "stage2", camera=None)
    assert output.depth.isfinite().all()
    assert not torch.allclose(output.depth, run(world, "stage2").depth)
