"""The COLMAP engine gives true cameras or a reason, never made-up poses."""

import resource
import subprocess

import numpy as np
import pytest

from fw_model import metrics
from fw_pipeline.annotate.colmap import mapping
from fw_pipeline.annotate.colmap.engine import ColmapEngine
from fw_pipeline.annotate.colmap.mapping import ColmapDied, Mapper
from fw_pipeline.annotate.colmap.plane_sweep import SweepSettings
from fw_pipeline.annotate.types import ClipSetAside
from fw_pipeline.demo.render import intrinsics_of, render_frame
from fw_pipeline.demo.scenes import SCENES, Shot

SHOT = Shot("room", ((-0.8, -1.6, 0.6), (0.0, -1.65, 0.7), (0.9, -1.5, 0.8)), ((0, -0.9, 3.6), (0, -0.9, 3.6)), 8, 144, 240)
ENGINE = ColmapEngine(sweep=SweepSettings(planes=24))


@pytest.fixture(scope="module")
def rendered() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frames [T, H, W, 3], depth [T, H, W], w2c [T, 3, 4] (world = the scene's)."""
    scene = SCENES[SHOT.scene]()
    frames, depth, w2c = zip(*(render_frame(scene, SHOT, t / (SHOT.frames - 1)) for t in range(SHOT.frames)), strict=True)
    return np.stack(frames), np.stack(depth), np.stack(w2c)


def test_cameras_and_depth_agree_with_the_truth(rendered) -> None:
    frames, depth, w2c = rendered
    found = ENGINE.estimate(frames)
    np.testing.assert_array_equal(found.w2c[0], np.eye(3, 4))
    assert not found.interpolated.any()
    assert metrics.ate(found.w2c, w2c) < 0.02
    assert metrics.auc(*metrics.relative_pose_errors(found.w2c, w2c)) > 0.9
    assert found.intrinsics[0, 0, 0] == pytest.approx(intrinsics_of(SHOT)[0, 0], rel=0.08)
    assert metrics.absrel(found.depth, depth, found.depth > 0) < 0.08
    assert (found.inlier_ratio > 0.8).all()
    assert (found.reprojection_error < 1).all()


def test_a_known_lens_is_kept_even_with_two_focal_lengths(rendered) -> None:
    frames, _, w2c = rendered
    squeezed = frames[:, :, ::2]  # pixels twice as wide as high
    k = np.diag([0.5, 1.0, 1.0]) @ intrinsics_of(SHOT)
    found = ENGINE.estimate(squeezed, k)
    np.testing.assert_allclose(found.intrinsics, np.repeat(k[None], len(frames), 0), rtol=1e-9)
    assert metrics.ate(found.w2c, w2c) < 0.03


def test_a_camera_that_does_not_move_is_refused(rendered) -> None:
    still = np.repeat(rendered[0][:1], 8, 0)
    with pytest.raises(ClipSetAside, match="does not move"):
        ENGINE.estimate(still)


def test_a_picture_without_texture_is_refused(rendered) -> None:
    with pytest.raises(ClipSetAside, match="no texture"):
        ENGINE.estimate(np.full_like(rendered[0], 120))


def test_frames_that_show_nothing_are_interpolated_and_flagged(rendered) -> None:
    frames, _, w2c = rendered
    blinded = frames.copy()
    blinded[4] = 120
    found = ENGINE.estimate(blinded)
    np.testing.assert_array_equal(np.flatnonzero(found.interpolated), [4])
    assert found.inlier_ratio[4] == 0
    assert metrics.ate(found.w2c, w2c) < 0.05


def test_too_many_frames_without_a_pose_are_refused_with_the_count(rendered) -> None:
    blinded = rendered[0].copy()
    blinded[[1, 3, 5]] = 120
    with pytest.raises(ClipSetAside, match="of 8 frames could be placed"):
        ENGINE.estimate(blinded)


def test_two_frames_are_not_enough(rendered) -> None:
    with pytest.raises(ClipSetAside, match="at least 3"):
        ENGINE.estimate(rendered[0][:2])


def test_the_version_changes_with_every_setting() -> None:
    assert ColmapEngine().version != ColmapEngine(mapper=Mapper(max_features=5)).version
    assert ColmapEngine().version != ColmapEngine(sweep=SweepSettings(planes=5)).version


@pytest.mark.parametrize(("limit", "how"), [(1_000, "exit code 1: OSError"), (500_000, "ended by SIGABRT")])
def test_a_process_of_colmap_that_dies_is_one_clips_failure(
    rendered, monkeypatch: pytest.MonkeyPatch, limit: int, how: str
) -> None:
    """Where no file may grow beyond a limit, as on a full disk, COLMAP's native code ends its whole process."""
    run = subprocess.run

    def run_on_a_full_disk(*args, **settings):
        return run(*args, **settings, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))

    monkeypatch.setattr(mapping.subprocess, "run", run_on_a_full_disk)
    with pytest.raises(ColmapDied, match=how) as died:
        ENGINE.estimate(rendered[0])
    assert "MB free; TMPDIR=" in died.value.remedy
