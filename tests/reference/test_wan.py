"""The base gives the original implementation's numbers on seeded weights, and has exactly the published tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fw_model.config import WanConfig
from fw_model.model.backbone import WanBackbone
from fw_model.model.wan_weights import original_shapes

REFERENCE = Path(__file__).parents[2].parent / "shared" / "reference"
pytestmark = pytest.mark.skipif(not REFERENCE.is_dir(), reason="the reference numbers are not beside this checkout")

TINY = WanConfig(dim=96, ffn_dim=160, num_heads=2, num_layers=4, text_dim=64, freq_dim=32)


@pytest.mark.parametrize(
    ("file", "config"), [("wan2.1_fun_1.3b_control_camera_keys.tsv", WanConfig()), ("wan_tiny_keys.tsv", TINY)]
)
def test_keys_and_shapes_are_the_published_ones(file: str, config: WanConfig) -> None:
    lines = (REFERENCE / file).read_text().splitlines()
    published = dict(line.split("\t") for line in lines if line and not line.startswith("#"))
    assert {key: "x".join(map(str, shape)) for key, shape in original_shapes(config).items()} == published


def test_hidden_states_and_velocity_match_the_original() -> None:
    with np.load(REFERENCE / "wan_camera_tiny.npz", allow_pickle=False) as file:
        stored = {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}
    model = WanBackbone.seeded(TINY, int(stored["seed"]))
    arguments = {name: stored[name].float() for name in ("latents", "image_latents", "timestep", "text", "camera")}
    arguments["image_features"] = stored["clip"].float()
    with torch.no_grad():
        hidden, conditioning = model.embed(**arguments)
        hidden = model.block(1, model.block(0, hidden, conditioning), conditioning)
        velocity = model(**arguments)
    torch.testing.assert_close(hidden, stored["hidden_1"], atol=1e-4, rtol=0)
    torch.testing.assert_close(velocity, stored["velocity"], atol=1e-4, rtol=0)
