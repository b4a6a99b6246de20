"""From pairs to a first guess of the whole clip: focal by Weiszfeld, a relative pose per pair by PnP, a spanning tree.

Pairs are believed as far as they agree with others around short cycles: a wrong pair contradicts all of its cycles, and
confidence alone would not tell. Sizes: E pairs, O = 2 E observations (pair e, side s) -> o = 2 e + s, P pixels of each image.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

from fw_pipeline.annotate.pairwise.pair_graph import PairMaps, require_connected, sure_level
from fw_pipeline.annotate.pairwise.pnp import pixel_threshold, pnp_ransac
from fw_pipeline.annotate.types import ClipSetAside
from fw_pipeline.annotate.vectors import length, median_of_finite

MAX_WEIGHT = 3.0  # of a pixel, in units of the clip's median confidence
FOCAL_RANGE = (0.2, 10.0)  # in long sides of the image: fields of view of 136 to 6 degrees
CYCLE_ROTATION, CYCLE_LENGTH = np.radians(2.0), 0.05  # a short cycle closes within this: radians, share of the scene's depth
UNCHECKED_SUPPORT = 0.5  # of a pair that is in no cycle


@dataclass(frozen=True)
class Samples:
    """The same P pixels of an image in every pair that shows it, so that their depth is one unknown."""

    grid: np.ndarray  # [N, P, 2] image position minus the principal point
    image: np.ndarray  # [O] whose pixels
    source: np.ndarray  # [O] in whose camera frame
    points: np.ndarray  # [O, P, 3] float64, the pair's own scale; (0, 0, 1) where not used
    weight: np.ndarray  # [O, P] from confidence, 0 where not used, about 1 at the median

    @property
    def own(self) -> np.ndarray:
        """[O] whether an image is seen from its own camera."""
        return self.image == self.source


@dataclass
class State:
    """What is being estimated; pair scales and depths as logarithms, so that they stay positive."""

    rotation: np.ndarray  # [N, 3, 3]
    translation: np.ndarray  # [N, 3]
    log_focal: float
    log_scale: np.ndarray  # [E]
    log_depth: np.ndarray  # [N, P]
    focal_known: bool = False  # then it stays as it is


def sample_pixels(maps: PairMaps, count: int) -> Samples:
    """About `count` pixels of each image, spread evenly: of each cell of a lattice the one with the most confidence.

    Observations below their pointmap's `sure_level` get no weight.
    """
    height, width = maps.size
    step = max(1.0, np.sqrt(height * width / count))
    rows, cols = (np.linspace(0, size, max(2, round(size / step)) + 1).astype(int) for size in (height, width))
    total = np.zeros((maps.num_images, height, width), np.float32)
    for image, _, confidence in maps.observations():
        total[image] += confidence
    cells = []
    for r in range(len(rows) - 1):
        for c in range(len(cols) - 1):
            cell = total[:, rows[r] : rows[r + 1], cols[c] : cols[c + 1]].reshape(maps.num_images, -1)
            v, u = np.divmod(cell.argmax(1), cols[c + 1] - cols[c])
            cells.append((v + rows[r]) * width + u + cols[c])
    pixels = np.stack(cells, axis=1)
    grid = np.stack([pixels % width - width / 2, pixels // width - height / 2], axis=-1)
    points = np.stack([points.reshape(-1, 3)[pixels[image]] for image, points, _ in maps.observations()])
    weight = np.stack([confidence.ravel()[pixels[image]] for image, _, confidence in maps.observations()])
    level = np.array([sure_level(confidence) for _, _, confidence in maps.observations()])
    good = (weight > 0) & (weight >= level[:, None])
    weight = np.where(good, np.minimum(weight / np.median(weight[good]), MAX_WEIGHT), 0).astype(np.float64)
    points = np.where(good[..., None], points, [0, 0, 1]).astype(np.float64)
    return Samples(grid, maps.views.ravel(), np.repeat(maps.views[:, 0], 2), points, weight)


def weiszfeld_focal(samples: Samples, size: tuple[int, int], iterations: int = 20) -> float:
    """One focal in pixels: for each pair the least weighted sum of distances between pixels and projected points (Weiszfeld's
    iteration), then the pairs' median.

    The weight, pixel radius over slope, bounds the pull of any point by its pixel's radius; without it a few wrong points that
    lie close to the camera plane decide. Raises ClipSetAside when the focal leaves FOCAL_RANGE: no camera's pointmaps do that.
    """
    points, grid = samples.points[samples.own], samples.grid[samples.image[samples.own]]
    slope = points[..., :2] / points[..., 2:]
    square = np.maximum((slope**2).sum(-1), 1e-12)
    radius = np.sqrt((grid**2).sum(-1))
    fair = samples.weight[samples.own] * radius / np.sqrt(square)
    focal = median_of_finite(np.where(fair > 0, radius / np.sqrt(square), np.nan))
    for _ in range(iterations):
        gap = grid - focal[:, None, None] * slope
        pull = fair / np.maximum(np.sqrt(np.einsum("opi,opi->op", gap, gap)), 1e-6)
        focal = (pull * (slope * grid).sum(-1)).sum(1) / np.maximum((pull * square).sum(1), 1e-12)
    found, side = float(np.median(focal)), max(size)
    if not FOCAL_RANGE[0] * side <= found <= FOCAL_RANGE[1] * side:
        raise ClipSetAside(f"the focal ran away: {found:.4g} px for images of {size[1]}x{size[0]}")
    return found


@dataclass(frozen=True)
class RelativePoses:
    """Of each pair: camera i to camera j in the pair's scale, and the depths its two views would have there."""

    rotation: np.ndarray  # [E, 3, 3]
    translation: np.ndarray  # [E, 3]
    log_depth: np.ndarray  # [E, 2, P] log z of each side's pixels in that side's own camera, NaN where unusable
    inlier_ratio: np.ndarray  # [E] 0 where no pose was found


