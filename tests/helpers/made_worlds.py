"""Worlds whose depth, points and cameras agree to rounding, of a made slanted wall; no network, no renderer."""

from __future__ import annotations

import torch

from fw_model.cameras import Cameras, camera_rays, relative_to_first, unproject
from fw_model.export.world import World
from fw_model.trajectory.text import make_trajectory


def made_world(trajectory: str = "truck_right", frames: int = 5, height: int = 48, width: int = 80) -> World:
    """A checkered slanted wall, seen along a named path, which is both the world's own and the requested one."""
    cameras = make_trajectory(trajectory, frames, height, width)
    w2c, k = cameras.w2c.double(), cameras.intrinsics.double()
    normal, offset = torch.tensor([0.3, 0.1, 1.0], dtype=torch.float64), 2.0  # in the world
    rays = camera_rays(k, height, width)
    across = torch.einsum("thwi,tij,j->thw", rays, w2c[:, :, :3], normal)
    centre = -torch.einsum("tji,tj->ti", w2c[:, :, :3], w2c[:, :, 3])
    depth = (offset - centre @ normal)[:, None, None] / across
    depth[:, :3, :4] = 0  # unknown
    points = unproject(depth, k, w2c)
    cells = (points[..., :2] * 1.5).floor().sum(-1) % 2
    video = torch.stack([60 + 150 * cells, 200 - 120 * cells, 90 + 20 * points[..., 0].clamp(-4, 4)], -1).to(torch.uint8)
    confidence = torch.where(depth > 0, 2.0, 1.0)
    return World(
        video=video,
        depth=depth.float(),
        depth_conf=confidence.float(),
        points=points.float(),
        points_conf=confidence.float(),
        cameras=Cameras(relative_to_first(w2c).float(), k.float(), (height, width)),
        requested=cameras,
        fps=12.0,
        meta={"prompt": "a wall </script> & more", "seed": 0},
    )
