"""Training: shards -> stage 1 checkpoint -> stage 2 checkpoint, each in processes of its own."""

import dagster as dg

from fw_model.config import Stage
from fw_model.errors import TrainingError
from fw_pipeline.assets.dataset import training_shards
from fw_pipeline.assets.pictures import picture
from fw_pipeline.failures import explained
from fw_pipeline.resources import TERMINATION_TIMEOUT_SECONDS, PipelineResource


@dg.asset(deps=[training_shards], group_name="train", kinds={"pytorch"}, pool="gpu")
def stage1_checkpoint(
    context: dg.AssetExecutionContext, pipeline: PipelineResource, pipes: dg.PipesSubprocessClient
) -> dg.MaterializeResult:
    """Latent bridging: the geometry branch learns on a frozen backbone."""
    return run_training(context, pipeline, pipes, "stage1")


@dg.asset(deps=[training_shards, stage1_checkpoint], group_name="train", kinds={"pytorch"}, pool="gpu")
def stage2_checkpoint(
    context: dg.AssetExecutionContext, pipeline: PipelineResource, pipes: dg.PipesSubprocessClient
) -> dg.MaterializeResult:
    """Unified co-optimization: camera adapters and bidirectional cross-attention join the geometry branch."""
    return run_training(context, pipeline, pipes, "stage2")


@explained()
def run_training(
    context: dg.AssetExecutionContext, resource: PipelineResource, pipes: dg.PipesSubprocessClient, stage: Stage
) -> dg.MaterializeResult:
    """Check the prerequisites, train in a subprocess that resumes by itself, report what its result.json says."""
    from fw_model.report.figures import loss_curve_png
    from fw_pipeline.steps.settings import PROJECT
    from fw_pipeline.steps.training_plan import plan_training

    plan = plan_training(resource.settings(), stage)
    plan.write_preset()
    context.log.info("output: %s", plan.output)
    if plan.stage1_checkpoint:
        context.log.info("starts from %s", plan.stage1_checkpoint)
    # The launcher kills what has not ended before Dagster gives up on the launcher.
    environment = plan.environment(grace=TERMINATION_TIMEOUT_SECONDS - 30)
    try:
        pipes.run(command=plan.command(), env=environment, context=context, cwd=str(PROJECT))
    except Exception as error:  # Dagster's class for a process that failed is private; that process has told its own error
        raise TrainingError(
            f"{stage}: the training processes failed ({error}); their own output, above or in the run's stderr, says why",
            f"What they saved is kept in {plan.output}: launched again, the job goes on from there",
        ) from error
    result = plan.result()
    if result is None:
        raise TrainingError(f"{stage}: training ended without {plan.output / 'result.json'}", "Launch the job again to resume it")
    found = result["validation"]
    losses = {f"{name} {when}": value for when in ("before", "after") for name, value in found[when].items() if "/" not in name}
    return dg.MaterializeResult(
        metadata={
            "checkpoint": dg.MetadataValue.path(str(plan.output / result["checkpoint"])),
            "steps": result["steps"],
            "seconds": result["seconds"],
            "loss curves": picture(loss_curve_png(plan.output / "metrics.jsonl")),
            "dataset": result["dataset_digest"],
            **losses,
        }
    )
