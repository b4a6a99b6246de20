"""A video's lens: where it is written down, how it follows resizing and cropping, and how its distortion is taken out.

Everything after reading works on a pinhole: pictures are undistorted once, when they are read (`Lens.undistorter`). Positions
are in pixels with the centre of the upper left one at (0.5, 0.5), as COLMAP and nerfstudio have it; OpenCV's are less by a half.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fw_model.errors import Explained

Source = Literal["calibration", "video", "clip"]
ASPECT_TOLERANCE = 0.01  # relative: a calibration of another aspect is for another crop of the sensor
MAX_FOCAL, MIN_FOCAL = 50.0, 0.1  # of the long side; beyond, the file is in other units (shares, millimetres)
# COLMAP's models and what their parameters are called here; f stands for both focal lengths.
COLMAP_MODELS = {
    "SIMPLE_PINHOLE": ("f", "cx", "cy"),
    "PINHOLE": ("fx", "fy", "cx", "cy"),
    "SIMPLE_RADIAL": ("f", "cx", "cy", "k1"),
    "RADIAL": ("f", "cx", "cy", "k1", "k2"),
    "OPENCV": ("fx", "fy", "cx", "cy", "k1", "k2", "p1", "p2"),
}
NERFSTUDIO_MODELS = ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "PERSPECTIVE")
FORMATS = "NAME.camera.json, NAME.cameras.txt or cameras.txt (COLMAP), NAME.transforms.json or transforms.json (nerfstudio)"


class LensError(Explained, ValueError):
    """A calibration that cannot be used; the message is `file: key: what is wrong and what to do`."""


@dataclass(frozen=True)
class Lens:
    """A pinhole with OpenCV's distortion, for pictures of height x width.

    `std` is the relative standard deviation of the focal length, 0 for a calibration. Raises LensError when the numbers
    are not those of a camera.
    """

    fx: float
    fy: float
    cx: float
    cy: float
    height: int
    width: int
    k1: float = 0.0
    k2: float = 0.0
    p1: float = 0.0
    p2: float = 0.0
    std: float = 0.0
    source: Source = "calibration"

    def __post_init__(self) -> None:
        for name in ("fx", "fy", "cx", "cy", "k1", "k2", "p1", "p2", "std"):
            if not np.isfinite(getattr(self, name)):
                raise LensError(f"{name}: {getattr(self, name)} is no finite number")
        long_side = max(self.height, self.width)
        for name in ("fx", "fy"):
            if not MIN_FOCAL * long_side <= getattr(self, name) <= MAX_FOCAL * long_side:
                raise LensError(
                    f"{name}: {getattr(self, name):g} cannot be a focal length in pixels of a {self.width}x{self.height} "
                    "picture; focal lengths and centre are given in pixels, not in millimetres or shares"
                )
        if not (0 <= self.cx <= self.width and 0 <= self.cy <= self.height):
            raise LensError(f"cx, cy: ({self.cx:g}, {self.cy:g}) lies outside the {self.width}x{self.height} picture")

    @property
    def intrinsics(self) -> np.ndarray:
        """K [3, 3] float64 pixels."""
        return np.array([[self.fx, 0, self.cx], [0, self.fy, self.cy], [0, 0, 1.0]])

    @property
    def distortion(self) -> np.ndarray:
        """[4] k1, k2, p1, p2."""
        return np.array([self.k1, self.k2, self.p1, self.p2])

    @property
    def distorted(self) -> bool:
        return bool(self.distortion.any())

    def resized(self, height: int, width: int) -> Lens:
        """For the whole picture resized to height x width; the two directions may be scaled differently."""
        across, down = width / self.width, height / self.height
        return replace(
            self, fx=self.fx * across, cx=self.cx * across, fy=self.fy * down, cy=self.cy * down, height=height, width=width
        )

    def cropped(self, left: float, top: float, height: int, width: int) -> Lens:
        """For the part of the picture that begins at position (left, top). Raises LensError when it misses the lens' centre."""
        return replace(self, cx=self.cx - left, cy=self.cy - top, height=height, width=width)

    def distort(self, xy: np.ndarray) -> np.ndarray:
        """Where the lens puts what a pinhole of the same K has at xy [..., 2] -> [..., 2]."""
        x, y = (xy[..., 0] - self.cx) / self.fx, (xy[..., 1] - self.cy) / self.fy
        r2 = x * x + y * y
        radial = 1 + self.k1 * r2 + self.k2 * r2 * r2
        u = x * radial + 2 * self.p1 * x * y + self.p2 * (r2 + 2 * x * x)
        v = y * radial + self.p1 * (r2 + 2 * y * y) + 2 * self.p2 * x * y
        return np.stack([u * self.fx + self.cx, v * self.fy + self.cy], -1)

    def pinhole(self) -> Lens:
        """The undistorted lens of the same centre, with a view narrow enough to be seen whole through this one."""
        if not self.distorted:
            return self
        v, u = np.meshgrid(np.linspace(0.5, self.height - 0.5, 33), np.linspace(0.5, self.width - 0.5, 33), indexing="ij")
        edge = np.stack([u, v], -1)
        low, high = 0.5, 4.0  # how many times longer the focal length gets
        centre = np.array([self.cx, self.cy])
        if not self._inside(centre + (edge - centre) / high):
            raise LensError(f"k1, k2, p1, p2: {self.distortion.tolist()} fold the picture over; they are not this lens'")
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (low, middle) if self._inside(centre + (edge - centre) / middle) else (middle, high)
        return replace(self, fx=self.fx * high, fy=self.fy * high, k1=0.0, k2=0.0, p1=0.0, p2=0.0)

    def _inside(self, xy: np.ndarray) -> bool:
        at = self.distort(xy)
        return bool((at >= 0.5).all() and (at[..., 0] <= self.width - 0.5).all() and (at[..., 1] <= self.height - 0.5).all())

    def undistortion(self) -> tuple[Lens, np.ndarray, np.ndarray]:
        """(pinhole, map_x, map_y [height, width] float32): `cv2.remap(picture, map_x, map_y, ...)` is the pinhole's picture."""
        import cv2  # `Lens` is part of every clip's description, which is read where no picture is

        pinhole, half = self.pinhole(), np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])
        maps = cv2.initUndistortRectifyMap(
            self.intrinsics - half,  # OpenCV has the first pixel's centre at 0
            self.distortion,
            np.eye(3),
            pinhole.intrinsics - half,
            (self.width, self.height),
            cv2.CV_32FC1,
        )
        return pinhole, maps[0], maps[1]

    def undistorter(self) -> Callable[[np.ndarray], np.ndarray]:
        """What turns a picture [height, width, 3] uint8 into the one that `pinhole()` would have taken.

        It raises LensError for a picture of another size.
        """
        if not self.distorted:
            return lambda picture: picture
        import cv2

        _, map_x, map_y = self.undistortion()

        def undistort(picture: np.ndarray) -> np.ndarray:
            if picture.shape[:2] != (self.height, self.width):
                raise LensError(f"frames are {picture.shape[0]}x{picture.shape[1]}, the lens is for {self.height}x{self.width}")
            return np.asarray(cv2.remap(picture, map_x, map_y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE))

        return undistort


