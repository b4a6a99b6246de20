"""A packed dataset -> the guide layout: one folder that other people's training code reads, every array float32."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fw_model.cameras import Cameras, unproject, write_pose_file
from fw_model.data.manifest import SPLITS, ClipRow, read_manifest
from fw_model.data.shard_reader import ShardReader
from fw_model.export.video import write_video
from fw_model.files import whole_folder, write_json
from fw_pipeline.annotate.clips import clips_from_json, read_frames, video_key
from fw_pipeline.annotate.types import Clip
from fw_pipeline.annotate.video import decode
from fw_pipeline.guide_layout.metadata import METADATA, GuideLayoutError
from fw_pipeline.steps.store import Store

CameraNumbers = Literal[12, 19]
Rows = Callable[[list[ClipRow]], Iterable[ClipRow]]
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class VideoSource:
    """Finds the pictures of a dataset's clips: in its shards, or in the videos that they were cut from."""

    def __init__(self, videos: Path, store: Store) -> None:
        """videos: the folder the dataset's videos are in; store: where the pipeline keeps how it cut them."""
        self.videos, self.store = videos, store

    def write(self, row: ClipRow, arrays: dict[str, np.ndarray], path: Path) -> None:
        """Write a clip's T frames as mp4. Raises GuideLayoutError when its video or the record of its cut is not there."""
        if "video" in arrays:
            path.write_bytes(arrays["video"].tobytes())
            return
        video = self.videos / row.video
        if not video.is_file():
            raise GuideLayoutError(
                f"clip {row.clip_id}: no video {video}; name its folder with --videos, or pass --without-videos"
            )
        height, width, _ = row.size
        try:
            write_video(path, read_frames(video, self._clip(row, video), height, width), fps=row.fps)
        except ValueError as error:
            raise GuideLayoutError(f"clip {row.clip_id}: {error}") from error

    def _clip(self, row: ClipRow, video: Path) -> Clip:
        height, width, count = row.size
        if (first := row.quality.get("first_frame")) is not None:  # imported: consecutive frames of its video
            frames = list(decode(video))[int(first) : int(first) + count]
            if len(frames) < count:
                raise ValueError(f"{video} has not the {count} frames from frame {int(first)} on; the file has changed")
            times = tuple(frame.time for frame in frames)
            size = (frames[0].height, frames[0].width)
            return Clip(row.clip_id, row.video, "", 0, row.fps, times, *size, height, width)
        record = self.store.folder("clips", video_key(row.video)) / "clips.json"
        if not record.is_file():
            raise ValueError(f"{record} is missing, which says how it was cut from its video; name the data folder with --data")
        for clip in clips_from_json(json.loads(record.read_text(encoding="utf-8"))):
            if clip.clip_id == row.clip_id:
                return clip
        raise ValueError(f"not in {record}; its video was cut anew since, pack the dataset again")


def export_guide(
    dataset: Path,
    folder: Path,
    videos: VideoSource | None,
    split: str | None = None,
    camera_numbers: CameraNumbers = 12,
    progress: Rows = iter,
) -> int:
    """Write the clips of a dataset (of one split, if named) as a guide-layout folder; returns how many.

    Depth, points and translations are in the annotator's units again (clip units times the clip's scale), points in the
    world, which is the first camera. 12 numbers a row carry no lens: it stands in metadata.json. The folder appears under
    its name when it is whole. Without `videos` the mp4 files are left out.

    Raises GuideLayoutError when the folder is not empty, there is nothing to export, or a clip's video cannot be found.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise GuideLayoutError(f"{folder}: not empty; give a new folder")
    if split is not None and split not in SPLITS:
        raise GuideLayoutError(f"split {split!r}: there are {', '.join(SPLITS)}")
    rows = [row for row in read_manifest(dataset) if not row.quarantine and split in (None, row.split)]
    if not rows:
        raise GuideLayoutError(f"{dataset}: no clip to export" + (f" in its {split} split" if split else ""))
    reader = ShardReader(dataset)
    with whole_folder(folder, flush=False) as target:
        entries = []
        for row in progress(rows):
            if not _FILE_NAME.fullmatch(row.clip_id):
                raise GuideLayoutError(f"clip {row.clip_id!r}: its id cannot name a file")
            arrays = reader.read(row)
            entries.append(_write_clip(row, arrays, target, camera_numbers))
            if videos is not None:
                path = target / entries[-1]["video_path"]
                path.parent.mkdir(exist_ok=True)
                videos.write(row, arrays, path)
        write_json(target / METADATA, entries)
        if folder.exists():
            folder.rmdir()  # empty, or this refuses
    reader.close()
    return len(rows)


def _write_clip(row: ClipRow, arrays: dict[str, np.ndarray], target: Path, camera_numbers: CameraNumbers) -> dict[str, Any]:
    """Write the maps and cameras of one clip; returns its entry in metadata.json."""
    height, width, count = row.size
    name = row.clip_id
    paths = {"depth": target / "depth" / name, "points": target / "points" / name}
    for path in paths.values():
        path.mkdir(parents=True)
    intrinsics = arrays["intrinsics"].astype(np.float64)
    w2c = arrays["w2c"].astype(np.float64)
    w2c[:, :, 3] *= row.scale
    for t in range(count):
        depth = arrays["depth"][t].astype(np.float64) * row.scale
        points = unproject(*(torch.from_numpy(value[None]) for value in (depth, intrinsics[t], w2c[t])))[0].numpy()
        points[depth == 0] = 0  # unknown, not the camera's centre
        np.save(paths["depth"] / f"frame_{t:04d}.npy", depth.astype(np.float32), allow_pickle=False)
        np.save(paths["points"] / f"frame_{t:04d}.npy", points.astype(np.float32), allow_pickle=False)
    camera = target / "camera_params" / f"{name}.txt"
    camera.parent.mkdir(exist_ok=True)
    lens = intrinsics[:, [0, 1, 0, 1], [0, 1, 2, 2]]
    if camera_numbers == 12:
        np.savetxt(camera, w2c.reshape(count, 12), fmt="%.10g")
    else:
        write_pose_file(camera, Cameras(torch.from_numpy(w2c), torch.from_numpy(intrinsics)), height, width, height, width)
    return {
        "video_id": name,
        "video_path": f"videos/{name}.mp4",
        "caption": row.prompt,
        "num_frames": count,
        "fps": row.fps,
        "height": height,
        "width": width,
        "depth_path": f"depth/{name}",
        "points_path": f"points/{name}",
        "camera_path": f"camera_params/{name}.txt",
        "intrinsics": (lens[:1] if (lens == lens[0]).all() else lens).tolist(),  # fx fy cx cy, pixels
        "clip_scale": row.scale,
        "source_video": row.video,
        "split": row.split,
    }
