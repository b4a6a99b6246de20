"""Points followed through a clip."""

import cv2
import numpy as np
import pytest

from fw_pipeline.annotate.tracks import Tracks, TrackSettings, follow
from tests.helpers.made_tracks import texture


def moved(picture: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    return np.asarray(cv2.warpAffine(picture, matrix, picture.shape[1::-1], flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT))


def shifting_clip(shift: tuple[float, float], frames: int = 9) -> np.ndarray:
    big = texture(240, 320, seed=3)
    at = [np.array([[1, 0, shift[0] * t], [0, 1, shift[1] * t]]) for t in range(frames)]
    return np.stack([moved(big, m)[20:220, 20:300] for m in at])


def test_points_follow_a_known_shift_to_a_tenth_of_a_pixel() -> None:
    shift = (1.3, -0.7)
    tracks = follow(shifting_clip(shift))
    assert len(tracks) > 150
    step = np.diff(tracks.xy, axis=1)[tracks.seen[:, 1:] & tracks.seen[:, :-1]] - shift
    assert np.median(np.linalg.norm(step, axis=1)) < 0.1


def test_a_pixel_has_its_centre_at_one_half() -> None:
    picture = np.full((120, 160, 3), 40, np.uint8)
    picture[59:62, 79:82] = 220  # symmetric about pixel row 60, column 80
    tracks = follow(np.stack([picture] * 5))
    off = np.linalg.norm(tracks.xy[:, 0] - (80.5, 60.5), axis=1)
    assert off.min() < 0.01


def test_the_picture_stays_covered_while_it_moves_out_of_sight() -> None:
    tracks = follow(shifting_clip((6.0, 0.0), frames=13))
    for t in range(tracks.frames):
        cells = np.unique((tracks.xy[tracks.seen[:, t], t] // 40).astype(int), axis=0)
        assert len(cells) > 0.8 * (200 // 40) * (280 // 40)


def test_what_is_not_seen_is_nan_and_frames_are_consecutive() -> None:
    tracks = follow(shifting_clip((5.0, 3.0)))
    assert np.array_equal(np.isfinite(tracks.xy).all(-1), tracks.seen)
    assert (np.abs(np.diff(tracks.seen.astype(int), axis=1)).sum(1) <= 2).all()
    assert tracks.length.min() >= TrackSettings().min_length


def test_following_twice_gives_the_same() -> None:
    clip = shifting_clip((2.0, 1.0), frames=6)
    a, b = follow(clip), follow(clip)
    np.testing.assert_array_equal(a.xy, b.xy)


def test_a_clip_without_texture_has_no_tracks() -> None:
    tracks = follow(np.full((6, 80, 100, 3), 90, np.uint8))
    assert len(tracks) == 0
    assert tracks.xy.shape == (0, 6, 2)


def test_helpers_choose_points_and_frames() -> None:
    xy = np.arange(24, dtype=np.float32).reshape(3, 4, 2)
    seen = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]], bool)
    tracks = Tracks(np.where(seen[..., None], xy, np.nan), seen, 30, 30)
    assert tracks.between(0, 1).tolist() == [0, 1]
    assert tracks.between(1, 2).tolist() == [1, 2]
    assert tracks.subset([1]).seen.tolist() == [[True] * 4]
    assert len(tracks.subset([])) == 0
    assert tracks.at([0, 3]).seen.tolist() == [[True, False], [True, True], [False, False]]


def test_points_on_masked_regions_are_left_out() -> None:
    tracks = follow(shifting_clip((0.0, 0.0), frames=5))
    mask = np.zeros((5, 200, 280), bool)
    mask[:, :, :140] = True
    left = tracks.without(mask)
    assert 0 < len(left) < len(tracks)
    assert np.nanmin(left.xy[..., 0]) >= 140
    with pytest.raises(ValueError, match="mask"):
        tracks.without(mask[:3])


def test_frames_of_another_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        follow(np.zeros((4, 20, 20, 3), np.float32))
