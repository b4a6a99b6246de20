"""A saved world read back."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from fw_model.cameras import Cameras
from fw_model.errors import BadFileError
from fw_model.export.world import World


def read_world(folder: Path) -> World:
    """What `World.save` wrote; the video as it was encoded, depth and confidences in half precision.

    Raises BadFileError naming the file that is missing or not what it should be.
    """
    said = _json(folder / "cameras.json")
    try:
        size = (int(said["height"]), int(said["width"]))
        cameras, requested = _cameras(said, size), said["requested"] and _cameras(said["requested"], size)
        fps = float(said["fps"])
    except (KeyError, TypeError, ValueError) as error:
        raise BadFileError(f"{folder / 'cameras.json'}: not a saved world's ({error})") from error
    arrays = _arrays(folder / "depth.npz")
    try:
        return World(
            _video(folder / "video.mp4", size),
            **arrays,
            cameras=cameras,
            requested=requested,
            fps=fps,
            meta=_json(folder / "meta.json"),
        )
    except ValueError as error:
        raise BadFileError(f"{folder}: its files do not go together ({error})") from error


def _cameras(said: dict[str, Any], size: tuple[int, int]) -> Cameras:
    return Cameras(torch.tensor(said["w2c"]).float(), torch.tensor(said["intrinsics"]).float(), size)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadFileError(f"{path}: is not there: no saved world") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadFileError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise BadFileError(f"{path}: expected an object")
    return content


def _arrays(path: Path) -> dict[str, torch.Tensor]:
    try:
        with np.load(path, allow_pickle=False) as data:
            return {name: torch.from_numpy(data[name]).float() for name in ("depth", "depth_conf", "points", "points_conf")}
    except FileNotFoundError as error:
        raise BadFileError(f"{path}: is not there") from error
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise BadFileError(f"{path}: damaged, or not a saved world's ({error})") from error


def _video(path: Path, size: tuple[int, int]) -> torch.Tensor:
    try:
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except FileNotFoundError as error:
        raise BadFileError(f"{path}: is not there") from error
    except av.FFmpegError as error:
        raise BadFileError(f"{path}: cannot be decoded ({error})") from error
    return torch.from_numpy(np.stack(frames)[:, : size[0], : size[1]].copy()) if frames else torch.zeros(0, *size, 3).byte()
