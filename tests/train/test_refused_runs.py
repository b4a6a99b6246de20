"""A run that cannot work, or would mix what does not belong together, is refused before a model is built."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fw_model.config import WeightsConfig
from fw_model.data import opening
from fw_model.data.dataset import ClipDataset
from fw_model.errors import DatasetError, TrainingError
from fw_model.train import loop as train
from fw_model.train import run as training_run
from fw_model.train.checkpoints import read_metadata, save_checkpoint
from fw_model.train.run_folder import TrainResult, base_hash, stage1_result, write_result
from tests.helpers.made_scenes import pack_scenes
from tests.helpers.training import no_model, small_preset


def test_dataset_of_another_clip_size_is_refused_with_the_keys_that_fit(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_run.FantasyWorld, "from_preset", no_model)
    for key in ("clip.size=64x112", "clip.frames=9"):
        with pytest.raises(TrainingError, match=r"bucket (32x48|48x32)x5, .* clip\.size=(32x48|48x32) clip\.frames=5"):
            train.train(small_preset(key), "stage1", dataset, tmp_path)


def test_latents_of_another_vae_are_refused(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_run.FantasyWorld, "from_preset", no_model)
    row = ClipDataset(dataset, "train", 32).rows[0]
    wrong = replace(row, arrays={**row.arrays, "latents": ("float16", (4, 2, 4, 6))})
    with pytest.raises(TrainingError, match=r"has latents \[4, 2, 4, 6\], Wan's VAE gives \[16, 2, (4, 6|6, 4)\]"):
        opening._check_latents(dataset, wrong, small_preset().clip, 16)


def test_dataset_without_training_clips_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_run.FantasyWorld, "from_preset", no_model)
    empty = pack_scenes(tmp_path / "dataset", small_preset(), train=0)
    with pytest.raises(DatasetError, match="no clip in its train split"):
        train.train(small_preset(), "stage1", empty, tmp_path / "out")


def test_stage_2_is_refused_when_the_bases_files_have_changed_since_stage_1(
    dataset: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_run.FantasyWorld, "from_preset", no_model)
    good, changed = plain / "step-6.safetensors", tmp_path / "step-6.safetensors"
    metadata = read_metadata(good)
    assert metadata.base_hash == base_hash(small_preset().base)
    save_checkpoint(changed, load_file(good), replace(metadata, base_hash="0" * 32))
    with pytest.raises(TrainingError, match=f"with hash {'0' * 32}, the files of that name now have {metadata.base_hash}"):
        train.train(small_preset(), "stage2", dataset, tmp_path / "out", changed)


def test_stage_2_does_not_start_from_a_stage_1_that_is_not_complete(tmp_path: Path) -> None:
    assert stage1_result(tmp_path) is None
    (tmp_path / "state" / "step-4").mkdir(parents=True)
    with pytest.raises(TrainingError, match=r"no result\.json\). Run its command again to complete it$"):
        stage1_result(tmp_path)
    (tmp_path / "step-4.safetensors").touch()
    with pytest.raises(TrainingError, match=r"--stage1-checkpoint .*/step-4\.safetensors"):
        stage1_result(tmp_path)
    write_result(tmp_path, TrainResult("stage1", 2, "step-2.ema.safetensors", {}, "val", 1.0, "config", "data"))
    assert stage1_result(tmp_path) == tmp_path / "step-2.ema.safetensors"


def test_processes_of_one_machine_share_the_hash_that_one_of_them_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = [(3, "config", "data", "abc"), (3, "config", "data", "")]
    monkeypatch.setattr(training_run, "gather_object", lambda mine: seen)
    assert training_run._check_same_everywhere(tmp_path, seen[1]) == "abc"
    for other in ((3, "config", "data", "abd"), (2, "config", "data", "")):
        seen[1:] = [other]
        with pytest.raises(TrainingError, match="do not see the same run"):
            training_run._check_same_everywhere(tmp_path, other)


def test_hash_of_a_base_follows_its_files(tmp_path: Path) -> None:
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    file.write_bytes(b"weights")
    base = WeightsConfig(repo=str(tmp_path))
    before = base_hash(base)
    assert base_hash(base) == before
    assert base_hash(base, contents=False) == ""
    file.write_bytes(b"weightz")
    assert base_hash(base) != before
