"""Which frame of the video a row of a pose file is about, where its rows say so in their first column."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

UNITS = {"seconds": 1.0, "milliseconds": 1e3, "microseconds": 1e6, "nanoseconds": 1e9}


def frames_of(times: np.ndarray, video: Sequence[float]) -> np.ndarray:
    """Index [T] of the video's frame that each row is about.

    Rows are numbered by frame, from 0 or 1, or timed in one of `UNITS`, by the video's own clock or from its first frame; or,
    when there are as many rows as frames, from a start of their own (a piece of a longer film). A timed row must be within half a
    frame of its own.

    Args:
        times: [T] the rows' first column.
        video: presentation time of each frame in seconds, ascending.

    Raises ValueError when nothing matches, or two readings name different frames.
    """
    falling = np.flatnonzero(np.diff(times) <= 0)
    if len(falling):
        raise ValueError(f"the times of its rows do not ascend: {times[falling[0]]:g} is followed by {times[falling[0] + 1]:g}")
    readings = dict(_readings(times, np.asarray(video, np.float64)))
    if not readings and len(times) == len(video):
        readings = dict(_readings(times - times[0], np.asarray(video, np.float64)))
    if not readings:
        span = f"{times[0]:.10g} to {times[-1]:.10g}"
        raise ValueError(
            f"the times of its {len(times)} rows ({span}) match no frames of the video "
            f"({len(video)} from {video[0]:.2f} s to {video[-1]:.2f} s)"
        )
    (first, frames), *others = readings.items()
    for name, other in others:
        if not np.array_equal(frames, other):
            raise ValueError(
                f"the first column may be {first} (frames {frames[0]} to {frames[-1]}) or {name} ({other[0]} to {other[-1]})"
            )
    return frames


def _readings(times: np.ndarray, video: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """(what the column would be, frame [T] of each row) of everything it may be."""
    if (times == times.round()).all():
        for base in (0, 1):
            # Numbers that begin above 1 are taken to begin at 0: a stretch of the video.
            if times[0] >= base and times[-1] - base < len(video) and (base == 0 or times[0] == 1):
                yield f"frame numbers from {base}", times.astype(int) - base
    for name, unit in UNITS.items():
        for clock, start in (("by the video's clock", 0.0), ("from its first frame", float(video[0]))):
            if (frames := _nearest(times / unit + start, video)) is not None:
                yield f"{name} {clock}", frames


def _nearest(times: np.ndarray, video: np.ndarray) -> np.ndarray | None:
    """The frame nearest to each time; None unless all are within half a frame of one of their own."""
    after = np.searchsorted(video, times).clip(1, max(1, len(video) - 1))
    frames = after - (times - video[after - 1] <= video[np.minimum(after, len(video) - 1)] - times)
    half = 0.5 * float(np.median(np.diff(video))) if len(video) > 1 else np.inf
    near = np.abs(video[frames] - times) <= half
    return frames if near.all() and (np.diff(frames) > 0).all() else None
