"""The cameras and first depth of a video's clips, which have one lens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from fw_pipeline.annotate.audit.audit import audit
from fw_pipeline.annotate.clips import known_intrinsics
from fw_pipeline.annotate.quality import check_geometry
from fw_pipeline.annotate.types import Clip, ClipGeometry, ClipSetAside, GeometryEngine, Measured, SharedLensEngine


class WholeVideo:
    """Geometry clip by clip, with the lens from, in this order: a calibration beside the video, all its clips together (of an
    engine that can), the clip alone."""

    def __init__(self, engine: GeometryEngine, clips: Sequence[Clip], read: Callable[[Clip], np.ndarray]) -> None:
        """read: gives a clip's frames [T, h, w, 3] uint8 RGB; it may be asked twice, so that only one clip's are in memory."""
        self.engine = engine
        self.clips = clips
        self.read = read

    def accept(self, clip: Clip) -> tuple[ClipGeometry, Measured]:
        """Geometry that has passed its own checks and the audit.

        Raises ClipSetAside, with what was measured of the clip until then, when there is no geometry to be trusted.
        """
        frames, geometry, measured = self.estimate(clip)
        try:
            measured |= Measured(check_geometry(geometry))
            verdict = audit(frames, geometry)
            measured |= Measured(verdict.numbers)
            verdict.require()
        except ClipSetAside as reason:
            raise ClipSetAside(reason.message, reason.remedy, measured) from reason
        return geometry, measured

    def estimate(self, clip: Clip) -> tuple[np.ndarray, ClipGeometry, Measured]:
        """(frames [T, h, w, 3], what the engine makes of them, what it measured); nothing but the engine has judged it yet.

        Raises ClipSetAside, with what was measured of the clip, when the engine has no geometry.
        """
        engine = self.engine
        if not isinstance(engine, SharedLensEngine):
            frames = self.read(clip)
            return frames, engine.estimate(frames, known_intrinsics(clip, *frames.shape[1:3])), Measured()
        measured, solution = self._solved[clip.clip_id]
        try:
            if isinstance(solution, ClipSetAside):
                raise solution
            frames = self.read(clip)
            return frames, engine.finish(frames, solution), measured
        except ClipSetAside as reason:
            raise ClipSetAside(reason.message, reason.remedy, measured) from reason

    @cached_property
    def _solved(self) -> dict[str, tuple[Measured, Any]]:
        """Clip id -> what was measured, and its solution or the ClipSetAside it gets."""
        assert isinstance(self.engine, SharedLensEngine)
        found = {clip.clip_id: self._solve(self.engine, clip) for clip in self.clips}
        measured = {name: s.measured if isinstance(s, ClipSetAside) else self.engine.measured(s) for name, s in found.items()}
        open_lens = [c.clip_id for c in self.clips if c.lens is None and not isinstance(found[c.clip_id], ClipSetAside)]
        if open_lens:
            shared = self.engine.share_lens([found[name] for name in open_lens])
            for name, solution in zip(open_lens, shared, strict=True):
                found[name] = solution
                if not isinstance(solution, ClipSetAside):
                    measured[name] = self.engine.measured(solution)
        return {name: (measured[name], solution) for name, solution in found.items()}

    def _solve(self, engine: SharedLensEngine, clip: Clip) -> Any:
        frames = self.read(clip)
        try:
            return engine.solve(frames, known_intrinsics(clip, *frames.shape[1:3]))
        except ClipSetAside as reason:
            return reason
