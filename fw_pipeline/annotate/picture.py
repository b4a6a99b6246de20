"""What a coded picture says of itself, read in one place and either applied or refused by its name.

Orientation (display matrix), pixel aspect, transfer, primaries, matrix, range, interlacing and alpha. A picture that leaves
`Frame.rgb` is upright, in square pixels, progressive, opaque, and BT.709 as an ordinary screen shows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import av
import numpy as np
from av.sidedata.sidedata import SideData, Type
from av.video.codeccontext import VideoCodecContext
from av.video.reformatter import ColorPrimaries, ColorTrc

from fw_pipeline.annotate.tone import LIGHT, PRIMARIES, to_bt709
from fw_pipeline.annotate.types import VideoSetAside

FULL_RANGE = 2
UNSPECIFIED = 2  # of transfer, primaries and matrix alike (ITU-T H.273)
MATRICES = {1, UNSPECIFIED, 4, 5, 6, 7, 9}  # that swscale converts: BT.709, FCC, BT.601 twice, SMPTE 240M, BT.2020
OTHER_MATRICES = {8: "YCgCo", 10: "BT.2020 constant luminance", 14: "ICtCp", 15: "IPT-C2 (Dolby Vision profile 5)"}
# BT.709 and those of standard definition, which differ from it by a few grey levels: shown as they are, as most players do.
ORDINARY_PRIMARIES = {1, UNSPECIFIED, 5, 6, 7, 22}
ORDINARY_TRANSFERS = {1, UNSPECIFIED, 4, 5, 6, 7, 11, 12, 13, 14, 15}  # gamma of a screen, in one wording or another
WIDEST_PIXEL = 4.0  # the widest in use are the 2:1 of anamorphic film; beyond twice that it is a mistake, and a huge picture
STRAIGHT = 0.01  # a matrix within 0.6 degrees of a quarter turn is one: cosines are stored rounded
OPAQUE_AT = 256  # long side of the picture that transparent parts are looked for in, pixels
TOP_FIRST, INTERLACED = (2, 4), (2, 3, 4, 5)  # AVFieldOrder: whose top field is shown first, and all that have two fields
FRAMES_TELL = {"h264", "mpeg2video", "mpeg1video", "prores", "dnxhd", "vc1", "dvvideo", "mpeg4"}  # decoders that flag each frame


@dataclass(frozen=True)
class Declared:
    """What the track's header says, for frames that say nothing themselves. Read it before the first frame is decoded."""

    matrix: int
    transfer: int
    primaries: int
    full_range: int
    field_order: int
    codec: str
    alpha: bool

    @staticmethod
    def of(codec: VideoCodecContext, metadata: dict[str, str]) -> Declared:
        """`metadata` is the track's: Matroska says there that a second layer, which is not decoded, holds the alpha."""
        colours = (int(codec.colorspace), int(codec.color_trc), int(codec.color_primaries), int(codec.color_range))
        return Declared(*colours, int(codec.field_order), codec.codec.canonical_name, metadata.get("alpha_mode") == "1")


@dataclass(frozen=True)
class Look:
    """How to show a coded picture: first transposed, then mirrored, then its light brought to BT.709."""

    transposed: bool
    mirrored: bool  # left to right
    flipped: bool  # top to bottom
    aspect: float  # width of a coded pixel in units of its height
    matrix: int | None  # of the header, where the frame has none of its own
    full_range: int | None
    light: str | None  # transfer to undo, a key of `tone.LIGHT`; None: shown as it is
    primaries: str  # a key of `tone.PRIMARIES`

    def upright(self, pixels: np.ndarray) -> np.ndarray:
        """A coded picture [h, w, ...] as it is to be shown."""
        if self.transposed:
            pixels = pixels.swapaxes(0, 1)
        return np.ascontiguousarray(pixels[:: -1 if self.flipped else 1, :: -1 if self.mirrored else 1])


