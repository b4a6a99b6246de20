"""Presets are validated whole: nothing is silently ignored, nothing silently rounded."""

import pytest

from fw_model.config import ClipConfig, ConfigError, Preset, load_preset, parse_preset
from fw_model.preset_files import preset_names


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_parses_and_survives_a_round_trip(name: str) -> None:
    preset = load_preset(name)
    assert preset.name == name
    assert parse_preset(preset.model_dump(mode="json")) == preset


def test_the_real_preset_is_the_training_guides_recipe() -> None:
    preset = load_preset("wan2.1-fun-1.3b")
    assert (preset.stage1.steps, preset.stage1.global_batch) == (20_000, 64)
    assert (preset.stage2.steps, preset.stage2.global_batch) == (10_000, 112)
    assert preset.stage1.learning_rate == preset.stage2.learning_rate == 1e-5
    assert preset.clip.bucket(720, 1280) == (336, 592, 81)
    assert preset.clip.bucket(1280, 720) == (592, 336, 81)
    assert preset.model.num_geodit == 18


@pytest.mark.parametrize("override", ["stage1.stepz=3", "nonsense=1", "model.wan.dims=96"])
def test_an_unknown_key_is_refused_by_name(override: str) -> None:
    with pytest.raises(ConfigError, match=override.split("=")[0].split(".")[-1]):
        load_preset("tiny", [override])


def test_overrides_reach_their_key_and_keep_their_type() -> None:
    preset = load_preset("tiny", ["stage1.steps=7", "stage2.train_geometry=false", "stage1.learning_rate=3.0e-4"])
    assert (preset.stage1.steps, preset.stage2.train_geometry, preset.stage1.learning_rate) == (7, False, 3e-4)


@pytest.mark.parametrize(("override", "message"), [("stage1.steps", "key=value"), ("stage1.steps.x=1", "not a section")])
def test_a_malformed_override_says_what_is_expected(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_preset("tiny", [override])


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"tiny, wan2\.1-fun-1\.3b"):
        load_preset("huge")


@pytest.mark.parametrize(
    ("field", "value", "nearest"), [("frames", 80, "81"), ("short_side", 340, "336"), ("long_side", 600, "592")]
)
def test_sizes_the_vae_cannot_fold_are_refused_with_the_nearest_that_fit(field: str, value: int, nearest: str) -> None:
    with pytest.raises(ValueError, match=nearest):
        ClipConfig(**{field: value})


def test_a_file_may_start_from_a_preset(tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("preset: tiny\nname: mine\nstage1:\n  steps: 3\n")
    mine = load_preset(str(path))
    assert (mine.name, mine.stage1.steps) == ("mine", 3)
    assert mine.model == load_preset("tiny").model


def test_a_config_file_lies_between_the_preset_and_the_overrides(tmp_path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("stage1: {steps: 3, seed: 4}\n")
    mine = load_preset("tiny", ["stage1.seed=5"], path)
    assert (mine.stage1.steps, mine.stage1.seed) == (3, 5)
    path.write_text("stage1: {stepz: 3}\n")
    with pytest.raises(ConfigError, match=r"my\.yaml[\s\S]*stage1\.stepz"):
        load_preset("tiny", config=path)


def test_the_digest_changes_with_its_sections_and_only_with_them() -> None:
    tiny, other = load_preset("tiny"), load_preset("tiny", ["stage2.steps=1"])
    assert tiny.digest("model", "stage1") == other.digest("model", "stage1")
    assert tiny.digest("stage2") != other.digest("stage2")


def test_a_preset_cannot_be_changed_after_it_was_validated() -> None:
    preset: Preset = load_preset("tiny")
    with pytest.raises(ValueError, match="frozen"):
        preset.name = "other"
