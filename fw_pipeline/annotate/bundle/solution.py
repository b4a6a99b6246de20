"""What solving a clip gives: cameras, lens and points, and how sure they are."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fw_pipeline.annotate.bundle.certainty import Profile
from fw_pipeline.annotate.bundle.state import Observations, State
from fw_pipeline.annotate.motion_kind import MotionNumbers
from fw_pipeline.annotate.tracks import Tracks


@dataclass(frozen=True)
class Rival:
    """The cheapest solution with another depth order. Infinite when none was found."""

    ratio: float = float("inf")  # its cost over the best one's
    z: float = float("inf")  # by how many standard deviations the blocks of the picture agree that it is worse; at most 4.9


@dataclass(frozen=True)
class LensKnowledge:
    """What is known of the focal length; 0 and None for a given lens."""

    std: float = 0.0  # relative, from the covariance
    spread: float = 1.0  # largest over smallest focal length of all solutions within 5 % of the best cost
    profile: Profile | None = None  # cost over fixed focal lengths
    zoom: float = 0.0  # log of its change over the clip, if it is let change evenly
    zoom_std: float = float("inf")
    zoom_gain: float = 1.0  # cost with one focal length over the cost with an evenly changing one


@dataclass(frozen=True)
class Solution:
    """Cameras, points and lens of a clip. The world is the camera of the reference frame, the unit arbitrary."""

    tracks: Tracks
    rotation: np.ndarray  # [T, 3, 3] world to camera
    translation: np.ndarray  # [T, 3]
    points: np.ndarray  # [N, 3] world; nan where the track was not placed
    intrinsics: np.ndarray  # [3, 3] pixels
    known_lens: bool  # given, not found
    placed: np.ndarray  # [T] bool, frames whose pose was solved
    inlier: np.ndarray  # [N] bool: the track is placed, and in most of its frames close to where it should be
    inlier_ratio: np.ndarray  # [T] of the observations in the frame
    reprojection_error: np.ndarray  # [T] median of the inliers, pixels
    cost: float  # squared pixels, Cauchy's, summed over observations
    lens: LensKnowledge
    rival: Rival
    path_error: float  # ATE to be expected, see `path_certainty`
    pose_auc: float  # AUC at 5 degrees to be expected
    motion: MotionNumbers
    state: State = field(repr=False)  # batch 1
    observations: Observations = field(repr=False)

    @property
    def w2c(self) -> np.ndarray:
        """[T, 3, 4] with the reference camera as world. Frames that are not placed hold no meaning."""
        return np.concatenate([self.rotation, self.translation[..., None]], -1)

    @property
    def outliers(self) -> np.ndarray:
        """[N] bool: tracks that the solution does not explain."""
        return ~self.inlier

    @property
    def focal(self) -> float:
        """Focal length (fx) over the long side."""
        return float(self.intrinsics[0, 0]) / max(self.tracks.height, self.tracks.width)

    @property
    def focal_std(self) -> float:
        """Relative standard deviation: the larger of the covariance's and the profile's. 0 for a given lens."""
        if self.lens.profile is None:
            return 0.0
        low, high = self.lens.profile.interval()
        return max(self.lens.std, (high - low) / 4)

    @property
    def focal_interval(self) -> tuple[float, float]:
        """Focal lengths over the long side between which the lens lies (two standard deviations of evidence)."""
        if self.lens.profile is None:
            return self.focal, self.focal
        low, high = self.lens.profile.interval()
        return float(np.exp(low)), float(np.exp(high))

    @property
    def mirror_ratio(self) -> float:
        return self.rival.ratio

    @property
    def zooms(self) -> bool:
        """The focal length changes within the clip: by more than a tenth and five standard deviations, and all fits better by it.

        Going forward and zooming look alike where little depth is seen; clips of cameras that do not zoom had gains up to 1.3,
        made zooms 2.8 and more.
        """
        return abs(self.lens.zoom) > max(0.1, 5 * self.lens.zoom_std) and self.lens.zoom_gain > 1.5

    def numbers(self) -> dict[str, float]:
        """Everything measured, for a manifest or a report."""
        low, high = self.focal_interval
        return {
            "tracks": float(len(self.tracks)),
            "inlier_tracks": float(self.inlier.sum()),
            "placed": float(self.placed.mean()),
            "focal": self.focal,
            "focal_std": self.focal_std,
            "focal_low": low,
            "focal_high": high,
            "focal_spread": self.lens.spread,
            "zoom": self.lens.zoom,
            "path_error": self.path_error,
            "pose_auc": self.pose_auc,
            "mirror_ratio": self.rival.ratio,
            "mirror_z": self.rival.z,
            **{name: float(value) for name, value in vars(self.motion).items()},
        }
