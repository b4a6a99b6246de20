"""From a checked sample to what a clip of the dataset holds: its size, first camera as the world, clip units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from fw_model.cameras import relative_to_first
from fw_pipeline.annotate import quality
from fw_pipeline.annotate.clips import FrameTransform, read_frames, sample_depth
from fw_pipeline.annotate.depth.disparity import DisparityFit, fit_pixels, steady_fits, usable_pixels
from fw_pipeline.annotate.types import Clip, ClipSetAside
from fw_pipeline.guide_layout.check import Sample, open_map
from fw_pipeline.guide_layout.far import FARTHEST, near
from fw_pipeline.guide_layout.fit import in_camera

MIN_INLIERS = 0.5  # of a disparity fit, mean over the frames
SCALE_TOLERANCE = 1e-3  # how far a named clip_scale may be from the mean distance: float16 and a text file cost less
HELD = (float(np.finfo(np.float16).smallest_normal), float(np.finfo(np.float16).max))  # with all of float16's digits

Size = tuple[int, int, int]  # H, W, T


@dataclass(frozen=True)
class Window:
    """T consecutive frames of a sample that become one clip."""

    clip_id: str
    first: int
    size: Size

    @property
    def frames(self) -> slice:
        return slice(self.first, self.first + self.size[2])


@dataclass(frozen=True)
class GuideClip:
    """Geometry of one clip, ready to pack."""

    depth: np.ndarray  # [T, H, W] float16, 0 = unknown
    confidence: np.ndarray  # [T, H, W] uint8: the layout has none, so all or nothing
    intrinsics: np.ndarray  # [T, 3, 3] float32
    w2c: np.ndarray  # [T, 3, 4] float32, first = identity
    scale: float
    quality: dict[str, float]


def windows(sample: Sample, size: Size | Callable[[int, int], Size] | None) -> list[Window]:
    """The clips of a sample: as it is, or cut and resized to `size` (which may depend on the video's height and width).

    A sample of more frames than `size` has is cut into clips one after the other; frames that are left over at its end are
    not used. Raises ValueError, naming what would do, when the sample does not fit.
    """
    wanted = size(sample.height, sample.width) if callable(size) else size
    height, width, frames = wanted or (sample.height, sample.width, sample.frames)
    sides = [max(16, round(side / 16) * 16) for side in (height, width)]
    count = max(5, (min(frames, sample.frames) - 1) // 4 * 4 + 1)
    if (height, width) != tuple(sides) or frames % 4 != 1 or frames < 5:
        nearest = "x".join(map(str, (*sides, count)))
        raise ValueError(
            f"{height}x{width} with {frames} frames: sides must be multiples of 16 and frames 4k+1, at least 5; "
            f"nearest: --size {nearest}"
        )
    if sample.frames < frames:
        raise ValueError(f"{sample.frames} frames, a clip takes {frames}; nearest: {count}")
    starts = range(0, sample.frames - frames + 1, frames)
    name = sample.entry.sample_id
    return [
        Window(name if len(starts) == 1 else f"{name}-c{i:03d}", start, (height, width, frames)) for i, start in enumerate(starts)
    ]


def finish(sample: Sample, window: Window) -> GuideClip:
    """Depth, intrinsics and poses of one clip. Raises ClipSetAside when they do not describe one world."""
    height, width, _ = window.size
    transform = FrameTransform(sample.height, sample.width, height, width)
    depth, fits = _z_depth(sample, window, transform)
    lens = sample.points.lens[window.frames] * [sample.width, sample.height, sample.width, sample.height]
    own = np.zeros((len(lens), 3, 3))
    own[:, [0, 1, 0, 1], [0, 1, 2, 2]], own[:, 2, 2] = lens, 1
    intrinsics = transform.intrinsics_to_target(own)
    w2c = relative_to_first(torch.from_numpy(sample.w2c[window.frames])).numpy()
    moved, w2c, scale = _clip_units(sample, window, depth, intrinsics, w2c)
    stored = moved.astype(np.float16)
    clip = GuideClip(
        depth=stored,
        confidence=np.where(stored > 0, 255, 0).astype(np.uint8),
        intrinsics=intrinsics.astype(np.float32),
        w2c=w2c.astype(np.float32),
        scale=scale,
        quality={
            "reprojection_error": sample.points.error,
            "valid_fraction": float((stored > 0).mean()),
            "first_frame": float(window.first),
            **fits,
        },
    )
    quality.check_consistency(clip.depth.astype(np.float32), clip.intrinsics, clip.w2c)
    error = quality.neighbour_error(clip.depth.astype(np.float32), clip.intrinsics, clip.w2c)
    if not error <= quality.NEIGHBOUR_TOLERANCE:
        raise ClipSetAside(
            f"neighbouring frames disagree by {error:.0%} in depth (at most {quality.NEIGHBOUR_TOLERANCE:.0%}): "
            f"poses and depth do not belong together"
        )
    clip.quality["neighbour_error"] = error
    return clip


def read_pictures(sample: Sample, window: Window) -> np.ndarray:
    """The clip's frames [T, H, W, 3] uint8 RGB. Raises VideoSetAside or ValueError when they cannot be read."""
    height, width, _ = window.size
    clip = Clip(
        clip_id=window.clip_id,
        video=sample.entry.shown(sample.entry.video),
        video_xxh64="",
        shot=0,
        fps=sample.fps,
        timestamps=sample.times[window.frames],
        source_height=sample.height,
        source_width=sample.width,
        height=height,
        width=width,
    )
    return read_frames(sample.entry.video, clip, height, width)


def _clip_units(
    sample: Sample, window: Window, depth: np.ndarray, intrinsics: np.ndarray, w2c: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """`quality.to_clip_units`, with the scale that an exported sample names, so that its numbers come back exactly.

    What float16 cannot hold in clip units, too near or too far, is unknown, and the scale is that of the rest.
    """
    moved, poses, scale = quality.to_clip_units(depth, intrinsics, w2c)
    while (lost := (moved > HELD[1]) | ((moved > 0) & (moved < HELD[0]))).any():
        depth = np.where(lost, 0, depth)
        moved, poses, scale = quality.to_clip_units(depth, intrinsics, w2c)
    named = sample.entry.clip_scale
    if named is None or window.size[2] != sample.frames:
        return moved, poses, scale
    if abs(scale / named - 1) > SCALE_TOLERANCE:
        raise ClipSetAside(f"metadata.json says clip_scale {named:g}, but the mean distance of its points is {scale:g}")
    poses = w2c.copy()
    poses[:, :, 3] /= named
    return depth / named, poses, named


def _z_depth(sample: Sample, window: Window, transform: FrameTransform) -> tuple[np.ndarray, dict[str, float]]:
    """z-depth [T, H, W] float64 at the clip's size in the points' units, and the quality of the disparity's fits."""
    files = sample.depth_files[window.frames]
    fits: list[DisparityFit] = []
    if sample.depth.kind == "disparity":
        fits = _align(sample, window)
    frames = []
    for t, file in enumerate(files):
        array = open_map(file, 2)
        own = np.asarray(array, np.float64)
        if fits:
            known = np.isfinite(own) & (own > 0)
            inverse = fits[t].scale * np.where(known, own, 0) + fits[t].shift
            known &= inverse > FARTHEST * np.median(inverse[known]) if known.any() else False
            own = np.where(known, 1 / np.where(known, inverse, 1), 0)
        else:
            own = np.where(near(array) & (own != sample.depth.far), own, 0) * sample.depth.unit
        frames.append(_to_clip(own, transform))
    numbers = {}
    if fits:
        numbers = {
            "depth_inlier_ratio": float(np.mean([fit.inlier_ratio for fit in fits])),
            "depth_residual": float(np.mean([fit.residual for fit in fits])),
        }
        if numbers["depth_inlier_ratio"] < MIN_INLIERS:
            raise ClipSetAside(
                f"disparity fits {numbers['depth_inlier_ratio']:.0%} of the points within 5 % (at least {MIN_INLIERS:.0%})"
            )
    return np.stack(frames), numbers


def _align(sample: Sample, window: Window) -> list[DisparityFit]:
    """1/z = scale * disparity + shift for every frame, fitted to the points' z and steadied over the frames."""
    pixels = []
    for t in range(window.frames.start, window.frames.stop):
        disparity = np.asarray(open_map(sample.depth_files[t], 2), np.float64)
        points = np.asarray(open_map(sample.points_files[t], 3), np.float64)
        if sample.points.frame == "world":
            points = in_camera(points[None], sample.w2c[t : t + 1])[0]
        z = np.where(near(points[..., 2]), points[..., 2], 0)
        if z.shape != disparity.shape:
            rows, cols = ((np.arange(n) + 0.5) / n * m - 0.5 for n, m in zip(disparity.shape, z.shape, strict=True))
            z = sample_depth(z, rows, cols)
        try:
            pixels.append(usable_pixels(disparity, z, np.isfinite(disparity) & (disparity > 0) & (z > 0)))
        except ClipSetAside as error:
            raise ClipSetAside(f"frame {t}: {error}") from error
    fits = [fit_pixels(frame) for frame in pixels]
    broken = [(t, fit.fallback) for t, fit in enumerate(fits, start=window.first) if fit.fallback]
    if broken:
        raise ClipSetAside(f"disparity of frame {broken[0][0]} cannot be aligned to its points: {broken[0][1]}")
    return [fit for fit in steady_fits(fits, pixels) if fit is not None]


def _to_clip(depth: np.ndarray, transform: FrameTransform) -> np.ndarray:
    """A map of the whole picture, at any size [h, w], sampled where the clip's pixels [H, W] lie in it."""
    positions = []
    for count, lead, source, own in (
        (transform.height, transform.top, transform.source_height, depth.shape[0]),
        (transform.width, transform.left, transform.source_width, depth.shape[1]),
    ):
        positions.append((np.arange(count) + 0.5 + lead) / transform.scale / source * own - 0.5)
    return sample_depth(depth, *positions)
