"""How well a solution is known: the lens from the adjustment's covariance and from costs at fixed focal lengths, and whether a
rival solution fits as well.

Errors along a track, and of neighbouring tracks, are much alike (a patch drifts for a reason), so observations are no
independent witnesses. Whole blocks of the picture are: what one block says is set against what the others say, both for the
variance (the "sandwich" of clustered statistics) and for the comparison of two solutions (Vuong's test).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import hadamard
from scipy.spatial.transform import Rotation

from fw_model.metrics import ate, auc, relative_pose_errors
from fw_pipeline.annotate.bundle.adjust import Free, Linear, adjust, cauchy, linearise, reduce, residuals, rotation_from_vector
from fw_pipeline.annotate.bundle.state import Observations, State, stack

BLOCKS = (4, 6)  # down, across
LIMITS = (np.log(0.2), np.log(8.0))  # beyond, a focal length over the long side is as good as unknown
# Share of the cost that is at least needed for one squared deviation. Blocks scatter as if it were 0.0004 to 0.002, but what all
# have wrong alike (windows across depth edges) moves the minimum too: the true lens was seen to cost 1 % more than the best one,
# and a flat curve (a scene far ahead) had its scatter put it at 4.2 of the long side +- 5 % where 1.1 costs 1 % more.
MIN_UNIT = 0.0012


@dataclass(frozen=True)
class LensCertainty:
    """What the covariance says of the focal length."""

    std: float  # of its log: relative standard deviation; inf where the tracks say nothing
    zoom_std: float  # of the log's change over the clip, nan unless it was free
    unit: float  # cost difference that is one squared standard deviation of evidence: (C - C_best) / unit is like chi squared


@dataclass(frozen=True)
class Profile:
    """What speaks against other focal lengths: costs with the lens fixed and everything else re-solved, and, close to the best,
    the covariance (a grid is too coarse there)."""

    log_focal: np.ndarray  # [G] increasing, log of the focal length over the picture's long side
    cost: np.ndarray  # [G] squared pixels, as `adjust` counts
    unit: float  # see LensCertainty
    best: float  # log of the focal length found
    std: float  # see LensCertainty

    def evidence(self, log_focal: np.ndarray | float) -> np.ndarray:
        """Evidence against a lens, like chi squared with one degree of freedom, 0 at the best.

        Between known points its root is taken to be straight, which a parabola's is; outside the grid it stays as at the end.
        """
        place, root = self._roots()
        return np.asarray(np.interp(log_focal, place, root) ** 2)

    def interval(self, level: float = 4.0) -> tuple[float, float]:
        """Smallest and largest log focal length whose evidence is below `level` (4: two standard deviations)."""
        place, root = self._roots()
        fine = np.union1d(np.linspace(place[0], place[-1], 2000), place)
        inside = fine[np.interp(fine, place, root) ** 2 <= level]
        low, high = np.clip(inside[[0, -1]], *LIMITS)
        return min(self.best, float(low)), max(self.best, float(high))

    def _roots(self) -> tuple[np.ndarray, np.ndarray]:
        far = np.abs(self.log_focal - self.best) > 3 * self.std
        value = np.sqrt(np.maximum(self.cost[far] - self.cost.min(), 0) / max(self.unit, 1e-12))
        near = self.best + np.array([-2, 0, 2]) * self.std
        place = np.concatenate([self.log_focal[far], near])
        root = np.concatenate([value * np.sign(self.log_focal[far] - self.best), [-2.0, 0, 2.0]])
        order = np.argsort(place)
        return place[order], root[order]


def block_of(xy: np.ndarray, height: int, width: int) -> np.ndarray:
    """Number of the picture's block in which each position [N, 2] lies (nan: block 0)."""
    place = np.nan_to_num(xy)
    row = (place[:, 1] / height * BLOCKS[0]).astype(int).clip(0, BLOCKS[0] - 1)
    column = (place[:, 0] / width * BLOCKS[1]).astype(int).clip(0, BLOCKS[1] - 1)
    return row * BLOCKS[1] + column


@dataclass(frozen=True)
class Normal:
    """The solved problem around its minimum: what every block of the picture pulls the unknowns by."""

    pull: np.ndarray  # [P, G] the unknowns' moves for one unit of each block's score: to be signed and summed
    by_track: np.ndarray  # [L] variance of the lens' unknowns with tracks, not blocks, as witnesses
    naive: np.ndarray  # [L] variance of the lens' unknowns over that of an observation


