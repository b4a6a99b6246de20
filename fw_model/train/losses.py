"""Losses of the geometry branch, and the total that is minimised; the video branch's is in `fw_model.train.flow`.

All losses are computed in float32 (or wider, when the inputs are), whatever the autocast state. Each is the mean over the
clips of a batch of that clip's own masked mean, so that gradient accumulation over micro-batches of equal size gives the
loss of the whole batch; a clip whose mask is empty adds 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fw_model.cameras import encode_pose, unproject
from fw_model.config import Dynamic
from fw_model.data.schema import Batch

STILL_SHARE = 0.05  # temporal gradients are matched where the target moves less than this share of its clip's range
RANGE = (0.02, 0.98)  # of a clip's depths, in quantiles: with the extremes one far pixel would make everything still
CONFIDENCE_REWARD = 0.2  # weight of -log(conf) in the depth and point losses
ITERATION_DECAY = 0.6  # the camera head's last refinement weighs 1, the one before 0.6, ...
CAMERA_PARTS = {"translation": (slice(0, 3), 1.0), "rotation": (slice(3, 7), 1.0), "fov": (slice(7, 9), 0.5)}  # VGGT's weights
FRAMES_AT_ONCE = 8  # of the dense losses, whose intermediate results are the largest of all losses
QUANTILE_PIXELS = 2**18  # a clip's quantiles are read from every k-th pixel; their standard error is below 0.1 % of the rank


@dataclass(frozen=True)
class Targets:
    """What the geometry branch should give, in clip units. B clips, T frames."""

    depth: Tensor  # [B, T, H, W]
    valid: Tensor  # [B, T, H, W] bool
    points: Tensor  # [B, T, H, W, 3] in the frame of the first camera
    pose_encoding: Tensor  # [B, T, 9]


class GeometryOutput(Protocol):
    """The part of the model's output that the geometry losses read."""

    @property
    def depth(self) -> Tensor: ...  # [B, T, H, W]

    @property
    def depth_conf(self) -> Tensor: ...  # [B, T, H, W], > 0

    @property
    def points(self) -> Tensor: ...  # [B, T, H, W, 3]

    @property
    def points_conf(self) -> Tensor: ...  # [B, T, H, W], > 0

    @property
    def pose_encodings(self) -> list[Tensor]: ...  # one [B, T, 9] per refinement iteration


def make_targets(batch: Batch, dynamic: Dynamic = "keep") -> Targets:
    """Targets of a batch, on its device. Nothing is rescaled: a packed clip is in clip units already.

    `dynamic`: "exclude" makes the pixels of things that move of themselves invalid, where the dataset knows them.
    """
    height, width = batch.depth.shape[-2:]
    valid = batch.valid
    if dynamic == "exclude" and batch.dynamic is not None:
        valid = valid & ~batch.dynamic
    return Targets(
        depth=batch.depth,
        valid=valid,
        points=unproject(batch.depth, batch.intrinsics, batch.w2c),
        pose_encoding=encode_pose(batch.w2c, batch.intrinsics, height, width),
    )


def geometry_losses(output: GeometryOutput, targets: Targets, quantile: float = 1.0) -> dict[str, Tensor]:
    """The three geometry losses, each a scalar, unweighted, and what they are made of.

    `depth_loss`, `point_loss`, `camera_loss`; `depth_error`, the training guide's depth loss, which knows no confidence;
    `camera_translation`, `camera_rotation`, `camera_fov`, of the last refinement.

    Args:
        output: of the model.
        targets: of the same clips.
        quantile: depth and point errors above this quantile of their clip are left out of the first two; 1 leaves out none.

    Raises ValueError when a prediction's shape is not its target's.
    """
    for name, predicted, target in (
        ("depth", output.depth, targets.depth),
        ("depth_conf", output.depth_conf, targets.depth),
        ("points", output.points, targets.points),
        ("points_conf", output.points_conf, targets.depth),
        *((f"pose_encodings[{k}]", pose, targets.pose_encoding) for k, pose in enumerate(output.pose_encodings)),
    ):
        if predicted.shape != target.shape:
            raise ValueError(f"{name}: predicted {list(predicted.shape)} but the target is {list(target.shape)}")
    with torch.autocast(targets.depth.device.type, enabled=False):
        parts = camera_errors(output.pose_encodings[-1], targets.pose_encoding)
        return {
            "depth_loss": depth_loss(output.depth, output.depth_conf, targets.depth, targets.valid, quantile),
            "point_loss": point_loss(output.points, output.points_conf, targets.points, targets.valid, quantile),
            "camera_loss": camera_loss(output.pose_encodings, targets.pose_encoding),
            "depth_error": depth_error(output.depth.detach(), targets.depth, targets.valid),
            **{f"camera_{name}": error.detach() for name, error in parts.items()},
        }


