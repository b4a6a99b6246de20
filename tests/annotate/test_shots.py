"""No shot holds frames of two scenes, however one goes over into the other; a flash or a change of light cuts none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from fw_pipeline.annotate.shots import Scan, scan
from tests.helpers.made_videos import write

HEIGHT, WIDTH = 144, 256
FIRST, LENGTH = 45, 14  # the second scene begins to show at this frame, and is alone after so many
Mix = Callable[[np.ndarray, np.ndarray, float], np.ndarray]


def moving(seed: int, count: int = 75) -> np.ndarray:
    """[count, H, W, 3] uint8: a camera that pans over a picture with detail of many sizes."""
    rng = np.random.default_rng(seed)
    size = (WIDTH + 200, HEIGHT + 40)
    detail = [
        cv2.resize(rng.random((size[1] // cell, size[0] // cell, 3)), size, interpolation=cv2.INTER_CUBIC) for cell in (6, 14, 40)
    ]
    picture = (np.clip(np.mean(detail, 0), 0, 1) * 200 + 30).astype(np.uint8)
    side = seed % 2 * 2 - 1
    return np.stack([picture[10 : 10 + HEIGHT, 80 + side * t : 80 + side * t + WIDTH] for t in range(count)])


def gone_over(mix: Mix) -> np.ndarray:
    one, other = moving(1), moving(2)
    between = [mix(one[FIRST + i], other[i], (i + 1) / (LENGTH + 1)) for i in range(LENGTH)]
    return np.concatenate([one[:FIRST], np.array(between, np.uint8), other[LENGTH:]])


def blank(value: int) -> Mix:
    return lambda a, b, w: a * (1 - 2 * w) + 2 * w * value if w < 0.5 else b * (2 * w - 1) + (2 - 2 * w) * value


def mask(form: np.ndarray) -> Mix:
    return lambda a, b, w: np.where((form < w)[..., None], b, a)


ROWS, COLUMNS = np.mgrid[:HEIGHT, :WIDTH] / np.array([HEIGHT, WIDTH])[:, None, None]
MIXES: dict[str, Mix] = {
    "dissolve": lambda a, b, w: a * (1 - w) + b * w,
    "through black": blank(0),
    "through white": blank(255),
    "wipe from the left": mask(COLUMNS),
    "wipe from a corner": mask((ROWS + COLUMNS) / 2),
    "iris": mask(np.hypot(ROWS - 0.5, COLUMNS - 0.5) / np.hypot(0.5, 0.5)),
}


def shots(path: Path, frames: np.ndarray) -> Scan:
    return scan(write(path / "made.mp4", list(frames)))


@pytest.mark.parametrize("name", MIXES)
def test_frames_of_two_scenes_are_in_no_shot(tmp_path: Path, name: str) -> None:
    found = shots(tmp_path, gone_over(MIXES[name]))
    # A frame with less than a tenth of the other scene is not told from a pure one.
    mixed = set(range(FIRST + LENGTH // 8, FIRST + LENGTH - LENGTH // 8))
    assert not mixed & {frame for first, end in found.shots for frame in range(first, end)}
    assert not any(first < FIRST and end > FIRST + LENGTH for first, end in found.shots)
    assert found.shots[0][0] == 0
    assert found.shots[0][1] > FIRST - 25  # what is before it is kept, but for a margin
    assert found.shots[-1][1] == len(found.times)


@pytest.mark.parametrize("length", [1, 2])
def test_a_flash_cuts_no_shot(tmp_path: Path, length: int) -> None:
    frames = moving(3)
    frames[40 : 40 + length] = np.clip(frames[40 : 40 + length].astype(int) * 2 + 90, 0, 255)
    assert shots(tmp_path, frames).shots == ((0, len(frames)),)


def test_a_light_that_is_switched_cuts_no_shot(tmp_path: Path) -> None:
    frames = moving(3)
    frames[40:] //= 2
    assert shots(tmp_path, frames).shots == ((0, len(frames)),)


def test_one_frame_of_another_scene_is_in_no_shot_with_its_neighbours(tmp_path: Path) -> None:
    frames = moving(3)
    frames[40] = moving(4)[0]
    assert shots(tmp_path, frames).shots == ((0, 40), (40, 41), (41, len(frames)))


def test_a_cut_is_placed_to_the_frame(tmp_path: Path) -> None:
    assert shots(tmp_path, np.concatenate([moving(1)[:33], moving(2)[:40]])).shots == ((0, 33), (33, 73))


def test_a_camera_that_turns_away_quickly_cuts_nothing(tmp_path: Path) -> None:
    wide = np.concatenate([moving(5)[0], moving(6)[0], moving(7)[0]], 1)
    frames = np.stack([wide[:, 8 * t : 8 * t + WIDTH] for t in range(60)])
    assert shots(tmp_path, frames).shots == ((0, 60),)
