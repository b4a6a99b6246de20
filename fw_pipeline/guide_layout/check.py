"""Every file of a sample, looked at before anything is written: constant memory, frame by frame through memory maps."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from fw_model.cameras import PoseFileError, pose_rows, read_pose_file
from fw_pipeline.annotate.types import VideoSetAside
from fw_pipeline.annotate.video import decode
from fw_pipeline.guide_layout.conventions import require_given_rows
from fw_pipeline.guide_layout.far import as_z, near
from fw_pipeline.guide_layout.fit import DepthKind, DepthReading, Probe, Reading, in_camera, read_depth, read_points
from fw_pipeline.guide_layout.metadata import Entry, Fault, SampleError
from fw_pipeline.guide_layout.row_times import frames_of

PROBE = (24, 40)  # rows and columns of the pixels that are compared
MAX_STRETCH = 0.03  # relative difference of a map's aspect from its video's: rounding to multiples of 8, not another crop
_FRAME = re.compile(r"frame_(\d+)\.npy")
# 19-number rows give the lens as shares of some picture: the sample's own, or the base model's 1280 x 720 resized and cropped.
_SOURCES = {"the pose file": None, "the pose file, as of a 1280x720 source": (720, 1280)}


@dataclass(frozen=True)
class Sample:
    """A sample whose files are all there, hold what they should, and agree with each other."""

    entry: Entry
    depth_files: tuple[Path, ...]  # one per frame
    points_files: tuple[Path, ...]
    times: tuple[float, ...]  # seconds, of the video frame that belongs to each
    fps: float
    height: int  # of the video
    width: int
    w2c: np.ndarray  # [T, 3, 4] float64, as in the file
    points: Reading
    depth: DepthReading

    @property
    def frames(self) -> int:
        return len(self.times)


def check_sample(entry: Entry, depth_kind: DepthKind | Literal["auto"] = "auto") -> Sample:
    """Look at every file of a sample. Raises SampleError with everything that is wrong."""
    faults: list[Fault] = []
    w2c, lens, row_times = _poses(entry, faults)
    frames = entry.frames or (len(w2c) if w2c is not None else None)
    if w2c is not None and frames != len(w2c):
        faults.append(entry.fault(entry.camera, f"{len(w2c)} poses, but metadata.json says {frames} frames"))
    if entry.intrinsics is not None and len(entry.intrinsics) not in (1, frames):
        faults.append(
            entry.fault(entry.camera, f"metadata.json has intrinsics of {len(entry.intrinsics)} frames for {frames} poses")
        )
    times, height, width = _video(entry, frames, row_times, faults)
    depth_files = _files(entry, "depth", frames, faults)
    points_files = _files(entry, "points", frames, faults)
    depth, _ = _maps(entry, depth_files, 2, (height, width), faults)
    points, points_size = _maps(entry, points_files, 3, (height, width), faults)
    if faults or w2c is None or depth is None or points is None:
        raise SampleError(*faults)
    z_depth, far = as_z(depth, w2c, points)
    # A point that is all 0 is written where there is none, as depth is.
    known = (z_depth > 0) & np.isfinite(points).all(-1) & points.any(-1)
    points = np.where(known[..., None], points, np.nan).astype(np.float64)
    try:
        reading = read_points(
            Probe(_centres(*points_size), points), w2c, _lenses(entry, lens, len(w2c), height, width), height, width
        )
        if reading.frame == "camera":
            require_given_rows(points, w2c, reading.lens, lambda t: _z(points_files[t]), height, width)
    except ValueError as error:
        where = entry.points if isinstance(entry.points, Path) else entry.points[0].parent
        raise SampleError(entry.fault(where, str(error))) from error
    z = (in_camera(points, w2c) if reading.frame == "world" else points)[..., 2]
    try:
        depth_reading = read_depth(depth, z_depth, far, z, depth_kind)
    except ValueError as error:
        where = entry.depth if isinstance(entry.depth, Path) else entry.depth[0].parent
        raise SampleError(entry.fault(where, str(error))) from error
    count = len(times)
    fps = (count - 1) / (times[-1] - times[0]) if count > 1 else entry.fps or 1.0
    return Sample(entry, depth_files, points_files, times, fps, height, width, w2c, reading, depth_reading)


# -------------------------------------------------------------------------------------------------------------- poses


def _poses(entry: Entry, faults: list[Fault]) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
    """w2c [T, 3, 4] float64 with true rotations; of 19-number rows the lens [T, 4], as shares of a picture, and times [T]."""
    try:
        cameras = read_pose_file(entry.camera, 1, 1, 1, 1)
        rows = [fields for _, fields in pose_rows(entry.camera)]
    except FileNotFoundError:
        faults.append(entry.fault(entry.camera, "missing"))
        return None, None, None
    except (PoseFileError, OSError) as error:
        faults.append(entry.fault(entry.camera, str(error).removeprefix(f"{entry.camera}:").strip()))
        return None, None, None
    w2c = nearest_rotations(cameras.w2c.double().numpy())
    if len(rows[0]) != 19:  # for shorter rows the reader fills a lens in
        return w2c, None, None
    lens = cameras.intrinsics.double().numpy()[:, [0, 1, 0, 1], [0, 1, 2, 2]]
    times = np.array([float(fields[0]) for fields in rows])
    return w2c, lens, times if np.ptp(times) > 0 else None  # one number for all rows is no time


def nearest_rotations(w2c: np.ndarray) -> np.ndarray:
    """w2c [T, 3, 4] with rotations that are off orthonormal by few digits in a text file made true; others untouched."""
    rotation = w2c[:, :, :3]
    off = np.abs(rotation @ rotation.transpose(0, 2, 1) - np.eye(3)).max((1, 2)) > 1e-6
    fixed = w2c.copy()
    u, _, vt = np.linalg.svd(rotation[off])
    fixed[off, :, :3] = u @ vt
    return fixed


def _lenses(entry: Entry, lens: np.ndarray | None, frames: int, height: int, width: int) -> dict[str, np.ndarray]:
    """What the lens may be, as shares of the picture: metadata.json's word, else the pose file's, else nothing."""
    if entry.intrinsics is not None:
        return {"metadata.json": np.broadcast_to(entry.intrinsics / [width, height, width, height], (frames, 4))}
    if lens is None:
        return {}
    return {name: lens * _cover(height, width, *source) if source else lens for name, source in _SOURCES.items()}


def _cover(height: int, width: int, source_height: int, source_width: int) -> np.ndarray:
    """Factors on fx fy cx cy, as shares, of a source resized to cover the picture and cropped (see `read_pose_file`)."""
    ratio = (source_width / source_height) / (width / height)
    return np.array([ratio, 1, 1, 1]) if ratio > 1 else np.array([1, 1 / ratio, 1, 1])


# -------------------------------------------------------------------------------------------------------------- video


def _video(
    entry: Entry, frames: int | None, row_times: np.ndarray | None, faults: list[Fault]
) -> tuple[tuple[float, ...], int, int]:
    """Times of the frames that the rows are about (the first `frames`, where rows have no times), height and width."""
    times: list[float] = []
    sizes: set[tuple[int, int]] = set()
    if not entry.video.is_file():
        faults.append(entry.fault(entry.video, "missing"))
        return (), 0, 0
    try:
        for frame in decode(entry.video):
            times.append(frame.time)
            sizes.add((frame.height, frame.width))
    except VideoSetAside as error:
        faults.append(entry.fault(entry.video, str(error).removeprefix(f"{entry.video.name}: ")))
        return (), 0, 0
    if len(sizes) != 1:
        faults.append(entry.fault(entry.video, "its frames change size" if sizes else "no frame could be decoded"))
        return (), 0, 0
    if frames is not None and len(times) < frames:
        faults.append(entry.fault(entry.video, f"{len(times)} frames, but {frames} are annotated"))
    elif row_times is not None and len(row_times) == frames:
        try:
            times = [times[i] for i in frames_of(row_times, times)]
        except ValueError as error:
            faults.append(entry.fault(entry.camera, str(error)))
    height, width = sizes.pop()
    return tuple(times[:frames]), height, width


# --------------------------------------------------------------------------------------------------------------- maps


def _files(entry: Entry, kind: Literal["depth", "points"], frames: int | None, faults: list[Fault]) -> tuple[Path, ...]:
    """The map of every frame, in order; missing ones are faults."""
    place: Path | tuple[Path, ...] = getattr(entry, kind)
    if isinstance(place, tuple):
        faults += [entry.fault(path, "missing") for path in place if not path.is_file()]
        if frames is not None and len(place) != frames:
            faults.append(Fault(entry.sample_id, "metadata.json", f"{len(place)} {kind} files for {frames} frames"))
        return place
    if not place.is_dir():
        faults.append(entry.fault(place, "missing: expected a folder of frame_0000.npy, frame_0001.npy, ..."))
        return ()
    numbered = {int(match[1]): path for path in place.iterdir() if (match := _FRAME.fullmatch(path.name))}
    if not numbered:
        faults.append(entry.fault(place, "holds no frame_0000.npy"))
        return ()
    count = frames or len(numbered)
    first = 1 if sorted(numbered) == list(range(1, count + 1)) else 0  # some count from one
    wanted = range(first, first + count)
    for number in wanted:
        if number not in numbered:
            faults.append(entry.fault(place / f"frame_{number:04d}.npy", "missing"))
    beyond = sorted(set(numbered) - set(wanted))
    if beyond:
        faults.append(entry.fault(numbered[beyond[0]], f"one of {len(beyond)} files beyond the {count} frames"))
    root = entry.root.resolve()
    for number in wanted:
        if number in numbered and numbered[number].is_symlink() and not numbered[number].resolve().is_relative_to(root):
            faults.append(entry.fault(numbered[number], "a link that leads out of the folder"))
    return tuple(numbered[number] for number in wanted if number in numbered)


def open_map(path: Path, dimensions: int) -> np.ndarray:
    """A memory map of a `.npy` file with [h, w] or [h, w, 3] numbers. Raises ValueError with what else it is."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, OSError) as error:
        with path.open("rb") as file:
            pickled = "object" in str(error).lower() or file.read(1) == b"\x80"
        reason = (
            "a pickled npy, which can run code when read; save it as a plain array"
            if pickled
            else f"not a whole npy file ({error})"
        )
        raise ValueError(reason) from error
    wanted = "[h, w]" if dimensions == 2 else "[h, w, 3]"
    if array.ndim != dimensions or (dimensions == 3 and array.shape[2] != 3) or 0 in array.shape:
        raise ValueError(f"shape {list(array.shape)}, expected {wanted}")
    if array.dtype.kind not in ("fiu" if dimensions == 2 else "f"):
        raise ValueError(f"dtype {array.dtype}, expected float numbers")
    return array


