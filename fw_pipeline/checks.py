"""Asset checks: annotations against truth and against themselves, the dataset against its hashes, training against step 0."""

from statistics import fmean

import dagster as dg

from fw_model.config import Stage
from fw_pipeline.resources import PipelineResource


@dg.asset_check(asset="depth", description="Depth and cameras against exact ground truth, where a video has one (the demo's).")
def annotation_matches_truth(pipeline: PipelineResource) -> dg.AssetCheckResult:
    """The mean over clips meets every bar; the metadata names each clip."""
    from fw_pipeline.annotate.truth import Bars
    from fw_pipeline.steps.review import truth_errors

    errors = truth_errors(pipeline.build())
    if not errors:
        return dg.AssetCheckResult(passed=True, metadata={"clips with truth": 0})
    names = list(next(iter(errors.values())))
    means = {name: fmean(e[name] for e in errors.values()) for name in names}
    failures = Bars().failures(means)
    rows = [" | ".join(["clip", *names]), "|".join(["---"] * (len(names) + 1))]
    rows += [" | ".join([clip, *(f"{e[name]:.4g}" for name in names)]) for clip, e in sorted(errors.items())]
    metadata: dict[str, dg.MetadataValue | float] = {
        "clips with truth": len(errors),
        "table": dg.MetadataValue.md("\n".join(rows)),
        **means,
    }
    return dg.AssetCheckResult(passed=not failures, metadata=metadata, description="; ".join(failures) or None)


@dg.asset_check(asset="depth", description="World points of each frame land on their own pixels; one world, one scale.")
def clips_are_consistent(pipeline: PipelineResource) -> dg.AssetCheckResult:
    """Reads every finished clip back from disk and checks it, whatever engine made it."""
    from fw_pipeline.steps.review import consistency_faults

    faults = consistency_faults(pipeline.build())
    listing = "\n".join(f"- {name}: {reason}" for name, reason in faults.items()) or "none"
    return dg.AssetCheckResult(passed=not faults, metadata={"faults": dg.MetadataValue.md(listing)})


@dg.asset_check(asset="training_shards", description="Every hash, shape and row of the packed dataset.")
def dataset_is_whole(pipeline: PipelineResource) -> dg.AssetCheckResult:
    from fw_model.data.verify import verify
    from fw_pipeline.steps.store import Store

    faults = verify(Store(pipeline.settings().data).dataset)
    return dg.AssetCheckResult(passed=not faults, metadata={"faults": dg.MetadataValue.md("\n".join(faults) or "none")})


def _improved(stage: Stage) -> dg.AssetChecksDefinition:
    @dg.asset_check(
        asset=f"{stage}_checkpoint", name="validation_improved", description="Validation losses are below those at step 0."
    )
    def validation_improved(pipeline: PipelineResource) -> dg.AssetCheckResult:
        from fw_pipeline.steps.training_plan import plan_training

        result = plan_training(pipeline.settings(), stage).result()
        if result is None:
            return dg.AssetCheckResult(passed=False, description="the run has not finished")
        before, after = result["validation"]["before"], result["validation"]["after"]
        names = ("depth_loss", "point_loss", "camera_loss")
        worse = [f"{name}: {before[name]:.4g} -> {after[name]:.4g}" for name in names if not after[name] < before[name]]
        metadata = {f"{name} {when}": result["validation"][when][name] for name in names for when in ("before", "after")}
        # A warning: a handful of videos may well be learnt by heart. The demo, which has enough, treats it as a failure.
        return dg.AssetCheckResult(
            passed=not worse, severity=dg.AssetCheckSeverity.WARN, metadata=metadata, description="; ".join(worse) or None
        )

    return validation_improved


CHECKS = [annotation_matches_truth, clips_are_consistent, dataset_is_whole, _improved("stage1"), _improved("stage2")]