# ------------------------------------------------------------------------------------------------------------ reading


CALIBRATION_ENDINGS = (".camera.json", ".cameras.txt", ".transforms.json")  # behind a video's name without its own
CALIBRATIONS = ("cameras.txt", "transforms.json")  # of all videos in a folder


def calibration_files(video: Path) -> list[Path]:
    """The files beside a video that may hold its calibration, in the order in which they count; see FORMATS."""
    # A name may be composed (NFC) in one place and decomposed (NFD) in the other, as file systems and archives differ.
    stems = dict.fromkeys((video.stem, *(unicodedata.normalize(form, video.stem) for form in ("NFC", "NFD"))))
    names = (*(stem + ending for ending in CALIBRATION_ENDINGS for stem in stems), *CALIBRATIONS)
    return [path for name in names if (path := video.with_name(name)).is_file()]


def read_calibration(video: Path, height: int, width: int) -> Lens | None:
    """The lens written down beside a video whose pictures are height x width (upright), None where there is no such file.

    A calibration for another size of the same aspect is scaled. Raises LensError, naming file and key, for a file that
    cannot be used: it is never passed over in silence.
    """
    for path in calibration_files(video):
        read = _camera_json if path.name.endswith("camera.json") else _transforms if path.suffix == ".json" else _cameras_txt
        try:
            values = read(path)
            own_height, own_width = int(values.pop("height", height)), int(values.pop("width", width))
            if own_height <= 0 or own_width <= 0:
                raise LensError(f"width, height: {own_width}x{own_height} is no picture's size")
            if abs(own_width * height / (own_height * width) - 1) > ASPECT_TOLERANCE:
                raise LensError(
                    f"width, height: made for {own_width}x{own_height}, the video is {width}x{height}, which is another crop; "
                    "calibrate at the video's own aspect"
                )
            values.setdefault("cx", own_width / 2)
            values.setdefault("cy", own_height / 2)
            return Lens(**values, height=own_height, width=own_width).resized(height, width)
        except LensError as error:
            raise LensError(f"{path.name}: {error}") from error
    return None


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise LensError(f"not JSON ({error})") from error
    if not isinstance(content, dict):
        raise LensError("an object {...} of numbers is expected")
    return content