def _maps(
    entry: Entry, files: tuple[Path, ...], dimensions: int, video: tuple[int, int], faults: list[Fault]
) -> tuple[np.ndarray | None, tuple[int, int]]:
    """Values at the probed pixels, [T, N] or [T, N, 3] in the files' dtype (None when a file is bad); the maps' size."""
    probes: list[np.ndarray] = []
    size = (0, 0)
    before = len(faults)
    for path in files:
        if not path.is_file():
            continue  # a fault already
        try:
            array = open_map(path, dimensions)
            size = size if size[0] else (array.shape[0], array.shape[1])
            if array.shape[:2] != size:
                raise ValueError(f"{array.shape[0]}x{array.shape[1]}, but the frames before are {size[0]}x{size[1]}")
            _check_values(array, dimensions)
        except ValueError as error:
            faults.append(entry.fault(path, str(error)))
            continue
        rows, cols = _probed(*size)
        probes.append(np.array(array[rows, cols]))
    if size[0] and video[0] and abs(size[1] / size[0] / (video[1] / video[0]) - 1) > MAX_STRETCH:
        faults.append(
            entry.fault(files[0].parent, f"maps of {size[0]}x{size[1]} do not cover the video's {video[0]}x{video[1]} picture")
        )
    return (np.stack(probes) if probes and len(faults) == before else None), size


def _z(file: Path) -> np.ndarray:
    """z [h, w] of a map of points in its camera's frame, 0 where unknown."""
    z = open_map(file, 3)[..., 2]
    return np.where(near(z), z, 0)


def _check_values(array: np.ndarray, dimensions: int) -> None:
    if not np.isfinite(array).any():
        raise ValueError(f"{array.size} values are NaN or infinite, which is all of them")
    if dimensions == 2 and (array < 0).any():
        raise ValueError("negative depth (unknown depth is written as 0)")


def _probed(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows [N] and columns [N] of the pixels that hold the probed positions, the same on maps of any size."""
    rows, cols = (((np.arange(n) + 0.5) / n * size).astype(int) for n, size in zip(PROBE, (height, width), strict=True))
    return np.repeat(rows, len(cols)), np.tile(cols, len(rows))


def _centres(height: int, width: int) -> np.ndarray:
    """Centres [N, 2] of the probed pixels as shares of width and height."""
    rows, cols = _probed(height, width)
    return np.stack([(cols + 0.5) / width, (rows + 0.5) / height], -1)
