"""Small textured scenes with exact depth and cameras, rendered into mp4: what `make demo` runs on and what checks compare with.

`python -m fw_pipeline.demo.render FOLDER` writes `NAME.mp4` (H.264, 24 fps) and `NAME.gt.npz` beside it. Annotators only ever
see the mp4; the ground truth is read back by `load_ground_truth`.

A scene is a furnished box room: solids are boxes and spheres whose six cube faces carry painted textures, matt and with
baked light, so that a surface point has one colour from everywhere. World axes: x right, y down (floor at y = 0), z into
the room, metres. A ray's parameter is its z-depth, because ray directions have z = 1 in the camera.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np

from fw_model.errors import explain_errors
from fw_model.export.video import write_video
from fw_model.files import whole_file
from fw_pipeline.annotate.truth import ground_truth_path
from fw_pipeline.demo.scenes import SCENES, SHOTS, Scene, Shot, Solid, VideoPlan

FPS = 24
SUPERSAMPLE = 2  # colour rays per pixel and axis; depth is cast once, through the pixel's centre
DEMO_VIDEOS = frozenset(f"{plan.name}.mp4" for plan in SHOTS)
TINY = 1e-12  # keeps a ray parallel to a wall from dividing by zero


# --------------------------------------------------------------------------------------------------------- ray casting


def camera_at(shot: Shot, s: float) -> np.ndarray:
    """w2c [3, 4] of a shot at s in [0, 1]: the eye follows a quadratic Bézier curve and looks at a moving target."""
    a, b, c = (np.asarray(p, np.float64) for p in shot.eye)
    eye = (1 - s) ** 2 * a + 2 * s * (1 - s) * b + s**2 * c
    target = (1 - s) * np.asarray(shot.target[0], np.float64) + s * np.asarray(shot.target[1], np.float64)
    forward = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(np.array([0.0, 1.0, 0.0]), forward)
    right /= np.linalg.norm(right)
    rotation = np.stack([right, np.cross(forward, right), forward])
    return np.concatenate([rotation, -(rotation @ eye)[:, None]], axis=1)


def intrinsics_of(shot: Shot) -> np.ndarray:
    """K [3, 3] of a shot: its field of view spans the long side, the principal point is the image centre."""
    focal = max(shot.height, shot.width) / 2 / np.tan(np.radians(shot.fov) / 2)
    return np.array([[focal, 0, shot.width / 2], [0, focal, shot.height / 2], [0, 0, 1.0]])


def _intersect(solid: Solid, origin: np.ndarray, rays: list[np.ndarray]) -> np.ndarray:
    """Depth at which local rays (three arrays [h, w]) meet the solid; inf where they miss. A room is hit from inside."""
    half = solid.half.astype(origin.dtype)
    if solid.sphere:
        aa = rays[0] ** 2 + rays[1] ** 2 + rays[2] ** 2
        half_b = origin[0] * rays[0] + origin[1] * rays[1] + origin[2] * rays[2]
        root = half_b**2 - aa * (origin @ origin - half[0] ** 2)
        return np.where(root > 0, (-half_b - np.sqrt(np.maximum(root, 0))) / aa, np.inf)
    near, far = np.full_like(rays[0], -np.inf), np.full_like(rays[0], np.inf)
    for axis in range(3):
        inverse = 1 / np.where(rays[axis] == 0, TINY, rays[axis])
        reach = np.abs(inverse) * half[axis]
        centre = -origin[axis] * inverse
        near, far = np.maximum(near, centre - reach), np.minimum(far, centre + reach)
    return far if solid.room else np.where((near < far) & (near > 0), near, np.inf)


def _texture(solid: Solid, origin: np.ndarray, rays: list[np.ndarray], depth: np.ndarray) -> np.ndarray:
    """Colour [h, w, 3] of the solid where the local rays meet it (meaningless where they miss)."""
    half = solid.half.astype(origin.dtype)
    q = [(origin[axis] + depth * rays[axis]) / half[axis] for axis in range(3)]
    size = [np.abs(value) for value in q]
    axis = np.where((size[0] >= size[1]) & (size[0] >= size[2]), 0, np.where(size[1] >= size[2], 1, 2))
    major = np.choose(axis, q)
    scale = 0.5 / np.maximum(np.abs(major), TINY)
    u = np.where(axis == 0, q[2], q[0]) * scale + 0.5
    v = np.where(axis == 1, q[2], q[1]) * scale + 0.5
    atlas = solid.atlas
    place = atlas.place[2 * axis + (major > 0)]  # [h, w, 4]: left, top, width, height in texels
    x = np.clip(u * place[..., 2], 0.5, place[..., 2] - 0.5) + place[..., 0] - 0.5
    y = np.clip(v * place[..., 3], 0.5, place[..., 3] - 0.5) + place[..., 1] - 0.5
    return cv2.remap(atlas.image, x.astype(np.float32), y.astype(np.float32), cv2.INTER_LINEAR)


def _extent(solid: Solid, w2c: np.ndarray, k: np.ndarray, height: int, width: int) -> tuple[slice, slice] | None:
    """Rows and columns that can see the solid; None when it is out of sight. Rays elsewhere need not be tried."""
    signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    corners = (signs * solid.half) @ solid.rotation.T + solid.centre
    cam = corners @ w2c[:, :3].T + w2c[:, 3]
    if solid.room or cam[:, 2].min() < 0.05:
        return slice(0, height), slice(0, width)
    pix = (cam / cam[:, 2:]) @ k.T
    left, top = np.floor(pix[:, :2].min(0)).astype(int).clip(0, [width, height])
    right, bottom = np.ceil(pix[:, :2].max(0)).astype(int).clip(0, [width, height])
    return (slice(top, bottom), slice(left, right)) if top < bottom and left < right else None


def cast(
    scene: Scene, w2c: np.ndarray, intrinsics: np.ndarray, height: int, width: int, image: np.ndarray | None = None
) -> np.ndarray:
    """One ray through every pixel centre -> z-depth [height, width], inf where nothing is hit.

    Colours go into `image` [height, width, 3] uint8 where one is given; the rays are then float32, which is enough for them.
    """
    dtype = np.float64 if image is None else np.float32
    ys, xs = np.arange(height) + 0.5, np.arange(width) + 0.5
    cam_x = ((xs - intrinsics[0, 2]) / intrinsics[0, 0]).astype(dtype)[None]
    cam_y = ((ys - intrinsics[1, 2]) / intrinsics[1, 1]).astype(dtype)[:, None]
    eye = -w2c[:, :3].T @ w2c[:, 3]
    depth = np.full((height, width), np.inf, dtype)
    for solid in scene.solids:
        extent = _extent(solid, w2c, intrinsics, height, width)
        if extent is None:
            continue
        rows, cols = extent
        to_local = solid.rotation.T @ w2c[:, :3].T
        rays = [(to_local[i, 0] * cam_x[:, cols] + to_local[i, 1] * cam_y[rows] + to_local[i, 2]).astype(dtype) for i in range(3)]
        origin = (solid.rotation.T @ (eye - solid.centre)).astype(dtype)
        hit = _intersect(solid, origin, rays)
        nearer = hit < depth[extent]
        if not nearer.any():
            continue
        depth[extent] = np.where(nearer, hit, depth[extent])
        if image is not None:
            painted = _texture(solid, origin, rays, np.where(nearer, hit, 1))
            image[extent] = np.where(nearer[..., None], painted, image[extent])
    return depth


def render_frame(scene: Scene, shot: Shot, s: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frame of a shot at s in [0, 1] -> (RGB uint8 [h, w, 3], exact z-depth [h, w], w2c [3, 4])."""
    w2c, k = camera_at(shot, s), intrinsics_of(shot)
    depth = cast(scene, w2c, k, shot.height, shot.width)
    fine = np.zeros((shot.height * SUPERSAMPLE, shot.width * SUPERSAMPLE, 3), np.uint8)
    cast(scene, w2c, np.diag([SUPERSAMPLE, SUPERSAMPLE, 1.0]) @ k, *fine.shape[:2], image=fine)
    image = np.asarray(cv2.resize(fine, (shot.width, shot.height), interpolation=cv2.INTER_AREA))
    return image, depth, w2c


