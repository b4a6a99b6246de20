"""Two halves of the tracks, each solved from nothing: do they know of the given path, and of the same order of depths?"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fw_model.metrics import ate, auc, relative_pose_errors
from fw_pipeline.annotate.audit.verdict import Cause, Finding
from fw_pipeline.annotate.audit.witness import Witness, poses
from fw_pipeline.annotate.bundle.solution import Solution
from fw_pipeline.annotate.bundle.solve import REVERSED, solve
from fw_pipeline.annotate.bundle.starts import depth_agreement
from fw_pipeline.annotate.tracks import Tracks
from fw_pipeline.annotate.types import ClipSetAside

MAX_PATH = 0.05  # what either half must be away from the given path
FURTHER = 2.0  # and how many times further than the halves are from each other


def judge_halves(few: Witness) -> tuple[dict[str, float], list[Finding]]:
    """With the given lens. A half with too few tracks to solve says nothing."""
    obs = few.observations
    centre = np.array([few.tracks.width / 2, few.tracks.height / 2])
    position = np.full_like(few.tracks.xy, np.nan)
    position[obs.point, obs.frame] = obs.xy + centre
    lens = np.array([[obs.focal[0], 0, centre[0]], [0, obs.focal[1], centre[1]], [0, 0, 1]])
    solved: list[tuple[np.ndarray, Solution]] = []
    for first in (0, 1):
        index = np.arange(first, len(position), 2)
        half = Tracks(position[index], few.tracks.seen[index], few.tracks.height, few.tracks.width)
        try:
            solution = solve(half, lens)
        except ClipSetAside:
            continue  # counted below: "halves" says how many could be solved
        if solution.placed.all() and solution.inlier.sum() >= 20:
            solved.append((index, solution))
    numbers = {"halves": float(len(solved))}
    if len(solved) < 2:
        return numbers, []
    given = poses(few.given)
    away = [ate(solution.w2c, given) for _, solution in solved]
    apart = ate(solved[0][1].w2c, solved[1][1].w2c)
    area = [auc(*relative_pose_errors(solution.w2c, given), 5) for _, solution in solved]
    order = [_order(few, index, solution) for index, solution in solved]
    numbers |= {"halves_path": min(away), "halves_apart": apart, "halves_auc": max(area), "halves_order": max(order)}
    return numbers, list(_findings(numbers))


def _order(few: Witness, index: np.ndarray, solution: Solution) -> float:
    """Rank correlation of the half's inverse distances with those under the given cameras."""
    both = solution.inlier & (few.given.inverse[0, index] > 0)
    if both.sum() < 20:
        return 1.0
    own = 1 / np.linalg.norm(solution.points[both], axis=1)
    return depth_agreement(own, few.given.inverse[0, index][both])


def _findings(numbers: dict[str, float]) -> Iterator[Finding]:
    away, apart = numbers["halves_path"], numbers["halves_apart"]
    if away > MAX_PATH and away > FURTHER * apart:
        yield Finding(
            Cause.PATH,
            f"two halves of the tracks, solved from nothing, agree on a path {100 * away:.0f} % from the given one "
            f"({100 * apart:.1f} % from each other)",
        )
    if numbers["halves_order"] < REVERSED and away > apart:
        yield Finding(Cause.MIRRORED, f"two halves of the tracks both order depths otherwise ({numbers['halves_order']:.2f})")
