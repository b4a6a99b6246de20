"""Lenses: reading calibrations, resizing, undistortion."""

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fw_pipeline.annotate.clips import FrameTransform, known_intrinsics
from fw_pipeline.annotate.lens import Lens, LensError, read_calibration
from fw_pipeline.annotate.types import Clip

LENS = Lens(fx=500, fy=510, cx=330, cy=230, height=480, width=640, k1=-0.12, k2=0.03, p1=0.001, p2=-0.002)


@pytest.fixture
def video(tmp_path: Path) -> Path:
    return tmp_path / "a.mp4"


def beside(video: Path, name: str, content: str | dict[str, object]) -> None:
    (video.parent / name).write_text(content if isinstance(content, str) else json.dumps(content))


def test_no_file_no_lens(video: Path) -> None:
    assert read_calibration(video, 480, 640) is None


def test_camera_json_is_read_and_scaled_to_the_video(video: Path) -> None:
    beside(video, "a.camera.json", {"fx": 1000, "fy": 1020, "cx": 660, "cy": 460, "k1": -0.1, "width": 1280, "height": 960})
    lens = read_calibration(video, 480, 640)
    assert lens == Lens(fx=500, fy=510, cx=330, cy=230, k1=-0.1, height=480, width=640)
    assert lens.source == "calibration"
    assert lens.std == 0


def test_camera_json_needs_only_a_focal_length(video: Path) -> None:
    beside(video, "a.camera.json", {"fx": 500})
    assert read_calibration(video, 480, 640) == Lens(fx=500, fy=500, cx=320, cy=240, height=480, width=640)


@pytest.mark.parametrize(
    ("model", "numbers", "expected"),
    [
        ("SIMPLE_PINHOLE", "500 320 240", {"fx": 500, "fy": 500}),
        ("PINHOLE", "500 510 320 240", {"fx": 500, "fy": 510}),
        ("SIMPLE_RADIAL", "500 320 240 -0.1", {"fx": 500, "fy": 500, "k1": -0.1}),
        ("RADIAL", "500 320 240 -0.1 0.02", {"fx": 500, "fy": 500, "k1": -0.1, "k2": 0.02}),
        ("OPENCV", "500 510 320 240 -0.1 0 0.01 0.02", {"fx": 500, "fy": 510, "k1": -0.1, "p1": 0.01, "p2": 0.02}),
    ],
)  # fmt: skip
def test_colmap_cameras_are_read(video: Path, model: str, numbers: str, expected: dict[str, float]) -> None:
    beside(video, "cameras.txt", f"# Camera list\n1 {model} 640 480 {numbers}\n")
    assert read_calibration(video, 480, 640) == Lens(**(expected | {"cx": 320, "cy": 240, "height": 480, "width": 640}))  # type: ignore[arg-type]


def test_nerfstudio_transforms_are_read(video: Path) -> None:
    content = {
        "camera_model": "OPENCV",
        "fl_x": 500,
        "fl_y": 510,
        "cx": 320,
        "cy": 240,
        "w": 640,
        "h": 480,
        "k1": -0.1,
        "frames": [],
    }
    beside(video, "transforms.json", content)
    assert read_calibration(video, 480, 640) == Lens(fx=500, fy=510, cx=320, cy=240, k1=-0.1, height=480, width=640)