def total_loss(losses: dict[str, Tensor], camera_weight: float = 3.0, geometry_weight: float = 1.0) -> Tensor:
    """What is minimised: L_geo = depth + point + camera_weight * camera, or `diffusion_loss` + geometry_weight * L_geo."""
    geometry = losses["depth_loss"] + losses["point_loss"] + camera_weight * losses["camera_loss"]
    return losses["diffusion_loss"] + geometry_weight * geometry if "diffusion_loss" in losses else geometry


def depth_loss(predicted: Tensor, confidence: Tensor, target: Tensor, valid: Tensor, quantile: float = 1.0) -> Tensor:
    """Temporal gradient matching plus conf * |p - d| + conf * |grad p - grad d| - 0.2 log conf. All [B, T, H, W]; a scalar.

    Both are scale-sensitive, no frame is aligned. Temporal: see `depth_error`. The rest: see `point_loss`.
    """
    still = _still(target, valid)
    change = _recomputed(_change_sums, predicted, target, valid, still)
    dense = _dense_loss(predicted[..., None], confidence, target[..., None], valid, quantile)
    return _clip_means(change, still) + dense


def depth_error(predicted: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """The training guide's depth loss: per-frame L1 plus temporal gradient matching, without confidence. All [B, T, H, W].

    Temporal: | (p[t+1] - p[t]) - (d[t+1] - d[t]) | over pixels valid in both frames where |d[t+1] - d[t]| is below
    `STILL_SHARE` of the clip's range of valid depths: elsewhere the pixel shows another surface and depth may jump.
    L1: |p - d| over valid pixels. Returns a scalar.
    """
    still = _still(target, valid)
    level = _sum(torch.where(valid, wide(predicted) - wide(target), 0.0).abs())[:, None]
    return _clip_means(level, valid) + _clip_means(_change_sums(predicted, target, valid, still), still)


def _still(target: Tensor, valid: Tensor) -> Tensor:
    """Where the target hardly moves from a frame to the next, [B, T-1, H, W] bool."""
    target = wide(target)
    low, high = _quantiles(target, valid, RANGE)
    limit = (STILL_SHARE * (high - low)).view(-1, 1, 1, 1)  # NaN for an empty mask: nothing is still
    return valid[:, 1:] & valid[:, :-1] & ((target[:, 1:] - target[:, :-1]).abs() < limit)


def _change_sums(predicted: Tensor, target: Tensor, valid: Tensor, still: Tensor) -> Tensor:
    """Per clip the sum of the temporal term, [B, 1]."""
    residual = torch.where(valid, wide(predicted) - wide(target), 0.0)
    return _sum(torch.where(still, (residual[:, 1:] - residual[:, :-1]).abs(), 0.0))[:, None]


def point_loss(predicted: Tensor, confidence: Tensor, target: Tensor, valid: Tensor, quantile: float = 1.0) -> Tensor:
    """conf * |P - G| + conf * |grad P - grad G| - 0.2 log conf; points [B, T, H, W, 3], the others [B, T, H, W].

    |.| is the Euclidean length of the 3-vector. The first and last term are averaged over valid pixels; the gradients are
    differences of horizontal and of vertical neighbours, weighted by the confidence of the left or upper one, averaged
    over pairs whose two pixels are valid and summed over the two directions. Pixels whose error is above this quantile of
    their clip count as invalid (VGGT: 0.98). Returns a scalar.
    """
    return _dense_loss(predicted, confidence, target, valid, quantile)


def _dense_loss(predicted: Tensor, confidence: Tensor, target: Tensor, valid: Tensor, quantile: float) -> Tensor:
    """`point_loss` of vectors [B, T, H, W, C]."""
    if quantile < 1:
        valid = _without_largest(predicted, target, valid, quantile)
    pieces = zip(*(x.split(FRAMES_AT_ONCE, dim=1) for x in (predicted, confidence, target, valid)), strict=True)
    sums = torch.stack([_recomputed(_dense_sums, *piece) for piece in pieces]).sum(0)
    return _clip_means(sums, valid, _both_valid(valid, 2), _both_valid(valid, 3))


@torch.no_grad()
def _without_largest(predicted: Tensor, target: Tensor, valid: Tensor, quantile: float) -> Tensor:
    """`valid` without the pixels of the largest errors; one that is not finite stays, so that the step is seen to be broken."""
    pieces = zip(predicted.split(FRAMES_AT_ONCE, dim=1), target.split(FRAMES_AT_ONCE, dim=1), strict=True)
    error = torch.cat([_length(wide(p) - wide(t)) for p, t in pieces], dim=1)
    (limit,) = _quantiles(error, valid, (quantile,))
    return valid & ~((error > limit.view(-1, 1, 1, 1)) & error.isfinite())


def _dense_sums(predicted: Tensor, confidence: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Per clip the sums of the three terms of `point_loss` (values, vertical and horizontal gradients), [B, 3]."""
    confidence = torch.where(valid, wide(confidence), 1.0)
    residual = torch.where(valid[..., None], wide(predicted) - wide(target), 0.0)
    sums = [_sum(torch.where(valid, confidence * _length(residual) - CONFIDENCE_REWARD * confidence.log(), 0.0))]
    for axis in (2, 3):
        count = valid.shape[axis] - 1
        slope = residual.narrow(axis, 1, count) - residual.narrow(axis, 0, count)
        weighted = confidence.narrow(axis, 0, count) * _length(slope)
        sums.append(_sum(torch.where(_both_valid(valid, axis), weighted, 0.0)))
    return torch.stack(sums, dim=1)


def _both_valid(valid: Tensor, axis: int) -> Tensor:
    """Where a pixel and its next along `axis` are valid; shorter by one there."""
    count = valid.shape[axis] - 1
    return valid.narrow(axis, 0, count) & valid.narrow(axis, 1, count)


def camera_loss(predicted: list[Tensor], target: Tensor) -> Tensor:
    """L1 on the 9-D pose encoding, summed over K iterations with 0.6^(K-1-k).

    Of each iteration: the means over frames and components of translation, of rotation and half of the field of view's, as in
    VGGT. (Huber at delta 1 is squared error at these sizes: 5 degrees and 10 % of translation cost 0.0005.)

    predicted: K tensors [B, T, 9], first iteration first; target [B, T, 9] with canonical quaternions. Returns a scalar.
    """
    total = target.new_zeros((), dtype=wide(target).dtype)
    for k, encoding in enumerate(predicted):
        errors = camera_errors(encoding, target)
        cost = sum((weight * errors[name] for name, (_, weight) in CAMERA_PARTS.items()), start=torch.zeros_like(total))
        total = total + ITERATION_DECAY ** (len(predicted) - 1 - k) * cost
    return total


def camera_errors(encoding: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Mean absolute errors of [B, T, 9] encodings: `translation`, `rotation` (of the quaternion), `fov`; scalars.

    q and -q are the same rotation, so each predicted quaternion is taken with the sign nearer to its target.
    """
    encoding, target = wide(encoding), wide(target)
    quaternion = encoding[..., 3:7]
    agrees = (quaternion.detach() * target[..., 3:7]).sum(-1, keepdim=True) >= 0
    encoding = torch.cat([encoding[..., :3], torch.where(agrees, quaternion, -quaternion), encoding[..., 7:]], dim=-1)
    return {name: F.l1_loss(encoding[..., part], target[..., part]) for name, (part, _) in CAMERA_PARTS.items()}


@torch.no_grad()
def rotation_degrees(encoding: Tensor, target: Tensor) -> Tensor:
    """Mean angle between the rotations of two encodings [B, T, 9]; a scalar. Exact near 0, unlike an arccos."""
    a, b = (F.normalize(wide(x)[..., 3:7], dim=-1) for x in (encoding, target))
    b = torch.where((a * b).sum(-1, keepdim=True) >= 0, b, -b)
    return torch.rad2deg(4 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1))).mean()


