"""Trajectories: camera paths by name, in clip units, in the conventions of `fw_model.cameras`; the first camera is the world.

Moves have the names of film: `pan` and `tilt` turn the camera, `truck` and `pedestal` shift it. The base model's own pose files
call a shift to the side Pan_Left and Pan_Right; they are trucks here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fw_model.cameras import DEFAULT_LENS, Cameras, invert_pose, relative_to_first, with_lens


def pan(frames: int, degrees: float = 30.0) -> Tensor:
    """w2c [T, 3, 4]: the camera stays and turns about its y axis, to the right for positive degrees."""
    return _look(_turn_y(_ramp(frames) * math.radians(degrees)), torch.zeros(frames, 3))


def tilt(frames: int, degrees: float = 20.0) -> Tensor:
    """w2c [T, 3, 4]: the camera stays and turns about its x axis, upwards for positive degrees."""
    return _look(_turn_x(_ramp(frames) * math.radians(degrees)), torch.zeros(frames, 3))


def truck(frames: int, distance: float = 0.5) -> Tensor:
    """w2c [T, 3, 4]: the camera moves along its x axis without turning, to the right for positive distance (clip units)."""
    return _look(torch.eye(3).expand(frames, 3, 3), _ramp(frames)[:, None] * torch.tensor([distance, 0.0, 0.0]))


def pedestal(frames: int, distance: float = 0.5) -> Tensor:
    """w2c [T, 3, 4]: the camera moves along its y axis without turning, upwards for positive distance (clip units)."""
    return _look(torch.eye(3).expand(frames, 3, 3), _ramp(frames)[:, None] * torch.tensor([0.0, -distance, 0.0]))


def zoom(frames: int, distance: float = 0.5) -> Tensor:
    """w2c [T, 3, 4]: the camera moves along its optical axis, forwards for positive distance (clip units).

    The lens does not change: this is what the base model's own pose files call zoom.
    """
    return _look(torch.eye(3).expand(frames, 3, 3), _ramp(frames)[:, None] * torch.tensor([0.0, 0.0, distance]))


def orbit(frames: int, degrees: float = 45.0, radius: float = 1.0) -> Tensor:
    """w2c [T, 3, 4]: a level circle around the point `radius` (clip units) ahead of the first camera, looking at it.

    The camera moves to its right for positive degrees; after 360 it is where it began.
    """
    rotation = _turn_y(_ramp(frames) * math.radians(-degrees))
    target = torch.tensor([0.0, 0.0, radius])
    return _look(rotation, target - rotation @ target)


def spiral(frames: int, turns: float = 2.0, radius: float = 0.2, forward: float = 0.3, distance: float = 1.0) -> Tensor:
    """w2c [T, 3, 4]: a circle about the optical axis that widens from 0 to `radius` while the camera moves `forward`,
    looking at the point `distance` ahead of the first camera (all in clip units, distance > forward)."""
    along = _ramp(frames)
    angle = 2 * math.pi * turns * along
    centres = torch.stack([radius * along * angle.cos(), radius * along * angle.sin(), forward * along], dim=-1)
    towards = F.normalize(torch.tensor([0.0, 0.0, distance]) - centres, dim=-1)
    x, y, z = towards.unbind(-1)
    rotation = _turn_y(torch.atan2(x, z)) @ _turn_x(torch.asin(-y))
    return _look(rotation, centres)


TRAJECTORIES: dict[str, Callable[[int], Tensor]] = {
    "pan_left": lambda frames: pan(frames, -30.0),
    "pan_right": lambda frames: pan(frames, 30.0),
    "tilt_up": lambda frames: tilt(frames, 20.0),
    "tilt_down": lambda frames: tilt(frames, -20.0),
    "truck_left": lambda frames: truck(frames, -0.5),
    "truck_right": lambda frames: truck(frames, 0.5),
    "pedestal_up": lambda frames: pedestal(frames, 0.5),
    "pedestal_down": lambda frames: pedestal(frames, -0.5),
    "zoom_in": lambda frames: zoom(frames, 0.5),
    "zoom_out": lambda frames: zoom(frames, -0.5),
    "orbit_left": lambda frames: orbit(frames, -45.0),
    "orbit_right": lambda frames: orbit(frames, 45.0),
    "orbit_360deg": lambda frames: orbit(frames, 360.0),
    "spiral": spiral,
}


def make_trajectory(name: str, frames: int, height: int, width: int) -> Cameras:
    """Cameras of a named trajectory with `DEFAULT_LENS` on a height x width image; raises ValueError with the names there are."""
    if name not in TRAJECTORIES:
        raise ValueError(f"no trajectory {name!r}; there are: {', '.join(TRAJECTORIES)}")
    if frames < 1:
        raise ValueError(f"a trajectory needs at least one frame, got {frames}")
    lens = torch.tensor(DEFAULT_LENS, dtype=torch.float64).expand(frames, -1)
    return with_lens(TRAJECTORIES[name](frames), lens, 720, 1280).resized(height, width)


def _ramp(frames: int) -> Tensor:
    return torch.linspace(0.0, 1.0, frames)


def _look(rotation: Tensor, centres: Tensor) -> Tensor:
    """Camera-to-world rotations [T, 3, 3] and centres [T, 3] -> w2c [T, 3, 4], first camera the identity."""
    return relative_to_first(invert_pose(torch.cat([rotation, centres[..., None]], dim=-1)))


def _turn_y(angle: Tensor) -> Tensor:
    """Camera-to-world rotations [T, 3, 3] that turn the view to the right by `angle` radians."""
    c, s, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    return torch.stack([c, zero, s, zero, one, zero, -s, zero, c], dim=-1).unflatten(-1, (3, 3))


def _turn_x(angle: Tensor) -> Tensor:
    """Camera-to-world rotations [T, 3, 3] that turn the view upwards by `angle` radians."""
    c, s, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    return torch.stack([one, zero, zero, zero, c, -s, zero, s, c], dim=-1).unflatten(-1, (3, 3))
