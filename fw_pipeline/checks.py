"""Asset checks: annotations against truth and against themselves, the dataset against its hashes, training against step 0."""

from statistics import fmean

import dagster as dg

from fw_model.config import Stage
from fw_pipeline.failures import explained
from fw_pipeline.resources import PipelineResource

NOTHING = "nothing to check"  # how the description of a check begins that has seen nothing


def nothing_to_check(what: str) -> dg.AssetCheckResult:
    """Passed is for something that was looked at; having nothing to look at is a warning."""
    return dg.AssetCheckResult(passed=False, severity=dg.AssetCheckSeverity.WARN, description=f"{NOTHING}: {what}")


@dg.asset_check(asset="depth", description="Depth and cameras against exact ground truth, where a video has one (the demo's).")
@explained()
def annotation_matches_truth(pipeline: PipelineResource) -> dg.AssetCheckResult:
    """The mean over clips meets every bar; the metadata names each clip."""
    from fw_pipeline.annotate.truth import Bars
    from fw_pipeline.steps.review import truth_errors

    errors = truth_errors(pipeline.build())
    if not errors:
        return nothing_to_check("no finished clip of a video with ground truth")
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
@explained()
def clips_are_consistent(pipeline: PipelineResource) -> dg.AssetCheckResult:
    """Reads every finished clip back from disk and checks it, whatever engine made it."""
    from fw_pipeline.steps.review import consistency_faults, finished_clips

    built = pipeline.build()
    if next(finished_clips(built), None) is None:
        return nothing_to_check("0 finished clips")
    faults = consistency_faults(built)
    listing = "\n".join(f"- {name}: {reason}" for name, reason in faults.items()) or "none"
    return dg.AssetCheckResult(passed=not faults, metadata={"faults": dg.MetadataValue.md(listing)})


AUDITED = 24  # clips; an audit takes a second or so


@dg.asset_check(asset="depth", description="Cameras, lens and depth against points followed through the pictures, engine or not.")
@explained()
def geometry_is_true(pipeline: PipelineResource) -> dg.AssetCheckResult:
    """Judges finished clips as they would be packed, at most AUDITED of them, spread evenly."""
    from fw_pipeline.annotate.audit.verdict import Judgement
    from fw_pipeline.steps.review import audit_finished

    verdicts, finished = audit_finished(pipeline.build(), AUDITED)
    if not verdicts:
        return nothing_to_check("0 finished clips")
    count = {judgement: sum(v.judgement is judgement for v in verdicts.values()) for judgement in Judgement}
    listing = "\n".join(f"- {name}: {verdict}" for name, verdict in sorted(verdicts.items()))
    numbers = {name for verdict in verdicts.values() for name in verdict.numbers}
    means = {name: fmean(v.numbers[name] for v in verdicts.values() if name in v.numbers) for name in sorted(numbers)}
    metadata: dict[str, dg.MetadataValue | float] = {
        "finished clips": finished,
        "audited": len(verdicts),
        "verdicts": dg.MetadataValue.md(listing),
        **means,
    }
    passed = count[Judgement.PASS] == len(verdicts)
    said = ", ".join(f"{count[judgement]} {judgement}" for judgement in Judgement if count[judgement])
    # What cannot be judged is a warning: nothing is known to be wrong.
    severity = dg.AssetCheckSeverity.ERROR if count[Judgement.REFUSE] else dg.AssetCheckSeverity.WARN
    return dg.AssetCheckResult(
        passed=passed, severity=severity, metadata=metadata, description=f"{len(verdicts)} of {finished} clips: {said}"
    )


@dg.asset_check(asset="training_shards", description="Every hash, shape and row of the packed dataset.")
@explained()
def dataset_is_whole(pipeline: PipelineResource) -> dg.AssetCheckResult:
    from fw_model.data.manifest import read_manifest
    from fw_model.data.verify import verify
    from fw_pipeline.steps.store import Store

    folder = Store(pipeline.settings().data).dataset
    if all(row.quarantine for row in read_manifest(folder)):
        return nothing_to_check("0 packed clips")
    faults = verify(folder)
    return dg.AssetCheckResult(passed=not faults, metadata={"faults": dg.MetadataValue.md("\n".join(faults) or "none")})


def _improved(stage: Stage) -> dg.AssetChecksDefinition:
    @dg.asset_check(
        asset=f"{stage}_checkpoint", name="validation_improved", description="Validation losses are below those at step 0."
    )
    @explained()
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


CHECKS = [
    annotation_matches_truth,
    clips_are_consistent,
    geometry_is_true,
    dataset_is_whole,
    _improved("stage1"),
    _improved("stage2"),
]
