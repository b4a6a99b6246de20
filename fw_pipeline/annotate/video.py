"""Decoding: a file's frames with their presentation times, upright, in RGB; and one pass over all of them that finds the shots.

Frames are streamed: memory does not grow with a video's length. Times are `pts * time_base` in seconds, never a frame count
over a nominal rate, so variable frame rates come out right.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition
from av.video.stream import VideoStream
from tqdm import tqdm

from fw_pipeline.annotate.types import VideoSetAside

# Only real containers: a playlist dressed up as a video could make the demuxer open other files.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"
THUMBNAIL = 256  # long side of the frames that shots are detected on, pixels
SEEK_MARGIN = 1.0  # seconds: containers seek by decode time, which runs ahead of presentation time

logging.getLogger("libav").setLevel(logging.CRITICAL)  # what libav has to say arrives as exceptions, with the file's name


@dataclass(frozen=True)
class Frame:
    """One decoded frame. `height` and `width` are those of the upright picture with square pixels."""

    time: float  # seconds
    height: int
    width: int
    quarter_turns: int  # counterclockwise, from the container's display matrix
    raw: av.VideoFrame

    def rgb(self) -> np.ndarray:
        """[height, width, 3] uint8."""
        return self._picture(self.height, self.width, "rgb24")

    def thumbnail(self, long_side: int) -> np.ndarray:
        """Small [h, w, 3] uint8 in BGR, at most `long_side` pixels."""
        scale = min(1.0, long_side / max(self.height, self.width))
        return self._picture(max(2, round(self.height * scale)), max(2, round(self.width * scale)), "bgr24")

    def _picture(self, height: int, width: int, layout: str) -> np.ndarray:
        if self.quarter_turns % 2:
            height, width = width, height
        pixels = self.raw.reformat(width=width, height=height, format=layout).to_ndarray()
        return np.ascontiguousarray(upright(pixels, self.quarter_turns))


def upright(pixels: np.ndarray, quarter_turns: int) -> np.ndarray:
    """Turn a coded frame [h, w, 3] counterclockwise by quarters, as its container asks."""
    return np.rot90(pixels, quarter_turns % 4)


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
        reason = "truncated: an MP4 without its index (moov)" if is_mp4 else "not a video (MP4, MOV, MKV, WebM or AVI)"
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
    """Frames in presentation order, each later than the one before.

    Args:
        path: the file.
        start: seconds; frames from a little before this time on (a key frame), where the container can seek. Without it,
            every frame, and the end is checked against the length that the file declares.

    Raises VideoSetAside for a file that is not a video, is truncated, or is damaged on the way.
    """
    before, last = -np.inf, -np.inf
    with open_video(path) as (container, stream, tick):
        if start is not None:
            ticks = int((start - SEEK_MARGIN) / tick)
            with suppress(av.FFmpegError):  # a container that cannot seek is read from its start
                container.seek(max(ticks, stream.start_time or 0), stream=stream)
        aspect = float(stream.sample_aspect_ratio or 1)
        try:
            for raw in container.decode(stream):
                if raw.is_corrupt and start is not None:
                    continue  # frames just after a seek may lean on ones before it
                if raw.is_corrupt:
                    raise VideoSetAside(f"{path.name}: damaged after {max(last, 0):.2f} s")
                if raw.pts is None:
                    raise VideoSetAside(f"{path.name}: frames without timestamps; convert it to MP4")
                time = float(raw.pts * tick)
                if time > last:
                    yield _frame(raw, time, aspect)
                    before, last = last, time
        except av.FFmpegError as error:
            raise VideoSetAside(f"{path.name}: damaged or truncated after {max(last, 0):.2f} s: {error.strerror}") from error
        if start is None and np.isfinite(before):
            _check_whole(path, container, stream, tick, 2 * last - before)


def _frame(raw: av.VideoFrame, time: float, aspect: float) -> Frame:
    turns = round(raw.rotation / 90)
    height, width = raw.height, round(raw.width * aspect)
    return Frame(time, *((width, height) if turns % 2 else (height, width)), quarter_turns=turns, raw=raw)


def _check_whole(path: Path, container: av.container.InputContainer, stream: VideoStream, tick: Fraction, end: float) -> None:
    """Refuse a file whose frames end before the length it declares: the rest is missing.

    MP4 and MOV are exempt: their index has been held against the file's size, and an edit list may rightly shorten them.
    """
    tag = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))  # Matroska, per track
    if "mp4" in container.format.name:
        return
    if stream.duration:
        declared = float(stream.duration * tick)
    elif tag:
        declared = 3600 * int(tag[1]) + 60 * int(tag[2]) + float(tag[3])
    elif len(container.streams) == 1 and container.duration:
        declared = container.duration / av.time_base
    else:
        return
    if end < declared - 0.25 - 0.01 * declared:
        raise VideoSetAside(f"{path.name}: truncated: its frames end at {end:.2f} s of {declared:.2f} s")


@dataclass(frozen=True)
class Scan:
    """What one pass over a video finds."""

    times: np.ndarray  # [N] float64 seconds, ascending
    shots: tuple[tuple[int, int], ...]  # (first frame, one past the last) of every shot, in order, covering all frames
    height: int
    width: int


def scan(path: Path) -> Scan:
    """Times of all frames, and the shots. Raises VideoSetAside as `decode` does, or when frames change size or are none."""
    detector, times, sizes = _ShotDetector(), [], set()
    with closing(decode(path)) as frames:
        for frame in tqdm(frames, desc=path.name, unit=" frames", disable=None, leave=False, delay=5):
            sizes.add((frame.height, frame.width))
            if len(sizes) > 1:
                raise VideoSetAside(f"{path.name}: its frames change size at {frame.time:.2f} s; convert it to one size")
            times.append(frame.time)
            detector.add(frame.thumbnail(THUMBNAIL))
    if not times:
        raise VideoSetAside(f"{path.name}: no frame could be decoded")
    edges = [0, *detector.finish(), len(times)]
    (height, width) = sizes.pop()
    return Scan(np.array(times), tuple(pairwise(edges)), height, width)


class _ShotDetector:
    """PySceneDetect's AdaptiveDetector (robust to camera motion), fed frame by frame and counting frames, not time.

    It compares a frame with the `WINDOW` frames around it and so is blind at both ends; the first and the last frame are
    shown to it again to open its eyes there. Short shots are kept apart: merged ones would put a cut inside a clip.
    """

    WINDOW = 2

    def __init__(self) -> None:
        from scenedetect import AdaptiveDetector  # slow to import, and only needed where videos are cut

        self._detector = AdaptiveDetector(window_width=self.WINDOW, min_scene_len=1)
        self._shown = 0
        self._cuts: set[int] = set()
        self._last: np.ndarray | None = None

    def add(self, thumbnail: np.ndarray) -> None:
        for _ in range(1 if self._shown else 1 + self.WINDOW):
            self._show(thumbnail)
        self._last = thumbnail

    def finish(self) -> list[int]:
        """Index of the first frame of every shot but the first."""
        if self._last is not None:
            for _ in range(self.WINDOW):
                self._show(self._last)
        return sorted(self._cuts)

    def _show(self, thumbnail: np.ndarray) -> None:
        from scenedetect import FrameTimecode

        cuts = self._detector.process_frame(FrameTimecode(self._shown, fps=1.0), thumbnail)
        self._cuts |= {cut.frame_num - self.WINDOW for cut in cuts if cut.frame_num > self.WINDOW}
        self._shown += 1


def write_video(path: Path, frames: Iterable[np.ndarray], fps: float) -> None:
    """Encode RGB frames [h, w, 3] uint8 (even sizes) as H.264 mp4; frame i is presented at i / fps seconds."""
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(str(path), "w", format="mp4") as container:
        stream = None
        for index, frame in enumerate(frames):
            if stream is None:
                # Without mbtree, because with it x264 gives other bytes from run to run.
                options = {"crf": "14", "x264-params": "mbtree=0"}
                stream = container.add_stream("libx264", rate=rate, options=options)
                stream.height, stream.width = frame.shape[:2]
                stream.pix_fmt, stream.codec_context.thread_count = "yuv420p", 1
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture.pts, picture.time_base = index, 1 / rate
            container.mux(stream.encode(picture))
        if stream is not None:
            container.mux(stream.encode())
