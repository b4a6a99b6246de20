"""The demo's ground truth is exact, agrees with the pictures, and is found again for a clip."""

from dataclasses import replace

import av
import cv2
import numpy as np
import pytest

from fw_model.errors import BadFileError
from fw_pipeline.annotate.truth import ground_truth_for_clip, ground_truth_path, load_ground_truth
from fw_pipeline.annotate.types import Clip
from fw_pipeline.demo import render as demo
from fw_pipeline.demo.scenes import SCENES, SHOTS, VideoPlan

SHOT = replace(SHOTS[0].shots[0], frames=9, height=96, width=160)
PLAN = VideoPlan("short", (SHOT, replace(SHOT, frames=4, eye=((1.2, -1.5, 0.6), (1.0, -1.5, 0.7), (0.8, -1.5, 0.8)))))


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    (video,) = demo.render_demo(folder, (PLAN,), workers=1)
    return video


def make_clip(timestamps) -> Clip:
    return Clip("c", "short.mp4", "0", 0, 12.0, tuple(timestamps), 96, 160, 48, 80)


def points_of(depth, k, w2c) -> np.ndarray:
    """World points [h, w, 3] of the pixel centres."""
    v, u = np.mgrid[: depth.shape[0], : depth.shape[1]] + 0.5
    cam = np.stack([(u - k[0, 2]) / k[0, 0], (v - k[1, 2]) / k[1, 1], np.ones_like(u)], -1) * depth[..., None]
    return (cam - w2c[:, 3]) @ w2c[:, :3]


def test_every_pixel_lies_on_a_surface_of_the_scene() -> None:
    scene = SCENES["room"]()
    _, depth, w2c = demo.render_frame(scene, SHOT, 0.4)
    points = points_of(depth, demo.intrinsics_of(SHOT), w2c)
    off = np.full(depth.shape, np.inf)
    for solid in scene.solids:
        q = (points - solid.centre) @ solid.rotation / solid.half
        surface = np.linalg.norm(q, axis=-1) if solid.sphere else np.abs(q).max(-1)
        off = np.minimum(off, np.abs(surface - 1))
    assert np.isfinite(depth).all()
    assert depth.min() > 0
    assert off.max() < 1e-9


def test_depth_and_poses_carry_one_frame_onto_another(rendered) -> None:
    truth = load_ground_truth(rendered)
    with av.open(str(rendered)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    i, j = 0, 3
    k = truth.intrinsics[i]
    there = points_of(truth.depth[i], k, truth.w2c[i]) @ truth.w2c[j][:, :3].T + truth.w2c[j][:, 3]
    uv = ((there / there[..., 2:]) @ k.T)[..., :2].astype(np.float32) - 0.5
    warped = cv2.remap(frames[j], uv[..., 0], uv[..., 1], cv2.INTER_LINEAR)
    seen_depth = cv2.remap(truth.depth[j], uv[..., 0], uv[..., 1], cv2.INTER_NEAREST)
    seen = np.abs(seen_depth - there[..., 2]) < 0.02 * there[..., 2]
    error = np.abs(warped.astype(float) - frames[i]).mean(-1)
    still = np.abs(frames[j].astype(float) - frames[i]).mean(-1)
    assert seen.mean() > 0.6
    assert np.median(error[seen]) < 8
    assert np.median(error[seen]) < 0.35 * np.median(still[seen])


def test_the_video_has_a_frame_at_every_time_of_the_truth(rendered) -> None:
    truth = load_ground_truth(rendered)
    with av.open(str(rendered)) as container:
        times = [frame.time for frame in container.decode(video=0)]
    np.testing.assert_allclose(times, truth.timestamps, atol=1e-9)
    assert truth.shot.tolist() == [0] * 9 + [1] * 4
    assert truth.depth.shape == (13, 96, 160)


def test_rendering_again_gives_the_same_pixels() -> None:
    first, second = (demo.render_frame(SCENES["studio"].__wrapped__(), SHOT, 0.5)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_whole_videos_are_left_as_they_are_and_lost_ones_come_back(rendered) -> None:
    truth = ground_truth_path(rendered)
    before = (rendered.stat().st_mtime_ns, truth.stat().st_mtime_ns)
    assert demo.render_demo(rendered.parent, (PLAN,)) == [rendered]
    assert (rendered.stat().st_mtime_ns, truth.stat().st_mtime_ns) == before
    old = rendered.read_bytes()
    rendered.unlink()
    demo.render_demo(rendered.parent, (PLAN,))
    assert rendered.read_bytes() == old
    assert sorted(path.name for path in rendered.parent.iterdir()) == ["short.gt.npz", "short.mp4"]


def test_a_clips_truth_starts_at_its_first_camera(rendered) -> None:
    truth = load_ground_truth(rendered)
    picked = [2, 4, 6]
    depth, intrinsics, w2c = ground_truth_for_clip(truth, make_clip(truth.timestamps[picked] + 0.4 / demo.FPS))
    np.testing.assert_allclose(w2c[0], np.eye(4)[:3], atol=1e-12)
    np.testing.assert_array_equal(depth, truth.depth[picked])
    assert intrinsics.shape == (3, 3, 3)
    # The same points, in the first camera's frame, as the scene's own poses give.
    points = points_of(truth.depth[6], intrinsics[2], truth.w2c[6]) @ truth.w2c[2][:, :3].T + truth.w2c[2][:, 3]
    np.testing.assert_allclose(points_of(depth[2], intrinsics[2], w2c[2]), points, atol=1e-9)


def test_a_clip_of_another_video_is_refused(rendered) -> None:
    truth = load_ground_truth(rendered)
    with pytest.raises(BadFileError, match="no ground truth within half a frame of 9"):
        ground_truth_for_clip(truth, make_clip([0.0, 9.0]))


def test_videos_without_truth_have_none_and_broken_truth_is_named(tmp_path) -> None:
    assert load_ground_truth(tmp_path / "mine.mp4") is None
    np.savez(tmp_path / "mine.gt.npz", depth=np.zeros(3))
    with pytest.raises(BadFileError, match=r"mine\.gt\.npz.*lacks intrinsics"):
        load_ground_truth(tmp_path / "mine.mp4")


def test_the_demo_is_enough_for_a_split_by_video() -> None:
    assert len(SHOTS) >= 5
    assert {f"{plan.name}.mp4" for plan in SHOTS} == demo.DEMO_VIDEOS
    for plan in SHOTS:
        for shot in plan.shots:
            assert shot.frames >= 33  # a clip of the tiny preset: 17 frames at 12 fps out of 24
            eyes = [-w2c[:, :3].T @ w2c[:, 3] for w2c in (demo.camera_at(shot, 0), demo.camera_at(shot, 32 / (shot.frames - 1)))]
            depth = demo.cast(SCENES[shot.scene](), demo.camera_at(shot, 0), demo.intrinsics_of(shot), shot.height, shot.width)
            assert np.linalg.norm(eyes[1] - eyes[0]) > 0.12 * np.median(depth)
