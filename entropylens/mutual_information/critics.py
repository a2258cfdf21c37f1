"""Critics that learn to tell pairs that belong together, and how they are trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d, median_filter
from torch import Tensor

from entropylens.mutual_information.bounds import densities, infonce, jensen_shannon, smile
from entropylens.mutual_information.extrapolation import Row

__all__ = ["BOUNDS", "CRITICS", "EVALUATED", "Progress", "Training", "kept_rows"]

_HELD_OUT: Final = 0.1
EVALUATED: Final = 2000
"""Rows at most that a trained critic is evaluated on."""
_PAIRS: Final = 1 << 24
"""Hidden units that a concatenated critic holds at once when it is evaluated."""


def kept_rows(samples: int) -> int:
    """Rows that are trained on."""
    return samples - max(2, round(_HELD_OUT * samples))


@dataclass
class Progress:
    """How far a long training is, told to whoever shows it."""

    show: Callable[[int, int], None] | None
    total: int
    done: int = 0

    def advance(self) -> None:
        """Count one step more."""
        self.done += 1
        if self.show is not None:
            self.show(self.done, self.total)


_Parameters = list[Tensor]


def _layers(sizes: Sequence[int], networks: int, generator: torch.Generator) -> _Parameters:
    """Weights and biases of so many networks at once, drawn as torch.nn.Linear draws them."""
    parameters = []
    for inputs, outputs in pairwise(sizes):
        for shape in ((networks, inputs, outputs), (networks, 1, outputs)):
            drawn = torch.rand(shape, generator=generator)
            parameters.append((2 * drawn - 1) * inputs**-0.5)
    return parameters


def _forward(parameters: Sequence[Tensor], values: Tensor) -> Tensor:
    last = len(parameters) - 2
    for at in range(0, len(parameters), 2):
        values = torch.baddbmm(parameters[at + 1], values, parameters[at])
        values = values.relu() if at < last else values
    return values


class _Separable:
    """Score g(x) h(y) of two embeddings; a network for each of the leading axis."""

    def __init__(self, x: int, y: int, sizes: tuple[int, int]) -> None:
        embedding, hidden = sizes
        self._sizes = [(width, hidden, hidden, embedding) for width in (x, y)]

    def parameters(self, networks: int, generator: torch.Generator) -> _Parameters:
        return [p for sizes in self._sizes for p in _layers(sizes, networks, generator)]

    def scores(self, parameters: Sequence[Tensor], x: Tensor, y: Tensor) -> Tensor:
        half = len(parameters) // 2
        return _forward(parameters[:half], x) @ _forward(parameters[half:], y).mT


class _Concatenated:
    """Score f(x, y) of one network of both; a network for each of the leading axis."""

    def __init__(self, x: int, y: int, sizes: tuple[int, int]) -> None:
        self._x, self._hidden = x, sizes[1]
        self._sizes = (x + y, self._hidden, self._hidden, 1)

    def parameters(self, networks: int, generator: torch.Generator) -> _Parameters:
        return _layers(self._sizes, networks, generator)

    def scores(self, parameters: Sequence[Tensor], x: Tensor, y: Tensor) -> Tensor:
        first, bias, *rest = parameters
        ys = torch.baddbmm(bias, y, first[:, self._x :])
        size = max(1, _PAIRS // (ys.numel() or 1))
        return torch.cat(
            [self._block(first, rest, part, ys) for part in x.split(size, dim=1)], dim=1
        )

    def _block(self, first: Tensor, rest: Sequence[Tensor], x: Tensor, ys: Tensor) -> Tensor:
        xs = x @ first[:, : self._x]
        pairs = (xs[:, :, None] + ys[:, None]).relu().flatten(1, 2)
        return _forward(rest, pairs).view(len(x), x.shape[1], ys.shape[1])


BOUNDS: Final[dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]] = {
    "infonce": (infonce, infonce),
    "smile": (jensen_shannon, smile),
}
"""What is maximised and what is reported."""
CRITICS: Final[dict[str, Any]] = {"separable": _Separable, "concatenated": _Concatenated}


@dataclass
class Training:
    """Critics that are trained side by side, one for each part of the sample."""

    bound: str
    critic: Any
    sizes: tuple[int, int]
    epochs: int
    steps: int
    """In an epoch, of parts of any size."""
    batch: int
    learning_rate: float
    generator: torch.Generator
    progress: Progress

    def row(self, x: Tensor, y: Tensor, gamma: int) -> tuple[Row, float]:
        """Estimates of disjoint parts, and the standard error that the first one's sample has."""
        samples = len(x) // gamma
        parts = (v[: samples * gamma].view(gamma, samples, -1) for v in (x, y))
        values, held_out, deviation = self._estimates(*parts)
        row = Row(gamma=gamma, samples=samples, values=values, held_out=held_out)
        return row, deviation

    def shuffled(self, x: Tensor, y: Tensor, times: int) -> tuple[float, ...]:
        """Estimates of the whole sample, each with y in another order."""
        orders = [torch.randperm(len(y), generator=self.generator) for _ in range(times)]
        several = y[torch.stack(orders).to(y.device)]
        return self._estimates(x.expand(times, *x.shape), several)[0]

    def _estimates(
        self, x: Tensor, y: Tensor
    ) -> tuple[tuple[float, ...], tuple[float, ...], float]:
        kept = kept_rows(x.shape[1])
        critic = self.critic(x.shape[2], y.shape[2], self.sizes)
        epochs, curves = self._train(critic, (x[:, :kept], y[:, :kept]), (x[:, kept:], y[:, kept:]))
        smooth = gaussian_filter1d(
            median_filter(curves, size=(5, 1), mode="nearest"), 1.0, axis=0, mode="nearest"
        )
        best = smooth.argmax(0)
        held_out = smooth[best, np.arange(len(best))]
        chosen = [
            torch.stack([epochs[at][which][network] for network, at in enumerate(best)])
            for which in range(len(epochs[0]))
        ]
        shown = min(kept, EVALUATED)
        with torch.no_grad():
            scores = critic.scores(chosen, x[:, :shown], y[:, :shown])
            found = BOUNDS[self.bound][1](scores).tolist()
            deviation = densities(scores[0]).std().item() / math.sqrt(x.shape[1])
        values = tuple(v if h > 0 else 0.0 for v, h in zip(found, held_out, strict=True))
        return values, tuple(held_out.tolist()), deviation

    def _train(
        self, critic: Any, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
    ) -> tuple[list[_Parameters], np.ndarray]:
        """Parameters after each epoch, and the bound on held-out rows ``[epochs, networks]``."""
        x, y = train
        networks, rows = x.shape[:2]
        parameters = [
            p.to(x.device).requires_grad_() for p in critic.parameters(networks, self.generator)
        ]
        optimizer = torch.optim.Adam(parameters, lr=self.learning_rate)
        maximised, reported = BOUNDS[self.bound]
        history, curves = [], []
        for _ in range(self.epochs):
            for chosen in self._batches(networks, rows):
                at = chosen.to(x.device)[..., None]
                pair = (v.gather(1, at.expand(-1, -1, v.shape[2])) for v in (x, y))
                loss = -maximised(critic.scores(parameters, *pair)).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                curves.append(reported(critic.scores(parameters, *test)).cpu().numpy())
            history.append([p.detach().clone() for p in parameters])
            self.progress.advance()
        return history, np.stack(curves)

    def _batches(self, networks: int, rows: int) -> list[Tensor]:
        """Rows of one epoch's steps: every network passes through its own in its own order."""
        size = min(self.batch, rows)
        each = rows // size
        orders = [
            torch.rand(networks, rows, generator=self.generator).argsort(1)
            for _ in range(-(-self.steps // each))
        ]
        batches = [order[:, at * size : (at + 1) * size] for order in orders for at in range(each)]
        return batches[: self.steps]
