"""Random cameras."""

from __future__ import annotations

import numpy as np
import torch
from scipy.spatial.transform import Rotation

HEIGHT, WIDTH = 32, 48


def random_poses(count: int, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    rotation = Rotation.random(count, random_state=seed).as_matrix()
    return torch.from_numpy(np.concatenate([rotation, rng.normal(size=(count, 3, 1))], axis=2))


def pinhole(count: int, focal: float = 40.0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    k = torch.tensor([[focal, 0, WIDTH / 2], [0, 1.1 * focal, HEIGHT / 2], [0, 0, 1]], dtype=dtype)
    return k.expand(count, 3, 3).clone()
