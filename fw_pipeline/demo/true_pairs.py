"""What a perfect two-view network would say about the demo's scenes: exact pointmaps, and the ways to spoil them.

The checks and benchmarks of everything after the network run on these: the truth is known to the last digit. Pixels lie on
the network's integer grid (see `fw_pipeline.annotate.pairwise.align`). `TruthNetwork` says it through the network's interface.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import cv2
import numpy as np
import torch
from torch import Tensor

from fw_pipeline.annotate.dust3r import DUSt3RConfig, Pointmap, prepare
from fw_pipeline.annotate.dust3r.config import PATCH
from fw_pipeline.annotate.pairwise.pair_graph import PairPrediction
from fw_pipeline.demo.render import camera_at, cast, intrinsics_of
from fw_pipeline.demo.scenes import SCENES, Shot

WrongPair = Literal["scrambled", "moved", "elsewhere"]


@dataclass(frozen=True)
class TrueViews:
    """Exact geometry of N views of one shot, pixel (u, v) of the integer grid at image position (u, v)."""

    depth: np.ndarray  # [N, H, W] float64 z-depth, 0 = unknown: no pointmap says anything there
    w2c: np.ndarray  # [N, 3, 4] float64, scene's world (metres)
    intrinsics: np.ndarray  # [3, 3], principal point (W / 2, H / 2)

    def points_in(self, source: int, view: int) -> np.ndarray:
        """Pointmap of `view` in camera `source` [H, W, 3]."""
        own = self.depth[view][..., None] * integer_rays(self.depth.shape[1], self.depth.shape[2], self.intrinsics)
        if view == source:
            return own
        rotation = self.w2c[source, :, :3] @ self.w2c[view, :, :3].T
        return own @ rotation.T + self.w2c[source, :, 3] - rotation @ self.w2c[view, :, 3]


@dataclass(frozen=True)
class Spoil:
    """What is done to exact pointmaps."""

    noise: float = 0.0  # standard deviation along the ray, as a fraction of the distance, new for each pair and pixel
    noise_patch: int = 1  # pixels over which the noise is nearly the same: 1 is white, a network's is smooth
    noise_of_own_camera: bool = False  # noise along the ray of the camera that took the pixel, not of the pair's first camera
    outliers: float = 0.0  # share of pixels of each pointmap thrown anywhere in the scene
    log_scale: float = 0.7  # each pair has a scale of its own, e^[-log_scale, log_scale]
    wrong_pair: WrongPair | None = None  # what one pair in the middle of the list is replaced with


def integer_rays(height: int, width: int, intrinsics: np.ndarray) -> np.ndarray:
    """Rays with z = 1 [height, width, 3] of the pixels of the integer grid."""
    u, v = np.meshgrid(np.arange(width, dtype=np.float64), np.arange(height, dtype=np.float64))
    x, y = (u - intrinsics[0, 2]) / intrinsics[0, 0], (v - intrinsics[1, 2]) / intrinsics[1, 1]
    return np.stack([x, y, np.ones_like(x)], axis=-1)


def true_views(shot: Shot, views: int, height: int = 96, width: int = 128) -> TrueViews:
    """`views` frames evenly over a demo shot, cast at height x width; the shot's field of view spans the long side."""
    shot = replace(shot, height=height, width=width)
    intrinsics = intrinsics_of(shot)
    grid = intrinsics.copy()
    grid[:2, 2] += 0.5  # `cast` puts pixel centres at + 0.5: the same ray for the same index
    scene = SCENES[shot.scene]()
    w2c = np.stack([camera_at(shot, s) for s in np.linspace(0, 1, views)])
    return TrueViews(np.stack([cast(scene, pose, grid, height, width) for pose in w2c]), w2c, intrinsics)


def pair_predictions(
    truth: TrueViews, pairs: Iterable[tuple[int, int]], spoil: Spoil | None = None, seed: int = 0
) -> list[PairPrediction]:
    """What the network would give for `pairs` [(i, j)], spoilt. float32, confidence 3 everywhere: it gives no hint."""
    spoil, rng, pairs = spoil or Spoil(), np.random.default_rng(seed), list(pairs)
    spoilt = [_predict(truth, pair, spoil, rng) for pair in pairs]
    if spoil.wrong_pair:
        middle = len(pairs) // 2
        spoilt[middle] = _wrong(truth, spoilt[middle], spoil.wrong_pair, rng)
    return spoilt


