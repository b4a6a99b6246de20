"""Ingest: a folder's videos, their keys, and clips of a fixed length and rate cut from their shots.

Nothing is re-encoded: a clip is a list of times in its video (`Clip`), and `read_frames` decodes them at any size.
"""

from __future__ import annotations

import hashlib
import logging
import re
import unicodedata
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from math import gcd, lcm
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fw_model.config import ClipConfig
from fw_model.files import file_hash, printable
from fw_pipeline.annotate.folder import NO_LINKS, Links, list_folder, why_outside
from fw_pipeline.annotate.lens import Lens, LensError, read_calibration
from fw_pipeline.annotate.shots import Scan, scan
from fw_pipeline.annotate.types import Clip, VideoSetAside
from fw_pipeline.annotate.video import decode

logger = logging.getLogger(__name__)

# ------------------------------------------------------------------------------------------------------ files and keys


def find_videos(root: Path, linked_folders: bool = False) -> list[str]:
    """Sorted paths, relative to `root` and with forward slashes, of every file below it that is named like a video.

    Hidden and unfinished files, trash and snapshots are left out; linked folders are entered only if asked for. A folder that
    cannot be read is told in a warning. Raises FileNotFoundError when there is no such folder.
    """
    listing = list_folder(root, linked_folders)
    for folder, why in listing.closed.items():
        logger.warning("%s: cannot be read (%s); videos in it are not seen", printable(str(root / folder)), why)
    return listing.videos


def video_key(relative_path: str) -> str:
    """Name of a video for folders, files and partitions: a readable ASCII slug and 8 hex digits of the path's hash.

    Only [a-z0-9-], at most 49 characters, never empty; equal paths give equal keys, different paths different ones.
    """
    plain = unicodedata.normalize("NFKD", relative_path.rsplit(".", 1)[0]).encode("ascii", "ignore").decode()
    slug = re.sub(r"[^a-z0-9]+", "-", plain.lower())[:40].strip("-") or "video"
    return f"{slug}-{hashlib.sha256(relative_path.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def _relative(video: Path, root: Path, links: Links) -> str:
    """The video's path inside `root`; VideoSetAside when its name is unsafe or it lies, or links, elsewhere."""
    shown = ascii(video.name)[1:-1]
    try:
        relative = video.relative_to(root)
    except ValueError as error:
        raise VideoSetAside(f"{shown}: not inside the videos folder {root}") from error
    text = relative.as_posix()
    if ".." in relative.parts:
        raise VideoSetAside(f"{shown}: its path leads out of the videos folder ('..')")
    if any(unicodedata.category(char) in ("Cc", "Cs") for char in text):
        raise VideoSetAside(f"{shown}: control or undecodable characters in its path; rename it")
    if why := why_outside(video, root, links):
        raise VideoSetAside(f"{shown}: {why}")
    return text


# ------------------------------------------------------------------------------------------------------------- cutting


def cut_clips(video: Path, root: Path, clip: ClipConfig, key: str, links: Links = NO_LINKS) -> list[Clip]:
    """Cut a video into shots and its shots into clips of `clip.frames` frames at `clip.fps`, at least one.

    Every `clip.stride` clip frames a clip starts, as long as the shot lasts. A clip frame is the source frame nearest to
    its time; no source frame is used twice, so a source slower than `clip.fps` gives no clips. A truncated or damaged
    video is refused even where its readable part would do: what is left of it is seldom what its name promises.

    Args:
        video: a file inside `root`.
        root: the videos folder.
        clip: frames, fps, buckets, stride, limit per video.
        key: `video_key` of the video; starts the clip ids.
        links: which links out of the videos folder are followed.

    Raises VideoSetAside with the reason when there is no clip in it, or the calibration beside it cannot be used.
    """
    relative = _relative(video, root, links)
    found = scan(video)
    try:
        lens = read_calibration(video, found.height, found.width)
    except LensError as error:
        raise VideoSetAside(f"{video.name}: its calibration cannot be used: {error}") from error
    height, width, _ = clip.bucket(found.height, found.width)
    picked = [(shot, index, times) for shot, span in enumerate(found.shots) for index, times in _shot_clips(found, span, clip)]
    if not picked:
        raise VideoSetAside(f"{video.name}: {_why_none(found, clip)}")
    if len(picked) > clip.max_clips_per_video:
        logger.warning(
            "%s: %d clips, the first %d are kept; to keep all, set clip.max_clips_per_video=%d",
            *(relative, len(picked), clip.max_clips_per_video, len(picked)),
        )
    digest = file_hash(video)[1]
    return [
        Clip(
            clip_id=f"{key}-s{shot:03d}-c{index:03d}",
            video=relative,
            video_xxh64=digest,
            shot=shot,
            fps=clip.fps,
            timestamps=times,
            source_height=found.height,
            source_width=found.width,
            height=height,
            width=width,
            lens=lens,
        )
        for shot, index, times in picked[: clip.max_clips_per_video]
    ]


