"""DUSt3R the network: configurations, published weights in every form they come in, and what running it promises."""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from fw_pipeline.annotate.dust3r import DUSt3R, DUSt3RConfig, DUSt3RWeightsError
from fw_pipeline.annotate.dust3r.network import rope_2d, rotate
from tests.helpers.tiny_dust3r import TINY

RECIPE = (
    "AsymmetricCroCo3DStereo(pos_embed='RoPE100', patch_embed_cls='ManyAR_PatchEmbed', img_size=(64, 64), head_type='linear', "
    "output_mode='pts3d', depth_mode=('exp', -inf, inf), conf_mode=('exp', 1, inf), enc_embed_dim=32, enc_depth=1, "
    "enc_num_heads=2, dec_embed_dim=16, dec_depth=2, dec_num_heads=2)"
)
REPO = "naver/DUSt3R_ViTLarge_BaseDecoder_512_dpt"


@pytest.fixture(scope="module")
def linear() -> DUSt3R:
    return DUSt3R.seeded(TINY, seed=1)


@pytest.fixture(scope="module")
def dpt() -> DUSt3R:
    return DUSt3R.seeded(TINY | {"head_type": "dpt"}, seed=1)


def images(count: int = 1, height: int = 32, width: int = 48, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def assert_same(first: DUSt3R, second: DUSt3R) -> None:
    for ours, theirs in zip(first(images(), images(seed=1)), second(images(), images(seed=1)), strict=True):
        torch.testing.assert_close(ours.points, theirs.points, atol=0, rtol=0)
        torch.testing.assert_close(ours.confidence, theirs.confidence, atol=0, rtol=0)


# -------------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(("low", "high"), [("-Infinity", "Infinity"), ('"-inf"', '"inf"'), ('"-Infinity"', '"Infinity"')])
def test_a_published_configuration_is_read(low: str, high: str) -> None:
    text = f"""{{"output_mode": "pts3d", "head_type": "dpt", "depth_mode": ["exp", {low}, {high}], "patch_size": 16,
        "conf_mode": ["exp", 1, {high}], "freeze": "none", "landscape_only": true, "patch_embed_cls": "ManyAR_PatchEmbed",
        "pos_embed": "RoPE100", "img_size": [512, 512], "enc_embed_dim": 1024, "enc_depth": 24, "enc_num_heads": 16,
        "dec_embed_dim": 768, "dec_depth": 12, "dec_num_heads": 12, "mlp_ratio": 4}}"""
    assert DUSt3RConfig.from_dict(json.loads(text)) == DUSt3RConfig()


def test_a_configuration_survives_being_written() -> None:
    config = DUSt3RConfig(head_type="linear", img_size=(224, 224), dec_depth=8, rope_base=50.0, confidence_min=0.5)
    assert DUSt3RConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("two_confs", True),
        ("desc_mode", "norm"),
        ("head_type", "catmlp+dpt"),
        ("output_mode", "pts3d+desc24"),
        ("depth_mode", ["linear", -math.inf, math.inf]),
        ("depth_mode", ["exp", 0, 1]),
        ("conf_mode", ["sigmoid", 0, 1]),
        ("conf_mode", ["exp", 1]),
        ("conf_mode", ["exp", math.nan, math.inf]),
        ("pos_embed", "cosine"),
        ("patch_size", 14),
        ("norm_im2_in_dec", False),
        ("img_size", "large"),
        ("enc_depth", 0),
        ("enc_depth", True),
        ("dec_num_heads", 3),
        ("mlp_ratio", "4"),
    ],
)
def test_what_this_network_does_not_have_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=key if key != "dec_num_heads" else "dec_embed_dim"):
        DUSt3R.from_config(TINY | {key: value})


# -------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("dropped", ["layer_rn.", "_rn.", None])
def test_tied_tensors_load_under_either_name_or_both(dpt: DUSt3R, dropped: str | None) -> None:
    state = dict(dpt.state_dict())
    tied = [key for key in state if "layer_rn." in key or "_rn.weight" in key]
    assert len(tied) == 16
    gone = [key for key in tied if dropped and ("layer_rn." in key) == (dropped == "layer_rn.")]
    assert len(gone) == (8 if dropped else 0)
    model = DUSt3R.from_config(TINY | {"head_type": "dpt"})
    model.load_state_dict({key: value for key, value in state.items() if key not in gone})
    assert_same(model, dpt)


