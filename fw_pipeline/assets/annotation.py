"""Annotation: clips -> cameras and geometry -> depth in clip units."""

import dagster as dg

from fw_pipeline.assets.each_video import for_each_video, per_video_asset
from fw_pipeline.assets.videos import clips
from fw_pipeline.resources import PipelineResource


@per_video_asset("annotate", deps=[clips], pool="gpu")
def geometry(context: dg.AssetExecutionContext, pipeline: PipelineResource) -> None:
    """World-to-camera poses, intrinsics and geometric depth of each clip (points are depth unprojected through them)."""
    for_each_video(context, pipeline, "geometry")


@per_video_asset("annotate", deps=[geometry], pool="gpu")
def depth(context: dg.AssetExecutionContext, pipeline: PipelineResource) -> None:
    """Final z-depth of each clip at the bucket's size, with cameras and depth in one world and one scale."""
    for_each_video(context, pipeline, "depth")
