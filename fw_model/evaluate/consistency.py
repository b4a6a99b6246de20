"""Is a world one scene? Its points held against its own other frames, and the ends of a path that closes against each other."""

from __future__ import annotations

import cv2
import numpy as np
import torch

from fw_model.cameras import project
from fw_model.evaluate.obey import relative_c2w
from fw_model.export.world import World
from fw_model.metrics import agreement, calibration

TOLERANCE = 0.05  # relative depth within which two frames agree
OCCLUDED = 0.1  # relative: a point farther behind what the other frame sees is hidden there, not wrong
CLOSED = (0.02, 2.0)  # share of the path's length and degrees between first and last camera of a path that closes


def gaps(frames: int) -> dict[str, int]:
    """The distances between frames that are compared, by name; a gap that a short clip does not have is left out."""
    wanted = {"1": 1, "5": 5, "half": frames // 2}
    return {name: gap for name, gap in wanted.items() if 0 < gap < frames}


def reprojection(world: World, gap: int) -> dict[str, float]:
    """Points of frame t seen by camera t + gap: share that agrees in depth within `TOLERANCE`, of those in view and not hidden,
    and median colour error there (0..255). nan where nothing is in view."""
    agree, seen, colours = 0, 0, []
    height, width = world.video.shape[1:3]
    for t in range(len(world.video) - gap):
        known = world.depth[t] > 0
        uv, z = project(world.points[t][known], world.cameras.intrinsics[t + gap], world.cameras.w2c[t + gap])
        inside = (z > 0) & (uv[:, 0] >= 0) & (uv[:, 0] < width) & (uv[:, 1] >= 0) & (uv[:, 1] < height)
        column, row = uv[inside, 0].long(), uv[inside, 1].long()
        there = world.depth[t + gap][row, column]
        ratio = z[inside] / there.clamp_min(1e-9) - 1
        visible = (there > 0) & (ratio < OCCLUDED)
        good = visible & (ratio.abs() < TOLERANCE)
        seen, agree = seen + int(visible.sum()), agree + int(good.sum())
        off = (world.video[t][known][inside][visible].float() - world.video[t + gap][row, column][visible].float()).abs().mean(-1)
        colours.append(off[:: max(1, len(off) // 20_000)])
    joined = torch.cat(colours) if colours else torch.zeros(0)
    return {
        "agree": agree / seen if seen else float("nan"),
        "colour": float(joined.median()) if len(joined) else float("nan"),
    }


def consistency(world: World) -> dict[str, float]:
    """All numbers of one world: `agree_*` and `colour_*` at each gap, depth against points against cameras, confidence."""
    found = {
        f"{name}_{gap}": value for gap, k in gaps(len(world.video)).items() for name, value in reprojection(world, k).items()
    }
    arrays = (world.depth.numpy(), world.points.numpy(), world.cameras.w2c.numpy(), world.cameras.intrinsics.numpy())
    found["agreement"] = agreement(*arrays)
    found["confidence_rank"] = _confidence_rank(world)
    return found | revisit(world)


def _confidence_rank(world: World) -> float:
    """Spearman's rank correlation between confidence and how far depth is from the next frame's: below 0 is as it should be."""
    errors, sure = [], []
    for t in range(len(world.video) - 1):
        known = world.depth[t] > 0
        uv, z = project(world.points[t][known], world.cameras.intrinsics[t + 1], world.cameras.w2c[t + 1])
        height, width = world.depth.shape[1:]
        inside = (z > 0) & (uv >= 0).all(-1) & (uv[:, 0] < width) & (uv[:, 1] < height)
        there = world.depth[t + 1][uv[inside, 1].long(), uv[inside, 0].long()]
        both = there > 0
        errors.append((z[inside][both] / there[both] - 1).abs()[::7])
        sure.append(world.depth_conf[t][known][inside][both][::7])
    if not errors:
        return float("nan")
    error, confidence = torch.cat(errors).numpy(), torch.cat(sure).numpy()
    if len(error) < 100 or np.ptp(confidence) == 0:
        return float("nan")
    return calibration(error, confidence)[1]


def revisit(world: World) -> dict[str, float]:
    """PSNR (dB) and SSIM of the last frame against the first, where the path asked for (or known) ends where it began."""
    path = world.requested or world.cameras
    rotation, position = relative_c2w(path.w2c.numpy())
    length = np.linalg.norm(np.diff(position, axis=0), axis=1).sum()
    turned = np.degrees(np.arccos(np.clip((np.trace(rotation[-1]) - 1) / 2, -1, 1)))
    if length < 1e-6 or np.linalg.norm(position[-1]) > CLOSED[0] * length or turned > CLOSED[1]:
        return {}
    first, last = world.video[0].numpy(), world.video[-1].numpy()
    return {"revisit_psnr": psnr(first, last), "revisit_ssim": ssim(first, last)}


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal to noise ratio of uint8 pictures, dB; 100 for equal ones."""
    error = float(((a.astype(np.float64) - b) ** 2).mean())
    return 100.0 if error == 0 else float(10 * np.log10(255**2 / error))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity of uint8 pictures [H, W, 3] (Wang et al. 2004): window of 11, sigma 1.5, mean of channels."""

    def blur(x: np.ndarray) -> np.ndarray:
        return np.asarray(cv2.GaussianBlur(x, (11, 11), 1.5))

    x, y = a.astype(np.float64), b.astype(np.float64)
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return float((((2 * mx * my + c1) * (2 * cov + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())
