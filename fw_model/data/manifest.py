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
SPLITS = ("train", "val")
_SHARD_NAME = re.compile(r"(train|val)-\d{5}-of-\d{5}\.parquet")


class DatasetError(ValueError):
    """A dataset that is missing, damaged or not what was asked for; the message names the file and clip."""


class MissingDatasetError(DatasetError, FileNotFoundError):
    """There is no dataset where one was expected."""


class PackInProgressError(DatasetError):
    """Another process is packing into the same folder."""


@dataclass(frozen=True)
class ClipRow:
    """One row of the manifest. A quarantined clip has a reason and no payload (shard "", row_group -1, split "" if unknown)."""

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
    ],
    metadata={"format_version": str(FORMAT_VERSION)},
)
_JSON_COLUMNS = ("arrays", "versions", "quality")


def read_manifest(path: str | Path) -> list[ClipRow]:
    """All rows of a dataset's manifest, ordered by clip id, quarantined clips included.

    Raises MissingDatasetError naming the folder and the job that makes it; DatasetError for a manifest that is damaged, of
    another format version, or that points outside its folder.
    """
    file = dataset_folder(path) / MANIFEST
    table = open_parquet(file).read(use_threads=False)
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
        row = ClipRow(**record)
        if not row.quarantine and not _SHARD_NAME.fullmatch(row.shard):
            raise DatasetError(f"{file}: clip {row.clip_id}: {row.shard!r} is not a shard's name")
        rows.append(row)
    return sorted(rows, key=lambda row: row.clip_id)


def dataset_digest(path: str | Path) -> str:
    """16 hex digits of what training sees: the packed clips with their payload hashes, splits and versions.

    The layout (shard names, order of packing), quality numbers and quarantined clips do not change it.
    """
    keys = ("clip_id", "video", "split", "bucket", "fps", "scale", "prompt", "arrays", "xxh64", "versions")
    rows = [{key: getattr(row, key) for key in keys} for row in read_manifest(path) if not row.quarantine]
    return hashlib.sha256(json.dumps([FORMAT_VERSION, rows], sort_keys=True).encode()).hexdigest()[:16]


def write_manifest(path: Path, rows: list[ClipRow]) -> None:
    records = [{**asdict(row), **{c: json.dumps(getattr(row, c), sort_keys=True) for c in _JSON_COLUMNS}} for row in rows]
    pq.write_table(pa.Table.from_pylist(records, schema=_MANIFEST_SCHEMA), path, compression="none")


def dataset_folder(path: str | Path) -> Path:
    """The folder that holds the last good dataset."""
    path = Path(path).absolute()
    for folder in (path, previous_folder(path)):
        if (folder / MANIFEST).is_file():
            return folder
    raise MissingDatasetError(f"no dataset at {path} (no {MANIFEST}); make it with: python -m fw_pipeline.launch build_dataset")


def open_parquet(file: Path) -> pq.ParquetFile:
    """The one place that opens dataset files."""
    try:
        return pq.ParquetFile(file, memory_map=True)
    except FileNotFoundError as error:
        raise DatasetError(f"{file}: missing; pack the dataset again") from error
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{file}: damaged or truncated ({error}); pack the dataset again") from error


def previous_folder(path: Path) -> Path:
    """Where the old dataset is for the moment in which a new one is swapped in."""
    return path.parent / f".{path.name}.previous"