def _number(content: dict[str, Any], key: str) -> float:
    value = content[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise LensError(f"{key}: {value!r} is no number")
    return float(value)


def _camera_json(path: Path) -> dict[str, Any]:
    content = _load(path)
    names = ("fx", "fy", "cx", "cy", "k1", "k2", "p1", "p2", "width", "height")
    unknown = sorted(set(content) - set(names))
    if unknown:
        raise LensError(f"{unknown[0]}: not known here; the keys are {', '.join(names)}")
    if "fx" not in content:
        raise LensError("fx: missing; give the focal length in pixels (fy, cx, cy default to fx and the middle)")
    found = {key: _number(content, key) for key in names if key in content}
    return {"fy": found["fx"]} | found


def _cameras_txt(path: Path) -> dict[str, Any]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise LensError(f"not a text file ({error})") from error
    rows = [(i, line.split()) for i, line in enumerate(lines, 1) if line.strip() and not line.lstrip().startswith("#")]
    if not rows:
        raise LensError("no camera in the file")
    if len({tuple(row[1:]) for _, row in rows}) > 1:
        raise LensError(f"{len(rows)} different cameras; a video has one: keep its own as NAME.cameras.txt")
    line, row = rows[0]
    if len(row) < 4 or row[1] not in COLMAP_MODELS:
        model = row[1] if len(row) > 1 else "nothing"
        raise LensError(
            f"line {line}: camera model {model} is not one of {', '.join(COLMAP_MODELS)}; undistort with COLMAP first"
        )
    names = COLMAP_MODELS[row[1]]
    if len(row) != 4 + len(names):
        raise LensError(f"line {line}: {row[1]} has {len(names)} parameters ({', '.join(names)}), found {len(row) - 4}")
    try:
        found: dict[str, Any] = dict(zip(names, map(float, row[4:]), strict=True))
        size = {"width": int(row[2]), "height": int(row[3])}
    except ValueError as error:
        raise LensError(f"line {line}: {error}") from error
    if "f" in found:
        found["fx"] = found["fy"] = found.pop("f")
    return found | size


def _transforms(path: Path) -> dict[str, Any]:
    content = _load(path)
    if "fl_x" not in content and "camera_angle_x" not in content:
        each = [f for f in content.get("frames", []) if isinstance(f, dict) and "fl_x" in f]
        if not each:
            raise LensError("fl_x: missing; nerfstudio writes fl_x, fl_y, cx, cy, w, h at the top")
        if len({json.dumps([f.get(k) for k in ("fl_x", "fl_y", "cx", "cy")]) for f in each}) > 1:
            raise LensError("fl_x: frames have different lenses; one lens a video can be used (a zoom is not)")
        content = content | each[0]
    model = content.get("camera_model", "OPENCV")
    if model not in NERFSTUDIO_MODELS:
        raise LensError(f"camera_model: {model} is not one of {', '.join(NERFSTUDIO_MODELS)}; undistort the video first")
    for key in ("k3", "k4"):
        if key in content and _number(content, key) != 0:
            raise LensError(f"{key}: {content[key]} is not 0; only k1, k2, p1, p2 are used: calibrate with model OPENCV")
    pairs = {"fl_x": "fx", "fl_y": "fy", "w": "width", "h": "height"}
    found: dict[str, Any] = {new: _number(content, old) for old, new in pairs.items() if old in content}
    found |= {key: _number(content, key) for key in ("cx", "cy", "k1", "k2", "p1", "p2") if key in content}
    if "fx" not in found:
        if "width" not in found:
            raise LensError("w: missing; camera_angle_x alone gives no focal length in pixels")
        found["fx"] = found["width"] / 2 / np.tan(_number(content, "camera_angle_x") / 2)
    return {"fy": found["fx"]} | found
