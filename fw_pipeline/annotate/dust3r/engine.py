"""The `dust3r` geometry engine: keyframes are aligned globally, every other frame is placed against its nearest keyframe.

Each frame is encoded once. Keyframes are paired (`pair_graph`), decoded and aligned (`align`); every other frame is decoded
once, with its nearest keyframe, and gets its camera by PnP. What grows with the length of a clip are the results, and for
keyframes their tokens and pointmaps; nothing is ever paired with everything.

Shapes: T frames h x w, K keyframes, H x W the network's size.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from fw_pipeline.annotate.clips import FrameTransform
from fw_pipeline.annotate.dust3r.config import DUSt3RConfig
from fw_pipeline.annotate.dust3r.images import PreparedImages, prepare
from fw_pipeline.annotate.dust3r.network import DUSt3R, Pointmap
from fw_pipeline.annotate.dust3r.weights import PUBLISHED, weights_identity
from fw_pipeline.annotate.pairwise.align import Alignment, align, to_pixel_centres
from fw_pipeline.annotate.pairwise.pair_graph import PairPrediction, pair_graph
from fw_pipeline.annotate.pairwise.pnp import (
    PnPError,
    PnPResult,
    measure_pose,
    pixel_threshold,
    points_in_world,
    reprojection_errors,
    solve_pnp,
)
from fw_pipeline.annotate.trajectory import fill_missing_poses
from fw_pipeline.annotate.types import ClipGeometry, ClipSetAside

CODE_VERSION = 1  # raise when results change for the same frames and weights
LEAST_STEPS = 8  # between keyframes: a clip has at least 9 keyframes, or all its frames
SQUARE_PIXELS = 0.01  # relative difference between fx and fy that still counts as none

logger = logging.getLogger(__name__)
T = TypeVar("T")


class PairNetwork(Protocol):
    """What the engine needs of a network: `DUSt3R`, or whatever stands in for it."""

    @property
    def config(self) -> DUSt3RConfig: ...

    def encode(self, images: Tensor) -> Tensor:
        """As `DUSt3R.encode`."""
        ...

    def decode(self, tokens1: Tensor, tokens2: Tensor) -> tuple[Pointmap, Pointmap]:
        """As `DUSt3R.decode`."""
        ...


@dataclass
class Dust3rEngine:
    """GeometryEngine over DUSt3R, `align` and `solve_pnp`."""

    load: Callable[[], PairNetwork]  # called once, when the first clip is estimated
    weights: str  # what `load` gives, for `version`
    device: str = "cpu"
    window: int = 2  # a keyframe is paired with this many of the following ones, and with ever rarer farther ones
    keyframe_every: int = 8  # frames, at most
    batch: int = 8  # images or pairs in one pass of the network
    name: str = "dust3r"

    @classmethod
    def from_pretrained(
        cls,
        repo_or_dir: str | Path = PUBLISHED,
        revision: str = "main",
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        window: int = 2,
        keyframe_every: int = 8,
        batch: int = 8,
    ) -> Dust3rEngine:
        """An engine that reads its weights (see `DUSt3R.from_pretrained`) when the first clip is estimated.

        Until then nothing is downloaded, so that what is up to date can be found out without them.

        Raises ValueError for a window, step or batch below 1, or a dtype the network does not run in.
        """
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype is {dtype}; DUSt3R runs in torch.float32 or torch.bfloat16")
        identity = f"{weights_identity(repo_or_dir, revision)}:{str(dtype).removeprefix('torch.')}"
        return cls(
            lambda: DUSt3R.from_pretrained(repo_or_dir, revision, device, dtype), identity, device, window, keyframe_every, batch
        )

    def __post_init__(self) -> None:
        for name in ("window", "keyframe_every", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")

    @cached_property
    def network(self) -> PairNetwork:
        """Raises DUSt3RWeightsError when there are no (good) weights."""
        return self.load()

    @property
    def version(self) -> str:
        """Code, weights (repository and revision, or a hash of local files) and dtype, window, keyframe step."""
        return f"{CODE_VERSION}:{self.weights}:window-{self.window}:every-{self.keyframe_every}"

    @torch.no_grad()
    def estimate(self, frames: np.ndarray, intrinsics: np.ndarray | None = None) -> ClipGeometry:
        """Cameras and depth of a clip; see `GeometryEngine.estimate`.

        The unit is that of a typical pair of the network. A frame without a camera of its own is interpolated and flagged, and
        its depth is unknown. Depth is unknown, too, where the network's crop left nothing: a few pixels at two of the borders.

        Raises:
            ClipSetAside: a single frame, or any reason of `align`, `fill_missing_poses`.
            DUSt3RWeightsError: no weights.
            ValueError: known intrinsics that are not of square pixels or not centred, which DUSt3R presumes; frames that are
                no RGB images or far too narrow.
        """
        count = len(frames)
        if count < 2:
            raise ClipSetAside(f"a clip of {count} frame has no pair to measure a camera move from")
        prepared = prepare(frames, max(self.network.config.img_size))
        focal = None if intrinsics is None else known_focal(intrinsics, prepared.transform)
        keyframes = keyframes_of(count, self.keyframe_every)
        tokens = torch.cat([self._encode(prepared, part) for part in _parts(keyframes, self.batch)])
        pairs = self._pairs(tokens)
        aligned = align(pairs, len(keyframes), focal)
        clip = _Collected(count, aligned, prepared.transform)
        for k, (fit, confidence) in enumerate(keyframe_fits(pairs, aligned)):
            clip.add(keyframes[k], fit, aligned.depth[k], confidence)
        del pairs
        for pair in self._others(prepared, keyframes, tokens):
            clip.track(pair)
        return clip.finish()

    def _encode(self, prepared: PreparedImages, which: Sequence[int]) -> Tensor:
        """Tokens [B, ...] of the frames `which`."""
        part = PreparedImages(prepared.frames[list(which)], prepared.transform)
        return self.network.encode(part.tensor(self.device))

    def _pairs(self, tokens: Tensor) -> list[PairPrediction]:
        """The keyframes' pair graph, decoded. Indices are those of the keyframes."""
        found: list[PairPrediction] = []
        for part in _parts(pair_graph(len(tokens), self.window), self.batch):
            first, second = (tokens[[pair[side] for pair in part]] for side in (0, 1))
            found += _predictions(part, *self.network.decode(first, second))
        return found

    def _others(self, prepared: PreparedImages, keyframes: Sequence[int], tokens: Tensor) -> Iterator[PairPrediction]:
        """Of every frame that is no keyframe its pair with the nearest one: i is the keyframe's index, j the frame."""
        others = sorted(set(range(len(prepared.frames))) - set(keyframes))
        for part in _parts(others, self.batch):
            nearest = [int(np.abs(np.subtract(keyframes, frame)).argmin()) for frame in part]
            views = self.network.decode(tokens[nearest], self._encode(prepared, part))
            yield from _predictions(list(zip(nearest, part, strict=True)), *views)


