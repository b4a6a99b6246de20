"""Global alignment: from the two-view network's pointmaps of many pairs to one set of cameras and depths for a clip.

Pixel convention, HERE ONLY: pixel (row v, column u) is the ray through image position (u, v), an integer grid from 0, with the
principal point at (W / 2, H / 2). That is how DUSt3R's pointmaps were trained. Everything else in this project has pixel
centres at (u + 0.5, v + 0.5): `to_pixel_centres` converts the intrinsics at the border; depths and poses are the same in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fw_pipeline.annotate.pairwise.initial import FOCAL_RANGE, State, initialise, sample_pixels
from fw_pipeline.annotate.pairwise.pair_graph import PairMaps, PairPrediction, check_pairs, pair_graph
from fw_pipeline.annotate.pairwise.refine import KERNEL, TINY, Noise, pair_errors, refine, residuals
from fw_pipeline.annotate.trajectory import require_motion
from fw_pipeline.annotate.types import ClipSetAside
from fw_pipeline.annotate.vectors import cross, length, median_of_finite

__all__ = ["Alignment", "PairPrediction", "align", "pair_graph", "to_pixel_centres"]

SAMPLED_PIXELS = 512  # of each image, for everything but the final depths
MAX_RESIDUAL = 0.1  # relative: pairs that agree no better than this describe no scene
DEPTH_STEPS = 2  # of Newton, from the median
BLOCK = 1 << 15  # pixels whose depth is computed at a time


@dataclass(frozen=True)
class Alignment:
    """Cameras and depth of N frames in one scale (that of a typical pair); the world is the first camera."""

    w2c: np.ndarray  # [N, 3, 4] float64, w2c[0] = identity
    intrinsics: np.ndarray  # [N, 3, 3] float64, pixels of the integer grid (see above), the same for all frames
    depth: np.ndarray  # [N, H, W] float32 z-depth, 0 = no pair knows
    confidence: np.ndarray  # [N, H, W] float32: the network's, times how well the pairs agree; 0 where depth is 0
    residuals: np.ndarray  # [len(pairs)] median relative distance of a pair's points (worse view) from the clip; NaN: unusable
    believed: np.ndarray  # [len(pairs)] bool: whether the pair was used; not if unusable or contradicting the others


def to_pixel_centres(intrinsics: np.ndarray) -> np.ndarray:
    """Intrinsics [..., 3, 3] for the integer grid -> for pixel centres at + 0.5: the same ray for the same pixel."""
    shifted = np.array(intrinsics, np.float64)
    shifted[..., :2, 2] += 0.5
    return shifted


def align(pairs: Sequence[PairPrediction], num_images: int, focal: float | None = None) -> Alignment:
    """Put the pairs of a clip together.

    A focal from the pointmaps (Weiszfeld), a relative pose per pair (PnP), a chain along the spanning tree of the pairs that
    agree with their neighbours, then robust least squares over poses, focal, pair scales and depths. Both (i, j) and (j, i) may
    be given, or one of them. Time and memory grow linearly with the number of pairs.

    Args:
        pairs: numpy or torch pointmaps, all of one size.
        num_images: N; the pairs' i and j lie in 0..N-1.
        focal: in pixels where the lens is known; None: estimated.

    Raises:
        ClipSetAside: with the reason, when no truthful geometry can be had: pointmaps not finite or constant, low confidence
            everywhere, frames tied by no (trustworthy) pair, a focal that runs away, pairs that contradict each other, a
            camera that does not move, fewer than two frames.
        ValueError: malformed input (shapes, indices).
    """
    maps = check_pairs(pairs, num_images)
    samples = sample_pixels(maps, SAMPLED_PIXELS)
    state, noise = refine(initialise(maps, samples, focal), samples)
    focal = float(np.exp(state.log_focal))
    height, width = maps.size
    if not FOCAL_RANGE[0] <= focal / max(maps.size) <= FOCAL_RANGE[1]:
        raise ClipSetAside(f"the focal ran away: {focal:.4g} px for images of {width}x{height}")
    error = pair_errors(residuals(state, samples), samples)
    typical = float(np.median(error[noise.believed]))
    if not typical <= MAX_RESIDUAL:
        raise ClipSetAside(
            f"the pairs of frames contradict each other: points are off by {100 * typical:.0f} % of their distance"
        )
    _unit_scale(state, noise)
    depth, confidence = _dense_depth(maps, state, noise)
    w2c = np.concatenate([state.rotation, state.translation[:, :, None]], axis=2)
    require_motion(w2c, depth)
    intrinsics = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1.0]])
    all_errors, believed = np.full(len(pairs), np.nan), np.zeros(len(pairs), bool)
    all_errors[maps.index], believed[maps.index] = error, noise.believed
    return Alignment(w2c, np.tile(intrinsics, (num_images, 1, 1)), depth, confidence, all_errors, believed)


def _unit_scale(state: State, noise: Noise) -> None:
    """Make the believed pairs' median scale 1, in place."""
    shift = float(np.median(state.log_scale[noise.believed]))
    state.log_scale -= shift
    state.log_depth -= shift
    state.translation *= np.exp(-shift)


