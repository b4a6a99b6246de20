"""Who gives the final depth of a clip: the geometry itself (here), or Depth Anything V2 aligned to it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fw_pipeline.annotate.types import ClipDepth, ClipGeometry


@dataclass(frozen=True)
class GeometryDepth:
    """The geometry's own depth, as it is."""

    name: str = "geometry"
    version: str = "1"

    def estimate(self, frames: np.ndarray, geometry: ClipGeometry) -> ClipDepth:
        """See `DepthEngine.estimate`; the fit columns say 'nothing was fitted' (scale 1, shift 0, all inliers)."""
        count = len(frames)
        return ClipDepth(
            depth=geometry.depth,
            confidence=geometry.confidence,
            source=np.full(count, ClipDepth.SOURCES.index("geometry"), np.uint8),
            scale=np.ones(count, np.float32),
            shift=np.zeros(count, np.float32),
            inlier_ratio=np.ones(count, np.float32),
            residual=np.zeros(count, np.float32),
        )