@torch.no_grad()
def _quantiles(values: Tensor, mask: Tensor, shares: tuple[float, ...]) -> tuple[Tensor, ...]:
    """Of each clip's masked values [B, ...], one [B] per share, by nearest rank; infinite where a mask is empty.

    Read from about `QUANTILE_PIXELS` pixels: an odd step does not fall on the same columns of every row.
    """
    step = max(1, values[0].numel() // QUANTILE_PIXELS) | 1
    values, mask = values.flatten(1)[:, ::step], mask.flatten(1)[:, ::step]
    ordered = torch.where(mask, values, torch.inf).sort(dim=1).values
    last = (mask.sum(1) - 1).clamp(min=0)
    return tuple(ordered.gather(1, (share * last).round().long()[:, None])[:, 0] for share in shares)


def wide(x: Tensor) -> Tensor:
    """float32, unless it is float64 already."""
    return x if x.dtype == torch.float64 else x.float()


def _length(vector: Tensor) -> Tensor:
    """Euclidean length over the last dimension, with gradient 0 (not NaN) at the zero vector.

    Written out, because points come from the head as a permuted view: forward and backward of 2 x 17 x 64 x 112 of them took
    7.9 ms on one CPU core, and 62 ms with torch.linalg.vector_norm.
    """
    if vector.shape[-1] == 1:
        return vector.squeeze(-1).abs()
    squares = vector.square().sum(-1)
    return torch.where(squares > 0, squares, 1.0).sqrt() * (squares > 0)


def _sum(values: Tensor) -> Tensor:
    """Sum of each clip, [B, ...] -> [B]."""
    return values.flatten(1).sum(1)


def _clip_means(sums: Tensor, *masks: Tensor) -> Tensor:
    """Sums [B, K] over K masks [B, ...] -> the mean over the batch of the sum over k of each clip's masked means."""
    counts = torch.stack([_sum(mask).clamp(min=1) for mask in masks], dim=1)
    return (sums / counts).sum(1).mean()


def _recomputed(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`function(*tensors)`, keeping for the backward pass only the arguments.

    The losses stand at a step's peak of memory, when all activations of the model are held, and what they would keep is
    many times the predictions; computing it again is a few passes over them.
    """
    found: Tensor = checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)
    return found
