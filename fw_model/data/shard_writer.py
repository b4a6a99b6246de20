"""Writing the packed dataset.

    dataset/manifest.parquet                one row per clip, clips set aside included; written last
    dataset/train-00000-of-00012.parquet    clips: one split and one bucket per shard, ONE ROW GROUP = ONE CLIP
    dataset/texts.parquet                   one row per distinct prompt, the empty one included
    dataset/texts-00000-of-00001.parquet    prompt embeddings, one row group each

Arrays are raw little-endian bytes in large_binary columns, uncompressed, without dictionary or statistics, so that a clip
is one contiguous memory-mapped read; their dtypes and shapes stand in the manifest, with a hash of each clip's bytes.

A pack writes only what is new. A shard whose clips all stay is hard-linked into the new dataset; one of which a clip goes
or changes is written again. The new dataset is prepared in a sibling folder `.dataset.packing` and swapped in whole by
rename; until then, and however the pack is interrupted, the last good dataset stays readable. Shards that an interrupted
pack had finished are used by the next one. The folder belongs to the pack: anything else put there is lost.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np

from fw_model.data.manifest import (
    MANIFEST,
    SPLITS,
    TEXT_SPLIT,
    TEXTS,
    ClipRow,
    dataset_folder,
    open_parquet,
    read_manifest,
    read_texts,
    write_rows,
)
from fw_model.data.payload import Payload
from fw_model.data.schema import ClipRecord, bucket_of, check_record, check_text
from fw_model.data.shard_file import FinishedShard, ShardFile, finished_shards
from fw_model.data.shard_reader import ShardReader
from fw_model.data.swap import clear_up, new_dataset, packing_folder, swap_in, take_pack_lock
from fw_model.errors import DatasetError, MissingDatasetError
from fw_model.files import file_hash, fsync, link, remove, whole_file

log = logging.getLogger(__name__)

Kind = tuple[str, str, tuple[str, ...]]  # (split, bucket, names of the arrays): what all rows of a shard share


class ShardWriter:
    """Packs a dataset, or brings one up to date.

        with ShardWriter(folder) as writer:
            if not writer.keep("clip", "train", source="digest of its inputs"):
                writer.add(record, "train", source="digest of its inputs")
            if not writer.keep_text(prompt, version):
                writer.add_text(prompt, embedding, version)

    What is neither kept nor added is no longer in the dataset. One writer packs all buckets: a shard is of one bucket, and
    which one follows from the clip.

    Entering takes the pack lock (PackInProgressError if another process holds it). Leaving normally writes the manifest and
    swaps the new dataset in; leaving by an exception keeps the finished shards for the next pack and discards the rest.
    Either way, and if the process is killed, a dataset that was there before stays whole until the new one is. The lock is
    the kernel's: a dead process holds none.
    """

    def __init__(self, path: str | Path, target_bytes: float = 256e6) -> None:
        """path: the dataset's folder; target_bytes: a shard is closed when its payload reaches this size."""
        self.path = Path(path).absolute()
        self.target_bytes = target_bytes
        self.bytes_written = 0  # payload written by this pack, copies of clips from shards that had to be rewritten included
        self._work = packing_folder(self.path)
        self._rows: dict[str, ClipRow] = {}  # by clip id
        self._texts: dict[str, ClipRow] = {}  # by digest of the prompt
        self._open: dict[Kind, ShardFile] = {}
        self._closed: list[FinishedShard] = []
        self._earlier: dict[str, tuple[FinishedShard, ClipRow]] = {}  # rows of the last dataset and of an interrupted pack
        self._whole: dict[Path, bool] = {}
        self._hashes: dict[Path, tuple[int, str]] = {}  # of the last dataset's files
        self._split_of_video: dict[str, str] = {}
        self._numbers = 0
        self._lock: IO[str] | None = None

    def __enter__(self) -> ShardWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = take_pack_lock(self.path)
        try:
            clear_up(self.path)
            self._work.mkdir(exist_ok=True)
            self._look_back()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                try:
                    self._finish()
                except OSError as failed:
                    self._explain(failed)
                    raise
            elif isinstance(error, OSError):
                self._explain(error)
        finally:
            for shard in self._open.values():
                shard.abandon()
            remove(new_dataset(self.path))
            if not finished_shards(self._work):
                remove(self._work)
            if self._lock is not None:
                self._lock.close()

    # ---- what the dataset is to hold ---------------------------------------------------------------------------------

    def keep(self, clip_id: str, split: str, source: str, prompt: str | None = None) -> bool:
        """Keep a clip as it was packed before, if it was made from the same `source` and packed for the same split.

        Its arrays are neither read nor written; its prompt may change. False when there is no such clip, or its shard is
        missing or cut short: then `add` it.
        """
        self._check_new(clip_id)
        found = self._earlier_row(clip_id)
        if found is None or not source or (found[1].source, found[1].split) != (source, split):
            return False
        self._check_split(clip_id, found[1].video, split)
        self._stay(self._rows, found[0], found[1] if prompt is None else replace(found[1], prompt=prompt))
        return True

    def add(self, record: ClipRecord, split: str, source: str = "") -> ClipRow:
        """Check and write one clip; returns its manifest row (shard names become final when the pack is done).

        A clip that was packed before with the very same bytes stays where it is.

        Raises ValueError naming the clip and array for a record that does not fit `schema.ARRAYS`, a clip id seen before,
        or a video that already has clips in the other split.
        """
        check_record(record)
        if split not in SPLITS:
            raise ValueError(f"clip {record.clip_id}: split must be one of {SPLITS}, got {split!r}")
        self._check_new(record.clip_id)
        self._check_split(record.clip_id, record.video, split)
        payload = Payload(record.arrays)
        row = ClipRow(
            clip_id=record.clip_id,
            video=record.video,
            split=split,
            bucket=bucket_of(record),
            fps=float(record.fps),
            scale=float(record.scale),
            prompt=record.prompt,
            arrays=payload.arrays,
            bytes=payload.bytes,
            xxh64=payload.xxh64(),
            training_xxh64=payload.training_xxh64(),
            versions=dict(record.versions),
            quality={key: float(value) for key, value in record.quality.items()},
            source=source,
            motion=record.motion,
        )
        return self._place(self._rows, row, payload)

    def quarantine(
        self,
        clip_id: str,
        video: str,
        reason: str,
        split: str | None = None,
        quality: Mapping[str, float] | None = None,
        motion: str = "",
    ) -> ClipRow:
        """List a clip that is not packed, why, and what was measured of it."""
        self._check_new(clip_id)
        if not reason:
            raise ValueError(f"clip {clip_id}: a clip that is set aside needs a reason")
        row = self._rows[clip_id] = ClipRow(
            clip_id=clip_id, video=video, split=split or "", quarantine=reason, quality=dict(quality or {}), motion=motion
        )
        return row

    def keep_text(self, prompt: str, version: str) -> bool:
        """Keep a prompt's embedding as it was packed before, or as it was added already, if `version` made it."""
        self._check_entered()
        if (known := self._texts.get(text_id(prompt))) is not None:
            return known.versions == {"text": version}
        found = self._earlier_row(text_id(prompt))
        if found is None or found[1].versions != {"text": version}:
            return False
        self._stay(self._texts, *found)
        return True

    def add_text(self, prompt: str, embedding: np.ndarray, version: str) -> ClipRow:
        """Write the embedding [L, D] float16 of a prompt, made by the text encoder `version`.

        Every prompt of an encoded clip needs one, and so does the empty prompt, which stands in for others in training.
        Raises ValueError for an embedding that is none, or for a second, different one of the same prompt.
        """
        self._check_entered()
        check_text(prompt, embedding)
        payload = Payload({"text": embedding})
        row = ClipRow(
            clip_id=text_id(prompt),
            video="",
            split=TEXT_SPLIT,
            prompt=prompt,
            arrays=payload.arrays,
            bytes=payload.bytes,
            xxh64=payload.xxh64(),
            versions={"text": version},
        )
        if (known := self._texts.get(row.clip_id)) is not None:
            if (known.xxh64, known.versions) != (row.xxh64, row.versions):
                raise ValueError(f"prompt {prompt!r}: added twice, with different embeddings")
            return known
        return self._place(self._texts, row, payload)

    def _check_entered(self) -> None:
        if self._lock is None or self._lock.closed:
            raise RuntimeError("ShardWriter is used as a context manager: `with ShardWriter(path) as writer`")

    def _check_new(self, clip_id: str) -> None:
        self._check_entered()
        if clip_id in self._rows:
            raise ValueError(f"clip {clip_id}: added twice")

    def _check_split(self, clip_id: str, video: str, split: str) -> None:
        if self._split_of_video.setdefault(video, split) != split:
            raise ValueError(f"clip {clip_id}: video {video!r} already has clips in the other split")

    # ---- what is there from earlier packs ----------------------------------------------------------------------------

    def _look_back(self) -> None:
        """Collect the rows that may be kept: of the last dataset, and of the finished shards of an interrupted pack."""
        try:
            folder = dataset_folder(self.path)
            by_shard: dict[Path, list[ClipRow]] = {}
            manifest = read_manifest(folder)
            self._hashes = {folder / name: known for name, known in manifest.shards.items()}
            for row in (*manifest, *read_texts(folder).values()):
                if not row.quarantine:
                    by_shard.setdefault(folder / row.shard, []).append(row)
            shards = [FinishedShard(file, rows) for file, rows in by_shard.items()]
        except MissingDatasetError:
            shards = []
        except DatasetError as error:
            log.warning("nothing of the dataset that is there can be kept: %s", error)
            shards = []
        interrupted = finished_shards(self._work)
        if interrupted:
            log.info("going on with an interrupted pack: %d finished shards", len(interrupted))
        for shard in (*shards, *interrupted):
            self._earlier |= {row.clip_id: (shard, row) for row in shard.rows}
        self._numbers = 1 + max((int(shard.file.stem) for shard in interrupted), default=-1)

    def _earlier_row(self, clip_id: str) -> tuple[FinishedShard, ClipRow] | None:
        """A row of an earlier pack, unless its shard is gone, cut short, or not the manifest's."""
        found = self._earlier.get(clip_id)
        if found is None:
            return None
        shard = found[0]
        if shard.file not in self._whole:
            try:
                self._whole[shard.file] = open_parquet(shard.file).num_row_groups == len(shard.rows)
            except DatasetError as error:
                log.warning("%s; its clips are written again", error)
                self._whole[shard.file] = False
        return found if self._whole[shard.file] else None

    def _stay(self, rows: dict[str, ClipRow], shard: FinishedShard, row: ClipRow) -> ClipRow:
        shard.kept.add(row.clip_id)
        rows[row.clip_id] = replace(row, shard=str(shard.file))
        return rows[row.clip_id]

    # ---- writing -----------------------------------------------------------------------------------------------------

    def _place(self, rows: dict[str, ClipRow], row: ClipRow, payload: Payload) -> ClipRow:
        """Write a row's payload, unless the same bytes lie in a shard of the same kind already."""
        found = self._earlier_row(row.clip_id)
        if found is not None and found[1].xxh64 == row.xxh64 and _kind(found[1]) == _kind(row):
            return self._stay(rows, found[0], replace(row, row_group=found[1].row_group))
        rows[row.clip_id] = self._write(row, payload)
        return rows[row.clip_id]

    def _write(self, row: ClipRow, payload: Payload) -> ClipRow:
        kind = _kind(row)
        shard = self._open.get(kind)
        if shard is None:
            shard = self._open[kind] = ShardFile(self._work, self._numbers, row.arrays)
            self._numbers += 1
        row = shard.write(row, payload)
        self.bytes_written += payload.bytes
        if shard.bytes >= self.target_bytes:
            self._close(kind)
        return row

    def _close(self, kind: Kind) -> None:
        self._closed.append(self._open[kind].close())
        del self._open[kind]

    def _finish(self) -> None:
        """Write what is left, put all shards under their final names into one folder, swap it in."""
        self._check_complete()
        earlier = {shard.file: shard for shard, _ in self._earlier.values() if shard.kept}
        linked = [shard for shard in earlier.values() if len(shard.kept) == len(shard.rows)]
        for shard in earlier.values():
            if len(shard.kept) < len(shard.rows):
                self._copy(shard)
        linked = self._fold_in(linked)
        for kind in list(self._open):
            self._close(kind)

        whole = new_dataset(self.path)
        whole.mkdir()
        names: dict[str, str] = {}
        files: dict[str, tuple[int, str]] = {}
        for split in (*SPLITS, TEXT_SPLIT):
            shards = [shard for shard in (*linked, *self._closed) if shard.split == split]
            for i, shard in enumerate(sorted(shards, key=lambda shard: shard.bucket)):  # old ones before new ones
                names[str(shard.file)] = name = f"{split}-{i:05d}-of-{len(shards):05d}.parquet"
                link(shard.file, whole / name)
                files[name] = self._hashes.get(shard.file) or file_hash(whole / name)
        for file, rows in ((TEXTS, self._texts), (MANIFEST, self._rows)):
            final = [replace(row, shard=names.get(row.shard, "")) for row in sorted(rows.values(), key=lambda row: row.clip_id)]
            with whole_file(whole / file) as temporary:
                write_rows(temporary, final, files if file == MANIFEST else None)
            files[file] = file_hash(whole / file)
        fsync(whole)
        swap_in(self.path)
        remove(self._work)

    def _check_complete(self) -> None:
        """Raise DatasetError when there is nothing to pack or a prompt has no embedding."""
        good = [row for row in self._rows.values() if not row.quarantine]
        if not good:
            reasons = [f"  {row.clip_id}: {row.quarantine}" for row in self._rows.values()][:5]
            raise DatasetError(
                "\n".join([f"{self.path}: no clip to pack, {len(self._rows)} set aside; nothing written", *reasons])
            )
        encoded = [row for row in good if "latents" in row.arrays]
        if encoded and text_id("") not in self._texts:
            raise DatasetError(f"{self.path}: no embedding of the empty prompt was added (add_text); training needs it")
        for row in encoded:
            text = self._texts.get(text_id(row.prompt))
            if text is None:
                raise DatasetError(
                    f"{self.path}: clip {row.clip_id}: no embedding of its prompt {row.prompt!r} was added (add_text)"
                )
            if text.versions.get("text") != row.versions.get("text"):
                raise DatasetError(
                    f"{self.path}: clip {row.clip_id}: its text encoder is {row.versions.get('text')!r}, but its prompt "
                    f"{row.prompt!r} was embedded by {text.versions.get('text')!r}"
                )

    def _copy(self, shard: FinishedShard) -> None:
        """Move the kept rows of an earlier shard into new ones, hashes checked."""
        reader = ShardReader.of_folder(shard.file.parent)
        for row in shard.rows:
            if row.clip_id in shard.kept:
                rows = self._texts if row.split == TEXT_SPLIT else self._rows
                rows[row.clip_id] = self._write(rows[row.clip_id], Payload(reader.read(row)))
        reader.close()

    def _fold_in(self, shards: Iterable[FinishedShard]) -> list[FinishedShard]:
        """Copy small earlier shards into the unfull new ones of their kind while they fit, so that many small packs do not
        leave many small shards; returns the others."""
        left = []
        for shard in sorted(shards, key=lambda shard: shard.bytes):
            unfull = self._open.get(_kind(shard.rows[0]))
            if unfull is not None and unfull.bytes + shard.bytes <= self.target_bytes:
                self._copy(shard)
            else:
                left.append(shard)
        return sorted(left, key=lambda shard: shard.file)

    def _explain(self, error: OSError) -> None:
        """Say what a full disk means for the dataset, and what to do."""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(self.path.parent).free
            raise DatasetError(
                f"{self.path}: cannot write, the disk is full or a quota is reached ({error}; {free:,} bytes free). The dataset "
                f"that was there is untouched; the finished shards of this pack are kept in {self._work}. Free some space and "
                "pack again: it goes on from there"
            ) from error


def text_id(prompt: str) -> str:
    """What stands for a prompt in file names and tables: 32 hex digits."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:32]


def _kind(row: ClipRow) -> Kind:
    return row.split, row.bucket, tuple(sorted(row.arrays))
