"""Cameras: pose files, Plücker rays and control latents, (un)projection, the 9-D pose encoding.

Conventions: w2c [3, 4] maps world to camera, x_cam = R x_world + t, with OpenCV axes (x right, y down, z forward);
intrinsics K [3, 3] are in pixels of the H x W image, skew 0; pixel (row v, column u) has its centre at (u + 0.5, v + 0.5);
depth is z-depth. Functions are batched over leading dimensions and run on the device and in the dtype of their inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fw_model.errors import Explained

# fx, fy, cx, cy as shares of a 1280 x 720 image: the lens of the base model's own pose files. Rows without intrinsics get it.
DEFAULT_LENS = (0.532139961, 0.946026558, 0.5, 0.5)
FRAMES_PER_LATENT = 4
_ROTATION_TOLERANCE = 1e-2  # pose files in the wild carry as few as four digits


class PoseFileError(Explained, ValueError):
    """A pose file that cannot be read; the message is `file:line: what was wrong`."""


@dataclass(frozen=True)
class Cameras:
    """One camera per frame. w2c [T, 3, 4]; intrinsics [T, 3, 3] in pixels of the image they go with.

    `size` is the (height, width) of that image; None: whatever image the caller has.
    """

    w2c: Tensor
    intrinsics: Tensor
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        frames = self.w2c.shape[0] if self.w2c.ndim else 0
        if self.w2c.shape != (frames, 3, 4) or self.intrinsics.shape != (frames, 3, 3) or not frames:
            raise ValueError(
                f"cameras: expected w2c [T,3,4] and intrinsics [T,3,3], got {list(self.w2c.shape)} and "
                f"{list(self.intrinsics.shape)}"
            )

    def __len__(self) -> int:
        return self.w2c.shape[0]

    def resized(self, height: int, width: int) -> Cameras:
        """The same cameras for images resized to cover height x width and cropped to it, by the base's aspect rule.

        Cameras that do not know the size of their image are taken to be for this one already.
        """
        if self.size is None or self.size == (height, width):
            return replace(self, size=(height, width))
        own_height, own_width = self.size
        fx, fy, cx, cy = _aspect_scale(height, width, own_height, own_width)
        across, down = width / own_width, height / own_height
        scale = _intrinsics(*self.intrinsics.new_tensor([fx * across, fy * down, cx * across, cy * down]))
        return replace(self, intrinsics=self.intrinsics * scale, size=(height, width))


# ---------------------------------------------------------------------------------------------------------- poses


def invert_pose(pose: Tensor) -> Tensor:
    """[..., 3, 4] rigid pose -> its inverse [..., 3, 4] (w2c <-> c2w)."""
    rotation = pose[..., :3].mT
    return torch.cat([rotation, -rotation @ pose[..., 3:]], dim=-1)


def compose_poses(second: Tensor, first: Tensor) -> Tensor:
    """[..., 3, 4] x [..., 3, 4] -> the pose that applies `first`, then `second`."""
    rotation = second[..., :3] @ first[..., :3]
    return torch.cat([rotation, second[..., :3] @ first[..., 3:] + second[..., 3:]], dim=-1)


def relative_to_first(w2c: Tensor) -> Tensor:
    """w2c [..., T, 3, 4] -> the same cameras with the first camera as the world; frame 0 is exactly the identity."""
    relative = compose_poses(w2c, invert_pose(w2c[..., :1, :, :]))
    identity = torch.eye(3, 4, dtype=w2c.dtype, device=w2c.device).expand_as(relative[..., :1, :, :])
    return torch.cat([identity, relative[..., 1:, :, :]], dim=-3)


def matrix_to_quaternion(rotation: Tensor) -> Tensor:
    """Rotation [..., 3, 3] -> unit quaternion xyzw [..., 4] with canonical sign (see `canonical_quaternion`).

    Of the four classical formulas the one with the largest divisor is taken for each matrix, so it is accurate to
    rounding everywhere, half turns included.
    """
    m00, m01, m02, m10, m11, m12, m20, m21, m22 = rotation.flatten(-2).unbind(-1)
    candidates = torch.stack(
        [
            torch.stack([1 + m00 - m11 - m22, m10 + m01, m20 + m02, m21 - m12], dim=-1),  # 4 x (x, y, z, w)
            torch.stack([m10 + m01, 1 - m00 + m11 - m22, m21 + m12, m02 - m20], dim=-1),  # 4 y (x, y, z, w)
            torch.stack([m20 + m02, m21 + m12, 1 - m00 - m11 + m22, m10 - m01], dim=-1),  # 4 z (x, y, z, w)
            torch.stack([m21 - m12, m02 - m20, m10 - m01, 1 + m00 + m11 + m22], dim=-1),  # 4 w (x, y, z, w)
        ],
        dim=-2,
    )
    best = candidates.diagonal(dim1=-2, dim2=-1).argmax(-1)
    chosen = torch.take_along_dim(candidates, best[..., None, None], dim=-2).squeeze(-2)
    return canonical_quaternion(F.normalize(chosen, dim=-1))


def canonical_quaternion(quaternion: Tensor) -> Tensor:
    """xyzw [..., 4] -> the one of q and -q with w > 0 (w = 0: the last non-zero of x, y, z positive)."""
    x, y, z, w = quaternion.unbind(-1)
    lead = torch.where(w != 0, w, torch.where(z != 0, z, torch.where(y != 0, y, x)))
    return torch.where(lead[..., None] < 0, -quaternion, quaternion)


def quaternion_to_matrix(quaternion: Tensor) -> Tensor:
    """xyzw [..., 4] of any non-zero length -> rotation [..., 3, 3]."""
    x, y, z, w = F.normalize(quaternion, dim=-1).unbind(-1)
    entries = [
        1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w),
        2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w),
        2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(entries, dim=-1).unflatten(-1, (3, 3))


def encode_pose(w2c: Tensor, intrinsics: Tensor, height: int, width: int) -> Tensor:
    """w2c [..., 3, 4], intrinsics [..., 3, 3] (pixels of height x width) -> encoding [..., 9].

    Translation of w2c (3), unit quaternion xyzw of its rotation with canonical sign (4), fov_h, fov_w in radians
    (vertical, then horizontal). The principal point is not kept: `decode_pose` puts it at the image centre.
    """
    fov_h = 2 * torch.atan(0.5 * height / intrinsics[..., 1, 1])
    fov_w = 2 * torch.atan(0.5 * width / intrinsics[..., 0, 0])
    return torch.cat([w2c[..., 3], matrix_to_quaternion(w2c[..., :3]), torch.stack([fov_h, fov_w], dim=-1)], dim=-1)


def decode_pose(encoding: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Encoding [..., 9] -> w2c [..., 3, 4], intrinsics [..., 3, 3] with the principal point at the image centre.

    The quaternion is normalised, so a network's raw output may be decoded.
    """
    w2c = torch.cat([quaternion_to_matrix(encoding[..., 3:7]), encoding[..., :3, None]], dim=-1)
    fy = 0.5 * height / torch.tan(0.5 * encoding[..., 7])
    fx = 0.5 * width / torch.tan(0.5 * encoding[..., 8])
    return w2c, _intrinsics(fx, fy, torch.full_like(fx, 0.5 * width), torch.full_like(fy, 0.5 * height))


