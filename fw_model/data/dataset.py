"""The packed dataset as a map-style torch dataset, and how its clips become a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from fw_model.data.manifest import SPLITS, ClipRow, DatasetError, read_manifest, read_texts
from fw_model.data.schema import Batch
from fw_model.data.shard_reader import ShardReader


class ClipDataset(Dataset[dict[str, Any]]):
    """The clips of one split, ordered by clip id, as dictionaries with the fields of a `Batch` without its first dimension
    (`clip_id` a string). The annotator's confidence stays in the shard: no loss reads it.

    Shards are opened on first use in each process, so the object can be sent to DataLoader workers. Text is zero-padded to
    `text_len`.
    """

    def __init__(
        self,
        path: str | Path,
        split: str,
        text_len: int,
        verify_hash: bool = True,
        versions: Mapping[str, str] | None = None,
    ) -> None:
        """path: the dataset's folder; versions: what the clips must have been made by, e.g. {"encoders": id}.

        Raises MissingDatasetError when there is no dataset; DatasetError when its train split is empty, a clip's text is
        longer than `text_len`, or a clip was made by something else than `versions` say. A val split may be empty.
        """
        if split not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
        self.path = Path(path).absolute()
        self.split = split
        self.text_len = text_len
        self.verify_hash = verify_hash
        self.rows = [row for row in read_manifest(self.path) if row.split == split and not row.quarantine]
        if not self.rows and split == "train":
            raise DatasetError(f"{self.path}: no clip in its train split; see: python -m fw_model.data info {self.path}")
        self.texts = read_texts(self.path)
        for row in self.rows:
            if "video" in row.arrays:
                raise DatasetError(
                    f"{self.path}: clip {row.clip_id} is not encoded yet (it has pictures, no latents); encode it while training "
                    "with encode_online: true (fw_model.data.online.OnlineEncodedClips), or pack it with the latents step"
                )
            length = self._text_row(row).arrays["text"][1][0]
            if length > text_len:
                raise DatasetError(f"{self.path}: clip {row.clip_id} has {length} text tokens, the model takes {text_len}")
            for key, wanted in (versions or {}).items():
                if row.versions.get(key) != wanted:
                    raise DatasetError(
                        f"{self.path}: clip {row.clip_id} was made by {key} {row.versions.get(key)!r}, but this run needs "
                        f"{wanted!r}; pack the dataset again (python -m fw_pipeline.launch build_dataset)"
                    )
        self._reader: ShardReader | None = None

    @property
    def buckets(self) -> list[str]:
        """The bucket "HxWxT" of every index, for the sampler."""
        return [row.bucket for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One clip; raises DatasetError naming shard and clip when its bytes are damaged."""
        row = self.rows[index]
        arrays = self.read(row)
        depth = _tensor(arrays["depth"])
        return {
            "clip_id": row.clip_id,
            "latents": _tensor(arrays["latents"]),
            "text": self._text(self._text_row(row)),
            "image": _tensor(arrays["image"]),
            "depth": depth,
            "valid": depth > 0,
            "intrinsics": _tensor(arrays["intrinsics"]),
            "w2c": _tensor(arrays["w2c"]),
        }

    def read(self, row: ClipRow) -> dict[str, np.ndarray]:
        """The arrays of a row as they are stored."""
        if self._reader is None:
            self._reader = ShardReader(self.path, self.verify_hash)
        return self._reader.read(row)

    @property
    def text_width(self) -> int:
        """Width D of the prompt embeddings."""
        return self.texts[""].arrays["text"][1][1]

    def empty_text(self) -> torch.Tensor:
        """The empty prompt's embedding [text_len, D], as the samples have theirs; for dropping prompts in training."""
        return self._text(self.texts[""])

    def _text_row(self, row: ClipRow) -> ClipRow:
        if row.prompt not in self.texts:
            raise DatasetError(
                f"{self.path}: clip {row.clip_id}: no embedding of its prompt {row.prompt!r}; pack the dataset again"
            )
        return self.texts[row.prompt]

    def _text(self, row: ClipRow) -> torch.Tensor:
        embedding = self.read(row)["text"]
        text = torch.zeros(self.text_len, embedding.shape[1])
        text[: len(embedding)] = torch.from_numpy(embedding.astype(np.float32))
        return text

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_reader": None}  # memory maps stay with the process that opened them


def collate(samples: Sequence[Mapping[str, Any]]) -> Batch:
    """Stack clips of one bucket; raises ValueError naming the clips whose shapes differ."""
    if not samples:
        raise ValueError("collate: no clips")
    names = [f.name for f in fields(Batch) if f.name != "clip_ids"]
    first = samples[0]
    for sample in samples[1:]:
        for name in names:
            if sample[name].shape != first[name].shape:
                raise ValueError(
                    f"collate: clips {first['clip_id']} and {sample['clip_id']} differ in {name}: "
                    f"{list(first[name].shape)} and {list(sample[name].shape)}"
                )
    stacked = {name: torch.stack([sample[name] for sample in samples]) for name in names}
    return Batch(clip_ids=[sample["clip_id"] for sample in samples], **stacked)


def _tensor(array: np.ndarray) -> torch.Tensor:
    """A float32 tensor of its own: what was read is a read-only view of the shard."""
    return torch.from_numpy(array.astype(np.float32))
