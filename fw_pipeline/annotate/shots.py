"""One pass over a video: the times of its frames, and its shots."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fw_pipeline.annotate.blends import BlendDetector
from fw_pipeline.annotate.follow import kinship, levelled
from fw_pipeline.annotate.types import VideoSetAside
from fw_pipeline.annotate.video import decode

THUMBNAIL = 256  # long side of the frames that shots are detected on, pixels
# Agreement of neighbouring frames (see `kinship`): below OTHER they show two scenes whatever else is said; from SAME on one,
# though PySceneDetect sees a cut (a lamp that is lit). In between PySceneDetect decides.
OTHER, SAME = 0.35, 0.5
FLASH = 0.13  # seconds that a burst of light lasts at most: three frames of 24 a second
LIT = 0.25  # agreement of a frame in a flash with the one before it; above what two scenes give, 0.2
EMPTY = 10.0  # grey levels between a picture's darkest and brightest hundredth, below which it shows nothing: between fades


@dataclass(frozen=True)
class Scan:
    """What one pass over a video finds."""

    times: np.ndarray  # [N] float64 seconds, ascending
    shots: tuple[tuple[int, int], ...]  # (first frame, one past the last) of every shot, in order; transitions are in none
    height: int
    width: int


def scan(path: Path) -> Scan:
    """Times of all frames, and the shots.

    Raises VideoSetAside as `decode` does, or when frames change their size or how they are to be shown, or are none.
    """
    detector, times, sizes, looks = ShotDetector(), [], set(), set()
    with closing(decode(path)) as frames:
        for frame in tqdm(frames, desc=path.name, unit=" frames", disable=None, leave=False, delay=5):
            sizes.add((frame.height, frame.width))
            looks.add(frame.look)
            if len(sizes) > 1:
                raise VideoSetAside(f"{path.name}: its frames change size at {frame.time:.2f} s; convert it to one size")
            if len(looks) > 1:
                raise VideoSetAside(
                    f"{path.name}: its frames change how they are to be shown at {frame.time:.2f} s; split it there"
                )
            times.append(frame.time)
            detector.add(frame.time, frame.thumbnail(THUMBNAIL))
    if not times:
        raise VideoSetAside(f"{path.name}: no frame could be decoded")
    (height, width) = sizes.pop()
    return Scan(np.array(times), detector.finish(), height, width)


@dataclass
class _Break:
    """Neighbouring frames that show two scenes, or the beginning of a flash."""

    first: int  # index of the first frame after it
    time: float
    before: np.ndarray  # the levelled picture before it
    lit: bool  # every frame since may be the scene of before in a burst of light


class ShotDetector:
    """Shots of a stream of small BGR pictures, in memory that does not grow with their size.

    PySceneDetect proposes cuts; points followed from frame to frame confirm them, and find those it is blind to (between
    scenes of like colours, or one frame apart). What comes back within FLASH seconds was a flash. Slow transitions are
    `BlendDetector`'s, and their frames are in no shot.
    """

    def __init__(self) -> None:
        self._proposals = _Proposals()
        self._blends = BlendDetector()
        self._frames = 0
        self._cuts: set[int] = set()
        self._kinships: list[float] = []  # of each frame with the one before it; nan where nothing could be followed
        self._levelled: np.ndarray | None = None
        self._empty = False
        self._break: _Break | None = None
        self._flashes: set[int] = set()  # frames at which no shot begins: those of a flash and the one after it

    def add(self, time: float, thumbnail: np.ndarray) -> None:
        """The next frame: its time in seconds and its picture [h, w, 3] uint8 BGR."""
        index, now = self._frames, levelled(thumbnail)
        self._proposals.add(thumbnail)
        grey = thumbnail.mean(2)
        darkest, brightest = np.percentile(grey, (1, 99))
        empty = bool(brightest - darkest < EMPTY)
        kin = None if self._levelled is None else kinship(self._levelled, now)
        self._kinships.append(np.nan if kin is None else kin)
        if self._levelled is not None and (empty != self._empty or (kin is not None and kin < OTHER)):
            self._cuts.add(index)
            self._break = self._break or _Break(index, time, self._levelled, lit=True)
        if self._break is not None:
            self._resolve(self._break, index, time, now, white=bool((grey > 250).mean() > 0.5))
        if self._break is None:
            self._blends.add(index, time, now)
        self._frames, self._levelled, self._empty = index + 1, now, empty

    def _resolve(self, since: _Break, index: int, time: float, now: np.ndarray, white: bool) -> None:
        """Has the scene come back, or was it a cut?"""
        kin = kinship(since.before, now) or 0.0
        if index > since.first and kin >= SAME and since.lit:
            self._flashes |= set(range(since.first, index + 1))
            self._break = None
            return
        since.lit &= kin >= LIT or white
        if time - since.time > FLASH and index > since.first:
            self._break = None
            self._blends.restart()

    def finish(self) -> tuple[tuple[int, int], ...]:
        """(first frame, one past the last) of every shot."""
        for cut in self._proposals.finish():
            if not self._kinships[cut] >= SAME:
                self._cuts.add(cut)
        spans = [*pairwise([0, *sorted(self._cuts - self._flashes), self._frames])]
        for first, end in self._blends.spans(self._frames):
            spans = [part for span in spans for part in ((span[0], min(span[1], first)), (max(span[0], end), span[1]))]
            spans = [span for span in spans if span[0] < span[1]]
        return tuple(spans)


class _Proposals:
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
