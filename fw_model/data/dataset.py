"""The packed dataset as a map-style torch dataset, and how its clips become a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from torch.nn import functional as F
from torch.utils.data import Dataset

from fw_model.data.manifest import SPLITS, ClipRow, parse_arrays, read_manifest, read_text_rows
from fw_model.data.remote import is_remote
from fw_model.data.schema import Batch
from fw_model.data.shard_reader import ShardReader
from fw_model.errors import DatasetError

_TENSORS = tuple(field.name for field in fields(Batch) if field.name != "clip_ids")


class ClipDataset(Dataset[dict[str, Any]]):
    """The clips of one split, ordered by clip id: of each its `clip_id` and the tensors of a `Batch` without their first
    dimension, in the dtypes in which they are stored, mapped from its shard and the caller's own, to change as one likes. The
    annotator's confidence stays in the shard: no loss reads it. Points are derived from depth and cameras on the device
    (`losses.make_targets`).

    Of the manifest it holds columns and index arrays, no object per clip, so a million clips take some hundred MB. It is
    sent to other processes as the name of the dataset; shards are opened on first use in each, and any number of threads may
    read. Text is zero-padded to `text_len`.
    """

    def __init__(
        self,
        path: str | Path,
        split: str,
        text_len: int,
        verify_hash: bool = True,
        versions: Mapping[str, str] | None = None,
    ) -> None:
        """path: the dataset's folder, or the URL of one (see `fw_model.data.remote`); verify_hash: check every clip that is
        read against the hash in the manifest; versions: what the clips must have been made by, e.g. {"vae": id}.

        Raises MissingDatasetError when there is no dataset; DatasetError when its train split is empty, a clip's text is
        longer than `text_len`, or a clip was made by something else than `versions` say. A val split may be empty.
        """
        if split not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
        self.path: str | Path = str(path) if is_remote(path) else Path(path).absolute()
        self.split = split
        self.text_len = text_len
        self.verify_hash = verify_hash
        self._manifest = read_manifest(self.path)
        self._texts = read_text_rows(self.path, self._manifest)
        self._index()
        if not len(self) and split == "train":
            raise DatasetError(f"{self.path}: no clip in its train split; see: python -m fw_model.data info {self.path}")
        self._check(versions or {})

    def _index(self) -> None:
        """The rows of this split, and for each the place of its prompt among the texts (-1: none)."""
        self._reader: ShardReader | None = None
        good = self._manifest.equal("quarantine", "")
        self.rows = self._manifest.select(good & self._manifest.equal("split", self.split))
        codes, prompts = self.rows.codes("prompt")
        text_codes, text_prompts = self._texts.codes("prompt")
        place = np.full(len(text_prompts) + 1, -1, np.int32)
        place[text_codes] = np.arange(len(self._texts), dtype=np.int32)
        found = pc.index_in(prompts, text_prompts).fill_null(len(text_prompts)).to_numpy()
        self._text_of = place[found[codes]] if len(codes) else np.zeros(0, np.int32)

    def _check(self, versions: Mapping[str, str]) -> None:
        for row in self.rows.distinct("arrays", "versions"):
            if "video" in row.arrays:
                raise DatasetError(
                    f"{self.path}: clip {row.clip_id} is not encoded yet (it has pictures, no latents); encode it while training "
                    "with encode_online: true (fw_model.data.online.OnlineEncodedClips), or pack it with the latents step"
                )
            for key, wanted in versions.items():
                if row.versions.get(key) != wanted:
                    raise DatasetError(
                        f"{self.path}: clip {row.clip_id} was made by {key} {row.versions.get(key)!r}, but this run needs "
                        f"{wanted!r}; pack the dataset again (python -m fw_pipeline.launch build_dataset)"
                    )
        for index in np.flatnonzero(self._text_of < 0)[:1]:
            row = self.rows[int(index)]
            raise DatasetError(
                f"{self.path}: clip {row.clip_id}: no embedding of its prompt {row.prompt!r}; pack the dataset again"
            )
        for index in np.flatnonzero(self._text_lengths()[self._text_of] > self.text_len)[:1]:
            row, text = self.rows[int(index)], self._texts[int(self._text_of[index])]
            raise DatasetError(
                f"{self.path}: clip {row.clip_id} has {text.arrays['text'][1][0]} text tokens, the model takes {self.text_len}"
            )

    def _text_lengths(self) -> np.ndarray:
        """Tokens of each text, [len(texts)]."""
        codes, values = self._texts.codes("arrays")
        return np.array([parse_arrays(value)["text"][1][0] for value in values.to_pylist()], np.int64)[codes]

    @property
    def buckets(self) -> list[str]:
        """The bucket "HxWxT" of every index, for the sampler."""
        codes, values = self.rows.codes("bucket")
        names = values.to_pylist()
        return [names[code] for code in codes.tolist()]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One clip; raises DatasetError naming shard and clip when its bytes are damaged, missing or of another pack."""
        row, text = self.rows[index], self._texts[int(self._text_of[index])]
        arrays = self._shards.read(row, for_training=True)
        sample: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
        sample["text"] = pad_text(torch.from_numpy(self._shards.read(text)["text"]), self.text_len)
        return {"clip_id": row.clip_id, **sample}

    @property
    def _shards(self) -> ShardReader:
        if self._reader is None:
            self._reader = ShardReader(self.path, self.verify_hash, manifest=self._manifest)
        return self._reader

    @property
    def text_width(self) -> int:
        """Width D of the prompt embeddings."""
        return self._empty_prompt.arrays["text"][1][1]

    def empty_text(self) -> torch.Tensor:
        """The empty prompt's embedding [text_len, D] in float32, padded as the samples' are; for dropping prompts in training."""
        return pad_text(torch.from_numpy(self._shards.read(self._empty_prompt)["text"]), self.text_len).float()

    @property
    def _empty_prompt(self) -> ClipRow:
        empty = self._texts.select(self._texts.equal("prompt", ""))
        if not len(empty):
            raise DatasetError(f"{self.path}: no embedding of the empty prompt; pack the dataset again")
        return empty[0]

    def __getstate__(self) -> dict[str, Any]:
        """Manifests are pickled as the names of their files; memory maps stay with the process that opened them."""
        return {**vars(self), "_reader": None, "rows": None, "_text_of": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._index()


def pad_text(embedding: torch.Tensor, text_len: int) -> torch.Tensor:
    """[L, D] -> [text_len, D] with zeros after the real tokens."""
    return F.pad(embedding, (0, 0, 0, text_len - len(embedding)))


def collate(samples: Sequence[Mapping[str, Any]]) -> Batch:
    """Stack clips of one bucket; raises ValueError naming the clips whose shapes differ.

    A single clip is not copied: its batch is what the clip is, the mapped bytes.
    """
    if not samples:
        raise ValueError("collate: no clips")
    first = samples[0]
    names = [name for name in _TENSORS if name in first]  # not every dataset knows what moves of itself
    for sample in samples[1:]:
        for name in names:
            if sample[name].shape != first[name].shape:
                raise ValueError(
                    f"collate: clips {first['clip_id']} and {sample['clip_id']} differ in {name}: "
                    f"{list(first[name].shape)} and {list(sample[name].shape)}"
                )
    stacked = {name: _stack([sample[name] for sample in samples]) for name in names}
    return Batch(clip_ids=[sample["clip_id"] for sample in samples], **stacked)


def _stack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """With numpy, which copies without Python's lock and in the thread that asks; torch would start more for each worker."""
    return torch.from_numpy(np.stack([tensor.numpy() for tensor in tensors])) if len(tensors) > 1 else tensors[0][None]
