"""A path tried on the first picture alone, in seconds: its pixels moved by their depth.

    python -m fw_model.generate preview --image first.png --trajectory orbit_right --out path.mp4 (--depth D | --checkpoint FILE)

D is a `.npy` or `.npz` (its array `depth`) of z-depth [h, w], or [T, h, w] whose first is taken, in any unit: its mean distance
is made 1, as paths count. With a checkpoint the model reads the picture's depth. Grey is what the picture does not show.
"""

from __future__ import annotations

import argparse
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from fw_model.cameras import Cameras, project, relative_to_first, unproject
from fw_model.config import load_preset
from fw_model.errors import explain_errors
from fw_model.export.video import write_video
from fw_model.generate.pipeline import FantasyWorldPipeline
from fw_model.generate.request import BadRequest, Prepared, parse_request, prepare

UNSEEN = 110  # grey level of what the picture does not show


def warp(picture: np.ndarray, depth: Tensor, cameras: Cameras) -> Iterator[np.ndarray]:
    """The picture [H, W, 3] uint8 from each camera of a path, nearer pixels in front.

    depth: [H, W] z-depth in clip units, 0 = unknown. cameras: in pixels of H x W; the first sees the picture itself.
    """
    w2c, k = relative_to_first(cameras.w2c.double()), cameras.intrinsics.double()
    height, width = picture.shape[:2]
    points = unproject(depth.double()[None], k[:1], w2c[:1])[0].reshape(-1, 3)
    known = (depth.flatten() > 0).numpy()
    colours = picture.reshape(-1, 3)[known]
    for pose, lens in zip(w2c, k, strict=True):
        uv, z = project(points[torch.from_numpy(known)], lens, pose)
        place, far = uv.floor().long().numpy(), z.numpy()
        inside = (far > 0) & (place >= 0).all(1) & (place[:, 0] < width) & (place[:, 1] < height)
        order = np.flatnonzero(inside)[np.argsort(-far[inside], kind="stable")]  # far ones first: the last written stays
        frame = np.full_like(picture, UNSEEN)
        frame[place[order, 1], place[order, 0]] = colours[order]
        yield _filled(frame, order, place)


def _filled(frame: np.ndarray, order: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Gaps one pixel wide, where a surface came nearer, take the colour around them."""
    seen = np.zeros(frame.shape[:2], np.uint8)
    seen[place[order, 1], place[order, 0]] = 1
    gaps = (seen == 0) & (cv2.blur(seen.astype(np.float32), (3, 3)) > 0.6)
    return np.where(gaps[..., None], cv2.medianBlur(frame, 3), frame)


def scaled_depth(depth: np.ndarray, height: int, width: int, lens: Tensor) -> Tensor:
    """Depth [h, w] of the picture -> [H, W] in clip units: the mean distance of its points is 1. Raises BadRequest."""
    if depth.ndim == 3:
        depth = depth[0]
    if depth.ndim != 2 or depth.dtype.kind not in "fiu":
        raise BadRequest(f"depth: expected numbers [h, w], got {list(depth.shape)} {depth.dtype}")
    scale = max(height / depth.shape[0], width / depth.shape[1])
    size = (max(width, round(depth.shape[1] * scale)), max(height, round(depth.shape[0] * scale)))
    large = cv2.resize(np.nan_to_num(depth.astype(np.float32), posinf=0, neginf=0), size, interpolation=cv2.INTER_NEAREST)
    top, left = (large.shape[0] - height) // 2, (large.shape[1] - width) // 2  # as the picture is cropped
    fitted = torch.from_numpy(np.ascontiguousarray(large[top : top + height, left : left + width])).clamp_min(0)
    if not (fitted > 0).any():
        raise BadRequest("depth: not a single pixel has one")
    points = unproject(fitted[None].double(), lens[None].double(), torch.eye(3, 4).double()[None])[0]
    return fitted / float(points[fitted > 0].norm(dim=-1).mean())


def read_depth(path: Path) -> np.ndarray:
    """Raises BadRequest for what is no plain array of depth."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            return np.asarray(loaded["depth"])
    except FileNotFoundError as error:
        raise BadRequest(f"depth: {path}: is not there") from error
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise BadRequest(f"depth: {path}: no plain npy, nor an npz with an array named depth ({error})") from error


def _depth(args: argparse.Namespace, prepared: Prepared) -> np.ndarray:
    if args.depth is not None:
        return read_depth(args.depth)
    pipeline = FantasyWorldPipeline.from_pretrained(args.checkpoint, device=args.device)
    depth: np.ndarray = pipeline.depth_of_picture(prepared).numpy()
    return depth


@explain_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fw_model.generate preview", description="Move the first picture along a path by its depth."
    )
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--trajectory", help="a path in words")
    parser.add_argument("--pose-file", type=Path, help="or a file of one")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--depth", type=Path, help="npy or npz of the picture's z-depth")
    source.add_argument("--checkpoint", type=Path, help="stage 2, whose model reads the depth")
    parser.add_argument("--preset", default="wan2.1-fun-1.3b", help="whose clip size is taken (default: the published one)")
    parser.add_argument("--num-frames", type=int)
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.mp4")
    args = parser.parse_args(argv)
    if (args.trajectory is None) == (args.pose_file is None):
        parser.error("give --trajectory or --pose-file")
    names = ("image", "trajectory", "pose_file", "num_frames", "height", "width")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    clip = load_preset(args.preset).clip
    prepared = prepare(parse_request({"prompt": "preview", **given}), clip)
    assert prepared.cameras is not None
    assert prepared.picture is not None
    lens = prepared.cameras.intrinsics[0]
    depth = scaled_depth(_depth(args, prepared), prepared.height, prepared.width, lens)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_video(args.out, warp(prepared.picture, depth, prepared.cameras), clip.fps)
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
