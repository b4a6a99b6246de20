"""DUSt3R gives the original implementation's numbers on seeded weights, and has exactly the published tensors."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fw_model.model.seeded_weights import fill_made_weights
from fw_pipeline.annotate.dust3r import DUSt3R

REFERENCE = Path(__file__).parents[2].parent / "shared" / "reference"
pytestmark = pytest.mark.skipif(not REFERENCE.is_dir(), reason="the reference numbers are not beside this checkout")

# Both as an original configuration states them.
FULL = {
    "output_mode": "pts3d",
    "depth_mode": ["exp", -math.inf, math.inf],
    "conf_mode": ["exp", 1, math.inf],
    "pos_embed": "RoPE100",
    "patch_embed_cls": "PatchEmbedDust3R",
    "enc_embed_dim": 1024,
    "enc_depth": 24,
    "enc_num_heads": 16,
    "dec_embed_dim": 768,
    "dec_depth": 12,
    "dec_num_heads": 12,
    "landscape_only": False,
}
SMALL = FULL | {
    "img_size": [64, 96],
    "enc_embed_dim": 96,
    "enc_depth": 3,
    "enc_num_heads": 3,
    "dec_embed_dim": 64,
    "dec_num_heads": 2,
}


@pytest.mark.parametrize(("name", "size", "head"), [("512_dpt", 512, "dpt"), ("224_linear", 224, "linear")])
def test_keys_and_shapes_are_the_published_ones(name: str, size: int, head: str) -> None:
    lines = (REFERENCE / f"dust3r_keys_{name}.tsv").read_text().splitlines()
    published = dict(line.split("\t") for line in lines if line)
    with torch.device("meta"):
        model = DUSt3R.from_config(json.loads(json.dumps(FULL | {"img_size": [size, size], "head_type": head})))
    assert {key: str(tuple(value.shape)) for key, value in model.state_dict().items()} == published


@pytest.mark.parametrize("head", ["dpt", "linear"])
def test_pointmaps_and_confidence_match_the_original(head: str) -> None:
    with np.load(REFERENCE / f"dust3r_{head}_64x96.npz", allow_pickle=False) as file:
        stored = {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}
    model = DUSt3R.from_config(SMALL | {"head_type": head})
    state = {key: value.clone() for key, value in model.state_dict().items()}
    fill_made_weights(state, int(stored["seed"]))
    model.load_state_dict(state)
    view1, view2 = model(stored["img1"], stored["img2"])
    for name, found in [
        ("pts3d_1", view1.points),
        ("conf_1", view1.confidence),
        ("pts3d_2", view2.points),
        ("conf_2", view2.confidence),
    ]:
        torch.testing.assert_close(found, stored[name], atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
        assert (found - stored[name]).abs().max() <= 1e-4, name


def test_swapping_the_images_is_not_swapping_the_answers() -> None:
    """Both pointmaps are in camera 1: the two heads and decoders are not the same function."""
    with np.load(REFERENCE / "dust3r_linear_64x96.npz", allow_pickle=False) as file:
        image1, image2 = (torch.from_numpy(file[name]) for name in ("img1", "img2"))
    model = DUSt3R.seeded(SMALL | {"head_type": "linear"}, seed=0)
    assert not torch.allclose(model(image1, image2)[0].points, model(image2, image1)[1].points, atol=1e-2)
