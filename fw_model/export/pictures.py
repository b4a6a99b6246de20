"""Pictures of a world: depth in colours, frames as JPEG."""

from __future__ import annotations

import cv2
import numpy as np
from torch import Tensor

QUALITY = 92  # of JPEG


def depth_range(depth: Tensor) -> tuple[float, float]:
    """(near, far) of one colour scale for all frames [T, H, W]: 2nd and 98th percentile of what is known; (1, 2) of nothing."""
    known = depth[depth > 0]
    if not len(known):
        return 1.0, 2.0
    near, far = np.percentile(known.numpy(), [2, 98])
    return float(near), float(max(far, 1.0001 * near))


def depth_colours(depth: np.ndarray, near: float, far: float) -> np.ndarray:
    """Depth [H, W] -> RGB [H, W, 3] uint8: inverse depth, near red, far blue (OpenCV's turbo); unknown black."""
    inverse = 1 / np.maximum(depth, 1e-9)
    share = (inverse - 1 / far) / (1 / near - 1 / far)
    coloured = cv2.applyColorMap((share.clip(0, 1) * 255).astype(np.uint8), cv2.COLORMAP_TURBO)[..., ::-1]
    return np.where((depth > 0)[..., None], coloured, 0).astype(np.uint8)


def jpeg(picture: np.ndarray, longest: int | None = None, quality: int = QUALITY) -> bytes:
    """RGB [H, W, 3] uint8 -> JPEG, made smaller where a side is above `longest`."""
    height, width = picture.shape[:2]
    if longest is not None and max(height, width) > longest:
        scale = longest / max(height, width)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    good, data = cv2.imencode(".jpg", np.ascontiguousarray(picture[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not good:
        raise ValueError(f"could not encode a picture of {list(picture.shape)} {picture.dtype}")
    return bytes(data)
