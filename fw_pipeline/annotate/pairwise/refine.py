"""Robust refinement of a whole clip: poses, one focal, pair scales and depths together, by Levenberg-Marquardt.

An observation says where a pixel of one image lies in the camera frame of a pair. It is compared with the model in two parts,
the direction (radians) and the logarithm of the distance: the pair's scale is then one additive number, no gauge can collapse,
and networks, which know directions better than distances, are weighted accordingly. Each pixel's depth touches only the pairs
that show its image, so depths are eliminated exactly (Schur complement), and what is left is sparse: memory and time grow
linearly with the number of frames.

Weights are re-estimated from the residuals as it goes: the noise of directions and of distances, a noise level for each pair (a
wrong pair is found out and dropped), and a Geman-McClure weight for each pixel. A step is only taken when it lowers the cost
under the weights it was computed with.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import splu

from fw_pipeline.annotate.pairwise.initial import Samples, State, image_rays, relative_motion, update_scales
from fw_pipeline.annotate.pairwise.pair_graph import require_connected
from fw_pipeline.annotate.types import ClipSetAside
from fw_pipeline.annotate.vectors import cross, length, median_of_finite, rotation_from_vector, skew

KERNEL = 9.0  # squared residual, in noise units, at which a pixel's weight has fallen to a quarter
FLOOR = 1e-5  # radians and relative distance: finer noise than float32 pointmaps can carry
DIRECTION_RANGE = (0.2, 1.0)  # noise of directions allowed, relative to that of distances
MAX_PAIR_NOISE = 6.0  # relative to the median pair; a noisier one is wrong
TOLERATED = 0.05  # unless it fits the clip this well: then it is only noisier than others
MEDIAN_3D = 2.37  # median of a squared standard normal 3-vector
MIN_BELIEVED = 0.5  # share of the pairs
TINY = 1e-12
MAD = 1.4826  # median absolute value of a normal variable -> its standard deviation
RAYLEIGH = 0.8493  # median length of a normal 2-vector -> standard deviation of a component


@dataclass(frozen=True)
class Noise:
    """Standard deviations, and which pairs are believed."""

    direction: np.ndarray  # [O] radians
    distance: np.ndarray  # [O] relative
    believed: np.ndarray  # [E] bool


@dataclass(frozen=True)
class Residuals:
    direction: np.ndarray  # [O, P] radians (sine)
    distance: np.ndarray  # [O, P] log of model over measurement


def residuals(state: State, samples: Samples) -> Residuals:
    """How far the model is from each observation; directions apart by more than a right angle count as one."""
    rotation, translation = relative_motion(state, samples)
    own = np.exp(state.log_depth)[..., None] * image_rays(state, samples)
    model = own[samples.image] @ np.swapaxes(rotation, 1, 2) + translation[:, None]
    points = samples.points
    reach, measured = np.maximum(length(model), TINY), length(points)
    cosine = np.einsum("opi,opi->op", model, points) / (reach * measured)
    # A cross product keeps the digits that 1 - cosine**2 would lose.
    sine = length(cross(model, points)) / (reach * measured)
    return Residuals(np.where(cosine > 0, sine, 1.0), np.log(reach / measured) - np.repeat(state.log_scale, 2)[:, None])


def estimate_noise(found: Residuals, samples: Samples) -> Noise:
    """Robust standard deviations: one of distances, one of directions for own and one for foreign cameras, times one a pair."""
    seen = samples.weight > 0
    own = samples.own
    distance = max(MAD * _median(np.abs(found.distance), seen), FLOOR)
    direction = np.empty(len(own))
    for kind in (own, ~own):
        value = RAYLEIGH * _median(found.direction[kind], seen[kind])
        direction[kind] = max(np.clip(value, DIRECTION_RANGE[0] * distance, DIRECTION_RANGE[1] * distance), FLOOR)
    square = (found.direction / direction[:, None]) ** 2 + (found.distance / distance) ** 2
    level = np.sqrt(_worse_view(square, seen) / MEDIAN_3D)
    level /= max(float(np.nanmedian(level)), 1.0)
    factor = np.repeat(np.fmax(level, 1.0), 2)
    believed = (level <= MAX_PAIR_NOISE) | (pair_errors(found, samples) <= TOLERATED)
    return Noise(direction * factor, distance * factor, believed)


def pair_errors(found: Residuals, samples: Samples) -> np.ndarray:
    """Median distance between model and measurement, relative to that from the camera, of each pair's worse view [E].

    NaN for a pair without usable pixels.
    """
    return _worse_view(np.hypot(found.direction, found.distance), samples.weight > 0)


def _worse_view(values: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """[O, P] -> [E]: a wrong pair's first view may fit perfectly, so the two are not pooled."""
    medians = median_of_finite(np.where(seen, values, np.nan))
    return np.fmax(medians[0::2], medians[1::2])


