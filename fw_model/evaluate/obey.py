"""Does a video follow the path that was asked for? The errors between two camera paths of the same frames.

Poses are w2c [T, 3, 4]. Both paths are taken relative to their first camera, C_i = c2w_0^-1 c2w_i, with rotations projected to
SO(3). RotErr, TransErr and CamMC are those of the CameraCtrl and CamI2V line of work, where the sums run over 16 frames and clips
without an estimate are dropped: sums grow with T, so means a frame stand beside them, and here failures are counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fw_model.metrics import Array, ate, auc, path_extent, project_to_so3, relative_pose_errors, rpe, rra, rta

MAX_ROTATION, MAX_TRANSLATION = 15.0, 0.5  # degrees and clip units at which WorldScore's camera score is 0
STILL = 1e-6  # of a path's largest distance: below it the camera stands


def relative_c2w(w2c: Array) -> tuple[Array, Array]:
    """w2c [T, 3, 4] -> (rotations [T, 3, 3] in SO(3), positions [T, 3]) of each camera in the first one's frame."""
    w2c = np.asarray(w2c, np.float64)
    rotation = project_to_so3(w2c[:, :, :3])
    centre = -np.einsum("tji,tj->ti", rotation, w2c[:, :, 3])
    relative = np.einsum("ij,tkj->tik", rotation[0], rotation)
    relative[0] = np.eye(3)  # it is; arccos would make 1e-8 of the last digit
    return relative, (centre - centre[0]) @ rotation[0].T


def rotation_angles(asked: Array, found: Array) -> Array:
    """Radians [T] between the relative rotations of two paths."""
    (a, _), (f, _) = relative_c2w(asked), relative_c2w(found)
    return np.asarray(np.arccos(np.clip((np.einsum("tij,tij->t", a, f) - 1) / 2, -1, 1)))


def translation_distances(asked: Array, found: Array) -> Array:
    """[T] |t_e - t_g|, each path divided by its own largest |t_i| (+ 1e-9)."""
    (_, a), (_, f) = relative_c2w(asked), relative_c2w(found)
    return np.asarray(np.linalg.norm(_unit(f) - _unit(a), axis=1))


def pose_distances(asked: Array, found: Array) -> Array:
    """[T] Frobenius norm of [R|t]_e - [R|t]_g with translations as in `translation_distances` (CamMC's summands)."""
    (ra, a), (rf, f) = relative_c2w(asked), relative_c2w(found)
    both = np.concatenate([rf - ra, (_unit(f) - _unit(a))[..., None]], -1)
    return np.asarray(np.linalg.norm(both, axis=(1, 2)))


def _unit(positions: Array) -> Array:
    return positions / (np.linalg.norm(positions, axis=1).max() + 1e-9)


def best_scale(found: Array, asked: Array) -> float:
    """c >= 0 that makes sum |c t_e - t_g| smallest; positions [T, 3]. The sum is convex in c: halving intervals finds it."""
    size = np.linalg.norm(found, axis=1)
    moving = size > STILL * max(float(size.max()), 1e-12)
    if not moving.any() or size.max() < 1e-12:
        return 1.0
    low, high = 0.0, float((np.linalg.norm(asked[moving], axis=1) / size[moving]).max()) + 1e-9

    def slope(c: float) -> float:
        off = c * found[moving] - asked[moving]
        length = np.maximum(np.linalg.norm(off, axis=1), 1e-300)
        return float(((off * found[moving]).sum(1) / length).sum())

    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return 0.5 * (low + high)


@dataclass(frozen=True)
class PathErrors:
    """Between a path that was asked for and one that was found."""

    rot_err: float  # radians, summed over the frames
    trans_err: float  # path lengths, summed
    cam_mc: float  # summed
    frames: int
    rotation_degrees: float  # mean
    translation: float  # mean |c t_e - t_g|, in the asked path's unit, c the best scale
    camera_score: float  # sqrt((1 - e_R / 15)(1 - e_t / 0.5)), each clipped at 0
    ate: float  # of the path's extent after Sim(3); nan where the asked camera does not move, as all below
    rpe: float
    rra15: float
    rta15: float
    auc5: float
    auc30: float

    def numbers(self) -> dict[str, float]:
        """By name, with the sums' means a frame."""
        found = dict(vars(self))
        found["rot_err_per_frame"] = self.rot_err / self.frames
        found["trans_err_per_frame"] = self.trans_err / self.frames
        found["cam_mc_per_frame"] = self.cam_mc / self.frames
        return {name: float(value) for name, value in found.items()}


def path_errors(asked: Array, found: Array) -> PathErrors:
    """asked, found: w2c [T, 3, 4]. Raises ValueError for paths of different length or numbers that are not finite."""
    if np.shape(asked) != np.shape(found):
        raise ValueError(f"paths of {len(asked)} and {len(found)} cameras cannot be compared")
    if not (np.isfinite(asked).all() and np.isfinite(found).all()):
        raise ValueError("a pose is not finite")
    angles = rotation_angles(asked, found)
    (_, a), (_, f) = relative_c2w(asked), relative_c2w(found)
    e_r = float(np.degrees(angles).mean())
    e_t = float(np.linalg.norm(best_scale(f, a) * f - a, axis=1).mean())
    score = np.sqrt((1 - min(e_r / MAX_ROTATION, 1)) * (1 - min(e_t / MAX_TRANSLATION, 1)))
    moves = path_extent(asked) > STILL
    rotation, direction = relative_pose_errors(found, asked) if moves else (np.full(1, np.nan), np.full(1, np.nan))
    nan = float("nan")
    return PathErrors(
        rot_err=float(angles.sum()),
        trans_err=float(translation_distances(asked, found).sum()),
        cam_mc=float(pose_distances(asked, found).sum()),
        frames=len(asked),
        rotation_degrees=e_r,
        translation=e_t,
        camera_score=float(score),
        ate=ate(found, asked) if moves else nan,
        rpe=rpe(found, asked)[0] if moves else nan,
        rra15=rra(rotation) if moves else nan,
        rta15=rta(direction) if moves else nan,
        auc5=auc(rotation, direction, 5) if moves else nan,
        auc30=auc(rotation, direction, 30) if moves else nan,
    )


def still_path(frames: int) -> Array:
    """w2c [T, 3, 4] of a camera that stands: what a constant scores."""
    return np.tile(np.eye(3, 4), (frames, 1, 1))


def random_path(frames: int, like: Array, seed: int = 0) -> Array:
    """w2c [T, 3, 4] of a guess: an even move in a random direction, as long as `like`'s, turning as much about a random axis."""
    from scipy.spatial.transform import Rotation

    rng = np.random.default_rng(seed)
    rotation, position = relative_c2w(like)
    axis, direction = (v / np.linalg.norm(v) for v in rng.standard_normal((2, 3)))
    angle = float(np.arccos(np.clip((np.trace(rotation, axis1=1, axis2=2) - 1) / 2, -1, 1)).max())
    share = np.linspace(0, 1, frames)[:, None]
    turned = Rotation.from_rotvec(share * angle * axis).as_matrix()
    centre = share * np.linalg.norm(position, axis=1).max() * direction
    return np.concatenate([turned.transpose(0, 2, 1), -np.einsum("tji,tj->ti", turned, centre)[..., None]], -1)
