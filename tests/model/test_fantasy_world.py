"""What FantasyWorld promises: stages start where they should, only what should train trains, geometry follows its inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fw_model.config import ModelConfig, Preset, Stage, load_preset
from fw_model.model.backbone import WanBackbone
from fw_model.model.fantasy_world import (
    GEOMETRY_MODULES,
    INTERACTION_MODULES,
    FantasyWorld,
    check_clip_size,
)
from fw_model.train.optimizers import decayed
from tests.helpers.small_model import SMALL_WAN, geometry, inputs, open_gates, run, scalar, small_world

STAGES: list[Stage] = ["stage1", "stage2"]


# ---- where the stages start


def test_stage_2_starts_at_the_bases_velocity_bit_for_bit() -> None:
    world = small_world()
    with torch.no_grad():
        expected = world.base(**inputs(batch=2))
        got = world.set_stage("stage2")(**inputs(batch=2)).velocity
    assert torch.equal(got, expected)


def test_stage_2_starts_at_stage_1s_geometry_bit_for_bit() -> None:
    world = small_world()
    first, second = run(world, "stage1"), run(world, "stage2")
    assert all(torch.equal(a, b) for a, b in zip(geometry(first), geometry(second), strict=True))


def test_stage_1_ignores_trained_camera_adapters_and_cross_attention() -> None:
    world = small_world()
    before = geometry(run(world, "stage1"))
    with torch.no_grad():
        for name in INTERACTION_MODULES:
            for parameter in world.get_submodule(name).parameters():
                parameter.normal_()
    assert all(torch.equal(a, b) for a, b in zip(before, geometry(run(world, "stage1")), strict=True))
    assert not torch.allclose(before[0], run(world, "stage2").depth)


def test_stage_1_never_runs_the_base_past_the_bridge_nor_the_exchange() -> None:
    world, ran = small_world(), []
    for name, module in world.named_modules():
        module.register_forward_hook(lambda m, i, o, name=name: ran.append(name))
    output = world(**inputs())
    blocks = {name for name in ran if name.startswith("base.transformer.blocks.") and name.count(".") == 3}
    assert blocks == {"base.transformer.blocks.0", "base.transformer.blocks.1"}
    assert not [name for name in ran if name.startswith(("base.transformer.proj_out", "interaction", "camera_adapters"))]
    assert output.velocity is None


def test_the_branches_exchange_between_attention_and_feed_forward_of_both() -> None:
    world, ran = small_world().set_stage("stage2"), []
    block, own = world.base.transformer.blocks[3], world.geodit.blocks[1]
    for name, module in (("video attention", block.attn2), ("video feed-forward", block.ffn), ("exchange", world.interaction[1])):
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    for name, module in (("geometry attention", own.global_attention), ("geometry feed-forward", own.ffn)):
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    world(**inputs())
    assert ran.index("exchange") == 2
    assert set(ran[:2]) == {"video attention", "geometry attention"}
    assert set(ran[3:]) == {"video feed-forward", "geometry feed-forward"}


def test_what_a_gamma_of_one_step_adds_is_not_rounded_away_beside_a_bfloat16_base() -> None:
    """At a rate of 1e-5 a gamma is 1e-5 after a step; bfloat16 keeps three digits of the stream it is added to."""
    world, streams = small_world().set_stage("stage2"), []
    world.base.to(torch.bfloat16)
    world.base.transformer.blocks[-1].norm3.register_forward_hook(lambda m, i, out: streams.append(i[0].clone()))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        world(**inputs())
        world.interaction[-1].gamma_video.fill_(1e-5)
        world(**inputs())
    assert ((streams[1] - streams[0]) != 0).float().mean() > 0.5


def test_stage_1_runs_the_base_without_gradients() -> None:
    world, graphs = small_world(), []
    world.base.transformer.blocks[1].register_forward_hook(
        lambda m, i, out: graphs.append((torch.is_grad_enabled(), out.requires_grad))
    )
    world(**inputs())
    world.set_stage("stage2")(**inputs())
    assert graphs == [(False, False), (True, True)]


# ---- what trains


def gradients_and_changes(world: FantasyWorld, steps: int = 3) -> tuple[set[str], set[str]]:
    """Names that received a non-zero gradient, and names whose value changed, over a few optimizer steps."""
    before = {name: p.detach().clone() for name, p in world.named_parameters()}
    optimizer = torch.optim.AdamW(world.trainable_parameters().values(), lr=1e-3, weight_decay=0.0)
    touched: set[str] = set()
    for _ in range(steps):
        scalar(world(**inputs(batch=2), pose_mask=torch.tensor([True, False]))).backward()
        touched |= {name for name, p in world.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
        optimizer.zero_grad()
    return touched, {name for name, p in world.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize(
    ("stage", "train_geometry", "modules"),
    [
        ("stage1", True, GEOMETRY_MODULES),
        ("stage2", True, GEOMETRY_MODULES + INTERACTION_MODULES),
        ("stage2", False, INTERACTION_MODULES),
    ],
)
def test_everything_trainable_learns_and_nothing_frozen_moves(
    stage: Stage, train_geometry: bool, modules: tuple[str, ...]
) -> None:
    world = small_world().set_stage(stage, train_geometry)
    trained = set(world.trainable_parameters())
    assert {name.split(".")[0] for name in trained} == set(modules)
    touched, changed = gradients_and_changes(world)
    assert changed == trained
    assert touched == trained


def test_trainable_parameters_are_all_of_the_named_modules() -> None:
    world = small_world().set_stage("stage2")
    names = [name for name, _ in world.named_parameters() if not name.startswith("base.")]
    assert list(world.trainable_parameters()) == names
    assert list(world.set_stage("stage1").trainable_parameters()) == [
        name for name in names if not name.startswith(INTERACTION_MODULES)
    ]


def test_the_base_stays_in_evaluation_mode() -> None:
    world = small_world().train()
    assert world.geodit.training
    assert not any(module.training for module in world.base.modules())


# ---- sizes


def test_full_size_parameter_totals_are_the_stated_ones() -> None:
    with torch.device("meta"):
        world = FantasyWorld(ModelConfig())

    def total() -> int:
        return sum(p.numel() for p in world.trainable_parameters().values())

    heads = sum(p.numel() for name in ("depth_head", "point_head", "camera_head") for p in world.get_submodule(name).parameters())
    assert heads == pytest.approx(50e6, abs=10e6)
    assert total() == pytest.approx(1.01e9, rel=0.05)
    assert world.set_stage("stage2") is world
    assert total() == pytest.approx(1.23e9, rel=0.05)
    world.set_stage("stage2", train_geometry=False)
    assert total() == 191_296_512 + 28_329_984


@pytest.mark.parametrize(("height", "width"), [(32, 48), (48, 32), (16, 16), (48, 80)])
def test_outputs_have_the_videos_size_in_both_orientations(height: int, width: int) -> None:
    world = small_world().set_stage("stage2")
    with torch.no_grad():
        output = world(**inputs(batch=2, frames=2, height=height, width=width))
    assert output.velocity is not None
    assert output.velocity.shape == (2, 16, 2, height // 8, width // 8)
    assert output.depth.shape == output.depth_conf.shape == output.points_conf.shape == (2, 5, height, width)
    assert output.points.shape == (2, 5, height, width, 3)
    assert [x.shape for x in output.pose_encodings] == [(2, 5, 9)] * 4
    assert (output.depth > 0).all()
    assert (output.depth_conf > 1).all()


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_latent_frames_give_four_times_as_many_video_frames_less_three(frames: int) -> None:
    with torch.no_grad():
        assert small_world()(**inputs(frames=frames)).depth.shape[1] == 4 * (frames - 1) + 1


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ((80, 336, 592), "nearest: 77 or 81"),
        ((0, 336, 592), "nearest: 1 or 5"),
        ((81, 330, 592), "height 330.*nearest: 320 or 336"),
        ((81, 336, 600), "width 600.*nearest: 592 or 608"),
        ((81, 8, 592), "height 8.*nearest: 16"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_the_nearest_that_do(size: tuple[int, int, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_clip_size(*size)


def test_odd_latents_are_refused_by_the_model_itself() -> None:
    with pytest.raises(ValueError, match=r"height 40.*nearest: 32 or 48"):
        small_world()(**{**inputs(), "latents": torch.zeros(1, 16, 3, 5, 6), "image_latents": torch.zeros(1, 16, 3, 5, 6)})


# ---- the same numbers however it is run


@pytest.mark.parametrize("stage", STAGES)
def test_two_clips_together_equal_each_alone(stage: Stage) -> None:
    world = open_gates(small_world()).set_stage(stage)
    both, mask = inputs(batch=2), torch.tensor([True, False])
    with torch.no_grad():
        together = world(**both, pose_mask=mask)
        for i in range(2):
            alone = world(**{name: x[i : i + 1] for name, x in both.items()}, pose_mask=mask[i : i + 1])
            for a, b in zip(geometry(together), geometry(alone), strict=True):
                torch.testing.assert_close(a[i : i + 1], b, atol=2e-4, rtol=2e-4)
            if together.velocity is not None:
                torch.testing.assert_close(together.velocity[i : i + 1], alone.velocity, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_gradient_checkpointing_gives_the_same_gradients(stage: Stage) -> None:
    found = []
    for enabled in (False, True):
        world = open_gates(small_world()).set_stage(stage)
        world.enable_gradient_checkpointing(enabled)
        scalar(world(**inputs())).backward()
        found.append({name: p.grad for name, p in world.trainable_parameters().items()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_gradient_checkpointing_keeps_less_for_the_backward_pass() -> None:
    saved = []
    for enabled in (False, True):
        world = small_world().set_stage("stage2")
        world.enable_gradient_checkpointing(enabled)
        kept: dict[int, int] = {}

        def pack(x: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            world(**inputs())
        saved.append(sum(kept.values()))
    assert saved[1] < 0.5 * saved[0]


@pytest.mark.parametrize("mode", ["autocast", "base", "whole"])
@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_stays_close_to_float32_and_geometry_stays_float32(stage: Stage, mode: str) -> None:
    """Autocast as in training; a bf16 base under float32 trainables; everything in bf16 as for inference."""
    world = open_gates(small_world())
    exact = run(world, stage)
    if mode != "autocast":
        (world if mode == "whole" else world.base).to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
        rounded = run(world, stage)
    assert {x.dtype for x in geometry(rounded)} == {torch.float32}
    for a, b in zip(geometry(rounded), geometry(exact), strict=True):
        assert (a - b).norm() < 0.15 * b.norm()
    if exact.velocity is not None and rounded.velocity is not None:
        assert (rounded.velocity.float() - exact.velocity).norm() < 0.1 * exact.velocity.norm()


def test_training_under_autocast_with_a_bfloat16_base_gives_float32_gradients() -> None:
    world = small_world().set_stage("stage2")
    world.base.to(torch.bfloat16)
    world.enable_gradient_checkpointing()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scalar(world(**inputs())).backward()
    gradients = [p.grad for p in world.trainable_parameters().values() if p.grad is not None]
    assert {g.dtype for g in gradients} == {torch.float32}
    assert all(g.isfinite().all() for g in gradients)


# ---- starting weights


@pytest.fixture(scope="module")
def tiny() -> Preset:
    return load_preset("tiny")


def test_the_same_preset_gives_the_same_weights_and_leaves_the_random_state_alone(tiny: Preset) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = FantasyWorld.from_preset(tiny).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = FantasyWorld.from_preset(tiny).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_seed_of_the_base_gives_another_base_and_of_the_stage_other_new_weights(tiny: Preset) -> None:
    def seeded(base: int = 0, stage1: int = 0, stage2: int = 0) -> Preset:
        return load_preset("tiny", [f"base.seed={base}", f"stage1.seed={stage1}", f"stage2.seed={stage2}"])

    first = FantasyWorld.from_preset(tiny).state_dict()
    base, stage, other = (FantasyWorld.from_preset(p).state_dict() for p in (seeded(base=1), seeded(1, 1), seeded(stage2=1)))
    assert not torch.equal(first["base.transformer.proj_out.weight"], base["base.transformer.proj_out.weight"])
    for name in ("bridge.layers.0.ffn.0.weight", "tokens.camera"):
        assert torch.equal(first[name], base[name])
        assert not torch.equal(first[name], stage[name])
        assert torch.equal(first[name], other[name])
    second = FantasyWorld.from_preset(seeded(stage2=1), "stage2").state_dict()
    assert not torch.equal(first["interaction.0.q.weight"], second["interaction.0.q.weight"])


def test_only_matrices_of_layers_are_decayed() -> None:
    world = small_world().set_stage("stage2")
    kept = {name for name, p in world.trainable_parameters().items() if not decayed(name, p)}
    tables = {"tokens.camera", "tokens.registers", *(f"geodit.blocks.{i}.modulation" for i in range(4))}
    assert tables <= kept
    assert {name for name in kept if world.get_parameter(name).ndim >= 2} == tables
    assert "geodit.blocks.0.ffn.0.weight" not in kept


def test_every_new_weight_is_given_a_starting_value() -> None:
    world = small_world()
    with torch.no_grad():
        for name in GEOMETRY_MODULES + INTERACTION_MODULES:
            for parameter in world.get_submodule(name).parameters():
                parameter.fill_(torch.nan)
    world.initialise(seed=0)
    assert [name for name, p in world.named_parameters() if not p.isfinite().all()] == []


def test_a_preset_with_a_published_base_loads_it(tiny: Preset, tmp_path: Any) -> None:
    from safetensors.torch import save_file

    made = WanBackbone.seeded(tiny.model.wan, seed=5)
    keys = made.original_keys()
    save_file({keys[own]: x.bfloat16() for own, x in made.state_dict().items()}, tmp_path / "base.safetensors")
    weights = tiny.base.model_copy(update={"source": "hub", "repo": str(tmp_path)})
    world = FantasyWorld.from_preset(tiny.model_copy(update={"base": weights}))
    assert {p.dtype for p in world.base.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in world.trainable_parameters().values()} == {torch.float32}
    pcb = tiny.model.geometry.pcb_blocks
    copied = made.transformer.blocks[pcb].attn1.to_q.weight.bfloat16().float()
    assert torch.equal(world.geodit.blocks[0].global_attention.q.weight, copied)


def test_the_small_model_has_every_part_of_the_real_one() -> None:
    with torch.device("meta"):
        real = {name.split(".")[0] for name, _ in FantasyWorld(ModelConfig()).named_parameters()}
    assert real == {name.split(".")[0] for name, _ in small_world().named_parameters()}
    assert SMALL_WAN.in_dim == ModelConfig().wan.in_dim
