"""The base loads from every layout it is published in, computes the same from each, and nothing else passes for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from torch import Tensor

from fw_model.config import WanConfig
from fw_model.describe.step_trace import measured_peak
from fw_model.model import backbone
from fw_model.model.backbone import BaseModelError, WanBackbone
from fw_model.model.seeded_weights import fill_made_weights
from fw_model.model.wan_weights import original_shapes, read_tensors
from tests.helpers.small_model import SMALL_WAN, inputs


def original_state(config: WanConfig = SMALL_WAN, seed: int = 0) -> dict[str, Tensor]:
    state = {key: torch.empty(shape) for key, shape in original_shapes(config).items()}
    fill_made_weights(state, seed)
    return state


@pytest.fixture(scope="module")
def base() -> WanBackbone:
    return WanBackbone.seeded(SMALL_WAN, seed=0)


@pytest.fixture(scope="module")
def velocity(base: WanBackbone) -> Tensor:
    with torch.no_grad():
        return base(**inputs())


def test_full_size_has_the_published_number_of_tensors_and_parameters() -> None:
    with torch.device("meta"):
        model = WanBackbone(WanConfig())
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert len(shapes) == 989
    assert sum(p.numel() for p in model.parameters()) == 1_616_313_152
    assert {original: shapes[own] for own, original in model.original_keys().items()} == original_shapes(WanConfig())
    assert not any(p.requires_grad for p in model.parameters())


def test_a_state_dict_of_published_keys_gives_the_same_model(velocity: Tensor) -> None:
    model = WanBackbone.from_config(SMALL_WAN)
    model.load_original_state_dict(original_state())
    with torch.no_grad():
        assert torch.equal(model(**inputs()), velocity)
    assert not any(p.requires_grad for p in model.parameters())


def test_a_state_dict_of_diffusers_keys_gives_the_same_model(base: WanBackbone, velocity: Tensor) -> None:
    model = WanBackbone.from_config(SMALL_WAN)
    model.load_original_state_dict({key.removeprefix("transformer."): tensor for key, tensor in base.state_dict().items()})
    with torch.no_grad():
        assert torch.equal(model(**inputs()), velocity)


@pytest.mark.parametrize("layout", ["safetensors", "pth", "folder", "shards", "subfolder"])
def test_every_file_layout_gives_the_same_model(layout: str, tmp_path: Path, velocity: Tensor) -> None:
    state = original_state()
    source = tmp_path
    if layout == "pth":
        source = tmp_path / "model.pth"
        torch.save(state, source)
    elif layout == "shards":
        write_shards(tmp_path, state)
    else:
        folder = tmp_path / "transformer" if layout == "subfolder" else tmp_path
        folder.mkdir(exist_ok=True)
        save_file(state, folder / "diffusion_pytorch_model.safetensors")
        source = folder / "diffusion_pytorch_model.safetensors" if layout == "safetensors" else tmp_path
    model = WanBackbone.from_pretrained(str(source), SMALL_WAN)
    with torch.no_grad():
        assert torch.equal(model(**inputs()), velocity)


@pytest.mark.parametrize("layout", ["pth", "shards"])
def test_loading_never_holds_a_second_copy(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors that are read become the parameters themselves, and nothing of their size is allocated beside them."""
    state, read = original_state(), set()
    if layout == "pth":
        torch.save(state, tmp_path / "model.pth")
    else:
        write_shards(tmp_path, state)

    def recorded(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
        for key, tensor in read_tensors(files):
            read.add(tensor.data_ptr())
            yield key, tensor

    monkeypatch.setattr(backbone, "read_tensors", recorded)
    loaded: list[WanBackbone] = []
    peak = measured_peak(lambda: loaded.append(WanBackbone.from_pretrained(str(tmp_path), SMALL_WAN)))
    assert {p.data_ptr() for p in loaded[0].parameters()} == read
    assert peak < 1.1 * sum(tensor.nbytes for tensor in state.values())


def test_a_state_dict_is_taken_over_without_a_copy() -> None:
    state, model = original_state(), WanBackbone.from_config(SMALL_WAN)
    model.load_original_state_dict(state)
    assert {p.data_ptr() for p in model.parameters()} == {tensor.data_ptr() for tensor in state.values()}


def write_shards(folder: Path, state: dict[str, Tensor], second: str = "model-00002-of-00002.safetensors") -> None:
    keys = list(state)
    files = {"model-00001-of-00002.safetensors": keys[::2], second: keys[1::2]}
    for name, part in files.items():
        save_file({key: state[key] for key in part}, folder / name)
    index = {"weight_map": {key: name for name, part in files.items() for key in part}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def test_a_shard_index_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write_shards(folder, original_state(), second="../elsewhere.safetensors")
    with pytest.raises(BaseModelError, match="outside its folder"):
        WanBackbone.from_pretrained(str(folder), SMALL_WAN)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, original_state())
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(BaseModelError, match="model-00002-of-00002"):
        WanBackbone.from_pretrained(str(tmp_path), SMALL_WAN)


def test_weights_keep_the_dtype_they_are_stored_in(tmp_path: Path, velocity: Tensor) -> None:
    file = tmp_path / "model.safetensors"
    save_file({key: tensor.bfloat16() for key, tensor in original_state().items()}, file)
    model = WanBackbone.from_pretrained(str(file), SMALL_WAN)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        got = model(**inputs())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), velocity, atol=0.05 * float(velocity.abs().max()), rtol=0)


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("code from a checkpoint was run",)


