"""The demo's rooms, their painted textures and the camera moves through them (rendered by `fw_pipeline.demo.render`).

Textures are made for feature matching: noise of many scales, patches and speckles that never repeat, no gloss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np

Vec = tuple[float, float, float]
LIGHT = np.array([-0.45, -0.75, -0.5]) / np.linalg.norm([-0.45, -0.75, -0.5])  # points to the lamp; y is down


@dataclass(frozen=True)
class Atlas:
    """Six cube faces in one picture. Face 2 * axis + (1 if the axis is positive)."""

    image: np.ndarray  # [H, W, 3] uint8 RGB
    place: np.ndarray  # [6, 4] float32: left, top, width, height of each face in texels


@dataclass(frozen=True)
class Solid:
    """A box or sphere: x_world = rotation @ (half * q) + centre, q in the unit cube or ball."""

    centre: np.ndarray
    half: np.ndarray
    rotation: np.ndarray
    atlas: Atlas
    sphere: bool = False
    room: bool = False  # seen from inside


@dataclass(frozen=True)
class Scene:
    solids: tuple[Solid, ...]


@dataclass(frozen=True)
class Shot:
    """One camera move. `eye`: control points of a quadratic Bézier; `target`: where it looks at the start and the end."""

    scene: str
    eye: tuple[Vec, Vec, Vec]
    target: tuple[Vec, Vec]
    frames: int
    height: int = 256
    width: int = 448
    fov: float = 65.0  # degrees, over the long side


@dataclass(frozen=True)
class VideoPlan:
    name: str
    shots: tuple[Shot, ...]


# ------------------------------------------------------------------------------------------------------------- painting


def _noise(rng: np.random.Generator, height: int, width: int, cell: float) -> np.ndarray:
    """Smooth noise [height, width] of about unit variance whose bumps are `cell` texels wide."""
    grid = rng.standard_normal((int(height / cell) + 3, int(width / cell) + 3)).astype(np.float32)
    big = cv2.resize(grid, (int(grid.shape[1] * cell) + 1, int(grid.shape[0] * cell) + 1), interpolation=cv2.INTER_CUBIC)
    return big[:height, :width]


def _mottle(rng: np.random.Generator, image: np.ndarray, density: float, strength: float) -> np.ndarray:
    """Add noise of octaves from half a metre to a centimetre or so, mostly in brightness, a little in hue."""
    height, width = image.shape[:2]
    out, cell = image.astype(np.float32), density * 0.5
    while cell >= 2:
        out += strength * (_noise(rng, height, width, cell)[..., None] + 0.35 * rng.standard_normal(3).astype(np.float32))
        cell /= 2
    return out


def _colour(rng: np.random.Generator, palette: np.ndarray, spread: float = 0.22) -> tuple[float, float, float]:
    base = palette[rng.integers(len(palette))] * (1 + spread * rng.uniform(-1, 1)) + rng.uniform(-9, 9, 3)
    r, g, b = base.clip(0, 255).tolist()
    return r, g, b


def _patches(rng: np.random.Generator, image: np.ndarray, count: int, sizes: tuple[float, float], palette: np.ndarray) -> None:
    """Paint turned rectangles and discs over `image` in place, small ones last; sizes are log-uniform, in texels."""
    height, width = image.shape[:2]
    for size in np.sort(sizes[0] * (sizes[1] / sizes[0]) ** rng.random(count))[::-1]:
        centre = rng.uniform(0, [width, height])
        if rng.random() < 0.3:
            middle = (int(centre[0] * 16), int(centre[1] * 16))
            cv2.circle(image, middle, int(size * 8), _colour(rng, palette), -1, cv2.LINE_AA, 4)
        else:
            box = ((float(centre[0]), float(centre[1])), (float(size), float(size * rng.uniform(0.35, 1))), rng.uniform(0, 180))
            cv2.fillPoly(image, [np.round(cv2.boxPoints(box) * 16).astype(np.int32)], _colour(rng, palette), cv2.LINE_AA, 4)


def _planks(rng: np.random.Generator, height: int, width: int, density: float, palette: np.ndarray) -> np.ndarray:
    """Floor boards of uneven length and tone, with grain."""
    image = np.zeros((height, width, 3), np.float32)
    board = max(4, int(0.22 * density))
    for left in range(0, width, board):
        top = -int(rng.uniform(0, 1.2) * density)
        while top < height:
            length = int(rng.uniform(0.7, 2.2) * density)
            rows, cols = slice(max(top, 0), max(top + length, 0)), slice(left, min(left + board, width))
            part = image[rows, cols]
            if part.size:
                part[:] = _colour(rng, palette, 0.3)
                part += 9 * cv2.resize(_noise(rng, part.shape[0] // 8 + 1, part.shape[1], 2.0), part.shape[1::-1])[..., None]
                part[-1:] *= 0.55
                part[:, -1:] *= 0.55
            top += length
    return image


def _paint(rng: np.random.Generator, style: str, size: tuple[float, float], density: float, palette: np.ndarray) -> np.ndarray:
    """A face [h, w, 3] float32 of `size` = (width, height) metres, `density` texels per metre."""
    width, height = (max(8, int(metres * density)) for metres in size)
    area = size[0] * size[1]
    if style == "floor":
        image = _mottle(rng, _planks(rng, height, width, density, palette), density, 4).clip(0, 255).astype(np.uint8)
        _patches(rng, image, int(22 * area), (0.015 * density, 0.07 * density), palette * 0.7)
    else:
        first = np.array(_colour(rng, palette)) if style == "object" else palette[0]
        plain = np.full((height, width, 3), first, np.float32)
        image = _mottle(rng, plain, density, 7 if style == "object" else 5).clip(0, 255).astype(np.uint8)
    if style in ("wall", "ceiling"):
        _patches(rng, image, int(16 * area), (0.015 * density, 0.08 * density), 0.6 * palette[0] + 0.3 * palette)
        if style == "wall":
            _pictures(rng, image, density, palette)
    elif style == "object":
        _patches(rng, image, int(70 * area) + 10, (0.03 * density, 0.28 * density), palette)
        _patches(rng, image, int(260 * area) + 12, (0.012 * density, 0.04 * density), palette * 0.6 + 60)
    return cv2.GaussianBlur(image, (0, 0), 0.6).astype(np.float32)


def _pictures(rng: np.random.Generator, image: np.ndarray, density: float, palette: np.ndarray) -> None:
    """Hang framed abstract pictures side by side, at changing heights, in place."""
    height, width = image.shape[:2]
    left = rng.uniform(0.05, 0.4) * density
    while True:
        w, h = (rng.uniform(0.5, 1.25, 2) * density).astype(int)
        top = int(rng.uniform(0.12, 0.45) * (height - h))
        x = int(left)
        if x + w > width - 0.05 * density or top < 0:
            return
        canvas = np.full((h, w, 3), _colour(rng, palette[1:]), np.float32)
        canvas = _mottle(rng, canvas, density * 0.4, 9).clip(0, 255).astype(np.uint8)
        _patches(rng, canvas, 34, (0.06 * density, 0.4 * density), palette)
        _patches(rng, canvas, 60, (0.015 * density, 0.06 * density), palette * 0.5 + 90)
        border = max(2, int(0.035 * density))
        cv2.rectangle(canvas, (0, 0), (int(w) - 1, int(h) - 1), _colour(rng, palette * 0.35), border)
        image[top : top + h, x : x + w] = canvas
        left += w + rng.uniform(0.12, 0.5) * density


# ------------------------------------------------------------------------------------------------------------- lighting


def _face_grid(face: int, height: int, width: int) -> np.ndarray:
    """q [height, width, 3] on the unit cube at each texel of a face; the inverse of the renderer's lookup."""
    u, v = np.meshgrid((np.arange(width) + 0.5) / width * 2 - 1, (np.arange(height) + 0.5) / height * 2 - 1)
    side = np.full_like(u, 1.0 if face % 2 else -1.0)
    return np.stack(((side, v, u), (u, side, v), (u, v, side))[face // 2], axis=-1)


def _shade(q: np.ndarray, face: int, half: np.ndarray, rotation: np.ndarray, sphere: bool) -> np.ndarray:
    """Light on an object's face texels [h, w]: Lambert's law over an even ambient, darker towards the ground."""
    if sphere:
        normal = q / np.linalg.norm(q, axis=-1, keepdims=True)
    else:
        normal = np.zeros_like(q)
        normal[..., face // 2] = 1.0 if face % 2 else -1.0
    lit = np.maximum((normal @ rotation.T) @ LIGHT, 0)
    height = (normal if sphere else q)[..., 1] * half[1]
    return (0.62 + 0.45 * lit) * (1 - 0.25 * np.clip((height + half[1]) / (2 * half[1]), 0, 1) ** 3)


def _shade_room(q: np.ndarray, face: int, half: np.ndarray, stand: list[tuple[float, float, float]]) -> np.ndarray:
    """Light on a room's face texels [h, w]: dim corners, and soft shadows where things stand on the floor.

    `stand` lists (x, z, radius) in room-centred metres.
    """
    metres = q * half
    gap = half - np.abs(metres)
    gap[..., face // 2] = 1e3
    light = np.full(q.shape[:2], (0.84, 1.0, 1.0, 0.95, 0.93, 0.98)[face]) * (1 - 0.38 * np.exp(-gap.min(-1) / 0.35))
    if face == 3:
        for x, z, radius in stand:
            away = np.hypot(metres[..., 0] - x, metres[..., 2] - z) / radius
            light *= 1 - 0.5 * np.exp(-((away / 1.15) ** 4))
    return light


def _atlas(faces: list[np.ndarray]) -> Atlas:
    place, top = [], 0
    for face in faces:
        place.append((0, top, face.shape[1], face.shape[0]))
        top += face.shape[0]
    image = np.zeros((top, max(face.shape[1] for face in faces), 3), np.uint8)
    for (_, start, width, height), face in zip(place, faces, strict=True):
        image[start : start + height, :width] = face.clip(0, 255).astype(np.uint8)
    return Atlas(image, np.array(place, np.float32))


# -------------------------------------------------------------------------------------------------------------- building


class _Builder:
    """Furnishes a room of size (x, y, z) metres whose floor is y = 0, centred on x = 0, from z = 0 on."""

    def __init__(self, seed: int, size: Vec, palette: list[Vec], wood: list[Vec]) -> None:
        self.rng = np.random.default_rng(seed)
        self.size, self.palette, self.wood = np.array(size), np.array(palette, float), np.array(wood, float)
        self.solids: list[Solid] = []
        self.stand: list[tuple[float, float, float]] = []

    def add(self, centre: Vec, size: Vec, yaw: float = 0.0, sphere: bool = False, density: float = 150.0) -> None:
        """A box of full `size` (or a sphere of that diameter) turned by `yaw` degrees about the vertical."""
        half, a = np.array(size) / 2, np.radians(yaw)
        rotation = np.array([[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]])
        palette = self._tones() if sphere or min(size) > 0.1 else self.wood
        faces = []
        for face in range(6):
            u, v = ((2, 1), (0, 2), (0, 1))[face // 2]
            texture = _paint(self.rng, "object", (size[u], size[v]), density, palette)
            q = _face_grid(face, *texture.shape[:2])
            faces.append(texture * _shade(q, face, half, rotation, sphere)[..., None])
        self.solids.append(Solid(np.array(centre), half, rotation, _atlas(faces), sphere=sphere))
        if centre[1] + half[1] > -0.3:
            self.stand.append((centre[0], centre[2] - self.size[2] / 2, max(half[0], half[2]) * (0.75 if sphere else 1.1)))

    def _tones(self) -> np.ndarray:
        """One object's colours: shades of one colour of the palette, and two accents."""
        main, *accents = self.rng.permutation(self.palette[1:])[:3]
        return np.array([main, main * 0.8, main * 1.15 + 8, main * 0.62, 0.5 * main + 0.5 * accents[0], accents[1]])

    def finish(self) -> Scene:
        half, density = self.size / 2, 90.0
        faces = []
        for face in range(6):
            u, v = ((2, 1), (0, 2), (0, 1))[face // 2]
            style, palette = ("floor", self.wood) if face == 3 else ("wall", self.palette)
            if face == 2:
                style, palette = "ceiling", palette * 0.4 + 150
            texture = _paint(self.rng, style, (self.size[u], self.size[v]), density, palette)
            faces.append(texture * _shade_room(_face_grid(face, *texture.shape[:2]), face, half, self.stand)[..., None])
        centre = np.array([0, -half[1], half[2]])
        return Scene((Solid(centre, half, np.eye(3), _atlas(faces), room=True), *self.solids))


OAK = [(176.0, 132.0, 88.0), (158.0, 112.0, 72.0), (192.0, 150.0, 104.0), (140.0, 98.0, 64.0)]
ASH = [(170.0, 160.0, 146.0), (150.0, 142.0, 130.0), (188.0, 178.0, 160.0), (128.0, 120.0, 110.0)]
WARM = [
    (222.0, 206.0, 180.0),
    (196.0, 78.0, 56.0),
    (232.0, 168.0, 62.0),
    (62.0, 104.0, 116.0),
    (240.0, 228.0, 206.0),
    (92.0, 62.0, 70.0),
]
COOL = [
    (190.0, 206.0, 208.0),
    (38.0, 92.0, 122.0),
    (232.0, 120.0, 86.0),
    (244.0, 210.0, 120.0),
    (98.0, 150.0, 140.0),
    (236.0, 238.0, 232.0),
]
SAGE = [
    (200.0, 206.0, 182.0),
    (88.0, 120.0, 84.0),
    (208.0, 104.0, 90.0),
    (240.0, 216.0, 160.0),
    (72.0, 82.0, 110.0),
    (230.0, 232.0, 220.0),
]
PLUM = [
    (214.0, 196.0, 204.0),
    (120.0, 70.0, 110.0),
    (236.0, 160.0, 110.0),
    (84.0, 130.0, 150.0),
    (246.0, 226.0, 190.0),
    (60.0, 60.0, 86.0),
]


def _room() -> Scene:
    b = _Builder(11, (6.4, 3.0, 6.4), WARM, OAK)
    b.add((0.0, -0.78, 3.5), (1.9, 0.08, 1.0), yaw=8)
    for x, z in ((-0.8, 3.2), (0.85, 3.0), (-0.75, 3.95), (0.9, 3.75)):
        b.add((x, -0.37, z), (0.09, 0.74, 0.09), yaw=8)
    b.add((-0.45, -1.06, 3.5), (0.48, 0.48, 0.48), sphere=True)
    b.add((0.4, -1.0, 3.6), (0.36, 0.36, 0.36), yaw=31)
    b.add((0.42, -1.29, 3.62), (0.22, 0.22, 0.22), sphere=True)
    b.add((-2.3, -0.65, 5.2), (0.9, 1.3, 0.7), yaw=-14)
    b.add((2.1, -0.45, 4.6), (0.9, 0.9, 0.9), sphere=True)
    b.add((1.6, -0.2, 2.6), (0.4, 0.4, 0.4), yaw=24)
    b.add((-1.7, -0.25, 3.1), (0.5, 0.5, 0.5), yaw=-33)
    return b.finish()


def _shelf() -> Scene:
    b = _Builder(23, (6.0, 2.9, 4.6), COOL, OAK)
    for y in (-0.3, -0.95, -1.6, -2.2):
        b.add((0.0, y, 4.2), (4.4, 0.06, 0.5))
    for x in (-2.2, -0.75, 0.75, 2.2):
        b.add((x, -1.1, 4.22), (0.06, 2.2, 0.46))
    rng = np.random.default_rng(5)
    for y in (-0.33, -0.98, -1.63):
        x = -2.08
        while x < 2.0:
            w, h, d = rng.uniform(0.1, 0.34), rng.uniform(0.22, 0.52), rng.uniform(0.2, 0.42)
            if rng.random() < 0.2:
                b.add((x + w / 2, y - w / 2, 4.1), (w, w, w), sphere=True)
            else:
                b.add((x + w / 2, y - h / 2, 4.18), (w, h, d), yaw=rng.uniform(-7, 7))
            x += w + rng.uniform(0.03, 0.16)
    b.add((-0.9, -0.3, 2.7), (0.6, 0.6, 0.6), yaw=20)
    b.add((1.15, -0.35, 2.9), (0.7, 0.7, 0.7), sphere=True)
    return b.finish()


def _hall() -> Scene:
    b = _Builder(37, (3.2, 3.2, 9.0), SAGE, ASH)
    for x, z in ((-1.25, 3.6), (1.25, 4.5), (-1.25, 6.0), (1.25, 7.2)):
        b.add((x, -1.6, z), (0.4, 3.2, 0.4), yaw=0, density=110)
    b.add((0.55, -0.3, 3.9), (0.6, 0.6, 0.6), yaw=27)
    b.add((0.5, -0.82, 3.92), (0.44, 0.44, 0.44), sphere=True)
    b.add((-0.5, -0.45, 5.0), (0.7, 0.9, 0.5), yaw=-20)
    b.add((0.2, -0.4, 6.6), (0.8, 0.8, 0.8), sphere=True)
    b.add((-0.7, -0.16, 3.0), (0.32, 0.32, 0.32), yaw=40)
    return b.finish()


def _studio() -> Scene:
    b = _Builder(53, (7.0, 3.2, 6.0), PLUM, ASH)
    for x, z, h, yaw in ((-1.3, 3.7, 0.7, 18), (0.0, 3.2, 0.95, -12), (1.3, 3.9, 0.6, 35)):
        b.add((x, -h / 2, z), (0.6, h, 0.6), yaw=yaw)
    b.add((-1.3, -1.0, 3.7), (0.6, 0.6, 0.6), sphere=True)
    b.add((0.0, -1.17, 3.2), (0.44, 0.44, 0.44), yaw=40)
    b.add((1.3, -0.95, 3.9), (0.7, 0.7, 0.7), sphere=True)
    b.add((2.5, -1.1, 5.1), (0.8, 2.2, 0.6), yaw=-10)
    b.add((-2.6, -0.5, 4.9), (1.0, 1.0, 1.0), yaw=22)
    b.add((-0.5, -0.2, 4.6), (0.4, 0.4, 0.4), sphere=True)
    return b.finish()


SCENES: dict[str, Callable[[], Scene]] = {
    name: cache(build) for name, build in (("room", _room), ("shelf", _shelf), ("hall", _hall), ("studio", _studio))
}

# A clip of the tiny preset is 33 source frames long, every second one taken; two need 67.
SHOTS = (
    VideoPlan(
        "room_orbit",
        (Shot("room", ((-1.9, -1.75, 1.2), (-0.1, -1.75, -0.1), (1.9, -1.6, 1.2)), ((0, -0.9, 3.6), (0, -0.9, 3.6)), 72),),
    ),
    VideoPlan(
        "room_dolly",
        (Shot("room", ((1.7, -1.5, 0.5), (1.2, -1.5, 0.9), (0.4, -1.3, 1.3)), ((-0.3, -1, 4.4), (-0.6, -1, 4.6)), 48),),
    ),
    VideoPlan(
        "shelf_truck",
        (Shot("shelf", ((-1.1, -1.5, 0.8), (-0.2, -1.4, 1.0), (0.8, -1.25, 0.9)), ((-0.5, -1, 4.2), (0.5, -1, 4.2)), 48),),
    ),
    VideoPlan(
        "hall_portrait",
        (
            Shot(
                "hall",
                ((-0.6, -1.5, 0.5), (0.0, -1.7, 0.8), (0.65, -1.3, 1.2)),
                ((0.1, -1.1, 5.0), (-0.1, -1.1, 5.5)),
                48,
                448,
                256,
            ),
        ),
    ),
    VideoPlan(
        "two_shots",
        (
            Shot("studio", ((1.2, -1.5, 0.5), (0.6, -1.6, 0.6), (-0.3, -1.7, 0.7)), ((0.2, -0.9, 3.8), (-0.2, -0.9, 3.8)), 40),
            Shot("room", ((-2.4, -1.9, 2.0), (-2.0, -1.7, 1.4), (-1.3, -1.5, 1.0)), ((0.4, -0.8, 4.0), (0.2, -0.8, 4.0)), 40),
        ),
    ),
    VideoPlan(
        "studio_arc",
        (Shot("studio", ((-1.8, -1.3, 0.9), (-1.0, -1.5, 0.4), (0.1, -1.7, 0.5)), ((0.0, -0.9, 3.8), (0.0, -0.9, 3.8)), 48),),
    ),
)