@pytest.mark.parametrize("assign", [False, True])
def test_the_alias_decides_where_both_names_differ(dpt: DUSt3R, assign: bool) -> None:
    state = {key: value.clone() for key, value in dpt.state_dict().items()}
    for key in state:
        if key.endswith("_rn.weight"):
            state[key].fill_(100.0)
    model = DUSt3R.from_config(TINY | {"head_type": "dpt"})
    model.load_state_dict(dict(reversed(state.items())), assign=assign)
    assert_same(model, dpt)


def test_the_second_decoder_is_a_copy_of_the_first_when_absent(linear: DUSt3R) -> None:
    state = {key: value for key, value in linear.state_dict().items() if not key.startswith("dec_blocks2.")}
    model = DUSt3R.from_config(TINY)
    model.load_state_dict(state, assign=True)
    for first, second in zip(model.dec_blocks.parameters(), model.dec_blocks2.parameters(), strict=True):
        assert torch.equal(first, second)
        assert first.data_ptr() != second.data_ptr()


def test_missing_unknown_and_misshapen_weights_are_named(linear: DUSt3R) -> None:
    state = dict(linear.state_dict())
    state["enc_norm.wait"] = state.pop("enc_norm.weight")
    state["enc_norm.bias"] = torch.zeros(3)
    with pytest.raises(
        RuntimeError, match=r"missing \(1\): enc_norm.weight.*enc_norm.wait.*enc_norm.bias \[3\] instead of \[32\]"
    ):
        DUSt3R.from_config(TINY).load_state_dict(state)


