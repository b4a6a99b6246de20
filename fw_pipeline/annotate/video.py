"""Decoding: a file's frames with their presentation times, as they are to be shown; and encoding.

Frames are streamed: memory does not grow with a video's length. Times are `pts * time_base` in seconds, never a frame count
over a nominal rate, so variable frame rates come out right.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition
from av.video.stream import VideoStream

from fw_pipeline.annotate.picture import Declared, Deinterlacer, Frame, look_of
from fw_pipeline.annotate.types import VideoSetAside
from fw_pipeline.annotate.whole import check_whole

# Only real containers: a playlist dressed up as a video could make the demuxer open other files.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,asf,flv"
SEEK_MARGIN = 1.0  # seconds: containers seek by decode time, which runs ahead of presentation time
LONGEST_PAUSE = 3600.0  # seconds between two frames; clips never reach over one, and a clock that jumps so far is broken

logging.getLogger("libav").setLevel(logging.CRITICAL)  # what libav has to say arrives as exceptions, with the file's name


@contextmanager
def open_video(path: Path) -> Iterator[tuple[av.container.InputContainer, VideoStream, Fraction]]:
    """The container, its video track and the track's unit of time in seconds.

    Raises VideoSetAside for a file that holds no readable video.
    """
    size = path.stat().st_size
    if size == 0:
        raise VideoSetAside(f"{path.name}: empty file (0 bytes)")
    with path.open("rb") as file:
        is_mp4 = file.read(12)[4:8] == b"ftyp"
    try:
        container = av.open(str(path.absolute()), options={"format_whitelist": FORMATS}, metadata_errors="replace")
    except av.FFmpegError as error:
        reason = (
            "truncated: an MP4 without its index (moov)" if is_mp4 else "not a video (MP4, MOV, MKV, WebM, AVI, MPEG, WMV or FLV)"
        )
        raise VideoSetAside(f"{path.name}: {reason}") from error
    with container:
        streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams:
            kinds = {stream.type for stream in container.streams}
            raise VideoSetAside(f"{path.name}: {'audio only' if kinds == {'audio'} else 'no readable video track, truncated?'}")
        stream = streams[0]
        if stream.codec_context is None or stream.time_base is None:
            raise VideoSetAside(f"{path.name}: its video codec is unknown here; convert it to H.264")
        end = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
        if end > size:
            raise VideoSetAside(f"{path.name}: truncated: {size} bytes of at least {end}")
        stream.thread_type = "AUTO"
        yield container, stream, stream.time_base


def decode(path: Path, start: float | None = None) -> Generator[Frame]:
    """Frames in presentation order, each later than the one before, interlaced ones made progressive.

    Args:
        path: the file.
        start: seconds; frames from a little before this time on (a key frame), where the container can seek. Without it,
            every frame, and the end is checked against the length that the file declares.

    Raises VideoSetAside for a file that is not a video, is truncated or damaged on the way, whose frames' order or times cannot
    be trusted, or whose pictures say something of themselves that cannot be applied.
    """
    last, clock = -np.inf, _Clock()
    with open_video(path) as (container, stream, tick), _naming(path):
        declared = Declared.of(stream.codec_context, stream.metadata)
        if declared.alpha:
            raise VideoSetAside("alpha: its pictures are transparent, by a second layer; put them on a background")
        deinterlacer, aspect = Deinterlacer(declared), float(stream.sample_aspect_ratio or 1)
        # AVI knows no presentation times: those of reordered frames are found by counting from the first.
        clock.counts = container.format.name == "avi" and bool(stream.codec_context.has_b_frames)
        if start is not None and not clock.counts:
            ticks = int((start - SEEK_MARGIN) / tick)
            with suppress(av.FFmpegError):  # a container that cannot seek is read from its start
                container.seek(max(ticks, stream.start_time or 0), stream=stream)
        try:
            for raw in _progressive(_decoded(container, stream, clock, start is None), deinterlacer):
                time = _time(raw)
                if start is not None and time <= last:
                    continue  # what a seek stirs up; the first pass saw every frame in its order
                _check_order(last, time)
                frame = Frame(time, look_of(raw, declared, aspect), raw)
                if start is None:
                    frame.check_opaque()
                yield frame
                last = time
        except av.FFmpegError as error:
            raise VideoSetAside(f"damaged or truncated after {max(last, 0):.2f} s: {error.strerror}") from error
        if start is None and np.isfinite(last):
            clock.check_paired()
            check_whole(path, container, stream, tick, max(float(clock.end * tick), last))


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Puts the file's name before the reason."""
    try:
        yield
    except VideoSetAside as reason:
        named = str(reason).startswith(f"{path.name}: ")
        raise (reason if named else VideoSetAside(f"{path.name}: {reason}")) from reason.__cause__


@dataclass
class _Clock:
    """Times of a track's packets, in its ticks: until when they last, and where the container has no others, whose they are."""

    end: int = 0  # by the packets' own durations
    counts: bool = False  # frames take the packets' times in turn: decoders give them in order of presentation
    packets: int = 0
    frames: int = 0
    waiting: deque[int | None] = field(default_factory=deque)

    def packet(self, packet: av.Packet) -> None:
        if packet.size:
            time = packet.dts if packet.pts is None or self.counts else packet.pts
            if time is not None:
                self.end = max(self.end, time + (packet.duration or 0))
            if self.counts:
                self.packets += 1
                self.waiting.append(time)

    def frame(self, raw: av.VideoFrame) -> None:
        if self.counts:
            self.frames += 1
            raw.pts = self.waiting.popleft() if self.waiting else None

    def check_paired(self) -> None:
        if self.counts and self.packets != self.frames:
            raise VideoSetAside(
                f"frames out of order: an AVI of {self.packets} packets and {self.frames} frames, and no times that say which is "
                "which; convert it to MP4"
            )


def _decoded(
    container: av.container.InputContainer, stream: VideoStream, clock: _Clock, from_start: bool
) -> Iterator[av.VideoFrame]:
    """Frames as the decoder gives them, with their times. Raises VideoSetAside for corrupt ones and for those without a time."""
    last = 0.0
    for packet in container.demux(stream):
        clock.packet(packet)
        for raw in packet.decode():
            assert isinstance(raw, av.VideoFrame)
            clock.frame(raw)
            if raw.is_corrupt and not from_start:
                continue  # frames just after a seek may lean on ones before it
            if raw.is_corrupt:
                raise VideoSetAside(f"damaged after {last:.2f} s")
            last = _time(raw)
            yield raw


def _time(raw: av.VideoFrame) -> float:
    """Presentation time, seconds."""
    if raw.pts is None or raw.time_base is None:
        raise VideoSetAside("frames without timestamps; convert it to MP4")
    return float(raw.pts * raw.time_base)


def _progressive(frames: Iterable[av.VideoFrame], deinterlacer: Deinterlacer) -> Iterator[av.VideoFrame]:
    for raw in frames:
        yield from deinterlacer.push(raw)
    yield from deinterlacer.finish()


def _check_order(last: float, time: float) -> None:
    if time < last:
        raise VideoSetAside(f"frames out of order: {time:.3f} s comes after {last:.3f} s; convert it to MP4")
    if time == last:
        raise VideoSetAside(f"frames out of order: two of them at {time:.3f} s; convert it to MP4")
    if np.isfinite(last) and time - last > LONGEST_PAUSE:
        raise VideoSetAside(f"times cannot be trusted: nothing between {last:.2f} s and {time:.2f} s; convert it to MP4")
