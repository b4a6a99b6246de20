"""What is said about a model before it is trained: parameters, shapes, FLOPs, and a memory plan that measurement agrees with."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from fw_model.config import GeometryConfig, ModelConfig, Stage, WanConfig, load_preset
from fw_model.describe import __main__ as describe
from fw_model.describe import full_size, memory_plan
from fw_model.describe.full_size import AdamWInBackward
from fw_model.describe.memory_plan import choose_optimizer, encoder_bytes, make_plans, static_bytes
from fw_model.describe.step_trace import (
    ClipSize,
    StepTrace,
    compute_in_float32,
    float32_of_cuda,
    measured_peak,
    step_inputs,
    trace_step,
)
from fw_model.model.backbone import WanBackbone
from fw_model.model.fantasy_world import FantasyWorld
from fw_model.train.flow import diffusion_loss
from fw_model.train.losses import geometry_losses, total_loss
from fw_model.train.optimizers import make_optimizer
from tests.helpers.small_model import SMALL, inputs, small_world

# The full model's proportions at a quarter of its width and a third of its depth.
MIDDLE = ModelConfig(
    wan=WanConfig(dim=384, ffn_dim=2240, num_layers=10, text_dim=64, image_dim=64, image_tokens=17, text_len=32),
    geometry=GeometryConfig(
        pcb_blocks=4,
        head_layers=(2, 3, 4, 6),
        head_channels=(64, 64, 48, 24),
        head_features=64,
        camera_dim=128,
        pose_rank=32,
        cross_dim=288,
    ),
)
GIB = memory_plan.GIB


@pytest.fixture(scope="module")
def counts() -> dict[str, int]:
    return describe.count_parameters(ModelConfig())


def test_totals_are_within_5_percent_of_the_stated_ones(counts: dict[str, int]) -> None:
    assert counts["stage 1 total"] == pytest.approx(1.01e9, rel=0.05)
    assert counts["stage 2 total"] == pytest.approx(1.23e9, rel=0.05)
    assert counts["base (frozen)"] == 1_616_313_152


def test_rows_add_up_to_the_totals(counts: dict[str, int]) -> None:
    later = counts["camera adapters (stage 2)"] + counts["IRG cross-attention (stage 2)"]
    totals = {"base (frozen)", "stage 1 total", "stage 2 total"}
    assert sum(count for row, count in counts.items() if row not in totals) == counts["stage 2 total"]
    assert counts["stage 1 total"] + later == counts["stage 2 total"]


def test_shapes_are_those_of_the_documented_clip_in_both_orientations() -> None:
    landscape = describe.tensor_shapes(ModelConfig(), ClipSize(81, 336, 592))
    portrait = describe.tensor_shapes(ModelConfig(), ClipSize(81, 592, 336))
    assert landscape["latents"] == [1, 16, 21, 42, 74]
    assert landscape["video tokens"] == portrait["video tokens"] == [1, 16_317, 1536]
    assert landscape["geometry tokens"] == [1, 16_422, 1536]
    assert portrait["points"] == [1, 81, 592, 336, 3]


def test_json_holds_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert describe.main(["--preset", "tiny", "--json", "--gpus", "2", "--gpu-memory", "8"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"preset", "parameters", "shapes", "flops", "memory"}
    assert set(found["parameters"]) == set(describe.ROWS)
    assert set(found["shapes"]) == {"17x64x112", "17x112x64"}
    for stage in ("stage1", "stage2"):
        assert 0 < found["flops"][stage]["forward_per_clip"] < found["flops"][stage]["step_per_clip"]
        assert found["memory"]["plans"][stage][0]["batch_per_gpu"] == 1  # a global batch of 2 on 2 GPUs
        assert found["memory"]["plans"][stage][0]["fits"]


def test_gpus_that_do_not_divide_the_batch_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert describe.main(["--preset", "tiny", "--gpus", "3"]) == 1
    assert "choose a divisor" in capsys.readouterr().err


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(("name", "stage"), [("tiny", "stage1"), ("tiny", "stage2"), ("middle", "stage2")])
def test_traced_peak_is_the_measured_one_within_20_percent(name: str, stage: Stage, checkpointing: bool) -> None:
    """Measured: every allocation and release that torch's own CPU allocator reports while a real step runs.

    Deterministic, unlike resident memory, and it counts what kernels allocate inside, which the trace cannot see.
    """
    config = load_preset("tiny").model if name == "tiny" else MIDDLE
    size = ClipSize(17, 64, 112) if name == "tiny" else ClipSize(9, 64, 96)
    traced = trace_step(config, stage, size, bfloat16=False, checkpointing=checkpointing)
    world = FantasyWorld(config, WanBackbone(config.wan)).set_stage(stage)
    world.enable_gradient_checkpointing(checkpointing)

    def step() -> None:
        batch, targets = step_inputs(config.wan, size)
        output = world(**batch)
        losses = geometry_losses(output, targets)
        if output.velocity is not None:
            noise = torch.randn_like(batch["latents"])
            losses["diffusion_loss"] = diffusion_loss(output.velocity, noise, batch["latents"], batch["timestep"])
        loss = total_loss(losses)
        del output, losses
        loss.backward()

    peak = measured_peak(step)
    assert traced.peak == pytest.approx(traced.weights + peak, rel=0.2)
    assert traced.peak - traced.weights == pytest.approx(peak, rel=0.2), "without the weights, which are known exactly"
    assert traced.gradients == sum(p.numel() * 4 for p in world.trainable_parameters().values())


def test_flops_grow_with_the_batch_and_with_recomputation() -> None:
    """Doubling the batch doubles the work; without recomputation a backward pass costs at most twice the forward."""
    one, two = (trace_step(SMALL, "stage2", ClipSize(5, 32, 48, batch), checkpointing=False) for batch in (1, 2))
    assert two.forward_flops == pytest.approx(2 * one.forward_flops, rel=0.01)
    assert one.forward_flops < one.total_flops - one.forward_flops < 2.5 * one.forward_flops
    again = trace_step(SMALL, "stage2", ClipSize(5, 32, 48), checkpointing=True)
    assert again.forward_flops == one.forward_flops
    assert again.total_flops > one.total_flops


def fake_trace(config: ModelConfig, stage: Stage, size: ClipSize, **_: object) -> StepTrace:
    """1 GiB of weights and of gradients, and 1 GiB of activations per 4,000 video tokens."""
    activations = size.batch * size.video_tokens * GIB // 4000
    return StepTrace(weights=GIB, gradients=GIB, peak=2 * GIB + activations, forward_flops=1, total_flops=3, seconds=0.0)


@pytest.mark.parametrize(
    ("gpu", "batch", "remedy"),
    [
        (80.0, 8, ""),
        (18.9, 2, "batch 2 with 4 accumulated micro-batches"),
        (8.8, 1, "288x512, batch 1 with 8 accumulated micro-batches"),
        (6.9, 1, "41 frames, batch 1 with 8 accumulated micro-batches"),
        (6.4, 1, "288x512 and 41 frames, batch 1 with 8 accumulated micro-batches"),
        (3.9, 0, "288x512 and 41 frames"),
    ],
)
def test_the_mildest_remedy_that_fits_is_chosen(gpu: float, batch: int, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "trace_step", fake_trace)
    plans = make_plans(load_preset("wan2.1-fun-1.3b"), "stage1", gpu, 8, "none")
    assert (plans[-1].batch_per_gpu, plans[-1].remedy) == (batch, remedy)
    assert not any(plan.fits for plan in plans[:-1])
    assert plans[-1].fits == (plans[-1].peak_gib <= plans[-1].usable_gib)


def test_the_plan_counts_what_training_keeps() -> None:
    trace = StepTrace(weights=100, gradients=10, peak=150, forward_flops=1, total_flops=3, seconds=0.0)
    plain = load_preset("tiny").stage1

    def kept(**knobs: object) -> float:
        return static_bytes(trace, plain.model_copy(update=knobs))

    assert kept() == 130
    assert static_bytes(trace, plain, gpus=2) == 130, "gradients are views of DDP's buckets"
    assert static_bytes(trace, plain, gpus=2, sharding="fsdp") == 65
    assert kept(ema_decay=0.9) == 140
    assert kept(offload_optimizer=True) == 110
    assert kept(optimizer="adamw8bit") == 115, "two moments of a byte for four bytes of weight"
    assert trace.activations == 40


def test_encoders_that_run_while_training_are_in_the_plan() -> None:
    published = load_preset("wan2.1-fun-1.3b").encoders
    assert encoder_bytes(published) == pytest.approx(13e9, rel=0.02)  # the size of their files
    assert encoder_bytes(load_preset("tiny").encoders) == 0


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_plan_is_not_below_two_whole_steps_of_two_micro_batches_and_at_most_10_percent_above(stage: Stage) -> None:
    """Measured by torch's own allocator, AdamW included. Gradients of the first micro-batch are there in the second's forward."""
    size, config = ClipSize(9, 64, 96), load_preset("tiny").stage(stage)
    trace = trace_step(MIDDLE, stage, size, bfloat16=False, held_gradients=True)
    plan = static_bytes(trace, config) + trace.activations
    world = FantasyWorld(MIDDLE, WanBackbone(MIDDLE.wan)).set_stage(stage)
    world.enable_gradient_checkpointing()
    optimizer = make_optimizer(world.trainable_parameters(), config)

    def steps() -> None:
        for micro in range(4):
            batch, targets = step_inputs(MIDDLE.wan, size)
            output = world(**batch)
            losses = geometry_losses(output, targets)
            if output.velocity is not None:
                noise = torch.randn_like(batch["latents"])
                losses["diffusion_loss"] = diffusion_loss(output.velocity, noise, batch["latents"], batch["timestep"])
            loss = total_loss(losses)
            del output, losses
            loss.backward()
            del loss
            if micro % 2:
                optimizer.step()

    measured = trace.weights + measured_peak(steps)
    assert 0.999 * measured <= plan <= 1.1 * measured  # small blocks are rounded up by the allocator
    without = trace_step(MIDDLE, stage, size, bfloat16=False)
    assert static_bytes(without, config) + without.activations < 0.97 * measured


def test_the_update_moves_into_the_backward_pass_only_when_it_must() -> None:
    small = StepTrace(weights=GIB, gradients=GIB, peak=3 * GIB, forward_flops=1, total_flops=3, seconds=0.0)
    assert choose_optimizer(small, 20)[0] == "adamw"
    chosen, needs = choose_optimizer(small, 5)
    assert chosen == "adamw in backward"
    assert needs == {"adamw": 5.0, "adamw in backward": 4.0}


def test_adamw_in_the_backward_pass_is_adamw_and_leaves_no_gradients() -> None:
    """Three steps; the reference is torch's optimizer over all tensors at once, with the training's decay groups."""
    worlds = [small_world().set_stage("stage2") for _ in range(2)]
    groups = [world.trainable_parameters() for world in worlds]
    config = load_preset("tiny", ["stage2.learning_rate=1e-3", "stage2.weight_decay=0.01"]).stage2
    reference = make_optimizer(groups[0], config)
    in_backward = AdamWInBackward(groups[1], 1e-3, 0.01)
    for _ in range(3):
        for world in worlds:
            output = world(**inputs(frames=2))
            assert output.velocity is not None
            (output.depth.mean() + output.points.square().mean() + output.velocity.square().mean()).backward()
        assert all(p.grad is None for p in groups[1].values())
        reference.step()
        reference.zero_grad()
    for expected, got in zip(*(group.values() for group in groups), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    in_backward.close()
    worlds[1](**inputs(frames=2)).depth.mean().backward()
    assert any(p.grad is not None for p in groups[1].values())


def test_float32_products_are_rounded_once_and_stay_close_to_bfloat16s() -> None:
    base = WanBackbone.seeded(SMALL.wan, seed=0).to(torch.bfloat16)
    with torch.no_grad():
        plain = base(**inputs())
        compute_in_float32(base)
        got = base(**inputs())
        x = torch.randn(2, 3, SMALL.wan.dim).bfloat16()
        layer = base.transformer.blocks[0].attn1.to_q
        exact = x.float() @ layer.weight.float().mT + layer.bias.float()
        torch.testing.assert_close(layer(x), exact.bfloat16())
    assert got.dtype == plain.dtype == torch.bfloat16
    assert (got.float() - plain.float()).norm() < 0.05 * plain.float().norm()


@pytest.mark.parametrize("limit", [20.0, 0.001])
def test_the_full_size_command_steps_both_stages(
    limit: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the tiny preset; the exit code says whether memory stayed below the limit."""
    monkeypatch.setattr(full_size, "LIMIT_GIB", limit)
    monkeypatch.setattr(full_size, "SIZE", ClipSize(5, 32, 48))
    assert full_size.main(["--preset", "tiny"]) == (0 if limit == 20 else 1)
    out = capsys.readouterr().out.splitlines()
    found = json.loads(out[-1])
    assert found["ok"] == (limit == 20)
    assert found["stage1"]["parameters"] < found["stage2"]["parameters"]
    assert found["stage1"]["optimizer"] == found["stage2"]["optimizer"] == ("adamw" if limit == 20 else "adamw in backward")
    assert 0 < found["stage1"]["peak_gib"] <= found["stage2"]["peak_gib"] <= found["peak_gib"]
    assert out[0].startswith(f"plan for stage1 in {limit:g} GiB: adamw ")


def test_the_trace_resizes_and_normalises_in_float32_as_cuda_does_under_autocast() -> None:
    """Without it plans were up to 5 % below an H200's peaks."""
    x = torch.ones(1, 4, 8, 8, dtype=torch.bfloat16)

    def dtypes() -> list[torch.dtype]:
        return [F.interpolate(x, (16, 16), mode="bilinear").dtype, F.layer_norm(x, (8,)).dtype, torch.nn.RMSNorm(8)(x).dtype]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = dtypes()
        with float32_of_cuda():
            assert dtypes() == [torch.float32] * 3
        assert dtypes() == before
    with float32_of_cuda():
        assert F.interpolate(x, (16, 16)).dtype == torch.bfloat16  # no autocast


def test_float32_convolutions_are_not_rounded_to_tf32() -> None:
    torch.backends.cudnn.allow_tf32 = True
    FantasyWorld.from_preset(load_preset("tiny"))
    assert not torch.backends.cudnn.allow_tf32