@pytest.mark.parametrize("content", ["code", "text", "truncated", "list"])
def test_a_file_that_is_not_plain_tensors_is_refused_and_never_executed(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / ("model.safetensors" if content == "truncated" else "model.pth")
    if content == "code":
        torch.save({"patch_embedding.weight": Payload()}, file)
    elif content == "list":
        torch.save([torch.zeros(1)], file)
    elif content == "text":
        file.write_text("<html>not found</html>")
    else:
        save_file(original_state(), file)
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(BaseModelError, match=r"model\.(pth|safetensors)"):
        WanBackbone.from_pretrained(str(file), SMALL_WAN)
    assert "was run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "drop", "said"),
    [
        ({"in_dim": 16}, "control_adapter.", "T2V.*in_dim 16.*without the camera control adapter"),
        ({"in_dim": 36}, "control_adapter.", "I2V/InP.*in_dim 36"),
        ({"in_dim": 48}, "control_adapter.", "Fun-Control.*in_dim 48"),
        ({}, "control_adapter.", "without the camera control adapter"),
        ({}, "cross_attn.k_img", "not the base"),
        ({"dim": 96}, "nothing", "dim 96.*of another width than the 48"),
        ({"num_layers": 4}, "nothing", "4 blocks"),
        ({"num_layers": 7}, "nothing", "7 blocks"),
        ({"ffn_dim": 80}, "nothing", r"blocks\.0\.ffn\.0\.weight 80x48 instead of 64x48"),
    ],
)
def test_another_model_is_refused_with_what_it_is(changes: dict[str, int], drop: str, said: str) -> None:
    other = original_state(SMALL_WAN.model_copy(update=changes))
    other = {key: tensor for key, tensor in other.items() if drop not in key}
    with pytest.raises(BaseModelError, match=f"(?s){said}"):
        WanBackbone.from_config(SMALL_WAN).load_original_state_dict(other)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    save_file({"encoder.conv.weight": torch.zeros(2, 2)}, tmp_path / "vae.safetensors")
    with pytest.raises(BaseModelError, match=r"(?s)no Wan video transformer.*encoder\.conv\.weight"):
        WanBackbone.from_pretrained(str(tmp_path), SMALL_WAN)


def test_a_missing_model_says_what_to_download_and_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> str:
        raise LocalEntryNotFoundError("outgoing traffic has been disabled")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(BaseModelError, match=r"(?s)3\.2 GB.*hf download owner/base --revision v2"):
        WanBackbone.from_pretrained("owner/base", revision="v2")


def test_a_missing_local_path_is_not_looked_for_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(BaseModelError, match="no such file or folder"):
        WanBackbone.from_pretrained("/does/not/exist")


def test_short_prompts_are_padded_with_zeros(base: WanBackbone) -> None:
    short = inputs()
    short["text"] = short["text"][:, :2]
    padded = inputs()
    padded["text"][:, 2:] = 0
    with torch.no_grad():
        assert torch.equal(base(**short), base(**padded))


@pytest.mark.parametrize(("source", "values"), [("image_features", "add_v_proj"), ("text", "to_v")])
def test_text_and_image_tokens_go_through_their_own_projections(source: str, values: str) -> None:
    """With text_len 5 the split is not where diffusers' fixed 512 would put it."""
    model = WanBackbone.seeded(SMALL_WAN, seed=0)
    other = inputs()
    other[source] = -other[source]
    with torch.no_grad():
        assert not torch.equal(model(**inputs()), model(**other))
        for block in model.transformer.blocks:
            getattr(block.attn2, values).weight.zero_()
            getattr(block.attn2, values).bias.zero_()
        assert torch.equal(model(**inputs()), model(**other))


@pytest.mark.parametrize(("source", "index"), [("text", 0), ("text", 4), ("image_features", 0), ("image_features", 2)])
def test_the_first_and_the_last_token_of_each_kind_are_read(source: str, index: int, base: WanBackbone, velocity: Tensor) -> None:
    other = inputs()
    other[source][:, index] *= -1
    with torch.no_grad():
        assert not torch.allclose(base(**other), velocity)


def test_camera_control_changes_the_velocity_and_can_be_left_out(base: WanBackbone, velocity: Tensor) -> None:
    with torch.no_grad():
        assert not torch.allclose(base(**{**inputs(), "camera": None}), velocity)


def test_neighbouring_timesteps_stay_distinct_in_bfloat16() -> None:
    model = WanBackbone.seeded(SMALL_WAN, seed=0).to(torch.bfloat16)
    embedded = [model.embed(**{**inputs(), "timestep": torch.tensor([t])})[1].modulation for t in (996.0, 997.0)]
    assert embedded[0].dtype == torch.float32
    assert not torch.equal(*embedded)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("latents", (1, 16, 3, 4, 8)),
        ("text", (1, 6, 16)),
        ("image_features", (1, 4, 12)),
        ("camera", (1, 24, 9, 32, 48)),
    ],
)
def test_inputs_that_do_not_go_together_are_refused(base: WanBackbone, name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=name):
        base(**{**inputs(), name: torch.zeros(shape)})


def test_made_weights_do_not_touch_the_global_random_state() -> None:
    before = torch.get_rng_state()
    WanBackbone.seeded(SMALL_WAN, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
