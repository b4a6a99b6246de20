"""Where DUSt3R's published weights come from: the hub, a folder, or an original .pth file; nothing in them is ever run."""

from __future__ import annotations

import argparse
import ast
import json
import math
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fw_pipeline.annotate.types import EngineError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
PUBLISHED = "naver/DUSt3R_ViTLarge_BaseDecoder_512_dpt"

_TIED = re.compile(r"(.*\.scratch\.)(?:layer(\d)_rn|layer_rn\.(\d))(\..*)")
_CLASS = "AsymmetricCroCo3DStereo"  # what an original .pth file calls this network
_LONGEST_RECIPE = 10_000
_SAMPLES, _SAMPLE = 512, 4096  # pieces of a local file that name its content, bytes of each


class DUSt3RWeightsError(EngineError):
    """DUSt3R weights that are missing, damaged or of another model; the message says which and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint as read."""

    config: dict[str, Any]  # keys of config.json
    state: dict[str, Tensor]
    where: str  # for messages


def read_checkpoint(source: str | Path, revision: str = "main") -> Checkpoint:
    """Configuration and tensors from a folder, an original .pth file, or a hub repository (downloaded on first use).

    Raises DUSt3RWeightsError: nothing there, unreadable, or not DUSt3R's.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return _read_folder(path.parent) if path.name == WEIGHTS_FILE else _read_pth(path)
    if path.is_dir():
        return _read_folder(path)
    if path.is_absolute() or str(source).startswith((".", "~")) or path.suffix in (".pth", ".safetensors"):
        raise DUSt3RWeightsError(f"{path}: no such file or folder. {_what_to_fetch(PUBLISHED, 'main')}")
    return _download(str(source), revision)


def weights_identity(source: str | Path, revision: str = "main") -> str:
    """Names what `read_checkpoint` would read, without reading it: "repo@revision", or a hash for local files.

    The hash is of names, sizes and a thousandth of the content: weights that were replaced in place are noticed, weights that
    were moved are the same. Missing files give their path, so that a version can be asked for before anything is there.
    """
    path = Path(source).expanduser()
    found = [path] if path.is_file() else [file for file in (path / CONFIG_FILE, path / WEIGHTS_FILE) if file.is_file()]
    found = found or sorted(path.glob("*.pth"))
    if not found:
        return f"{source}@{revision}"
    digest = xxhash.xxh64()
    for file in found:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            for place in range(0, size, max(_SAMPLE, size // _SAMPLES)):
                stream.seek(place)
                digest.update(stream.read(_SAMPLE))
    return f"local:{digest.hexdigest()}"


def complete_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published keys with nothing left out: both names of tied tensors, and `dec_blocks2` from `dec_blocks` when absent.

    Of two names with different values `scratch.layer_rn.{i}` decides.
    """
    full = dict(state)
    for key, value in state.items():
        match = _TIED.fullmatch(key)
        if match is None:
            continue
        prefix, number, index, rest = match.groups()
        if index is not None:
            full[f"{prefix}layer{int(index) + 1}_rn{rest}"] = value
        else:
            full.setdefault(f"{prefix}layer_rn.{int(number) - 1}{rest}", value)
    if not any(key.startswith("dec_blocks2.") for key in state):
        second = {
            "dec_blocks2." + key.removeprefix("dec_blocks."): v for key, v in state.items() if key.startswith("dec_blocks.")
        }
        full |= {key: value.clone() for key, value in second.items()}
    return full