def _shot_clips(found: Scan, span: tuple[int, int], clip: ClipConfig) -> list[tuple[int, tuple[float, ...]]]:
    """(index, timestamps) of the clips in one shot."""
    times = found.times[slice(*span)]
    if len(times) == 1:
        return []
    grid = np.floor((times[-1] - times[0]) * clip.fps + 0.05)  # a last frame early by 5 % of a step still counts
    wanted = times[0] + np.arange(int(grid) + 1) / clip.fps
    after = np.searchsorted(times, wanted).clip(1, len(times) - 1)
    nearest = np.where(wanted - times[after - 1] <= times[after] - wanted, after - 1, after)
    clips = []
    for index, start in enumerate(range(0, len(wanted) - clip.frames + 1, clip.stride)):
        chosen = nearest[start : start + clip.frames]
        late = np.abs(times[chosen] - wanted[start : start + clip.frames]).max()
        if (np.diff(chosen) > 0).all() and late <= 0.5 / clip.fps:
            clips.append((index, tuple(times[chosen].tolist())))
    return clips


def _why_none(found: Scan, clip: ClipConfig) -> str:
    """Why no shot gives a clip, in numbers."""
    first, end = max(found.shots, key=lambda span: found.times[span[1] - 1] - found.times[span[0]])
    times = found.times[first:end]
    rate = 1 / float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    need = f"a clip takes {clip.frames} frames at {clip.fps:g} fps ({(clip.frames - 1) / clip.fps:.2f} s)"
    have = f"{len(times)} frames at {rate:.4g} fps ({times[-1] - times[0]:.2f} s)"
    if len(found.shots) > 1:
        have = f"{len(found.shots)} shots, the longest of {have}"
    if times[-1] - times[0] < (clip.frames - 1.05) / clip.fps:
        return f"too short: {have}; {need}"
    return f"too few frames a second: {have}; {need}, and frames are never repeated"


# ------------------------------------------------------------------------------------------------------ sizes and frames


