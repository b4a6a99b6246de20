"""Videos made on the spot with PyAV: small, and of the kinds that people have."""

from __future__ import annotations

from fractions import Fraction

import av
import cv2
import numpy as np

TICK = Fraction(1, 12000)


def world(seed: int) -> np.ndarray:
    """A large smooth picture that frames are cut from; strong in brightness, weak in colour, which codecs blur."""
    rng = np.random.default_rng(seed)
    noise = 40 + 150 * rng.random((40, 60, 1)) + 20 * rng.random((40, 60, 3))
    return cv2.resize(noise, (480, 320), interpolation=cv2.INTER_LINEAR).astype(np.uint8)


def pan(count: int, seed: int = 0) -> list[np.ndarray]:
    """Frames [48, 96, 3] of a camera moving right."""
    return [np.ascontiguousarray(world(seed)[:48, i : i + 96]) for i in range(count)]


def write(
    path,
    frames,
    times=None,
    codec="libx264",
    gop=6,
    turns=0,
    matrix=None,
    aspect=None,
    options=None,
    encoder=None,
    layout="yuv420p",
    colours=None,
    format="rgb24",
):
    """Encode frames, by default at 24 fps.

    `turns` marks the container as to be shown turned counterclockwise, `matrix` is its whole display matrix. `colours` are the
    tags (matrix, transfer, primaries, range) of ITU-T H.273; `format` is that of the frames given, `layout` of those coded.
    """
    times = np.arange(len(frames)) / 24 if times is None else times
    # Else x264 gives other bytes from run to run, and two videos of the same frames differ by some grey levels.
    same = {"x264-params": "mbtree=0:threads=1"} if codec == "libx264" else {}
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=24, options={"crf": "8"} | same | (encoder or {}))
        first = av.VideoFrame.from_ndarray(np.ascontiguousarray(frames[0]), format=format)
        stream.height, stream.width = first.height, first.width
        stream.bit_rate = 4_000_000  # for codecs without a constant quality
        stream.pix_fmt, stream.time_base = layout, TICK
        stream.codec_context.time_base, stream.codec_context.gop_size = TICK, gop
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if turns:
            stream.set_display_rotation(90 * turns)
        if matrix:
            stream.set_display_matrix(matrix)
        if colours:
            context = stream.codec_context
            context.colorspace, context.color_trc, context.color_primaries, context.color_range = colours
        for time, frame in zip(times, frames, strict=True):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format=format)
            if colours:
                picture.color_range = colours[3]
            picture.pts, picture.time_base = round(time / TICK), TICK
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path
