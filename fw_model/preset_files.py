"""Preset files: YAML, read layer by layer into one dictionary; `fw_model.config` says what may stand in it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from fw_model.errors import ConfigError

PRESET_DIR = Path(__file__).parent / "presets"


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESET_DIR.glob("*.yaml"))


def read_layers(name_or_path: str, overrides: list[str], config: Path | None) -> dict[str, Any]:
    """The preset or file, over it the file `config`, over both the overrides `a.b=value`; not validated.

    Raises ConfigError for a missing preset, a file that is no mapping or an override that cannot be read.
    """
    raw = _read_yaml(name_or_path)
    if config is not None:
        raw = _merge(raw, _read_yaml(str(config)))
    for item in overrides:
        key, sep, value = item.partition("=")
        if not sep or not key:
            raise ConfigError(f"override {item!r}: expected key=value, e.g. stage1.steps=100")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"override {item!r}: {error}") from error
        node: Any = raw
        *parents, leaf = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"override {item!r}: {parent!r} is a value, not a section")
        node[leaf] = parsed
        _expand_size(raw, where=f"override {item!r}")
    return raw


def _read_yaml(name_or_path: str) -> dict[str, Any]:
    path = PRESET_DIR / f"{name_or_path}.yaml" if name_or_path in preset_names() else Path(name_or_path)
    if not path.is_file():
        raise ConfigError(f"no preset or file {name_or_path!r}; presets: {', '.join(preset_names())}")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping of keys, got {type(raw).__name__}")
    _expand_size(raw, where=str(path))
    parent = raw.pop("preset", None)
    return raw if parent is None else _merge(_read_yaml(str(parent)), raw)


def _expand_size(raw: dict[str, Any], where: str) -> None:
    """Put the two sides in the place of `clip.size`, layer by layer, so that of several settings the last one counts."""
    clip = raw.get("clip")
    if not isinstance(clip, dict) or "size" not in clip:
        return
    size = clip.pop("size")
    match = re.fullmatch(r"(\d+)x(\d+)", str(size))
    if match is None:
        raise ConfigError(f"{where}: clip.size must be two sides in pixels like 288x512, got {size!r}")
    clip["short_side"], clip["long_side"] = sorted(map(int, match.groups()))


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
