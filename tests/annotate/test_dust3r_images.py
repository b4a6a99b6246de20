"""Images as DUSt3R reads them: the size rule, orientation, odd formats, and the exact way back to their own pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fw_pipeline.annotate.dust3r import network_size, prepare

ROTATED = 6  # EXIF orientation: the camera was held turned; show the pixels turned a quarter clockwise


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth coloured picture [h, w, 3] uint8 without any symmetry."""
    small = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ((1280, 720), (512, 288)),
        ((480, 854), (288, 512)),
        ((640, 480), (512, 384)),
        ((333, 777), (208, 512)),
        ((512, 288), (512, 288)),
        ((96, 96), (512, 512)),
    ],
)
def test_sizes_are_those_of_the_table(source: tuple[int, int], expected: tuple[int, int]) -> None:
    assert network_size(source[1], source[0])[::-1] == expected  # the table says width x height
    assert prepare(picture(source[1], source[0])).frames.shape == (1, expected[1], expected[0], 3)


@pytest.mark.parametrize("source", [(720, 1280), (854, 480), (100, 100)])
def test_a_network_trained_at_224_gets_the_centre_square(source: tuple[int, int]) -> None:
    prepared = prepare(picture(*source), size=224)
    assert prepared.frames.shape == (1, 224, 224, 3)
    assert prepared.transform.scale == pytest.approx(224 / min(source))
    middle = picture(*source)[source[0] // 2 - 2 : source[0] // 2 + 2, source[1] // 2 - 2 : source[1] // 2 + 2].mean((0, 1))
    np.testing.assert_allclose(prepared.frames[0, 110:114, 110:114].mean((0, 1)), middle, atol=3)


@given(st.integers(40, 4000), st.integers(40, 4000))
@settings(max_examples=100, deadline=None)
def test_little_is_cut_off_and_sizes_are_whole_tokens(height: int, width: int) -> None:
    if max(height, width) > 25 * min(height, width):
        return
    rows, columns = network_size(height, width)
    assert rows % 16 == columns % 16 == 0
    assert max(rows, columns) == 512
    scale = 512 / max(height, width)
    assert height * scale - rows < 16.5
    assert width * scale - columns < 16.5


def test_an_image_too_narrow_for_one_token_is_refused() -> None:
    with pytest.raises(ValueError, match="10x900"):
        prepare(np.zeros((10, 900, 3), np.uint8))


@pytest.mark.parametrize(
    ("height", "width", "size"), [(777, 333, 512), (333, 777, 512), (480, 854, 512), (120, 90, 512), (300, 500, 224)]
)
def test_what_is_at_a_source_pixel_lies_where_the_intrinsics_say(height: int, width: int, size: int) -> None:
    source = np.zeros((height, width, 3), np.uint8)
    row, column = int(height * 0.4), int(width * 0.55)
    source[row - 3 : row + 3, column - 3 : column + 3] = 255  # its middle is the corner of four pixels: (column, row)
    prepared = prepare(source, size)
    weight = prepared.frames[0, ..., 0].astype(float)
    v, u = (np.indices(weight.shape) + 0.5).reshape(2, -1) @ weight.ravel() / weight.sum()
    pixel = np.array([[700.0, 0, column], [0, 700.0, row], [0, 0, 1]])  # a camera whose axis goes through the dot
    mapped = prepared.transform.intrinsics_to_target(pixel)
    np.testing.assert_allclose([u, v], mapped[:2, 2], atol=0.05)
    assert mapped[0, 0] == mapped[1, 1]  # square pixels stay square
    np.testing.assert_allclose(prepared.transform.intrinsics_to_source(mapped), pixel, rtol=1e-12)


def test_a_photograph_is_turned_upright(tmp_path: Path) -> None:
    upright = picture(90, 60)
    exif = Image.Exif()
    exif[0x0112] = ROTATED
    Image.fromarray(np.rot90(upright)).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(upright).save(tmp_path / "plain.png")
    turned, plain = prepare(tmp_path / "turned.png"), prepare(str(tmp_path / "plain.png"))
    assert turned.frames.shape == (1, 512, 336, 3)
    assert turned.transform == plain.transform
    np.testing.assert_array_equal(turned.frames, plain.frames)


def test_transparency_is_dropped_in_files_and_arrays(tmp_path: Path) -> None:
    solid = picture(64, 96)
    see_through = np.dstack([solid, np.full((64, 96), 7, np.uint8)])
    Image.fromarray(see_through).save(tmp_path / "rgba.png")
    for image in (tmp_path / "rgba.png", see_through):
        np.testing.assert_array_equal(prepare(image).frames, prepare(solid).frames)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "LA"])
def test_other_colour_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(picture(64, 96)).convert(mode)
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    image.save(path)
    np.testing.assert_array_equal(prepare(path).frames, prepare(np.asarray(image.convert("RGB"))).frames)


def test_unreadable_photographs_are_named(tmp_path: Path) -> None:
    Image.fromarray(picture(64, 96)).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-400])
    (tmp_path / "text.jpg").write_text("not a picture")
    Image.fromarray(np.full((64, 96), 40000, np.uint16)).save(tmp_path / "sixteen.png")
    for name in ("cut.jpg", "text.jpg", "sixteen.png", "absent.jpg"):
        with pytest.raises(ValueError, match=name):
            prepare(tmp_path / name)


@pytest.mark.parametrize(
    "array", [np.zeros((64, 96)), np.zeros((64, 96, 3)), np.zeros((0, 64, 96, 3), np.uint8), np.zeros((64, 96, 2), np.uint8)]
)
def test_arrays_that_are_no_images_are_refused(array: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        prepare(array)


def test_frames_of_a_video_come_out_as_each_alone() -> None:
    frames = np.stack([picture(100, 150, seed) for seed in range(3)])
    prepared = prepare(frames, size=96)
    assert prepared.frames.shape == (3, 64, 96, 3)
    for frame, together in zip(frames, prepared.frames, strict=True):
        np.testing.assert_array_equal(prepare(frame, size=96).frames[0], together)


def test_an_image_of_the_right_size_is_not_resampled() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 288, 512, 3), dtype=np.uint8)
    prepared = prepare(frames)
    np.testing.assert_array_equal(prepared.frames, frames)
    assert prepared.transform.scale == 1


def test_the_network_reads_minus_one_to_one_channels_first() -> None:
    frames = np.zeros((1, 288, 512, 3), np.uint8)
    frames[..., 0], frames[..., 1] = 255, 51
    pixels = prepare(frames).tensor()
    assert pixels.shape == (1, 3, 288, 512)
    assert pixels.dtype == torch.float32
    expected = (torch.tensor([255.0, 51.0, 0.0]) / 255 - 0.5) / 0.5
    torch.testing.assert_close(pixels[0, :, 5, 7], expected)
