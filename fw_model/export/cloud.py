"""A world's points as a coloured cloud with its cameras: PLY, and GLB for any glTF viewer.

PLY keeps the world's axes (OpenCV's: x right, y down, z forward). glTF asks for y up, so GLB has (x, -y, -z).
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fw_model.cameras import invert_pose
from fw_model.export.world import World

GLTF_AXES = np.array([1.0, -1.0, -1.0], np.float32)
FRUSTUM = 0.05  # depth of the drawn cameras, of the cloud's median distance
PATH_COLOUR, REQUESTED_COLOUR = (255, 170, 30), (90, 200, 255)


@dataclass(frozen=True)
class Cloud:
    """N coloured points, in the world's unit and axes."""

    points: np.ndarray  # [N, 3] float32
    colours: np.ndarray  # [N, 3] uint8
    frame: np.ndarray  # [N] int, of the video


def cloud_of(world: World, most: int) -> Cloud:
    """Points of pixels with a depth, of all frames alike: every k-th, so that there are at most `most`."""
    known = ((world.depth > 0) & world.points.isfinite().all(-1)).flatten()
    index = known.nonzero()[:, 0]
    if len(index) > most:  # evenly, and not on a grid: a fixed stride would take the same columns of every row
        index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))[:most].sort().values]
    pixels = world.depth[0].numel()
    return Cloud(
        world.points.reshape(-1, 3)[index].numpy().astype(np.float32),
        world.video.reshape(-1, 3)[index].numpy(),
        (index // pixels).numpy(),
    )


def frusta(world: World, size: float) -> tuple[np.ndarray, np.ndarray]:
    """Lines [L, 2, 3] and their colours [L, 3] uint8: a pyramid a camera, and the path through their centres; the requested path
    too, where there is one. size: depth of the pyramids."""
    height, width = world.video.shape[1:3]
    lines: list[tuple[np.ndarray, np.ndarray]] = []
    colours: list[tuple[int, int, int]] = []
    for cameras, colour in ((world.cameras, PATH_COLOUR), (world.requested, REQUESTED_COLOUR)):
        if cameras is None:
            continue
        c2w = invert_pose(cameras.w2c.double()).numpy()
        centres = c2w[:, :, 3]
        corners = np.array([[0, 0, 1], [width, 0, 1], [width, height, 1], [0, height, 1]], np.float64)
        for pose, k in zip(c2w, cameras.intrinsics.double().numpy(), strict=True):
            rays = corners @ np.linalg.inv(k).T * size
            seen = rays @ pose[:, :3].T + pose[:, 3]
            lines += [(pose[:, 3], corner) for corner in seen]
            lines += [(seen[i], seen[(i + 1) % 4]) for i in range(4)]
        lines += list(pairwise(centres))
        colours += [colour] * (len(lines) - len(colours))
    return np.array(lines, np.float32).reshape(-1, 2, 3), np.array(colours, np.uint8).reshape(-1, 3)


def frustum_size(cloud: Cloud) -> float:
    """Depth of the drawn cameras, in the cloud's unit."""
    return FRUSTUM * float(np.median(np.linalg.norm(cloud.points, axis=1))) if len(cloud.points) else FRUSTUM


def write_ply(path: Path, cloud: Cloud) -> None:
    """Binary PLY: x y z float, red green blue uchar."""
    rows = np.empty(len(cloud.points), [("xyz", "<f4", 3), ("rgb", "u1", 3)])
    rows["xyz"], rows["rgb"] = cloud.points, cloud.colours
    names = [f"property float {axis}" for axis in "xyz"] + [f"property uchar {colour}" for colour in ("red", "green", "blue")]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(rows)}", *names, "end_header", ""]
    path.write_bytes("\n".join(header).encode() + rows.tobytes())


def write_glb(path: Path, cloud: Cloud, lines: np.ndarray, line_colours: np.ndarray) -> None:
    """Points and lines [L, 2, 3] as one binary glTF 2.0 file."""
    glb = _Glb()
    glb.primitive(0, cloud.points * GLTF_AXES, cloud.colours, "points")
    glb.primitive(1, lines.reshape(-1, 3) * GLTF_AXES, np.repeat(line_colours, 2, axis=0), "cameras")
    path.write_bytes(glb.bytes())


class _Glb:
    """Meshes of one primitive each, collected into a buffer. Modes: 0 points, 1 lines."""

    def __init__(self) -> None:
        self.buffer = bytearray()
        self.views: list[dict[str, Any]] = []
        self.accessors: list[dict[str, Any]] = []
        self.meshes: list[dict[str, Any]] = []

    def primitive(self, mode: int, positions: np.ndarray, colours: np.ndarray, name: str) -> None:
        if not len(positions):
            return
        positions = np.ascontiguousarray(positions, np.float32)
        rgba = np.full((len(colours), 4), 255, np.uint8)  # rows of 4 bytes: glTF asks for that alignment
        rgba[:, :3] = colours
        bounds = {"min": positions.min(0).tolist(), "max": positions.max(0).tolist()}
        attributes = {
            "POSITION": self._accessor(positions.tobytes(), len(positions), 5126, "VEC3", bounds),
            "COLOR_0": self._accessor(rgba.tobytes(), len(rgba), 5121, "VEC4", {"normalized": True}),
        }
        self.meshes.append({"name": name, "primitives": [{"attributes": attributes, "mode": mode}]})

    def _accessor(self, data: bytes, count: int, component: int, kind: str, more: dict[str, Any]) -> int:
        self.views.append({"buffer": 0, "byteOffset": len(self.buffer), "byteLength": len(data), "target": 34962})
        self.buffer += data
        view = len(self.views) - 1
        self.accessors.append({"bufferView": view, "componentType": component, "count": count, "type": kind, **more})
        return len(self.accessors) - 1

    def bytes(self) -> bytes:
        nodes = [{"mesh": i, "name": mesh["name"]} for i, mesh in enumerate(self.meshes)]
        document: dict[str, Any] = {
            "asset": {"version": "2.0", "generator": "FantasyWorld"},
            "scene": 0,
            "scenes": [{"nodes": list(range(len(nodes)))} if nodes else {}],
        }
        if nodes:
            document |= {
                "nodes": nodes,
                "meshes": self.meshes,
                "accessors": self.accessors,
                "bufferViews": self.views,
                "buffers": [{"byteLength": len(self.buffer)}],
            }
        text = json.dumps(document).encode()
        text += b" " * (-len(text) % 4)
        chunks = struct.pack("<II", len(text), 0x4E4F534A) + text
        if self.buffer:
            data = bytes(self.buffer) + bytes(-len(self.buffer) % 4)
            chunks += struct.pack("<II", len(data), 0x004E4942) + data
        return struct.pack("<III", 0x46546C67, 2, 12 + len(chunks)) + chunks
