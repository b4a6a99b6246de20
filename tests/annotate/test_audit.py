"""The audit finds what is wrong with geometry, names it, and lets what is right through."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.bench_audit import FAULTS, Right, exact, made
from fw_pipeline.annotate.audit.audit import audit
from fw_pipeline.annotate.audit.verdict import Cause, Finding, Judgement, Verdict
from fw_pipeline.annotate.tracks import Tracks
from fw_pipeline.annotate.types import ClipGeometry, ClipSetAside
from fw_pipeline.demo.render import camera_at, cast
from fw_pipeline.demo.scenes import SCENES, Shot


@pytest.fixture(scope="module")
def rights() -> list[Right]:
    return list(made(2))


def test_true_geometry_passes_and_its_numbers_are_finite_floats(rights: list[Right]) -> None:
    verdict = audit(rights[0].tracks, rights[0].geometry)
    assert str(verdict) == "pass"
    verdict.require()
    assert verdict.numbers["audit_depth_scale"] == pytest.approx(1, abs=0.01)
    assert verdict.numbers["audit_path"] < 0.005
    assert all(type(value) is float and np.isfinite(value) for value in verdict.numbers.values())


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_refused_under_its_name(rights: list[Right], name: str) -> None:
    spoil, causes = FAULTS[name]
    verdict = audit(rights[0].tracks, spoil(rights[0].geometry, rights[1].geometry))
    assert verdict.judgement is Judgement.REFUSE
    assert verdict.cause in causes
    with pytest.raises(ClipSetAside, match="audit: geometry not true"):
        verdict.require()


def test_one_wrong_pose_is_found_whichever_frame_it_is(rights: list[Right]) -> None:
    """The first, the last, and the one that all points are seen from."""
    tracks, right = rights[0].tracks, rights[0].geometry
    for frame in (1, len(right.w2c) // 2, len(right.w2c) - 1):
        w2c = right.w2c.copy()
        w2c[frame, :, 3] += 0.1 * np.linalg.norm(np.ptp(w2c[:, :, 3], axis=0)) * np.array([0.6, 0.8, 0])
        verdict = audit(tracks, replace(right, w2c=w2c))
        assert verdict.cause is Cause.POSE
        assert f"frame {frame}" in str(verdict)


def test_a_lie_that_agrees_with_itself_is_found(rights: list[Right]) -> None:
    """Path, points and depth solved with a lens 1.35 times as long fit each other as well as the right ones do."""
    from fw_pipeline.annotate.bundle.solve import solve
    from fw_pipeline.annotate.trajectory import fill_poses

    tracks, right = rights[0].tracks, rights[0].geometry
    lens = right.intrinsics.copy()
    lens[:, [0, 1], [0, 1]] *= 1.35
    solution = solve(tracks, lens[0])
    assert solution.placed.all()
    w2c = fill_poses(dict(enumerate(solution.w2c)), tracks.frames)
    verdict = audit(tracks, replace(right, w2c=w2c, intrinsics=lens))
    assert verdict.cause is Cause.FOCAL
    assert verdict.numbers["audit_inside"] > 0.9  # by its own path and lens it looks well


def test_what_cannot_be_judged_does_not_pass(rights: list[Right]) -> None:
    tracks, right = rights[0].tracks, rights[0].geometry
    few = audit(tracks.subset(np.arange(20)), right)
    no_depth = audit(tracks, replace(right, depth=np.zeros_like(right.depth)))
    still = audit(tracks, replace(right, w2c=np.repeat(right.w2c[:1], len(right.w2c), 0)))
    assert (few.cause, no_depth.cause, still.cause) == (Cause.FEW_TRACKS, Cause.NO_DEPTH, Cause.NO_DEPTH)
    for verdict in (few, no_depth, still):
        assert verdict.judgement is Judgement.UNJUDGED
        with pytest.raises(ClipSetAside, match="cannot be judged"):
            verdict.require()


def test_a_path_given_to_a_camera_that_only_turns_does_not_pass() -> None:
    """The tracks of a turning camera fit a short path in front of a far scene as well as none."""
    shot = Shot("room", ((0, -1.5, 0.5),) * 3, ((-0.6, -1, 4.0), (0.6, -1, 4.0)), 13)
    tracks, geometry = points_of(shot)
    moved = geometry.w2c.copy()
    moved[:, 0, 3] += 1e-4 * np.linspace(0, 1, len(moved))
    assert audit(tracks, replace(geometry, w2c=moved)).judgement is not Judgement.PASS


def test_a_scene_that_moves_for_the_most_part_is_no_scene(rights: list[Right]) -> None:
    """Two thirds of the picture follow another camera: what the given one explains is the smaller part."""
    tracks, right = rights[0].tracks, rights[0].geometry
    born = tracks.xy[np.arange(len(tracks)), tracks.seen.argmax(1)]
    other = born[:, 0] > tracks.width / 3
    xy = tracks.xy.copy()
    xy[other] += (np.arange(tracks.frames)[:, None] * np.array([1.5, 2.5])).astype(np.float32)
    verdict = audit(replace(tracks, xy=xy), right)
    assert verdict.judgement is Judgement.REFUSE
    assert verdict.cause is Cause.FOREGROUND


@settings(max_examples=6, deadline=None)
@given(scale=st.floats(1e-3, 1e3), degrees=st.floats(-180, 180))
def test_neither_the_unit_nor_the_world_decides(scale: float, degrees: float) -> None:
    tracks, right = points_of(Shot("shelf", ((-0.6, -1.5, 0.6), (0, -1.4, 0.8), (0.6, -1.3, 0.8)), ((0, -1, 4), (0.2, -1, 4)), 9))
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    w2c = np.concatenate([right.w2c[:, :, :3] @ turn, right.w2c[:, :, 3:] * scale], -1)
    verdict = audit(tracks, replace(right, w2c=w2c, depth=(right.depth * scale).astype(np.float32)))
    assert str(verdict) == "pass"


def test_sizes_that_differ_and_values_that_are_not_finite_are_said(rights: list[Right]) -> None:
    tracks, right = rights[0].tracks, rights[0].geometry
    with pytest.raises(ValueError, match=r"depth is \["):
        audit(tracks, replace(right, depth=right.depth[:, 1:]))
    w2c = right.w2c.copy()
    w2c[3, 0, 0] = np.nan
    with pytest.raises(ValueError, match="w2c has values that are not finite"):
        audit(tracks, replace(right, w2c=w2c))


def test_what_is_wrong_is_told_before_what_could_not_be_judged() -> None:
    unknown, wrong = Finding(Cause.NO_DEPTH, "little parallax", judged=False), Finding(Cause.SCALE, "twice as deep")
    verdict = Verdict({}, [unknown, wrong])
    assert (verdict.judgement, verdict.cause) == (Judgement.REFUSE, Cause.SCALE)
    assert str(verdict).startswith("refuse: depth in another unit than the path: twice as deep")


def points_of(shot: Shot, count: int = 400) -> tuple[Tracks, ClipGeometry]:
    """Exact tracks of points on the first frame's surfaces, a tenth of a pixel of noise, and the truth of every frame."""
    scene = SCENES[shot.scene]()
    w2c = np.stack([camera_at(shot, t / (shot.frames - 1)) for t in range(shot.frames)])
    from fw_pipeline.demo.render import intrinsics_of

    k = intrinsics_of(shot)
    depth = np.stack([cast(scene, pose, k, shot.height, shot.width) for pose in w2c])
    geometry = exact(depth, w2c, shot)
    rng = np.random.default_rng(0)
    row, column = rng.integers(20, shot.height - 20, count), rng.integers(40, shot.width - 40, count)
    world = geometry.depth[0, row, column, None] * np.stack([column + 0.5, row + 0.5, np.ones(count)], -1) @ np.linalg.inv(k).T
    xy = np.full((count, shot.frames, 2), np.nan, np.float32)
    for t, pose in enumerate(geometry.w2c):
        camera = world @ pose[:, :3].T + pose[:, 3]
        xy[:, t] = (camera[:, :2] / camera[:, 2:] * k[[0, 1], [0, 1]] + k[:2, 2]) + rng.normal(0, 0.1, (count, 2))
        place = xy[:, t].astype(int).clip(0, [shot.width - 1, shot.height - 1])
        hidden = np.abs(geometry.depth[t, place[:, 1], place[:, 0]] / camera[:, 2] - 1) > 0.05
        out = (xy[:, t] < 0).any(1) | (xy[:, t] >= [shot.width, shot.height]).any(1)
        xy[hidden | out, t] = np.nan
    seen = np.isfinite(xy[..., 0])
    seen &= np.logical_and.accumulate(seen, axis=1)  # consecutive, from the first frame on
    return Tracks(np.where(seen[..., None], xy, np.nan), seen, shot.height, shot.width), geometry