def relative_poses(samples: Samples, focal: float, size: tuple[int, int]) -> RelativePoses:
    """PnP (SQPNP in RANSAC) of view j's points, which are in camera i, on view j's pixels."""
    pairs, pixels = len(samples.image) // 2, samples.points.shape[1]
    rotation, translation = np.tile(np.eye(3), (pairs, 1, 1)), np.zeros((pairs, 3))
    ratio, log_depth = np.zeros(pairs), np.full((pairs, 2, pixels), np.nan)
    lens = np.diag([focal, focal, 1.0])
    threshold = pixel_threshold(*size)
    for e in range(pairs):
        own, cross = 2 * e, 2 * e + 1
        good = samples.weight[cross] > 0
        found = pnp_ransac(samples.points[cross][good], samples.grid[samples.image[cross]][good], lens, threshold)
        if found is None:
            continue
        rotation[e], translation[e], inliers = found
        ratio[e] = inliers.mean()
        depth = np.stack([samples.points[own, :, 2], samples.points[cross] @ rotation[e, 2] + translation[e, 2]])
        usable = (np.stack([samples.weight[own], samples.weight[cross]]) > 0) & (depth > 0)
        log_depth[e][usable] = np.log(depth[usable])
        ratio[e] *= usable.any(1).all()
    return RelativePoses(rotation, translation, log_depth, ratio)


# ------------------------------------------------------------------------------------------------------ spanning tree


def cycle_support(views: np.ndarray, poses: RelativePoses) -> np.ndarray:
    """How far each pair agrees with its cycles of two and three pairs, [E] in 0..1."""
    a, b, c = _short_cycles(views, poses.inlier_ratio > 0)
    if not len(a):
        return np.full(len(views), UNCHECKED_SUPPORT)
    closes = _cycle_closes(views, poses, a, b, c)
    members = np.concatenate([a, b, c[c >= 0]])
    value = np.concatenate([closes, closes, closes[c >= 0]])
    count = np.bincount(members, minlength=len(views))
    total = np.bincount(members, value, minlength=len(views))
    return np.where(count > 0, total / np.maximum(count, 1), UNCHECKED_SUPPORT)


