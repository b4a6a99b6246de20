"""Dagster resources: the pipeline under one configuration, and the client that runs training in its own processes."""

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import dagster as dg
from pydantic import Field, create_model

from fw_pipeline.steps.settings import Settings, names, settings_from_env

if TYPE_CHECKING:
    from fw_pipeline.steps.pipeline import Pipeline

# A stopped run may finish its step and save before it is killed; the full model's state takes minutes to write.
TERMINATION_TIMEOUT_SECONDS = 600


def launchpad_type(name: str, kind: Any) -> Any:
    """The type of a setting as Dagster's config system knows it: choices as an enum, folders as text, tuples as lists."""
    if get_origin(kind) is Literal:
        return Enum(f"pipeline_{name}", {value: value for value in get_args(kind)})
    if type(None) in get_args(kind):
        (kind,) = set(get_args(kind)) - {type(None)}
    return {Path: str, tuple[str, ...]: list[str]}.get(kind, kind)


def launchpad_fields() -> dict[str, Any]:
    """A field of run config for each name of the settings; unset, the profile's and the environment's value stays."""
    return {
        name: (launchpad_type(name, info.annotation) | None, Field(None, description=info.description))
        for name, info in names().items()
    }


if TYPE_CHECKING:
    FromSettings = dg.ConfigurableResource
else:
    FromSettings = create_model("FromSettings", __base__=dg.ConfigurableResource, **launchpad_fields())


class PipelineResource(FromSettings):
    """What `fw_pipeline.steps.settings` declares, each setting open to run config; unset: of profile and variables."""

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """Raise ConfigError for a value that does not fit before any step runs; Dagster itself knows types and choices only."""
        self.settings().load_preset()
        if context.instance is not None and context.run_id:
            from fw_pipeline.slots import claim

            claim(context.instance, context.run_id)

    def settings(self) -> Settings:
        given = {name: getattr(self, name) for name in names()}
        return settings_from_env(**{name: value.value if isinstance(value, Enum) else value for name, value in given.items()})

    def build(self) -> "Pipeline":
        # Imported here: every step is a new process, and most never touch torch or COLMAP.
        from fw_pipeline.steps.pipeline import Pipeline

        return Pipeline(self.settings())


PIPELINE = PipelineResource()  # what runs, sensor, schedule and launcher are given
RESOURCES = {
    "pipeline": PIPELINE,
    "pipes": dg.PipesSubprocessClient(termination_timeout_seconds=TERMINATION_TIMEOUT_SECONDS),
}