def look_of(raw: av.VideoFrame, declared: Declared, aspect: float) -> Look:
    """Read a frame's orientation and colours. Raises VideoSetAside, without the file's name, for what cannot be applied."""
    transposed, mirrored, flipped = _orientation(raw)
    if not 1 / WIDEST_PIXEL <= aspect <= WIDEST_PIXEL:
        raise VideoSetAside(f"pixel aspect {aspect:.4g}: no picture has such pixels; mend the file's header")
    matrix, full_range = raw.colorspace, raw.color_range
    light, primaries = _light(raw, declared)
    return Look(
        *(transposed, mirrored, flipped, aspect),
        matrix=declared.matrix if matrix == UNSPECIFIED != declared.matrix else None,
        full_range=declared.full_range if not full_range and declared.full_range else None,
        light=light,
        primaries=primaries,
    )


def _orientation(raw: av.VideoFrame) -> tuple[bool, bool, bool]:
    """(transposed, mirrored, flipped) of the display matrix: x' = a x + c y, y' = b x + d y, x right and y down."""
    side = _side(raw, Type.DISPLAYMATRIX)
    if side is None:
        return False, False, False
    a, b, u, c, d, v, *_ = (int(value) for value in np.frombuffer(bytes(side), np.int32, 9))
    along, across = min(abs(a), abs(d)), min(abs(b), abs(c))
    if not (u or v) and max(abs(b), abs(c)) < STRAIGHT * along:
        return False, a < 0, d < 0
    if not (u or v) and max(abs(a), abs(d)) < STRAIGHT * across:
        return True, c < 0, b < 0
    raise VideoSetAside("display matrix: turned by no whole quarter; turn its pixels themselves and clear the matrix")


def _side(raw: av.VideoFrame, kind: Type) -> SideData | None:
    return raw.side_data.get(kind)  # type: ignore[call-overload]  # its stub says str


def _light(raw: av.VideoFrame, declared: Declared) -> tuple[str | None, str]:
    """(transfer to undo or None, primaries), as keys of `tone`; VideoSetAside for those that have no place there."""
    transfer, primaries, matrix = (
        said if said != UNSPECIFIED else header
        for said, header in (
            (int(raw.color_trc), declared.transfer),
            (int(raw.color_primaries), declared.primaries),
            (int(raw.colorspace), declared.matrix),
        )
    )
    if matrix not in MATRICES and not raw.format.is_rgb:
        name = OTHER_MATRICES.get(matrix, f"number {matrix} of ITU-T H.273")
        raise VideoSetAside(f"colour matrix: {name} is not read here; convert it to BT.709")
    if transfer == UNSPECIFIED and _side(raw, Type.DOVI_METADATA) is not None:
        raise VideoSetAside("transfer: Dolby Vision without an ordinary layer (profile 5); convert it to BT.709")
    wide = PRIMARIES.keys() & {primaries}
    if transfer not in LIGHT and transfer not in ORDINARY_TRANSFERS:
        raise VideoSetAside(f"transfer: {_named(ColorTrc, transfer)} is not read here; convert it to BT.709")
    if not wide and primaries not in ORDINARY_PRIMARIES:
        raise VideoSetAside(f"primaries: {_named(ColorPrimaries, primaries)} are not read here; convert it to BT.709")
    if transfer in LIGHT:
        # A picture for HDR screens that names no primaries means BT.2100's, which are BT.2020's.
        return LIGHT[transfer], "bt2020" if primaries == UNSPECIFIED else PRIMARIES.get(primaries, "bt709")
    return ("gamma", PRIMARIES[primaries]) if wide else (None, "bt709")


def _named(names: type, number: int) -> str:
    try:
        return str(names(number).name)
    except ValueError:
        return f"number {number} of ITU-T H.273"


