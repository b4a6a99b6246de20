"""The manifest of a packed dataset, where its files are, and what may be wrong with it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from fw_model.data.remote import RemoteFolder, is_remote
from fw_model.errors import DatasetError, MissingDatasetError

FORMAT_VERSION = 2
MANIFEST = "manifest.parquet"
TEXTS = "texts.parquet"  # the manifest of the prompts: a row per distinct prompt, with the columns of a clip's row
SPLITS = ("train", "val")
TEXT_SPLIT = "texts"  # what stands for the split in the names of shards that hold prompt embeddings
_SHARD_NAME = re.compile(r"(train|val|texts)-\d{5}-of-\d{5}\.parquet")


@dataclass(frozen=True)
class ClipRow:
    """One row of the manifest. A clip set aside has a reason and no payload (shard "", row_group -1, split "" if unknown).

    `texts.parquet` has the same rows for prompts: clip_id a digest of the prompt, split "texts", one array "text" [L, D].
    """

    clip_id: str
    video: str
    split: str
    bucket: str = ""  # "HxWxT"
    fps: float = 0.0
    scale: float = 0.0
    prompt: str = ""
    shard: str = ""
    row_group: int = -1
    arrays: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)  # name -> (dtype, shape)
    bytes: int = 0
    xxh64: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    quality: dict[str, float] = field(default_factory=dict)
    quarantine: str = ""
    training_xxh64: str = ""  # of the arrays that training reads; "" for prompts, and in datasets of before
    motion: str = ""  # what the camera does; "" where it is not known, and in datasets of before
    source: str = ""  # digest of what the clip was made from; while it stays the same, a pack keeps the clip; "": unknown

    @property
    def size(self) -> tuple[int, int, int]:
        """(H, W, T) of the bucket."""
        height, width, frames = map(int, self.bucket.split("x"))
        return height, width, frames


_MANIFEST_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("clip_id", "video", "split", "bucket")),
        ("fps", pa.float64()),
        ("scale", pa.float64()),
        ("prompt", pa.string()),
        ("shard", pa.string()),
        ("row_group", pa.int64()),
        ("arrays", pa.string()),  # json
        ("bytes", pa.int64()),
        ("xxh64", pa.string()),
        ("versions", pa.string()),  # json
        ("quality", pa.string()),  # json
        ("quarantine", pa.string()),
        ("source", pa.string()),
        ("training_xxh64", pa.string()),  # not in datasets of before
        ("motion", pa.string()),  # likewise
    ],
    metadata={"format_version": str(FORMAT_VERSION)},
)
_NAMES = _MANIFEST_SCHEMA.names
_OPTIONAL = ("training_xxh64", "motion")
_JSON_COLUMNS = ("arrays", "versions", "quality")


# Columns that are kept as codes into their distinct values: what many clips share is stored, checked and hashed once.
_SHARED_COLUMNS = ("video", "split", "bucket", "prompt", "shard", "arrays", "versions", "quarantine", "motion")


class Manifest(Sequence[ClipRow]):
    """Rows of a manifest, ordered by clip id: columns of arrow, of which a row is made when it is asked for.

    A million rows are read in about a second and take some hundred MB. It is pickled as the name of its file.
    """

    def __init__(self, file: Path, table: pa.Table, indices: NDArray[np.int64] | None = None) -> None:
        """indices: the rows of the table that are in it, all by default."""
        self.file = file
        self._table = table
        self._indices = np.arange(len(table)) if indices is None else indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> ClipRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[ClipRow]: ...
    def __getitem__(self, index: int | slice) -> ClipRow | list[ClipRow]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._row(self._table.slice(int(self._indices[index]), 1).to_pylist()[0])

    def __iter__(self) -> Iterator[ClipRow]:
        for start in range(0, len(self), 1024):
            yield from map(self._row, self._table.take(pa.array(self._indices[start : start + 1024])).to_pylist())

    def __reduce__(self) -> Any:
        return _reopen, (self.file, None if len(self) == len(self._table) else self._indices)

    def select(self, mask: NDArray[np.bool_]) -> Manifest:
        """The rows where `mask` [len(self)] is true."""
        return Manifest(self.file, self._table, self._indices[mask])

    def equal(self, column: str, value: str) -> NDArray[np.bool_]:
        """[len(self)]: where a shared column has this value."""
        codes, values = self.codes(column)
        found = pc.index(values, value).as_py()
        return codes == found if found >= 0 else np.zeros(len(self), bool)

    def codes(self, column: str) -> tuple[NDArray[np.int32], pa.Array]:
        """A shared column as codes [len(self)] into its distinct values; not every value need be used."""
        chunk = self._table[column].chunk(0) if len(self._table) else pa.array([], pa.string()).dictionary_encode()
        return chunk.indices.to_numpy()[self._indices], chunk.dictionary

    def distinct(self, *columns: str) -> list[ClipRow]:
        """The first row of each combination of values in shared columns: what holds for these holds for all rows."""
        combined, count = np.zeros(len(self), np.int64), 1
        for column in columns:
            codes, values = self.codes(column)
            combined, count = combined * max(1, len(values)) + codes, count * max(1, len(values))
        return [self[int(i)] for i in np.sort(_first_of_each(combined, count))]

    @property
    def shards(self) -> dict[str, tuple[int, str]]:
        """Name of a file beside the manifest -> (bytes, xxh64) of the whole file; empty in the tables of a pack under way."""
        text = (self._table.schema.metadata or {}).get(b"files", b"{}")
        return {name: (int(size), str(xxh64)) for name, (size, xxh64) in json.loads(text).items()}

    def update_digest(self, digest: Any) -> None:
        """Hash what training sees of the rows that are not set aside, column by column."""
        seen = ("clip_id", "video", "split", "bucket", "fps", "scale", "prompt", "arrays", "xxh64", "versions")
        self.select(self.equal("quarantine", ""))._update(digest, seen)

    def _update(self, digest: Any, columns: Iterable[str]) -> None:
        rows = pa.array(self._indices)
        for column in columns:
            digest.update(column.encode())
            if column in _SHARED_COLUMNS:  # codes in the order of first use, whatever the order in the file
                codes, values = self.codes(column)
                first = np.sort(_first_of_each(codes, len(values)))
                renamed = np.zeros(max(1, len(values)), np.int32)
                renamed[codes[first]] = np.arange(len(first), dtype=np.int32)
                digest.update(renamed[codes].astype("<i4").tobytes())
                _update_with_strings(digest, values.take(pa.array(codes[first])))
            elif pa.types.is_primitive(self._table[column].type):
                numbers = self._table[column].take(rows).to_numpy()
                digest.update(numbers.astype(numbers.dtype.newbyteorder("<")).tobytes())
            else:
                _update_with_strings(digest, self._table[column].chunk(0).take(rows) if len(rows) else pa.array([], pa.string()))

    def content_hash(self) -> str:
        """xxh64 of all columns in the order of the file, and of what it says of the files beside it."""
        digest = xxhash.xxh64((self._table.schema.metadata or {}).get(b"files", b""))
        self._update(digest, [name for name in _NAMES if name in self._table.column_names])
        return digest.hexdigest()

    def _row(self, record: dict[str, Any]) -> ClipRow:
        try:
            record["arrays"] = parse_arrays(record["arrays"])
            record["versions"] = json.loads(record["versions"])
            record["quality"] = json.loads(record["quality"])
        except (TypeError, ValueError) as error:
            raise DatasetError(f"{self.file}: clip {record['clip_id']}: bad JSON column ({error})") from error
        return ClipRow(**record)


def _value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _reopen(file: Path, indices: NDArray[np.int64] | None) -> Manifest:
    whole = read_rows(file)
    return whole if indices is None else Manifest(whole.file, whole._table, indices)


def _first_of_each(codes: NDArray[Any], count: int) -> NDArray[np.int64]:
    """The first place of every code that occurs; codes lie within 0..count - 1."""
    if count > 4 * len(codes) + 1024:
        return np.unique(codes, return_index=True)[1]
    first = np.full(count, -1, np.int64)
    first[codes[::-1]] = np.arange(len(codes) - 1, -1, -1)  # of several assignments to one place the last one stays
    return first[first >= 0]


def _update_with_strings(digest: Any, strings: pa.Array) -> None:
    """Hash the lengths and then the bytes, so that no two lists of strings look the same."""
    large = strings.cast(pa.large_string())
    offsets = np.zeros(1, "<i8")
    if len(large):
        offsets = np.frombuffer(large.buffers()[1], "<i8")[large.offset : large.offset + len(large) + 1]
    digest.update(np.diff(offsets).tobytes())
    if offsets[-1] > offsets[0]:
        digest.update(memoryview(large.buffers()[2])[offsets[0] : offsets[-1]])


@lru_cache(maxsize=4096)
def parse_arrays(text: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The `arrays` column of a row, as it lies in the file: name -> (dtype, shape)."""
    return {name: (str(dtype), tuple(shape)) for name, (dtype, shape) in json.loads(text).items()}


