"""Camera paths in the files of other tools, read into this project's conventions and written from them.

Every format has one convention, or must state it: RealEstate10K's rows and COLMAP's images.txt (world-to-camera, OpenCV axes),
TUM (camera-to-world, OpenCV), nerfstudio's transforms.json (camera-to-world, OpenGL), and a JSON list of matrices that names its
own. What cannot be told is refused: a path read the wrong way round looks like another path.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fw_model.cameras import (
    DEFAULT_LENS,
    Cameras,
    PoseFileError,
    invert_pose,
    matrix_to_quaternion,
    pose_rows,
    quaternion_to_matrix,
    read_pose_file,
    with_lens,
    write_pose_file,
)

Convention = Literal["w2c_opencv", "c2w_opencv", "w2c_opengl", "c2w_opengl"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)
FLIP = torch.diag(torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64))  # OpenCV's camera axes and OpenGL's
_TOLERANCE = 1e-2


@dataclass(frozen=True)
class ReadPath:
    """A path and how its file was read, in words."""

    cameras: Cameras  # w2c, OpenCV axes, as in the file otherwise: frame 0 need not be the identity
    said: str


def read_path_file(path: Path, height: int, width: int) -> ReadPath:
    """Read a camera path by what is in the file; intrinsics in pixels of height x width.

    Raises PoseFileError, naming file and line or frame, for what is none of the formats or cannot be told.
    """
    if path.is_dir():
        inside = path / "images.txt"
        if not inside.is_file():
            raise PoseFileError(f"{path}: a folder without COLMAP's images.txt")
        return _colmap(inside, height, width)
    if path.suffix == ".json":
        return _json(path, height, width)
    if path.name == "images.txt":
        return _colmap(path, height, width)
    fields = pose_rows(path)[0][1]
    if len(fields) == 8:
        return _tum(path, height, width)
    cameras = read_pose_file(path, height, width)
    count = len(pose_rows(path)[0][1])
    lens = "its lens as shares of a 1280 x 720 picture" if count == 19 else "the base model's lens"
    return ReadPath(cameras, f"{path.name}: {count} numbers a row, world-to-camera with OpenCV axes, {lens}")


def to_w2c(matrices: Tensor, convention: Convention) -> Tensor:
    """Poses [T, 3, 4] in a convention -> w2c [T, 3, 4] with OpenCV axes. The same function turns them back."""
    w2c = invert_pose(matrices) if convention.startswith("c2w") else matrices
    return torch.cat([FLIP.to(w2c) @ w2c[:, :, :3], FLIP.to(w2c) @ w2c[:, :, 3:]], -1) if convention.endswith("opengl") else w2c


def from_w2c(w2c: Tensor, convention: Convention) -> Tensor:
    """w2c [T, 3, 4] with OpenCV axes -> poses [T, 3, 4] in a convention."""
    turned = torch.cat([FLIP.to(w2c) @ w2c[:, :, :3], FLIP.to(w2c) @ w2c[:, :, 3:]], -1) if convention.endswith("opengl") else w2c
    return invert_pose(turned) if convention.startswith("c2w") else turned


# -------------------------------------------------------------------------------------------------------------- reading


def _colmap(path: Path, height: int, width: int) -> ReadPath:
    rows, lines = [], [line for line in path.read_text(encoding="utf-8-sig").splitlines() if not line.startswith("#")]
    for number, line in enumerate(lines[::2], start=1):  # every second line lists what the image sees
        fields = line.split()
        if not fields:
            continue
        if len(fields) < 10:
            raise PoseFileError(f"{path}: image {number}: {len(fields)} fields; IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME")
        rows.append((" ".join(fields[9:]), fields[8], [_finite(x, f"{path}: image {number}") for x in fields[1:8]]))
    if not rows:
        raise PoseFileError(f"{path}: no images in it")
    rows.sort()  # by name: ids are in the order of registration
    q = torch.tensor([row[2] for row in rows], dtype=torch.float64)
    if (q[:, :4].norm(dim=1) - 1).abs().max() > _TOLERANCE:
        raise PoseFileError(f"{path}: a quaternion is not of unit length")
    w2c = torch.cat([quaternion_to_matrix(q[:, [1, 2, 3, 0]]), q[:, 4:, None]], -1)
    sizes = _colmap_cameras(path.with_name("cameras.txt"))
    said = f"{path.name}: COLMAP, world-to-camera with OpenCV axes, {len(rows)} images in the order of their names"
    if not sizes:
        return ReadPath(_default_lens(w2c, height, width), said + ", no cameras.txt: the base model's lens")
    missing = [row[1] for row in rows if row[1] not in sizes]
    if missing:
        raise PoseFileError(f"{path}: camera {missing[0]} is not in cameras.txt")
    lens = torch.tensor([sizes[row[1]][1] for row in rows], dtype=torch.float64)
    (source_height, source_width) = sizes[rows[0][1]][0]
    if any(sizes[row[1]][0] != (source_height, source_width) for row in rows):
        raise PoseFileError(f"{path}: its cameras have pictures of several sizes")
    return ReadPath(_with_pixels(w2c, lens, source_height, source_width, height, width), said)


def _colmap_cameras(path: Path) -> dict[str, tuple[tuple[int, int], list[float]]]:
    """Camera id -> ((height, width), fx fy cx cy in pixels); {} without a file."""
    if not path.is_file():
        return {}
    found = {}
    for line in path.read_text(encoding="utf-8-sig").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        name, model, width, height, *numbers = line.split()
        p = [_finite(x, f"{path}: camera {name}") for x in numbers]
        lens = {"PINHOLE": p[:4], "SIMPLE_PINHOLE": [p[0], p[0], *p[1:3]]}.get(model)
        if lens is None:
            raise PoseFileError(f"{path}: camera {name} is {model}; a path has PINHOLE or SIMPLE_PINHOLE (undistort first)")
        found[name] = ((int(height), int(width)), lens)
    return found


def _tum(path: Path, height: int, width: int) -> ReadPath:
    rows = []
    for line, fields in pose_rows(path):
        if len(fields) != 8:
            raise PoseFileError(f"{path}:{line}: {len(fields)} numbers; TUM's rows are t tx ty tz qx qy qz qw")
        rows.append([_finite(x, f"{path}:{line}") for x in fields])
    values = torch.tensor(rows, dtype=torch.float64)
    if (values[:, 4:].norm(dim=1) - 1).abs().max() > _TOLERANCE:
        raise PoseFileError(f"{path}: a quaternion is not of unit length: the columns are t tx ty tz qx qy qz qw")
    if (values[:, 0].diff() <= 0).any():
        raise PoseFileError(f"{path}: times do not increase: the first column is the time")
    c2w = torch.cat([quaternion_to_matrix(values[:, 4:]), values[:, 1:4, None]], -1)
    said = f"{path.name}: TUM, camera-to-world with OpenCV axes, the base model's lens"
    return ReadPath(_default_lens(invert_pose(c2w), height, width), said)


def _json(path: Path, height: int, width: int) -> ReadPath:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PoseFileError(f"{path}: not JSON ({error})") from error
    if isinstance(content, dict) and "frames" in content and "convention" not in content:
        return _nerfstudio(path, content, height, width)
    if isinstance(content, dict) and "w2c" in content and "matrices" not in content:  # as worlds are saved
        content = {**content, "matrices": content["w2c"], "convention": "w2c_opencv"}
    if not isinstance(content, dict) or "matrices" not in content:
        raise PoseFileError(
            f'{path}: expected {{"convention": ..., "matrices": [...]}}: a bare list does not say which way its matrices go; '
            f"conventions: {', '.join(CONVENTIONS)}"
        )
    convention = content.get("convention")
    if convention not in CONVENTIONS:
        raise PoseFileError(f"{path}: convention is {convention!r}; it must be stated: {', '.join(CONVENTIONS)}")
    w2c = to_w2c(_matrices(path, content["matrices"]), convention)
    said = f"{path.name}: {convention.replace('_', ' with ')} axes, as it says"
    if "intrinsics" not in content:
        return ReadPath(_default_lens(w2c, height, width), said + ", the base model's lens")
    return ReadPath(_stated_lens(path, content, w2c, height, width), said)


def _nerfstudio(path: Path, content: dict[str, Any], height: int, width: int) -> ReadPath:
    frames = sorted(content["frames"], key=lambda frame: str(frame.get("file_path", "")))
    matrices = _matrices(path, [frame.get("transform_matrix") for frame in frames])
    w2c = to_w2c(matrices, "c2w_opengl")
    said = f"{path.name}: nerfstudio, camera-to-world with OpenGL axes, in the order of the pictures' names"
    if any(content.get(key) for key in ("k1", "k2", "p1", "p2")):
        raise PoseFileError(f"{path}: its lens is distorted; a path has a pinhole (undistort first)")
    keys = ("fl_x", "fl_y", "cx", "cy", "h", "w")
    lenses = [[frame.get(key, content.get(key)) for key in keys] for frame in frames]
    if any(value is None for lens in lenses for value in lens):
        return ReadPath(_default_lens(w2c, height, width), said + ", no lens in it: the base model's")
    lens = torch.tensor(lenses, dtype=torch.float64)
    if (lens[:, 4:] != lens[0, 4:]).any():
        raise PoseFileError(f"{path}: its pictures have several sizes")
    return ReadPath(_with_pixels(w2c, lens[:, :4], int(lens[0, 4]), int(lens[0, 5]), height, width), said)


def _stated_lens(path: Path, content: dict[str, Any], w2c: Tensor, height: int, width: int) -> Cameras:
    """Intrinsics [T][3][3] in pixels of a stated picture, or [T][4] as shares of it: told apart, or refused."""
    k = torch.tensor(content["intrinsics"], dtype=torch.float64)
    if k.ndim == 3 and k.shape[1:] == (3, 3):
        k = k[:, [0, 1, 0, 1], [0, 1, 2, 2]]
    if k.shape != (len(w2c), 4):
        raise PoseFileError(f"{path}: intrinsics are {list(k.shape)}; one 3 x 3 matrix or fx fy cx cy a frame")
    if not k.isfinite().all() or (k[:, :2] <= 0).any():
        raise PoseFileError(f"{path}: focal lengths must be positive and finite")
    if (k < 4).all():  # shares: a principal point of 4 picture widths is none
        return with_lens(w2c.float(), k, *_own_size(content, height, width)).resized(height, width)
    if (k[:, :2] < 10).any():
        raise PoseFileError(f"{path}: intrinsics are neither all shares of a picture nor all pixels")
    if not {"height", "width"} <= content.keys():
        raise PoseFileError(f"{path}: intrinsics are in pixels, but of which picture? give height and width beside them")
    return _with_pixels(w2c, k, int(content["height"]), int(content["width"]), height, width)


def _own_size(content: dict[str, Any], height: int, width: int) -> tuple[int, int]:
    return int(content.get("height", height)), int(content.get("width", width))


def _matrices(path: Path, raw: Any) -> Tensor:
    """[T, 3, 4] float64 of T matrices 3 x 4 or 4 x 4; PoseFileError for what is no rigid pose, with what it looks like."""
    try:
        poses = torch.tensor(raw, dtype=torch.float64)
    except (ValueError, TypeError, RuntimeError) as error:
        raise PoseFileError(f"{path}: its matrices are not all 3 x 4 or 4 x 4 numbers") from error
    if poses.ndim != 3 or poses.shape[1:] not in ((3, 4), (4, 4)) or not len(poses):
        raise PoseFileError(f"{path}: matrices are {list(poses.shape)}; expected [T, 3, 4] or [T, 4, 4]")
    if not poses.isfinite().all():
        raise PoseFileError(f"{path}: a number is not finite")
    if poses.shape[1] == 4:
        last = poses.new_tensor([0, 0, 0, 1])
        if (poses[:, 3] - last).abs().max() > 1e-6:
            transposed = (poses[:, :, 3] - last).abs().max() < 1e-6
            hint = ": they are transposed (translation in the last row)" if transposed else ""
            raise PoseFileError(f"{path}: the last row of a 4 x 4 pose must be 0 0 0 1{hint}")
    rotation = poses[:, :3, :3]
    off = (rotation @ rotation.mT - torch.eye(3, dtype=torch.float64)).abs().amax((1, 2))
    if off.max() > _TOLERANCE:
        t, size = int(off.argmax()), float(rotation[int(off.argmax())].det().abs()) ** (1 / 3)
        hint = f", it is scaled by {size:.3g}" if abs(size - 1) > _TOLERANCE else ""
        raise PoseFileError(f"{path}: frame {t}: not a rotation (off orthonormal by {float(off.max()):.2g}{hint})")
    if (rotation.det() < 0).any():
        t = int((rotation.det() < 0).nonzero()[0])
        raise PoseFileError(f"{path}: frame {t}: mirrors; an axis was flipped alone (OpenGL's differ in two)")
    return poses[:, :3]


def _finite(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise PoseFileError(f"{where}: {text!r} is no number") from error
    if not math.isfinite(value):
        raise PoseFileError(f"{where}: a number is not finite")
    return value


def _default_lens(w2c: Tensor, height: int, width: int) -> Cameras:
    lens = torch.tensor(DEFAULT_LENS, dtype=torch.float64).expand(len(w2c), -1)
    return with_lens(w2c.float(), lens, 720, 1280).resized(height, width)


def _with_pixels(w2c: Tensor, lens: Tensor, own_height: int, own_width: int, height: int, width: int) -> Cameras:
    shares = lens / lens.new_tensor([own_width, own_height, own_width, own_height])
    return with_lens(w2c.float(), shares, own_height, own_width).resized(height, width)


# -------------------------------------------------------------------------------------------------------------- writing


def write_path_file(path: Path, cameras: Cameras, kind: Literal["rows", "tum", "json", "nerfstudio"], fps: float = 16) -> None:
    """Write a path so that `read_path_file` gives it back: all formats but TUM's keep the lens.

    cameras: they must know the size of their image.
    """
    if cameras.size is None:
        raise ValueError(f"{path}: the cameras do not know the size of their image")
    height, width = cameras.size
    w2c, k = cameras.w2c.double(), cameras.intrinsics.double()
    if kind == "rows":
        write_pose_file(path, cameras)
    elif kind == "tum":
        c2w = invert_pose(w2c)
        times = torch.arange(len(c2w), dtype=torch.float64)[:, None] / fps
        rows = torch.cat([times, c2w[:, :, 3], matrix_to_quaternion(c2w[:, :, :3])], 1)
        path.write_text("".join(" ".join(f"{x:.10g}" for x in row) + "\n" for row in rows.tolist()), encoding="utf-8")
    elif kind == "json":
        content = {
            "convention": "w2c_opencv",
            "height": height,
            "width": width,
            "matrices": w2c.tolist(),
            "intrinsics": k.tolist(),
        }
        path.write_text(json.dumps(content), encoding="utf-8")
    else:
        c2w = from_w2c(w2c, "c2w_opengl")
        bottom = c2w.new_tensor([[0, 0, 0, 1]])
        frames = [
            {
                "file_path": f"images/frame_{t:05d}.jpg",
                "transform_matrix": torch.cat([pose, bottom]).tolist(),
                **dict(zip(("fl_x", "fl_y", "cx", "cy"), lens[[0, 1, 0, 1], [0, 1, 2, 2]].tolist(), strict=True)),
                "h": height,
                "w": width,
            }
            for t, (pose, lens) in enumerate(zip(c2w, k, strict=True))
        ]
        path.write_text(json.dumps({"camera_model": "OPENCV", "frames": frames}), encoding="utf-8")
