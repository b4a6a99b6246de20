"""Augmentations change pictures, depth, confidence, intrinsics and poses together: shown by reprojection."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fw_model.cameras import project, relative_to_first, unproject
from fw_model.config import AugmentConfig, ConfigError, load_preset
from fw_model.data.augment import AugmentDraw, RawClip, augment_clip, draw_augment, frames_needed
from fw_model.data.online import encode_video
from fw_model.data.schema import ClipRecord, check_record

FRAMES, HEIGHT, WIDTH = 13, 16, 32
ARRAYS = ("frames", "depth", "confidence", "intrinsics", "w2c")

draws = st.builds(
    lambda stride, place, reverse, flip: AugmentDraw(5, int(place * (FRAMES - frames_needed(5, stride))), stride, reverse, flip),
    st.integers(1, 3),
    st.floats(0, 1),
    st.booleans(),
    st.booleans(),
)
scenes = st.integers(0, 10_000).map(lambda seed: plane_scene(seed))


def plane_scene(seed: int) -> RawClip:
    """A painted plane before a camera that turns, moves and zooms, with its principal point off the centre.

    On a plane 1/z is linear in the pixel, so that a depth map can be read exactly between its pixels.
    """
    rng = np.random.default_rng(seed)
    turn, move = rng.uniform(-0.2, 0.2, 3), rng.uniform(-0.3, 0.3, 3)
    w2c = np.zeros((FRAMES, 3, 4))
    for t, share in enumerate(np.linspace(0, 1, FRAMES)):
        skew = np.cross(np.eye(3), share * turn)
        w2c[t] = np.column_stack([torch.linalg.matrix_exp(torch.from_numpy(skew)).numpy(), share * move])
    intrinsics = np.tile(np.eye(3), (FRAMES, 1, 1))
    intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = WIDTH * rng.uniform(0.7, 1.0) * np.linspace(1, 1.2, FRAMES)
    intrinsics[:, 0, 2], intrinsics[:, 1, 2] = WIDTH * rng.uniform(0.3, 0.7), HEIGHT * rng.uniform(0.4, 0.6)
    normal = np.array([*rng.uniform(-0.3, 0.3, 2), 1.0])  # the plane normal . X = 1
    ones = torch.ones(FRAMES, HEIGHT, WIDTH, dtype=torch.float64)
    centre, along = (unproject(d, torch.from_numpy(intrinsics), torch.from_numpy(w2c)).numpy() for d in (0 * ones, ones))
    depth = (1 - centre @ normal) / ((along - centre) @ normal)
    points = centre + depth[..., None] * (along - centre)
    depth[:, :2, :3] = 0  # unknown, and not symmetric
    unit = np.linalg.norm(points, axis=-1)[depth > 0].mean()
    w2c[:, :, 3] /= unit
    paint = 127.5 + 100 * np.sin(points @ rng.uniform(-1.5, 1.5, (3, 3)))
    return RawClip(
        frames=paint.round().astype(np.uint8),
        depth=(depth / unit).astype(np.float16),
        confidence=paint[..., 0].round().astype(np.uint8),
        intrinsics=intrinsics.astype(np.float32),
        w2c=w2c.astype(np.float32),
        scale=2.5,
        fps=12.0,
    )


def tensors(clip: RawClip) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(torch.from_numpy(array.astype(np.float64)) for array in (clip.depth, clip.intrinsics, clip.w2c))  # type: ignore[return-value]


def between_pixels(image: np.ndarray, uv: np.ndarray) -> np.ndarray:
    """Bilinear samples of image [H, W, ...] at positions uv [N, 2] within its pixel centres."""
    x, y = uv[:, 0] - 0.5, uv[:, 1] - 0.5
    i, j = (np.clip(np.floor(a).astype(int), 0, n - 2) for a, n in ((y, image.shape[0]), (x, image.shape[1])))
    shape = (-1, *[1] * (image.ndim - 2))
    a, b = (y - i).reshape(shape), (x - j).reshape(shape)
    top, bottom = ((1 - b) * image[k, j] + b * image[k, j + 1] for k in (i, i + 1))
    return (1 - a) * top + a * bottom


@settings(max_examples=30, deadline=None)
@given(scenes, draws)
def test_every_point_lands_on_the_pixel_that_shows_it(clip: RawClip, draw: AugmentDraw) -> None:
    """The stored clip's world points, carried to the new world, are what the new cameras, depth and pictures show."""
    after = augment_clip(clip, draw)
    points = unproject(*tensors(clip))[draw.indices.copy()]  # [T, H, W, 3] in the stored clip's world
    first = torch.from_numpy(clip.w2c[draw.indices[0]].astype(np.float64))
    mirror = torch.tensor([-1.0 if draw.flip else 1.0, 1, 1], dtype=torch.float64)
    carried = (points @ first[:, :3].mT + first[:, 3]) * mirror * (clip.scale / after.scale)
    depth, intrinsics, w2c = tensors(after)
    uv, z = project(carried.flatten(1, 2), intrinsics, w2c)
    v, u = torch.meshgrid(torch.arange(HEIGHT) + 0.5, torch.arange(WIDTH) + 0.5, indexing="ij")
    own = torch.stack([WIDTH - u if draw.flip else u, v], dim=-1).flatten(0, 1).to(uv.dtype)
    valid = torch.from_numpy(clip.depth[draw.indices] > 0).flatten(1)
    assert (uv - own).norm(dim=-1)[valid].max() < 1e-3
    row, column = (own[:, 1] - 0.5).long(), (own[:, 0] - 0.5).long()
    assert torch.equal(depth[:, row, column] > 0, valid)
    torch.testing.assert_close(depth[:, row, column][valid], z[valid], rtol=1e-3, atol=1e-3)
    for name in ("frames", "confidence"):
        shown = getattr(after, name)[:, row, column]
        np.testing.assert_array_equal(shown, getattr(clip, name)[draw.indices].reshape(shown.shape))