def without_aliases(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor under one name, as in the published safetensors files."""
    return {key: value for key, value in state.items() if ".scratch.layer_rn." not in key}


def _what_to_fetch(repo: str, revision: str) -> str:
    return (
        "Needed once: config.json and model.safetensors, about 2.3 GB, licence CC BY-NC-SA 4.0 (non-commercial use only). "
        "Fetch them on a machine with network access:\n"
        f"  hf download {repo} --revision {revision} {CONFIG_FILE} {WEIGHTS_FILE}\n"
        "or name a local folder that holds the two files (`dust3r_model` in the run config of the resource `pipeline`).\n"
        "The colmap engine needs no weights: set `geometry: colmap` there, FW_GEOMETRY=colmap, or FW_PROFILE=laptop."
    )


def _download(repo: str, revision: str) -> Checkpoint:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        config, weights = (Path(hf_hub_download(repo, name, revision=revision)) for name in (CONFIG_FILE, WEIGHTS_FILE))
    except (OSError, ValueError, EntryNotFoundError) as error:
        raise DUSt3RWeightsError(
            f"DUSt3R weights {repo!r} (revision {revision!r}) are neither a local folder nor available from the hub: {error}\n"
            f"{_what_to_fetch(repo, revision)}"
        ) from error
    return _read_files(config, weights)


def _read_folder(folder: Path) -> Checkpoint:
    config, weights = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    if config.is_file() and weights.is_file():
        return _read_files(config, weights)
    originals = sorted(folder.glob("*.pth"))
    if len(originals) == 1:
        return _read_pth(originals[0])
    if originals:
        raise DUSt3RWeightsError(f"{folder}: {len(originals)} .pth files; name one of them")
    lacking = " and ".join(file.name for file in (config, weights) if not file.is_file())
    raise DUSt3RWeightsError(f"{folder}: no {lacking} here. {_what_to_fetch(PUBLISHED, 'main')}")


def _read_files(config_file: Path, weights_file: Path) -> Checkpoint:
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))  # reads Infinity
        if not isinstance(config, dict):
            raise ValueError("it should hold an object")
    except ValueError as error:
        raise DUSt3RWeightsError(f"{config_file}: not a configuration ({error}); download it again") from error
    try:
        return Checkpoint(config, load_file(weights_file), str(weights_file))
    except (SafetensorError, OSError) as error:
        raise DUSt3RWeightsError(f"{weights_file}: not a readable safetensors file ({error}); download it again") from error


def _read_pth(path: Path) -> Checkpoint:
    """An original training checkpoint: {"args": argparse.Namespace, "model": tensors, ...}."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise DUSt3RWeightsError(
            f"{path}: not a .pth file of tensors and plain settings, and nothing else in a pickle is ever loaded "
            f"({type(error).__name__}: {str(error).partition(chr(10))[0]}); use config.json and model.safetensors of {PUBLISHED}"
        ) from error
    settings = content.get("args") if isinstance(content, dict) else None
    recipe, state = getattr(settings, "model", None), content.get("model") if isinstance(content, dict) else None
    if not (isinstance(recipe, str) and isinstance(state, dict) and all(isinstance(v, Tensor) for v in state.values())):
        raise DUSt3RWeightsError(f"{path}: not an original DUSt3R checkpoint (it has no args.model beside its tensors)")
    try:
        config = parse_recipe(recipe)
    except ValueError as error:
        raise DUSt3RWeightsError(f"{path}: {error}") from error
    return Checkpoint(config, state, str(path))


def parse_recipe(recipe: str) -> dict[str, Any]:
    """The text by which an original checkpoint names its network -> the keys of config.json. Read, never evaluated.

    Raises ValueError for another network, or anything in it but names with plain values.
    """
    try:
        if len(recipe) > _LONGEST_RECIPE:
            raise ValueError("too long")
        call = ast.parse(recipe.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError("expected Name(key=value, ...)")
        config = {keyword.arg: _plain(keyword.value) for keyword in call.keywords if keyword.arg is not None}
        if len(config) != len(call.keywords):
            raise ValueError("expected Name(key=value, ...)")
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"the network's description {recipe[:200]!r} cannot be read ({error})") from error
    if call.func.id != _CLASS:
        raise ValueError(f"holds a {call.func.id}, not DUSt3R's {_CLASS}")
    return config


def _plain(node: ast.expr) -> Any:
    """A number, text, truth value, `inf`, or a tuple or list of them."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name) and node.id == "inf":
        return math.inf
    if isinstance(node, ast.Tuple | ast.List):
        return [_plain(item) for item in node.elts]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _plain(node.operand)
        if isinstance(value, int | float):
            return -value
    raise ValueError(f"{ast.unparse(node)[:60]!r} is not a plain value")
