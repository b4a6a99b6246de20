"""Losses of the geometry branch and of the video branch, and the flow-matching schedule.

All losses are computed in float32 (or wider, when the inputs are), whatever the autocast state. Each is the mean over the
clips of a batch of that clip's own masked mean, so that gradient accumulation over micro-batches of equal size gives the
loss of the whole batch; a clip whose mask is empty adds 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fw_model.cameras import encode_pose, unproject
from fw_model.data.schema import Batch

STILL_SHARE = 0.05  # temporal gradients are matched where the target moves less than this share of its clip's range
CONFIDENCE_REWARD = 0.2  # weight of -log(conf) in the point loss
ITERATION_DECAY = 0.6  # the camera head's last refinement weighs 1, the one before 0.6, ...
HUBER_DELTA = 1.0
FRAMES_AT_ONCE = 8  # of the point loss, whose intermediate results are the largest of all losses


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
    def points(self) -> Tensor: ...  # [B, T, H, W, 3]

    @property
    def points_conf(self) -> Tensor: ...  # [B, T, H, W], > 0

    @property
    def pose_encodings(self) -> list[Tensor]: ...  # one [B, T, 9] per refinement iteration


def make_targets(batch: Batch) -> Targets:
    """Targets of a batch, on its device. Nothing is rescaled: a packed clip is in clip units already."""
    height, width = batch.depth.shape[-2:]
    return Targets(
        depth=batch.depth,
        valid=batch.valid,
        points=unproject(batch.depth, batch.intrinsics, batch.w2c),
        pose_encoding=encode_pose(batch.w2c, batch.intrinsics, height, width),
    )


def geometry_losses(output: GeometryOutput, targets: Targets) -> dict[str, Tensor]:
    """The three geometry losses, each a scalar, unweighted: `depth_loss`, `point_loss`, `camera_loss`.

    Raises ValueError when a prediction's shape is not its target's.
    """
    for name, predicted, target in (
        ("depth", output.depth, targets.depth),
        ("points", output.points, targets.points),
        ("points_conf", output.points_conf, targets.depth),
        *((f"pose_encodings[{k}]", pose, targets.pose_encoding) for k, pose in enumerate(output.pose_encodings)),
    ):
        if predicted.shape != target.shape:
            raise ValueError(f"{name}: predicted {list(predicted.shape)} but the target is {list(target.shape)}")
    with torch.autocast(targets.depth.device.type, enabled=False):
        return {
            "depth_loss": depth_loss(output.depth, targets.depth, targets.valid),
            "point_loss": point_loss(output.points, output.points_conf, targets.points, targets.valid),
            "camera_loss": camera_loss(output.pose_encodings, targets.pose_encoding),
        }


def geometry_loss(losses: dict[str, Tensor], camera_weight: float = 3.0) -> Tensor:
    """L_geo = depth + point + camera_weight * camera, of the dictionary `geometry_losses` gives."""
    return losses["depth_loss"] + losses["point_loss"] + camera_weight * losses["camera_loss"]


def depth_loss(predicted: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Temporal gradient matching plus per-frame L1, both scale-sensitive. All [B, T, H, W]; returns a scalar.

    Temporal: | (p[t+1] - p[t]) - (d[t+1] - d[t]) | over pixels valid in both frames where |d[t+1] - d[t]| is below
    `STILL_SHARE` of the clip's range of valid depths: elsewhere the pixel shows another surface and depth may jump.
    L1: |p - d| over valid pixels, no frame aligned or rescaled.
    """
    target = _wide(target)
    largest = torch.where(valid, target, -torch.inf).flatten(1).amax(1)
    smallest = torch.where(valid, target, torch.inf).flatten(1).amin(1)
    limit = (STILL_SHARE * (largest - smallest)).view(-1, 1, 1, 1)  # -inf for an empty mask: nothing is still
    still = valid[:, 1:] & valid[:, :-1] & ((target[:, 1:] - target[:, :-1]).abs() < limit)
    sums = _recomputed(_depth_sums, predicted, target, valid, still)
    return _clip_means(sums, valid, still)


def _depth_sums(predicted: Tensor, target: Tensor, valid: Tensor, still: Tensor) -> Tensor:
    """Per clip the sums of the two terms of `depth_loss`, [B, 2]."""
    residual = torch.where(valid, _wide(predicted) - target, 0.0)
    change = residual[:, 1:] - residual[:, :-1]
    return torch.stack([_sum(residual.abs()), _sum(torch.where(still, change.abs(), 0.0))], dim=1)