def _predict(truth: TrueViews, pair: tuple[int, int], spoil: Spoil, rng: np.random.Generator) -> PairPrediction:
    i, j = pair
    scale = np.exp(rng.uniform(-spoil.log_scale, spoil.log_scale))
    maps = []
    for view in pair:
        points = truth.points_in(i, view)
        factor = 1 + spoil.noise * _unit_noise(points.shape[:2], spoil.noise_patch, rng)[..., None]
        if spoil.noise_of_own_camera and view != i:
            eye = points - truth.points_in(view, view) @ (truth.w2c[view, :, :3] @ truth.w2c[i, :, :3].T)
            points = eye + (points - eye) * factor
        else:
            points = points * factor
        points[~(truth.depth[view] > 0)] = np.nan
        thrown = rng.random(points.shape[:2]) < spoil.outliers
        low, high = np.nanmin(points, (0, 1)), np.nanmax(points, (0, 1))
        points[thrown] = rng.uniform(low - 0.5 * (high - low), high + 0.5 * (high - low), (int(thrown.sum()), 3))
        maps.append((scale * points).astype(np.float32))
    confidence = np.full(maps[0].shape[:2], 3.0, np.float32)
    return PairPrediction(i, j, maps[0], confidence, maps[1], confidence)


class TruthNetwork:
    """DUSt3R's interface over the truth: an image is known by its pixels, and a pair gets its true pointmaps, spoilt.

    What it says about a pair depends on that pair alone, not on when or with which others it is asked. Counts what it is asked.
    """

    def __init__(self, size: int = 128, spoil: Spoil | None = None, wrong: Iterable[tuple[int, int]] = ()) -> None:
        """`size`: the long side of the images it reads; `wrong`: pairs of frames of a clip that `spoil.wrong_pair` replaces."""
        self.config = DUSt3RConfig(img_size=(size, size))
        self.spoil, self.wrong = spoil or Spoil(), frozenset(wrong)
        self.edit: Callable[[PairPrediction], PairPrediction] = lambda pair: pair  # a last word on each pair
        self.encoded = self.decoded = 0  # images, pairs
        self._views: list[tuple[TrueViews, int]] = []
        self._known: dict[bytes, int] = {}

    def show(self, frames: np.ndarray, truth: TrueViews) -> None:
        """Make a clip known: frames [N, h, w, 3] uint8 as the engine will get them, truth at the network's size.

        A picture that comes twice is the view that came first.
        """
        for view, frame in enumerate(prepare(frames, max(self.config.img_size)).frames):
            self._known.setdefault(frame.tobytes(), len(self._views))
            self._views.append((truth, view))

    def encode(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, H/16, W/16, 1]: the number of the view. KeyError for an image never shown."""
        self.encoded += len(images)
        pixels = ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        numbers = torch.tensor([float(self._known[image.tobytes()]) for image in pixels])
        return numbers[:, None, None, None].expand(-1, images.shape[2] // PATCH, images.shape[3] // PATCH, 1)

    def decode(self, tokens1: Tensor, tokens2: Tensor) -> tuple[Pointmap, Pointmap]:
        """The true pointmaps of each pair."""
        self.decoded += len(tokens1)
        pairs = [self._pair(int(a[0, 0, 0]), int(b[0, 0, 0])) for a, b in zip(tokens1, tokens2, strict=True)]
        points_i, confidence_i, points_j, confidence_j = (
            torch.from_numpy(np.stack([getattr(pair, name) for pair in pairs]))
            for name in ("points_i", "confidence_i", "points_j", "confidence_j")
        )
        return Pointmap(points_i, confidence_i), Pointmap(points_j, confidence_j)

    def _pair(self, first: int, second: int) -> PairPrediction:
        (truth, i), (_, j) = self._views[first], self._views[second]
        rng = np.random.default_rng([first, second])
        pair = _predict(truth, (i, j), self.spoil, rng)
        if self.spoil.wrong_pair and (i, j) in self.wrong:
            pair = _wrong(truth, pair, self.spoil.wrong_pair, rng)
        return self.edit(pair)


def _unit_noise(size: tuple[int, int], patch: int, rng: np.random.Generator) -> np.ndarray:
    """Normal noise [H, W] of standard deviation 1, smooth over about `patch` pixels."""
    if patch == 1:
        return rng.standard_normal(size)
    coarse = rng.standard_normal((size[0] // patch + 3, size[1] // patch + 3))
    fine = cv2.resize(coarse, None, fx=patch, fy=patch, interpolation=cv2.INTER_CUBIC)[
        patch : patch + size[0], patch : patch + size[1]
    ]
    return np.asarray(fine / fine.std())


def _wrong(truth: TrueViews, pair: PairPrediction, how: WrongPair, rng: np.random.Generator) -> PairPrediction:
    """A pair whose two pointmaps do not belong together: scattered points, the second camera elsewhere, or another view's."""
    if how == "scrambled":
        shape = pair.points_i.shape
        return replace(
            pair,
            points_i=(rng.standard_normal(shape) + [0, 0, 4]).astype(np.float32),
            points_j=(rng.standard_normal(shape) + [0, 0, 4]).astype(np.float32),
        )
    if how == "moved":
        turn = np.linalg.qr(rng.standard_normal((3, 3)))[0]
        turn *= np.linalg.det(turn)
        return replace(pair, points_j=(pair.points_j @ turn.T + rng.standard_normal(3)).astype(np.float32))
    other = (pair.j + len(truth.w2c) // 2) % len(truth.w2c)
    return replace(pair, points_j=truth.points_in(pair.i, other).astype(np.float32))
