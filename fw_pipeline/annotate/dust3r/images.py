"""Photographs and video frames as DUSt3R reads them: upright RGB at one of its sizes, and the way back to their own pixels.

The size rule is the original's: long side 512, then a centre crop to multiples of 16; or, for networks trained at 224, short
side 224 and the centre square. Nothing is rounded on the way (see `FrameTransform`), so pixels stay square and intrinsics
map exactly both ways.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fw_pipeline.annotate.clips import FrameTransform
from fw_pipeline.annotate.dust3r.config import PATCH

SQUARE = 224  # networks trained at this size saw squares only
_MANY_BITS = ("I", "F")  # Pillow modes of 16 or 32 bits a channel begin with these; converting them to RGB saturates


@dataclass(frozen=True)
class PreparedImages:
    """Images of one size, ready for the network, and how they came from their source."""

    frames: np.ndarray  # [N, H, W, 3] uint8 RGB; H and W multiples of 16
    transform: FrameTransform  # `intrinsics_to_source` takes what is estimated here back to the source's pixels

    def tensor(self, device: str | torch.device = "cpu") -> Tensor:
        """[N, 3, H, W] float32 in -1..1, what `DUSt3R.encode` takes. Bytes travel to the device, not floats."""
        pixels = torch.from_numpy(self.frames).to(device).permute(0, 3, 1, 2)
        return (pixels.float() / 127.5 - 1).contiguous()


def network_size(height: int, width: int, size: int = 512) -> tuple[int, int]:
    """(H, W) at which the network reads an image of height x width pixels; `size` is what the network was trained at.

    Raises ValueError for an image so narrow that less than one token would be left.
    """
    if size == SQUARE:
        return SQUARE, SQUARE
    long_side = max(height, width)
    rows, columns = (round(side * size / long_side) // PATCH * PATCH for side in (height, width))
    if not rows or not columns:
        raise ValueError(
            f"an image of {height}x{width} (height x width) is too narrow: {size} pixels long it is less than {PATCH} wide"
        )
    return rows, columns


def prepare(images: np.ndarray | str | Path, size: int = 512) -> PreparedImages:
    """Bring images to the network's size.

    Args:
        images: an image file (turned upright by its EXIF orientation), one image [h, w, 3], or N of one size [N, h, w, 3],
            uint8 RGB. A fourth channel (alpha) is dropped.
        size: what the network was trained at, `max(model.config.img_size)`.

    Raises:
        ValueError: not a readable image of 8 bits a channel, another array shape or type, or too narrow.
    """
    frames = images if isinstance(images, np.ndarray) else read_image(Path(images))
    if frames.dtype != np.uint8 or frames.ndim not in (3, 4) or frames.shape[-1] not in (3, 4) or 0 in frames.shape:
        raise ValueError(f"images are {frames.dtype} {list(frames.shape)}; expected uint8 [h, w, 3] or [N, h, w, 3]")
    frames = frames.reshape(-1, *frames.shape[-3:])[..., :3]
    height, width = frames.shape[1:3]
    transform = FrameTransform(height, width, *network_size(height, width, size))
    if (transform.height, transform.width) == (height, width):
        return PreparedImages(np.ascontiguousarray(frames), transform)
    out = np.empty((len(frames), transform.height, transform.width, 3), np.uint8)
    for target, frame in zip(out, frames, strict=True):
        target[:] = _resample(frame, transform)
    return PreparedImages(out, transform)


def read_image(path: Path) -> np.ndarray:
    """An image file as upright RGB [h, w, 3] uint8. Raises ValueError naming the file."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(_MANY_BITS):
                raise ValueError(f"mode {image.mode}; expected 8 bits a channel")
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read as a photograph ({error})") from error


def _resample(frame: np.ndarray, transform: FrameTransform) -> np.ndarray:
    """As `FrameTransform.apply`, with the filters of the network's training: Lanczos to shrink, bicubic to enlarge."""
    x, y = max(transform.left / transform.scale, 0.0), max(transform.top / transform.scale, 0.0)
    box = (x, y, transform.source_width - x, transform.source_height - y)
    method = Image.Resampling.LANCZOS if transform.scale < 1 else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(frame).resize((transform.width, transform.height), method, box=box))
