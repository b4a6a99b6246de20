"""What one clip of the dataset is: the arrays, their dtypes and shapes, and the batch a model receives.

Conventions are the project's: pixel (v, u) has its centre at (u + 0.5, v + 0.5); w2c [3, 4] with OpenCV axes; the world
is the first camera; depth is z-depth in clip units, where 1 unit is the mean distance of the clip's valid points from
the first camera, and `scale` is what the annotator's units were divided by.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

POSE_TOLERANCE = 1e-4  # float32 poses of a long chain of products stay well below it

# Arrays of a clip row: name -> (dtype as stored, shape in symbols). F = 1 + (T - 1) / 4.
ARRAYS: dict[str, tuple[str, tuple[str | int, ...]]] = {
    "latents": ("float16", (16, "F", "H/8", "W/8")),  # normalised VAE latents; frame 0 doubles as the image latent
    "image": ("float16", ("N", "C")),  # CLIP features of the first frame
    "depth": ("float16", ("T", "H", "W")),  # 0 = invalid
    "confidence": ("uint8", ("T", "H", "W")),  # 255 = certain
    "intrinsics": ("float32", ("T", 3, 3)),  # pixels of the H x W image
    "w2c": ("float32", ("T", 3, 4)),
}
UNREAD = "confidence"  # what training leaves in the shard: no loss reads it
# A clip that is not encoded yet has its pictures instead of what the encoders make of them.
VIDEO: tuple[str, tuple[str | int, ...]] = ("uint8", ("N",))  # bytes of a video file of exactly T frames of H x W
RAW_ARRAYS = {"video": VIDEO, **{name: spec for name, spec in ARRAYS.items() if name not in ("latents", "image")}}
# Prompts are embedded once each and kept apart from the clips; see `manifest.read_texts`.
TEXT: tuple[str, tuple[str | int, ...]] = ("float16", ("L", "D"))  # prompt embedding of L real tokens, without padding


@dataclass(frozen=True)
class ClipRecord:
    """One clip on its way into a shard."""

    clip_id: str
    video: str  # path relative to the videos folder; the split is a hash of it
    fps: float
    scale: float
    prompt: str  # its embedding is given to the writer by `add_text`, once for all clips that share it
    arrays: dict[str, np.ndarray]  # exactly the keys of ARRAYS, or of RAW_ARRAYS for a clip that is not encoded yet
    quality: dict[str, float]  # per-clip numbers: inlier_ratio, reprojection_error, valid_fraction, ...
    versions: dict[str, str]  # who made it: geometry, depth, and the encoders as `EncodersConfig.identities` names them
    motion: str = ""  # what the camera does, "" where it is not known


@dataclass(frozen=True)
class Batch:
    """Clips of one bucket, stacked. Floating tensors have the dtype in which they are stored until `to` moves the batch."""

    clip_ids: list[str]
    latents: torch.Tensor  # [B, 16, F, H/8, W/8]
    text: torch.Tensor  # [B, text_len, text_dim], zero-padded
    image: torch.Tensor  # [B, image_tokens, image_dim]
    depth: torch.Tensor  # [B, T, H, W], 0 = invalid
    intrinsics: torch.Tensor  # [B, T, 3, 3]
    w2c: torch.Tensor  # [B, T, 3, 4]
    dynamic: torch.Tensor | None = None  # [B, T, H, W] bool, moves of itself; None: the dataset does not know

    def __len__(self) -> int:
        return len(self.clip_ids)

    @property
    def valid(self) -> torch.Tensor:
        """[B, T, H, W] bool: where depth is known."""
        return self.depth > 0

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device, in float32: half the bytes travel, and are widened there."""
        return self._each(lambda tensor: _widened(tensor.to(device, non_blocking=True)))

    def pin_memory(self) -> Batch:
        """What a DataLoader with `pin_memory` asks for."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        changed = {name: change(value) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return Batch(clip_ids=self.clip_ids, **changed)


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def bucket_of(record: ClipRecord) -> str:
    """The bucket "HxWxT" of a record, from the shape of its depth."""
    frames, height, width = record.arrays["depth"].shape
    return f"{height}x{width}x{frames}"


def check_record(record: ClipRecord) -> None:
    """Raise ValueError naming the clip and array unless a record is what this module says a clip is.

    Names, dtypes (in either byte order), shapes that agree with one bucket of T = 4k+1 frames and sides that are multiples
    of 16, finite numbers, depth >= 0, rotations, and the first camera as the world.
    """
    try:
        _check_shapes(record.arrays)
        _check_values(record)
    except ValueError as error:
        raise ValueError(f"clip {record.clip_id}: {error}") from error


def check_text(prompt: str, embedding: np.ndarray) -> None:
    """Raise ValueError naming the prompt unless the embedding is a finite float16 [L, D] with at least one token."""
    if embedding.ndim != 2 or 0 in embedding.shape or embedding.dtype.newbyteorder("=") != np.dtype(TEXT[0]):
        raise ValueError(f"prompt {prompt!r}: expected a {TEXT[0]} embedding [L, D], got {embedding.dtype} {embedding.shape}")
    if not np.isfinite(embedding).all():
        raise ValueError(f"prompt {prompt!r}: its embedding holds NaN or infinity")


def _check_shapes(arrays: dict[str, np.ndarray]) -> None:
    specs = RAW_ARRAYS if "video" in arrays else ARRAYS
    if set(arrays) != set(specs):
        raise ValueError(f"arrays {sorted(arrays)}, expected {sorted(specs)}")
    if arrays["depth"].ndim != 3:
        raise ValueError(f"depth: expected [T, H, W], got shape {list(arrays['depth'].shape)}")
    frames, height, width = arrays["depth"].shape
    if frames % 4 != 1 or height % 16 or width % 16 or not height * width:
        raise ValueError(f"bucket {height}x{width}x{frames}: frames must be 4k+1 and both sides positive multiples of 16")
    sizes = {"T": frames, "H": height, "W": width, "F": 1 + (frames - 1) // 4, "H/8": height // 8, "W/8": width // 8}
    for name, (dtype, shape) in specs.items():
        array = arrays[name]
        wanted = [sizes.get(size, size) if isinstance(size, str) else size for size in shape]
        fits = array.ndim == len(wanted) and all(isinstance(w, str) or w == n for w, n in zip(wanted, array.shape, strict=True))
        if not fits or 0 in array.shape:
            raise ValueError(f"{name}: expected {wanted}, got shape {list(array.shape)}")
        if array.dtype.newbyteorder("=") != np.dtype(dtype):
            raise ValueError(f"{name}: expected {dtype}, got {array.dtype}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"{name}: holds NaN or infinity")


def _check_values(record: ClipRecord) -> None:
    if not record.clip_id or not record.video:
        raise ValueError(f"clip id {record.clip_id!r} and video {record.video!r} must not be empty")
    for name, value in (("fps", record.fps), ("scale", record.scale)):
        if not (np.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be positive and finite, got {value}")
    if (record.arrays["depth"] < 0).any():
        raise ValueError("depth: negative; unknown depth is 0")
    intrinsics, w2c = record.arrays["intrinsics"], record.arrays["w2c"].astype(np.float64)
    if (intrinsics[:, [0, 1], [0, 1]] <= 0).any() or (intrinsics[:, 2] != [0, 0, 1]).any():
        raise ValueError("intrinsics: expected positive focal lengths and a last row of 0 0 1 in every frame")
    if np.abs(w2c[0] - np.eye(3, 4)).max() > POSE_TOLERANCE:
        raise ValueError("w2c: the world must be the first camera, so frame 0 must be the identity")
    rotation = w2c[:, :, :3]
    off = np.abs(rotation @ rotation.transpose(0, 2, 1) - np.eye(3)).max(axis=(1, 2))
    if off.max() > POSE_TOLERANCE or (np.linalg.det(rotation) < 0).any():
        raise ValueError(f"w2c: frame {int(off.argmax())} is not a rotation (off orthonormal by {off.max():.2g})")
