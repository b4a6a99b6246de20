"""A guide-layout folder -> a packed dataset. Everything is checked before anything is written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from fw_model.config import EncodersConfig
from fw_model.data.manifest import read_manifest
from fw_model.data.schema import ClipRecord
from fw_model.data.shard_writer import ShardWriter
from fw_model.data.splits import assign_splits
from fw_model.errors import MissingDatasetError
from fw_model.files import file_hash
from fw_model.model.encoders import Encoders
from fw_pipeline.annotate.types import ClipSetAside, VideoSetAside
from fw_pipeline.guide_layout.check import Sample, check_sample
from fw_pipeline.guide_layout.finish import Size, Window, finish, read_pictures, windows
from fw_pipeline.guide_layout.fit import DepthKind
from fw_pipeline.guide_layout.metadata import Fault, GuideLayoutError, SampleError, read_metadata

IMPORTED = "guide-layout:"  # what the name of every version begins with
MADE_BY = f"{IMPORTED}2"  # raise the number when the same files give other numbers
T = TypeVar("T")
Progress = Callable[[Iterable[T], str], Iterable[T]]


@dataclass(frozen=True)
class ImportPlan:
    """How a folder is imported."""

    depth_kind: DepthKind | Literal["auto"] = "auto"
    size: Size | Callable[[int, int], Size] | None = None  # of the clips; None: as the samples are
    skip_bad: bool = False
    val_percent: float = 2.0


@dataclass
class ImportResult:
    """What was found and what was written."""

    samples: int = 0
    clips: int = 0
    kept: int = 0  # of the clips, those that were imported before and are unchanged
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # how each sample's numbers were read
    sizes: set[Size] = field(default_factory=set)  # of the clips


class BadSamplesError(GuideLayoutError):
    """Bad samples, all of them, and nothing written."""

    def __init__(self, root: Path, faults: list[Fault], samples: int) -> None:
        self.faults = faults
        bad = len({fault.sample for fault in faults})
        lines = [
            *map(str, faults),
            f"{root}: {bad} of {samples} samples are bad, nothing was written; mend them or pass --skip-bad",
        ]
        super().__init__("\n".join(lines))


def import_guide(
    root: Path,
    dataset: Path,
    encoders: Callable[[], Encoders],
    config: EncodersConfig,
    text_len: int,
    plan: ImportPlan,
    progress: Progress = lambda items, _: items,
) -> ImportResult:
    """Check every file of a guide-layout folder, then encode and pack its samples.

    Args:
        root: the folder with `metadata.json`.
        dataset: where the dataset goes; one that was imported there before is brought up to date.
        encoders: loads the encoders; called once, when the checks are over and there is something to encode.
        config, text_len: of these encoders; they name what the clips were made by.
        plan: what depth is, the size of clips, what happens to bad samples.
        progress: wraps loops for a progress bar, with a word for what is done.

    Raises:
        GuideLayoutError: not such a folder, or `dataset` holds clips that come from elsewhere.
        BadSamplesError: samples are bad and `plan.skip_bad` is not set; the dataset is as it was.
    """
    _check_target(dataset)
    entries, faults = read_metadata(root)
    names = {entry.sample_id for entry in entries} | {fault.sample for fault in faults}
    result = ImportResult(samples=len(names), faults=faults)
    good: list[tuple[Sample, list[Window]]] = []
    for entry in progress(entries, "check"):
        try:
            sample = check_sample(entry, plan.depth_kind)
            good.append((sample, windows(sample, plan.size)))
            result.notes.append(_note(sample))
        except SampleError as error:
            faults += error.faults
        except ValueError as error:
            faults.append(entry.fault(entry.video, str(error)))
    if not good or (faults and not plan.skip_bad):
        raise BadSamplesError(root, faults, len(names))
    try:
        splits = _splits([sample for sample, _ in good], plan.val_percent)
    except ValueError as error:
        raise GuideLayoutError(f"{root}: {error}; nothing was written") from error
    with ShardWriter(dataset) as writer:
        packer = _Packer(writer, encoders, config, text_len, plan, result)
        for sample, cut in progress(good, "import"):
            packer.add(sample, cut, splits[source_of(sample)])
        if faults and not plan.skip_bad:
            raise BadSamplesError(root, faults, len(names))  # leaves the writer, which drops what it has
        for name in dict.fromkeys(fault.sample for fault in faults):
            reasons = [f"{fault.file}: {fault.reason}" for fault in faults if fault.sample == name]
            if name not in packer.named:
                writer.quarantine(name, name, "; ".join(reasons[:3]) + (f"; and {len(reasons) - 3} more" if reasons[3:] else ""))
    return result


class _Packer:
    """Writes samples; models are loaded on first use."""

    def __init__(
        self,
        writer: ShardWriter,
        encoders: Callable[[], Encoders],
        config: EncodersConfig,
        text_len: int,
        plan: ImportPlan,
        result: ImportResult,
    ) -> None:
        self.writer, self.plan, self.result = writer, plan, result
        self.named: set[str] = set()  # clip ids in the manifest
        self.versions = {"geometry": MADE_BY, **config.identities(text_len)}
        self._load = encoders
        self._encoders: Encoders | None = None

    @property
    def encoders(self) -> Encoders:
        if self._encoders is None:
            self._encoders = self._load()
        return self._encoders

    def add(self, sample: Sample, cut: list[Window], split: str) -> None:
        """Pack the clips of a sample; those that turn out bad become faults."""
        digest = _files_digest(sample)
        for window in cut:
            source = self._source(sample, window, digest)
            try:
                # The dataset is lost already once a sample is bad: then the others are looked at, but not encoded.
                doomed = bool(self.result.faults) and not self.plan.skip_bad
                self._clip(sample, window, split, source, doomed)
            except (ClipSetAside, VideoSetAside, ValueError) as error:
                self.result.faults.append(Fault(window.clip_id, sample.entry.shown(sample.entry.video), str(error)))
                if self.plan.skip_bad:
                    self.writer.quarantine(window.clip_id, source_of(sample), str(error))
                    self.named.add(window.clip_id)

    def _clip(self, sample: Sample, window: Window, split: str, source: str, doomed: bool) -> None:
        prompt = sample.entry.prompt
        if self.writer.keep(window.clip_id, split, source):
            self.result.kept += 1
        else:
            geometry = finish(sample, window)
            if doomed:
                return
            pictures = read_pictures(sample, window)
            record = ClipRecord(
                clip_id=window.clip_id,
                video=source_of(sample),
                fps=sample.fps,
                scale=geometry.scale,
                prompt=prompt,
                arrays={
                    "latents": self.encoders.encode_video(pictures),
                    "image": self.encoders.encode_image(pictures[0]),
                    **{name: getattr(geometry, name) for name in ("depth", "confidence", "intrinsics", "w2c")},
                },
                quality=geometry.quality,
                versions=self.versions | {"depth": f"{MADE_BY} {sample.depth.kind}"},
            )
            self.writer.add(record, split, source)
        for text in (prompt, ""):  # the empty one stands in for others in training
            if not self.writer.keep_text(text, self.versions["text"]):
                self.writer.add_text(text, self.encoders.encode_text(text), self.versions["text"])
        self.result.clips += 1
        self.result.sizes.add(window.size)
        self.named.add(window.clip_id)

    def _source(self, sample: Sample, window: Window, digest: str) -> str:
        """Hash of everything a clip is made from."""
        entry = sample.entry
        lens = entry.intrinsics.tolist() if entry.intrinsics is not None else None
        made_by = [self.versions, sample.depth.kind]
        parts = [digest, window.first, window.size, made_by, entry.prompt, entry.clip_scale, lens, source_of(sample)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def source_of(sample: Sample) -> str:
    """The video whose clips may not straddle the splits."""
    return sample.entry.source_video or sample.entry.shown(sample.entry.video)


def _files_digest(sample: Sample) -> str:
    files = (sample.entry.video, sample.entry.camera, *sample.depth_files, *sample.points_files)
    return hashlib.sha256("".join(file_hash(file)[1] for file in files).encode()).hexdigest()[:16]


def _note(sample: Sample) -> str:
    points = f"{sample.points.frame} points ({sample.points.error:.2f} px, lens from {sample.points.lens_from})"
    unit = "" if sample.depth.unit == 1 else f" in units of {sample.depth.unit:.4g}"
    unit += "" if sample.depth.far is None else f", {sample.depth.far:g} as nothing there"
    return f"{sample.entry.sample_id}: depth read as {sample.depth.kind}{unit} ({sample.depth.why}); {points}"


def _splits(samples: list[Sample], val_percent: float) -> dict[str, str]:
    """Source video -> split: as the samples say, else by hash. Raises ValueError when they contradict themselves."""
    named: dict[str, str] = {}
    for sample in samples:
        split = sample.entry.split
        if split and named.setdefault(source_of(sample), split) != split:
            raise ValueError(f"{sample.entry.sample_id}: its video {source_of(sample)} is in both splits in metadata.json")
    return assign_splits((source_of(sample) for sample in samples), val_percent) | named


def _check_target(dataset: Path) -> None:
    """Importing replaces what was imported before, and nothing else."""
    try:
        rows = read_manifest(dataset)
    except MissingDatasetError:
        return
    foreign = [row.clip_id for row in rows if not row.quarantine and not row.versions.get("geometry", "").startswith(IMPORTED)]
    if foreign:
        raise GuideLayoutError(
            f"{dataset}: holds {len(foreign)} clips that were not imported from a guide layout ({foreign[0]}, ...) and would be "
            f"lost; give another folder"
        )