# ------------------------------------------------------------------------------------------------------- dense depth


def _dense_depth(maps: PairMaps, state: State, noise: Noise) -> tuple[np.ndarray, np.ndarray]:
    """Depth and confidence [N, H, W] float32 of every pixel from all believed pairs that show it, cameras held fixed."""
    height, width = maps.size
    focal = np.exp(state.log_focal)
    u, v = np.meshgrid((np.arange(width) - width / 2) / focal, (np.arange(height) - height / 2) / focal)
    rays = np.stack([u, v, np.ones_like(u)], axis=-1).reshape(-1, 3)
    depth = np.zeros((maps.num_images, height * width), np.float32)
    confidence = np.zeros_like(depth)
    shown_by: list[list[int]] = [[] for _ in range(maps.num_images)]
    for pair in np.flatnonzero(noise.believed):
        for side in (0, 1):
            shown_by[maps.views[pair, side]].append(2 * int(pair) + side)
    for image, observations in enumerate(shown_by):
        for start in range(0, height * width, BLOCK):
            block = slice(start, start + BLOCK)
            seen = _block_observations(maps, state, noise, image, np.array(observations), block)
            depth[image, block], confidence[image, block] = _block_depth(seen, rays[block])
    return depth.reshape(-1, height, width), confidence.reshape(-1, height, width)


@dataclass(frozen=True)
class _Block:
    """K observations of the same B pixels of one image, in clip units."""

    rotation: np.ndarray  # [K, 3, 3] the image's camera to the observation's
    origin: np.ndarray  # [K, 3] the image's centre in the observation's camera
    points: np.ndarray  # [K, B, 3] in the observation's camera
    trust: np.ndarray  # [K, B] confidence, 0 where unusable
    direction_noise: np.ndarray  # [K, 1]
    distance_noise: np.ndarray  # [K, 1]


def _block_observations(maps: PairMaps, state: State, noise: Noise, image: int, observations: np.ndarray, block: slice) -> _Block:
    pairs, sides = np.divmod(observations, 2)
    source = maps.views[pairs, 0]
    rotation = state.rotation[source] @ state.rotation[image].T
    origin = state.translation[source] - rotation @ state.translation[image]
    trust = np.stack([maps.confidence[e][s].ravel()[block] for e, s in zip(pairs, sides, strict=True)])
    points = np.stack([maps.points[e][s].reshape(-1, 3)[block] for e, s in zip(pairs, sides, strict=True)])
    points = np.where(trust[..., None] > 0, points, 1) * np.exp(state.log_scale[pairs])[:, None, None]
    return _Block(rotation, origin, points, trust, noise.direction[observations, None], noise.distance[observations, None])


def _block_depth(seen: _Block, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Depth and confidence [B] at `rays` [B, 3]: the median of what the observations say, then robust Newton steps that weigh
    directions and distances as the refinement does."""
    depth = np.einsum("kbi,ki->kb", seen.points - seen.origin[:, None], seen.rotation[:, :, 2])
    median = median_of_finite(np.where((seen.trust > 0) & (depth > 0), depth, np.nan), axis=0)
    known = np.isfinite(median)
    log_depth = np.log(np.where(known, median, 1))
    turned = rays @ np.swapaxes(seen.rotation, 1, 2)
    for _ in range(DEPTH_STEPS):
        slope, curve, _ = _depth_slopes(seen, np.exp(log_depth)[:, None] * turned)
        log_depth -= np.clip(slope / np.maximum(curve, TINY), -0.5, 0.5)
    share = _depth_slopes(seen, np.exp(log_depth)[:, None] * turned)[2]
    return np.where(known, np.exp(log_depth), 0), np.where(known, share, 0)


def _depth_slopes(seen: _Block, along: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each pixel the cost's first and (Gauss-Newton) second derivative by log depth, and the mean of confidence times
    robust weight, [B] each. `along` [K, B, 3] goes from the image's centre to the model point: also the point's derivative.
    """
    model = along + seen.origin[:, None]
    reach, measured = np.maximum(length(model), TINY), length(seen.points)
    normal, aim = model / reach[..., None], seen.points / measured[..., None]
    side = cross(aim, normal) / seen.direction_noise[..., None]
    away = np.log(reach / measured) / seen.distance_noise
    weight = seen.trust * (KERNEL / (KERNEL + np.einsum("kbi,kbi->kb", side, side) + away**2)) ** 2
    radial = np.einsum("kbi,kbi->kb", normal, along)
    by_side = cross(aim, along - normal * radial[..., None]) / (reach[..., None] * seen.direction_noise[..., None])
    by_away = radial / (reach * seen.distance_noise)
    slope = weight * (np.einsum("kbi,kbi->kb", by_side, side) + by_away * away)
    curve = weight * (np.einsum("kbi,kbi->kb", by_side, by_side) + by_away**2)
    return slope.sum(0), curve.sum(0), weight.sum(0) / np.maximum((seen.trust > 0).sum(0), 1)