def point_loss(predicted: Tensor, confidence: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """conf * |P - G| + conf * |grad P - grad G| - 0.2 log conf; points [B, T, H, W, 3], the others [B, T, H, W].

    |.| is the Euclidean length of the 3-vector. The first and last term are averaged over valid pixels; the gradients are
    differences of horizontal and of vertical neighbours, weighted by the confidence of the left or upper one, averaged
    over pairs whose two pixels are valid and summed over the two directions. Returns a scalar.
    """
    pieces = zip(*(x.split(FRAMES_AT_ONCE, dim=1) for x in (predicted, confidence, target, valid)), strict=True)
    sums = torch.stack([_recomputed(_point_sums, *piece) for piece in pieces]).sum(0)
    return _clip_means(sums, valid, _both_valid(valid, 2), _both_valid(valid, 3))


def _point_sums(predicted: Tensor, confidence: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Per clip the sums of the three terms of `point_loss` (values, vertical and horizontal gradients), [B, 3]."""
    confidence = torch.where(valid, _wide(confidence), 1.0)
    residual = torch.where(valid[..., None], _wide(predicted) - _wide(target), 0.0)
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
    """Huber on the 9-D pose encoding: mean over frames and components, summed over K iterations with 0.6^(K-1-k).

    predicted: K tensors [B, T, 9], first iteration first; target [B, T, 9] with canonical quaternions. q and -q are the
    same rotation, so each predicted quaternion is taken with the sign nearer to its target. Returns a scalar.
    """
    target = _wide(target)
    total = target.new_zeros(())
    for k, encoding in enumerate(predicted):
        encoding = _wide(encoding)
        quaternion = encoding[..., 3:7]
        agrees = (quaternion.detach() * target[..., 3:7]).sum(-1, keepdim=True) >= 0
        encoding = torch.cat([encoding[..., :3], torch.where(agrees, quaternion, -quaternion), encoding[..., 7:]], dim=-1)
        total = total + ITERATION_DECAY ** (len(predicted) - 1 - k) * F.huber_loss(encoding, target, delta=HUBER_DELTA)
    return total


def _wide(x: Tensor) -> Tensor:
    """float32, unless it is float64 already."""
    return x if x.dtype == torch.float64 else x.float()


def _length(vector: Tensor) -> Tensor:
    """Euclidean length over the last dimension, with gradient 0 (not NaN) at the zero vector.

    Written out, because points come from the head as a permuted view: forward and backward of 2 x 17 x 64 x 112 of them took
    7.9 ms on one CPU core, and 62 ms with torch.linalg.vector_norm.
    """
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


# ----------------------------------------------------------------------------------------------------------- flow


@dataclass(frozen=True)
class FlowSchedule:
    """Flow matching on a discrete schedule: x = (1 - sigma) latents + sigma noise, velocity = noise - latents.

    sigma_i = shift s_i / (1 + (shift - 1) s_i) for s_i = 1, 1 - 1/steps, ..., 1/steps, and timestep = steps * sigma, as the
    base model was trained.
    """

    steps: int = 1000
    shift: float = 5.0

    @cached_property
    def sigmas(self) -> Tensor:
        """[steps] float64, falling from 1."""
        s = torch.arange(self.steps, 0, -1, dtype=torch.float64) / self.steps
        return self.shift * s / (1 + (self.shift - 1) * s)

    @property
    def timesteps(self) -> Tensor:
        """[steps] float64, falling from `steps`."""
        return self.steps * self.sigmas

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """`count` timesteps [count] float32 on the CPU, drawn by a uniform index into the schedule."""
        index = torch.randint(self.steps, (count,), generator=generator)
        return self.timesteps[index].float()

    def sigma(self, timestep: Tensor) -> Tensor:
        """timestep [B] -> share of noise [B] in 0..1."""
        return timestep / self.steps

    def add_noise(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """latents, noise [B, ...], timestep [B] -> noisy latents [B, ...]."""
        sigma = _per_clip(self.sigma(timestep), latents)
        return (1 - sigma) * latents + sigma * noise

    def weight(self, timestep: Tensor) -> Tensor:
        """timestep [B] -> loss weight [B]: exp(-2 ((t - 500) / 1000)^2) minus its minimum, with mean 1 over the schedule."""
        bell = self._bell(self.timesteps)
        low = bell.min()
        return ((self._bell(timestep.double()) - low.to(timestep.device)) / (bell - low).mean().to(timestep.device)).float()

    def _bell(self, timestep: Tensor) -> Tensor:
        return torch.exp(-2 * ((timestep - self.steps / 2) / self.steps) ** 2)


def diffusion_loss(
    velocity: Tensor, noise: Tensor, latents: Tensor, timestep: Tensor, schedule: FlowSchedule | None = None
) -> Tensor:
    """Weighted MSE of velocity against noise - latents; all [B, 16, F, h, w], timestep [B]. Returns a scalar."""
    schedule = schedule or FlowSchedule()
    if velocity.shape != latents.shape:
        raise ValueError(f"velocity: predicted {list(velocity.shape)} but the latents are {list(latents.shape)}")
    with torch.autocast(velocity.device.type, enabled=False):
        error = (_wide(velocity) - (_wide(noise) - _wide(latents))).square().flatten(1).mean(1)
        return (schedule.weight(timestep).to(error.dtype) * error).mean()


def _per_clip(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like).view(-1, *[1] * (like.ndim - 1))