def cost_and_weight(found: Residuals, samples: Samples, noise: Noise) -> tuple[float, np.ndarray]:
    """Geman-McClure cost of the believed pairs, and each observation's weight in least squares [O, P]."""
    square = (found.direction / noise.direction[:, None]) ** 2 + (found.distance / noise.distance[:, None]) ** 2
    base = samples.weight * np.repeat(noise.believed, 2)[:, None]
    share = KERNEL / (KERNEL + square)
    return float((base * square * share).sum()), base * share**2


def refine(state: State, samples: Samples, iterations: int = 30, settle: int = 8, tolerance: float = 1e-5) -> tuple[State, Noise]:
    """Minimise from `state`. The noise is re-estimated in the first `settle` iterations, then held, until steps are tiny.

    Raises ClipSetAside when the pairs that can be believed no longer tie all frames together.
    """
    views = np.stack([samples.source[1::2], samples.image[1::2]], axis=1)
    found = residuals(state, samples)
    noise, damping = estimate_noise(found, samples), 1e-4
    cost, weight = cost_and_weight(found, samples, noise)
    for iteration in range(iterations):
        trial, size = _step(state, samples, noise, weight, damping)
        found = residuals(trial, samples)
        trial_cost, trial_weight = cost_and_weight(found, samples, noise)
        if not trial_cost <= cost:  # also when it is not a number
            damping *= 10
            if damping > 1e4:
                break
            continue
        state, cost, weight, damping = trial, trial_cost, trial_weight, max(damping / 10, 1e-8)
        if size < tolerance:
            break
        if iteration < settle:
            if not noise.believed.all():
                update_scales(state, samples, ~noise.believed)
                found = residuals(state, samples)
            noise = estimate_noise(found, samples)
            cost, weight = cost_and_weight(found, samples, noise)
    _require_agreement(views, noise.believed, len(state.rotation))
    return state, noise


def _require_agreement(views: np.ndarray, believed: np.ndarray, num_images: int) -> None:
    """The clip must hang together by most of its pairs, and without those whose reverse (j, i) says otherwise: where nothing
    else ties two frames, which of the two is right cannot be known."""
    if believed.mean() < MIN_BELIEVED:
        raise ClipSetAside(f"{(~believed).sum()} of {len(believed)} pairs of frames contradict the rest of the clip")
    doubted = {(int(j), int(i)) for i, j in views[~believed]}
    certain = np.array([good and (int(i), int(j)) not in doubted for (i, j), good in zip(views, believed, strict=True)])
    require_connected(views[certain], num_images, "the other pairs contradict the rest of the clip")


# ------------------------------------------------------------------------------------------------- normal equations


