"""What is asked for: one world. Everything that can be wrong with it is said before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError
from pydantic import Field, ValidationError, model_validator

from fw_model.cameras import Cameras, PoseFileError
from fw_model.config import ClipConfig, Config
from fw_model.errors import Explained, did_you_mean
from fw_model.model.fantasy_world import check_clip_size
from fw_model.train.sampling import SchedulerName, shifted_sigmas
from fw_model.trajectory.formats import read_path_file
from fw_model.trajectory.text import PathError, make_trajectory, parse_path

MAX_SIDE = 4096  # pixels; beyond, a typing error is likelier than a wish


class BadRequest(Explained, ValueError):
    """A request that cannot be met; the message says what is wrong with which part of it."""


class Request(Config):
    """One world to be made. A field left None takes what the model was trained on."""

    prompt: str
    negative_prompt: str = ""
    image: Path | None = None  # the first picture; without one the prompt alone decides
    trajectory: str | None = None  # moves by name, see `fw_model.trajectory.text`
    pose_file: Path | None = None  # a path in a file of its own, see `fw_model.trajectory.formats`
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    steps: int = Field(50, ge=1, le=1000)
    guidance_scale: float = Field(5.0, ge=0, le=50)  # 1: the prompt as it is, one pass a step; above 1: two passes
    shift: float = Field(5.0, gt=0, le=100)
    scheduler: SchedulerName = "euler"
    camera_scale: Literal["scene"] | float = 1.0  # of the path's translations; "scene": times the scene's mean distance
    seed: int = Field(0, ge=0, lt=2**63)
    geometry_at: Literal["last"] | tuple[int, ...] = "last"  # steps, counted from 0, at which geometry is read

    @model_validator(mode="after")
    def _check(self) -> Request:
        if not self.prompt.strip():
            raise ValueError("prompt: it is empty; say what is to be seen")
        if self.trajectory is not None and self.pose_file is not None:
            raise ValueError("trajectory and pose_file: both name a camera path; give one")
        if self.trajectory is not None:
            parse_path(self.trajectory)
        if isinstance(self.camera_scale, float) and not 0 < self.camera_scale < float("inf"):
            raise ValueError(f"camera_scale: {self.camera_scale:g} is no scale; it must be above 0, or 'scene'")
        if self.geometry_at != "last" and not (self.geometry_at and all(0 <= step < self.steps for step in self.geometry_at)):
            raise ValueError(f"geometry_at: steps are counted from 0 to {self.steps - 1}, got {list(self.geometry_at)}")
        return self


@dataclass(frozen=True)
class Prepared:
    """A request with its files read: sizes that fit the model, a path of as many cameras, a picture of that size."""

    request: Request
    frames: int
    height: int
    width: int
    cameras: Cameras | None  # in pixels of height x width, first camera as given
    picture: np.ndarray | None  # [H, W, 3] uint8 RGB

    @property
    def geometry_at(self) -> tuple[int, ...]:
        """Numbers of the steps at which geometry is read."""
        return (self.request.steps - 1,) if self.request.geometry_at == "last" else tuple(self.request.geometry_at)


def parse_request(raw: dict[str, Any], where: str = "request") -> Request:
    """Raises BadRequest with every key that is wrong."""
    try:
        return Request.model_validate(raw)
    except ValidationError as error:
        lines = []
        for fault in error.errors():
            key = ".".join(map(str, fault["loc"][:1]))
            near = did_you_mean(key, Request.model_fields) if fault["type"] == "extra_forbidden" else ""
            lines.append((f"{key}: " if key else "") + fault["msg"].removeprefix("Value error, ") + near)
        raise BadRequest(f"{where}: " + "; ".join(lines)) from error


def prepare(request: Request, clip: ClipConfig, cameras: Cameras | None = None, image: np.ndarray | None = None) -> Prepared:
    """Read the request's files and hold them against each other.

    Args:
        request: what is asked.
        clip: the clips the model was trained on, whose size is taken where none is asked for.
        cameras, image: in place of the request's files; image is [H, W, 3] uint8 RGB.

    Raises BadRequest.
    """
    picture = image if image is not None else (None if request.image is None else read_picture(request.image))
    if picture is not None and (picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3):
        raise BadRequest(f"image: expected [H, W, 3] uint8 RGB, got {list(picture.shape)} {picture.dtype}")
    tall = picture is not None and picture.shape[0] > picture.shape[1]
    height, width, frames = clip.bucket(*((2, 1) if tall else (1, 2)))
    height, width = request.height or height, request.width or width
    given = _given_path(request, cameras, height, width)
    frames = request.num_frames or (len(given) if given is not None else frames)
    try:
        check_clip_size(frames, height, width)
    except ValueError as error:
        raise BadRequest(str(error)) from error
    if max(height, width) > MAX_SIDE:
        raise BadRequest(f"size: {height} x {width} pixels; at most {MAX_SIDE} a side")
    if given is None and request.trajectory is not None:
        try:
            given = make_trajectory(request.trajectory, frames, height, width)
        except PathError as error:
            raise BadRequest(f"trajectory: {error}") from error
    if given is not None:
        _check_path(given, frames)
        given = given.resized(height, width)
    assert len(shifted_sigmas(request.steps, request.shift)) == request.steps + 1
    return Prepared(request, frames, height, width, given, None if picture is None else _fitted(picture, height, width))


def read_picture(path: Path) -> np.ndarray:
    """[H, W, 3] uint8 RGB, turned as its EXIF says. Raises BadRequest for what is no picture."""
    from PIL import ImageOps

    try:
        with Image.open(path) as image:
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))  # a copy: torch wants arrays it may write
    except FileNotFoundError as error:
        raise BadRequest(f"image: {path}: is not there") from error
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise BadRequest(f"image: {path}: cannot be read as a picture ({error})") from error


def _given_path(request: Request, cameras: Cameras | None, height: int, width: int) -> Cameras | None:
    """The path that is already one camera a frame."""
    if cameras is not None:
        if request.trajectory is not None or request.pose_file is not None:
            raise BadRequest("cameras: the request names a path of its own; give one")
        return cameras
    if request.pose_file is None:
        return None
    try:
        return read_path_file(request.pose_file, height, width).cameras
    except FileNotFoundError as error:
        raise BadRequest(f"pose_file: {request.pose_file}: is not there") from error
    except (PoseFileError, UnicodeDecodeError) as error:
        raise BadRequest(f"pose_file: {error}") from error


def _check_path(cameras: Cameras, frames: int) -> None:
    if len(cameras) != frames:
        raise BadRequest(f"cameras: {len(cameras)} poses for {frames} frames; give one a frame")
    if not (cameras.w2c.isfinite().all() and cameras.intrinsics.isfinite().all()):
        raise BadRequest("cameras: a number is not finite")
    focal = cameras.intrinsics[:, [0, 1], [0, 1]]
    if (focal <= 0).any():
        t = int((focal <= 0).any(1).nonzero()[0])
        raise BadRequest(f"cameras: frame {t} has focal lengths {focal[t].tolist()}: no lens")
    rotation = cameras.w2c[:, :, :3].double()
    if (rotation @ rotation.mT - rotation.new_tensor(np.eye(3))).abs().max() > 1e-2 or (rotation.det() < 0).any():
        raise BadRequest("cameras: a 3 x 3 part is no rotation: poses must be world-to-camera with OpenCV axes")


def _fitted(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resized to cover height x width and cropped to its middle, as clips are."""
    scale = max(height / picture.shape[0], width / picture.shape[1])
    size = (max(width, round(picture.shape[1] * scale)), max(height, round(picture.shape[0] * scale)))
    resized = np.array(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))
    top, left = (resized.shape[0] - height) // 2, (resized.shape[1] - width) // 2
    return np.ascontiguousarray(resized[top : top + height, left : left + width])
