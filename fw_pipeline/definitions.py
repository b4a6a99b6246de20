"""The one Definitions object: assets, checks, jobs, sensor, schedule, resources."""

import dagster as dg

from fw_pipeline.assets import annotation, dataset, training, validation, videos, worlds
from fw_pipeline.checks import CHECKS
from fw_pipeline.failures import console
from fw_pipeline.jobs import JOBS
from fw_pipeline.resources import RESOURCES
from fw_pipeline.schedules import reannotate
from fw_pipeline.sensors import new_videos

defs = dg.Definitions(
    assets=dg.load_assets_from_modules([videos, annotation, dataset, training, validation, worlds]),
    asset_checks=CHECKS,
    jobs=JOBS,
    sensors=[new_videos],
    schedules=[reannotate],
    resources=RESOURCES,
    loggers={"console": console},
)
