"""Augmentations of a clip before it is encoded: a window of it, a temporal stride, playing it backwards, a mirror.

Pictures, depth, confidence, intrinsics and poses change together, and with them the points, which are derived from these.
Cached latents cannot follow: the VAE is causal in time and not mirror-symmetric, so the latents of changed pictures are not
a change of the latents. See `fw_model.data.online`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import xxhash

from fw_model.cameras import camera_rays, relative_to_first
from fw_model.config import AugmentConfig

_MIRROR = np.array([-1.0, 1.0, 1.0])  # the diagonal of S, the reflection of the x axis


@dataclass(frozen=True)
class RawClip:
    """A clip's pictures and geometry, in the dtypes and conventions of `fw_model.data.schema`."""

    frames: np.ndarray  # [T, H, W, 3] uint8 RGB
    depth: np.ndarray  # [T, H, W] float16, clip units, 0 = unknown
    confidence: np.ndarray  # [T, H, W] uint8
    intrinsics: np.ndarray  # [T, 3, 3] float32, pixels
    w2c: np.ndarray  # [T, 3, 4] float32, frame 0 the identity
    scale: float  # what the annotator's units were divided by to get clip units
    fps: float


@dataclass(frozen=True)
class AugmentDraw:
    """What happens to one clip: `frames` of its frames, every `stride`-th from `start` on, played backwards, mirrored."""

    frames: int
    start: int = 0
    stride: int = 1
    reverse: bool = False
    flip: bool = False

    @property
    def indices(self) -> np.ndarray:
        """[frames]: which frames of the stored clip, in the order in which they are played."""
        forward = self.start + self.stride * np.arange(self.frames)
        return forward[::-1] if self.reverse else forward


def frames_needed(frames: int, stride: int) -> int:
    """Frames of a stored clip of which every `stride`-th makes a clip of `frames`."""
    return (frames - 1) * stride + 1


def draw_augment(config: AugmentConfig, frames: int, stored_frames: int, seed: int, epoch: int, index: int) -> AugmentDraw:
    """What happens to clip `index` in an epoch: a function of these arguments alone, so that a resume sees the same.

    Of the strides those count for which the stored clip is long enough; where it is longer than needed, the window in it is
    drawn too. Raises ValueError when it is long enough for none.
    """
    strides = [stride for stride in config.strides if frames_needed(frames, stride) <= stored_frames]
    if not strides:
        raise ValueError(f"{stored_frames} frames are too few for {frames} at a stride of {min(config.strides)}")

    def uniform(what: str) -> float:
        """In [0, 1), from a hash: no library's random generator has a say in it."""
        return (xxhash.xxh64_intdigest(f"augment/{what}/{seed}/{epoch}/{index}".encode()) >> 11) / 2**53

    stride = strides[int(uniform("stride") * len(strides))]
    starts = stored_frames - frames_needed(frames, stride) + 1
    return AugmentDraw(
        frames=frames,
        start=int(uniform("start") * starts),
        stride=stride,
        reverse=uniform("reverse") < config.reverse,
        flip=uniform("flip") < config.flip,
    )


def augment_clip(clip: RawClip, draw: AugmentDraw) -> RawClip:
    """The clip as `draw` says. Its first camera is the world and its mean distance the unit, as of every packed clip.

    Raises ValueError when the clip has not the frames that are drawn.
    """
    if frames_needed(draw.frames, draw.stride) + draw.start > len(clip.frames) or min(draw.frames, draw.stride) < 1:
        raise ValueError(f"{draw} does not fit into a clip of {len(clip.frames)} frames")
    if not np.array_equal(draw.indices, np.arange(len(clip.frames))):
        clip = _take(clip, draw)
    return _mirror(clip) if draw.flip else clip


def _take(clip: RawClip, draw: AugmentDraw) -> RawClip:
    """The drawn frames in their order, with the first of them as the world, in its clip units."""
    arrays = {name: getattr(clip, name)[draw.indices] for name in ("frames", "depth", "confidence", "intrinsics", "w2c")}
    w2c = relative_to_first(torch.from_numpy(arrays["w2c"].astype(np.float64))).numpy()
    depth = arrays["depth"].astype(np.float32)
    unit = _mean_distance(depth, arrays["intrinsics"], w2c)
    depth /= unit
    depth[depth > np.finfo(np.float16).max] = 0  # farther than the format can say: unknown
    w2c[:, :, 3] /= unit
    arrays |= {"depth": depth.astype(clip.depth.dtype), "w2c": w2c.astype(clip.w2c.dtype)}
    return RawClip(**arrays, scale=clip.scale * unit, fps=clip.fps / draw.stride)


def _mean_distance(depth: np.ndarray, intrinsics: np.ndarray, w2c: np.ndarray) -> float:
    """Mean distance of the known points from the world's origin; 1 where not a single pixel is known.

    In each camera's own frame, where it is the distance from -t: |R^T (x - t)| = |x - t|. Frame by frame: the points of a
    whole clip of full size would take 200 MB.
    """
    total, count = 0.0, 0
    for z, lens, pose in zip(depth, intrinsics, w2c, strict=True):
        rays = camera_rays(torch.from_numpy(lens), *z.shape)
        distance = rays.mul_(torch.from_numpy(z)[..., None]).sub_(torch.from_numpy(pose[:, 3].astype(z.dtype))).norm(dim=-1)
        valid = torch.from_numpy(z > 0)
        total += float(distance.mul_(valid).sum(dtype=torch.float64))
        count += int(valid.sum())
    return total / count if total > 0 else 1.0


def _mirror(clip: RawClip) -> RawClip:
    """Left and right exchanged, the world's too: u -> W - u, X -> S X, so that R -> S R S and t -> S t."""
    width = clip.frames.shape[2]
    intrinsics = clip.intrinsics.copy()
    intrinsics[:, 0, 1] *= -1  # skew
    intrinsics[:, 0, 2] = width - intrinsics[:, 0, 2]
    signs = _MIRROR[:, None] * np.append(_MIRROR, 1.0)  # of S R S | S t, [3, 4]
    return replace(
        clip,
        frames=np.ascontiguousarray(clip.frames[:, :, ::-1]),
        depth=np.ascontiguousarray(clip.depth[:, :, ::-1]),
        confidence=np.ascontiguousarray(clip.confidence[:, :, ::-1]),
        intrinsics=intrinsics,
        w2c=(clip.w2c * signs).astype(clip.w2c.dtype),
    )
