"""What flows through annotation, and the two roles an annotator can play.

Conventions, everywhere in this project:
- Pixel (row v, column u) has its centre at image position (u + 0.5, v + 0.5); intrinsics are in pixels of the image they
  go with, K = [[fx, 0, cx], [0, fy, cy], [0, 0, 1]].
- `w2c` is world-to-camera [3, 4] with OpenCV axes (x right, y down, z forward): x_cam = R x_world + t.
- The world of a clip is its first camera: w2c[0] is the identity.
- Depth is z-depth (distance along the optical axis), 0 where unknown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from fw_model.errors import Explained
from fw_pipeline.annotate.lens import Lens


class VideoSetAside(Explained, ValueError):
    """A file that gives no clip (not a video, truncated, too short, ...). The message is the reason shown to the user."""


@dataclass(frozen=True)
class Measured:
    """What is known of a clip beside its arrays; it goes into the manifest for accepted clips and for those set aside."""

    numbers: Mapping[str, float] = field(default_factory=dict)
    motion: str = ""  # what the camera does (`motion_kind.MotionKind`), "" where nobody could tell

    def __or__(self, other: Measured) -> Measured:
        """Both; the second's where both have the same."""
        return Measured({**self.numbers, **other.numbers}, other.motion or self.motion)


class ClipSetAside(Explained, ValueError):
    """A clip that cannot be annotated truthfully (static camera, too few registered frames, ...). It is set aside with
    this message, and what was measured of it, and never given made-up poses."""

    def __init__(self, message: str, remedy: str = "", measured: Measured | None = None) -> None:
        super().__init__(message, remedy)
        self.measured = measured or Measured()


class EngineError(Explained, RuntimeError):
    """An annotator that cannot run at all: its weights are missing or damaged, or there is no such device.

    No video is to blame, so a step stops at the first one. The message says what to do.
    """


@dataclass(frozen=True)
class Clip:
    """T frames of one shot, given as times in the source video; nothing is re-encoded.

    `height`, `width`, `len(timestamps)` are the bucket. The frames of the bucket are the source frames (after applying
    the container's rotation), resized by one factor to cover the bucket and then centre-cropped; see `FrameTransform`.
    """

    clip_id: str  # "<video_key>-s<shot>-c<index>", unique in a dataset and safe as a file name
    video: str  # path relative to the videos folder, with forward slashes
    video_xxh64: str  # of the whole file, so that a replaced video is noticed
    shot: int
    fps: float
    timestamps: tuple[float, ...]  # seconds, presentation time of the source frame chosen for each clip frame
    source_height: int
    source_width: int
    height: int
    width: int
    lens: Lens | None = None  # written down beside the video, for its source pictures; frames are read through its pinhole

    @property
    def frames(self) -> int:
        return len(self.timestamps)


@dataclass(frozen=True)
class ClipGeometry:
    """Cameras and geometry's own depth of one clip at the annotation size h x w, in arbitrary but single units.

    Raises nothing itself; `fw_pipeline.annotate.quality.check_geometry` decides whether it is good enough.
    """

    w2c: np.ndarray  # [T, 3, 4] float64, w2c[0] = identity
    intrinsics: np.ndarray  # [T, 3, 3] float64, pixels of the h x w image
    depth: np.ndarray  # [T, h, w] float32, z-depth, 0 = unknown
    confidence: np.ndarray  # [T, h, w] float32 in [0, 1], 0 where depth is 0
    inlier_ratio: np.ndarray  # [T] share of a frame's 2-D/3-D matches that fit its pose
    reprojection_error: np.ndarray  # [T] median, pixels of the h x w image
    interpolated: np.ndarray  # [T] bool, pose filled in from its neighbours because its own could not be solved


@dataclass(frozen=True)
class ClipDepth:
    """Final depth of one clip at the annotation size, in the units of the geometry it was aligned to."""

    depth: np.ndarray  # [T, h, w] float32, z-depth, 0 = unknown
    confidence: np.ndarray  # [T, h, w] float32 in [0, 1]
    source: np.ndarray  # [T] uint8 index into SOURCES: whose depth each frame carries
    scale: np.ndarray  # [T] float32: 1/z = scale * disparity + shift (1 and 0 where no disparity network ran)
    shift: np.ndarray  # [T] float32
    inlier_ratio: np.ndarray  # [T] float32
    residual: np.ndarray  # [T] float32, median relative error of the fit

    SOURCES = ("geometry", "depth-anything-v2")


class GeometryEngine(Protocol):
    """Gives cameras and geometric depth: `tracks`, `colmap`, `dust3r`."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str:
        """Changes when results would: code version, settings, and model id and revision, if any."""
        ...

    def estimate(self, frames: np.ndarray, intrinsics: np.ndarray | None = None) -> ClipGeometry:
        """frames [T, h, w, 3] uint8 RGB; intrinsics [3, 3] pixels when known, else estimated.

        Raises ClipSetAside with the reason when no trustworthy geometry exists.
        """
        ...


@runtime_checkable
class SharedLensEngine(Protocol):
    """A GeometryEngine that finds cameras before depth, so that all clips of a video can have one lens.

    A solution is the engine's own; it holds no pictures, so that a video of any length can wait for its last clip.
    """

    def solve(self, frames: np.ndarray, intrinsics: np.ndarray | None = None) -> Any:
        """As `GeometryEngine.estimate` -> a solution; without `intrinsics` its lens is its own. Raises ClipSetAside."""
        ...

    def share_lens(self, solutions: Sequence[Any]) -> list[Any]:
        """Solutions of one video's clips -> for each its solution with the lens they share, or the ClipSetAside it gets."""
        ...

    def measured(self, solution: Any) -> Measured: ...

    def finish(self, frames: np.ndarray, solution: Any) -> ClipGeometry:
        """frames: those it was solved from. Raises ClipSetAside when the solution is not to be trusted."""
        ...


class DepthEngine(Protocol):
    """Gives the final depth: `depth-anything-v2` aligned to the geometry, or the geometry's own (`geometry`)."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str:
        """As `GeometryEngine.version`."""
        ...

    def estimate(self, frames: np.ndarray, geometry: ClipGeometry) -> ClipDepth:
        """frames [T, h, w, 3] uint8 RGB at the same size as `geometry`."""
        ...
