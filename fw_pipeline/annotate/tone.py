"""Light: pictures meant for other screens (HDR, wide gamut) brought to BT.709, as an ordinary screen shows them.

Both HDR transfers are taken to the light of a display (ITU-R BT.2100; HLG at its nominal 1000 cd/m2), 203 cd/m2 being the
white of an ordinary picture (ITU-R BT.2408), and from there to BT.709 with the gamma of 2.4 of ITU-R BT.1886. What is darker
than KNEE comes out exactly as it is; brighter light is rolled off towards white. HLG's display gamma of 1.2 is applied to
each of red, green and blue, as zimg (FFmpeg's zscale) does and undoes it; BT.2100 applies it to luminance, which gives the
same greys and makes saturated colours stronger.
"""

from __future__ import annotations

from functools import cache

import numpy as np

WHITE = 203.0  # cd/m2, of a sheet of paper in an HDR picture (BT.2408)
# Share of white from which highlights are compressed. Below, colours are exact; at 0.9 white itself comes out at 251 of 255,
# and what is brighter has the four levels above.
KNEE = 0.9
ROWS = 256  # converted at once: memory does not grow with the picture
FINE = 4096  # steps of the last table, evenly in the square root of light: each is less than a tenth of an 8-bit level

LIGHT = {16: "pq", 18: "hlg"}  # ITU-T H.273 transfer characteristics
PRIMARIES = {9: "bt2020", 11: "dci-p3", 12: "display-p3"}  # ITU-T H.273 colour primaries, those wider than BT.709

# CIE x, y of red, green, blue and white.
CHROMATICITIES = {
    "bt709": ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060), (0.3127, 0.3290)),
    "bt2020": ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), (0.3127, 0.3290)),
    "dci-p3": ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), (0.314, 0.351)),
    "display-p3": ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), (0.3127, 0.3290)),
}
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


# Kr, Kb of the luma of ITU-T H.273 matrix coefficients.
LUMA = {1: (0.2126, 0.0722), 4: (0.30, 0.11), 5: (0.299, 0.114), 6: (0.299, 0.114), 7: (0.212, 0.087), 9: (0.2627, 0.0593)}


def to_bt709(codes: np.ndarray, light: str, primaries: str, matrix: int = 0, full_range: bool = True) -> np.ndarray:
    """Codes of a picture [h, w, 3] uint16 -> BT.709 RGB [h, w, 3] uint8.

    Args:
        codes: of 16 bits.
        light: their transfer: `pq`, `hlg`, or `gamma` (BT.1886).
        primaries: a key of CHROMATICITIES.
        matrix: a key of LUMA when the codes are Y, Cb, Cr; 0 when they are R, G, B.
        full_range: whether black and white are 0 and 65535, else 16 * 256 and 235 * 256.
    """
    out = np.empty(codes.shape, np.uint8)
    for top in range(0, len(codes), ROWS):
        band = _rgb(codes[top : top + ROWS], matrix, full_range)
        band = _linear(light)[(band.clip(0, 1) * 65535 + 0.5).astype(np.uint16)]
        band = band @ _to_bt709(primaries).astype(np.float32).T
        if light != "gamma":
            peak = np.maximum(band.max(-1, keepdims=True), KNEE)
            band *= (1 - (1 - KNEE) * np.exp((KNEE - peak) / (1 - KNEE))) / peak
        steps = np.sqrt(band.clip(0, 1)) * (FINE - 1) + 0.5
        out[top : top + ROWS] = _codes()[steps.astype(np.uint16)]
    return out


def _rgb(codes: np.ndarray, matrix: int, full_range: bool) -> np.ndarray:
    """[h, w, 3] float32, 0 black and 1 white."""
    # What swscale itself makes of 10-bit pictures is off by up to 0.3 % of white, three grey levels once the light is undone.
    black, white, colour = (0, 65535, 65535) if full_range else (16 << 8, 219 << 8, 224 << 8)
    if not matrix:
        return (codes.astype(np.float32) - black) / white
    luma = (codes[..., 0].astype(np.float32) - black) / white
    blue, red = ((codes[..., i].astype(np.float32) - 32768) / colour for i in (1, 2))
    kr, kb = LUMA[matrix]
    r, b = luma + (2 - 2 * kr) * red, luma + (2 - 2 * kb) * blue
    return np.stack([r, (luma - kr * r - kb * b) / (1 - kr - kb), b], -1)


@cache
def _linear(light: str) -> np.ndarray:
    """[65536] float32: light of a code, white being 1."""
    code = np.linspace(0, 1, 65536)
    if light == "gamma":
        return (code**2.4).astype(np.float32)
    if light == "pq":
        m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
        power = code ** (1 / m2)
        return ((10000 / WHITE) * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)).astype(np.float32)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12)
    return ((1000 / WHITE) * scene**1.2).astype(np.float32)


@cache
def _codes() -> np.ndarray:
    """[FINE] uint8: code of a light, by its square root."""
    return np.round(255 * np.linspace(0, 1, FINE) ** (2 / 2.4)).astype(np.uint8)


@cache
def _xyz(primaries: str) -> np.ndarray:
    """[3, 3]: linear RGB -> CIE XYZ, white at Y = 1."""
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in CHROMATICITIES[primaries]]).T
    return columns[:, :3] * np.linalg.solve(columns[:, :3], columns[:, 3])


@cache
def _to_bt709(primaries: str) -> np.ndarray:
    """[3, 3]: linear RGB of other primaries -> of BT.709, white staying white (Bradford)."""
    here, there = (BRADFORD @ _xyz(name).sum(1) for name in (primaries, "bt709"))
    adapted = np.linalg.inv(BRADFORD) @ np.diag(there / here) @ BRADFORD
    return np.linalg.solve(_xyz("bt709"), adapted @ _xyz(primaries))
