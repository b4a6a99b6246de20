"""Dataset: encoder outputs per video, then everything packed into shards."""

import dagster as dg

from fw_model.errors import MissingInput
from fw_pipeline.assets.annotation import depth
from fw_pipeline.assets.each_video import for_each_video, per_video_asset, raise_for_faults
from fw_pipeline.assets.videos import clips
from fw_pipeline.failures import explained
from fw_pipeline.resources import PipelineResource


@per_video_asset("dataset", deps=[clips], pool="gpu")
def latents(context: dg.AssetExecutionContext, pipeline: PipelineResource) -> None:
    """VAE latents and first-frame features of each clip, and each distinct prompt's embedding: training loads no encoder.

    With `encode_online` in the preset's stages, each clip's pictures instead."""
    for_each_video(context, pipeline, "latents")


@dg.asset(deps=[depth, latents], group_name="dataset", kinds={"parquet"})
@explained()
def training_shards(context: dg.AssetExecutionContext, pipeline: PipelineResource) -> dg.MaterializeResult:
    """The sharded dataset: manifest.parquet and payload shards, split by video. Its data version is the manifest's digest.

    Videos that failed in this run are left out, and the asset then fails at its end, naming them."""
    from tqdm import tqdm

    from fw_model.data.manifest import dataset_digest
    from fw_pipeline.steps.packing import pack

    built = pipeline.build()
    keys = list(built.videos)
    try:
        result = pack(built, progress=lambda keys: tqdm(keys, desc="pack", unit="video", disable=None))
    except MissingInput:
        raise_for_faults(context, built, keys)
        raise
    for name, reason in result.set_aside.items():
        context.log.warning("set aside %s: %s", name, reason)
    if result.not_annotated:
        context.log.warning("not annotated yet, left out: %s", ", ".join(result.not_annotated))
    for video, where in built.misspelt_prompts().items():
        context.log.warning("%s names a video that is not in the folder: %s", where, video)
    digest = dataset_digest(built.store.dataset)
    listing = "\n".join(f"- `{name}`: {reason}" for name, reason in result.set_aside.items()) or "none"
    metadata: dict[str, dg.MetadataValue | int | str] = {
        "clips": result.clips,
        "kept as they were": result.kept,
        "bytes written": result.bytes_written,
        "set aside": len(result.set_aside),
        "reasons": dg.MetadataValue.md(listing),
        "not annotated": len(result.not_annotated),
        "folder": dg.MetadataValue.path(str(built.store.dataset)),
        "digest": digest,
    }
    try:
        raise_for_faults(context, built, keys, result.failed)
    except dg.Failure:  # the rest is packed all the same, and a step that fails records nothing by itself
        context.log_event(dg.AssetMaterialization(asset_key=context.asset_key, metadata=metadata))
        raise
    return dg.MaterializeResult(data_version=dg.DataVersion(digest), metadata=metadata)
