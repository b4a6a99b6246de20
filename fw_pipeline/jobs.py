"""The jobs people launch, in the order they need each other."""

import dagster as dg

select = dg.AssetSelection.assets

# Launch these for one video, a range or all of them in the UI, or for all with `python -m fw_pipeline.launch`.
annotate_videos = dg.define_asset_job(
    "annotate_videos", select("clips", "geometry", "depth"), description="Videos to clips, cameras, points and depth."
)
build_dataset = dg.define_asset_job(
    "build_dataset", select("latents", "training_shards"), description="Encode the clips and pack everything into shards."
)
stage1_training = dg.define_asset_job(
    "stage1_training", select("stage1_checkpoint"), description="Latent bridging: the geometry branch on a frozen backbone."
)
stage2_training = dg.define_asset_job(
    "stage2_training", select("stage2_checkpoint"), description="Co-optimization: camera adapters and cross-attention too."
)
validation = dg.define_asset_job(
    "validation", select("stage1_report", "stage2_report"), description="Ground truth beside prediction, as HTML."
)

# One partition per request, as `annotate_videos` has one per video.
generate = dg.define_asset_job("generate", select("generated_worlds"), description="Requests to worlds, with stage 2.")

JOBS = [annotate_videos, build_dataset, stage1_training, stage2_training, validation, generate]
