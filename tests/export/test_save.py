"""A saved world is whole, and independent readers find in its files what was put in."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pycolmap
import pytest
import torch
import trimesh

from fw_model.cameras import project, read_pose_file
from fw_model.export.cloud import GLTF_AXES, cloud_of
from fw_model.export.save import FILES, is_saved
from fw_model.export.world import World
from tests.helpers.made_worlds import made_world


@pytest.fixture(scope="module")
def world() -> World:
    return made_world()


@pytest.fixture(scope="module")
def folder(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.save(tmp_path_factory.mktemp("worlds") / "wall")


def lands(world: World, points: np.ndarray, frame: int) -> np.ndarray:
    """Pixels [N, 2] at which a frame's camera sees world points."""
    uv, _ = project(
        torch.from_numpy(points).double(), world.cameras.intrinsics[frame].double(), world.cameras.w2c[frame].double()
    )
    return uv.numpy()


def test_every_file_is_there_and_a_world_that_lacks_one_is_not_saved(folder: Path, tmp_path: Path) -> None:
    assert is_saved(folder)
    for name in FILES:
        copy = shutil.copytree(folder, tmp_path / name.replace("/", "_"))
        (copy / name).unlink()
        assert not is_saved(copy)


def test_the_videos_play_with_every_frame_at_its_time(world: World, folder: Path) -> None:
    for name in ("video.mp4", "depth.mp4"):
        with av.open(str(folder / name)) as container:
            frames = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
        assert [round(time * world.fps) for time, _ in frames] == list(range(len(world.video)))
        assert frames[0][1].shape == world.video.shape[1:]
        if name == "video.mp4":  # flat patches survive the encoding
            assert np.abs(frames[2][1].astype(int) - world.video[2].numpy()).mean() < 12


def test_depth_is_kept_to_half_precision(world: World, folder: Path) -> None:
    with np.load(folder / "depth.npz", allow_pickle=False) as data:
        assert data["depth"].astype(np.float32) == pytest.approx(world.depth.numpy(), rel=1e-3)
        assert np.array_equal(data["points"], world.points.numpy())
        assert set(data.files) == {"depth", "depth_conf", "points", "points_conf"}


def test_the_cloud_reads_back_and_lands_on_the_pixels_it_came_from(world: World, folder: Path) -> None:
    cloud = cloud_of(world, 10**6)
    found = trimesh.load(folder / "points.ply")
    assert np.array_equal(np.asarray(found.vertices, np.float32), cloud.points)
    assert np.array_equal(found.visual.vertex_colors[:, :3], cloud.colours)
    for frame in range(len(world.video)):
        mine = cloud.frame == frame
        known = (world.depth[frame] > 0).nonzero().numpy()
        assert np.abs(lands(world, np.asarray(found.vertices)[mine], frame) - (known[:, ::-1] + 0.5)).max() < 0.5


def test_the_scene_has_points_and_cameras_with_y_up(world: World, folder: Path) -> None:
    scene = trimesh.load(folder / "scene.glb")
    kinds = {type(geometry).__name__: geometry for geometry in scene.geometry.values()}
    assert set(kinds) == {"PointCloud", "Path3D"}
    cloud = cloud_of(world, 10**6)
    assert np.asarray(kinds["PointCloud"].vertices) == pytest.approx(cloud.points * GLTF_AXES, abs=1e-6)
    assert np.array_equal(kinds["PointCloud"].colors[:, :3], cloud.colours)


def test_pose_files_read_back_as_the_cameras(world: World, folder: Path) -> None:
    height, width = world.video.shape[1:3]
    again = read_pose_file(folder / "cameras.txt", height, width)
    assert torch.allclose(again.w2c, world.cameras.w2c, atol=1e-6)
    assert torch.allclose(again.intrinsics, world.cameras.intrinsics, rtol=1e-6)
    said = json.loads((folder / "cameras.json").read_text())
    assert np.array(said["w2c"]) == pytest.approx(world.cameras.w2c.numpy(), abs=1e-7)
    assert np.array(said["requested"]["intrinsics"]).shape == (len(world.video), 3, 3)