@dataclass(frozen=True)
class Frame:
    """One decoded frame. `height` and `width` are those of the upright picture with square pixels."""

    time: float  # seconds
    look: Look
    raw: av.VideoFrame

    @cached_property
    def size(self) -> tuple[int, int]:
        height, width = self.raw.height, max(1, round(self.raw.width * self.look.aspect))
        return (width, height) if self.look.transposed else (height, width)

    @property
    def height(self) -> int:
        return self.size[0]

    @property
    def width(self) -> int:
        return self.size[1]

    def rgb(self) -> np.ndarray:
        """[height, width, 3] uint8."""
        return self._picture(self.height, self.width, "rgb24")

    def thumbnail(self, long_side: int) -> np.ndarray:
        """Small [h, w, 3] uint8 in BGR, at most `long_side` pixels."""
        scale = min(1.0, long_side / max(self.height, self.width))
        return self._picture(max(2, round(self.height * scale)), max(2, round(self.width * scale)), "bgr24")

    def check_opaque(self) -> None:
        """Raises VideoSetAside, without the file's name, where pixels are transparent: what lies behind them is not known.

        Looks at the picture made smaller: a single pixel at the edge of a title does not show there, and does not matter.
        """
        if any(part.is_alpha for part in self.raw.format.components) or self.raw.format.name == "pal8":
            scale = min(1.0, OPAQUE_AT / max(self.raw.height, self.raw.width))
            height, width = (max(2, round(side * scale)) for side in (self.raw.height, self.raw.width))
            alpha = self.raw.reformat(width=width, height=height, format="rgba").to_ndarray()[..., 3]
            if alpha.min() < 250:  # resizing and 8 bits round an opaque 255 down by one or two
                raise VideoSetAside("alpha: parts of its pictures are transparent; put them on a background")

    def _picture(self, height: int, width: int, layout: str) -> np.ndarray:
        if self.look.transposed:
            height, width = width, height
        coded = {"src_colorspace": self.look.matrix, "src_color_range": self.look.full_range}
        if self.look.light is None:
            return self.look.upright(self.raw.reformat(width=width, height=height, format=layout, **coded).to_ndarray())
        # Of other light, the planes are only resized here: `tone` is exact where swscale's own 16-bit RGB is not.
        is_rgb = self.raw.format.is_rgb
        pixels = self.raw.reformat(width=width, height=height, format="gbrp16le" if is_rgb else "yuv444p16le").to_ndarray()
        shown = to_bt709(pixels, self.look.light, self.look.primaries, *self._coding())
        return self.look.upright(shown if layout == "rgb24" else shown[..., ::-1])

    def _coding(self) -> tuple[int, bool]:
        """(matrix, full range) of the codes; a wide picture that names no matrix has its primaries' own."""
        if self.raw.format.is_rgb:
            return 0, True
        matrix = self.raw.colorspace if self.look.matrix is None else self.look.matrix
        if matrix == UNSPECIFIED:
            matrix = 9 if self.look.primaries == "bt2020" else 1
        return int(matrix), (self.look.full_range or self.raw.color_range) == FULL_RANGE


class Deinterlacer:
    """Makes one progressive frame of each interlaced one, at the same time, from its neighbours' fields (FFmpeg's bwdif).

    Progressive frames pass untouched. From the first interlaced frame on, each comes out when the next has gone in.
    """

    def __init__(self, declared: Declared) -> None:
        self._declared = declared
        self._graph: av.filter.Graph | None = None

    def push(self, raw: av.VideoFrame) -> Iterator[av.VideoFrame]:
        """Frames that are ready. Raises VideoSetAside, without the file's name, for fields in frames of their own."""
        by_header = self._declared.field_order in INTERLACED and self._declared.codec not in FRAMES_TELL
        if raw.interlaced_frame or by_header:
            if self._declared.codec == "hevc":
                raise VideoSetAside("interlaced: its fields are frames of their own; deinterlace it")
            if self._graph is None:
                parity = "auto" if raw.interlaced_frame else ("tff" if self._declared.field_order in TOP_FIRST else "bff")
                self._graph = _bwdif(raw, parity, "interlaced" if parity == "auto" else "all")
        if self._graph is None:
            yield raw
        else:
            self._graph.push(raw)
            yield from self._ready()

    def finish(self) -> Iterator[av.VideoFrame]:
        """The frame that is still held."""
        if self._graph is not None:
            self._graph.push(None)
            yield from self._ready()

    def _ready(self) -> Iterator[av.VideoFrame]:
        assert self._graph is not None
        while True:
            try:
                yield self._graph.pull()  # type: ignore[misc]
            except (BlockingIOError, EOFError):  # nothing more for now; nothing more at all
                return


def _bwdif(raw: av.VideoFrame, parity: str, which: str) -> av.filter.Graph:
    graph = av.filter.Graph()
    source = graph.add_buffer(width=raw.width, height=raw.height, format=raw.format, time_base=raw.time_base)
    graph.link_nodes(source, graph.add("bwdif", f"mode=send_frame:parity={parity}:deint={which}"), graph.add("buffersink"))
    graph.configure()
    return graph
