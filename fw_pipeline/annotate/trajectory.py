"""A clip's camera path, whoever found it: filling in frames without a pose, and refusing a path that does not move."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.spatial.transform import Rotation, Slerp

from fw_pipeline.annotate.quality import MAX_INTERPOLATED
from fw_pipeline.annotate.types import ClipSetAside
from fw_pipeline.annotate.vectors import length

MIN_PARALLAX = 0.01  # extent of the camera's path over the scene's median depth


def fill_missing_poses(poses: Sequence[np.ndarray | None], why: str = "") -> tuple[np.ndarray, np.ndarray]:
    """Poses w2c [3, 4] of a clip, None where PnP failed -> (w2c [T, 3, 4], interpolated [T] bool). `why` ends the message.

    Raises ClipSetAside when more than MAX_INTERPOLATED of the frames are missing.
    """
    missing = np.array([pose is None for pose in poses], bool)
    if not len(missing) or missing.mean() > MAX_INTERPOLATED:
        raise ClipSetAside(
            f"the camera of {missing.sum()} of {len(missing)} frames could not be found (at most {MAX_INTERPOLATED:.0%})"
            + (f": {why}" if why else "")
        )
    return fill_poses({t: pose for t, pose in enumerate(poses) if pose is not None}, len(poses)), missing


def fill_poses(poses: dict[int, np.ndarray], count: int) -> np.ndarray:
    """w2c [T, 3, 4] of all frames from those that are known: between two neighbours the camera turns (slerp) and moves
    evenly; before the first and after the last it stands still. Callers flag the frames they did not give.

    Raises ValueError without a known pose.
    """
    if not poses:
        raise ValueError("no known pose to fill in the others from")
    known = np.array(sorted(poses))
    given = np.stack([np.asarray(poses[t], np.float64) for t in known])
    centres = -np.einsum("tji,tj->ti", given[:, :, :3], given[:, :, 3])
    if len(known) == 1:  # too few for a slerp
        return np.repeat(given, count, axis=0)
    times = np.clip(np.arange(count), known[0], known[-1])
    rotation = Slerp(known, Rotation.from_matrix(given[:, :, :3]))(times).as_matrix()
    centre = np.stack([np.interp(times, known, centres[:, axis]) for axis in range(3)], axis=1)
    w2c = np.concatenate([rotation, -np.einsum("tij,tj->ti", rotation, centre)[..., None]], axis=2)
    w2c[known] = given
    return w2c


def require_motion(w2c: np.ndarray, depth: np.ndarray) -> None:
    """Raise ClipSetAside when the camera's path [T, 3, 4] is too short for the scene's depth (any shape, 0 = unknown).

    Then nothing ties the frames' depths together: the camera stands still, or turns on the spot.
    """
    known = depth[depth > 0]
    if not known.size:
        raise ClipSetAside("no depth is known anywhere")
    centres = -np.einsum("tji,tj->ti", w2c[:, :, :3], w2c[:, :, 3])
    extent, distance = float(length(np.ptp(centres, axis=0))), float(np.median(known))
    if not extent >= MIN_PARALLAX * distance:
        raise ClipSetAside(
            f"the camera does not move: its path spans {100 * extent / distance:.2g} % of the scene's median depth, "
            f"{100 * MIN_PARALLAX:g} % is needed"
        )
