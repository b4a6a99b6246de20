"""What tests of training start from: a small packed dataset, and a complete stage 1 on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fw_model.train import loop as train
from tests.helpers.made_scenes import pack_scenes
from tests.helpers.training import small_preset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_scenes(tmp_path_factory.mktemp("data") / "dataset", small_preset())


@pytest.fixture(scope="module")
def plain(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete stage 1 with plain AdamW."""
    output = tmp_path_factory.mktemp("plain")
    train.train(small_preset(), "stage1", dataset, output)
    return output
