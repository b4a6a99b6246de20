"""The numbers of a report, apart from its pictures: by band of noise, by bucket, by what the cameras were told."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fw_model.metrics import Array

if TYPE_CHECKING:
    from fw_model.report.page import ReportData

CAMERA_NUMBERS = ("rotation_degrees", "direction_degrees", "ate", "rpe", "rpe_degrees", "rra15", "rta15", "auc30")


@dataclass(frozen=True)
class Evaluation:
    """What was measured of the shown clips, in their order."""

    bands: dict[str, list[dict[str, float]]]  # band of noise -> the numbers of each clip
    buckets: list[str]  # "HxWxT" of each clip
    cameras: dict[str, dict[str, float]]  # given, withheld, other, constant -> means of `CAMERA_NUMBERS` at the lowest band
    calibration: Array | None  # [10] relative depth error by decile of confidence, least confident first; None: it never varies
    rank_correlation: float  # Spearman's, of confidence and error; NaN where undefined

    def band_means(self) -> dict[str, dict[str, float]]:
        return {band: means(clips) for band, clips in self.bands.items()}

    def bucket_means(self) -> dict[str, dict[str, dict[str, float]]]:
        """Bucket -> band -> means."""
        return {
            bucket: {
                band: means([numbers for numbers, own in zip(clips, self.buckets, strict=True) if own == bucket])
                for band, clips in self.bands.items()
            }
            for bucket in sorted(set(self.buckets))
        }

    def to_json(self, data: ReportData) -> dict[str, Any]:
        """Everything, with what it was measured on; a number that is undefined is null."""
        clips = {
            clip.clip_id: {"bucket": clip.bucket, **{band: _defined(found[i]) for band, found in self.bands.items()}}
            for i, clip in enumerate(data.clips)
        }
        return {
            "checkpoint": data.checkpoint.name,
            "dataset": data.dataset_digest,
            "split": data.split,
            "bands": self.band_means(),
            "buckets": self.bucket_means(),
            "cameras": self.cameras,
            "calibration": None if self.calibration is None else self.calibration.tolist(),
            "rank_correlation": None if math.isnan(self.rank_correlation) else self.rank_correlation,
            "clips": clips,
        }


def means(numbers: Sequence[Mapping[str, float]], names: Sequence[str] | None = None) -> dict[str, float]:
    """Mean of each number over the clips where it is defined; numbers defined nowhere are left out."""
    found = {}
    for name in names if names is not None else (numbers[0] if numbers else ()):
        values = [clip[name] for clip in numbers if math.isfinite(clip[name])]
        if values:
            found[name] = sum(values) / len(values)
    return found


def _defined(numbers: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}
