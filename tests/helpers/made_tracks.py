"""Made scenes with exact cameras: points seen by a moving camera, and pictures of textured planes."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from scipy.spatial.transform import Rotation

from fw_pipeline.annotate.tracks import Tracks

HEIGHT, WIDTH = 256, 448
PATHS = {  # metres over the clip, scene 2 to 10 metres away
    "walk": (0.24, 0.04, 0.64),
    "side": (0.8, 0.08, 0.08),
    "forward": (0.024, 0.016, 0.8),
    "still": (0.0, 0.0, 0.0),
}


@dataclass(frozen=True)
class Made:
    tracks: Tracks
    w2c: np.ndarray  # [T, 3, 4], the middle frame is the world
    inverse_depth: np.ndarray  # [N] in the middle frame
    intrinsics: np.ndarray  # [3, 3]
    bad: np.ndarray  # [N] bool: tracks that follow something else


def made_scene(
    path: str = "walk",
    *,
    focal: float = 0.8,
    points: int = 300,
    frames: int = 13,
    noise: float = 0.1,
    drift: float = 0.1,
    bad: float = 0.0,
    zoom: float = 0.0,
    step: float = 1.0,
    turn: float = 0.1,
    depth: tuple[float, float] = (2.0, 10.0),
    plane: bool = False,
    seed: int = 0,
) -> Made:
    """Points spread over the middle picture, at inverse depths even between `depth`, in frames of a shaky path.

    focal: over the long side. noise: pixels, every observation; drift: pixels, over half the clip, in a direction of its own
    for every track. zoom: log change of the focal length over the clip.
    """
    r = np.random.default_rng(seed)
    centre, f = np.array([WIDTH / 2, HEIGHT / 2]), focal * WIDTH
    uv = r.uniform([8, 8], [WIDTH - 8, HEIGHT - 8], (points, 2))
    rays = np.c_[(uv - centre) / f, np.ones(points)]
    inverse = r.uniform(1 / depth[1], 1 / depth[0], points)
    if plane:
        inverse = rays @ np.array([-0.1, 0.5, 1.0]) / 4
    time = (np.arange(frames) - frames // 2) / (frames - 1)
    way = np.array(PATHS[path]) * step
    shake = np.linalg.norm(way) * 0.03 * np.c_[np.sin(5 * time), np.cos(7 * time) - 1, 0 * time]
    turned = time[:, None] * np.array([0.3, 1, 0.1]) * turn + 0.2 * turn * np.c_[np.sin(9 * time), 0 * time, np.sin(3 * time)]
    rotation = Rotation.from_rotvec(turned).as_matrix()
    translation = -np.einsum("tij,tj->ti", rotation, time[:, None] * way + shake)
    seen_from = np.einsum("tij,nj->nti", rotation, rays / inverse[:, None]) + translation
    xy = seen_from[..., :2] / seen_from[..., 2:] * (f * np.exp(zoom * time))[:, None] + centre
    seen = (seen_from[..., 2] > 0.1) & (xy > 2).all(-1) & (xy < np.array([WIDTH, HEIGHT]) - 2).all(-1)
    xy = xy + r.normal(0, noise, xy.shape) + 2 * drift * r.normal(0, 1, (points, 1, 2)) * time[:, None]
    wrong = r.random(points) < bad
    xy[wrong] += 2 * np.cumsum(r.normal(0, 1, (int(wrong.sum()), frames, 2)), 1)
    xy[~seen] = np.nan
    k = np.array([[f, 0, centre[0]], [0, f, centre[1]], [0, 0, 1]])
    w2c = np.concatenate([rotation, translation[..., None]], -1)
    return Made(Tracks(xy.astype(np.float32), seen, HEIGHT, WIDTH), w2c, inverse, k, wrong)


def texture(height: int, width: int, seed: int) -> np.ndarray:
    """Smooth noise of several scales [height, width, 3] uint8: something to follow everywhere."""
    r = np.random.default_rng(seed)
    out = np.zeros((height, width, 3), np.float32)
    for cell, strength in ((32, 30), (12, 25), (5, 20)):
        small = r.normal(0, strength, (height // cell + 2, width // cell + 2, 3)).astype(np.float32)
        out += cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.asarray((128 + out).clip(0, 255), np.uint8)


def rendered_planes(frames: int = 9, focal: float = 0.8) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A far wall and three boards before it, seen by a camera that goes sideways: (pictures [T, H, W, 3], w2c [T, 3, 4], K)."""
    f = focal * WIDTH
    k = np.array([[f, 0, WIDTH / 2], [0, f, HEIGHT / 2], [0, 0, 1]])
    time = np.arange(frames) / (frames - 1) - 0.5
    boards = ((6.0, -8.0, -5.0, 16.0, 10.0), (4.0, -2.2, -1.0, 1.6, 2.4), (3.0, 0.7, -0.8, 0.9, 1.5), (2.4, -0.4, 0.1, 0.8, 0.6))
    sheets = [texture(int(90 * h), int(90 * w), i) for i, (_, _, _, w, h) in enumerate(boards)]
    pictures, poses = np.zeros((frames, HEIGHT, WIDTH, 3), np.uint8), []
    for t, s in enumerate(time):
        rotation = Rotation.from_rotvec([0.02 * s, -0.08 * s, 0.01 * s]).as_matrix()
        w2c = np.c_[rotation, -rotation @ np.array([0.9 * s, 0.1 * s, 0.25 * s])]
        poses.append(w2c)
        for (z, x, y, _, _), sheet in zip(boards, sheets, strict=True):
            # texel (a, b) of a sheet lies at (x + a / 90, y + b / 90, z); OpenCV has the first texel's and pixel's centre at 0
            at = np.array([[1 / 90, 0, x + 0.5 / 90], [0, 1 / 90, y + 0.5 / 90], [0, 0, z], [0, 0, 1]])
            shift = np.array([[1, 0, -0.5], [0, 1, -0.5], [0, 0, 1]])
            matrix = shift @ k @ w2c @ at
            cv2.warpPerspective(sheet, matrix, (WIDTH, HEIGHT), pictures[t], cv2.INTER_AREA, cv2.BORDER_TRANSPARENT)
    return pictures, np.stack(poses), k
