"""Camera moves by the names of film, in clip units (mean distance of the scene's points = 1), from wherever the camera stands.

`pan`, `tilt` and `roll` turn the camera where it is; `truck`, `pedestal` and `dolly` shift it along its own axes; `orbit` and
`arc` go around a point ahead. `zoom` changes the lens. (The base model's own pose files call a truck Pan and a dolly Zoom.)

A move is a function of s, the eased share of its time [T] in 0..1, and of an amount. It gives the camera relative to where it
began: c2w rotations [T, 3, 3], centres [T, 3], focal lengths over the first one [T]. OpenCV axes: x right, y down, z ahead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

AHEAD = 1.0  # distance of the point that orbits and arcs keep in view: the scene's mean distance


@dataclass(frozen=True)
class Motion:
    """Of T frames, relative to the camera at its start."""

    rotation: Tensor  # [T, 3, 3] camera to start
    centre: Tensor  # [T, 3]
    zoom: Tensor  # [T] focal length over that at the start


@dataclass(frozen=True)
class Move:
    run: Callable[[Tensor, float], Motion]
    amount: float  # by default
    unit: str  # of the amount: degrees, clip units, times, turns


def _still(s: Tensor) -> Tensor:
    return torch.eye(3, dtype=s.dtype).expand(len(s), 3, 3)


def _turning(rotation: Tensor) -> Motion:
    return Motion(rotation, rotation.new_zeros(len(rotation), 3), rotation.new_ones(len(rotation)))


def _shifting(s: Tensor, x: float, y: float, z: float) -> Motion:
    return Motion(_still(s), s[:, None] * s.new_tensor([x, y, z]), torch.ones_like(s))


def _looking(centre: Tensor, target: Tensor) -> Motion:
    """At `centre` [T, 3], level, looking at `target`."""
    x, y, z = F.normalize(target - centre, dim=-1).unbind(-1)
    return Motion(turn_y(torch.atan2(x, z)) @ turn_x(torch.asin(-y)), centre, torch.ones_like(x))


def turn_y(angle: Tensor) -> Tensor:
    """Camera-to-world rotations [T, 3, 3] that turn the view to the right by `angle` radians."""
    c, s, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    return torch.stack([c, zero, s, zero, one, zero, -s, zero, c], dim=-1).unflatten(-1, (3, 3))


def turn_x(angle: Tensor) -> Tensor:
    """Camera-to-world rotations [T, 3, 3] that turn the view upwards by `angle` radians."""
    c, s, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    return torch.stack([one, zero, zero, zero, c, -s, zero, s, c], dim=-1).unflatten(-1, (3, 3))


def turn_z(angle: Tensor) -> Tensor:
    """Camera-to-world rotations [T, 3, 3] that roll the camera to its right by `angle` radians: the picture turns to the left."""
    c, s, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    return torch.stack([c, -s, zero, s, c, zero, zero, zero, one], dim=-1).unflatten(-1, (3, 3))


def pan(s: Tensor, degrees: float) -> Motion:
    """Turns to the right for positive degrees."""
    return _turning(turn_y(s * math.radians(degrees)))


def tilt(s: Tensor, degrees: float) -> Motion:
    """Turns upwards for positive degrees."""
    return _turning(turn_x(s * math.radians(degrees)))


def roll(s: Tensor, degrees: float) -> Motion:
    """Leans to the right for positive degrees."""
    return _turning(turn_z(s * math.radians(degrees)))


def truck(s: Tensor, distance: float) -> Motion:
    """To the right for positive distance."""
    return _shifting(s, distance, 0, 0)


def pedestal(s: Tensor, distance: float) -> Motion:
    """Upwards for positive distance."""
    return _shifting(s, 0, -distance, 0)


def dolly(s: Tensor, distance: float) -> Motion:
    """Forwards for positive distance; the lens stays."""
    return _shifting(s, 0, 0, distance)


def zoom(s: Tensor, factor: float) -> Motion:
    """The focal length grows `factor` times; the camera stays."""
    return Motion(_still(s), s.new_zeros(len(s), 3), factor**s)


def dolly_zoom(s: Tensor, distance: float) -> Motion:
    """Forwards with the lens opening so that what is `AHEAD` keeps its size (backwards for negative distance; below `AHEAD`)."""
    moved = dolly(s, distance)
    return Motion(moved.rotation, moved.centre, (AHEAD - moved.centre[:, 2]) / AHEAD)


def orbit(s: Tensor, degrees: float) -> Motion:
    """A level circle around the point `AHEAD`, looking at it; to the right for positive degrees; 360 ends where it began."""
    rotation = turn_y(s * math.radians(-degrees))
    target = s.new_tensor([0.0, 0.0, AHEAD])
    return Motion(rotation, target - rotation @ target, torch.ones_like(s))


def arc(s: Tensor, degrees: float) -> Motion:
    """As `orbit`, over the point `AHEAD`: the camera rises for positive degrees (below 90)."""
    rotation = turn_x(s * math.radians(-degrees))
    target = s.new_tensor([0.0, 0.0, AHEAD])
    return Motion(rotation, target - rotation @ target, torch.ones_like(s))


def spiral(s: Tensor, turns: float) -> Motion:
    """Circles about the optical axis that widen to 0.2 while the camera goes 0.3 ahead, looking at the point `AHEAD`."""
    angle = 2 * math.pi * turns * s
    return _looking(torch.stack([0.2 * s * angle.cos(), 0.2 * s * angle.sin(), 0.3 * s], -1), s.new_tensor([0.0, 0.0, AHEAD]))


def figure_eight(s: Tensor, width: float) -> Motion:
    """A lying eight of that width across the view, looking at the point `AHEAD`; ends where it began."""
    angle = 2 * math.pi * s
    centre = torch.stack([width / 2 * angle.sin(), width / 4 * (2 * angle).sin(), torch.zeros_like(s)], -1)
    return _looking(centre, s.new_tensor([0.0, 0.0, AHEAD]))


def handheld(s: Tensor, strength: float) -> Motion:
    """Standing with the camera in one's hands: slow sway and a little tremor, always the same. strength 1: about 0.01 clip units
    and half a degree."""
    waves = s.new_tensor([[1.3, 0.2], [2.1, 1.7], [3.7, 4.1], [7.3, 2.9], [11.1, 5.3]])
    sizes = s.new_tensor([1.0, 0.6, 0.35, 0.12, 0.06])

    def sway(shift: float) -> Tensor:
        phase = 2 * math.pi * waves[:, :1] * s + waves[:, 1:] + shift
        still = torch.sin(waves[:, 1:] + shift)  # begins at rest
        return (sizes[:, None] * (torch.sin(phase) - still)).sum(0)

    angles = math.radians(0.4) * strength
    rotation = turn_y(angles * sway(0.0)) @ turn_x(angles * sway(2.0)) @ turn_z(0.5 * angles * sway(4.0))
    centre = 0.008 * strength * torch.stack([sway(1.0), sway(3.0), 0.5 * sway(5.0)], -1)
    return Motion(rotation, centre, torch.ones_like(s))


def hold(s: Tensor, _: float) -> Motion:
    """Stays."""
    return _turning(_still(s))


MOVES: dict[str, Move] = {
    "hold": Move(hold, 0.0, ""),
    "pan_left": Move(lambda s, a: pan(s, -a), 30.0, "degrees"),
    "pan_right": Move(pan, 30.0, "degrees"),
    "tilt_up": Move(tilt, 20.0, "degrees"),
    "tilt_down": Move(lambda s, a: tilt(s, -a), 20.0, "degrees"),
    "roll_left": Move(lambda s, a: roll(s, -a), 15.0, "degrees"),
    "roll_right": Move(roll, 15.0, "degrees"),
    "truck_left": Move(lambda s, a: truck(s, -a), 0.5, "clip units"),
    "truck_right": Move(truck, 0.5, "clip units"),
    "pedestal_up": Move(pedestal, 0.5, "clip units"),
    "pedestal_down": Move(lambda s, a: pedestal(s, -a), 0.5, "clip units"),
    "dolly_in": Move(dolly, 0.5, "clip units"),
    "dolly_out": Move(lambda s, a: dolly(s, -a), 0.5, "clip units"),
    "forward": Move(dolly, 0.5, "clip units"),
    "backward": Move(lambda s, a: dolly(s, -a), 0.5, "clip units"),
    "zoom_in": Move(zoom, 1.5, "times"),
    "zoom_out": Move(lambda s, a: zoom(s, 1 / a), 1.5, "times"),
    "dolly_zoom_in": Move(dolly_zoom, 0.4, "clip units"),
    "dolly_zoom_out": Move(lambda s, a: dolly_zoom(s, -a), 0.4, "clip units"),
    "orbit_left": Move(lambda s, a: orbit(s, -a), 45.0, "degrees"),
    "orbit_right": Move(orbit, 45.0, "degrees"),
    "arc_up": Move(arc, 30.0, "degrees"),
    "arc_down": Move(lambda s, a: arc(s, -a), 30.0, "degrees"),
    "spiral": Move(spiral, 2.0, "turns"),
    "figure_eight": Move(figure_eight, 0.4, "clip units"),
    "handheld": Move(handheld, 1.0, "times"),
}
