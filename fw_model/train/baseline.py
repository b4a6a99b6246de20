"""What a model that sees nothing scores: the bar under every number that is to mean something."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fw_model.cameras import encode_pose, unproject
from fw_model.data.schema import Batch


@dataclass(frozen=True)
class Constant:
    """A prediction in the form the losses read; see `losses.GeometryOutput`."""

    depth: Tensor
    depth_conf: Tensor
    points: Tensor
    points_conf: Tensor
    pose_encodings: list[Tensor]


def constant_prediction(batch: Batch) -> Constant:
    """A wall at each clip's median depth, before a camera that stands still.

    It is told what no constant could know, each clip's own median depth and lens, so that a model beats it only by seeing
    what lies where and how the camera moves. Confidence is 1, its least.
    """
    batch_size, frames, height, width = batch.depth.shape
    levels = torch.stack(
        [depth[depth > 0].median() if (depth > 0).any() else depth.new_ones(()) for depth in batch.depth.float()]
    )
    depth = levels.view(-1, 1, 1, 1).expand(batch.depth.shape)
    still = torch.eye(3, 4, device=depth.device).expand(batch_size, frames, 3, 4)
    ones = torch.ones_like(depth)
    return Constant(
        depth=depth,
        depth_conf=ones,
        points=unproject(depth, batch.intrinsics, still),
        points_conf=ones,
        pose_encodings=[encode_pose(still, batch.intrinsics, height, width)] * 4,
    )
