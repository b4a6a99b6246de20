"""Cameras: poses, rays, control latents, pose files."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from fw_model.cameras import (
    Cameras,
    PoseFileError,
    compose_poses,
    control_latents,
    decode_pose,
    encode_pose,
    invert_pose,
    matrix_to_quaternion,
    plucker_embedding,
    project,
    quaternion_to_matrix,
    read_pose_file,
    relative_to_first,
    unproject,
    write_pose_file,
)
from fw_model.trajectory.text import make_trajectory
from tests.helpers.poses import HEIGHT, WIDTH, pinhole, random_poses

SHARED = Path(__file__).parents[1].parent / "shared"
ROW = "0 0.5 0.9 0.5 0.5 0 0 1 0 0 0.1 0 1 0 0.2 0 0 1 0.3"


unit_quaternions = (
    st.lists(st.floats(-1, 1), min_size=4, max_size=4)
    .map(lambda q: torch.tensor(q, dtype=torch.float64))
    .filter(lambda q: q.norm() > 1e-3)
    .map(lambda q: q / q.norm())
)


# ---- poses


def test_inverse_undoes_a_pose() -> None:
    poses = random_poses(5)
    identity = torch.eye(3, 4, dtype=torch.float64).expand(5, 3, 4)
    torch.testing.assert_close(compose_poses(invert_pose(poses), poses), identity)
    torch.testing.assert_close(compose_poses(poses, invert_pose(poses)), identity)


def test_first_camera_is_identity() -> None:
    relative = relative_to_first(random_poses(6).view(2, 3, 3, 4).float())
    assert torch.equal(relative[:, 0], torch.eye(3, 4).expand(2, 3, 4))


def test_relative_poses_keep_motion_between_frames() -> None:
    poses = random_poses(4)
    relative = relative_to_first(poses)
    for a, b in ((0, 1), (2, 3), (3, 1)):
        torch.testing.assert_close(
            compose_poses(relative[b], invert_pose(relative[a])), compose_poses(poses[b], invert_pose(poses[a]))
        )


@given(quaternion=unit_quaternions)
@settings(deadline=None)
def test_quaternion_round_trip(quaternion: torch.Tensor) -> None:
    matrix = quaternion_to_matrix(quaternion)
    back = matrix_to_quaternion(matrix)
    assert back.norm().item() == pytest.approx(1, abs=1e-12)
    assert back[3] >= 0
    torch.testing.assert_close(quaternion_to_matrix(back), matrix, atol=1e-12, rtol=0)
    np.testing.assert_allclose(Rotation.from_quat(back.numpy()).as_matrix(), matrix.numpy(), atol=1e-12)


@pytest.mark.parametrize("axis", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (-1, 1, 0), (0, 1, -1), (1, 1, 1), (3, -2, 1)])
@pytest.mark.parametrize("angle", [math.pi, math.pi - 1e-9, math.pi + 1e-9, -math.pi, 0.0, 1e-9])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_half_turns_and_tiny_turns_survive_the_quaternion(
    axis: tuple, angle: float, dtype: torch.dtype, tolerance: float
) -> None:
    unit = np.array(axis) / np.linalg.norm(axis)
    matrix = torch.from_numpy(Rotation.from_rotvec(angle * unit).as_matrix()).to(dtype)
    quaternion = matrix_to_quaternion(matrix)
    assert torch.isfinite(quaternion).all()
    torch.testing.assert_close(quaternion_to_matrix(quaternion), matrix, atol=tolerance, rtol=0)


def test_quaternion_sign_is_canonical() -> None:
    q = torch.tensor([0.1, -0.2, 0.3, -0.9])
    torch.testing.assert_close(matrix_to_quaternion(quaternion_to_matrix(q)), -q / q.norm())
    half_turn = torch.diag(torch.tensor([1.0, -1.0, -1.0]))
    assert torch.equal(matrix_to_quaternion(half_turn), torch.tensor([1.0, 0.0, 0.0, 0.0]))


@given(
    quaternion=unit_quaternions,
    translation=st.lists(st.floats(-100, 100), min_size=3, max_size=3),
    focal=st.floats(5, 500),
)
@settings(deadline=None)
def test_pose_encoding_round_trip(quaternion: torch.Tensor, translation: list[float], focal: float) -> None:
    shift = torch.tensor(translation, dtype=torch.float64)[:, None]
    w2c = torch.cat([quaternion_to_matrix(quaternion), shift], dim=1)[None]
    k = pinhole(1, focal)
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-4)):
        w2c_back, k_back = decode_pose(encode_pose(w2c.to(dtype), k.to(dtype), HEIGHT, WIDTH), HEIGHT, WIDTH)
        torch.testing.assert_close(w2c_back, w2c.to(dtype), atol=tolerance, rtol=1e-5)
        torch.testing.assert_close(k_back, k.to(dtype), atol=tolerance, rtol=1e-5)


def test_pose_encoding_is_translation_quaternion_fov() -> None:
    w2c = torch.tensor([[1.0, 0, 0, 7], [0, 0, -1, 8], [0, 1, 0, 9]])  # quarter turn about x
    k = torch.tensor([[WIDTH / 2, 0, WIDTH / 2], [0, HEIGHT / 2 * math.sqrt(3), HEIGHT / 2], [0, 0, 1.0]])
    expected = [7, 8, 9, math.sqrt(0.5), 0, 0, math.sqrt(0.5), math.pi / 3, math.pi / 2]
    torch.testing.assert_close(encode_pose(w2c, k, HEIGHT, WIDTH), torch.tensor(expected))


def test_any_length_of_quaternion_decodes() -> None:
    encoding = torch.tensor([0, 0, 0, 0.3, -0.1, 0.2, 0.8, 1.0, 1.2])
    scaled = encoding.clone()
    scaled[3:7] *= -5
    for a, b in zip(decode_pose(encoding, 32, 48), decode_pose(scaled, 32, 48), strict=True):
        torch.testing.assert_close(a, b)


# ---- rays


def test_projection_undoes_unprojection() -> None:
    depth = 0.5 + torch.rand(2, 3, HEIGHT, WIDTH, dtype=torch.float64)
    w2c, k = random_poses(6).view(2, 3, 3, 4), pinhole(6).view(2, 3, 3, 3)
    points = unproject(depth, k, w2c)
    assert points.shape == (2, 3, HEIGHT, WIDTH, 3)
    pixels, z = project(points.flatten(2, 3), k, w2c)
    v, u = torch.meshgrid(torch.arange(HEIGHT) + 0.5, torch.arange(WIDTH) + 0.5, indexing="ij")
    expected = torch.stack([u, v], dim=-1).double().flatten(0, 1).expand_as(pixels)
    torch.testing.assert_close(pixels, expected)
    torch.testing.assert_close(z, depth.flatten(2))


def test_unprojection_is_what_a_loop_over_pixels_gives() -> None:
    w2c, k = random_poses(2), pinhole(2)
    depth = torch.rand(2, 4, 5, dtype=torch.float64) + 1
    points = unproject(depth, k, w2c)
    for t, v, u in ((0, 0, 0), (1, 3, 4), (1, 2, 1)):
        z = depth[t, v, u]
        camera = z * torch.linalg.inv(k[t]) @ torch.tensor([u + 0.5, v + 0.5, 1], dtype=torch.float64)
        torch.testing.assert_close(points[t, v, u], w2c[t, :, :3].T @ (camera - w2c[t, :, 3]))


def test_points_behind_the_camera_are_told_by_their_depth() -> None:
    eye = torch.eye(3, 4)
    pixels, z = project(torch.tensor([[0.0, 0, -2], [1, 1, 0]]), pinhole(1, dtype=torch.float32)[0], eye)
    assert z.tolist() == [-2, 0]
    assert torch.isfinite(pixels).all()


def test_plucker_rays_pass_through_the_camera_and_its_pixels() -> None:
    cameras = Cameras(random_poses(3), pinhole(3))
    rays = plucker_embedding(cameras, HEIGHT, WIDTH)
    moment, direction = rays[:, :3], rays[:, 3:]
    torch.testing.assert_close(direction.norm(dim=1), torch.ones(3, HEIGHT, WIDTH, dtype=torch.float64))
    relative = relative_to_first(cameras.w2c)
    points = unproject(torch.rand(3, HEIGHT, WIDTH, dtype=torch.float64) + 1, cameras.intrinsics, relative)
    torch.testing.assert_close(torch.linalg.cross(points.permute(0, 3, 1, 2), direction, dim=1), moment)
    assert torch.equal(moment[0], torch.zeros_like(moment[0]))


def test_plucker_rays_spread_over_the_field_of_view() -> None:
    """Normalised intrinsics scaled by the image size twice give rays that are almost parallel."""
    rays = plucker_embedding(make_trajectory("pan_left", 1, 336, 592), 336, 592)
    corner, other = rays[0, 3:, 0, 0], rays[0, 3:, -1, -1]
    degrees = math.degrees(math.acos((corner @ other).item()))
    assert 80 < degrees < 100  # 86.6 wide, 56 high


def test_control_latents_fold_four_frames_channel_by_channel() -> None:
    w2c, k = random_poses(18).view(2, 9, 3, 4), pinhole(18).view(2, 9, 3, 3)
    folded = control_latents(w2c, k, HEIGHT, WIDTH)
    assert folded.shape == (2, 24, 3, HEIGHT, WIDTH)
    for b in range(2):
        rays = plucker_embedding(Cameras(w2c[b], k[b]), HEIGHT, WIDTH)
        for frame in range(3):
            for k_in_group in range(4):
                source = max(0, 4 * frame + k_in_group - 3)
                assert torch.equal(folded[b, k_in_group::4, frame], rays[source])


def test_control_latents_follow_the_bases_own_fold() -> None:
    w2c, k = random_poses(5)[None], pinhole(5)[None]
    rays = plucker_embedding(Cameras(w2c[0], k[0]), HEIGHT, WIDTH)[None].transpose(1, 2)  # [1, 6, T, H, W]
    video = torch.cat([rays[:, :, :1].repeat_interleave(4, dim=2), rays[:, :, 1:]], dim=2).transpose(1, 2)
    grouped = video.contiguous().view(1, 2, 4, 6, HEIGHT, WIDTH).transpose(2, 3).contiguous()
    expected = grouped.view(1, 2, 24, HEIGHT, WIDTH).transpose(1, 2)
    assert torch.equal(control_latents(w2c, k, HEIGHT, WIDTH), expected)


def test_control_latents_refuse_other_frame_counts_and_name_those_that_fit() -> None:
    with pytest.raises(ValueError, match="got 7; nearest: 5 or 9"):
        control_latents(random_poses(7)[None], pinhole(7)[None], 16, 16)


# ---- pose files


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("header", [None, "", "# comment", "https://www.youtube.com/watch?v=x"])
def test_header_line_is_optional(tmp_path: Path, header: str | None) -> None:
    lines = [ROW, ROW] if header is None else [header, ROW, ROW]
    assert len(read_pose_file(write(tmp_path / "p.txt", *lines), 32, 48)) == 2


def test_rows_of_12_and_16_carry_the_same_pose_as_19(tmp_path: Path) -> None:
    pose = " ".join(ROW.split()[7:])
    full = read_pose_file(write(tmp_path / "19.txt", ROW), 32, 48)
    for name, row in (("12.txt", pose), ("16.txt", pose + " 0 0 0 1")):
        cameras = read_pose_file(write(tmp_path / name, row), 32, 48)
        assert torch.equal(cameras.w2c, full.w2c)
        assert cameras.w2c[0, :, 3].tolist() == pytest.approx([0.1, 0.2, 0.3])  # elements 3, 7, 11 of the row


@pytest.mark.parametrize(
    ("height", "width", "fx", "fy"),
    [
        (720, 1280, 0.5 * 1280, 0.9 * 720),  # the source's own shape
        (64, 96, 0.5 * 64 * 1280 / 720, 0.9 * 64),  # narrower than the source: cropped in width
        (100, 400, 0.5 * 400, 0.9 * 400 * 720 / 1280),  # wider than the source: cropped in height
    ],
)
def test_intrinsics_follow_the_aspect_rule(tmp_path: Path, height: int, width: int, fx: float, fy: float) -> None:
    k = read_pose_file(write(tmp_path / "p.txt", ROW), height, width).intrinsics[0]
    assert (k[0, 0].item(), k[1, 1].item()) == pytest.approx((fx, fy))
    assert (k[0, 2].item(), k[1, 2].item()) == pytest.approx((width / 2, height / 2))


def test_a_source_of_the_same_shape_changes_nothing(tmp_path: Path) -> None:
    k = read_pose_file(write(tmp_path / "p.txt", ROW), 256, 384, source_height=256, source_width=384).intrinsics[0]
    assert (k[0, 0].item(), k[1, 1].item()) == pytest.approx((0.5 * 384, 0.9 * 256))


@pytest.mark.parametrize(("height", "width"), [(64, 96), (100, 400), (592, 336)])
def test_a_pose_file_can_be_read_before_the_clips_size_is_known(tmp_path: Path, height: int, width: int) -> None:
    path = write(tmp_path / "p.txt", ROW, ROW.replace("0.1", "0.4", 1))
    fitted, at_source = read_pose_file(path, height, width), read_pose_file(path)
    assert at_source.size == (720, 1280)
    torch.testing.assert_close(at_source.resized(height, width).intrinsics, fitted.intrinsics)
    assert torch.equal(plucker_embedding(at_source, height, width), plucker_embedding(fitted, height, width))
    write_pose_file(tmp_path / "again.txt", at_source)
    torch.testing.assert_close(read_pose_file(tmp_path / "again.txt").intrinsics, at_source.intrinsics)


def test_writing_cameras_of_no_known_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give height and width"):
        write_pose_file(tmp_path / "p.txt", Cameras(random_poses(2), pinhole(2)))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((ROW, "1 2 3"), r":2: 3 numbers; a row has 19"),
        (("", ROW, ROW + " x"), r":3: could not convert"),
        ((ROW, "1 0 0 0 0 1 0 0 0 0 1 0"), r":2: 12 numbers, but the rows before have 19"),
        ((ROW, "", ROW), r":2: 0 numbers"),
        (("a header that is not one", ROW), r":1: could not convert"),
        ((ROW.replace("0.3", "nan"),), r":1: a number is not finite"),
        ((ROW.replace("0.5 0.9", "0 0.9"),), r":1: focal lengths must be positive"),
        (("1 0 0 0 0 1 0 0 0 0 1 0 0 0 1 1",), r":1: the last row of a 4x4"),
        (("1 0 0 0 0 1 0 0 0 0 2 0",), r":1: not a rotation"),
        (("1 0 0 0 0 1 0 0 0 0 -1 0",), r":1: not a rotation"),
        ((), r"no poses"),
        (("# only a header",), r"no poses"),
    ],
)
def test_bad_pose_files_are_refused_with_the_line(tmp_path: Path, lines: tuple[str, ...], message: str) -> None:
    with pytest.raises(PoseFileError, match=message):
        read_pose_file(write(tmp_path / "p.txt", *lines), 32, 48)


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(PoseFileError, match="not a text file"):
        read_pose_file(tmp_path / "p.txt", 32, 48)


@given(seed=st.integers(0, 1000), size=st.sampled_from([(64, 96), (96, 64), (336, 592), (592, 336)]))
@settings(max_examples=20, deadline=None)
def test_pose_file_round_trip(tmp_path_factory: pytest.TempPathFactory, seed: int, size: tuple[int, int]) -> None:
    path = tmp_path_factory.mktemp("poses") / "p.txt"
    cameras = Cameras(random_poses(3, seed).float(), pinhole(3, 30.0 + seed).float())
    write_pose_file(path, cameras, *size)
    back = read_pose_file(path, *size)
    torch.testing.assert_close(back.w2c, cameras.w2c)
    torch.testing.assert_close(back.intrinsics, cameras.intrinsics)


@pytest.mark.skipif(not (SHARED / "data/pose_files").is_dir(), reason="shared material is not here")
def test_published_pose_files_are_read() -> None:
    files = sorted((SHARED / "data/pose_files").glob("*.txt")) + sorted((SHARED / "data/re10k/poses").glob("*.txt"))
    assert len(files) > 12
    for file in files:
        assert len(read_pose_file(file, 336, 592)) >= 16


def test_cameras_of_the_wrong_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[T,3,4\]"):
        Cameras(torch.zeros(2, 4, 4), torch.zeros(2, 3, 3))
