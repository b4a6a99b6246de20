"""How a step fails in Dagster when its message says all: `dg.Failure` with the message, and no stack on the console."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dagster as dg

from fw_model.errors import explanation

STACK = "\n\nStack Trace:\n"


@contextmanager
def explained() -> Iterator[None]:
    """Around a step's body, or as a decorator: what a person can mend fails the step with its message. Nothing is retried."""
    try:
        yield
    except Exception as error:
        text = explanation(error)
        if text is None:
            raise
        raise dg.Failure(text, allow_retries=False) from None


class WithoutStack(logging.Formatter):
    """Another formatter's lines, but for the stack of a `dg.Failure`, which is raised to be read by a person."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self.formatter = formatter

    def format(self, record: logging.LogRecord) -> str:
        event: dg.DagsterEvent | None = getattr(record, "dagster_meta", {}).get("dagster_event")
        if event is not None and _is_failure(event):
            message = record.getMessage().partition(STACK)[0]
            record = logging.makeLogRecord({**record.__dict__, "msg": message, "args": None})
        return self.formatter.format(record)


def _is_failure(event: dg.DagsterEvent) -> bool:
    """Whether an event tells of a step, or of a run through its first step, that failed with `dg.Failure`."""
    data: Any = event.event_specific_data
    error = getattr(data, "error", None) or getattr(getattr(data, "first_step_failure_event", None), "step_failure_data", None)
    error = getattr(error, "error", error)
    return getattr(error, "cls_name", None) == dg.Failure.__name__


@dg.logger(
    {
        "log_level": dg.Field(str, is_required=False, default_value="INFO", description="The logger's threshold."),
        "name": dg.Field(str, is_required=False, default_value="dagster", description="The name in front of its lines."),
    }
)
def console(context: dg.InitLoggerContext) -> logging.Logger:
    """Dagster's console, without the stack of a failure that is explained."""
    made = dg.colored_console_logger.logger_fn(context)  # type: ignore[operator]
    for handler in made.handlers:
        handler.setFormatter(WithoutStack(handler.formatter or logging.Formatter()))
    return made