def _intrinsics(fx: Tensor, fy: Tensor, cx: Tensor, cy: Tensor) -> Tensor:
    zero, one = torch.zeros_like(fx), torch.ones_like(fx)
    return torch.stack([fx, zero, cx, zero, fy, cy, zero, zero, one], dim=-1).unflatten(-1, (3, 3))


# ----------------------------------------------------------------------------------------------------------- rays


def camera_rays(intrinsics: Tensor, height: int, width: int) -> Tensor:
    """intrinsics [..., 3, 3] -> [..., H, W, 3] camera-frame directions of the pixel centres, with z = 1."""
    fx, fy, cx, cy = (intrinsics[..., i, j, None, None] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    u = torch.arange(width, dtype=intrinsics.dtype, device=intrinsics.device) + 0.5
    v = torch.arange(height, dtype=intrinsics.dtype, device=intrinsics.device)[:, None] + 0.5
    x, y = torch.broadcast_tensors((u - cx) / fx, (v - cy) / fy)
    return torch.stack([x, y, torch.ones_like(x)], dim=-1)


def unproject(depth: Tensor, intrinsics: Tensor, w2c: Tensor) -> Tensor:
    """depth [..., T, H, W], intrinsics [..., T, 3, 3], w2c [..., T, 3, 4] -> world points [..., T, H, W, 3].

    Pixels of depth 0 (unknown) land on the camera centre and must be masked by the caller.
    """
    height, width = depth.shape[-2:]
    in_camera = camera_rays(intrinsics, height, width) * depth[..., None]
    centred = in_camera - w2c[..., None, None, :, 3]
    return torch.einsum("...hwi,...ij->...hwj", centred, w2c[..., :3])  # R^T (x - t), as a row vector times R


def project(points: Tensor, intrinsics: Tensor, w2c: Tensor) -> tuple[Tensor, Tensor]:
    """World points [..., N, 3] seen by cameras intrinsics [..., 3, 3], w2c [..., 3, 4] (leading dimensions broadcast).

    Returns pixel positions (u, v) [..., N, 2] and z-depth [..., N]. Points with z <= 0 are behind the camera: their pixel
    is finite but meaningless, mask by z.
    """
    in_camera = points @ w2c[..., :3].mT + w2c[..., None, :, 3]
    z = in_camera[..., 2]
    tiny = torch.finfo(z.dtype).tiny ** 0.5
    safe = torch.where(z.abs() > tiny, z, torch.full_like(z, tiny))
    u = in_camera[..., 0] / safe * intrinsics[..., None, 0, 0] + intrinsics[..., None, 0, 2]
    v = in_camera[..., 1] / safe * intrinsics[..., None, 1, 1] + intrinsics[..., None, 1, 2]
    return torch.stack([u, v], dim=-1), z


def plucker(w2c: Tensor, intrinsics: Tensor, height: int, width: int) -> Tensor:
    """w2c [..., T, 3, 4], intrinsics [..., T, 3, 3] (pixels of height x width) -> Plücker rays [..., T, 6, H, W].

    Channels [o x d, d]: camera centre o and unit direction d of the pixel centres, in the frame of the first camera.
    """
    c2w = invert_pose(relative_to_first(w2c))
    d = torch.einsum("...ij,...hwj->...ihw", c2w[..., :3], F.normalize(camera_rays(intrinsics, height, width), dim=-1))
    o = c2w[..., 3, None, None].expand_as(d)
    return torch.cat([torch.linalg.cross(o, d, dim=-3), d], dim=-3)


def plucker_embedding(cameras: Cameras, height: int, width: int) -> Tensor:
    """Plücker rays [T, 6, H, W] of one clip's cameras, relative to frame 0 (see `plucker`).

    Cameras of an image of another size are fitted to height x width first (see `Cameras.resized`).
    """
    return plucker(cameras.w2c, cameras.resized(height, width).intrinsics, height, width)


def control_latents(w2c: Tensor, intrinsics: Tensor, height: int, width: int) -> Tensor:
    """w2c [B, T, 3, 4], intrinsics [B, T, 3, 3] -> the base's camera control [B, 24, F, H, W], F = 1 + (T - 1) / 4.

    Frame 0 is repeated to four frames, so that T + 3 = 4 F, and every four frames fold into one latent frame with
    channel = 4 * plucker_channel + frame_in_group, as the base was trained. Raises ValueError unless T = 4k + 1.
    """
    frames = w2c.shape[-3]
    if frames % FRAMES_PER_LATENT != 1:
        low = max(1, (frames - 1) // FRAMES_PER_LATENT * FRAMES_PER_LATENT + 1)
        raise ValueError(f"control latents need 4k+1 frames, got {frames}; nearest: {low} or {low + FRAMES_PER_LATENT}")
    rays = plucker(w2c, intrinsics, height, width)
    padded = torch.cat([rays[:, :1].expand(-1, FRAMES_PER_LATENT - 1, -1, -1, -1), rays], dim=1)
    grouped = padded.unflatten(1, (-1, FRAMES_PER_LATENT))  # [B, F, 4, 6, H, W]
    return grouped.permute(0, 3, 2, 1, 4, 5).flatten(1, 2)


# ----------------------------------------------------------------------------------------------------- pose files


def read_pose_file(
    path: str | Path, height: int | None = None, width: int | None = None, source_height: int = 720, source_width: int = 1280
) -> Cameras:
    """Read a pose file into float32 cameras with intrinsics in pixels of a height x width image, the source's by default.

    An optional first line that is blank, a url or a `#` comment; then per frame 19 numbers `t fx fy cx cy 0 0` + w2c
    row-major, with spaces or commas between them and intrinsics normalised by the source's size, or 12 (w2c) or 16 (4 x 4)
    numbers, which get `DEFAULT_LENS`.
    Where the source is wider than the target, it is taken as resized to the target's height and cropped in width (fx grows),
    else the other way round: the base model's rule. Poses stay as they are in the file, frame 0 need not be the identity.

    Raises PoseFileError, naming the line, for anything else; FileNotFoundError when there is no such file.
    """
    numbered = pose_rows(path)
    rows = [_parse_row(f"{path}:{line}", fields) for line, fields in numbered]
    counts = [count for count, _, _ in rows]
    for (line, _), count in zip(numbered, counts, strict=True):
        if count != counts[0]:
            raise PoseFileError(f"{path}:{line}: {count} numbers, but the rows before have {counts[0]}")
    lens = torch.tensor([lens for _, lens, _ in rows], dtype=torch.float64)
    poses = torch.tensor([pose for _, _, pose in rows], dtype=torch.float64)
    cameras = with_lens(poses.float().unflatten(-1, (3, 4)), lens, source_height, source_width)
    return cameras.resized(height or source_height, width or source_width)


def pose_rows(path: str | Path) -> list[tuple[int, list[str]]]:
    """(number of the line, its fields) of every row of a pose file, below its header; a byte order mark is no part of it.

    Raises PoseFileError for a file that is no text or has no rows, FileNotFoundError when there is no such file.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise PoseFileError(f"{path}: not a text file ({error.reason} at byte {error.start})") from error
    while lines and not lines[-1].strip():
        lines.pop()
    header = bool(lines) and _is_header(lines[0])
    if len(lines) == header:
        raise PoseFileError(f"{path}: no poses in the file")
    return [(i, line.replace(",", " ").split()) for i, line in enumerate(lines[header:], start=1 + header)]


def write_pose_file(
    path: str | Path,
    cameras: Cameras,
    height: int | None = None,
    width: int | None = None,
    source_height: int = 720,
    source_width: int = 1280,
) -> None:
    """Write `cameras` (pixels of height x width) as 19-number rows; `read_pose_file` with the same sizes gives them back.

    The size may be left out where the cameras know theirs. The first column is the frame's index.

    Raises ValueError when neither says what size the intrinsics are for.
    """
    if height is None or width is None:
        if cameras.size is None:
            raise ValueError(f"{path}: the cameras do not know the size of their image; give height and width")
        height, width = cameras.size
    size = torch.tensor([width, height, width, height], dtype=torch.float64)
    scale = torch.tensor(_aspect_scale(height, width, source_height, source_width), dtype=torch.float64)
    k = cameras.intrinsics.detach().double().cpu()
    lens = torch.stack([k[:, 0, 0], k[:, 1, 1], k[:, 0, 2], k[:, 1, 2]], dim=-1) / (size * scale)
    poses = cameras.w2c.detach().double().cpu().flatten(1)
    lines = ["# t fx fy cx cy 0 0 w2c(3x4)"]
    for i, (row_lens, pose) in enumerate(zip(lens.tolist(), poses.tolist(), strict=True)):
        lines.append(" ".join([str(i), *(f"{x:.10g}" for x in row_lens), "0", "0", *(f"{x:.10g}" for x in pose)]))
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def with_lens(w2c: Tensor, lens: Tensor, height: int, width: int) -> Cameras:
    """w2c [T, 3, 4], lens [T, 4] (fx, fy, cx, cy as shares of a height x width image) -> float32 cameras of that image."""
    pixels = lens * lens.new_tensor([width, height, width, height])
    return Cameras(w2c, _intrinsics(*pixels.float().unbind(-1)), size=(height, width))


def _is_header(line: str) -> bool:
    text = line.strip()
    return not text or text.startswith("#") or "://" in text


def _aspect_scale(height: int, width: int, source_height: int, source_width: int) -> tuple[float, float, float, float]:
    """Factors on the normalised (fx, fy, cx, cy) for a source that is resized to cover height x width and cropped."""
    ratio = source_width / source_height
    if ratio > width / height:
        return height * ratio / width, 1.0, 1.0, 1.0
    return 1.0, width / ratio / height, 1.0, 1.0


def _parse_row(where: str, fields: Sequence[str]) -> tuple[int, tuple[float, ...], list[float]]:
    """One line -> (numbers in it, normalised lens, 12 numbers of w2c); raises PoseFileError."""
    try:
        numbers = [float(field) for field in fields]
    except ValueError as error:
        raise PoseFileError(f"{where}: {error}") from error
    if len(numbers) not in (12, 16, 19):
        raise PoseFileError(f"{where}: {len(numbers)} numbers; a row has 19 (t fx fy cx cy 0 0 + w2c), 16 (4x4) or 12 (w2c)")
    if not all(map(math.isfinite, numbers)):
        raise PoseFileError(f"{where}: a number is not finite")
    lens: tuple[float, ...] = DEFAULT_LENS
    pose = numbers[:12]
    if len(numbers) == 19:
        lens, pose = tuple(numbers[1:5]), numbers[7:]
        if lens[0] <= 0 or lens[1] <= 0:
            raise PoseFileError(f"{where}: focal lengths must be positive, got {lens[0]:g} and {lens[1]:g}")
    elif len(numbers) == 16 and numbers[12:] != [0.0, 0.0, 0.0, 1.0]:
        raise PoseFileError(f"{where}: the last row of a 4x4 pose must be 0 0 0 1, got {numbers[12:]}")
    rotation = torch.tensor(pose, dtype=torch.float64).view(3, 4)[:, :3]
    off = (rotation @ rotation.mT - torch.eye(3, dtype=torch.float64)).abs().max().item()
    if off > _ROTATION_TOLERANCE or torch.linalg.det(rotation) < 0:
        raise PoseFileError(f"{where}: not a rotation: the 3x3 part of w2c is off orthonormal by {off:.2g} or mirrors")
    return len(numbers), lens, pose