def normal(obs: Observations, state: State, block: np.ndarray, scale: float, lens: int) -> Normal:
    """Of one solution (batch 1) at its minimum. `block` [N] of each point, `scale` Cauchy's, `lens` free unknowns of the lens."""
    linear = linearise(obs, state, Free(lens=lens), scale)
    system = reduce(obs, linear, np.zeros(1))
    size = system.matrix.shape[1]
    keep = np.setdiff1d(np.arange(size), 6 * obs.reference + np.arange(6))
    matrix = system.matrix[0][np.ix_(keep, keep)]
    scaling = 1 / np.sqrt(np.maximum(np.diag(matrix), 1e-30))
    gauge = np.zeros(size)  # the scene's size, which no picture tells
    gauge[: 6 * obs.frames].reshape(obs.frames, 6)[:, 3:] = state.translation[0]
    gauge = gauge[keep] / scaling
    gauge /= max(float(np.linalg.norm(gauge)), 1e-12)
    matrix = matrix * scaling[:, None] * scaling + np.outer(gauge, gauge) + 1e-12 * np.eye(len(keep))
    scores = _scores(obs, linear, system.across, system.root, system.point_gradient)[keep] * scaling[:, None]
    blocks = np.zeros((BLOCKS[0] * BLOCKS[1], len(keep)))
    np.add.at(blocks, block, scores.T)
    blocks = blocks[np.abs(blocks).sum(1) > 0]
    groups = len(blocks)
    squared = (linear.residual**2).sum((0, 1)) / np.maximum(linear.weight[0], 1e-12)
    curved = (1 - squared / scale**2) / (1 + squared / scale**2) ** 2  # second derivative of Cauchy's cost along the error
    bend = float(np.clip(0.5 * (curved + linear.weight[0]).sum() / max(linear.weight.sum(), 1e-12), 0.2, 1.0))
    rows = np.eye(len(keep))[:, len(keep) - lens :]
    right = np.concatenate([blocks.T, rows], 1)
    solved = np.linalg.solve(matrix, right) * scaling[:, None]
    influence = solved[:, groups:] * scaling[len(keep) - lens :] / bend  # of the gradient on the lens
    pull = np.zeros((size, groups))
    pull[keep] = solved[:, :groups] / bend * np.sqrt(groups / max(1, groups - 1))
    by_track = ((influence.T / scaling @ scores) ** 2).sum(1)
    return Normal(pull, by_track, np.diag(influence[len(keep) - lens :]))


def lens_certainty(obs: Observations, state: State, block: np.ndarray, scale: float, lens: int = 1) -> LensCertainty:
    """Of one solution (batch 1) at its minimum; arguments as `normal`."""
    found = normal(obs, state, block, scale, lens)
    variance = np.maximum((found.pull[-lens:] ** 2).sum(1), found.by_track)
    std = np.sqrt(variance)
    unit = float(variance[0] / max(float(found.naive[0]), 1e-30))
    squared = (residuals(obs, state) ** 2).sum(-1)
    least = MIN_UNIT * float(cauchy(squared, scale).sum())
    wider = np.sqrt(max(1.0, least / max(unit, 1e-30)))
    return LensCertainty(float(std[0] * wider), float(std[1]) if lens > 1 else float("nan"), max(unit, least))


def path_certainty(
    obs: Observations, state: State, placed: np.ndarray, block: np.ndarray, scale: float, lens: int
) -> tuple[float, float]:
    """(ATE, AUC at 5 degrees) that the solution would have if the truth were as far away as the blocks' scatter suggests.

    Every block's pull is given a sign, plus or minus, as chance might have, and the moved cameras are compared with the solved
    ones by the metrics that cameras are judged with. Mean over 16 fixed sets of signs. What all blocks have wrong alike is not
    in it.
    """
    found = normal(obs, state, block, scale, lens)
    signs = np.sign(hadamard(32)[1:17, : found.pull.shape[1]])
    own = np.concatenate([state.rotation[0], state.translation[0][..., None]], -1)[placed]
    paths, areas = [], []
    for sign in signs:
        step = (found.pull @ sign)[: 6 * obs.frames].reshape(obs.frames, 6)
        rotation = rotation_from_vector(np.clip(step[:, :3], -1, 1)) @ state.rotation[0]
        moved = np.concatenate([rotation, (state.translation[0] + step[:, 3:])[..., None]], -1)[placed]
        paths.append(ate(moved, own))
        areas.append(auc(*relative_pose_errors(moved, own), 5))
    return float(np.mean(paths)), float(np.mean(areas))


