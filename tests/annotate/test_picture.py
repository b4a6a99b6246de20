"""What a picture says of itself is applied, or refused by its name."""

import numpy as np
import pytest

from fw_pipeline.annotate.tone import _xyz, to_bt709
from fw_pipeline.annotate.types import VideoSetAside
from fw_pipeline.annotate.video import decode
from tests.helpers.made_videos import pan, write

ONE = 1 << 16
# The eight ways to lay a picture down, as FFmpeg writes matrices (a, b, u, c, d, v, x, y, w), and what each shows.
ORIENTATIONS = {
    "as it is": ((ONE, 0, 0, ONE), lambda f: f),
    "half turn": ((-ONE, 0, 0, -ONE), lambda f: f[::-1, ::-1]),
    "mirrored": ((-ONE, 0, 0, ONE), lambda f: f[:, ::-1]),
    "flipped": ((ONE, 0, 0, -ONE), lambda f: f[::-1]),
    "clockwise": ((0, ONE, -ONE, 0), lambda f: np.rot90(f, -1)),
    "counterclockwise": ((0, -ONE, ONE, 0), lambda f: np.rot90(f)),
    "transposed": ((0, ONE, ONE, 0), lambda f: f.swapaxes(0, 1)),
    "transposed the other way": ((0, -ONE, -ONE, 0), lambda f: np.rot90(f, 2).swapaxes(0, 1)),
}
PATCHES = np.array([(200, 30, 30), (30, 200, 30), (30, 30, 200), (128, 128, 128), (240, 240, 240), (20, 20, 20), (120, 60, 180)])
BT709_TO_2020 = np.linalg.inv(_xyz("bt2020")) @ _xyz("bt709")


def shown(path) -> list[np.ndarray]:
    return [frame.rgb() for frame in decode(path)]


def refusal(path) -> str:
    with pytest.raises(VideoSetAside) as caught:
        list(decode(path))
    assert str(caught.value).startswith(f"{path.name}: ")
    return str(caught.value)


def matrix(a: int, b: int, c: int, d: int) -> tuple[int, ...]:
    return (a, b, 0, c, d, 0, 0, 0, 1 << 30)


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_every_display_matrix_of_whole_quarters_is_applied(tmp_path, name) -> None:
    numbers, lay = ORIENTATIONS[name]
    frames = pan(4)
    plain = shown(write(tmp_path / "plain.mp4", frames))
    video = write(tmp_path / "turned.mp4", frames, matrix=matrix(*numbers))
    (first, *_) = decode(video)
    np.testing.assert_array_equal(shown(video)[2], lay(plain[2]))
    assert (first.height, first.width) == lay(frames[0]).shape[:2]
    assert first.thumbnail(96).shape == lay(frames[0]).shape


def test_a_display_matrix_of_other_angles_is_refused(tmp_path) -> None:
    video = write(tmp_path / "slant.mp4", pan(4), matrix=matrix(46341, 46341, -46341, 46341))
    assert "display matrix: turned by no whole quarter" in refusal(video)


# ------------------------------------------------------------------------------------------------------------------ light


def ycbcr(rgb: np.ndarray, kr: float, kb: float) -> np.ndarray:
    """RGB in 0..1 [..., 3] -> limited-range Y, Cb, Cr of 16 bits [..., 3]."""
    luma = rgb @ [kr, 1 - kr - kb, kb]
    blue, red = (rgb[..., 2] - luma) / (2 - 2 * kb), (rgb[..., 0] - luma) / (2 - 2 * kr)
    return np.round(256 * np.stack([16 + 219 * luma, 128 + 224 * blue, 128 + 224 * red], -1)).astype(np.uint16)


def pq(light: np.ndarray) -> np.ndarray:
    power = (light * 203 / 10000).clip(0) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)


def hlg(light: np.ndarray) -> np.ndarray:
    scene = (light * 203 / 1000).clip(0) ** (1 / 1.2)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), a * np.log(np.maximum(12 * scene - b, 1e-9)) + c)


def gamma(light: np.ndarray) -> np.ndarray:
    return light.clip(0) ** (1 / 2.4)


def patches() -> np.ndarray:
    return np.repeat(np.repeat(PATCHES[None], 32, 0), 32, 1) / 255  # [32, 224, 3]


@pytest.mark.parametrize(("transfer", "number"), [(pq, 16), (hlg, 18), (gamma, 14), (gamma, 1)])
@pytest.mark.parametrize("name", ["a.mov", "a.mkv"])
def test_known_colours_of_hdr_and_wide_gamut_come_out_within_six_levels(tmp_path, transfer, number, name) -> None:
    codes = ycbcr(transfer(patches() ** 2.4 @ BT709_TO_2020.T), 0.2627, 0.0593)
    video = write(
        *(tmp_path / name, [codes] * 2),
        layout="yuv420p10le",
        format="yuv444p16le",
        colours=(9, number, 9, 1),
        encoder={"crf": "4"},
    )
    middles = shown(video)[0][16, 16::32].astype(int)
    assert np.abs(middles - PATCHES).max() <= 6
    (frame, *_) = decode(video)
    assert np.abs(frame.thumbnail(224)[16, 16::32, ::-1].astype(int) - PATCHES).max() <= 6


