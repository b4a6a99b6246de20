"""Who gives the final depth of a clip: the geometry itself, or Depth Anything V2 aligned to it."""

from fw_pipeline.annotate.depth.depth_anything import DepthAnythingV2, DepthModelError
from fw_pipeline.annotate.depth.disparity import DisparityFit, align_disparity
from fw_pipeline.annotate.depth.geometry import GeometryDepth

__all__ = ["DepthAnythingV2", "DepthModelError", "DisparityFit", "GeometryDepth", "align_disparity"]
