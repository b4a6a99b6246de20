"""Datasets behind a URL: the same clips, a bounded cache, and nothing damaged taken for good."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest
import torch

from fw_model.data import remote
from fw_model.data.dataset import ClipDataset
from fw_model.data.manifest import DatasetError, MissingDatasetError, dataset_digest
from tests.unit.made_clips import pack

URL = "memory://bucket/dataset"


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "RETRY_SECONDS", (0.0, 0.0))
    pack(tmp_path / "dataset", {"v1": "train", "v2": "train", "v3": "val"}, target_bytes=1)
    fsspec.filesystem("memory").store.clear()
    for file in (tmp_path / "dataset").iterdir():
        fsspec.filesystem("memory").pipe_file(f"/bucket/dataset/{file.name}", file.read_bytes())
    return tmp_path / "dataset"


def shards(local: Path) -> list[Path]:
    return sorted((local.parent / "cache" / "files").glob("*.parquet"))


def test_a_url_gives_the_same_clips_and_digest_as_the_folder(local: Path) -> None:
    here, there = ClipDataset(local, "train", 8), ClipDataset(URL, "train", 8)
    assert dataset_digest(URL) == dataset_digest(local)
    for mine, other in zip(here, there, strict=True):
        assert mine["clip_id"] == other["clip_id"]
        assert all(torch.equal(mine[name], other[name]) for name in mine if name != "clip_id")


def test_what_is_in_the_cache_is_not_fetched_again(local: Path) -> None:
    first = ClipDataset(URL, "train", 8)[0]
    for name in [name for name in fsspec.filesystem("memory").store if "train-" in name]:
        del fsspec.filesystem("memory").store[name]
    assert torch.equal(ClipDataset(URL, "train", 8)[0]["depth"], first["depth"])


def test_the_cache_keeps_to_its_size(local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = max(file.stat().st_size for file in local.glob("*.parquet"))
    monkeypatch.setenv("FW_CACHE_GB", str(1.5 * largest / 1e9))
    clips = ClipDataset(URL, "train", 8)
    for index in (0, 1, 0, 1):
        assert clips[index]["depth"].any()
        assert sum(file.stat().st_size for file in shards(local)) <= 1.5 * largest
    monkeypatch.setenv("FW_CACHE_GB", str(0.5 * largest / 1e9))
    with pytest.raises(DatasetError, match="set FW_CACHE_GB higher"):
        ClipDataset(URL, "train", 8)[0]


def test_a_shard_that_arrives_damaged_is_named(local: Path) -> None:
    memory = fsspec.filesystem("memory")
    name = next(name for name in memory.store if "train-00000" in name)
    data = bytearray(memory.cat_file(name))
    data[100] ^= 1
    memory.pipe_file(name, bytes(data))
    with pytest.raises(DatasetError, match=r"train-00000-of-00002.parquet: given up after 3 attempts: .*the manifest says"):
        ClipDataset(URL, "train", 8)[0]


def test_a_lost_connection_is_tried_again(local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = [ConnectionError("reset"), TimeoutError("slow")]
    download = remote._download

    def flaky(*arguments: object) -> None:
        if failures:
            raise failures.pop()
        download(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(remote, "_download", flaky)
    assert ClipDataset(URL, "train", 8)[0]["depth"].any()
    assert not failures


def test_a_url_without_a_dataset_is_named(local: Path) -> None:
    with pytest.raises(MissingDatasetError, match="memory://bucket/nowhere/manifest.parquet: missing"):
        ClipDataset("memory://bucket/nowhere", "train", 8)


@pytest.mark.parametrize("size", ["many", "0", "-1", "inf"])
def test_an_impossible_cache_size_is_refused(local: Path, monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    monkeypatch.setenv("FW_CACHE_GB", size)
    with pytest.raises(DatasetError, match="FW_CACHE_GB"):
        ClipDataset(URL, "train", 8)
