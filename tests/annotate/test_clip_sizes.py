"""Sizes of clips: pixels, intrinsics and depth map exactly between a video's size and a clip's."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fw_pipeline.annotate.clips import (
    FrameTransform,
    annotation_size,
)
from fw_pipeline.annotate.types import Clip

SIZES = st.tuples(*[st.integers(8, 400)] * 4)


@given(SIZES, st.floats(50, 500), st.floats(-100, 500), st.floats(-100, 500))
def test_intrinsics_map_both_ways(sizes, focal, cx, cy) -> None:
    transform = FrameTransform(*sizes)
    k = np.array([[focal, 0, cx], [0, focal * 1.01, cy], [0, 0, 1.0]])
    np.testing.assert_allclose(transform.intrinsics_to_source(transform.intrinsics_to_target(k)), k, rtol=1e-9, atol=1e-9)
    there = transform.intrinsics_to_target(np.stack([k, k]))
    point = np.array([0.3, -0.2, 1.0])
    u, v, _ = k @ point
    np.testing.assert_allclose(
        (there[1] @ point)[:2], [u * transform.scale - transform.left, v * transform.scale - transform.top]
    )


@given(SIZES)
def test_the_crop_is_centred_and_stays_inside_the_source(sizes) -> None:
    h, w, height, width = sizes
    transform = FrameTransform(*sizes)
    centre = transform.intrinsics_to_target(np.array([[1, 0, w / 2], [0, 1, h / 2], [0, 0, 1.0]]))
    np.testing.assert_allclose(centre[:2, 2], [width / 2, height / 2])
    assert min(transform.left, transform.top) >= -1e-9
    assert min(abs(transform.left), abs(transform.top)) < 1e-9


@pytest.mark.parametrize("size", [(32, 64), (40, 64), (45, 33), (96, 200)])
def test_pixels_land_where_the_intrinsics_say(size) -> None:
    # A picture that is linear in its coordinates keeps its values under resampling, wherever the coordinates go.
    h, w = 90, 121
    v, u = np.mgrid[:h, :w] + 0.5
    picture = np.stack([u * 2, v * 2, np.full_like(u, 7)], -1)
    transform = FrameTransform(h, w, *size)
    out = transform.apply(np.round(picture).astype(np.uint8)[None])[0]
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    expected = np.stack([(x + transform.left) / transform.scale * 2, (y + transform.top) / transform.scale * 2], -1)
    inner = (slice(3, -3), slice(3, -3))
    assert np.abs(out[..., :2] - expected)[inner].max() <= 1.1
    assert abs((out[..., :2] - expected)[inner].mean()) < 0.1


def test_depth_of_a_plane_is_exact_at_another_size() -> None:
    k = np.array([[80, 0, 56], [0, 80, 32], [0, 0, 1.0]])
    transform = FrameTransform(64, 112, 20, 33)

    def plane(k, h, w) -> np.ndarray:
        v, u = np.mgrid[:h, :w] + 0.5
        rays = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(k).T
        return 1 / (rays @ np.array([0.02, 0.2, 0.3]))

    got = transform.depth_to_target(plane(k, 64, 112)[None])[0]
    np.testing.assert_allclose(got, plane(transform.intrinsics_to_target(k), 20, 33), rtol=1e-9)


def test_depth_is_never_mixed_across_an_edge_nor_with_the_unknown() -> None:
    depth = np.full((24, 40), 2.0, np.float32)
    depth[:, 17:] = 5
    depth[9:, :] = 0
    got = FrameTransform(24, 40, 11, 18).depth_to_target(depth)
    assert set(np.unique(got)) == {0.0, 2.0, 5.0}
    assert got.dtype == np.float32


def test_frames_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="frames are 4x6, expected 8x8"):
        FrameTransform(8, 8, 4, 4).apply(np.zeros((4, 6, 3), np.uint8))


def clip_of(source, bucket) -> Clip:
    return Clip("c", "v.mp4", "0", 0, 16.0, (0.0,), *source, *bucket)


@pytest.mark.parametrize(
    ("source", "bucket", "limit", "expected"),
    [
        ((256, 448), (64, 112), 448, (256, 448)),
        ((720, 1280), (64, 112), 500, (256, 448)),  # whole multiples of 16 that keep 4:7
        ((150, 1280), (64, 112), 500, (128, 224)),  # no more than the source's height
        ((720, 1280), (336, 592), 592, (336, 592)),
        ((720, 1280), (336, 592), 448, (252, 444)),  # no multiple of 16 has this aspect
        ((1280, 720), (592, 336), 600, (592, 336)),
        ((40, 64), (64, 112), 448, (36, 63)),
    ],
)
def test_annotation_size_keeps_the_buckets_aspect(source, bucket, limit, expected) -> None:
    height, width = annotation_size(clip_of(source, bucket), limit)
    assert (height, width) == expected
    assert height * bucket[1] == width * bucket[0]


@given(st.integers(20, 2000), st.integers(20, 2000), st.integers(1, 40), st.integers(1, 40), st.integers(64, 1200))
def test_annotation_size_never_enlarges_the_source(h, w, a, b, limit) -> None:
    size = annotation_size(clip_of((h, w), (16 * a, 16 * b)), limit)
    assert size[0] * b == size[1] * a
    smallest = max(a, b) // np.gcd(a, b)
    if smallest <= min(h, w, limit):
        assert size[0] <= h
        assert size[1] <= w
        assert max(size) <= limit
