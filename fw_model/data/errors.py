"""What may be wrong with a dataset."""

from __future__ import annotations


class DatasetError(ValueError):
    """A dataset that is missing, damaged or not what was asked for; the message names the file and clip."""


class MissingDatasetError(DatasetError, FileNotFoundError):
    """There is no dataset where one was expected."""


class PackInProgressError(DatasetError):
    """Another process is packing into the same folder."""
