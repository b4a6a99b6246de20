"""One name a setting, wherever it is set from; what an engine can be told is said in one place, and reaches it."""

from pathlib import Path
from typing import Any

import pytest

from fw_model.config import ConfigError
from fw_pipeline.annotate import depth
from fw_pipeline.annotate.depth import depth_anything
from fw_pipeline.annotate.dust3r import engine as dust3r
from fw_pipeline.annotate.engines import DepthAnythingSettings, Dust3rSettings
from fw_pipeline.steps.settings import PROFILES, PROJECT, Settings, names, roles, settings_from_env

DOCS = "\n".join(path.read_text(encoding="utf-8") for path in [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))])


@pytest.fixture(autouse=True)
def no_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PROFILE", *(name.upper() for name in names())):
        monkeypatch.delenv(f"FW_{name}", raising=False)


def build(settings: Settings) -> tuple[Any, Any]:
    return tuple(role.build(settings.device, settings.dtype) for role in (settings.geometry, settings.depth))  # type: ignore[return-value]


def test_folders_are_found_from_the_projects_root() -> None:
    assert (PROJECT / "pyproject.toml").is_file()
    assert settings_from_env(data="here").data == PROJECT / "here"


# -------------------------------------------------------------------------------------------------------------- engines


def test_the_profiles_choose_the_annotators(monkeypatch: pytest.MonkeyPatch) -> None:
    for profile, expected in (("laptop", ["tracks", "geometry"]), ("gpu", ["dust3r", "depth-anything-v2"])):
        monkeypatch.setenv("FW_PROFILE", profile)
        assert [engine.name for engine in build(settings_from_env())] == expected
    assert set(PROFILES) == {"laptop", "gpu"}


@pytest.mark.parametrize(("role", "engine"), [(role, engine) for role, engines in roles().items() for engine in engines])
def test_every_engine_there_is_can_be_chosen_and_is_in_the_docs(role: str, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"FW_{role.upper()}", engine)
    settings = getattr(settings_from_env(), role)
    assert settings.engine == engine
    assert settings.build("cpu", "float32").name == engine
    assert f"`{engine}`" in DOCS
    assert type(settings).__doc__


def test_an_unknown_engine_is_an_error_that_names_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="geometry: .*'colmpa'.*'tracks', 'colmap', 'dust3r'"):
        settings_from_env(geometry="colmpa")
    monkeypatch.setenv("FW_DEPTH", "none")
    with pytest.raises(ConfigError, match="depth: .*'none'.*'geometry', 'depth-anything-v2'"):
        settings_from_env()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dust3r_model", "naver/other"),
        ("dust3r_revision", "v2"),
        ("dust3r_window", 5),
        ("dust3r_keyframe_every", 3),
        ("dust3r_batch", 2),
        ("depth_model", "depth-anything/Depth-Anything-V2-Large-hf"),
        ("depth_revision", "v2"),
        ("depth_batch", 2),
        ("dtype", "bfloat16"),
        ("device", "cuda"),
    ],
)
@pytest.mark.parametrize("variable", [False, True])
def test_every_setting_reaches_its_engine(field: str, value: Any, variable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(**changed: Any) -> tuple[dict[str, Any], str]:
        engines = build(settings_from_env(geometry="dust3r", depth="depth-anything-v2", **changed))
        shown = {f"{e.name}.{k}": v for e in engines for k, v in vars(e).items() if k not in ("load", "name")}
        return shown, "".join(engine.version for engine in engines)

    before, before_version = made()
    if variable:
        monkeypatch.setenv(f"FW_{field.upper()}", str(value))
    after, after_version = made(**({} if variable else {field: value}))
    assert before != after
    # What does not change results does not make them stale.
    assert (before_version != after_version) == (field not in ("device", "dust3r_batch", "depth_batch"))


def test_the_settings_start_from_what_the_engines_start_from() -> None:
    built, plain = Dust3rSettings().build("cpu", "float32"), dust3r.Dust3rEngine.from_pretrained()
    assert {k: v for k, v in vars(built).items() if k != "load"} == {k: v for k, v in vars(plain).items() if k != "load"}
    assert DepthAnythingSettings().model == depth_anything.SMALL
    assert DepthAnythingSettings().build("cpu", "float32").version == depth.DepthAnythingV2(dtype="float32").version


# ---------------------------------------------------------------------------------------------------------------- names


def test_every_setting_has_a_name_of_its_own_a_description_and_a_place_in_the_docs() -> None:
    engines = [engine for role in roles().values() for engine in role.values()]
    assert len(names()) == len(Settings.model_fields) + sum(len(engine.model_fields) - 1 for engine in engines)
    for name, info in names().items():
        assert info.description, name
        assert f"`{name}`" in DOCS or f"`FW_{name.upper()}`" in DOCS, name


def test_run_config_wins_over_variables_and_these_over_the_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"PROFILE": "gpu", "GEOMETRY": "colmap", "DUST3R_WINDOW": "5", "DUST3R_BATCH": "3", "DEPTH": ""}
    for name, value in variables.items():
        monkeypatch.setenv(f"FW_{name}", value)
    settings = settings_from_env()
    assert (settings.geometry.engine, settings.depth.engine) == ("colmap", "depth-anything-v2")
    assert settings_from_env(geometry="dust3r", dust3r_batch=4).geometry == Dust3rSettings(window=5, batch=4)


def test_fw_data_moves_the_videos_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FW_DATA", str(tmp_path))
    assert settings_from_env().videos == tmp_path / "videos"
    monkeypatch.setenv("FW_VIDEOS", "/elsewhere")
    assert settings_from_env().videos == Path("/elsewhere")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"geometry": "dust3r", "dust3r_window": 0}, "dust3r_window: .*greater than or equal to 1"),
        ({"depth": "depth-anything-v2", "depth_batch": "many"}, "depth_batch: .*integer"),
        ({"val_percent": 100}, "val_percent: .*less than 100"),
        ({"dtype": "float16"}, "dtype: .*'float32' or 'bfloat16'"),
        ({"windw": 3}, "windw: "),
        ({"dust3r_window": 3}, "dust3r_window: .*geometry is tracks; set geometry: dust3r"),  # it would be lost
    ],
)
def test_what_does_not_fit_is_refused_by_its_name(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        settings_from_env(**given)
