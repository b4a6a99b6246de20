"""Every error whose message a person can act on, and the commands that those messages name."""

from __future__ import annotations

BUILD_DATASET = "python -m fw_pipeline.launch build_dataset"
TRAIN_STAGE1 = "dagster job execute -j stage1_training"


class TrainingError(RuntimeError):
    """A run that cannot start or go on; the message says what is wrong, where, and what to do."""


class DatasetError(ValueError):
    """A dataset that is missing, damaged or not what was asked for; the message names the file and clip."""


class MissingDatasetError(DatasetError, FileNotFoundError):
    """There is no dataset where one was expected."""


class PackInProgressError(DatasetError):
    """Another process is packing into the same folder."""


class ConfigError(ValueError):
    """A preset, file or override that cannot be used; the message names the key and what is accepted."""