def read_manifest(path: str | Path) -> Manifest:
    """All rows of a dataset's manifest, ordered by clip id, clips set aside included. path: a folder, or a URL.

    Raises MissingDatasetError naming the folder and the job that makes it; DatasetError for a manifest that is damaged, of
    another format version, or that points outside its folder.
    """
    if is_remote(path):
        return _shards_named(RemoteFolder(str(path)).manifest())
    return _shards_named(dataset_folder(path) / MANIFEST)


def read_text_rows(path: str | Path, manifest: Manifest | None = None) -> Manifest:
    """The manifest of a dataset's prompt embeddings. manifest: that of the dataset, if it is read already.

    Raises as `read_manifest`.
    """
    if is_remote(path):
        manifest = manifest or read_manifest(path)
        if TEXTS not in manifest.shards:
            raise DatasetError(f"{path}: its manifest does not list {TEXTS}; pack the dataset again and upload it")
        return _shards_named(RemoteFolder(str(path)).fetch(TEXTS, *manifest.shards[TEXTS]))
    return _shards_named(dataset_folder(path) / TEXTS)


def read_texts(path: str | Path) -> dict[str, ClipRow]:
    """Prompt -> the row that says where its embedding lies; the empty prompt is among them as soon as one clip is encoded.

    Raises as `read_manifest`.
    """
    return {row.prompt: row for row in read_text_rows(path)}


