"""Validation: one self-contained HTML report per stage, and a thumbnail of it in the UI."""

import dagster as dg

from fw_model.config import Stage
from fw_model.errors import MissingInput
from fw_pipeline.assets.pictures import picture
from fw_pipeline.assets.training import stage1_checkpoint, stage2_checkpoint
from fw_pipeline.failures import explained
from fw_pipeline.resources import PipelineResource


@dg.asset(deps=[stage1_checkpoint], group_name="validate", kinds={"html"}, pool="gpu")
def stage1_report(context: dg.AssetExecutionContext, pipeline: PipelineResource) -> dg.MaterializeResult:
    """Ground truth beside stage 1's prediction: depth, points, cameras, loss curves, numbers."""
    return report(context, pipeline, "stage1")


@dg.asset(deps=[stage2_checkpoint], group_name="validate", kinds={"html"}, pool="gpu")
def stage2_report(context: dg.AssetExecutionContext, pipeline: PipelineResource) -> dg.MaterializeResult:
    """Ground truth beside stage 2's prediction: depth, points, cameras, loss curves, numbers."""
    return report(context, pipeline, "stage2")


@explained()
def report(context: dg.AssetExecutionContext, resource: PipelineResource, stage: Stage) -> dg.MaterializeResult:
    """Write the report of the finished run of this configuration and dataset."""
    from fw_model.report.predict import write_report
    from fw_pipeline.steps.store import Store
    from fw_pipeline.steps.training_plan import plan_training

    settings = resource.settings()
    plan = plan_training(settings, stage)
    if plan.result() is None:
        raise MissingInput(f"{stage} has not finished in {plan.output}", f"Run: dagster job execute -j {stage}_training")
    path = Store(settings.data).report(stage)
    summary = write_report(plan.output, plan.dataset, path, device=settings.device)
    context.log.info("report: %s", path)
    return dg.MaterializeResult(
        metadata={
            "report": dg.MetadataValue.url(path.resolve().as_uri()),
            "picture": picture(summary.thumbnail),
            **summary.numbers,
        }
    )