@settings(max_examples=30, deadline=None)
@given(scenes, draws, st.integers(1, 4))
def test_a_point_of_one_frame_is_where_another_frame_shows_it(clip: RawClip, draw: AugmentDraw, other: int) -> None:
    after = augment_clip(clip, draw)
    depth, intrinsics, w2c = tensors(after)
    uv, z = project(unproject(depth, intrinsics, w2c)[0].flatten(0, 1), intrinsics[other], w2c[other])
    inside = ((uv >= 0.5) & (uv <= torch.tensor([WIDTH - 0.5, HEIGHT - 0.5]))).all(-1) & (depth[0].flatten() > 0)
    inside &= (uv[:, 1] > 3) | (uv[:, 0] > 4) & (uv[:, 0] < WIDTH - 4)  # not beside the unknown corner
    if not inside.any():
        return
    where = uv[inside].numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        seen = 1 / between_pixels(1 / after.depth[other].astype(np.float64), where)
    np.testing.assert_allclose(seen, z[inside], rtol=2e-3)
    for name in ("frames", "confidence"):
        picture = getattr(after, name).astype(np.float64)
        here = picture[0].reshape(-1, *picture.shape[3:])[inside.numpy()]
        assert np.abs(between_pixels(picture[other], where) - here).max() < 4  # grey levels: rounding, and the paint's curvature


