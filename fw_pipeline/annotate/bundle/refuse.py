"""Which solutions are believed. Every bar has its reason beside it; a refusal carries the numbers and the likely cause."""

from __future__ import annotations

import numpy as np

from fw_pipeline.annotate.bundle.solution import Solution
from fw_pipeline.annotate.motion_kind import MotionKind, motion_kind
from fw_pipeline.annotate.types import ClipSetAside

MIN_PLACED = 0.8  # share of frames
MIN_INLIERS = 60  # tracks
MIN_INLIER_SHARE = 0.5  # of the tracks; fewer, and something other than the scene may have been solved
# A lens wrong by x bends paths and depths by about x. Real clips with std above 0.05 came out off by up to 15 %.
MAX_FOCAL_STD = 0.05
# Noise fits a scene and its mirror alike; real scenes right way round had 1.34 and more, turning cameras at most 1.06.
MIN_MIRROR_RATIO = 1.2
# Errors that `path_certainty` predicts from the tracks' scatter. True ones, where known, are 1 to 3 times as large: real patches
# drift together. So these stand for an ATE of 1.5 % and an AUC of 0.6 to 0.7.
MAX_PATH_ERROR = 0.005
MIN_POSE_AUC = 0.85
MIN_MIRROR_Z = 2.0  # the picture's blocks must agree on which is better, not one region alone


def check(solution: Solution) -> None:
    """Raise ClipSetAside unless the solution's cameras, lens and depth order are determined by its tracks."""
    require_motion(solution)
    require_one_lens(solution)
    require_placed(solution)
    require_order(solution)
    require_lens(solution)
    require_path(solution)


def require_motion(solution: Solution) -> None:
    """Raise ClipSetAside under the motion's name where it shows no depth."""
    kind = motion_kind(solution.motion)
    numbers = solution.motion
    if kind is MotionKind.STILL:
        raise ClipSetAside(
            f"the camera does not move: points stay where they are in {numbers.still:.0%} of the picture, and turning alone "
            f"leaves {numbers.turning_ratio:.2f} times the error that depth leaves (below 2 is noise)"
        )
    if kind in (MotionKind.TURNING, MotionKind.ZOOMING):
        zoom = f" and zooms ({numbers.zoom_turning:+.0%})" if kind is MotionKind.ZOOMING else ""
        raise ClipSetAside(
            f"the camera only turns{zoom}: that leaves {numbers.turning_ratio:.2f} times the error that depth leaves (below 2 is "
            "what noise does); such a clip shows no depth"
        )


def require_one_lens(solution: Solution) -> None:
    """Raise ClipSetAside when the focal length changes within the clip: cameras here have one lens a clip."""
    if solution.zooms:
        raise ClipSetAside(
            f"the lens zooms: its focal length changes by {np.expm1(solution.lens.zoom):+.0%} over the clip (standard deviation "
            f"{solution.lens.zoom_std:.0%}); a clip has one lens"
        )


def require_placed(solution: Solution) -> None:
    """Raise ClipSetAside when too few frames or tracks fit."""
    frames, tracks = float(solution.placed.mean()), int(solution.inlier.sum())
    if frames < MIN_PLACED:
        raise ClipSetAside(
            f"only {solution.placed.sum()} of {len(solution.placed)} frames could be placed (at least {MIN_PLACED:.0%} needed): "
            "tracks break off, by blur, fast motion or something passing close by"
        )
    share = tracks / max(1, len(solution.tracks))
    if tracks < MIN_INLIERS or share < MIN_INLIER_SHARE:
        raise ClipSetAside(
            f"{tracks} of {len(solution.tracks)} tracks fit one rigid scene (at least {MIN_INLIERS} and {MIN_INLIER_SHARE:.0%}): "
            "little texture, or moving things fill the picture"
        )


def require_order(solution: Solution) -> None:
    """Raise ClipSetAside when a scene with another depth order fits nearly as well."""
    if solution.rival.ratio < MIN_MIRROR_RATIO or solution.rival.z < MIN_MIRROR_Z:
        raise ClipSetAside(
            f"ambiguous: a scene with another depth order fits nearly as well (error {solution.rival.ratio:.2f} times as large, "
            f"at least {MIN_MIRROR_RATIO:g}; parts of the picture agree on it by {solution.rival.z:.1f} deviations, at least "
            f"{MIN_MIRROR_Z:g}): too far a scene, too short a path, or a plane"
        )


def require_lens(solution: Solution) -> None:
    """Raise ClipSetAside when the clip's lens is neither given nor determined by its tracks."""
    if not solution.known_lens and not solution.focal_std <= MAX_FOCAL_STD:
        low, high = solution.focal_interval
        raise ClipSetAside(
            f"lens not determined: focal lengths from {low:.2f} to {high:.2f} of the long side fit alike (standard deviation "
            f"{solution.focal_std:.0%}, at most {MAX_FOCAL_STD:.0%}); put a calibration beside the video (NAME.camera.json)"
        )


def require_path(solution: Solution) -> None:
    """Raise ClipSetAside when the tracks' own scatter leaves the path too uncertain to be called known."""
    if solution.path_error > MAX_PATH_ERROR or solution.pose_auc < MIN_POSE_AUC:
        raise ClipSetAside(
            f"path not determined: parts of the picture disagree by {100 * solution.path_error:.1f} % of it (at most "
            f"{100 * MAX_PATH_ERROR:g} %) and on its directions (AUC at 5 degrees {solution.pose_auc:.2f}, at least "
            f"{MIN_POSE_AUC:g}): too little parallax ({solution.motion.angle:.2f} degrees) or too few good tracks"
        )
