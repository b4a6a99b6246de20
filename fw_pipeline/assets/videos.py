"""Ingest: videos -> clips."""

import dagster as dg

from fw_pipeline.assets.each_video import for_each_video, per_video_asset
from fw_pipeline.resources import PipelineResource


@per_video_asset("ingest")
def clips(context: dg.AssetExecutionContext, pipeline: PipelineResource) -> None:
    """Shots of each video cut into clips of T = 4k+1 frames at a fixed rate; unusable files are named with their reason."""
    for_each_video(context, pipeline, "clips")
