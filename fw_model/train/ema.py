"""An exponential moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class MovingAverage:
    """avg <- decay * avg + (1 - decay) * weight after each step, starting at the weights as they are.

    It lies where the weights lie: on their device, shared out as they are when they are sharded.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self._parameters = dict(parameters)
        self.average: dict[str, Tensor] = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take a step's weights in."""
        for name, average in self.average.items():
            average.lerp_(self._parameters[name].detach(), 1 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model runs with the averages inside, and with its own weights, bit for bit, afterwards."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, average in self.average.items():
            weight = self._parameters[name].detach()
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