def _shards_named(file: Path) -> Manifest:
    """`read_rows` of a finished dataset: every row with a payload is in a shard beside `file`."""
    rows = read_rows(file)
    for row in rows.distinct("shard", "quarantine"):
        if not row.quarantine and not _SHARD_NAME.fullmatch(row.shard):
            raise DatasetError(f"{file}: clip {row.clip_id}: {row.shard!r} is not a shard's name")
    return rows


def read_rows(file: Path) -> Manifest:
    """Rows written by `write_rows`, ordered by clip id; DatasetError when they are damaged or of another format version.

    The last few files are kept in memory, as long as they do not change on disk.
    """
    try:
        found = os.stat(file)
    except OSError as error:
        raise DatasetError(f"{file}: missing; pack the dataset again") from error
    return _read_rows(file, (found.st_ino, found.st_size, found.st_mtime_ns))


@lru_cache(maxsize=4)
def _read_rows(file: Path, identity: tuple[int, int, int]) -> Manifest:
    parquet = open_parquet(file, checksums=True, shared=_SHARED_COLUMNS)
    try:
        table = parquet.read(use_threads=False)
        metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{file}: damaged ({error}); pack the dataset again") from error
    version = metadata.get("format_version", "?")
    if version != str(FORMAT_VERSION):
        raise DatasetError(f"{file}: format version {version}, this code reads {FORMAT_VERSION}; pack the dataset again")
    expected = dict(zip(_NAMES, _MANIFEST_SCHEMA.types, strict=True))
    if dict.fromkeys(_OPTIONAL, pa.string()) | {field.name: _value_type(field.type) for field in table.schema} != expected:
        raise DatasetError(f"{file}: columns {table.schema.to_string()}, expected {_MANIFEST_SCHEMA.to_string()}")
    if empty := [column for column in table.column_names if table[column].null_count]:
        raise DatasetError(f"{file}: nothing in some rows of {empty}; pack the dataset again")
    table = table.unify_dictionaries().combine_chunks()
    manifest = Manifest(file, table)
    try:
        found = manifest.content_hash()
    except (pa.ArrowException, IndexError) as error:
        raise DatasetError(f"{file}: damaged ({error}); pack the dataset again") from error
    if found != metadata.get("xxh64"):  # pages have checksums, but the file's footer, which says how to read them, has none
        raise DatasetError(f"{file}: damaged (its rows do not have the hash in its footer); pack the dataset again")
    for name in _OPTIONAL:
        if name not in table.column_names:
            empty_column = pa.array([""] * len(table), pa.string())
            table = table.append_column(name, empty_column.dictionary_encode() if name in _SHARED_COLUMNS else empty_column)
    manifest = Manifest(file, table)
    ids = table["clip_id"]
    if len(table) > 1 and not pc.all(pc.greater_equal(ids[1:], ids[:-1])).as_py():
        manifest = Manifest(file, table.take(pc.sort_indices(ids)).unify_dictionaries().combine_chunks())
    manifest.distinct("arrays")  # makes rows of them: broken JSON is found now, not in the middle of an epoch
    manifest.distinct("versions")
    return manifest


