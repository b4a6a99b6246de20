"""The manifest of a packed dataset, where its files are, and what may be wrong with it."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fw_model.data.schema import FORMAT_VERSION

MANIFEST = "manifest.parquet"
TEXTS = "texts.parquet"  # the manifest of the prompts: a row per distinct prompt, with the columns of a clip's row
SPLITS = ("train", "val")
TEXT_SPLIT = "texts"  # what stands for the split in the names of shards that hold prompt embeddings
_SHARD_NAME = re.compile(r"(train|val|texts)-\d{5}-of-\d{5}\.parquet")


class DatasetError(ValueError):
    """A dataset that is missing, damaged or not what was asked for; the message names the file and clip."""


class MissingDatasetError(DatasetError, FileNotFoundError):
    """There is no dataset where one was expected."""


class PackInProgressError(DatasetError):
    """Another process is packing into the same folder."""


@dataclass(frozen=True)
class ClipRow:
    """One row of the manifest. A quarantined clip has a reason and no payload (shard "", row_group -1, split "" if unknown).

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
    ],
    metadata={"format_version": str(FORMAT_VERSION)},
)
_JSON_COLUMNS = ("arrays", "versions", "quality")


def read_manifest(path: str | Path) -> list[ClipRow]:
    """All rows of a dataset's manifest, ordered by clip id, quarantined clips included.

    Raises MissingDatasetError naming the folder and the job that makes it; DatasetError for a manifest that is damaged, of
    another format version, or that points outside its folder.
    """
    return _shards_named(dataset_folder(path) / MANIFEST)


def read_texts(path: str | Path) -> dict[str, ClipRow]:
    """Prompt -> the row that says where its embedding lies; the empty prompt is among them as soon as one clip is encoded.

    Raises as `read_manifest`.
    """
    return {row.prompt: row for row in _shards_named(dataset_folder(path) / TEXTS)}


def _shards_named(file: Path) -> list[ClipRow]:
    """`read_rows` of a finished dataset: every row with a payload is in a shard beside `file`."""
    rows = read_rows(file)
    for row in rows:
        if not row.quarantine and not _SHARD_NAME.fullmatch(row.shard):
            raise DatasetError(f"{file}: clip {row.clip_id}: {row.shard!r} is not a shard's name")
    return rows


def read_rows(file: Path) -> list[ClipRow]:
    """Rows written by `write_rows`, ordered by clip id; DatasetError when they are damaged or of another format version."""
    try:
        table = open_parquet(file, checksums=True).read(use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{file}: damaged ({error}); pack the dataset again") from error
    version = (table.schema.metadata or {}).get(b"format_version", b"?").decode()
    if version != str(FORMAT_VERSION):
        raise DatasetError(f"{file}: format version {version}, this code reads {FORMAT_VERSION}; pack the dataset again")
    if set(table.column_names) != set(_MANIFEST_SCHEMA.names):
        raise DatasetError(f"{file}: columns {table.column_names}, expected {_MANIFEST_SCHEMA.names}")
    rows = []
    for record in table.to_pylist():
        try:
            record.update({column: json.loads(record[column]) for column in _JSON_COLUMNS})
            record["arrays"] = {name: (str(dtype), tuple(shape)) for name, (dtype, shape) in record["arrays"].items()}
        except (TypeError, ValueError) as error:
            raise DatasetError(f"{file}: clip {record['clip_id']}: bad JSON column ({error})") from error
        rows.append(ClipRow(**record))
    return sorted(rows, key=lambda row: row.clip_id)


def dataset_digest(path: str | Path) -> str:
    """16 hex digits of what training sees: the packed clips and prompts with their payload hashes, splits and versions.

    The layout (shard names, order of packing), quality numbers and quarantined clips do not change it.
    """
    keys = ("clip_id", "video", "split", "bucket", "fps", "scale", "prompt", "arrays", "xxh64", "versions")
    found = [*read_manifest(path), *read_texts(path).values()]
    rows = [{key: getattr(row, key) for key in keys} for row in found if not row.quarantine]
    return hashlib.sha256(json.dumps([FORMAT_VERSION, rows], sort_keys=True).encode()).hexdigest()[:16]


def write_rows(path: Path, rows: list[ClipRow]) -> None:
    """Write a manifest. Every page carries a checksum, which `read_rows` checks."""
    records = [{**asdict(row), **{c: json.dumps(getattr(row, c), sort_keys=True) for c in _JSON_COLUMNS}} for row in rows]
    table = pa.Table.from_pylist(records, schema=_MANIFEST_SCHEMA)
    pq.write_table(table, path, compression="none", write_page_checksum=True)


def dataset_folder(path: str | Path) -> Path:
    """The folder that holds the last good dataset."""
    path = Path(path).absolute()
    for folder in (path, previous_folder(path)):
        if (folder / MANIFEST).is_file():
            return folder
    raise MissingDatasetError(f"no dataset at {path} (no {MANIFEST}); make it with: python -m fw_pipeline.launch build_dataset")


def open_parquet(file: Path, checksums: bool = False) -> pq.ParquetFile:
    """The one place that opens dataset files. checksums: have the pages' checked (payload has hashes of its own)."""
    try:
        return pq.ParquetFile(file, memory_map=True, page_checksum_verification=checksums)
    except FileNotFoundError as error:
        raise DatasetError(f"{file}: missing; pack the dataset again") from error
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{file}: damaged or truncated ({error}); pack the dataset again") from error


def previous_folder(path: Path) -> Path:
    """Where the old dataset is for the moment in which a new one is swapped in."""
    return path.parent / f".{path.name}.previous"
