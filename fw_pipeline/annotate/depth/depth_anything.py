"""The `depth-anything-v2` depth engine: dense depth from a monocular network, aligned to the geometry frame by frame.

The network is transformers' `AutoModelForDepthEstimation`; frames are resized and normalised on its device, in batches, so that
memory does not grow with a clip's length beyond the arrays that come out.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from fw_model.files import file_hash
from fw_pipeline.annotate.depth.disparity import DisparityFit, Pixels, fit_pixels, steady_fits, usable_pixels
from fw_pipeline.annotate.types import ClipDepth, ClipGeometry, ClipSetAside, EngineError

logger = logging.getLogger(__name__)

CODE_VERSION = 1
SMALL = "depth-anything/Depth-Anything-V2-Small-hf"
FILES = ("config.json", "model.safetensors", "preprocessor_config.json")
# Parameters, download and licence by the size in a repository's name; the metric variants have the same.
PUBLISHED = {
    "small": "24.8 million parameters, about 99 MB, licence Apache-2.0",
    "base": "97.5 million parameters, about 390 MB, licence CC BY-NC 4.0 (non-commercial use only)",
    "large": "335 million parameters, about 1.34 GB, licence CC BY-NC 4.0 (non-commercial use only)",
}
CONFIDENT = 0.5  # pixels with at least this share of the clip's median confidence are fitted to
FARTHEST = 4.0  # depth beyond this many times the farthest the geometry has seen counts as infinitely far
AGREEMENT = 0.05  # relative disagreement of the two depths that halves a pixel's confidence


class DepthModelError(EngineError):
    """A depth network that is missing, damaged, of another kind or too large; the message says which and what to do."""


# ------------------------------------------------------------------------------------------------------------- network


class DepthAnythingNetwork:
    """Frames in, disparity out (metres for the metric variants), on one device."""

    def __init__(
        self, model: Any, mean: list[float], std: list[float], device: str, dtype: torch.dtype, short_side: int = 518
    ) -> None:
        self.model = model.to(device).eval()
        self.metric: bool = model.config.depth_estimation_type == "metric"
        self.patch: int = model.config.patch_size
        self.device, self.dtype, self.short_side = torch.device(device), dtype, short_side
        self._mean, self._std = (torch.tensor(v, device=device).view(1, 3, 1, 1) * 255 for v in (mean, std))

    @classmethod
    def load(
        cls, folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32, short_side: int = 518
    ) -> DepthAnythingNetwork:
        """From a folder in the published layout. Raises DepthModelError: a file is missing, damaged, or of another model."""
        from transformers import AutoModelForDepthEstimation

        try:
            config, preprocessor = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (FILES[0], FILES[2]))
            kind, mean, std = config.get("model_type"), preprocessor["image_mean"], preprocessor["image_std"]
            if kind != "depth_anything":
                raise DepthModelError(f"{folder}: holds a {kind} network; expected depth_anything, as in {SMALL}")
            model, report = AutoModelForDepthEstimation.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
        except DepthModelError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            raise DepthModelError(
                f"{folder}: not a readable depth network ({type(error).__name__}: {error}); download it again"
            ) from error
        if lacking := sorted(report["missing_keys"]):  # transformers fills them with random numbers
            raise DepthModelError(f"{folder}: {len(lacking)} weights are missing, first {lacking[0]}; download it again")
        return cls(model, mean, std, device, dtype, short_side)

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """The size the network sees: the short side `short_side`, both multiples of its patch (512x288 -> 924x518).

        The published preprocessor would take the long side of small frames instead (512x288 -> 518x294), a third of the pixels
        the network was trained for.
        """
        scale = self.short_side / min(height, width)
        rows, columns = (max(1, round(side * scale / self.patch)) * self.patch for side in (height, width))
        return rows, columns

    @torch.inference_mode()
    def __call__(self, frames: np.ndarray) -> Tensor:
        """[B, h, w, 3] uint8 RGB -> [B, h, w] float32 on the network's device.

        Raises DepthModelError when the batch does not fit into the GPU's memory.
        """
        height, width = frames.shape[1:3]
        try:
            pixels = torch.from_numpy(np.ascontiguousarray(frames)).to(self.device).permute(0, 3, 1, 2).float()
            size = self.input_size(height, width)
            shrinking = size[0] < height or size[1] < width
            pixels = F.interpolate(pixels, size, mode="bicubic", align_corners=False, antialias=shrinking)
            predicted = self.forward((pixels - self._mean) / self._std)
            # Half-pixel centres, as in the resize before: an output pixel shows what its input pixel showed.
            return F.interpolate(predicted[:, None].float(), (height, width), mode="bilinear", align_corners=False)[:, 0]
        except torch.OutOfMemoryError as error:
            raise DepthModelError(f"{len(frames)} frames of {width}x{height} at once do not fit; lower the batch") from error

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised [B, 3, H, W] -> `predicted_depth` [B, H, W].

        The DINOv2 backbone runs in `dtype`, the rest in float32: bfloat16's 8 bits would cut a wall into steps of 0.4 %.
        """
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            features = self.model.backbone(pixels).feature_maps
        rows, columns = pixels.shape[2] // self.patch, pixels.shape[3] // self.patch
        hidden = self.model.neck([feature.float() for feature in features], rows, columns)
        return self.model.head(hidden, rows, columns)


