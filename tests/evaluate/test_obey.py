"""Errors between two paths are the definitions' arithmetic; nonsense scores worst; failures are counted."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.spatial.transform import Rotation

from benchmarks.bench_audit import exact
from fw_model.cameras import Cameras
from fw_model.errors import ConfigError
from fw_model.evaluate.__main__ import main
from fw_model.evaluate.consistency import consistency, psnr, ssim
from fw_model.evaluate.estimators import load_estimator
from fw_model.evaluate.obey import best_scale, path_errors, random_path, still_path
from fw_model.evaluate.table import as_text, evaluate
from fw_model.export.reading import read_world
from fw_model.export.world import World
from fw_pipeline.demo.render import render_frame
from fw_pipeline.demo.scenes import SCENES, Shot
from tests.helpers.made_worlds import made_world


def some_path(seed: int, frames: int = 7) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rotation = Rotation.from_rotvec(0.3 * rng.standard_normal((frames, 3))).as_matrix()
    return np.concatenate([rotation, rng.standard_normal((frames, 3, 1))], -1)


# ------------------------------------------------------------------------------------------------------- definitions


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_errors_are_the_definitions_arithmetic(a: int, b: int) -> None:
    """Plain loops over 4 x 4 matrices, as the definitions are written."""
    assume(a != b)
    asked, found = some_path(a), some_path(b)

    def relative(w2c: np.ndarray) -> np.ndarray:
        c2w = [np.linalg.inv(np.vstack([pose, [0, 0, 0, 1]])) for pose in w2c]
        return np.stack([np.linalg.inv(c2w[0]) @ pose for pose in c2w])

    g, e = relative(asked), relative(found)
    tg = g[:, :3, 3] / (max(np.linalg.norm(t) for t in g[:, :3, 3]) + 1e-9)
    te = e[:, :3, 3] / (max(np.linalg.norm(t) for t in e[:, :3, 3]) + 1e-9)
    rot = trans = cam = 0.0
    for i in range(len(g)):
        cosine = (np.trace(g[i, :3, :3].T @ e[i, :3, :3]) - 1) / 2
        rot += math.acos(min(1, max(-1, cosine))) if i else 0  # the first camera is the identity in both
        trans += np.linalg.norm(te[i] - tg[i])
        cam += np.linalg.norm(np.c_[e[i, :3, :3], te[i]] - np.c_[g[i, :3, :3], tg[i]])
    numbers = path_errors(asked, found)
    assert numbers.rot_err == pytest.approx(rot, abs=1e-9)
    assert numbers.trans_err == pytest.approx(trans, abs=1e-9)
    assert numbers.cam_mc == pytest.approx(cam, abs=1e-9)
    assert numbers.numbers()["rot_err_per_frame"] == pytest.approx(rot / len(g), abs=1e-9)
    c = best_scale(e[:, :3, 3], g[:, :3, 3])
    least = minimize_scalar(lambda c: np.linalg.norm(c * e[:, :3, 3] - g[:, :3, 3], axis=1).sum(), (0, 1), tol=1e-12)
    ours = np.linalg.norm(c * e[:, :3, 3] - g[:, :3, 3], axis=1).sum()
    assert ours <= max(least.fun, 0) + 1e-9 or least.x < 0
    assert numbers.translation == pytest.approx(ours / len(g), abs=1e-9)
    e_r = np.degrees(rot) / len(g)
    score = math.sqrt((1 - min(e_r / 15, 1)) * (1 - min(numbers.translation / 0.5, 1)))
    assert numbers.camera_score == pytest.approx(score, abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 100))
def test_a_path_in_another_world_and_unit_is_the_same_path(seed: int, unit: float) -> None:
    path, world = some_path(seed), some_path(seed + 1)[0]
    moved = path.copy()
    moved[:, :, 3] *= unit
    moved[:, :, 3] += moved[:, :, :3] @ world[:, 3]
    moved[:, :, :3] = moved[:, :, :3] @ world[:, :3]
    numbers = path_errors(path, moved)
    assert numbers.rot_err < 1e-5
    assert numbers.trans_err < 1e-6
    assert numbers.translation < 1e-6
    assert numbers.camera_score > 0.999
    assert numbers.auc5 == 1


def test_a_still_camera_and_a_guess_score_below_what_is_right() -> None:
    asked = made_world("orbit_right").cameras.w2c.double().numpy()
    right = path_errors(asked, asked)
    for other in (still_path(len(asked)), random_path(len(asked), asked)):
        wrong = path_errors(asked, other)
        assert wrong.cam_mc > right.cam_mc + 1
        assert wrong.camera_score < right.camera_score
    still = path_errors(still_path(4), still_path(4))
    assert math.isnan(still.ate)
    assert still.camera_score == 1


def test_paths_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match="7 and 6 cameras"):
        path_errors(some_path(0), some_path(0)[:6])
    broken = some_path(0)
    broken[2, 0, 0] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        path_errors(some_path(0), broken)


def test_psnr_and_ssim_of_known_pictures() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
    assert (psnr(picture, picture), ssim(picture, picture)) == (100.0, pytest.approx(1.0))
    flat = np.full((40, 60, 3), 100, np.uint8)
    assert psnr(flat, flat + 16) == pytest.approx(20 * math.log10(255 / 16))
    c1 = (0.01 * 255) ** 2
    assert ssim(flat, flat + 16) == pytest.approx((2 * 100 * 116 + c1) / (100**2 + 116**2 + c1))


# --------------------------------------------------------------------------------------------------------- one scene


def test_a_world_that_agrees_with_itself_says_so() -> None:
    numbers = consistency(made_world("truck_right", frames=7))
    for gap in ("1", "5", "half"):
        assert numbers[f"agree_{gap}"] > 0.99
        assert numbers[f"colour_{gap}"] < 3
    assert numbers["agreement"] > 0.99
    closed = consistency(made_world("orbit_360deg", frames=5))
    assert closed["revisit_psnr"] > 30  # rounding at the edges of the pattern
    assert closed["revisit_ssim"] > 0.97
    assert "revisit_psnr" not in numbers


def test_depth_that_is_not_the_points_is_seen() -> None:
    world = made_world("truck_right")
    off = replace(world, depth=world.depth * 1.2)
    assert consistency(off)["agreement"] < 0.2
    assert consistency(off)["agree_1"] < 0.2


# ----------------------------------------------------------------------------------------------- nonsense scores worst


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A rendered room with exact cameras, and what people get instead: noise, one frame again and again, two scenes."""
    root = tmp_path_factory.mktemp("worlds")
    shot = Shot("room", ((-0.6, -1.5, 0.4), (0, -1.55, 0.6), (0.7, -1.4, 0.7)), ((0, -1, 4.0), (0.2, -1, 4.2)), 9, 192, 336)

    def rendered(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        seen = [render_frame(SCENES[name](), shot, t / (shot.frames - 1)) for t in range(shot.frames)]
        pictures, depth, w2c = (np.stack([s[k] for s in seen]) for k in range(3))
        return pictures, depth, w2c

    pictures, depth, w2c = rendered("room")
    other = rendered("hall")[0]
    geometry = exact(depth, w2c, shot)
    cameras = Cameras(torch.from_numpy(geometry.w2c).float(), torch.from_numpy(geometry.intrinsics).float(), (192, 336))
    from fw_model.cameras import unproject

    deep = torch.from_numpy(geometry.depth)
    points = unproject(deep, cameras.intrinsics, cameras.w2c)
    one = torch.ones_like(deep)
    noise = np.random.default_rng(0).integers(0, 256, pictures.shape).astype(np.uint8)
    mixed = np.where(np.arange(len(pictures))[:, None, None, None] % 2 == 0, pictures, other)
    videos = {"right": pictures, "noise": noise, "repeated": np.repeat(pictures[:1], len(pictures), 0), "mixed": mixed}
    return {
        name: World(torch.from_numpy(video), deep, one, points, one, cameras, cameras, 12.0, {"prompt": name}).save(root / name)
        for name, video in videos.items()
    }


def test_noise_a_repeated_frame_and_two_scenes_mixed_score_worst(folders: dict[str, Path]) -> None:
    """Whatever the model says of itself: here it claims the right cameras and depth for all four."""
    estimator = load_estimator("fw_pipeline.annotate.colmap.cameras_of:cameras_of")
    scores, colours = {}, {}
    for name, folder in folders.items():
        result = evaluate([folder], estimator)
        row = next(row for row in result.rows if row.name == "independent estimate")
        assert row.tried == 1
        scores[name] = row.mean("camera_score") if row.numbers else 0.0  # a failure is worse than any estimate
        found = result.consistency[str(folder)]
        colours[name] = max(found["colour_1"], found["colour_5"], found["colour_half"])
    assert scores["right"] > 0.95
    assert colours["right"] < 8
    for name in ("noise", "repeated", "mixed"):
        assert scores[name] < 0.5 * scores["right"], name
        assert colours[name] > 2 * colours["right"], name


def test_failures_are_counted_and_means_over_the_rest_marked(folders: dict[str, Path]) -> None:
    right = read_world(folders["right"])

    def only_the_right(frames: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
        if not np.array_equal(frames, right.video.numpy()):
            raise ValueError("nothing to match")
        return right.cameras.w2c.double().numpy()

    result = evaluate([folders["right"], folders["noise"]], only_the_right, [folders["right"]])
    text = as_text(result)
    assert "independent estimate | 1 / 2" in text
    assert "nothing to match" in text
    assert "* mean over the worlds whose cameras were found" in text
    names = [row.name for row in result.rows]
    assert names[2:] == ["the estimator on known cameras", "a camera that stands", "a random guess"]


# -------------------------------------------------------------------------------------------------------- the command


def test_the_command_judges_a_folder_of_worlds(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cameras", str(folders["right"].parent)]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["cameras"]["the model's own cameras"]["tried"] == 4
    assert said["cameras"]["the model's own cameras"]["rot_err"] < 1e-3
    assert len(said["consistency"]) == 4


def test_a_world_that_cannot_be_read_costs_itself(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = made_world().save(tmp_path / "bad")
    (bad / "depth.npz").write_bytes(b"no arrays")
    unasked = replace(made_world(), requested=None).save(tmp_path / "unasked")
    assert main(["cameras", str(bad), str(unasked), str(folders["right"])]) == 1
    out = capsys.readouterr().out
    assert "damaged" in out
    assert "no path was asked for" in out
    assert json.loads(out.splitlines()[-1])["left_out"] == 2
    (tmp_path / "empty").mkdir()
    assert main(["cameras", str(tmp_path / "empty")]) == 1
    assert "no saved world" in capsys.readouterr().err


def test_an_estimator_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="no camera estimator 'magic'"):
        load_estimator("magic")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_estimator("fw_pipeline.nowhere:cameras")


def test_a_saved_world_reads_back(tmp_path: Path) -> None:
    world = made_world()
    again = read_world(world.save(tmp_path / "w"))
    assert again.video.shape == world.video.shape
    assert torch.equal(again.points, world.points)
    assert torch.allclose(again.cameras.w2c, world.cameras.w2c)
    assert again.requested is not None
    assert again.meta["prompt"] == world.meta["prompt"]
