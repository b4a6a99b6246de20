"""One pass over a video: the times of its frames, and its shots."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fw_pipeline.annotate.types import VideoSetAside
from fw_pipeline.annotate.video import decode

THUMBNAIL = 256  # long side of the frames that shots are detected on, pixels


@dataclass(frozen=True)
class Scan:
    """What one pass over a video finds."""

    times: np.ndarray  # [N] float64 seconds, ascending
    shots: tuple[tuple[int, int], ...]  # (first frame, one past the last) of every shot, in order, covering all frames
    height: int
    width: int


def scan(path: Path) -> Scan:
    """Times of all frames, and the shots. Raises VideoSetAside as `decode` does, or when frames change size or are none."""
    detector, times, sizes, looks = _ShotDetector(), [], set(), set()
    with closing(decode(path)) as frames:
        for frame in tqdm(frames, desc=path.name, unit=" frames", disable=None, leave=False, delay=5):
            sizes.add((frame.height, frame.width))
            if len(sizes) > 1:
                raise VideoSetAside(f"{path.name}: its frames change size at {frame.time:.2f} s; convert it to one size")
            looks.add(frame.look)
            if len(looks) > 1:
                raise VideoSetAside(
                    f"{path.name}: its frames change how they are to be shown at {frame.time:.2f} s; split it there"
                )
            times.append(frame.time)
            detector.add(frame.thumbnail(THUMBNAIL))
    if not times:
        raise VideoSetAside(f"{path.name}: no frame could be decoded")
    edges = [0, *detector.finish(), len(times)]
    (height, width) = sizes.pop()
    return Scan(np.array(times), tuple(pairwise(edges)), height, width)


class _ShotDetector:
    """PySceneDetect's AdaptiveDetector (robust to camera motion), fed frame by frame and counting frames, not time.

    It compares a frame with the `WINDOW` frames around it and so is blind at both ends; the first and the last frame are
    shown to it again to open its eyes there. Short shots are kept apart: merged ones would put a cut inside a clip.
    """

    WINDOW = 2

    def __init__(self) -> None:
        from scenedetect import AdaptiveDetector  # slow to import, and only needed where videos are cut

        self._detector = AdaptiveDetector(window_width=self.WINDOW, min_scene_len=1)
        self._shown = 0
        self._cuts: set[int] = set()
        self._last: np.ndarray | None = None

    def add(self, thumbnail: np.ndarray) -> None:
        for _ in range(1 if self._shown else 1 + self.WINDOW):
            self._show(thumbnail)
        self._last = thumbnail

    def finish(self) -> list[int]:
        """Index of the first frame of every shot but the first."""
        if self._last is not None:
            for _ in range(self.WINDOW):
                self._show(self._last)
        return sorted(self._cuts)

    def _show(self, thumbnail: np.ndarray) -> None:
        from scenedetect import FrameTimecode

        cuts = self._detector.process_frame(FrameTimecode(self._shown, fps=1.0), thumbnail)
        self._cuts |= {cut.frame_num - self.WINDOW for cut in cuts if cut.frame_num > self.WINDOW}
        self._shown += 1
