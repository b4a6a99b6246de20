"""Generation: a world for each request in the requests folder, of the finished stage 2."""

import dagster as dg

from fw_model.errors import MissingInput
from fw_pipeline.assets.each_video import FAULTS
from fw_pipeline.assets.pictures import picture
from fw_pipeline.assets.training import stage2_checkpoint
from fw_pipeline.failures import explained
from fw_pipeline.partitions import LAUNCH, request_partitions
from fw_pipeline.resources import PipelineResource


@dg.asset(
    deps=[stage2_checkpoint],
    group_name="generate",
    kinds={"pytorch"},
    pool="gpu",
    partitions_def=request_partitions,
    backfill_policy=dg.BackfillPolicy.single_run(),
)
@explained()
def generated_worlds(context: dg.AssetExecutionContext, pipeline: PipelineResource) -> None:
    """Video, depth, points and cameras from a prompt, a first picture and a camera path; a folder each below data/worlds."""
    from fw_pipeline.steps.worlds import make_worlds, read_folder

    if not (context.has_partition_key or context.has_partition_key_range):
        raise MissingInput(
            "generated_worlds: the run names no requests", f"Choose partitions in the UI, or run: {LAUNCH} {context.job_name}"
        )
    settings = pipeline.settings()
    requests = read_folder(settings)
    faults = list(requests.bad)
    for made in make_worlds(settings, requests, context.partition_keys):
        if made.fault:
            faults.append(f"{made.key}: {made.fault}")
            context.log.error("%s: %s", made.key, made.fault)
            continue
        page = dg.MetadataValue.url((made.folder / "scene.html").resolve().as_uri())
        metadata: dict[str, dg.MetadataValue | float] = {
            "folder": dg.MetadataValue.path(str(made.folder)),
            "page": page,
            **made.numbers,
        }
        metadata |= {"picture": picture(made.picture)} if made.picture else {}
        context.add_asset_metadata(metadata, partition_key=made.key)
        context.log_event(dg.AssetMaterialization(asset_key=context.asset_key, partition=made.key, metadata=metadata))
        context.log.info("%s %s", "there already:" if made.kept else "world:", made.folder)
    if faults:
        raise dg.Failure(
            f"{len(faults)} requests could not be met; the others are:\n  " + "\n  ".join(faults),
            metadata={FAULTS: len(faults)},
            allow_retries=False,
        )