def test_colmap_reads_its_model_and_reprojects_within_half_a_pixel(world: World, folder: Path) -> None:
    model = pycolmap.Reconstruction(str(folder / "sparse" / "0"))
    assert model.num_images() == len(world.video)
    errors = []
    for image in model.images.values():
        frame = image.image_id - 1
        assert (folder / "images" / image.name).is_file()
        pose = image.cam_from_world() if callable(image.cam_from_world) else image.cam_from_world
        assert pose.matrix() == pytest.approx(world.cameras.w2c[frame].numpy(), abs=1e-6)
        for observed in image.points2D:
            if observed.has_point3D():
                seen = image.project_point(model.points3D[observed.point3D_id].xyz)
                errors.append(np.abs(seen - observed.xy).max())
    assert len(errors) > 500
    assert max(errors) < 0.5


def test_nerfstudios_transforms_are_camera_to_world_with_opengl_axes(world: World, folder: Path) -> None:
    said = json.loads((folder / "transforms.json").read_text())
    for frame, item in enumerate(said["frames"]):
        assert (folder / item["file_path"]).is_file()
        c2w = np.array(item["transform_matrix"])
        w2c = np.linalg.inv(c2w @ np.diag([1, -1, -1, 1]))
        assert w2c[:3] == pytest.approx(world.cameras.w2c[frame].numpy(), abs=1e-6)


def test_a_folder_with_something_else_in_it_is_left_alone(world: World, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="no saved world"):
        world.save(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    again = world.save(tmp_path / "a")
    assert world.save(again) == again  # a world takes a world's place


def test_a_save_that_fails_leaves_nothing(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fw_model.export.save.write_viewer", full)
    with pytest.raises(OSError, match="No space"):
        world.save(tmp_path / "w")
    assert list(tmp_path.iterdir()) == []


def test_a_world_without_a_single_depth_is_saved_too(world: World, tmp_path: Path) -> None:
    nothing = replace(world, depth=torch.zeros_like(world.depth), requested=None)
    assert is_saved(nothing.save(tmp_path / "w"))
    assert len(trimesh.load(tmp_path / "w" / "scene.glb").geometry) == 1  # the cameras


def test_the_page_opens_offline_without_an_error_and_shows_the_cloud(folder: Path, tmp_path: Path) -> None:
    page = (folder / "scene.html").read_text(encoding="utf-8")
    assert "</script> & more" not in page  # a prompt cannot close the script
    assert not [word for word in ("http://", "https://", "src=//") if word in page]
    browser = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    # What the page has to say is put where the browser's dump shows it: errors, and what the canvas holds.
    watch = """<script>window.faults = []; addEventListener("error", e => faults.push(e.message));
const log = console.error; console.error = (...words) => { faults.push(words.join(" ")); log(...words); };</script>"""
    tell = """<script>addEventListener("load", () => {
const gl = $("cloud").getContext("webgl"), {width, height} = $("cloud"), all = new Uint8Array(4 * width * height);
draw(); gl.readPixels(0, 0, width, height, gl.RGBA, gl.UNSIGNED_BYTE, all);
const kinds = new Set(); for (let i = 0; i < all.length; i += 4) kinds.add(all[i] << 16 | all[i + 1] << 8 | all[i + 2]);
const drawn = `colours ${kinds.size}`; $("follow").checked = true; show(3); $("time").dispatchEvent(new Event("input"));
document.title = JSON.stringify({faults, drawn, now: $("now").textContent, error: gl.getError()}); });</script></body>"""
    watched = tmp_path / "watched.html"
    watched.write_text(page.replace("<head>", "<head>" + watch, 1).replace("</body>", tell, 1), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    done = subprocess.run(
        [browser, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1000,700", "--dump-dom", watched.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    title = done.stdout.partition("<title>")[2].partition("</title>")[0].replace("&amp;", "&")
    assert title.startswith("{"), done.stderr[-2000:]
    said = json.loads(title)
    assert said["faults"] == []
    assert said["error"] == 0
    assert int(said["drawn"].split()[1]) > 50
    assert said["now"] == f"4 / {5}"