@dataclass(frozen=True)
class FrameTransform:
    """From source frames h x w to H x W: resized by one factor to cover the target, then cropped around the centre.

    A source position (u, v) goes to (u * scale - left, v * scale - top), in coordinates where pixel (row i, column j) has
    its centre at (j + 0.5, i + 0.5); nothing is rounded, so intrinsics map exactly both ways.
    """

    source_height: int
    source_width: int
    height: int
    width: int

    @property
    def scale(self) -> float:
        return max(self.height / self.source_height, self.width / self.source_width)

    @property
    def left(self) -> float:
        return (self.source_width * self.scale - self.width) / 2

    @property
    def top(self) -> float:
        return (self.source_height * self.scale - self.height) / 2

    def apply(self, frames: np.ndarray) -> np.ndarray:
        """[..., h, w, 3] uint8 -> [..., H, W, 3] uint8, filtered when shrinking. Raises ValueError for another size."""
        self._check(frames.shape[-3:-1])
        if self.scale == 1 and self.left == self.top == 0:
            return frames
        # The part of the source that is seen, in fractions of a pixel: Pillow resamples it exactly, OpenCV would round it.
        x, y = self.left / self.scale, self.top / self.scale
        box = (
            max(x, 0.0),
            max(y, 0.0),
            min(self.source_width - x, self.source_width),
            min(self.source_height - y, self.source_height),
        )
        flat = frames.reshape(-1, *frames.shape[-3:])
        out = np.empty((len(flat), self.height, self.width, 3), np.uint8)
        for target, frame in zip(out, flat, strict=True):
            small = Image.fromarray(frame).resize((self.width, self.height), Image.Resampling.HAMMING, box=box)
            target[:] = np.asarray(small)
        return out.reshape(*frames.shape[:-3], self.height, self.width, 3)

    def intrinsics_to_target(self, intrinsics: np.ndarray) -> np.ndarray:
        """K [..., 3, 3] in source pixels -> in target pixels."""
        return np.array([[self.scale, 0, -self.left], [0, self.scale, -self.top], [0, 0, 1]]) @ intrinsics

    def intrinsics_to_source(self, intrinsics: np.ndarray) -> np.ndarray:
        """K [..., 3, 3] in target pixels -> in source pixels."""
        back = 1 / self.scale
        return np.array([[back, 0, self.left * back], [0, back, self.top * back], [0, 0, 1]]) @ intrinsics

    def depth_to_target(self, depth: np.ndarray) -> np.ndarray:
        """Depth (0 = unknown) or a confidence [..., h, w] -> [..., H, W], see `sample_depth`."""
        self._check(depth.shape[-2:])
        y = (np.arange(self.height) + 0.5 + self.top) / self.scale - 0.5
        x = (np.arange(self.width) + 0.5 + self.left) / self.scale - 0.5
        return sample_depth(depth, y, x)

    def depth_to_source(self, depth: np.ndarray) -> np.ndarray:
        """Inverse of `depth_to_target`: [..., H, W] -> [..., h, w], sampled likewise; 0 where the crop left nothing."""
        if depth.shape[-2:] != (self.height, self.width):
            raise ValueError(f"depth is {list(depth.shape)}, expected [..., {self.height}, {self.width}]")
        y = (np.arange(self.source_height) + 0.5) * self.scale - self.top - 0.5
        x = (np.arange(self.source_width) + 0.5) * self.scale - self.left - 0.5
        rows, cols = (y >= -0.5) & (y <= self.height - 0.5), (x >= -0.5) & (x <= self.width - 0.5)
        out = np.zeros((*depth.shape[:-2], self.source_height, self.source_width), depth.dtype)
        out[..., rows[:, None] & cols[None]] = sample_depth(depth, y[rows], x[cols]).reshape(*depth.shape[:-2], -1)
        return out

    def _check(self, size: tuple[int, ...]) -> None:
        if size != (self.source_height, self.source_width):
            raise ValueError(
                f"frames are {size[0]}x{size[1]}, expected {self.source_height}x{self.source_width} (height x width)"
            )