def _scores(obs: Observations, linear: Linear, across: np.ndarray, root: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """[P, N]: what each point adds to the gradient of the reduced problem."""
    count, lens = obs.frames, len(linear.lens)
    out = np.zeros((6 * count + lens, obs.points))
    for i in range(6):
        out[6 * obs.frame + i, obs.point] = (linear.pose[i] * linear.residual).sum(0)[0]
    for i in range(lens):
        out[6 * count + i] = obs.per_point((linear.lens[i] * linear.residual).sum(0))[0]
    for j in range(3):
        out -= across[0, j] * sum(root[j, k, 0] * gradient[k, 0] for k in range(j + 1))
    return out


def refocused(state: State, factor: np.ndarray) -> State:
    """The solutions with focal lengths `factor` [B] times as long, everything else such that a distant scene looks the same."""
    k = factor[:, None]
    x, y, z = np.moveaxis(state.direction, -1, 0)
    direction = np.stack([x / k, y / k, z], -1)
    length = np.linalg.norm(direction, axis=-1)
    inverse = state.inverse / z / k * (z / length)
    translation = state.translation * np.stack([np.ones_like(factor), np.ones_like(factor), factor], -1)[:, None]
    return State(
        _turned_less(state.rotation, factor),
        translation,
        direction / length[..., None],
        inverse,
        state.log_focal + np.stack([np.log(factor), np.zeros_like(factor)], -1),
    )


def _turned_less(rotation: np.ndarray, factor: np.ndarray) -> np.ndarray:
    vector = Rotation.from_matrix(rotation.reshape(-1, 3, 3)).as_rotvec().reshape(*rotation.shape[:2], 3)
    vector = vector / np.stack([factor, factor, np.ones_like(factor)], -1)[:, None]
    return np.asarray(Rotation.from_rotvec(vector.reshape(-1, 3)).as_matrix()).reshape(rotation.shape)


def focal_profile(
    obs: Observations, best: State, log_focal: np.ndarray, scale: float, steps: int = 15
) -> tuple[np.ndarray, State]:
    """(cost [G], solutions) at fixed focal lengths `log_focal` [G] (over the observations'), each from the nearest of `best`.

    Every solution in `best` is refocused to every focal length and re-solved; the cheapest counts. Then each grid point is
    tried once more from its cheaper neighbour.
    """
    grid = len(log_focal)
    tried = stack([refocused(best, np.exp(np.full(len(best), log) - best.log_focal[:, 0])) for log in log_focal])
    fixed = Free(lens=0, front=True)
    found = adjust(obs, tried, fixed, scale, steps=steps, tolerance=1e-3)
    pick = found.cost.reshape(grid, len(best)).argmin(1) + np.arange(grid) * len(best)
    state, cost = found.state.take(pick), found.cost[pick]
    padded = np.concatenate([[np.inf], cost, [np.inf]])
    neighbour = np.where(padded[:-2] < padded[2:], np.arange(grid) - 1, np.arange(grid) + 1)
    again = refocused(state.take(neighbour), np.exp(log_focal - log_focal[neighbour]))
    second = adjust(obs, again, fixed, scale, steps=steps, tolerance=1e-3)
    better = second.cost < cost
    return np.where(better, second.cost, cost), state.where(better, second.state)


def compare(obs: Observations, best: State, rival: State, block: np.ndarray, scale: float) -> tuple[float, float]:
    """(cost of the rival over the best's, z): z is how many standard deviations the blocks of the picture agree by."""
    costs = [cauchy((residuals(obs, s) ** 2).sum(-1), scale) for s in (best, rival)]
    difference = np.bincount(block[obs.point], (costs[1] - costs[0])[0], BLOCKS[0] * BLOCKS[1])
    spread = float(np.sqrt((difference**2).sum()))
    return float(costs[1].sum() / max(costs[0].sum(), 1e-12)), float(difference.sum() / max(spread, 1e-12))


def with_log_focal(state: State, log: float) -> State:
    """One solution at another focal length, refocused."""
    factor = np.exp(log - state.log_focal[:, 0])
    return refocused(state, factor)
