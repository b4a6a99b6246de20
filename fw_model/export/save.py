"""A world as a folder of files that other programs open."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fw_model.cameras import write_pose_file
from fw_model.export.camera_files import cameras_json, image_name, write_colmap, write_transforms
from fw_model.export.cloud import cloud_of, frusta, frustum_size, write_glb, write_ply
from fw_model.export.pictures import depth_colours, depth_range, jpeg
from fw_model.export.video import write_video
from fw_model.export.viewer import write_viewer
from fw_model.export.world import World
from fw_model.files import whole_folder, write_json

CLOUD_POINTS = 1_000_000  # of points.ply and scene.glb: 15 and 16 MB
COLMAP_POINTS = 20_000
# What every saved world has; what lacks one of them was not written whole.
FILES = (
    "video.mp4",
    "depth.mp4",
    "depth.npz",
    "points.ply",
    "scene.glb",
    "scene.html",
    "cameras.txt",
    "cameras.json",
    "transforms.json",
    "sparse/0/images.txt",
    "meta.json",
)


def save_world(world: World, folder: Path) -> Path:
    """Write every file of a world; the folder appears whole or not at all, and replaces one of that name that is a world.

    Raises FileExistsError for a folder that holds anything else.
    """
    if folder.exists() and not is_saved(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(17, "holds something that is no saved world; name another folder", str(folder))
    with whole_folder(folder) as inside:
        _write(world, inside)
    return folder


def is_saved(folder: Path) -> bool:
    """Whether a folder is a world that was saved whole."""
    return all((folder / name).is_file() for name in FILES)


def _write(world: World, folder: Path) -> None:
    near, far = depth_range(world.depth)
    video, depth = world.video.numpy(), world.depth.numpy()
    write_video(folder / "video.mp4", _even(video), world.fps)
    write_video(folder / "depth.mp4", (_even(depth_colours(frame, near, far)[None])[0] for frame in depth), world.fps)
    with (folder / "depth.npz").open("wb") as file:
        np.savez_compressed(
            file,
            depth=depth.astype(np.float16) if depth.max(initial=0) < 6e4 else depth,
            depth_conf=world.depth_conf.numpy().astype(np.float16),
            points=world.points.numpy().astype(np.float32),
            points_conf=world.points_conf.numpy().astype(np.float16),
        )
    (folder / "images").mkdir()
    for t, frame in enumerate(video):
        (folder / "images" / image_name(t)).write_bytes(jpeg(frame))
    cloud = cloud_of(world, CLOUD_POINTS)
    lines, colours = frusta(world, frustum_size(cloud))
    write_ply(folder / "points.ply", cloud)
    write_glb(folder / "scene.glb", cloud, lines, colours)
    write_pose_file(folder / "cameras.txt", world.cameras, *video.shape[1:3])
    write_json(folder / "cameras.json", cameras_json(world))
    write_transforms(folder / "transforms.json", world)
    write_colmap(folder / "sparse" / "0", world, cloud_of(world, COLMAP_POINTS))
    write_viewer(folder / "scene.html", world, near, far)
    scale = {"near": near, "far": far, "colours": "inverse depth, near red, far blue (turbo); black where unknown"}
    write_json(folder / "meta.json", {**world.meta, "frames": len(video), "fps": world.fps, "depth.mp4": scale})


def _even(frames: np.ndarray) -> np.ndarray:
    """Frames [T, H, W, 3] with even sides, which H.264 asks for: the last row or column once more where they are odd."""
    pad = [(0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)]
    return np.pad(frames, pad, mode="edge")
