"""What the steps store of a clip or a prompt, as arrays; `pipeline` makes them and `packing` reads them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fw_pipeline.annotate import clips as clip_io
from fw_pipeline.annotate import quality
from fw_pipeline.annotate.types import Clip, ClipDepth, ClipGeometry


@dataclass(frozen=True)
class FinishedClip:
    """What the depth step stores of a clip: the bucket's size, clip units, ready to pack."""

    depth: np.ndarray  # [T, H, W] float16, 0 = invalid
    confidence: np.ndarray  # [T, H, W] uint8
    intrinsics: np.ndarray  # [T, 3, 3] float32
    w2c: np.ndarray  # [T, 3, 4] float32, first = identity
    scale: np.ndarray  # [] float64, annotator's units per clip unit
    # How each frame's depth came about, as in ClipDepth (1/z = fit_scale * disparity + fit_shift, in the annotator's units).
    source: np.ndarray  # [T] uint8, ClipDepth.SOURCES
    fit_scale: np.ndarray  # [T] float32
    fit_shift: np.ndarray  # [T] float32
    fit_inlier_ratio: np.ndarray  # [T] float32
    fit_residual: np.ndarray  # [T] float32


@dataclass(frozen=True)
class EncodedClip:
    """What the latents step stores of a clip; its prompt's embedding is stored once for all videos that share it."""

    latents: np.ndarray  # [16, F, H/8, W/8] float16
    image: np.ndarray  # [N, C] float16


@dataclass(frozen=True)
class PicturesClip:
    """What the latents step stores of a clip in its place when clips are encoded while training."""

    video: np.ndarray  # [N] uint8, bytes of a lossless mp4 of exactly T frames of H x W


@dataclass(frozen=True)
class EncodedText:
    """What the latents step stores of a prompt."""

    text: np.ndarray  # [L, D] float16


def finish_clip(clip: Clip, geometry: ClipGeometry, result: ClipDepth) -> FinishedClip:
    """From the annotation size and units to the bucket's size and clip units.

    The annotation size has the bucket's aspect, so this is one scaling; depth is sampled, never averaged across edges.
    Raises ClipSetAside when the packed clip would not be consistent (see quality.check_consistency).
    """
    _, height, width = result.depth.shape
    transform = clip_io.FrameTransform(height, width, clip.height, clip.width)
    intrinsics = transform.intrinsics_to_target(geometry.intrinsics)
    depth, w2c, scale = quality.to_clip_units(transform.depth_to_target(result.depth), intrinsics, geometry.w2c)
    finished = FinishedClip(
        depth=depth.astype(np.float16),
        confidence=np.round(transform.depth_to_target(result.confidence) * 255).astype(np.uint8),
        intrinsics=intrinsics.astype(np.float32),
        w2c=w2c.astype(np.float32),
        scale=np.asarray(scale, np.float64),
        source=result.source,
        fit_scale=result.scale,
        fit_shift=result.shift,
        fit_inlier_ratio=result.inlier_ratio,
        fit_residual=result.residual,
    )
    quality.check_consistency(finished.depth.astype(np.float32), finished.intrinsics, finished.w2c)
    return finished
