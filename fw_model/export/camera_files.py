"""A world's cameras in the forms that other tools read: JSON, COLMAP's text model, nerfstudio's transforms.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fw_model.cameras import Cameras, invert_pose, matrix_to_quaternion, project
from fw_model.export.cloud import Cloud
from fw_model.export.world import World
from fw_model.files import write_json

OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])  # nerfstudio's camera: x right, y up, z back
OBSERVATIONS = 200  # points of COLMAP's model that each frame lists


def image_name(frame: int) -> str:
    return f"frame_{frame:05d}.jpg"


def cameras_json(world: World) -> dict[str, Any]:
    """w2c [T][3][4] with OpenCV axes, the first camera the world; intrinsics [T][3][3] in pixels, pixel centres at + 0.5."""
    height, width = world.video.shape[1:3]
    return {
        "convention": "w2c, OpenCV axes (x right, y down, z forward); pixel (row v, column u) is centred at (u + 0.5, v + 0.5)",
        "unit": "clip units: mean distance of the scene's points = 1",
        "height": height,
        "width": width,
        "fps": world.fps,
        "w2c": _nested(world.cameras.w2c),
        "intrinsics": _nested(world.cameras.intrinsics),
        "requested": None
        if world.requested is None
        else {"w2c": _nested(world.requested.w2c), "intrinsics": _nested(world.requested.intrinsics)},
    }


def write_transforms(path: Path, world: World) -> None:
    """nerfstudio's transforms.json: c2w with OpenGL axes, a lens a frame; pictures below `images/`."""
    height, width = world.video.shape[1:3]
    frames = []
    for t, (c2w, k) in enumerate(zip(_c2w(world.cameras), world.cameras.intrinsics.double().numpy(), strict=True)):
        lens = {"fl_x": k[0, 0], "fl_y": k[1, 1], "cx": k[0, 2], "cy": k[1, 2], "w": width, "h": height}
        frames.append({"file_path": f"images/{image_name(t)}", "transform_matrix": (c2w @ OPENGL).tolist(), **lens})
    write_json(path, {"camera_model": "OPENCV", "ply_file_path": "points.ply", "frames": frames})


def write_colmap(folder: Path, world: World, cloud: Cloud) -> None:
    """COLMAP's text model: cameras.txt, images.txt, points3D.txt, one PINHOLE camera a frame, ids from 1.

    Points are the cloud's, each seen in the frame it comes from; the frames list at most `OBSERVATIONS` of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    height, width = world.video.shape[1:3]
    lens = world.cameras.intrinsics.double().numpy()
    quaternion = matrix_to_quaternion(world.cameras.w2c[:, :, :3].double()).numpy()
    translation = world.cameras.w2c[:, :, 3].double().numpy()
    lines = ["# CAMERA_ID MODEL WIDTH HEIGHT fx fy cx cy"]
    lines += [f"{t + 1} PINHOLE {width} {height} {_row(k[[0, 1, 0, 1], [0, 1, 2, 2]])}" for t, k in enumerate(lens)]
    (folder / "cameras.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    images, tracks = ["# IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME", "# POINTS2D as X Y POINT3D_ID"], []
    for t in range(len(lens)):
        x, y, z, w = quaternion[t]
        images.append(f"{t + 1} {_row([w, x, y, z])} {_row(translation[t])} {t + 1} {image_name(t)}")
        chosen = _evenly(np.flatnonzero(cloud.frame == t), OBSERVATIONS)
        uv = _projected(cloud.points[chosen], world.cameras, t)
        images.append(" ".join(f"{_row(xy)} {index + 1}" for xy, index in zip(uv, chosen, strict=True)))
        tracks += [(index, t + 1, place) for place, index in enumerate(chosen)]
    (folder / "images.txt").write_text("\n".join(images) + "\n", encoding="utf-8")
    rows = ["# POINT3D_ID X Y Z R G B ERROR TRACK as IMAGE_ID POINT2D_IDX"]
    for index, image, place in tracks:
        colour = " ".join(map(str, cloud.colours[index]))
        rows.append(f"{index + 1} {_row(cloud.points[index])} {colour} 0 {image} {place}")
    (folder / "points3D.txt").write_text("\n".join(rows) + "\n", encoding="utf-8")


def _projected(points: np.ndarray, cameras: Cameras, t: int) -> np.ndarray:
    import torch

    uv, _ = project(torch.from_numpy(points).double(), cameras.intrinsics[t].double(), cameras.w2c[t].double())
    return np.asarray(uv.numpy())


def _evenly(index: np.ndarray, most: int) -> np.ndarray:
    return index if len(index) <= most else index[np.linspace(0, len(index) - 1, most).astype(int)]


def _c2w(cameras: Cameras) -> np.ndarray:
    out = np.tile(np.eye(4), (len(cameras), 1, 1))
    out[:, :3] = invert_pose(cameras.w2c.double()).numpy()
    return out


def _nested(values: Tensor) -> Any:
    return values.double().tolist()


def _row(values: Any) -> str:
    return " ".join(f"{float(value):.10g}" for value in values)
