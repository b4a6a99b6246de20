"""Robust bundle adjustment of many starts at once, in plain numpy.

A point is a unit direction d and an inverse distance rho in the camera of a reference frame, so that points at infinity and
cameras that only turn are ordinary values (rho = 0). Frame t sees it at the projection of R_t d + rho t_t; the reference frame
is the identity. (rho, t) and (s rho, t / s) are the same scene for any s, negative ones included.

Levenberg-Marquardt on Cauchy's cost. Points are eliminated first (3 x 3 blocks), which leaves 6 unknowns a frame and those of
the lens. Everything has a leading axis for the starts: they share observations and are solved side by side.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fw_pipeline.annotate.bundle.state import Observations, State

FAR_OFF = 1e4  # squared pixels: what an observation behind the camera costs as if it were that far off
MIN_Z = 1e-3  # of a unit direction; below it a point is behind the camera or beside it


@dataclass(frozen=True)
class Free:
    """What the adjustment may move."""

    poses: bool = True
    points: bool = True
    lens: int = 1  # 0: fixed; 1: one focal length; 2: and its even change over the clip (a zoom)
    turning: bool = False  # rotations only: translations and inverse distances stay
    front: bool = False  # inverse distances stay at 0 or above
    focal_range: tuple[float, float] = (-np.inf, np.inf)  # of log_focal[:, 0]
    held_frames: tuple[int, ...] = ()  # besides the reference, which always stays


@dataclass(frozen=True)
class Adjusted:
    state: State
    cost: np.ndarray  # [B] sum over observations of s^2 log(1 + r^2 / s^2), squared pixels
    squared: np.ndarray  # [B, O] squared reprojection error, pixels
    steps: int = field(default=0)


def residuals(obs: Observations, state: State) -> np.ndarray:
    """Reprojection errors [B, O, 2] in pixels; far off where a point is not in front of the camera."""
    x, y, z, _ = _camera_points(obs, state)
    fx, fy = _focals(obs, state)
    behind = z < MIN_Z
    z = np.where(behind, 1.0, z)
    out = np.stack([fx * x / z - obs.xy[:, 0], fy * y / z - obs.xy[:, 1]], -1)
    out[behind] = np.sqrt(FAR_OFF / 2)
    return out


def cauchy(squared: np.ndarray, scale: float) -> np.ndarray:
    """Cauchy's cost of squared errors: s^2 log(1 + r^2 / s^2), like r^2 when small, hardly growing when large."""
    return scale**2 * np.log1p(squared / scale**2)


def adjust(obs: Observations, state: State, free: Free, scale: float, steps: int = 20, tolerance: float = 1e-4) -> Adjusted:
    """Lower each solution's cost by at most `steps` Levenberg-Marquardt steps; stops when none gains `tolerance` (relative).

    scale: Cauchy's, in pixels: errors well below it count as squares. A step that raises the cost is not taken.
    """
    squared = (residuals(obs, state) ** 2).sum(-1)
    cost = cauchy(squared, scale).sum(-1)
    damping = np.full(len(state), 1e-3)
    quiet = np.zeros(len(state), int)
    count = 0
    for count in range(1, steps + 1):  # noqa: B007 (reported)
        live = np.flatnonzero(quiet < 2)
        if not len(live):
            break
        part = state.take(live)
        new = _moved(obs, part, _step(obs, part, free, scale, damping[live]), free)
        new_squared = (residuals(obs, new) ** 2).sum(-1)
        new_cost = cauchy(new_squared, scale).sum(-1)
        better = new_cost < cost[live]
        gain = np.where(better, (cost[live] - new_cost) / np.maximum(cost[live], 1e-12), 0)
        quiet[live] = np.where(gain < tolerance, quiet[live] + 1, 0)
        damping[live] = np.clip(np.where(better, damping[live] * 0.2, damping[live] * 10), 1e-9, 1e6)
        merged = part.where(better, new)
        if len(live) == len(state):
            state = merged
        else:
            for whole, piece in zip(vars(state).values(), vars(merged).values(), strict=True):
                whole[live] = piece
        squared[live[better]], cost[live[better]] = new_squared[better], new_cost[better]
    return Adjusted(state, cost, squared, count)


# ---------------------------------------------------------------------------------------------------------- one step