def test_the_videos_own_file_counts_before_the_folders(video: Path) -> None:
    beside(video, "cameras.txt", "1 SIMPLE_PINHOLE 640 480 400 320 240")
    beside(video, "a.camera.json", {"fx": 500})
    lens = read_calibration(video, 480, 640)
    assert lens is not None
    assert lens.fx == 500


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.camera.json", "{", r"a\.camera\.json: not JSON"),
        ("a.camera.json", {"focal": 3}, "focal: not known"),
        ("a.camera.json", {"cx": 3}, "fx: missing"),
        ("a.camera.json", {"fx": "wide"}, "fx: 'wide' is no number"),
        ("a.camera.json", {"fx": 0.9}, "fx: 0.9 cannot be a focal length in pixels"),
        ("a.camera.json", {"fx": 500, "cx": -4}, "outside"),
        ("a.camera.json", {"fx": 500, "width": 640, "height": 640}, "another crop"),
        ("cameras.txt", "1 OPENCV_FISHEYE 640 480 1 2 3 4 5 6 7 8", "OPENCV_FISHEYE is not one of"),
        ("cameras.txt", "1 PINHOLE 640 480 500 320 240", "PINHOLE has 4 parameters"),
        ("cameras.txt", "1 PINHOLE 640 480 500 500 320 240\n2 PINHOLE 640 480 600 600 320 240", "2 different cameras"),
        ("cameras.txt", "# nothing", "no camera"),
        ("transforms.json", {"frames": [{"fl_x": 1.0}, {"fl_x": 2.0}]}, "different lenses"),
        ("transforms.json", {"camera_model": "OPENCV_FISHEYE", "fl_x": 500}, "camera_model"),
        ("transforms.json", {"fl_x": 500, "k3": 0.1}, "k3"),
        ("transforms.json", {}, "fl_x: missing"),
    ],
)
def test_a_calibration_that_cannot_be_used_names_file_and_key(
    video: Path, name: str, content: str | dict[str, object], message: str
) -> None:
    beside(video, name, content)
    with pytest.raises(LensError, match=message) as caught:
        read_calibration(video, 480, 640)
    assert str(caught.value).startswith(name)


@settings(deadline=None, max_examples=40)
@given(st.integers(100, 900), st.integers(100, 900))
def test_a_fitted_lens_sees_a_point_where_the_fitted_picture_has_it(height: int, width: int) -> None:
    point = np.array([0.2, -0.1, 1.0])
    source = LENS.intrinsics @ point
    fit = FrameTransform(480, 640, height, width)
    expected = source[:2] * fit.scale - np.array([fit.left, fit.top])
    clip = Clip("c", "v.mp4", "0", 0, 16.0, (0.0,), 480, 640, height, width, replace(LENS, k1=0, k2=0, p1=0, p2=0))
    found = known_intrinsics(clip, height, width)
    assert found is not None
    np.testing.assert_allclose((found @ point)[:2], expected, atol=1e-9)


def test_cropping_and_resizing_undo_each_other() -> None:
    there = LENS.cropped(10, 20, 400, 600).resized(800, 1200)
    back = there.resized(400, 600).cropped(-10, -20, 480, 640)
    np.testing.assert_allclose(back.intrinsics, LENS.intrinsics)


def test_undistorted_pictures_are_those_of_the_pinhole() -> None:
    v, u = np.meshgrid(np.arange(480) + 0.5, np.arange(640) + 0.5, indexing="ij")
    pinhole, map_x, map_y = LENS.undistortion()
    assert not pinhole.distorted
    ray = np.stack([(u - pinhole.cx) / pinhole.fx, (v - pinhole.cy) / pinhole.fy], -1)
    normal = ray * [LENS.fx, LENS.fy] + [LENS.cx, LENS.cy]
    expected = LENS.distort(normal)
    np.testing.assert_allclose(np.stack([map_x, map_y], -1) + 0.5, expected, atol=2e-3)
    points = np.c_[ray.reshape(-1, 2)[::5000], np.ones(len(ray.reshape(-1, 2)[::5000]))]
    seen, _ = cv2.projectPoints(points, np.zeros(3), np.zeros(3), LENS.intrinsics, LENS.distortion)
    np.testing.assert_allclose(seen[:, 0], expected.reshape(-1, 2)[::5000], atol=1e-6)


@pytest.mark.parametrize("k1", [-0.2, 0.15])
def test_an_undistorted_picture_has_no_blank_border_and_wastes_little(k1: float) -> None:
    lens = Lens(fx=500, fy=500, cx=320, cy=240, height=480, width=640, k1=k1)
    _, map_x, map_y = lens.undistortion()
    assert map_x.min() >= -0.01
    assert map_y.min() >= -0.01
    assert map_x.max() <= 639.01
    assert map_y.max() <= 479.01
    assert min(map_x.min(), map_y.min()) < 2


def test_a_pinhole_leaves_pictures_alone() -> None:
    lens = Lens(fx=500, fy=500, cx=320, cy=240, height=480, width=640)
    picture = np.zeros((480, 640, 3), np.uint8)
    assert lens.undistorter()(picture) is picture
    assert lens.pinhole() is lens