class _Collected:
    """What is known of each frame so far, at the network's size; `finish` takes it back to the frames' own."""

    def __init__(self, count: int, aligned: Alignment, transform: FrameTransform) -> None:
        shape = (count, *aligned.depth.shape[1:])
        self.aligned, self.transform = aligned, transform
        self.depth, self.confidence = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self.poses: list[np.ndarray | None] = [None] * count
        self.ratio, self.error = np.zeros(count), np.zeros(count)
        self.reasons: Counter[str] = Counter()

    def add(self, frame: int, fit: PnPResult, depth: np.ndarray, confidence: np.ndarray) -> None:
        """A frame whose camera is known; depth and confidence [H, W], 0 where unknown."""
        good = np.isfinite(depth) & (depth > 0) & (confidence > 0)
        self.depth[frame], self.confidence[frame] = np.where(good, depth, 0), np.where(good, confidence, 0)
        self.poses[frame], self.ratio[frame], self.error[frame] = fit.w2c, fit.inlier_ratio, fit.reprojection_error

    def track(self, pair: PairPrediction) -> None:
        """Place frame j by its points in the world of the aligned keyframe i; without a camera it stays unknown."""
        try:
            world = points_in_world(pair, self.aligned.depth[pair.i], self.aligned.w2c[pair.i])
            fit = solve_pnp(world, pair.confidence_j, self.aligned.intrinsics[pair.i], origin=0.0)
        except PnPError as error:
            logger.info("frame %d is not placed: %s", pair.j, error)
            self.reasons[str(error)] += 1
            return
        # A point that its own camera sees elsewhere says nothing about its pixel.
        here = reprojection_errors(world, self.aligned.intrinsics[pair.i], fit.w2c) < pixel_threshold(*world.shape[:2])
        depth = np.where(here, world @ fit.w2c[2, :3] + fit.w2c[2, 3], 0)
        self.add(pair.j, fit, depth, unit_confidence(pair.confidence_j))

    def finish(self) -> ClipGeometry:
        """Raises ClipSetAside when too many frames have no camera; the commonest reason is named."""
        why = self.reasons.most_common(1)[0][0] if self.reasons else ""
        w2c, interpolated = fill_missing_poses(self.poses, why)
        intrinsics = self.transform.intrinsics_to_source(to_pixel_centres(self.aligned.intrinsics[0]))
        depth = self.transform.depth_to_source(self.depth)
        confidence = np.where(depth > 0, self.transform.depth_to_source(self.confidence), np.float32(0))
        error = (self.error / self.transform.scale).astype(np.float32)
        return ClipGeometry(
            w2c, np.tile(intrinsics, (len(w2c), 1, 1)), depth, confidence, self.ratio.astype(np.float32), error, interpolated
        )