def _step(state: State, samples: Samples, noise: Noise, weight: np.ndarray, damping: float) -> tuple[State, float]:
    """One damped Gauss-Newton step -> (new state, size of the largest change of a pose in radians or scene depths)."""
    images, pairs = len(state.rotation), len(state.log_scale)
    unknowns = 6 * images + pairs + 1
    rays, (rotation, translation) = image_rays(state, samples), relative_motion(state, samples)
    gradient, parts, eliminated = np.zeros(unknowns), [], []
    for v in range(images):
        which = np.flatnonzero(samples.image == v)
        own_points = np.exp(state.log_depth[v])[:, None] * rays[v]
        jacobian, depth_jacobian, residual = _linearise(
            own_points, rotation[which], translation[which], samples, which, state.log_scale, noise, weight
        )
        columns = _columns(samples, which, v, images, pairs)
        used, place = np.unique(columns, return_inverse=True)
        local = _local_system(jacobian, depth_jacobian, residual, place.reshape(columns.shape), len(used), damping)
        gradient[used] += local[1]
        parts.append((used, local[0]))
        eliminated.append((used, *local[2:]))
    free = np.ones(unknowns, bool)
    free[:6] = False  # the first camera is the world
    free[-1] = not state.focal_known
    free[6 * images + int(np.argmax(noise.believed))] = False  # and one pair's scale is the unit
    update = _solve(parts, gradient, free, damping)
    log_depth = state.log_depth.copy()
    for v, (used, coupling, offset) in enumerate(eliminated):
        log_depth[v] += np.clip(offset - coupling @ update[used], -1, 1)
    return _moved(state, update, log_depth)


def _columns(samples: Samples, which: np.ndarray, v: int, images: int, pairs: int) -> np.ndarray:
    """Which unknown each of the 14 derivatives of each observation belongs to, [K, 14]: source pose, image pose, scale, focal."""
    source = 6 * samples.source[which][:, None] + np.arange(6)
    image = np.broadcast_to(6 * v + np.arange(6), source.shape)
    scale = 6 * images + which[:, None] // 2
    return np.concatenate([source, image, scale, np.full_like(scale, 6 * images + pairs)], axis=1)


