"""Clips that are encoded while training: the dataset holds their pictures, and the encoders run on the way to the batch.

Costs a pass of the VAE and of CLIP for every clip of every step (the cached latents cost a read), so it is for trying a
data set before encoding it, and for augmentations that latents cannot follow (`fw_model.data.augment`). `ClipDataset` reads
the cached kind.
"""

from __future__ import annotations

import io
import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch.utils.data import Dataset

from fw_model.config import AugmentConfig
from fw_model.data.augment import AugmentDraw, RawClip, augment_clip, draw_augment, frames_needed
from fw_model.data.dataset import pad_text
from fw_model.data.manifest import SPLITS, ClipRow, read_manifest
from fw_model.data.remote import is_remote
from fw_model.data.shard_reader import ShardReader
from fw_model.errors import DatasetError
from fw_model.model.encoders import Encoders

log = logging.getLogger(__name__)


class OnlineEncodedClips(Dataset[dict[str, Any]]):
    """The clips of one split with the samples of a `ClipDataset`, encoded as they are asked for.

    For clips packed with `schema.RAW_ARRAYS`. Latents are rounded to float16 as the cache's are, so the same pictures give
    equal batches either way. Use it with `workers: 0` when the encoders are on a GPU.

    An index may be epoch * len(self) + index, as a sampler with `tell_epoch` gives it: augmentations are drawn from
    (seed, epoch, index), so that a resumed run sees what it would have seen.
    """

    def __init__(
        self,
        path: str | Path,
        split: str,
        encoders: Encoders,
        frames: int | None = None,
        augment: AugmentConfig | None = None,
        seed: int = 0,
        verify_hash: bool = True,
    ) -> None:
        """frames: T of the clips that are given out, as they are stored by default; of longer ones the first T frames are
        used, or with `augment` those that are drawn.

        Raises MissingDatasetError when there is no dataset; DatasetError when a clip of the split has no pictures, or fewer
        than `frames` at every stride of `augment`.
        """
        if split not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
        self.path: str | Path = str(path) if is_remote(path) else Path(path).absolute()
        self.split = split
        self.encoders = encoders
        self.text_len = encoders.text_len
        manifest = read_manifest(self.path)
        self.rows = manifest.select(manifest.equal("quarantine", "") & manifest.equal("split", split))
        self.frames, self.augment, self.seed = frames, augment, seed
        for row in self.rows.distinct("bucket", "arrays"):
            check_pictures(self.path, row, self._frames_of(row), augment)
        self._reader = ShardReader(self.path, verify_hash, manifest=manifest)
        self._embed = lru_cache(maxsize=256)(self._text)

    @property
    def buckets(self) -> list[str]:
        """The bucket "HxWxT" of every index, for the sampler."""
        codes, values = self.rows.codes("bucket")
        sides = [bucket.rsplit("x", 1) for bucket in values.to_pylist()]
        names = [f"{side}x{self.frames or frames}" for side, frames in sides]
        return [names[code] for code in codes.tolist()]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One clip; raises DatasetError naming shard and clip for damaged bytes, or pictures that are not the clip's."""
        epoch, index = divmod(index, len(self))
        row = self.rows[index]
        arrays = self._reader.read(row)
        frames = self._decode(row, arrays.pop("video"))
        clip = augment_clip(RawClip(frames, **arrays, scale=row.scale, fps=row.fps), self._draw(row, epoch, index))
        return {
            "clip_id": row.clip_id,
            "latents": torch.from_numpy(self.encoders.encode_video(clip.frames)),
            "text": self._embed(row.prompt).clone(),
            "image": torch.from_numpy(self.encoders.encode_image(clip.frames[0])),
            **{name: torch.from_numpy(getattr(clip, name)) for name in ("depth", "intrinsics", "w2c")},
        }

    def empty_text(self) -> torch.Tensor:
        """The empty prompt's embedding [text_len, D] in float32, padded as the samples' are."""
        return self._embed("").float()

    def _frames_of(self, row: ClipRow) -> int:
        return self.frames or row.size[2]

    def _draw(self, row: ClipRow, epoch: int, index: int) -> AugmentDraw:
        if self.augment is None:
            return AugmentDraw(self._frames_of(row))
        return draw_augment(self.augment, self._frames_of(row), row.size[2], self.seed, epoch, index)

    def _decode(self, row: ClipRow, video: np.ndarray) -> np.ndarray:
        where = f"{self.path}/{row.shard}: clip {row.clip_id}"
        try:
            frames = decode_video(video.tobytes())
        except av.FFmpegError as error:
            raise DatasetError(f"{where}: its video cannot be decoded ({error})") from error
        height, width, count = row.size
        if frames.shape != (count, height, width, 3):
            raise DatasetError(f"{where}: its video is {list(frames.shape[:3])} (frames, height, width), its bucket {row.bucket}")
        return frames

    def _text(self, prompt: str) -> torch.Tensor:
        return pad_text(torch.from_numpy(self.encoders.encode_text(prompt)), self.text_len)


def check_pictures(path: str | Path, row: ClipRow, frames: int, augment: AugmentConfig | None) -> None:
    """Refuse a clip that has no pictures, or too few for a clip of `frames`."""
    if "video" not in row.arrays:
        raise DatasetError(
            f"{path}: clip {row.clip_id} is encoded already (it has latents, no pictures); read it with ClipDataset, in training "
            "with encode_online: false and without augment, or pack a dataset of pictures (docs/dataset.md)"
        )
    needed = frames_needed(frames, min(augment.strides) if augment else 1)
    if row.size[2] < needed:
        raise DatasetError(
            f"{path}: clip {row.clip_id} has {row.size[2]} frames, a clip of {frames} needs {needed}; pack longer clips "
            f"(clip.frames={needed}) or train on shorter ones"
        )


def decode_video(data: bytes) -> np.ndarray:
    """All frames [T, H, W, 3] uint8 RGB of a video file's bytes, [0, 0, 0, 3] if it has none. Raises av.FFmpegError."""
    with av.open(io.BytesIO(data), "r") as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(frames) if frames else np.empty((0, 0, 0, 3), np.uint8)


def encode_video(frames: np.ndarray, fps: float) -> np.ndarray:
    """Frames [T, H, W, 3] uint8 RGB -> the bytes [N] uint8 of an mp4 that gives exactly them back (lossless H.264 RGB)."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264rgb", rate=round(fps), options={"crf": "0", "preset": "veryfast"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "rgb24"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return np.frombuffer(file.getvalue(), np.uint8)
