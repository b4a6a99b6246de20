"""What is packed is one world with one scale; what is not good enough is refused with its numbers."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from fw_pipeline.annotate.quality import check_consistency, check_depth, check_geometry, neighbour_error, to_clip_units
from fw_pipeline.annotate.types import ClipDepth, ClipGeometry, ClipSetAside

HEIGHT, WIDTH, FRAMES = 24, 32, 4


def wall(seed: int = 0) -> ClipGeometry:
    """A slanted wall seen by a camera that moves sideways and turns a little: exact depth."""
    rng = np.random.default_rng(seed)
    k = np.array([[30.0, 0, 16], [0, 30.0, 12], [0, 0, 1]])
    w2c = np.zeros((FRAMES, 3, 4))
    for t in range(FRAMES):
        w2c[t, :, :3] = Rotation.from_euler("yxz", 0.02 * t * rng.normal(size=3)).as_matrix()
        w2c[t, :, 3] = 0.1 * t * rng.normal(size=3)
    normal, offset = np.array([0.1, -0.2, 1.0]), 4.0
    v, u = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    rays = np.stack([(u - 16) / 30, (v - 12) / 30, np.ones_like(u)], -1)
    depth = np.empty((FRAMES, HEIGHT, WIDTH))
    for t in range(FRAMES):
        rotation, translation = w2c[t, :, :3], w2c[t, :, 3]
        centre = -rotation.T @ translation
        depth[t] = (offset - normal @ centre) / (rays @ rotation @ normal)
    ones = np.ones(FRAMES)
    return ClipGeometry(w2c, np.repeat(k[None], FRAMES, 0), depth, np.ones_like(depth), ones, 0 * ones, np.zeros(FRAMES, bool))


def test_exact_geometry_passes_and_its_numbers_say_so() -> None:
    numbers = check_geometry(wall())
    assert numbers["valid_fraction"] == 1
    assert numbers["neighbour_error"] < 0.02  # nearest pixel of a slanted wall
    geometry = wall()
    check_consistency(geometry.depth, geometry.intrinsics, geometry.w2c)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"interpolated": np.array([0, 1, 1, 0], bool)}, "50% of the frames"),
        ({"depth": np.zeros((FRAMES, HEIGHT, WIDTH))}, "0% of the pixels"),
        ({"reprojection_error": np.full(FRAMES, 3.0)}, "3.00 px"),
        ({"depth": np.full((FRAMES, HEIGHT, WIDTH), np.nan)}, "depth has values that are not finite"),
        ({"w2c": np.full((FRAMES, 3, 4), np.inf)}, "w2c has values that are not finite"),
    ],
)
def test_geometry_that_is_not_good_enough_is_refused_with_its_numbers(change: dict, reason: str) -> None:
    with pytest.raises(ClipSetAside, match=reason):
        check_geometry(replace(wall(), **change))


def test_frames_that_contradict_each_other_are_refused() -> None:
    geometry = wall()
    factors = np.array([1.0, 1.5, 1.0, 1.5])[:, None, None]
    with pytest.raises(ClipSetAside, match="neighbouring frames disagree"):
        check_geometry(replace(geometry, depth=geometry.depth * factors))
    assert neighbour_error(geometry.depth * factors, geometry.intrinsics, geometry.w2c) > 0.3


def test_a_clip_not_seen_from_its_first_camera_is_refused() -> None:
    geometry = wall()
    moved = geometry.w2c.copy()
    moved[0, 0, 3] = 0.01
    with pytest.raises(ClipSetAside, match="first camera is not the identity"):
        check_consistency(geometry.depth, geometry.intrinsics, moved)


def test_a_mirrored_or_stretched_rotation_is_refused() -> None:
    geometry = wall()
    for factor in (-1.0, 1.01):
        bent = geometry.w2c.copy()
        bent[2, :, :3] *= factor
        with pytest.raises(ClipSetAside, match="no rotations"):
            check_consistency(geometry.depth, geometry.intrinsics, bent)


@pytest.mark.parametrize("depth", [np.zeros((FRAMES, 2, 2)), np.full((FRAMES, 2, 2), -1.0)])
def test_depth_that_is_empty_or_negative_is_refused(depth: np.ndarray) -> None:
    geometry = wall()
    with pytest.raises(ClipSetAside, match=r"negative|not a single pixel"):
        check_consistency(depth, geometry.intrinsics, geometry.w2c)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), unit=st.floats(1e-3, 1e3))
def test_clip_units_do_not_depend_on_the_annotators_unit(seed: int, unit: float) -> None:
    geometry = wall(seed)
    scaled = geometry.w2c.copy()
    scaled[:, :, 3] *= unit
    depth, w2c, scale = to_clip_units(geometry.depth, geometry.intrinsics, geometry.w2c)
    other_depth, other_w2c, other_scale = to_clip_units(geometry.depth * unit, geometry.intrinsics, scaled)
    np.testing.assert_allclose(other_depth, depth, rtol=1e-9)
    np.testing.assert_allclose(other_w2c, w2c, rtol=1e-9, atol=1e-12)
    assert other_scale == pytest.approx(scale * unit)
    again = to_clip_units(depth, geometry.intrinsics, w2c)
    assert again[2] == pytest.approx(1)


def test_invalid_pixels_do_not_count_towards_the_scale() -> None:
    geometry = wall()
    holes = geometry.depth.copy()
    holes[:, ::2] = 0
    _, _, scale = to_clip_units(holes, geometry.intrinsics, geometry.w2c)
    assert scale == pytest.approx(to_clip_units(geometry.depth, geometry.intrinsics, geometry.w2c)[2], rel=0.05)


def final_depth(geometry: ClipGeometry, factor: np.ndarray | float = 1.0) -> ClipDepth:
    """A depth network's depth: the geometry's times `factor`."""
    ones = np.ones(FRAMES, np.float32)
    depth = geometry.depth * factor
    source = np.full(FRAMES, ClipDepth.SOURCES.index("depth-anything-v2"), np.uint8)
    return ClipDepth(depth, np.ones_like(depth), source, ones, 0 * ones, 0.9 * ones, 0.01 * ones)


def test_the_choice_of_depth_and_its_fits_become_quality_numbers() -> None:
    numbers = check_depth(final_depth(wall(), 1.02), wall())
    assert numbers["network_depth"] == 1
    assert numbers["scale_error"] == pytest.approx(0.02)
    assert numbers["fit_inlier_ratio"] == pytest.approx(0.9)
    half = replace(final_depth(wall()), source=np.array([0, 1, 0, 1], np.uint8))
    assert check_depth(half, wall())["network_depth"] == 0.5
    assert check_depth(replace(half, source=np.zeros(FRAMES, np.uint8)), wall()) == {"network_depth": 0}


@pytest.mark.parametrize(
    ("factor", "reason"),
    [
        (1.2, "its scale differs from the cameras' by 20%"),
        (np.array([1, 1.3, 1, 1.3])[:, None, None], "neighbouring frames disagree"),
        (np.nan, "depth has values that are not finite"),
        (-1.0, "negative"),
    ],
)
def test_depth_that_left_the_one_scale_of_the_cameras_is_refused(factor: np.ndarray | float, reason: str) -> None:
    with pytest.raises(ClipSetAside, match=reason):
        check_depth(final_depth(wall(), factor), wall())
