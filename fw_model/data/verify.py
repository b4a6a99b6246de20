"""Checking a packed dataset: manifest, every hash, shape and row of every shard, prompts, splits, stray files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from fw_model.data.manifest import MANIFEST, TEXT_SPLIT, TEXTS, ClipRow, dataset_folder, open_parquet, read_manifest, read_texts
from fw_model.data.payload import Payload
from fw_model.data.schema import ClipRecord, bucket_of, check_record, check_text
from fw_model.data.shard_reader import ShardReader
from fw_model.errors import DatasetError


def verify(path: str | Path) -> list[str]:
    """Read every clip and return all faults found, in words; an empty list means that the dataset is whole.

    Raises DatasetError only when there is no readable manifest.
    """
    return list(iter_faults(path, read_manifest(path)))


def iter_faults(path: str | Path, rows: Iterable[ClipRow]) -> Iterator[str]:
    """The faults of `verify`, clip by clip, for a progress bar around `rows`."""
    folder = dataset_folder(path)
    reader = ShardReader(folder)
    texts: dict[str, ClipRow] | None
    try:
        texts = read_texts(folder)
    except DatasetError as error:
        yield str(error)
        texts = None
    seen: set[str] = set()
    split_of_video: dict[str, str] = {}
    kind_of_shard: dict[str, tuple[str, str]] = {}
    rows_of_shard: Counter[str] = Counter()
    for row in rows:
        if row.clip_id in seen:
            yield f"{folder / MANIFEST}: clip {row.clip_id} is listed twice"
        seen.add(row.clip_id)
        if row.quarantine:
            continue
        rows_of_shard[row.shard] += 1
        if split_of_video.setdefault(row.video, row.split) != row.split:
            yield f"{folder / MANIFEST}: video {row.video!r} has clips in both splits (clip {row.clip_id})"
        if not row.shard.startswith(f"{row.split}-"):
            yield f"{folder / MANIFEST}: clip {row.clip_id} of split {row.split!r} is in {row.shard}"
        if kind_of_shard.setdefault(row.shard, (row.split, row.bucket)) != (row.split, row.bucket):
            yield f"{folder / row.shard}: mixes splits or buckets (clip {row.clip_id})"
        yield from _clip_faults(reader, row, folder)
        if texts is not None and "latents" in row.arrays:
            yield from _prompt_faults(texts, row, folder)
    for row in (texts or {}).values():
        rows_of_shard[row.shard] += 1
        try:
            check_text(row.prompt, reader.read(row)["text"])
        except ValueError as error:
            yield f"{error} (prompt {row.prompt!r})"
    reader.close()
    yield from _file_faults(folder, rows_of_shard, texts_known=texts is not None)


def _clip_faults(reader: ShardReader, row: ClipRow, folder: Path) -> Iterator[str]:
    try:
        arrays = reader.read(row)
        record = ClipRecord(row.clip_id, row.video, row.fps, row.scale, row.prompt, arrays, row.quality, row.versions)
        check_record(record)
    except ValueError as error:
        yield str(error)
        return
    if row.training_xxh64 not in ("", Payload(arrays).training_xxh64()):
        yield f"{folder / MANIFEST}: clip {row.clip_id}: the hash of what training reads is not that of its bytes"
    if bucket_of(record) != row.bucket:
        yield f"{folder / MANIFEST}: clip {row.clip_id} is listed as {row.bucket}, its arrays are {bucket_of(record)}"


def _prompt_faults(texts: dict[str, ClipRow], row: ClipRow, folder: Path) -> Iterator[str]:
    for prompt in {row.prompt, ""} - set(texts):
        yield f"{folder / TEXTS}: no embedding of the prompt {prompt!r} (clip {row.clip_id})"
    text = texts.get(row.prompt)
    if text is not None and text.versions.get("text") != row.versions.get("text"):
        made = f"{text.versions.get('text')!r}, the clip says {row.versions.get('text')!r}"
        yield f"{folder / TEXTS}: the prompt {row.prompt!r} of clip {row.clip_id} was embedded by {made}"


def _file_faults(folder: Path, rows_of_shard: Counter[str], texts_known: bool) -> Iterator[str]:
    """Shards with more in them than the manifest says, gaps in their numbering, and files that are no shards of it."""
    for name, count in sorted(rows_of_shard.items()):
        try:
            found = open_parquet(folder / name).num_row_groups
        except DatasetError:
            continue  # named clip by clip
        if found != count:
            yield f"{folder / name}: has {found} row groups, the manifest knows {count}"
        split, _, total = name.removesuffix(".parquet").replace("-of-", "-").split("-")
        listed = sum(other.startswith(f"{split}-") for other in rows_of_shard)
        if int(total) != listed:
            yield f"{folder / name}: one of {int(total)} by its name, the manifest knows {listed}"
    for file in sorted(folder.iterdir()):
        unknown_text = not texts_known and file.name.startswith(f"{TEXT_SPLIT}-")
        if file.name not in {MANIFEST, TEXTS, *rows_of_shard} and not unknown_text:
            yield f"{file}: not in the manifest"