def dataset_digest(path: str | Path) -> str:
    """16 hex digits of what training sees: the packed clips and prompts with their payload hashes, splits and versions.

    The layout (shard names, order of packing), quality numbers and clips set aside do not change it.
    """
    digest = hashlib.sha256(str(FORMAT_VERSION).encode())
    manifest = read_manifest(path)
    for rows in (manifest, read_text_rows(path, manifest)):
        rows.update_digest(digest)
    return digest.hexdigest()[:16]


def write_rows(path: Path, rows: Sequence[ClipRow], files: dict[str, tuple[int, str]] | None = None) -> None:
    """Write a manifest, with a checksum of every page and a hash of all, which `read_rows` checks.

    files: name -> (bytes, xxh64) of every file beside it, for those who fetch them from elsewhere.
    """
    records = [{**asdict(row), **{c: json.dumps(getattr(row, c), sort_keys=True) for c in _JSON_COLUMNS}} for row in rows]
    table = pa.Table.from_pylist(records, schema=_MANIFEST_SCHEMA)
    if files is not None:
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), b"files": json.dumps(files, sort_keys=True)})
    write_table(path, table)


def write_table(path: Path, table: pa.Table) -> None:
    """Write a manifest's table, whose metadata says the format version and the files beside it."""
    coded = table.combine_chunks()
    for number, column in enumerate(table.column_names):
        if column in _SHARED_COLUMNS:
            coded = coded.set_column(number, column, coded[column].dictionary_encode())
    metadata = {**(table.schema.metadata or {}), b"xxh64": Manifest(path, coded.combine_chunks()).content_hash()}
    pq.write_table(table.replace_schema_metadata(metadata), path, compression="none", write_page_checksum=True)


def dataset_folder(path: str | Path) -> Path:
    """The folder that holds the last good dataset. Raises MissingDatasetError; DatasetError for a URL, which is no folder."""
    if is_remote(path):
        raise DatasetError(f"{path}: this needs the dataset in a local folder; copy it here first")
    path = Path(path).absolute()
    for folder in (path, previous_folder(path)):
        if (folder / MANIFEST).is_file():
            return folder
    raise MissingDatasetError(f"no dataset at {path} (no {MANIFEST}); make it with: python -m fw_pipeline.launch build_dataset")


def open_parquet(file: Path, checksums: bool = False, shared: Sequence[str] = ()) -> pq.ParquetFile:
    """The one place that opens dataset files.

    checksums: have the pages' checked (payload has hashes of its own); shared: columns to be read as codes.
    """
    try:
        return pq.ParquetFile(file, memory_map=True, page_checksum_verification=checksums, read_dictionary=list(shared))
    except FileNotFoundError as error:
        raise DatasetError(f"{file}: missing; pack the dataset again") from error
    except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:  # KeyError: no column of that name
        raise DatasetError(f"{file}: damaged or truncated ({error}); pack the dataset again") from error


def previous_folder(path: Path) -> Path:
    """Where the old dataset is for the moment in which a new one is swapped in."""
    return path.parent / f".{path.name}.previous"
