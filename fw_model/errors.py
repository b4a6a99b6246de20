"""Every error whose message a person can act on, the commands that those messages name, and the one place that shows them."""

from __future__ import annotations

import difflib
import errno
import functools
import sys
from collections.abc import Callable, Iterable
from typing import ParamSpec

ANNOTATE_VIDEOS = "python -m fw_pipeline.launch annotate_videos"
BUILD_DATASET = "python -m fw_pipeline.launch build_dataset"
TRAIN_STAGE1 = "dagster job execute -j stage1_training"

P = ParamSpec("P")

# What the system may refuse and a person can mend -> what to do. Any other OSError is a fault and keeps its stack.
REMEDIES = {
    errno.ENOENT: "Check the path",
    errno.ENOTDIR: "A file stands where a folder is needed: check the path",
    errno.EISDIR: "A folder stands where a file is needed: check the path",
    errno.EEXIST: "Something is there already: check the path",
    errno.ENOTEMPTY: "Something is there already: check the path",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.EMFILE: "Allow more open files: ulimit -n 65536",
    errno.EACCES: "Check who may read and write there",
    errno.EPERM: "Check who may read and write there",
    errno.EROFS: "Choose a place that can be written",
    errno.ENOSPC: "Free some space, or choose another disk, and run the same command again",
    errno.EDQUOT: "Free some space, or choose another disk, and run the same command again",
}


class Explained(Exception):
    """An error that is no fault of the code: what is wrong and where, then, where it is known, what to do next.

    Every `main` shows it without a stack (`explain_errors`); a Dagster step fails with it as its message.
    """

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n{self.remedy}" if self.remedy else self.message


class MissingInput(Explained, RuntimeError):
    """Something that an earlier job makes, or that a person provides, is not there; the remedy names the job to run."""


class TrainingError(Explained, RuntimeError):
    """A run that cannot start or go on; the message says what is wrong, where, and what to do."""


class DatasetError(Explained, ValueError):
    """A dataset that is missing, damaged or not what was asked for; the message names the file and clip."""


class MissingDatasetError(DatasetError, FileNotFoundError):
    """There is no dataset where one was expected."""


class PackInProgressError(DatasetError):
    """Another process is packing into the same folder."""


class ConfigError(Explained, ValueError):
    """A preset, file or override that cannot be used; the message names the key and what is accepted."""


class EncoderError(Explained, RuntimeError):
    """Encoder weights that are missing or do not load; the message says what to fetch."""


class BadFileError(Explained, ValueError):
    """A file that is not what its name promises; the message names it, with the line or what it lacks."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` with the nearest of the known names, "" where none is near. Takes as long as there are names."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def explanation(error: BaseException) -> str | None:
    """What to tell a person about an error; None when it is a fault of the code, whose stack is wanted."""
    if isinstance(error, Explained):
        return str(error)
    if not isinstance(error, OSError) or error.errno not in REMEDIES:
        return None
    files = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    return f"{files}: {error.strerror}. {REMEDIES[error.errno]}" if files else f"{error.strerror}. {REMEDIES[error.errno]}"


def explain_errors(main: Callable[P, int]) -> Callable[P, int]:
    """Decorator of every `main`: what a person can mend is one `error: ...` on stderr and exit code 1, never a stack."""

    @functools.wraps(main)
    def explained(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except (Explained, OSError) as error:
            text = explanation(error)
            if text is None:
                raise
            print(f"error: {text}", file=sys.stderr)
            return 1

    return explained