def _focals(obs: Observations, state: State) -> tuple[np.ndarray, np.ndarray]:
    factor = np.exp(state.log_focal[:, :1] + state.log_focal[:, 1:] * obs.time[obs.frame])
    return obs.focal[0] * factor, obs.focal[1] * factor


def _camera_points(obs: Observations, state: State) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[np.ndarray]]:
    """x, y, z [B, O] of R d + rho t, and the three components of R d."""
    d = [state.direction[:, obs.point, k] for k in range(3)]
    rho = state.inverse[:, obs.point]
    turned = [sum(state.rotation[:, obs.frame, i, k] * d[k] for k in range(3)) for i in range(3)]
    x, y, z = (turned[i] + rho * state.translation[:, obs.frame, i] for i in range(3))
    return x, y, z, turned  # type: ignore[return-value]


@dataclass(frozen=True)
class Linear:
    """The weighted linearised problem, with points still in it. Unknowns of a frame: rotation (3), translation (3)."""

    pose: np.ndarray  # [6, 2, B, O] derivative of the residual, times the root of its weight
    point: np.ndarray  # [3, 2, B, O]: two tangents of the direction, inverse distance
    lens: np.ndarray  # [L, 2, B, O]
    residual: np.ndarray  # [2, B, O]
    weight: np.ndarray  # [B, O]


