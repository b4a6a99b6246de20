"""What the audit says of a clip: whether its geometry is true, the numbers, and what is likely wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from fw_pipeline.annotate.types import ClipSetAside

# Raise it when the audit says other things of the same clip: what was accepted before is then judged again.
AUDIT_VERSION = 2


class Judgement(StrEnum):
    """UNJUDGED: the pictures do not tell. It is no kind of PASS."""

    PASS = "pass"
    REFUSE = "refuse"
    UNJUDGED = "unjudged"


class Cause(StrEnum):
    """What is likely wrong with a clip that is refused."""

    FOCAL = "focal length"
    POSE = "poses of single frames"
    C2W = "camera-to-world poses given as world-to-camera"
    OPENGL = "OpenGL axes"
    C2W_OPENGL = "camera-to-world poses with OpenGL axes"
    POSE_SHIFT = "poses of other frames"
    PATH = "a camera path that is not this video's"
    DEPTH_SHIFT = "depth of other frames"
    SCALE = "depth in another unit than the path"
    MIRRORED = "mirrored depth"
    DEPTH = "depth that does not follow the scene"
    FOREGROUND = "moving things taken for the scene"
    NO_DEPTH = "a motion that shows no depth"
    FEW_TRACKS = "too little to follow"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or could not be judged, in words with its numbers."""

    cause: Cause
    message: str
    judged: bool = True  # False: nothing is known to be wrong, but neither to be right


@dataclass(frozen=True)
class Verdict:
    """numbers: finite floats, for the manifest and the UI; of what could not be measured there is none."""

    numbers: Mapping[str, float] = field(default_factory=dict)
    findings: Sequence[Finding] = ()

    @property
    def judgement(self) -> Judgement:
        if any(finding.judged for finding in self.findings):
            return Judgement.REFUSE
        return Judgement.UNJUDGED if self.findings else Judgement.PASS

    @property
    def cause(self) -> Cause | None:
        """The first one; what is known goes before what could not be judged."""
        return self._ordered[0].cause if self.findings else None

    @property
    def _ordered(self) -> list[Finding]:
        return sorted(self.findings, key=lambda finding: not finding.judged)

    def __str__(self) -> str:
        if not self.findings:
            return "pass"
        return f"{self.judgement}: " + "; ".join(f"{finding.cause}: {finding.message}" for finding in self._ordered)

    def require(self) -> None:
        """Raise ClipSetAside unless the clip passed."""
        if self.judgement is not Judgement.PASS:
            said = "not true" if self.judgement is Judgement.REFUSE else "cannot be judged"
            raise ClipSetAside(f"audit: geometry {said}: " + str(self).partition(": ")[2])