@settings(max_examples=20, deadline=None)
@given(scenes, draws)
def test_the_result_is_a_clip_of_the_schema_in_clip_units(clip: RawClip, draw: AugmentDraw) -> None:
    after = augment_clip(clip, draw)
    arrays = {name: getattr(after, name) for name in ARRAYS[1:]} | {"video": encode_video(after.frames, after.fps)}
    check_record(ClipRecord("a", "a.mp4", after.fps, after.scale, "", arrays, {}, {}))
    assert after.fps == clip.fps / draw.stride
    depth, intrinsics, w2c = tensors(after)
    assert unproject(depth, intrinsics, w2c)[depth > 0].norm(dim=-1).mean() == pytest.approx(1, abs=1e-3)
    # In the annotator's units nothing has moved: distances between camera centres are what they were.
    before = relative_to_first(torch.from_numpy(clip.w2c[draw.indices].astype(np.float64)))
    np.testing.assert_allclose(w2c[:, :, 3].norm(dim=-1) * after.scale, before[:, :, 3].norm(dim=-1) * clip.scale, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(scenes)
def test_twice_mirrored_or_twice_reversed_is_the_clip(clip: RawClip) -> None:
    mirrored, reverse = AugmentDraw(FRAMES, flip=True), AugmentDraw(FRAMES, reverse=True)
    for draw, tolerance in ((mirrored, 0.0), (reverse, 2e-3)):
        once = augment_clip(clip, draw)
        twice = augment_clip(once, draw)
        assert not np.array_equal(once.frames, clip.frames)
        for name in ("frames", "confidence"):
            np.testing.assert_array_equal(getattr(twice, name), getattr(clip, name))
        np.testing.assert_allclose(twice.depth, clip.depth, rtol=tolerance)
        np.testing.assert_allclose(twice.w2c, clip.w2c, atol=tolerance)
        np.testing.assert_allclose(twice.intrinsics, clip.intrinsics, rtol=1e-6)  # W - (W - cx) in float32
        assert (twice.scale, twice.fps) == (pytest.approx(clip.scale, rel=1e-3), clip.fps)


def test_nothing_drawn_changes_nothing() -> None:
    clip = plane_scene(1)
    assert augment_clip(clip, AugmentDraw(FRAMES)) is clip


def test_a_window_without_any_known_depth_keeps_the_clips_unit() -> None:
    clip = plane_scene(2)
    blind = replace(clip, depth=np.where(np.arange(FRAMES)[:, None, None] < 5, 0, clip.depth))
    after = augment_clip(blind, AugmentDraw(5))
    assert after.scale == clip.scale
    np.testing.assert_allclose(after.w2c, clip.w2c[:5])


def test_frames_that_the_clip_has_not_are_refused() -> None:
    with pytest.raises(ValueError, match="does not fit into a clip of 13 frames"):
        augment_clip(plane_scene(3), AugmentDraw(5, start=1, stride=3))


# ----------------------------------------------------------------------------------------------------------- draws


@settings(max_examples=50, deadline=None)
@given(st.integers(5, 40), st.integers(0, 3), st.integers(0, 5), st.integers(0, 100))
def test_draws_depend_on_seed_epoch_and_index_alone_and_fit(stored: int, seed: int, epoch: int, index: int) -> None:
    config = AugmentConfig(flip=0.5, reverse=0.5, strides=(1, 2, 4))
    draw = draw_augment(config, 5, stored, seed, epoch, index)
    assert draw == draw_augment(config, 5, stored, seed, epoch, index)
    assert set(draw.indices) <= set(range(stored))
    assert len(draw.indices) == 5


def test_draws_come_as_often_as_they_are_asked_for() -> None:
    config = AugmentConfig(flip=0.5, reverse=0.25, strides=(1, 2))
    drawn = [draw_augment(config, 5, 13, 0, epoch, index) for epoch in range(20) for index in range(100)]
    for name, share in (("flip", 0.5), ("reverse", 0.25)):
        assert np.mean([getattr(draw, name) for draw in drawn]) == pytest.approx(share, abs=0.04), name
    assert np.mean([draw.stride == 2 for draw in drawn]) == pytest.approx(0.5, abs=0.04)
    assert {draw.start for draw in drawn if draw.stride == 1} == set(range(9))
    assert {draw.start for draw in drawn if draw.stride == 2} == set(range(5))
    assert np.mean([draw.flip and draw.reverse for draw in drawn]) == pytest.approx(0.125, abs=0.03)  # independent
    off = [draw_augment(AugmentConfig(), 5, 5, 0, 0, index) for index in range(20)]
    assert set(off) == {AugmentDraw(5)}


def test_a_clip_too_short_for_a_stride_is_drawn_at_those_that_fit() -> None:
    assert {draw_augment(AugmentConfig(strides=(1, 2)), 5, 8, 0, 0, i).stride for i in range(20)} == {1}
    with pytest.raises(ValueError, match="8 frames are too few for 5 at a stride of 2"):
        draw_augment(AugmentConfig(strides=(2, 3)), 5, 8, 0, 0, 0)


def test_augmentation_of_cached_latents_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"stage1: .*cached latents cannot be mirrored.*set encode_online: true"):
        load_preset("tiny", ["stage1.augment.flip=0.5"])
    assert load_preset("tiny", ["stage1.augment.flip=0.5", "stage1.encode_online=true"]).stage1.augment is not None
    with pytest.raises(ConfigError, match="strides must be"):
        load_preset("tiny", ["stage1.augment.strides=[0]", "stage1.encode_online=true"])
