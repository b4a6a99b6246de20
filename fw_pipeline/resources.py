"""Dagster resources: the pipeline under one configuration, and the client that runs training in its own processes."""

from typing import TYPE_CHECKING

import dagster as dg

from fw_pipeline.steps.settings import Settings, settings_from_env

if TYPE_CHECKING:
    from fw_pipeline.steps.pipeline import Pipeline

# A stopped run may finish its step and save before it is killed; the full model's state takes minutes to write.
TERMINATION_TIMEOUT_SECONDS = 600


class PipelineResource(dg.ConfigurableResource):
    """What `fw_pipeline.steps.settings` says, each field open to run config; None keeps the profile's and environment's value."""

    data: str | None = None
    videos: str | None = None
    preset: str | None = None
    overrides: list[str] | None = None
    annotation_long_side: int | None = None
    geometry: str | None = None
    depth: str | None = None
    device: str | None = None
    dtype: str | None = None
    dust3r_model: str | None = None
    dust3r_revision: str | None = None
    dust3r_window: int | None = None
    dust3r_keyframe_every: int | None = None
    dust3r_batch: int | None = None
    depth_model: str | None = None
    depth_revision: str | None = None
    depth_batch: int | None = None
    processes: int | None = None
    val_percent: float | None = None

    def settings(self) -> Settings:
        return settings_from_env(
            **{name: getattr(self, name) for name in type(self).model_fields if name in Settings.model_fields}
        )

    def build(self) -> "Pipeline":
        # Imported here: every step is a new process, and most never touch torch or COLMAP.
        from fw_pipeline.steps.pipeline import Pipeline

        return Pipeline(self.settings())


RESOURCES = {
    "pipeline": PipelineResource(),
    "pipes": dg.PipesSubprocessClient(termination_timeout_seconds=TERMINATION_TIMEOUT_SECONDS),
}
