"""Run config is made from the settings: the same names, types and descriptions, and what does not fit never reaches a step."""

from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from fw_pipeline.definitions import defs
from fw_pipeline.launch import launch
from fw_pipeline.partitions import register
from fw_pipeline.resources import PIPELINE, PipelineResource
from fw_pipeline.steps.settings import names, roles, settings_from_env

# A value of every setting that is not the one it has without.
OTHER: dict[str, Any] = {
    "data": "/d",
    "videos": "/v",
    "requests": "/r",
    "linked_folders": True,
    "linked_files": True,
    "preset": "wan2.1-fun-1.3b",
    "overrides": ["stage1.steps=3"],
    "annotation_long_side": 320,
    "geometry": "dust3r",
    "dust3r_model": "somebody/dust3r",
    "dust3r_revision": "v2",
    "dust3r_window": 3,
    "dust3r_keyframe_every": 4,
    "dust3r_batch": 5,
    "depth": "depth-anything-v2",
    "depth_model": "somebody/depth",
    "depth_revision": "v3",
    "depth_batch": 6,
    "device": "cuda",
    "dtype": "bfloat16",
    "processes": 2,
    "val_percent": 7.5,
}


def annotate(**config: Any) -> dg.ExecuteInProcessResult:
    with dg.DagsterInstance.ephemeral() as instance:
        tags = register(instance, list(PIPELINE.build().videos))
        run_config = {"resources": {"pipeline": {"config": config}}}
        job = defs.resolve_job_def("annotate_videos")
        return job.execute_in_process(run_config=run_config, instance=instance, tags=tags, raise_on_error=False)


def test_run_config_has_every_setting_with_its_description_and_no_other() -> None:
    fields = PipelineResource.to_config_schema().as_field().config_type.fields  # type: ignore[attr-defined]
    assert {name: field.description for name, field in fields.items()} == {n: info.description for n, info in names().items()}
    for role, engines in roles().items():
        choices = fields[role].config_type.inner_type.config_values
        assert choices == list(engines)


def test_every_field_of_run_config_is_the_setting_of_that_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PROFILE", *(name.upper() for name in names())):
        monkeypatch.delenv(f"FW_{name}", raising=False)
    chosen = {role: OTHER[role] for role in roles()}
    for name in names():
        given = (
            {name: OTHER[name]}
            if name in roles() or name in type(PIPELINE.settings()).model_fields
            else {name: OTHER[name], **chosen}
        )
        assert PipelineResource(**given).settings() == settings_from_env(**given) != settings_from_env(**{**given, name: None}), (
            name
        )
    assert PipelineResource().settings() == settings_from_env()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"geometry": "colmpa"}, "pipeline:config:geometry not in enum .*colmpa"),
        ({"dust3r_windw": 3}, 'unexpected config entry "dust3r_windw"'),
        ({"geometry": "dust3r", "dust3r_window": "wide"}, "pipeline:config:dust3r_window"),
    ],
)
def test_an_unknown_engine_name_or_type_is_refused_before_there_is_a_run(
    environment: Path, config: dict[str, Any], said: str
) -> None:
    with pytest.raises(dg.DagsterInvalidConfigError, match=said):
        annotate(**config)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"geometry": "dust3r", "dust3r_window": 0}, "dust3r_window: Input should be greater than or equal to 1"),
        ({"dust3r_window": 3}, "set geometry: dust3r beside it"),
        ({"overrides": ["stage1.stepz=3"]}, "stage1.stepz"),
    ],
)
def test_a_value_out_of_bounds_is_refused_by_its_name_before_the_first_step(
    environment: Path, config: dict[str, Any], said: str
) -> None:
    run = annotate(**config)
    assert not run.success
    assert not [event for event in run.all_events if event.is_step_start]
    (failure,) = [event for event in run.all_events if event.is_resource_init_failure]
    assert said in failure.engine_event_data.error.to_string()  # type: ignore[union-attr]


def test_the_launcher_refuses_settings_before_it_starts_a_run(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fw_model.config import ConfigError

    monkeypatch.setenv("FW_PROCESSES", "0")
    with dg.DagsterInstance.ephemeral() as instance:
        with pytest.raises(ConfigError, match="processes: "):
            launch(instance, "stage1_training")
        assert instance.get_runs_count() == 0


def test_runs_sensor_schedule_and_launcher_are_given_the_same_object() -> None:
    assert defs.resources is not None
    assert defs.resources["pipeline"] is PIPELINE
    for used in (defs.resolve_sensor_def("new_videos"), defs.resolve_schedule_def("reannotate")):
        assert used.required_resource_keys == {"pipeline"}