def _short_cycles(views: np.ndarray, usable: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs (a, b, c) of each cycle: a and b share an image, b and c, c and a. Of two parallel pairs c is -1."""
    between: dict[tuple[int, int], list[int]] = {}
    for e in np.flatnonzero(usable):
        i, j = sorted(map(int, views[e]))
        between.setdefault((i, j), []).append(int(e))
    later: dict[int, list[int]] = {}
    for i, j in between:
        later.setdefault(i, []).append(j)
    cycles = [(p[0], p[1], -1) for p in between.values() if len(p) == 2]
    for (i, j), ab in between.items():
        for k in later.get(j, []):
            if (i, k) in between:
                cycles += [(a, b, c) for a in ab for b in between[j, k] for c in between[i, k]]
    table = np.array(cycles, int).reshape(-1, 3)
    return table[:, 0], table[:, 1], table[:, 2]


def _cycle_closes(views: np.ndarray, poses: RelativePoses, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """1 for a cycle i -> j -> k -> i that closes exactly, towards 0 the worse it closes, [C]."""
    i, j = views[a].min(1), views[a].max(1)
    k = np.where(c < 0, i, views[b].max(1))
    last = np.where(c < 0, a, c)  # of two parallel pairs the way back is b itself: compare a with b
    first_r, first_t = _directed(views, poses, a, i)
    second_r, second_t = _directed(views, poses, b, j)
    last_r, last_t = _directed(views, poses, last, i)
    last_r, last_t = np.where((c < 0)[:, None, None], np.eye(3), last_r), np.where((c < 0)[:, None], 0.0, last_t)
    b_in_a = _log_ratio(views, poses, a, b, j)
    c_in_b = _log_ratio(views, poses, b, last, k)
    a_in_c = _log_ratio(views, poses, last, a, i)
    rotation = second_r @ first_r
    shift = np.einsum("cij,cj->ci", second_r, first_t) + np.exp(b_in_a)[:, None] * second_t
    gap = shift - np.exp(b_in_a + c_in_b)[:, None] * last_t
    depth = np.exp(median_of_finite(poses.log_depth[a, (views[a, 1] == i).astype(int)]))
    angle = np.arccos(np.clip((np.einsum("cij,cij->c", rotation, last_r) - 1) / 2, -1, 1))
    shift_gap = length(gap) / depth + np.abs(b_in_a + c_in_b + a_in_c)
    return np.nan_to_num(1 / (1 + (angle / CYCLE_ROTATION) ** 2 + (shift_gap / CYCLE_LENGTH) ** 2))


def _directed(views: np.ndarray, poses: RelativePoses, pair: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pose of each pair's other image relative to its image `start`: rotation [C, 3, 3], translation [C, 3]."""
    rotation, translation = poses.rotation[pair], poses.translation[pair]
    forward = views[pair, 0] == start
    back = np.swapaxes(rotation, 1, 2)
    return (
        np.where(forward[:, None, None], rotation, back),
        np.where(forward[:, None], translation, -np.einsum("cij,cj->ci", back, translation)),
    )


def _log_ratio(views: np.ndarray, poses: RelativePoses, a: np.ndarray, b: np.ndarray, image: np.ndarray) -> np.ndarray:
    """log of what lengths in pair b's scale are multiplied by to be in pair a's, from the depths of a shared image [C]."""
    in_a = poses.log_depth[a, (views[a, 1] == image).astype(int)]
    in_b = poses.log_depth[b, (views[b, 1] == image).astype(int)]
    return median_of_finite(in_a - in_b)


def initialise(maps: PairMaps, samples: Samples, known_focal: float | None = None) -> State:
    """Chain the pairs of the best spanning tree. Raises ClipSetAside when there is none, or no focal."""
    focal = weiszfeld_focal(samples, maps.size) if known_focal is None else known_focal
    poses = relative_poses(samples, focal, maps.size)
    usable = poses.inlier_ratio > 0
    require_connected(maps.views[usable], maps.num_images, "no pose fits the pointmaps of the pairs that would tie them")
    confidence = samples.weight.reshape(len(maps.views), -1).mean(1)
    score = np.where(usable, confidence * poses.inlier_ratio * (1e-3 + cycle_support(maps.views, poses)), 0.0)
    state = _chain(maps, poses, _spanning_tree(maps.views, score, maps.num_images), focal)
    state.focal_known = known_focal is not None
    for _ in range(2):
        update_scales(state, samples, np.ones(len(score), bool))
        state.log_depth = _median_depth(state, samples)
    return state


def _spanning_tree(views: np.ndarray, score: np.ndarray, num_images: int) -> list[tuple[int, int, int]]:
    """Maximum spanning tree as (pair, from, to), from frame 0 outwards."""
    best: dict[tuple[int, int], int] = {}
    for e in np.argsort(score):  # the last one written is the best of two parallel pairs
        if score[e] > 0:
            i, j = map(int, views[e])
            best[i, j] = best[j, i] = int(e)
    ij, chosen = np.array(list(best)), np.array(list(best.values()))
    cost = 1 + np.log(score.max() / score[chosen])
    graph = sparse.coo_matrix((cost, (ij[:, 0], ij[:, 1])), shape=(num_images, num_images))
    tree = csgraph.minimum_spanning_tree(graph.tocsr())
    order, parent = csgraph.breadth_first_order(tree, 0, directed=False)
    return [(best[int(parent[v]), int(v)], int(parent[v]), int(v)) for v in order[1:]]


def _chain(maps: PairMaps, poses: RelativePoses, tree: list[tuple[int, int, int]], focal: float) -> State:
    views = maps.views
    images, pixels = maps.num_images, poses.log_depth.shape[2]
    rotation, translation = np.tile(np.eye(3), (images, 1, 1)), np.zeros((images, 3))
    log_depth, log_scale = np.full((images, pixels), np.nan), np.zeros(len(views))
    log_depth[0] = _filled(poses.log_depth[tree[0][0], int(views[tree[0][0], 1] == 0)])
    for pair, near, far in tree:
        side = int(views[pair, 1] == far)
        scale = float(median_of_finite(log_depth[near] - poses.log_depth[pair, 1 - side]))
        turn, shift = _directed(views, poses, np.array([pair]), np.array([near]))
        rotation[far] = turn[0] @ rotation[near]
        translation[far] = turn[0] @ translation[near] + np.exp(scale) * shift[0]
        log_depth[far] = scale + _filled(poses.log_depth[pair, side])
    return State(rotation, translation, float(np.log(focal)), log_scale, log_depth)


def _filled(log_depth: np.ndarray) -> np.ndarray:
    """[P] with its median where it is unknown."""
    return np.where(np.isfinite(log_depth), log_depth, median_of_finite(log_depth))


def image_rays(state: State, samples: Samples) -> np.ndarray:
    """Rays with z = 1 of the sampled pixels, [N, P, 3]."""
    slope = samples.grid * np.exp(-state.log_focal)
    return np.concatenate([slope, np.ones_like(slope[..., :1])], axis=-1)


def relative_motion(state: State, samples: Samples) -> tuple[np.ndarray, np.ndarray]:
    """Image's camera to source's camera of each observation: rotation [O, 3, 3], translation [O, 3]."""
    rotation = state.rotation[samples.source] @ np.swapaxes(state.rotation[samples.image], 1, 2)
    shift = np.einsum("oij,oj->oi", rotation, state.translation[samples.image])
    return rotation, state.translation[samples.source] - shift


def update_scales(state: State, samples: Samples, which: np.ndarray) -> None:
    """Set the scale of the pairs `which` [E] bool to the median that fits the current depths, in place."""
    pick = np.repeat(which, 2)
    rotation, translation = relative_motion(state, samples)
    own = np.exp(state.log_depth)[..., None] * image_rays(state, samples)
    model = own[samples.image[pick]] @ np.swapaxes(rotation[pick], 1, 2) + translation[pick][:, None]
    ratio = 0.5 * np.log((model**2).sum(-1) / (samples.points[pick] ** 2).sum(-1))
    ratio[samples.weight[pick] == 0] = np.nan
    state.log_scale[which] = np.nan_to_num(median_of_finite(ratio.reshape(int(which.sum()), 2 * ratio.shape[1])))


def _median_depth(state: State, samples: Samples) -> np.ndarray:
    """log z of each image's pixels, the median over the pairs that show it [N, P]; the old value where none does."""
    rotation, translation = relative_motion(state, samples)
    scaled = np.exp(np.repeat(state.log_scale, 2))[:, None, None] * samples.points
    depth = np.einsum("opj,oj->op", scaled - translation[:, None], rotation[:, :, 2])
    depth[(samples.weight == 0) | (depth <= 0)] = np.nan
    result = state.log_depth.copy()
    for v in range(len(result)):
        median = median_of_finite(depth[samples.image == v], axis=0)
        known = np.isfinite(median)
        result[v, known] = np.log(median[known])
    return result