def tangents(direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two unit vectors [..., 3] across unit vectors [..., 3]."""
    axis = np.where(np.abs(direction[..., 2:]) < 0.9, np.array([0.0, 0, 1]), np.array([0.0, 1, 0]))
    a = np.cross(direction, axis)
    a /= np.linalg.norm(a, axis=-1, keepdims=True)
    return a, np.cross(direction, a)


def linearise(obs: Observations, state: State, free: Free, scale: float) -> Linear:
    """Derivatives of all observations at `state`."""
    x, y, z, (tx, ty, tz) = _camera_points(obs, state)
    fx, fy = _focals(obs, state)
    behind = z < MIN_Z
    z = np.where(behind, 1.0, z)
    px, py = x / z, y / z
    residual = np.stack([fx * px - obs.xy[:, 0], fy * py - obs.xy[:, 1]])
    weight = np.where(behind, 0.0, 1 / (1 + (residual**2).sum(0) / scale**2))
    root = np.sqrt(weight)
    gx, gy = fx / z * root, fy / z * root
    rho = np.zeros_like(z) if free.turning else state.inverse[:, obs.point]
    none = np.zeros_like(z)
    pose = np.stack(
        [
            np.stack([-gx * px * ty, -gy * (tz + py * ty)]),
            np.stack([gx * (tz + px * tx), gy * py * tx]),
            np.stack([-gx * ty, gy * tx]),
            np.stack([gx * rho, none]),
            np.stack([none, gy * rho]),
            np.stack([-gx * px * rho, -gy * py * rho]),
        ]
    )
    a, b = tangents(state.direction)
    turned = []
    for tangent in (a, b):
        rays = [tangent[:, obs.point, k] for k in range(3)]
        turned.append([sum(state.rotation[:, obs.frame, i, k] * rays[k] for k in range(3)) for i in range(3)])
    turned.append([none] * 3 if free.turning else [state.translation[:, obs.frame, i] for i in range(3)])
    point = np.stack([np.stack([gx * (m[0] - px * m[2]), gy * (m[1] - py * m[2])]) for m in turned])
    along = np.stack([fx * px * root, fy * py * root])
    lens = np.stack([along, along * obs.time[obs.frame]])[: free.lens]
    return Linear(pose, point, lens, residual * root, weight)


@dataclass(frozen=True)
class Reduced:
    """The problem with its points eliminated: unknowns are 6 a frame (frame-major), then the lens."""

    matrix: np.ndarray  # [B, P, P]
    gradient: np.ndarray  # [B, P]
    across: np.ndarray  # [B, 3, P, N] Y = W L^-T, so that matrix = U - sum Y Y^T
    root: np.ndarray  # [3, 3, B, N] lower triangular inverse L^-1 of the points' blocks V = L L^T
    point_gradient: np.ndarray  # [3, B, N]


def reduce(obs: Observations, linear: Linear, damping: np.ndarray, held: np.ndarray | None = None) -> Reduced:
    """Schur complement over the points. `held` [B, N]: points whose inverse distance must stay."""
    count, lens = obs.frames, len(linear.lens)
    size = 6 * count + lens
    batch = linear.residual.shape[1]
    root, gradient = _point_blocks(obs, linear, damping, held)
    across = np.zeros((batch, 3, size, obs.points))
    frames = across[:, :, : 6 * count].reshape(batch, 3, count, 6, obs.points)
    for j in range(3):
        for i in range(6):
            frames[:, j, obs.frame, i, obs.point] = (linear.pose[i] * linear.point[j]).sum(0)
        for i in range(lens):
            across[:, j, 6 * count + i] = obs.per_point((linear.lens[i] * linear.point[j]).sum(0))
    # in place, last first: Y_j = sum_k L^-1[j, k] W_k, k <= j
    for j in (2, 1, 0):
        across[:, j] *= root[j, j][:, None]
        for k in range(j):
            across[:, j] += root[j, k][:, None] * across[:, k]
    matrix, vector = _frame_blocks(obs, linear)
    diagonal = np.einsum("bii->bi", matrix)
    diagonal += damping[:, None] * diagonal + 1e-9 * diagonal.max(1, keepdims=True) + 1e-12
    solved = np.stack([sum(root[j, k] * gradient[k] for k in range(j + 1)) for j in range(3)])  # L^-1 g
    for j in range(3):
        matrix -= across[:, j] @ across[:, j].transpose(0, 2, 1)
        vector -= (across[:, j] @ solved[j][..., None])[..., 0]
    return Reduced(matrix, vector, across, root, gradient)


def _point_blocks(
    obs: Observations, linear: Linear, damping: np.ndarray, held: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Inverse Cholesky factors [3, 3, B, N] of the points' damped blocks, and their gradients [3, B, N]."""
    p = linear.point
    block = np.zeros((3, 3, p.shape[2], obs.points))
    for i in range(3):
        for j in range(i + 1):
            block[i, j] = obs.per_point((p[i] * p[j]).sum(0))
    gradient = np.stack([obs.per_point((p[i] * linear.residual).sum(0)) for i in range(3)])
    for i in range(3):
        block[i, i] += damping[:, None] * block[i, i] + 1e-9
    if held is not None:
        block[2, :2] *= ~held
        block[2, 2] = np.where(held, 1e12, block[2, 2])
    out = np.zeros_like(block)
    l00 = np.sqrt(block[0, 0])
    l10, l20 = block[1, 0] / l00, block[2, 0] / l00
    l11 = np.sqrt(np.maximum(block[1, 1] - l10**2, 1e-12))
    l21 = (block[2, 1] - l20 * l10) / l11
    l22 = np.sqrt(np.maximum(block[2, 2] - l20**2 - l21**2, 1e-12))
    out[0, 0], out[1, 1], out[2, 2] = 1 / l00, 1 / l11, 1 / l22
    out[1, 0] = -l10 * out[0, 0] / l11
    out[2, 1] = -l21 * out[1, 1] / l22
    out[2, 0] = -(l20 * out[0, 0] + l21 * out[1, 0]) / l22
    return out, gradient


def _frame_blocks(obs: Observations, linear: Linear) -> tuple[np.ndarray, np.ndarray]:
    """U [B, P, P] and its gradient [B, P] before the points are eliminated; the reference frame's are 1 and 0."""
    count, lens = obs.frames, len(linear.lens)
    batch = linear.residual.shape[1]
    matrix = np.zeros((batch, 6 * count + lens, 6 * count + lens))
    vector = np.zeros((batch, 6 * count + lens))
    at = 6 * np.arange(count)
    for i in range(6):
        vector[:, at + i] = obs.per_frame((linear.pose[i] * linear.residual).sum(0))
        for j in range(i + 1):
            matrix[:, at + i, at + j] = matrix[:, at + j, at + i] = obs.per_frame((linear.pose[i] * linear.pose[j]).sum(0))
        for j in range(lens):
            value = obs.per_frame((linear.pose[i] * linear.lens[j]).sum(0))
            matrix[:, at + i, 6 * count + j] = matrix[:, 6 * count + j, at + i] = value
    for i in range(lens):
        vector[:, 6 * count + i] = (linear.lens[i] * linear.residual).sum((0, 2))
        for j in range(lens):
            matrix[:, 6 * count + i, 6 * count + j] = (linear.lens[i] * linear.lens[j]).sum((0, 2))
    return matrix, vector


def _step(
    obs: Observations, state: State, free: Free, scale: float, damping: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(frames [B, T, 6], points [3, B, N], lens [B, 2]) to add."""
    linear = linearise(obs, state, free, scale)
    batch, count, lens = len(state), obs.frames, len(linear.lens)
    frames, focal = np.zeros((batch, count, 6)), np.zeros((batch, 2))
    held = None
    if free.front or free.turning:
        pulled = obs.per_point((linear.point[2] * linear.residual).sum(0)) > 0
        held = np.ones_like(pulled) if free.turning else (state.inverse <= 0) & pulled
    if not free.points:
        matrix, vector = _frame_blocks(obs, linear)
        diagonal = np.einsum("bii->bi", matrix)
        diagonal += damping[:, None] * diagonal + 1e-9 * diagonal.max(1, keepdims=True) + 1e-12
        solution = _solve(obs, matrix, -vector, free)
        return solution[:, : 6 * count].reshape(batch, count, 6), np.zeros((3, batch, obs.points)), _padded(solution, lens)
    if not free.poses:
        root, gradient = _point_blocks(obs, linear, damping, held)
        inner = [sum(root[j, k] * gradient[k] for k in range(j + 1)) for j in range(3)]
        return frames, -np.stack([sum(root[k, j] * inner[k] for k in range(j, 3)) for j in range(3)]), focal
    reduced = reduce(obs, linear, damping, held)
    solution = _solve(obs, reduced.matrix, -reduced.gradient, free)
    inner = []
    for j in range(3):
        own = sum(reduced.root[j, k] * reduced.point_gradient[k] for k in range(j + 1))
        inner.append(own + (solution[:, None] @ reduced.across[:, j])[:, 0])
    points = -np.stack([sum(reduced.root[k, j] * inner[k] for k in range(j, 3)) for j in range(3)])
    return solution[:, : 6 * count].reshape(batch, count, 6), points, _padded(solution, lens)


def _padded(solution: np.ndarray, lens: int) -> np.ndarray:
    out = np.zeros((len(solution), 2))
    if lens:
        out[:, :lens] = solution[:, -lens:]
    return out


def _solve(obs: Observations, matrix: np.ndarray, vector: np.ndarray, free: Free) -> np.ndarray:
    """matrix x = vector with the held frames' unknowns 0; both are changed."""
    held = [(6 * t + np.arange(6)) for t in (obs.reference, *free.held_frames)]
    if free.turning:
        held += [6 * t + np.arange(3, 6) for t in range(obs.frames)]
    fixed = np.unique(np.concatenate(held))
    matrix[:, fixed], matrix[:, :, fixed], vector[:, fixed] = 0, 0, 0
    matrix[:, fixed, fixed] = 1
    scale = 1 / np.sqrt(np.maximum(np.einsum("bii->bi", matrix), 1e-30))
    scaled = matrix * scale[:, :, None] * scale[:, None]
    scaled += 1e-10 * np.eye(matrix.shape[1])
    return np.linalg.solve(scaled, (vector * scale)[..., None])[..., 0] * scale


def _moved(obs: Observations, state: State, step: tuple[np.ndarray, np.ndarray, np.ndarray], free: Free) -> State:
    frames, points, lens = step
    rotation = rotation_from_vector(np.clip(frames[..., :3], -0.3, 0.3)) @ state.rotation
    translation = state.translation if free.turning else state.translation + frames[..., 3:]
    a, b = tangents(state.direction)
    direction = state.direction + np.clip(points[0], -0.3, 0.3)[..., None] * a + np.clip(points[1], -0.3, 0.3)[..., None] * b
    direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
    inverse = state.inverse if free.turning else state.inverse + points[2]
    if free.front:
        inverse = np.maximum(inverse, 0)
    focal = state.log_focal + np.clip(lens, -0.2, 0.2)
    focal[:, 0] = np.clip(focal[:, 0], *free.focal_range)
    return State(rotation, translation, direction, inverse, focal)


def rotation_from_vector(vector: np.ndarray) -> np.ndarray:
    """Rotation vectors [..., 3] -> matrices [..., 3, 3] (Rodrigues)."""
    angle = np.linalg.norm(vector, axis=-1)[..., None, None]
    x, y, z = np.moveaxis(vector, -1, 0)
    zero = np.zeros_like(x)
    cross = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).reshape(*vector.shape[:-1], 3, 3)
    return np.eye(3) + np.sinc(angle / np.pi) * cross + 0.5 * np.sinc(angle / (2 * np.pi)) ** 2 * cross @ cross