def test_light_brighter_than_white_keeps_its_order_and_its_hue() -> None:
    light = np.linspace(0, 5, 40)[:, None, None] * [1.0, 1.0, 0.5]
    out = to_bt709(np.round(65535 * pq(light @ BT709_TO_2020.T)).astype(np.uint16), "pq", "bt2020")[:, 0].astype(int)
    assert (np.diff(out[:, 0]) >= 0).all()
    assert out[-1, 0] == 255
    np.testing.assert_allclose(out[8:, 2] / out[8:, 0], 0.5 ** (1 / 2.4), atol=0.02)


def test_display_p3_is_brought_to_bt709() -> None:
    red_of_bt709 = np.linalg.solve(_xyz("display-p3"), _xyz("bt709") @ [1, 0, 0])
    codes = np.round(65535 * gamma(red_of_bt709)).astype(np.uint16)[None, None]
    np.testing.assert_allclose(to_bt709(codes, "gamma", "display-p3")[0, 0], [255, 0, 0], atol=1)


@pytest.mark.parametrize("full_range", [1, 2])
def test_an_ordinary_picture_is_converted_as_its_own_matrix_and_range_say(tmp_path, full_range) -> None:
    codes = ycbcr(patches(), 0.2126, 0.0722).astype(int)
    if full_range == 2:
        codes = (codes - [4096, 32768, 32768]) * 255 / [219, 224, 224] + [0, 32768, 32768]
    video = write(
        *(tmp_path / "a.mkv", [codes.astype(np.uint16)] * 2),
        layout="yuv444p",
        format="yuv444p16le",
        colours=(1, 1, 1, full_range),
    )
    assert np.abs(shown(video)[0][16, 16::32].astype(int) - PATCHES).max() <= 4


@pytest.mark.parametrize(
    ("colours", "said"),
    [((9, 8, 9, 1), "transfer: LINEAR"), ((9, 16, 10, 1), "primaries: SMPTE428"), ((10, 16, 9, 1), "matrix: BT.2020 constant")],
)
def test_light_that_is_not_read_is_refused_by_its_name(tmp_path, colours, said) -> None:
    assert said in refusal(write(tmp_path / "a.mkv", pan(2), colours=colours))


def test_transparent_pictures_are_refused_and_opaque_ones_with_an_alpha_layer_are_not(tmp_path) -> None:
    opaque = [np.dstack([frame, np.full((48, 96), 255, np.uint8)]) for frame in pan(3)]
    settings = {"codec": "prores_ks", "layout": "yuva444p10le", "format": "rgba", "encoder": {"profile": "4444"}}
    assert len(shown(write(tmp_path / "opaque.mov", opaque, **settings))) == 3
    holes = [frame.copy() for frame in opaque]
    holes[2][10:30, 20:50, 3] = 0
    assert "alpha: parts of its pictures are transparent" in refusal(write(tmp_path / "holes.mov", holes, **settings))


# ----------------------------------------------------------------------------------------------------------- interlacing


def comb(frame: np.ndarray) -> float:
    """How much lines differ from the mean of their neighbours."""
    grey = frame.astype(float).mean(-1)
    return float(np.abs(grey[1:-1] - (grey[:-2] + grey[2:]) / 2).mean())


def woven(frames: list[np.ndarray], top_first: bool) -> list[np.ndarray]:
    """Two frames in one: their even and their odd lines."""
    out = []
    for early, late in zip(frames[::2], frames[1::2], strict=True):
        both = late.copy()
        both[0 if top_first else 1 :: 2] = early[0 if top_first else 1 :: 2]
        out.append(both)
    return out


@pytest.mark.parametrize("top_first", [True, False])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_interlaced_frames_lose_their_combs_and_keep_their_times(tmp_path, name, top_first) -> None:
    moving = [np.ascontiguousarray(frame) for frame in pan(40)]
    times = np.arange(20) / 24
    order = {"flags": "+ilme+ildct", "x264-params": f"{'tff' if top_first else 'bff'}=1"}
    video = write(tmp_path / name, woven(moving, top_first), times, encoder=order)
    found = list(decode(video))
    assert any(frame.raw.interlaced_frame for frame in found) is False
    np.testing.assert_allclose([frame.time for frame in found], times, atol=2e-3)
    assert len(found) == 20
    combs = np.mean([comb(frame) for frame in woven(moving, top_first)])
    clean = np.mean([comb(frame) for frame in moving])
    assert combs > 2 * clean
    left = np.mean([comb(frame.rgb()) for frame in found])
    assert left - clean < 0.25 * (combs - clean)
