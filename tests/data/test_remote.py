"""Datasets behind a URL: the same clips, a bounded cache, and nothing damaged taken for good."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from torch.utils.data import DataLoader

from fw_model.data import remote
from fw_model.data.dataset import ClipDataset, collate
from fw_model.data.manifest import dataset_digest
from fw_model.errors import DatasetError, MissingDatasetError
from fw_model.report import __main__ as report
from fw_model.train import loop as train
from tests.helpers.made_clips import pack
from tests.helpers.made_scenes import pack_scenes
from tests.helpers.training import small_preset

URL = "memory://bucket/dataset"
S3_URL = "s3://bucket/dataset"


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "RETRY_SECONDS", (0.0, 0.0))
    pack(tmp_path / "dataset", {"v1": "train", "v2": "train", "v3": "val"}, target_bytes=1)
    fsspec.filesystem("memory").store.clear()
    for file in (tmp_path / "dataset").iterdir():
        fsspec.filesystem("memory").pipe_file(f"/bucket/dataset/{file.name}", file.read_bytes())
    return tmp_path / "dataset"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A local S3 server's address."""
    moto = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(local: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> fsspec.AbstractFileSystem:
    """The dataset of `local` at S3_URL."""
    for name, value in {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    bucket = fsspec.filesystem("s3", skip_instance_cache=True)
    if not bucket.exists("bucket"):
        bucket.mkdir("bucket")
    for file in local.iterdir():
        bucket.pipe_file(f"bucket/dataset/{file.name}", file.read_bytes())
    return bucket


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file with a line per download, of any process."""
    download, lines = remote._download, tmp_path / "downloads"

    def counted(url: str, *arguments: Any) -> None:
        with open(lines, "a", encoding="utf-8") as handle:
            handle.write(url + "\n")
        download(url, *arguments)

    monkeypatch.setattr(remote, "_download", counted)
    return lines


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


def test_a_shard_that_another_process_drops_before_it_is_opened_is_fetched_again(
    local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch, dropped = remote.RemoteFolder.fetch, []

    def drops_once(self: remote.RemoteFolder, name: str, *known: Any) -> Path:
        path = fetch(self, name, *known)
        if name.startswith("train-") and not dropped:
            dropped.append(name)
            path.unlink()
        return path

    monkeypatch.setattr(remote.RemoteFolder, "fetch", drops_once)
    assert ClipDataset(URL, "train", 8)[0]["depth"].any()
    assert dropped


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


# ---- on an S3 server


def test_processes_that_share_a_cache_fetch_each_shard_from_s3_once(
    local: Path, s3: fsspec.AbstractFileSystem, fetched: Path
) -> None:
    expected = [batch.clip_ids[0] for batch in DataLoader(ClipDataset(local, "train", 8), batch_size=1, collate_fn=collate)]
    there = ClipDataset(S3_URL, "train", 8)  # fetches the manifests here, before there are workers
    assert dataset_digest(S3_URL) == dataset_digest(local)
    batches = [ids for _ in range(2) for ids in DataLoader(there, batch_size=1, collate_fn=collate, num_workers=2)]
    assert [batch.clip_ids[0] for batch in batches] == 2 * expected
    for batch, wanted in zip(batches, 2 * [*ClipDataset(local, "train", 8)], strict=True):
        assert torch.equal(batch.depth[0], wanted["depth"])
        assert torch.equal(batch.text[0], wanted["text"])
    names = fetched.read_text(encoding="utf-8").splitlines()
    assert len(names) == len(set(names)) == 1 + 1 + 2 + 2  # manifest, texts, and the shards of the split's prompts and clips


def test_a_shard_damaged_on_its_way_from_s3_is_fetched_again(
    local: Path, s3: fsspec.AbstractFileSystem, fetched: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name = "train-00000-of-00002.parquet"
    good = (local / name).read_bytes()
    s3.pipe_file(f"bucket/dataset/{name}", good[:-1] + b"!")
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: s3.pipe_file(f"bucket/dataset/{name}", good))
    with caplog.at_level(logging.WARNING):
        assert ClipDataset(S3_URL, "train", 8)[0]["depth"].any()
    assert fetched.read_text(encoding="utf-8").count(name) == 2
    assert f"{S3_URL}/{name}: " in caplog.text
    assert "arrived, the manifest says" in caplog.text


def test_a_shard_deleted_from_s3_while_training_is_named(s3: fsspec.AbstractFileSystem) -> None:
    clips = ClipDataset(S3_URL, "train", 8)
    assert clips[0]["clip_id"] == "v1"
    s3.rm_file("bucket/dataset/train-00001-of-00002.parquet")
    with pytest.raises(DatasetError, match="s3://bucket/dataset/train-00001-of-00002.parquet: missing"):
        clips[1]


def test_a_bucket_that_is_not_there_is_named(s3: fsspec.AbstractFileSystem) -> None:
    with pytest.raises(MissingDatasetError, match="s3://nowhere/dataset/manifest.parquet: missing"):
        ClipDataset("s3://nowhere/dataset", "train", 8)


# ---- the programs that train and report


def test_training_and_the_report_take_a_url(
    tmp_path: Path, local: Path, s3: fsspec.AbstractFileSystem, capsys: pytest.CaptureFixture[str]
) -> None:
    preset = small_preset("stage1.steps=1", "stage1.warmup_steps=0", "stage1.validation_clips=1")
    scenes = pack_scenes(tmp_path / "scenes", preset)
    for file in scenes.iterdir():
        s3.pipe_file(f"bucket/scenes/{file.name}", file.read_bytes())
    result = train.train(preset, "stage1", "s3://bucket/scenes", tmp_path / "run")
    assert result.dataset_digest == dataset_digest(scenes)
    options = ["--run", str(tmp_path / "run"), "--output", str(tmp_path / "report.html")]
    assert report.main([*options, "--dataset", "s3://bucket/nowhere"]) == 1
    assert "s3://bucket/nowhere/manifest.parquet: missing" in capsys.readouterr().err