# ------------------------------------------------------------------------------------------------------------- writing


def _render_video(folder: Path, plan: VideoPlan) -> Path:
    path, truth = folder / f"{plan.name}.mp4", ground_truth_path(folder / f"{plan.name}.mp4")
    if path.is_file() and truth.is_file():
        return path
    images, depths, poses, ks, shots = [], [], [], [], []
    for index, shot in enumerate(plan.shots):
        scene = SCENES[shot.scene]()
        for frame in range(shot.frames):
            image, depth, w2c = render_frame(scene, shot, frame / (shot.frames - 1))
            images.append(image)
            depths.append(depth.astype(np.float16))
            poses.append(w2c)
            ks.append(intrinsics_of(shot))
            shots.append(index)
    # Hidden names until whole: ingest ignores them, and the mp4 appears last.
    with whole_file(truth) as partial, partial.open("wb") as file:
        np.savez(
            file,
            depth=np.stack(depths),
            intrinsics=np.stack(ks),
            w2c=np.stack(poses),
            timestamps=np.arange(len(images)) / FPS,
            shot=np.array(shots),
        )
    with whole_file(path) as partial:
        write_video(partial, images, FPS)
    return path


def render_demo(folder: Path, plans: tuple[VideoPlan, ...] = SHOTS, workers: int = 2) -> list[Path]:
    """Render the demo videos and their ground truth into `folder`; videos already whole there are left as they are.

    Deterministic. Returns the videos' paths, in the order of `plans`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(workers) as pool:  # numpy and OpenCV release the interpreter lock
        return list(pool.map(lambda plan: _render_video(folder, plan), plans))


# ------------------------------------------------------------------------------------------------------------- reading


@explain_errors
def main() -> int:
    parser = argparse.ArgumentParser(description="Render the demo videos, with exact depth and cameras beside them.")
    parser.add_argument("folder", type=Path, help="where the mp4 files go")
    for path in render_demo(parser.parse_args().folder):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
