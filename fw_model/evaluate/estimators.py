"""Who finds the cameras of a video independently of the model: named by other packages, so that this one needs none of them."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points

import numpy as np

from fw_model.errors import ConfigError

GROUP = "fantasy_world.camera_estimators"  # of entry points
# frames [T, h, w, 3] uint8 RGB, intrinsics [3, 3] pixels -> w2c [T, 3, 4]; raises ValueError when there are none to be trusted.
Estimator = Callable[[np.ndarray, np.ndarray], np.ndarray]


def load_estimator(name: str) -> Estimator:
    """By the name of an entry point, or as MODULE:FUNCTION. Raises ConfigError naming those there are."""
    found = {point.name: point.value for point in entry_points(group=GROUP)}
    module, _, function = found.get(name, name).partition(":")
    if not function:
        there = ", ".join(sorted(found)) or "none"
        raise ConfigError(f"no camera estimator {name!r}; there are {there}, or give MODULE:FUNCTION")
    try:
        estimator: Estimator = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"camera estimator {name!r} cannot be loaded: {error}") from error
    return estimator
