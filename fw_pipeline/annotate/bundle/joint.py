"""One lens for the clips of one video: what each says of it, taken together.

Every clip has a curve of evidence over the focal length (`Profile`). The clips of a video are independent witnesses of one
lens, so the curves add up; a clip that cannot tell adds a flat one. A clip that contradicts the others has another lens: a zoom.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fw_pipeline.annotate.bundle.refuse import MAX_FOCAL_STD
from fw_pipeline.annotate.bundle.solution import Solution
from fw_pipeline.annotate.lens import Lens
from fw_pipeline.annotate.motion_kind import NO_DEPTH, motion_kind
from fw_pipeline.annotate.types import ClipSetAside

# What the covariance does not know of: drift of patches that all clips share, lens distortion, rolling shutters. Measured on
# clips with a known lens: off by 0 to 5 %, where the covariance says 0.3 to 2 %.
FLOOR = 0.02
ZOOMED = 9.0  # evidence (three standard deviations) with which a clip contradicts the others' lens
ZOOM = 0.08  # and by how much, relative, before it is called another lens
GRID = np.linspace(np.log(0.2), np.log(8.0), 4000)


@dataclass(frozen=True)
class JointLens:
    """The focal length that all clips of a video share."""

    focal: float  # over the long side
    std: float  # relative
    clips: np.ndarray  # [C] bool: clips that the lens holds for; the others contradict it
    each: np.ndarray  # [C] focal length of each clip alone
    each_std: np.ndarray  # [C]

    def lens(self, height: int, width: int) -> Lens:
        """The pinhole it is in pictures of height x width."""
        pixels = self.focal * max(height, width)
        return Lens(pixels, pixels, width / 2, height / 2, height, width, std=self.std, source="video")

    @property
    def determined(self) -> bool:
        return bool(self.std <= MAX_FOCAL_STD)

    @property
    def zooms(self) -> bool:
        """Clips of the video have different lenses."""
        return not bool(self.clips.all())


def joint_lens(solutions: Sequence[Solution]) -> JointLens:
    """One focal length for the clips of a video, solved apart and all without a known lens.

    Clips whose motion shows no depth are no witnesses, though they may be among them: what they say of the lens hangs on the
    noise. The clips that agree give the lens; clips that contradict them are marked, and keep their own.

    Raises ValueError without clips or for a clip with a given lens; ClipSetAside when no clip determines the lens.
    """
    if not solutions or any(s.lens.profile is None for s in solutions):
        raise ValueError("a joint lens needs clips solved without a known lens")
    witness = np.array([motion_kind(s.motion) not in NO_DEPTH for s in solutions])
    if not witness.any():
        raise ClipSetAside(f"lens not determined: in none of the video's {len(solutions)} clips the camera's motion shows depth")
    curves = np.stack([_evidence(s) for s in solutions])
    each = np.array([s.focal for s in solutions])
    std = np.hypot([s.focal_std for s in solutions], FLOOR)
    curves[~witness] = 0
    agree = _agreeing(curves, np.log(each))
    total = curves[agree].sum(0)
    best = int(np.argmin(total))
    inside = GRID[total <= total[best] + 4]
    width = float(inside[-1] - inside[0]) / 4
    width = max(width, FLOOR / np.sqrt((agree & witness).sum()))
    found = JointLens(float(np.exp(GRID[best])), width, agree, each, std)
    if not found.determined:
        low, high = np.exp(inside[[0, -1]])
        raise ClipSetAside(
            f"lens not determined: over all {len(solutions)} clips of the video focal lengths from {low:.2f} to {high:.2f} of "
            f"the long side fit alike (standard deviation {found.std:.0%}, at most {MAX_FOCAL_STD:.0%}); calibrate it"
        )
    return found


def _evidence(solution: Solution) -> np.ndarray:
    """Evidence of one clip against each focal length of GRID, its minimum 0, widened by what the covariance does not know."""
    assert solution.lens.profile is not None
    own = max(solution.lens.std, 1e-4)
    value = solution.lens.profile.evidence(GRID)
    beyond = np.maximum(0, np.maximum(GRID - solution.lens.profile.log_focal[-1], solution.lens.profile.log_focal[0] - GRID))
    # Beyond the profile the curve stays as at its end, hardly ever reached: a gentle slope keeps the minimum inside.
    return np.asarray((value + beyond) / (1 + (FLOOR / own) ** 2))


def _agreeing(curves: np.ndarray, each: np.ndarray) -> np.ndarray:
    """[C] bool: the clips that one lens holds for. The one that is contradicted most is left out until none is."""
    keep = np.ones(len(curves), bool)
    while keep.sum() > 1:
        best = int(np.argmin(curves[keep].sum(0)))
        against = np.where(keep & (np.abs(each - GRID[best]) > ZOOM), curves[:, best], 0)
        if against.max() < ZOOMED:
            break
        # with two that contradict each other neither is more right: the one that says less goes
        keep[int(np.argmax(against))] = False
    best = int(np.argmin(curves[keep].sum(0)))
    return np.asarray((curves[:, best] < ZOOMED) | (np.abs(each - GRID[best]) <= ZOOM))
