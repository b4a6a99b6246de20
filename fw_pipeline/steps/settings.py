"""What a pipeline run is told: profile, folders, preset, annotators, device. Free of Dagster, so that scripts and tests share it.

`Settings` is the one declaration. From outside every setting has one name, the same in run config, in the launchpad and as a
variable in capitals: a field's own (`data`, FW_DATA), and for an engine's field its prefix and name (`dust3r_model`,
FW_DUST3R_MODEL), beside the role that chooses the engine (`geometry: dust3r`, FW_GEOMETRY). `FW_PROFILE` (laptop | gpu)
chooses what they start from.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError
from pydantic.fields import FieldInfo

from fw_model.config import Config, ConfigError, Preset, load_preset
from fw_model.errors import did_you_mean
from fw_pipeline.annotate.engines import DepthSettings, Dtype, GeometryDepthSettings, GeometrySettings, TracksSettings
from fw_pipeline.annotate.folder import Links

PROJECT = Path(__file__).resolve().parents[2]

OTHER_VARIABLES = {"FW_PROFILE", "FW_CACHE", "FW_CACHE_GB", "FW_DAGSTER_HOME"}  # that are no setting of a run


class Settings(Config):
    """One pipeline configuration. Relative folders are taken from the project's root."""

    data: Path = Field(PROJECT / "data", description="folder where everything is written")
    videos: Path = Field(PROJECT / "data" / "videos", description="folder that videos are read from, with subfolders")
    requests: Path = Field(PROJECT / "data" / "requests", description="folder of the lists (*.jsonl) that worlds are made from")
    linked_folders: bool = Field(False, description="also enter folders that are links out of the videos folder")
    linked_files: bool = Field(False, description="also read videos that are links out of it, as a hub's cache has them")
    preset: str = Field("tiny", description="name of a preset, or a YAML file")
    overrides: tuple[str, ...] = Field((), description='keys of the preset set otherwise, e.g. "stage1.steps=10"')
    annotation_long_side: int = Field(
        448, ge=64, description="pixels; the annotators see frames of this size, or the source's if it is smaller"
    )
    geometry: GeometrySettings = Field(TracksSettings(), description="engine that finds cameras and a first depth")
    depth: DepthSettings = Field(GeometryDepthSettings(), description="engine whose depth is kept")
    device: str = Field("cpu", description="torch device of annotators, encoders, training and reports")
    dtype: Dtype = Field("float32", description="of the annotators' networks")
    processes: int = Field(1, ge=1, description="training processes on this machine, one per GPU")
    val_percent: float = Field(2.0, gt=0, lt=100, description="share of videos, by hash, held out for validation")

    @property
    def links(self) -> Links:
        return Links(self.linked_folders, self.linked_files)

    def load_preset(self) -> Preset:
        return load_preset(self.preset, list(self.overrides))


PROFILES: dict[str, dict[str, Any]] = {
    "laptop": {},
    "gpu": {
        "preset": "wan2.1-fun-1.3b",
        "annotation_long_side": 592,
        "geometry": "dust3r",
        "depth": "depth-anything-v2",
        "device": "cuda",
        "dtype": "bfloat16",
    },
}


def roles() -> dict[str, dict[str, Any]]:
    """What an engine is chosen for ("geometry", "depth") -> name of each engine there is -> the model of its settings."""
    found = {}
    for role, info in Settings.model_fields.items():
        if info.discriminator:
            found[role] = {kind.model_fields["engine"].default: kind for kind in get_args(info.annotation)}
    return found


def names() -> dict[str, FieldInfo]:
    """Every setting under the name it has outside, with its type, default, bounds and description.

    A role is there as the choice between its engines, followed by the settings of each.
    """
    found: dict[str, FieldInfo] = {}
    for name, info in Settings.model_fields.items():
        engines = roles().get(name)
        if engines is None:
            found[name] = info
            continue
        found[name] = FieldInfo(annotation=Literal[tuple(engines)], default=info.default.engine, description=info.description)  # type: ignore[arg-type]
        for engine in engines.values():
            found |= {f"{engine.prefix}_{key}": field for key, field in engine.model_fields.items() if key != "engine"}
    return found


def settings_from_env(**overrides: Any) -> Settings:
    """Settings of the profile in FW_PROFILE (default laptop), then the variables, then `overrides`, by the names of `names()`.

    FW_DATA also moves videos and requests, unless FW_VIDEOS and FW_REQUESTS say otherwise. Preset overrides are for run config
    only. An override that is None, and a variable that is empty, is left out. A variable may be of an engine that is not chosen,
    an override may not.

    Raises ConfigError for an unknown profile, name or engine, a misspelt variable, or a value that does not fit; it gives the
    setting's name, and of a name that is not there the nearest.
    """
    profile = os.environ.get("FW_PROFILE") or "laptop"
    if profile not in PROFILES:
        raise ConfigError(
            f"FW_PROFILE={profile!r}: no such profile; there are {', '.join(PROFILES)}{did_you_mean(profile, PROFILES)}"
        )
    _check_variables()
    values = dict(PROFILES[profile])
    if data := os.environ.get("FW_DATA"):
        values["videos"] = _absolute(data) / "videos"
        values["requests"] = _absolute(data) / "requests"
    for name in names().keys() - {"overrides"}:
        if value := os.environ.get(f"FW_{name.upper()}"):
            values[name] = value
    given = {key: value for key, value in overrides.items() if value is not None}
    values |= given
    for key in ("data", "videos", "requests"):
        if key in values:
            values[key] = _absolute(values[key])
    try:
        return Settings(**_with_engines(values, given))
    except ValidationError as error:
        lines = [f"  {(name := _name_of(e['loc']))}: {e['msg']}{_nearest(name, e['type'])}" for e in error.errors()]
        raise ConfigError(f"pipeline settings (profile {profile!r}):\n" + "\n".join(lines)) from error


def _check_variables() -> None:
    """Raise ConfigError for a variable that is named much like one of ours and is none: it would have no effect, unsaid."""
    known = {f"FW_{name.upper()}" for name in names()} | OTHER_VARIABLES
    for variable in sorted(os.environ):
        if variable.startswith("FW_") and variable not in known and (meant := did_you_mean(variable, known)):
            raise ConfigError(f"{variable}: no such variable{meant}", f"Set that one instead, or: unset {variable}")


def _nearest(name: str, kind: str) -> str:
    return did_you_mean(name, names()) if kind == "extra_forbidden" else ""


def _with_engines(values: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The settings of each role's engine gathered below the role. Raises ConfigError for a given one that would be lost."""
    values = dict(values)
    for role, engines in roles().items():
        chosen = values.get(role, Settings.model_fields[role].default.engine)
        values[role] = {"engine": chosen}
        for name, engine in engines.items():
            for key in engine.model_fields.keys() - {"engine"}:
                outside = f"{engine.prefix}_{key}"
                if name == chosen and outside in values:
                    values[role][key] = values[outside]
                elif chosen in engines and outside in given:
                    raise ConfigError(
                        f"{outside}: a setting of {role}: {name}, but {role} is {chosen}; set {role}: {name} beside it"
                    )
                values.pop(outside, None)
    return values


def _name_of(place: tuple[int | str, ...]) -> str:
    """The name outside of the place of an error inside: ("geometry", "dust3r", "window") -> dust3r_window."""
    role, *below = place
    if len(below) == 2:
        return f"{roles()[str(role)][str(below[0])].prefix}_{below[1]}"
    return ".".join(map(str, place))


def _absolute(path: str | Path) -> Path:
    return PROJECT / Path(path).expanduser()
