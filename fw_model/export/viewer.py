"""A page that shows a world offline: its video, its depth, and a cloud one can turn, with the cameras along the path."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np

from fw_model.cameras import invert_pose
from fw_model.export.cloud import Cloud, cloud_of
from fw_model.export.pictures import depth_colours, jpeg
from fw_model.export.world import World

POINTS = 150_000  # of the page: 1.8 MB of it
SIDE = 320  # pixels of its pictures
PAGE = Path(__file__).with_name("viewer.html")
PLACE = "/*WORLD*/null"  # where the page's script takes the world


def write_viewer(path: Path, world: World, near: float, far: float) -> None:
    """One HTML file that loads nothing from elsewhere. near, far: of the depth's colours, see `pictures.depth_colours`."""
    text = PAGE.read_text(encoding="utf-8")
    # "<" would let a prompt close the script
    data = json.dumps(viewer_data(world, near, far)).replace("<", "\\u003c")
    path.write_text(text.replace(PLACE, data), encoding="utf-8")


def viewer_data(world: World, near: float, far: float) -> dict[str, Any]:
    """What the page's script reads: bytes as base64, little endian."""
    cloud = cloud_of(world, POINTS)
    centre, reach = _reach(cloud)
    quantised = ((cloud.points - centre) / reach * 8192).clip(-32767, 32767).round().astype("<i2")
    video = world.video.numpy()
    return {
        "title": str(world.meta.get("prompt", "")),
        "fps": world.fps,
        "frames": [_image(frame) for frame in video],
        "depths": [_image(depth_colours(frame, near, far)) for frame in world.depth.numpy()],
        "range": [near, far],
        "centre": centre.tolist(),
        "reach": reach,
        "count": len(quantised),
        "points": _base64(quantised.tobytes()),
        "colours": _base64(cloud.colours.tobytes()),
        "frame": _base64(cloud.frame.astype("<u2").tobytes()),
        "cameras": [_camera(*one) for one in zip(invert_pose(world.cameras.w2c), world.cameras.intrinsics, strict=True)],
        "requested": []
        if world.requested is None
        else [_camera(*one) for one in zip(invert_pose(world.requested.w2c), world.requested.intrinsics, strict=True)],
        "size": [int(side) for side in video.shape[1:3]],
    }


def _reach(cloud: Cloud) -> tuple[np.ndarray, float]:
    """Middle of the points, and the distance from it that nine tenths are within: what the page shows at first."""
    if not len(cloud.points):
        return np.zeros(3, np.float32), 1.0
    centre = np.median(cloud.points, axis=0)
    return centre, float(max(np.quantile(np.linalg.norm(cloud.points - centre, axis=1), 0.9), 1e-6))


def _camera(c2w: Any, k: Any) -> list[float]:
    """12 numbers of c2w, then fx, fy, cx, cy."""
    return [*c2w.double().flatten().tolist(), *k.double()[[0, 1, 0, 1], [0, 1, 2, 2]].tolist()]


def _image(picture: np.ndarray) -> str:
    return "data:image/jpeg;base64," + _base64(jpeg(picture, SIDE, quality=80))


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
