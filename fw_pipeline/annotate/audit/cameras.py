"""Whether poses and lens are the ones that the tracks tell of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from fw_model.metrics import ate, auc, relative_pose_errors
from fw_pipeline.annotate.audit import epipolar
from fw_pipeline.annotate.audit.verdict import Cause, Finding
from fw_pipeline.annotate.audit.witness import Witness, per_frame, poses
from fw_pipeline.annotate.bundle.adjust import Free, adjust, residuals
from fw_pipeline.annotate.bundle.certainty import compare, refocused
from fw_pipeline.annotate.bundle.solve import REVERSED
from fw_pipeline.annotate.bundle.starts import depth_agreement
from fw_pipeline.annotate.bundle.state import State, stack
from fw_pipeline.annotate.motion_kind import NO_DEPTH, motion_kind, motion_numbers

# Fewer, and cameras of a background behind something that moves may be those of the thing, or the other way round.
MIN_INSIDE = 0.5
# A path is refused when the tracks' own is further from it than this and they clearly agree on that. True paths of real videos,
# known from longer clips and larger pictures, were up to 1 % away from what tracks say.
MAX_PATH, MAX_TURN = 0.03, 0.5  # of the path; degrees
CLEAR_RATIO, CLEAR_Z = 1.15, 2.5  # of costs, and deviations by which parts of the picture agree
# A frame's pose is wrong when the other frames' points, which it shows, ask for another one.
FRAME_RATIO, FRAME_PIXELS = 2.5, 0.4
# A lens wrong by x bends paths and depths by about x.
MAX_FOCAL, FOCAL_RATIO = 0.06, 1.03
STARTS = (0.75, 1.0, 1.33)  # focal lengths, times the given one, from which the tracks' own is looked for
MIN_MIRROR = 1.2  # as the engine's own bar


@dataclass(frozen=True)
class CameraReport:
    numbers: dict[str, float]
    findings: list[Finding]


def judge_cameras(whole: Witness, few: Witness, w2c: np.ndarray, intrinsics: np.ndarray) -> CameraReport:
    """whole: all frames; few: the same clip in some of them, where every unknown is solved anew.

    w2c [T, 3, 4] and intrinsics [T, 3, 3] of all frames.
    """
    rays = epipolar.Rays.of(whole.tracks, intrinsics)
    numbers = {}
    for name, gap in epipolar.gaps(len(w2c)).items():
        if len(found := epipolar.sampson(rays, w2c, gap)):
            numbers[f"sampson_{name}"] = float(np.median(found))
    numbers["inside"] = float(whole.inside.mean())
    frames = list(_single_frames(whole, numbers))
    path = list(_path(whole, few, w2c, intrinsics, numbers))
    lens = [] if path else list(_lens(few, numbers))
    # Another reading of all cameras says more than the frames that suffer most from the wrong one; "not this path" says less.
    vague = all(finding.cause in (Cause.PATH, Cause.FOREGROUND) for finding in path)
    findings = lens + frames + path if vague else path + frames
    return CameraReport(numbers, findings or list(_motion(few, numbers)))


def _single_frames(whole: Witness, numbers: dict[str, float]) -> Iterator[Finding]:
    """Every frame posed anew on the points as the given cameras have them, which one wrong frame among many does not bend."""
    before = whole.frame_error
    obs = replace(whole.observations, reference=int(np.nanargmin(before)))  # stays; the middle one may be the wrong one
    free = Free(points=False, lens=0)
    near = adjust(obs, whole.given, free, 8 * whole.scale, steps=6, tolerance=1e-3).state
    reposed = adjust(obs, near, free, whole.scale, steps=6, tolerance=1e-3).state
    after = per_frame(obs, np.sqrt((residuals(obs, reposed)[0] ** 2).sum(-1)))
    off = before - after
    numbers["frame_error"] = float(np.nanmax(before))
    wrong = np.flatnonzero((off > FRAME_PIXELS * whole.size) & (before > FRAME_RATIO * np.maximum(after, 1e-6)))
    numbers["frames_wrong"] = float(len(wrong))
    if 0 < len(wrong) <= 0.3 * obs.frames and whole.inside.mean() >= MIN_INSIDE:
        t = int(wrong[np.argmax(off[wrong])])
        yield Finding(
            Cause.POSE,
            f"{_frames(wrong)}: points of the other frames lie {before[t]:.1f} px from where frame {t} shows them, and "
            f"{after[t]:.1f} px with a pose of its own",
        )


def _path(whole: Witness, few: Witness, w2c: np.ndarray, intrinsics: np.ndarray, numbers: dict[str, float]) -> Iterator[Finding]:
    """The cameras that the tracks would rather have with this lens, found from the given ones."""
    given, refined = poses(few.given), poses(few.refined)
    ratio, z = compare(few.observations, few.refined, few.given, few.block, few.scale)
    rotation, translation = relative_pose_errors(given, refined)
    numbers |= {"path": ate(given, refined), "turn": float(rotation.mean()), "path_ratio": ratio, "path_z": z}
    numbers["pose_auc"] = auc(rotation, translation, 5)
    inside = numbers["inside"]
    elsewhere = numbers["path"] > MAX_PATH or numbers["turn"] > MAX_TURN
    if inside >= MIN_INSIDE and not (elsewhere and ratio > CLEAR_RATIO and z > CLEAR_Z):
        return
    cause, words = epipolar.likely_cause(whole.tracks, w2c, intrinsics, whole.size)
    share = f"the cameras explain {inside:.0%} of what the tracks show (at least {MIN_INSIDE:.0%})"
    if inside >= MIN_INSIDE:
        share = (
            f"tracks tell of a path {100 * numbers['path']:.1f} % and {numbers['turn']:.2f} degrees away "
            f"(error {ratio:.2f} times as large as it need be)"
        )
    elif cause is Cause.PATH and _in_one_place(whole):
        cause, words = Cause.FOREGROUND, "what they explain lies together, the rest of the picture moves otherwise"
    yield Finding(cause, f"{share}: {words}")


def _in_one_place(whole: Witness) -> bool:
    """The parts of the picture are either explained well or not at all."""
    block = whole.block[whole.observations.point]
    count = np.bincount(block)
    share = np.bincount(block, whole.inside)[count >= 20] / count[count >= 20]
    return len(share) > 3 and float(((share > 0.8) | (share < 0.2)).mean()) > 0.6 and float((share > 0.8).mean()) > 0.1


def _lens(few: Witness, numbers: dict[str, float]) -> Iterator[Finding]:
    """The focal length that the tracks would rather have, with everything else free."""
    free = Free(lens=1, front=True)
    starts = stack([refocused(few.refined, np.array([factor])) for factor in STARTS])
    found = adjust(few.observations, starts, free, few.scale, steps=20, tolerance=1e-4)
    best = found.state.take([int(np.argmin(found.cost))])
    change = float(best.log_focal[0, 0])
    ratio, z = compare(few.observations, best, few.refined, few.block, few.scale)
    numbers |= {"focal_change": float(np.expm1(np.clip(change, -2, 2))), "focal_ratio": ratio, "focal_z": z}
    if abs(change) > MAX_FOCAL and ratio > FOCAL_RATIO and z > CLEAR_Z:
        yield Finding(
            Cause.FOCAL,
            f"a focal length {np.exp(change):.2f} times as long fits better (error {ratio:.2f} times as large without it; parts "
            f"of the picture agree by {z:.1f} deviations)",
        )


def _motion(few: Witness, numbers: dict[str, float]) -> Iterator[Finding]:
    """Whether the motion shows depth at all, and which way round."""
    cost = few.cost(few.refined)
    motion = motion_numbers(few.tracks, few.observations, few.refined, cost, few.scale)
    kind = motion_kind(motion)
    numbers |= {"turning_ratio": motion.turning_ratio, "still": motion.still}
    if kind in NO_DEPTH:
        yield Finding(
            Cause.NO_DEPTH,
            f"{kind}: a camera that does not move from its place leaves {motion.turning_ratio:.2f} times the error that depth "
            f"leaves (below 2 is noise), and {motion.still:.0%} of the picture rests",
            judged=False,
        )
        return
    mirror = _mirrored(few)
    if depth_agreement(mirror.inverse[0], few.refined.inverse[0]) >= REVERSED:
        return  # it turned back into the same scene: there is no other
    worse, z = compare(few.observations, few.refined, mirror, few.block, few.scale)
    numbers |= {"mirror_ratio": worse, "mirror_z": z}
    if worse < 1 / MIN_MIRROR and z < -CLEAR_Z:
        yield Finding(Cause.MIRRORED, f"the scene with its depth reversed leaves {1 / worse:.2f} times less error")
    elif worse < MIN_MIRROR or z < 2:
        yield Finding(
            Cause.NO_DEPTH,
            f"a scene with its depth reversed fits nearly as well (error {worse:.2f} times as large, at least {MIN_MIRROR:g}; "
            f"parts of the picture agree by {z:.1f} deviations)",
            judged=False,
        )


def _mirrored(few: Witness) -> State:
    """The best solution from the other side."""
    free = Free(lens=0, front=True)
    start = few.refined.mirrored().scaled()
    first = adjust(few.observations, start, free, 3 * few.scale, steps=8, tolerance=1e-3).state
    return adjust(few.observations, first, free, few.scale, steps=12, tolerance=1e-3).state


def _frames(wrong: np.ndarray) -> str:
    few = ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
    return f"frame {few}" if len(wrong) == 1 else f"frames {few}"
