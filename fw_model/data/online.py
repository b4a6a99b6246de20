"""Clips that are encoded while training: the dataset holds their pictures, and the encoders run on the way to the batch.

Costs a pass of the VAE and of CLIP for every clip of every step (the cached latents cost a read), so it is for trying a
data set before encoding it, and for augmentations that latents cannot follow. `ClipDataset` reads the cached kind.
"""

from __future__ import annotations

import io
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch.utils.data import Dataset

from fw_model.data.manifest import SPLITS, ClipRow, DatasetError, read_manifest
from fw_model.data.shard_reader import ShardReader
from fw_model.encoders import Encoders


class OnlineEncodedClips(Dataset[dict[str, Any]]):
    """The clips of one split with the samples of a `ClipDataset`, encoded as they are asked for.

    For clips packed with `schema.RAW_ARRAYS`. Latents are rounded to float16 as the cache's are, so the same pictures give
    equal batches either way. Use it with `workers: 0` when the encoders are on a GPU.
    """

    def __init__(self, path: str | Path, split: str, encoders: Encoders, verify_hash: bool = True) -> None:
        """Raises MissingDatasetError when there is no dataset; DatasetError when a clip of the split has no pictures."""
        if split not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
        self.path = Path(path).absolute()
        self.split = split
        self.encoders = encoders
        self.text_len = encoders.text_len
        manifest = read_manifest(self.path)
        self.rows = manifest.select(manifest.equal("quarantine", "") & manifest.equal("split", split))
        for row in self.rows.distinct("arrays"):
            if "video" not in row.arrays:
                raise DatasetError(f"{self.path}: clip {row.clip_id} is encoded already; read it with ClipDataset")
        self._reader = ShardReader(self.path, verify_hash)
        self._embed = lru_cache(maxsize=256)(self._text)

    @property
    def buckets(self) -> list[str]:
        """The bucket "HxWxT" of every index, for the sampler."""
        codes, values = self.rows.codes("bucket")
        return [values[code].as_py() for code in codes]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One clip; raises DatasetError naming shard and clip for damaged bytes, or pictures that are not the clip's."""
        row = self.rows[index]
        arrays = self._reader.read(row)
        frames = self._frames(row, arrays["video"])
        return {
            "clip_id": row.clip_id,
            "latents": torch.from_numpy(self.encoders.encode_video(frames)),
            "text": self._embed(row.prompt).clone(),
            "image": torch.from_numpy(self.encoders.encode_image(frames[0])),
            **{name: torch.from_numpy(arrays[name]) for name in ("depth", "intrinsics", "w2c")},
        }

    def empty_text(self) -> torch.Tensor:
        """The empty prompt's embedding [text_len, D] in float32, padded as the samples' are."""
        return self._embed("").float()

    def _frames(self, row: ClipRow, video: np.ndarray) -> np.ndarray:
        where = f"{self.path / row.shard}: clip {row.clip_id}"
        try:
            frames = decode_video(video.tobytes())
        except av.FFmpegError as error:
            raise DatasetError(f"{where}: its video cannot be decoded ({error})") from error
        height, width, count = row.size
        if frames.shape != (count, height, width, 3):
            raise DatasetError(f"{where}: its video is {list(frames.shape[:3])} (frames, height, width), its bucket {row.bucket}")
        return frames

    def _text(self, prompt: str) -> torch.Tensor:
        embedding = self.encoders.encode_text(prompt)
        text = np.zeros((self.text_len, embedding.shape[1]), embedding.dtype)
        text[: len(embedding)] = embedding
        return torch.from_numpy(text)


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