@pytest.mark.parametrize("head", ["linear", "dpt"])
def test_a_saved_model_comes_back_in_the_published_layout(head: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    model = request.getfixturevalue(head)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert len(file.keys()) == len(model.state_dict()) - (8 if head == "dpt" else 0)
    for source in (tmp_path, str(tmp_path), tmp_path / "model.safetensors"):
        back = DUSt3R.from_pretrained(source)
        assert back.config == model.config
        assert_same(back, model)
    assert not back.training
    assert not any(parameter.requires_grad for parameter in back.parameters())


def test_an_original_pth_file_loads(linear: DUSt3R, tmp_path: Path) -> None:
    content = {"args": argparse.Namespace(model=RECIPE, lr=1e-4), "model": linear.state_dict(), "epoch": 3}
    torch.save(content, tmp_path / "original.pth")
    for source in (tmp_path / "original.pth", tmp_path):
        assert_same(DUSt3R.from_pretrained(source), linear)


class _Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def test_nothing_in_a_pth_file_is_run(linear: DUSt3R, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    trap = {"args": argparse.Namespace(model=RECIPE), "model": linear.state_dict(), "more": _Trap(sprung)}
    torch.save(trap, tmp_path / "trap.pth")
    with pytest.raises(DUSt3RWeightsError, match=r"trap.pth: not a .pth file of tensors and plain settings"):
        DUSt3R.from_pretrained(tmp_path / "trap.pth")
    for recipe in (
        RECIPE.replace("enc_depth=1", f"enc_depth=__import__('os').mkdir({str(sprung)!r})"),
        RECIPE.replace("(pos", "(*[1], pos"),
        RECIPE.replace("(pos", "(**{}, pos"),
        f"__import__('os').mkdir({str(sprung)!r})",
        RECIPE[:-1],
        "-" * 9000 + "1",
        "AsymmetricMASt3R(head_type='linear')",
    ):
        torch.save({"args": argparse.Namespace(model=recipe), "model": linear.state_dict()}, tmp_path / "recipe.pth")
        with pytest.raises(DUSt3RWeightsError, match=r"recipe\.pth"):
            DUSt3R.from_pretrained(tmp_path / "recipe.pth")
    assert not sprung.exists()


@pytest.mark.parametrize(
    "content",
    [
        [1],
        {"model": {}},
        {"args": argparse.Namespace(model=3), "model": {}},
        {"args": argparse.Namespace(model=RECIPE), "model": {"a": 1}},
    ],
)
def test_a_pth_file_of_something_else_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(DUSt3RWeightsError, match=r"other.pth: not an original DUSt3R checkpoint"):
        DUSt3R.from_pretrained(tmp_path / "other.pth")


def test_damaged_files_are_named(linear: DUSt3R, tmp_path: Path) -> None:
    linear.save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(DUSt3RWeightsError, match=r"model.safetensors: not a readable safetensors file"):
        DUSt3R.from_pretrained(tmp_path)
    weights.write_bytes(whole)
    config.write_text(json.dumps(linear.config.to_dict() | {"enc_depth": 2}))
    with pytest.raises(DUSt3RWeightsError, match=r"model.safetensors: .*missing \(12\): enc_blocks.1"):
        DUSt3R.from_pretrained(tmp_path)
    for text in ("{", "[]"):
        config.write_text(text)
        with pytest.raises(DUSt3RWeightsError, match=r"config.json: not a configuration"):
            DUSt3R.from_pretrained(tmp_path)
    (tmp_path / "empty.pth").touch()
    with pytest.raises(DUSt3RWeightsError, match=r"empty.pth"):
        DUSt3R.from_pretrained(tmp_path / "empty.pth")


def test_a_missing_model_says_what_to_fetch_its_size_and_licence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    for source in (REPO, tmp_path, tmp_path / "absent", "./absent"):
        with pytest.raises(DUSt3RWeightsError) as caught:
            DUSt3R.from_pretrained(source)
        for part in (str(source).removeprefix("./"), f"hf download {REPO}", "model.safetensors", "2.3 GB", "CC BY-NC-SA 4.0"):
            assert part in str(caught.value)


def test_the_hub_cache_is_enough_offline(linear: DUSt3R, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    entry, commit = tmp_path / f"models--{REPO.replace('/', '--')}", "a" * 40
    linear.save_pretrained(entry / "snapshots" / commit)
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text(commit)
    assert_same(DUSt3R.from_pretrained(REPO), linear)
    assert_same(DUSt3R.from_pretrained(REPO, revision=commit), linear)
    with pytest.raises(DUSt3RWeightsError, match="revision 'other'"):
        DUSt3R.from_pretrained(REPO, revision="other")


# -------------------------------------------------------------------------------------------------------------- running


@pytest.mark.parametrize("head", ["linear", "dpt"])
def test_cached_tokens_give_the_same_as_whole_pairs(head: str, request: pytest.FixtureRequest) -> None:
    model, frames = request.getfixturevalue(head), images(3)
    tokens = model.encode(frames)
    first, second = [0, 1, 2, 2], [1, 0, 0, 1]
    batched = model.decode(tokens[first], tokens[second])
    for pair, (i, j) in enumerate(zip(first, second, strict=True)):
        for together, alone in zip(batched, model(frames[i : i + 1], frames[j : j + 1]), strict=True):
            torch.testing.assert_close(together.points[pair], alone.points[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(together.confidence[pair], alone.confidence[0], atol=1e-5, rtol=1e-5)


def test_every_image_is_encoded_once(linear: DUSt3R) -> None:
    seen: list[int] = []
    hook = linear.patch_embed.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    tokens = linear.encode(images(3))
    for i, j in [(0, 1), (1, 2), (0, 2)]:
        linear.decode(tokens[i : i + 1], tokens[j : j + 1])
    hook.remove()
    assert seen == [3]


@pytest.mark.parametrize("head", ["linear", "dpt"])
@pytest.mark.parametrize("size", [(32, 48), (48, 32), (48, 80), (16, 16)])  # also odd numbers of tokens
def test_each_pointmap_has_the_size_of_its_image(head: str, size: tuple[int, int], request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(head)
    views = model(images(2, *size), images(2, 32, 64))
    for view, expected in zip(views, (size, (32, 64)), strict=True):
        assert view.points.shape == (2, *expected, 3)
        assert view.confidence.shape == (2, *expected)
        assert view.points.dtype == view.confidence.dtype == torch.float32
        assert view.points.isfinite().all()
        assert (view.confidence > 1).all()


def test_portrait_images_are_read_as_they_are_whatever_landscape_only_says(linear: DUSt3R) -> None:
    trained = DUSt3R.from_config(TINY | {"landscape_only": True, "patch_embed_cls": "ManyAR_PatchEmbed"})
    trained.load_state_dict(linear.state_dict())
    for ours, theirs in zip(
        linear(images(1, 48, 32), images(1, 48, 32, 1)), trained(images(1, 48, 32), images(1, 48, 32, 1)), strict=True
    ):
        assert torch.equal(ours.points, theirs.points)


@pytest.mark.parametrize(("size", "nearest"), [((30, 50), "32x48"), ((5, 64), "16x64"), ((720, 1288), "720x1280")])
def test_a_size_that_is_no_multiple_of_16_is_refused_with_the_nearest(
    linear: DUSt3R, size: tuple[int, int], nearest: str
) -> None:
    with pytest.raises(ValueError, match=f"images are {size[0]}x{size[1]}.*nearest is {nearest}"):
        linear.encode(torch.zeros(1, 3, *size))


def test_inputs_that_are_no_images_or_tokens_are_refused(linear: DUSt3R) -> None:
    for wrong in (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.zeros(3, 32, 32), torch.zeros(1, 32, 32, 3)):
        with pytest.raises(ValueError, match=r"expected floats in -1\.\.1"):
            linear.encode(wrong)
    tokens = linear.encode(images(2))
    for other in (tokens[:1], tokens[..., :16], tokens.flatten(1, 2)):
        with pytest.raises(ValueError, match="same B"):
            linear.decode(tokens, other)


def test_points_are_the_raw_direction_at_expm1_of_its_length() -> None:
    model = DUSt3R.from_config(TINY)
    state = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
    state["downstream_head1.proj.bias"] = torch.tensor([2.0, -1.0, 2.0, math.log(4)]).repeat_interleave(256)
    model.load_state_dict(state)
    view1, view2 = model(images(), images())
    expected = torch.tensor([2.0, -1.0, 2.0]) / 3 * math.expm1(3)
    torch.testing.assert_close(view1.points, expected.expand(1, 32, 48, 3))
    torch.testing.assert_close(view1.confidence, torch.full((1, 32, 48), 5.0))
    assert torch.equal(view2.points, torch.zeros(1, 32, 48, 3))  # no direction at all: the origin, not NaN
    assert torch.equal(view2.confidence, torch.full((1, 32, 48), 2.0))


@pytest.mark.parametrize("head", ["linear", "dpt"])
def test_bfloat16_runs_the_transformer_and_never_the_heads(head: str, request: pytest.FixtureRequest) -> None:
    exact = request.getfixturevalue(head)
    model = DUSt3R.from_config(exact.config.to_dict(), dtype=torch.bfloat16)
    model.load_state_dict(exact.state_dict())
    seen: dict[str, set[torch.dtype]] = {"transformer": set(), "head": set()}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            part = "head" if name.startswith("downstream") else "transformer"
            module.register_forward_hook(lambda module, inputs, output, part=part: seen[part].add(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):  # the caller's own autocast does not reach the heads either
        views = model(images(), images(seed=1))
    assert seen == {"transformer": {torch.bfloat16}, "head": {torch.float32}}
    for view, truth in zip(views, exact(images(), images(seed=1)), strict=True):
        assert view.points.dtype == torch.float32
        assert 0 < (view.points - truth.points).norm() / truth.points.norm() < 0.03
    with pytest.raises(ValueError, match="float16"):
        DUSt3R.from_config(TINY, dtype=torch.float16)


@given(st.integers(0, 3), st.integers(0, 3), st.integers(0, 2**16))
@settings(max_examples=20, deadline=None)
def test_attention_depends_on_how_far_apart_tokens_are_not_on_where(down: int, right: int, seed: int) -> None:
    cos, sin = (table.view(6, 7, 16) for table in rope_2d(6, 7, 16, 100.0))
    query, key = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(seed))

    def score(v: int, u: int) -> Tensor:
        at = [(cos[y, x][None], sin[y, x][None]) for y, x in ((v, u), (v + 2, u + 3))]
        return (rotate(query, at[0]) * rotate(key, at[1])).sum()

    torch.testing.assert_close(score(down, right), score(0, 0), atol=1e-5, rtol=1e-5)


def test_half_of_a_head_knows_the_row_and_half_the_column() -> None:
    angles = torch.atan2(*rope_2d(3, 4, 32, 100.0)[::-1]).view(3, 4, 32)
    assert (angles[:, :1] == angles)[..., :16].all()
    assert (angles[:1] == angles)[..., 16:].all()
    expected = 100.0 ** (-torch.arange(8) / 8)
    torch.testing.assert_close(angles[1, 0, :16], expected.repeat(2))
    torch.testing.assert_close(angles[0, 1, 16:], expected.repeat(2))
