"""Plücker rays against the numbers of the original pose-file reader."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fw_model.cameras import plucker_embedding, read_pose_file

REFERENCE = Path(__file__).parents[2].parent / "shared" / "reference"

pytestmark = pytest.mark.skipif(not REFERENCE.is_dir(), reason="reference numbers are not here")


def test_plucker_rays_equal_the_original_reader() -> None:
    reference = np.load(REFERENCE / "pose_landscape_plucker.npz", allow_pickle=False)
    height, width, stride = (int(reference[key]) for key in ("height", "width", "stride"))
    rays = plucker_embedding(read_pose_file(REFERENCE / "pose_landscape.txt"), height, width)
    ours = rays[:, :, ::stride, ::stride].permute(0, 2, 3, 1).numpy()
    assert ours.shape == reference["plucker"].shape
    np.testing.assert_allclose(ours, reference["plucker"], atol=1e-5)