# -------------------------------------------------------------------------------------------------------------- engine


@dataclass(frozen=True)
class DepthAnythingV2:
    """DepthEngine over Depth Anything V2. The network is loaded, and if need be downloaded, when the first clip comes."""

    model: str = SMALL  # repository on the hub, or a folder with its three files
    revision: str = "main"  # branch, tag or commit on the hub; without effect on a folder
    device: str = "cpu"
    dtype: str | torch.dtype = "auto"  # float32 or bfloat16; auto: bfloat16 on a GPU that has it
    batch: int | None = None  # frames at once; None: 8 on a GPU, 1 elsewhere, where more are slower (benchmarks/bench_depth.py)
    short_side: int = 518  # pixels the network sees across the frame's short side
    min_inliers: float = 0.4  # share of the confident pixels a fit must explain within 5 %; else geometry's own depth is kept
    name: str = "depth-anything-v2"

    def __post_init__(self) -> None:
        if self.at_once < 1 or self.short_side < 14 or not 0 <= self.min_inliers <= 1:
            raise ValueError(
                f"batch {self.batch} (at least 1), short_side {self.short_side} (at least 14), "
                f"min_inliers {self.min_inliers} (0 to 1)"
            )
        if self.dtype != "auto" and self.torch_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype {self.dtype!r}: expected auto, float32 or bfloat16")

    @classmethod
    def from_pretrained(cls, repo_or_dir: str | Path = SMALL, revision: str = "main", **settings: Any) -> DepthAnythingV2:
        """An engine whose network is there already. `settings` are the other fields.

        Raises DepthModelError as `network`.
        """
        engine = cls(str(repo_or_dir), revision, **settings)
        _ = engine.network
        return engine

    @property
    def torch_dtype(self) -> torch.dtype:
        if isinstance(self.dtype, torch.dtype):
            return self.dtype
        if self.dtype == "auto":
            fast = torch.device(self.device).type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            return torch.bfloat16 if fast else torch.float32
        found = getattr(torch, self.dtype, None)
        return found if isinstance(found, torch.dtype) else torch.float64  # refused by __post_init__

    @property
    def at_once(self) -> int:
        """Frames in a batch."""
        if self.batch is not None:
            return self.batch
        return 8 if torch.device(self.device).type == "cuda" else 1

    @cached_property
    def version(self) -> str:
        """Names code, weights and every setting that changes results. A folder's weights are named by their hash.

        Raises DepthModelError when `model` is a folder and lacks a file.
        """
        weights = f"{self.model}@{self.revision}"
        if (folder := _local_folder(self.model)) is not None:
            weights = "+".join(file_hash(folder / name)[1] for name in FILES)
        precision = str(self.torch_dtype).removeprefix("torch.")
        return f"{CODE_VERSION}:{weights}:{self.short_side}:{precision}:{self.min_inliers:g}"

    @cached_property
    def network(self) -> DepthAnythingNetwork:
        """The loaded network; downloaded with a progress bar on first use, unless HF_HUB_OFFLINE=1.

        Raises DepthModelError: not to be had (the message says what to download, its size and licence), or damaged.
        """
        folder = _local_folder(self.model) or _download(self.model, self.revision)
        return DepthAnythingNetwork.load(folder, self.device, self.torch_dtype, self.short_side)

    def disparity(self, frames: np.ndarray) -> np.ndarray:
        """frames [T, h, w, 3] uint8 -> disparity [T, h, w] float32, larger is nearer (1 / metres for the metric variants)."""
        found = np.empty(frames.shape[:3], np.float32)
        starts = range(0, len(frames), self.at_once)
        for start in tqdm(starts, desc="depth", unit=" batches", disable=None, leave=False, delay=5):
            part = slice(start, start + self.at_once)
            found[part] = self.network(frames[part]).cpu().numpy()
        if self.network.metric:
            np.divide(1, found, out=found, where=found > 0)
        return found

    def estimate(self, frames: np.ndarray, geometry: ClipGeometry) -> ClipDepth:
        """See `DepthEngine.estimate`: per frame the network's depth where its fit is good, the geometry's own elsewhere.

        `source` says which; scale, shift, inlier_ratio and residual are those of the fit that was used or refused (1, 0, 0
        and 1 where there was nothing to fit). Depth is 0 where the aligned disparity says infinitely far: not positive, or
        beyond 4 times the farthest depth of the geometry. Confidence is the share of inliers, and where the geometry has a
        depth, as far as it is sure of it, how well the two agree.

        Raises:
            ClipSetAside: not a single frame could be aligned; the message says why.
            DepthModelError: as `network`, or a batch too large for the device.
            ValueError: frames and geometry differ in size.
        """
        if frames.shape[:3] != geometry.depth.shape:
            raise ValueError(
                f"frames {list(frames.shape)} and geometry's depth {list(geometry.depth.shape)} do not belong together"
            )
        depth = self.disparity(frames)
        fits = self._fit(depth, geometry)
        good = np.array([fit is not None and fit.inlier_ratio >= self.min_inliers for fit in fits])
        if not good.all():
            logger.warning(
                "%d of %d frames keep the geometry's own depth: the network's does not fit it", (~good).sum(), len(good)
            )
        known = geometry.depth[geometry.depth > 0]
        farthest = FARTHEST * float(np.quantile(known[:: max(1, len(known) // 100_000)], 0.99))
        confidence = np.empty_like(depth)
        for t, fit in enumerate(fits):
            if fit is not None and good[t]:
                depth[t] = depth_from(depth[t], fit, farthest)
                confidence[t] = _confidence(depth[t], fit, geometry.depth[t], geometry.confidence[t])
            else:
                depth[t], confidence[t] = geometry.depth[t], geometry.confidence[t]
        columns = [(f.scale, f.shift, f.inlier_ratio, f.residual) if f else (1, 0, 0, 1) for f in fits]
        source = np.where(good, ClipDepth.SOURCES.index(self.name), ClipDepth.SOURCES.index("geometry")).astype(np.uint8)
        return ClipDepth(depth, confidence, source, *np.array(columns, np.float32).T.copy())

    def _fit(self, disparity: np.ndarray, geometry: ClipGeometry) -> list[DisparityFit | None]:
        """One steadied fit per frame; None where there is nothing to fit."""
        sure = geometry.confidence[(geometry.depth > 0) & (geometry.confidence > 0)]
        enough = CONFIDENT * float(np.median(sure)) if len(sure) else np.inf
        pixels: list[Pixels | None] = []
        fits: list[DisparityFit | None] = []
        reason = ""
        for d, z, confidence in zip(disparity, geometry.depth, geometry.confidence, strict=True):
            own, fit = None, None
            try:
                # The network's last layer cuts off at 0: a 0 only says "at least as far as this".
                own = usable_pixels(d, z, (confidence >= enough) & (d != 0))
                fit = fit_pixels(own, affine=not self.network.metric)
            except ClipSetAside as error:
                reason = reason or str(error)
            pixels.append(own)
            fits.append(fit)
        if all(fit is None for fit in fits):
            raise ClipSetAside(f"{self.name}: not one of {len(fits)} frames could be aligned; the first: {reason}")
        return steady_fits(fits, pixels, affine=not self.network.metric)


def depth_from(disparity: np.ndarray, fit: DisparityFit, farthest: float) -> np.ndarray:
    """z-depth of a disparity map under a fit; 0 where it is infinitely far (beyond `farthest`) or not known."""
    inverse = fit.scale * disparity + fit.shift
    return np.divide(1, inverse, out=np.zeros_like(inverse), where=inverse * farthest >= 1)


def _confidence(depth: np.ndarray, fit: DisparityFit, own: np.ndarray, own_confidence: np.ndarray) -> np.ndarray:
    """[h, w] in [0, 1], 0 where there is no depth; see `DepthAnythingV2.estimate`."""
    off = np.divide(depth - own, own, out=np.zeros_like(depth), where=own > 0)
    says = np.where(own > 0, own_confidence, 0)
    return np.where(depth > 0, (1 - says) * fit.inlier_ratio + says / (1 + (off / AGREEMENT) ** 2), 0)


# -------------------------------------------------------------------------------------------------------- where it is


def _local_folder(model: str) -> Path | None:
    """The folder that `model` names; None when it names a repository. Raises DepthModelError for a folder that lacks a file."""
    path = Path(model).expanduser()
    if path.is_dir():
        if lacking := [name for name in FILES if not (path / name).is_file()]:
            raise DepthModelError(f"{path}: no {' and no '.join(lacking)} here. {_what_to_fetch(SMALL, 'main')}")
        return path
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise DepthModelError(f"{path}: no such folder. {_what_to_fetch(SMALL, 'main')}")
    return None


def _download(repo: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=list(FILES)))
    except (OSError, ValueError) as error:
        raise DepthModelError(
            f"depth network {repo!r} (revision {revision!r}) is neither a local folder nor available from the hub: {error}\n"
            f"{_what_to_fetch(repo, revision)}"
        ) from error
    if lacking := [name for name in FILES if not (folder / name).is_file()]:
        raise DepthModelError(f"{repo} has no {' and no '.join(lacking)} at {revision!r}. {_what_to_fetch(repo, revision)}")
    return folder


def _what_to_fetch(repo: str, revision: str) -> str:
    size = next(
        (text for word, text in PUBLISHED.items() if f"-{word}-" in repo.lower()), "size and licence: see its page on the hub"
    )
    return (
        f"Needed once: {', '.join(FILES)} of {repo}: {size}. Fetch them on a machine with network access:\n"
        f"  hf download {repo} --revision {revision} {' '.join(FILES)}\n"
        "or name a local folder that holds the three files. Depth by the geometry alone (depth: geometry) needs no weights."
    )
