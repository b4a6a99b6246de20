"""Shots: made scenes, textured and moving, joined in the ways that films are."""

from itertools import pairwise

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fw_pipeline.annotate.shots import ShotDetector

HEIGHT, WIDTH, FPS = 144, 256, 24


def scene(seed: int, count: int, speed: float = 2.0, zoom: float = 0.0) -> list[np.ndarray]:
    """Frames [144, 256, 3] of a camera that pans over two layers, the nearer faster, and comes closer.

    All scenes have the same colours and the same statistics: what tells them apart is what they show.
    """
    rng = np.random.default_rng(seed)
    far, near = (_texture(rng, cell) for cell in (12, 7))
    holes = cv2.resize(rng.random((12, 24)), (2 * WIDTH * 2, HEIGHT * 2)) > 0.7
    angle = rng.uniform(0, 2 * np.pi)
    out = []
    for i in range(count):
        shift = speed * i * np.array([np.cos(angle), np.sin(angle)])
        a, b = (_view(layer, shift * near_by, 1 + zoom * i) for layer, near_by in ((far, 1.0), (near, 1.5)))
        mask = _view(holes.astype(np.float32), shift * 1.5, 1 + zoom * i) > 0.5
        out.append(np.where(mask[..., None], b, a).astype(np.uint8))
    return out


def _texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """Things with edges, of many sizes, one over another."""
    picture = np.full((HEIGHT * 2, WIDTH * 4, 3), 120, np.uint8)
    for _ in range(2500):
        corner = rng.integers(-size, (WIDTH * 4, HEIGHT * 2))
        other = corner + rng.integers(3, 3 * size, 2)
        cv2.rectangle(picture, corner.tolist(), other.tolist(), rng.integers(20, 235, 3).tolist(), -1)
    return cv2.GaussianBlur(picture, (3, 3), 0.8).astype(np.float32)


def _view(layer: np.ndarray, shift: np.ndarray, zoom: float) -> np.ndarray:
    x, y = np.array([WIDTH * 1.5, HEIGHT * 0.5]) + shift
    matrix = np.array([[1 / zoom, 0, x + WIDTH / 2 * (1 - 1 / zoom)], [0, 1 / zoom, y + HEIGHT / 2 * (1 - 1 / zoom)]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(layer, matrix, (WIDTH, HEIGHT), flags=flags, borderMode=cv2.BORDER_REFLECT)


def shots(frames, fps=FPS) -> tuple[tuple[int, int], ...]:
    detector = ShotDetector()
    for index, frame in enumerate(frames):
        detector.add(index / fps, frame)
    return detector.finish()


def mixed(before, after, weight) -> list[np.ndarray]:
    """Frames of a transition; `weight(share)` is that of the second scene, a number or an image [h, w, 1]."""
    shares = (np.arange(len(before)) + 1) / (len(before) + 1)
    return [((1 - weight(t)) * a + weight(t) * b).astype(np.uint8) for a, b, t in zip(before, after, shares, strict=True)]


def wipe(share: float) -> np.ndarray:
    return (np.arange(WIDTH) < share * WIDTH)[None, :, None] * np.ones((HEIGHT, 1, 1))


def no_shot_holds_two(found, start: int, end: int, faint: int = 0) -> bool:
    """Whether every shot is over by `start` or begins at `end`; `faint` frames of the transition may be left at its ends."""
    return all(last <= start + faint or first >= end - faint for first, last in found)


@given(st.integers(0, 10**6), st.floats(0, 6), st.sampled_from([-0.004, 0.0, 0.006]), st.sampled_from([24, 30, 60, 240]))
@settings(max_examples=8, deadline=None)
def test_a_moving_camera_is_one_shot(seed, speed, zoom, fps) -> None:
    assert shots(scene(seed, 48, speed * 24 / max(fps, 24), zoom), fps) == ((0, 48),)


@given(st.integers(0, 10**6), st.lists(st.integers(1, 20), min_size=2, max_size=5))
@settings(max_examples=8, deadline=None)
def test_every_cut_is_found_however_near_the_next_and_however_alike_the_sides(seed, lengths) -> None:
    frames = [frame for k, length in enumerate(lengths) for frame in scene(seed + k, length)]
    edges = np.cumsum([0, *lengths]).tolist()
    assert shots(frames) == tuple(pairwise(edges))


@pytest.mark.parametrize(
    "light", [lambda f: f * 2 + 90, lambda f: f * 0 + 255, lambda f: f * 1.5 + 40], ids=["lit", "white", "weak"]
)
@pytest.mark.parametrize("length", [1, 2])
def test_a_flash_does_not_cut(light, length) -> None:
    frames = scene(1, 48)
    for index in range(24, 24 + length):
        frames[index] = light(frames[index].astype(float)).clip(0, 255).astype(np.uint8)
    assert shots(frames) == ((0, 48),)


def test_a_foreign_frame_within_a_shot_is_no_flash() -> None:
    frames = scene(1, 48)
    frames[24] = scene(2, 1)[0]
    assert shots(frames) == ((0, 24), (24, 25), (25, 48))


def test_a_lamp_that_is_lit_does_not_cut() -> None:
    frames = scene(1, 48)
    assert shots([*frames[:24], *((frame * 0.45).astype(np.uint8) for frame in frames[24:])]) == ((0, 48),)


@pytest.mark.parametrize("weight", [lambda t: t, wipe], ids=["dissolve", "wipe"])
@pytest.mark.parametrize("length", [6, 12, 24])
def test_the_frames_of_a_dissolve_or_wipe_are_in_no_shot(length, weight) -> None:
    for seed in (10, 20):
        one, two = scene(seed, 40 + length), scene(seed + 1, length + 40, speed=1.0)
        frames = [*one[:40], *mixed(one[40:], two[:length], weight), *two[length:]]
        found = shots(frames)
        # The first and last eighth of a transition hold an eighth of the other scene at most.
        assert no_shot_holds_two(found, 40, 40 + length, faint=length // 8), found
        assert sum(last - first for first, last in found) >= 20  # a slow wipe costs much of its surroundings


@pytest.mark.parametrize("length", [4, 8, 16])
@pytest.mark.parametrize("black", [0, 12])
def test_a_fade_through_black_parts_the_scenes(length, black) -> None:
    one, two = scene(3, 40), scene(4, 40)
    ramp = np.arange(1, length + 1) / length
    out = [(frame * (1 - t)).astype(np.uint8) for frame, t in zip(one[-length:], ramp, strict=True)]
    up = [(frame * t).astype(np.uint8) for frame, t in zip(two[:length], ramp, strict=True)]
    middle = [np.zeros((HEIGHT, WIDTH, 3), np.uint8)] * black
    found = shots([*one[:-length], *out, *middle, *up, *two[length:]])
    found = [span for span in found if span[1] - span[0] > 2]  # two frames next to the darkest one are black themselves
    assert all(last <= 40 + black or first >= 40 for first, last in found), found


@pytest.mark.parametrize("fps", [30, 120])
def test_a_dissolve_lasts_seconds_not_frames(fps) -> None:
    length, run = fps // 2, 2 * fps
    slow = 48 / fps
    one, two = scene(5, run + length, slow), scene(6, run + length, slow)
    found = shots([*one[:run], *mixed(one[run:], two[:length], lambda t: t), *two[length:]], fps)
    assert no_shot_holds_two(found, run, run + length, faint=length // 8), found
    assert len(found) == 2
