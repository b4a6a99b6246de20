"""One pass over a video: the times of its frames, and its shots.

Cuts are found by PySceneDetect and believed where no points live on behind them: a flash or a change of light is none.
Dissolves, fades and wipes are found by `transitions`; their frames belong to no shot.
"""

from __future__ import annotations

from collections import deque
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from fw_pipeline.annotate.transitions import Transitions, survive
from fw_pipeline.annotate.types import VideoSetAside
from fw_pipeline.annotate.video import decode

SHOTS_VERSION = 2  # raise when other shots are found in the same frames
THUMBNAIL = 256  # long side of the frames that shots are detected on, pixels


@dataclass(frozen=True)
class Scan:
    """What one pass over a video finds."""

    times: np.ndarray  # [N] float64 seconds, ascending
    shots: tuple[tuple[int, int], ...]  # (first frame, one past the last) of every shot, in order; between them transitions
    height: int
    width: int


def scan(path: Path) -> Scan:
    """Times of all frames, and the shots. Raises VideoSetAside as `decode` does, or when frames change size or are none."""
    cuts, transitions, times, sizes, looks = _Cuts(), Transitions(), [], set(), set()
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
            thumbnail = frame.thumbnail(THUMBNAIL)
            transitions.add(len(times) - 1, frame.time, thumbnail)
            for cut in cuts.add(thumbnail):
                transitions.border(cut)
    if not times:
        raise VideoSetAside(f"{path.name}: no frame could be decoded")
    for cut in cuts.finish():
        transitions.border(cut)
    transitions.border(len(times))
    (height, width) = sizes.pop()
    return Scan(np.array(times), _shots(len(times), cuts.found, transitions.found), height, width)


def _shots(count: int, cuts: list[int], transitions: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Runs of frames without a cut, given as the first frame behind it, or a frame strictly inside a transition."""
    whole = np.ones(count, bool)
    for before, after in transitions:
        whole[before + 1 : after] = False
    starts = whole & ~np.concatenate([[False], whole[:-1]])
    starts[[after for _, after in transitions if whole[after]] + [cut for cut in cuts if whole[cut]]] = True
    spans = []
    for start in np.flatnonzero(starts):
        stops = np.flatnonzero(~whole[start + 1 :] | starts[start + 1 :])
        spans.append((int(start), int(start + 1 + stops[0]) if len(stops) else count))
    return tuple(spans)


class _Cuts:
    """PySceneDetect's AdaptiveDetector (robust to camera motion), fed frame by frame and counting frames, not time.

    It compares a frame with the `WINDOW` frames around it and so is blind at both ends; the first and the last frame are
    shown to it again to open its eyes there. Short shots are kept apart: merged ones would put a cut inside a clip.
    """

    WINDOW = 2
    FLASH = 2  # frames that a flash may last

    def __init__(self) -> None:
        from scenedetect import AdaptiveDetector  # slow to import, and only needed where videos are cut

        self.found: list[int] = []  # first frame of every shot but the first
        self._detector = AdaptiveDetector(window_width=self.WINDOW, min_scene_len=1)
        self._shown = 0
        self._frames = 0
        self._pending: list[int] = []
        self._grey: deque[np.ndarray] = deque(maxlen=2 * self.FLASH + self.WINDOW + 2)  # the last frames
        self._last: np.ndarray | None = None

    def add(self, thumbnail: np.ndarray) -> list[int]:
        """The cuts that are certain now."""
        self._grey.append(cv2.cvtColor(thumbnail, cv2.COLOR_BGR2GRAY))
        self._frames += 1
        for _ in range(1 if self._shown else 1 + self.WINDOW):
            self._show(thumbnail)
        self._last = thumbnail
        certain = self._certain(self._frames - self.FLASH)
        if len(self._grey) > 2 and _is_of_another_scene(*list(self._grey)[-3:]):
            alone = [self._frames - 2, self._frames - 1]
            self.found += alone
            certain += alone
        return certain

    def finish(self) -> list[int]:
        """The cuts that are left."""
        if self._last is not None:
            for _ in range(self.WINDOW):
                self._show(self._last)
        return self._certain(self._frames)

    def _show(self, thumbnail: np.ndarray) -> None:
        from scenedetect import FrameTimecode

        cuts = self._detector.process_frame(FrameTimecode(self._shown, fps=1.0), thumbnail)
        self._pending += [cut.frame_num - self.WINDOW for cut in cuts if cut.frame_num > self.WINDOW]
        self._shown += 1

    def _certain(self, until: int) -> list[int]:
        ready = sorted(cut for cut in set(self._pending) if cut < until)
        self._pending = [cut for cut in self._pending if cut >= until]
        certain = [cut for cut in ready if not self._one_scene(cut)]
        self.found += certain
        return certain

    def _one_scene(self, cut: int) -> bool:
        """Whether the scene goes on behind a cut, at once or after a flash."""
        first = self._frames - len(self._grey)
        grey = dict(enumerate(self._grey, first))
        for length in range(self.FLASH + 1):
            for start in range(cut - length, cut + 1):
                before, after = grey.get(start - 1), grey.get(start + length)
                between = [grey[index] for index in range(start, start + length) if index in grey]
                if before is None or after is None or not survive(before, after):
                    continue
                if all(_same_lit_differently(picture, before) for picture in between):
                    return True
        return False


def _is_of_another_scene(before: np.ndarray, picture: np.ndarray, after: np.ndarray) -> bool:
    """Whether a single frame is unlike the two around it, which are alike: a window around it sees no cut."""
    strange = not _same_lit_differently(picture, before) and not _same_lit_differently(picture, after)
    return strange and survive(before, after)


def _same_lit_differently(picture: np.ndarray, other: np.ndarray) -> bool:
    """Whether a picture is blown out or dark, or has its light and dark where the other has: another scene's frame has not."""
    a, b = (cv2.resize(p, (24, 24), interpolation=cv2.INTER_AREA).astype(np.float64).ravel() for p in (picture, other))
    return bool(a.std() < 12 or b.std() < 1e-6 or np.corrcoef(a, b)[0, 1] > 0.4)
