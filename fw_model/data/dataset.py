"""The packed dataset as a map-style torch dataset, and how its clips become a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.compute as pc
import torch
from torch._utils import ExceptionWrapper
from torch.nn import functional as F
from torch.utils.data import Dataset, default_collate, get_worker_info

from fw_model.data.manifest import SPLITS, ClipRow, parse_arrays, read_manifest, read_text_rows
from fw_model.data.remote import is_remote
from fw_model.data.schema import Batch
from fw_model.data.shard_reader import ShardReader
from fw_model.data.stored_array import StoredArray
from fw_model.errors import DatasetError

_TENSORS = tuple(field.name for field in fields(Batch) if field.name != "clip_ids")


class ClipDataset(Dataset["Sample"]):
    """The clips of one split, ordered by clip id, each a `Sample`. The annotator's confidence stays in the shard: no loss
    reads it. Points are derived from depth and cameras on the device (`losses.make_targets`).

    Of the manifest it holds columns and index arrays, no object per clip, so a million clips take some hundred MB. It is
    sent to other processes as the name of the dataset; shards are opened on first use in each. Text is zero-padded to
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

    def __getitem__(self, index: int) -> Sample:
        """One clip; raises DatasetError naming shard and clip when its bytes are damaged, missing or of another pack."""
        row, text = self.rows[index], self._texts[int(self._text_of[index])]
        arrays = self._shards.find(row)
        del arrays["confidence"]
        return Sample(row.clip_id, {**arrays, **self._shards.find(text)}, self.text_len)

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


class Sample(Mapping[str, Any]):
    """A clip: `clip_id`, and the tensors of a `Batch` without its first dimension, in the dtypes in which they are stored.

    A tensor is mapped from its shard when it is first asked for; from then on it is this sample's own, to change as one
    likes. What was not asked for is sent to another process as the place where it lies.
    """

    def __init__(self, clip_id: str, stored: dict[str, StoredArray], text_len: int) -> None:
        self._clip_id = clip_id
        self._stored = stored
        self._text_len = text_len
        self._tensors: dict[str, torch.Tensor] = {}

    def __getitem__(self, name: str) -> Any:
        if name == "clip_id":
            return self._clip_id
        if name not in self._tensors:
            tensor = torch.from_numpy(self._stored[name].map())
            self._tensors[name] = pad_text(tensor, self._text_len) if name == "text" else tensor
        return self._tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, which is not mapped for it."""
        shape = self._stored[name].shape
        return (self._text_len, *shape[1:]) if name == "text" else shape

    def __iter__(self) -> Iterator[str]:
        return iter(("clip_id", *self._stored))

    def __len__(self) -> int:
        return 1 + len(self._stored)


def pad_text(embedding: torch.Tensor, text_len: int) -> torch.Tensor:
    """[L, D] -> [text_len, D] with zeros after the real tokens."""
    return F.pad(embedding, (0, 0, 0, text_len - len(embedding)))


def collate(samples: Sequence[Mapping[str, Any]]) -> Batch:
    """Stack clips of one bucket; raises ValueError naming the clips whose shapes differ.

    In a data worker the clips of a `ClipDataset` are not touched: what it gives back becomes the batch in the process that
    receives it, where the clips are mapped, and copied only if there are several to stack.
    """
    if not samples:
        raise ValueError("collate: no clips")
    first = samples[0]
    for sample in samples[1:]:
        for name in _TENSORS:
            if (shape := _shape(sample, name)) != _shape(first, name):
                raise ValueError(
                    f"collate: clips {first['clip_id']} and {sample['clip_id']} differ in {name}: "
                    f"{list(_shape(first, name))} and {list(shape)}"
                )
    if get_worker_info() is not None and all(isinstance(sample, Sample) for sample in samples):
        return cast(Batch, _Travelling(samples))
    return _stack(samples)


def _shape(sample: Mapping[str, Any], name: str) -> tuple[int, ...]:
    return sample.shape(name) if isinstance(sample, Sample) else tuple(sample[name].shape)


class _Travelling:
    """Samples on their way out of a data worker: pickled as these, unpickled as their batch."""

    def __init__(self, samples: Sequence[Mapping[str, Any]]) -> None:
        self.samples = samples

    def __reduce__(self) -> Any:
        return _arrived, (self.samples,)


def _arrived(samples: Sequence[Mapping[str, Any]]) -> Batch | ExceptionWrapper:
    """Their batch, or what a loader raises in its place: an error within its own threads would only end them."""
    try:
        return _stack(samples)
    except (DatasetError, ValueError):
        return ExceptionWrapper(where="mapping clips that a data worker had checked")


def _stack(samples: Sequence[Mapping[str, Any]]) -> Batch:
    columns = {name: [sample[name] for sample in samples] for name in _TENSORS}
    # Several: torch's own collate, which in a data worker stacks straight into the memory that it shares with the loader.
    stacked = {name: default_collate(column) if len(column) > 1 else column[0][None] for name, column in columns.items()}
    return Batch(clip_ids=[sample["clip_id"] for sample in samples], **stacked)
