"""What a pipeline run is told: profile, folders, preset, annotators, device. Free of Dagster, so that scripts and tests share it.

`FW_PROFILE` (laptop | gpu) chooses a profile; `FW_` and a field's name in capitals sets that field for every command
(`FW_DATA`, `FW_VIDEOS`, `FW_PRESET`, `FW_GEOMETRY`, ...); the Dagster resource `pipeline` overrides any field per run.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from fw_model.config import Config, ConfigError, Preset, load_preset

PROJECT = Path(__file__).resolve().parents[2]


class Settings(Config):
    """One pipeline configuration. Relative folders are taken from the project's root."""

    data: Path = PROJECT / "data"
    videos: Path = PROJECT / "data" / "videos"
    preset: str = "tiny"  # name of a preset, or a YAML file
    overrides: tuple[str, ...] = ()  # preset overrides, e.g. "stage1.steps=10"
    annotation_long_side: int = Field(448, ge=64)  # pixels; the annotators see frames of this size or the source's, if smaller
    geometry: Literal["colmap", "dust3r"] = "colmap"  # who finds cameras
    depth: Literal["geometry", "depth-anything-v2"] = "geometry"  # whose depth is kept: the geometry's own, or one fitted to it
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the annotators' networks
    dust3r_model: str = "naver/DUSt3R_ViTLarge_BaseDecoder_512_dpt"  # hub repository, folder or .pth file
    dust3r_revision: str = "main"  # branch, tag or commit of the repository
    dust3r_window: int = Field(2, ge=1)  # a keyframe is paired with this many of the following ones
    dust3r_keyframe_every: int = Field(8, ge=1)  # frames, at most
    dust3r_batch: int = Field(8, ge=1)  # images or pairs in one pass
    depth_model: str = "depth-anything/Depth-Anything-V2-Small-hf"  # hub repository or folder; also Base, Large, metric
    depth_revision: str = "main"
    depth_batch: int | None = Field(None, ge=1)  # frames in one pass; None: 8 on a GPU, 1 elsewhere
    processes: int = Field(1, ge=1)  # training processes on this machine, one per GPU
    val_percent: float = Field(2.0, gt=0, lt=100)  # share of videos, by hash, held out for validation

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


def settings_from_env(**overrides: Any) -> Settings:
    """Settings of the profile in FW_PROFILE (default laptop), then FW_<FIELD> of each field, then `overrides`.

    FW_DATA also moves the videos, unless FW_VIDEOS says otherwise. Preset overrides are for run config only. An override that
    is None, and a variable that is empty, is left out.

    Raises ConfigError for an unknown profile or a field that does not fit.
    """
    profile = os.environ.get("FW_PROFILE") or "laptop"
    if profile not in PROFILES:
        raise ConfigError(f"FW_PROFILE={profile!r}: no such profile; there are {', '.join(PROFILES)}")
    values = dict(PROFILES[profile])
    if data := os.environ.get("FW_DATA"):
        values["videos"] = _absolute(data) / "videos"
    for field in Settings.model_fields.keys() - {"overrides"}:
        if value := os.environ.get(f"FW_{field.upper()}"):
            values[field] = value
    values |= {key: value for key, value in overrides.items() if value is not None}
    for key in ("data", "videos"):
        if key in values:
            values[key] = _absolute(values[key])
    try:
        return Settings(**values)
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ConfigError(f"pipeline settings (profile {profile!r}):\n" + "\n".join(lines)) from error


def _absolute(path: str | Path) -> Path:
    return PROJECT / Path(path).expanduser()