def sample_depth(depth: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Depth (0 = unknown) or a confidence [..., h, w] at rows y [H] and columns x [W] -> [..., H, W].

    Positions are in pixels with the first pixel's centre at 0. Where the four pixels around a sample agree within 3 % they
    are one surface: 1/value is interpolated linearly, which is exact for the depth of a plane. Elsewhere the nearest pixel
    is taken: depths are never mixed across an edge, nor with unknown ones.
    """
    rows, cols = _around(y[:, None], depth.shape[-2]), _around(x[None], depth.shape[-1])
    four = np.stack([depth[..., row, col] for row in rows[:2] for col in cols[:2]])
    fy, fx = rows[2], cols[2]
    weights = [(1 - fy) * (1 - fx), (1 - fy) * fx, fy * (1 - fx), fy * fx]
    low, high = four.min(0), four.max(0)
    nearest = np.where(fy < 0.5, np.where(fx < 0.5, four[0], four[1]), np.where(fx < 0.5, four[2], four[3]))
    smooth = (low > 0) & (high <= 1.03 * low)
    inverse = sum(weight / np.where(smooth, value, 1) for weight, value in zip(weights, four, strict=True))
    return np.where(smooth, 1 / inverse, nearest).astype(depth.dtype)


def _around(position: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of the pixels before and after each position, and how far (0..1) it lies from the first to the second."""
    position = position.clip(0, size - 1)
    before = np.floor(position).astype(int)
    return before, np.minimum(before + 1, size - 1), position - before


def annotation_size(clip: Clip, long_side: int) -> tuple[int, int]:
    """(h, w) at which a clip is annotated: exactly the bucket's aspect, so that results reach the bucket by pure scaling.

    The largest such size whose long side is at most `long_side` and which the source covers without enlarging, in multiples
    of 16 where the aspect has one, else the largest whole-pixel one (336 x 592 within 448 has none: 252 x 444).
    """
    common = gcd(clip.height, clip.width)
    unit = (clip.height // common, clip.width // common)
    fits = min(long_side // max(unit), clip.source_height // unit[0], clip.source_width // unit[1])
    step = lcm(16 // gcd(16, unit[0]), 16 // gcd(16, unit[1]))
    times = fits // step * step or max(fits, 1)
    return unit[0] * times, unit[1] * times


def read_frames(video: Path, clip: Clip, height: int, width: int) -> np.ndarray:
    """The clip's frames [T, height, width, 3] uint8 RGB, undistorted by its lens, resized and cropped by `FrameTransform`.

    Seeks near the first frame. Raises VideoSetAside for an unreadable file, ValueError when a frame is not there: the file
    is not the one the clip was cut from.
    """
    transform = FrameTransform(clip.source_height, clip.source_width, height, width)
    undistort = clip.lens.undistorter() if clip.lens else lambda picture: picture
    for start in (clip.timestamps[0], None):  # not every container seeks truly: then from the beginning
        out = np.empty((clip.frames, height, width, 3), np.uint8)
        found = 0
        with closing(decode(video, start)) as frames:
            for frame in frames:
                if found < clip.frames and abs(frame.time - clip.timestamps[found]) < 1e-6:
                    out[found] = transform.apply(undistort(frame.rgb()))
                    found += 1
                if found == clip.frames:
                    return out
                if frame.time > clip.timestamps[found]:
                    break
    raise ValueError(
        f"{video.name}: no frame at {clip.timestamps[found]:.4f} s for {clip.clip_id}; the file has changed, cut its clips again"
    )


def known_intrinsics(clip: Clip, height: int, width: int) -> np.ndarray | None:
    """K [3, 3] pixels of the frames that `read_frames` gives, None where no lens is written down beside the video."""
    if clip.lens is None:
        return None
    transform = FrameTransform(clip.source_height, clip.source_width, height, width)
    return transform.intrinsics_to_target(clip.lens.pinhole().intrinsics)


# ---------------------------------------------------------------------------------------------------------------- JSON


def clips_to_json(clips: Sequence[Clip]) -> list[dict[str, Any]]:
    """Plain dicts, ready for json.dump; times survive exactly."""
    return [asdict(clip) | {"timestamps": list(clip.timestamps)} for clip in clips]


def clips_from_json(items: Sequence[dict[str, Any]]) -> list[Clip]:
    """Inverse of `clips_to_json`. Raises ValueError naming the keys that are missing or unknown."""
    names = {field.name for field in fields(Clip)}
    for item in items:
        if set(item) != names:
            raise ValueError(f"not a clip: missing {sorted(names - set(item))}, unknown {sorted(set(item) - names)}")
    lenses = [item["lens"] and Lens(**item["lens"]) for item in items]
    return [
        Clip(**item | {"timestamps": tuple(item["timestamps"]), "lens": lens}) for item, lens in zip(items, lenses, strict=True)
    ]