def keyframes_of(count: int, every: int) -> list[int]:
    """Frames 0 to count - 1 that are keyframes: first and last, evenly between, at most `every` and, in a clip shorter than
    `LEAST_STEPS` times that, an eighth of the clip apart."""
    step = max(1, min(every, (count - 1) // LEAST_STEPS))
    places = np.linspace(0, count - 1, -(-(count - 1) // step) + 1)
    return sorted({round(place) for place in places.tolist()})


def known_focal(intrinsics: np.ndarray, transform: FrameTransform) -> float:
    """Focal in the network's pixels of a lens known in the frames' [3, 3].

    Raises ValueError unless pixels are square and the principal point lies in the middle.
    """
    lens = transform.intrinsics_to_target(np.asarray(intrinsics, np.float64))
    off = np.abs(lens[:2, 2] - [transform.width / 2, transform.height / 2]).max()
    if abs(lens[0, 0] / lens[1, 1] - 1) > SQUARE_PIXELS or off > SQUARE_PIXELS * max(transform.height, transform.width):
        raise ValueError(
            f"dust3r: known intrinsics {np.asarray(intrinsics).tolist()} are not those of square pixels with the principal point "
            f"in the middle, which the network presumes; stretch or crop the frames, or let it estimate the lens"
        )
    return float(lens[0, 0] + lens[1, 1]) / 2


def unit_confidence(confidence: np.ndarray) -> np.ndarray:
    """The network's confidence (1 and up) as 0..1: 1 - 1/c, which is the sigmoid of the number its head gives."""
    known = np.isfinite(confidence) & (confidence > 0)
    return np.where(known, 1 - 1 / np.maximum(np.where(known, confidence, 1), 1), 0).astype(np.float32)


def keyframe_fits(pairs: Sequence[PairPrediction], aligned: Alignment) -> Iterator[tuple[PnPResult, np.ndarray]]:
    """Of each aligned keyframe its camera with how well it fits, and its confidence [H, W] in 0..1.

    The fit is that of its points as other keyframes see them, in the numbers of `solve_pnp`, the median of those pairs. The
    confidence is the network's, lowered where the pairs agree less than they do on a typical pixel of the clip.
    """
    shape = aligned.confidence.shape
    total, seen = np.zeros(shape, np.float32), np.zeros(shape[0])
    fits: list[list[PnPResult]] = [[] for _ in range(shape[0])]
    for pair, believed in zip(pairs, aligned.believed, strict=True):
        if not believed:
            continue
        for view, confidence in ((pair.i, pair.confidence_i), (pair.j, pair.confidence_j)):
            total[view] += np.where(np.isfinite(confidence), confidence, 0)
            seen[view] += 1
        world = points_in_world(pair, aligned.depth[pair.i], aligned.w2c[pair.i])
        fits[pair.j].append(measure_pose(world, pair.confidence_j, aligned.intrinsics[pair.j], aligned.w2c[pair.j]))
    mean = total / np.maximum(seen, 1)[:, None, None]
    agreement = np.divide(aligned.confidence, mean, out=np.zeros_like(mean), where=mean > 0)
    typical = float(np.median(agreement[agreement > 0]))
    for k, found in enumerate(fits):
        ratio = float(np.median([fit.inlier_ratio for fit in found]))
        error = float(np.median([fit.reprojection_error for fit in found]))
        yield PnPResult(aligned.w2c[k], ratio, error), unit_confidence(mean[k]) * np.minimum(agreement[k] / typical, 1)


def _predictions(pairs: Sequence[tuple[int, int]], first: Pointmap, second: Pointmap) -> list[PairPrediction]:
    arrays = [x.float().cpu().numpy() for x in (first.points, first.confidence, second.points, second.confidence)]
    return [PairPrediction(i, j, *(array[row] for array in arrays)) for row, (i, j) in enumerate(pairs)]


def _parts(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