def _linearise(
    own_points: np.ndarray,
    rotation: np.ndarray,
    translation: np.ndarray,
    samples: Samples,
    which: np.ndarray,
    log_scale: np.ndarray,
    noise: Noise,
    weight: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whitened derivatives of K observations of one image.

    Returns jacobian [K, P, 4, 14] (source pose, image pose, pair scale, log focal; a pose changes by rotation then
    translation, applied on the camera's side), derivative by log depth [K, P, 4] and residual [K, P, 4]: three numbers for the
    direction (a cross product, so only two are independent) and one for the distance.
    """
    own = (samples.source[which] == samples.image[which])[:, None, None, None]
    model = own_points @ np.swapaxes(rotation, 1, 2) + translation[:, None]
    points = samples.points[which]
    reach, measured = np.maximum(length(model), TINY)[..., None], length(points)[..., None]
    normal = model / reach
    aim = points / measured
    root = np.sqrt(weight[which])[..., None]
    side_weight, far_weight = root / noise.direction[which][:, None, None], root / noise.distance[which][:, None, None]
    along = (np.log(reach / measured) - log_scale[which // 2][:, None, None]) * far_weight
    residual = np.concatenate([cross(aim, normal) * side_weight, along], axis=-1)
    # d(aim x normal)/d(model) = [aim]x (I - normal normal^T) / reach; d(log reach)/d(model) = normal^T / reach
    by_model = np.empty((*model.shape[:2], 4, 3))
    by_model[..., :3, :] = (skew(aim) - cross(aim, normal)[..., :, None] * normal[..., None, :]) * (side_weight / reach)[
        ..., None
    ]
    by_model[..., 3, :] = normal * (far_weight / reach)
    by_own = by_model @ rotation[:, None]
    jacobian = np.empty((*model.shape[:2], 4, 14))
    jacobian[..., 0:3] = np.where(own, 0, cross(model[:, :, None], by_model))
    jacobian[..., 3:6] = np.where(own, 0, by_model)
    jacobian[..., 6:9] = np.where(own, 0, -cross(own_points[None, :, None], by_own))
    jacobian[..., 9:12] = np.where(own, 0, -by_own)
    jacobian[..., :3, 12], jacobian[..., 3, 12] = 0, -far_weight[..., 0]
    jacobian[..., 13] = -(by_own[..., :2] * own_points[:, None, :2]).sum(-1)
    return jacobian, (by_own * own_points[:, None]).sum(-1), residual


def _local_system(
    jacobian: np.ndarray, depth_jacobian: np.ndarray, residual: np.ndarray, place: np.ndarray, size: int, damping: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """One image's normal equations with its depths eliminated.

    `place` [K, 14] gives the position of each derivative among the `size` unknowns of this image. Returns the reduced matrix
    [size, size] and gradient [size], and what gives the depths back: coupling [P, size], offset [P].
    """
    observations, pixels = depth_jacobian.shape[:2]
    matrix, gradient, mixed = np.zeros((size, size)), np.zeros(size), np.zeros((pixels, size))
    by_depth = np.matmul(depth_jacobian[:, :, None], jacobian)[:, :, 0]  # [K, P, 14]
    flat = jacobian.reshape(observations, -1, 14)
    blocks = np.matmul(np.swapaxes(flat, 1, 2), flat)
    slopes = np.matmul(np.swapaxes(flat, 1, 2), residual.reshape(observations, -1, 1))[..., 0]
    for k in range(observations):
        # Seen from its own camera, an image's pose stands in two places; both derivatives are 0, so that += may take either.
        matrix[place[k][:, None], place[k]] += blocks[k]
        gradient[place[k]] += slopes[k]
        mixed[:, place[k][:6]] += by_depth[k][:, :6]
        mixed[:, place[k][6:]] += by_depth[k][:, 6:]
    square = (depth_jacobian**2).sum((0, 2))
    seen = square > 0
    inverse = np.where(seen, 1 / np.where(seen, square * (1 + damping), 1), 0)
    slope = (depth_jacobian * residual).sum((0, 2))
    coupling = mixed * inverse[:, None]
    return matrix - mixed.T @ coupling, gradient - coupling.T @ slope, coupling, -inverse * slope


def _solve(parts: list[tuple[np.ndarray, np.ndarray]], gradient: np.ndarray, free: np.ndarray, damping: float) -> np.ndarray:
    """Sparse Cholesky-like solution of the damped reduced system; unknowns that are not free stay."""
    rows = np.concatenate([np.repeat(used, len(used)) for used, _ in parts])
    cols = np.concatenate([np.tile(used, len(used)) for used, _ in parts])
    values = np.concatenate([matrix.ravel() for _, matrix in parts])
    total = sparse.coo_matrix((values, (rows, cols)), shape=(len(gradient),) * 2).tocsc()[free][:, free]
    diagonal = np.maximum(total.diagonal(), 1e-9 * total.diagonal().max())
    solver = splu(
        (total + sparse.diags(damping * diagonal + 1e-12 * diagonal.max())).tocsc(),
        permc_spec="MMD_AT_PLUS_A",
        options={"SymmetricMode": True},
    )
    update = np.zeros(len(gradient))
    update[free] = -solver.solve(gradient[free])
    return update


def _moved(state: State, update: np.ndarray, log_depth: np.ndarray) -> tuple[State, float]:
    images, pairs = len(state.rotation), len(state.log_scale)
    poses = update[: 6 * images].reshape(images, 6)
    turn = rotation_from_vector(poses[:, :3])
    rotation = turn @ state.rotation
    translation = np.einsum("nij,nj->ni", turn, state.translation) + poses[:, 3:]
    depth = np.exp(np.median(log_depth, axis=1))
    size = max(float(np.abs(poses[:, :3]).max()), float((np.abs(poses[:, 3:]).max(1) / depth).max()))
    scale = state.log_scale + update[6 * images : 6 * images + pairs]
    return State(rotation, translation, float(state.log_focal + update[-1]), scale, log_depth, state.focal_known), size


def _median(values: np.ndarray, where: np.ndarray) -> float:
    return float(np.median(values[where])) if where.any() else 0.0
