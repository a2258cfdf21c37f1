"""Mutual information, with what speaks for and against the estimate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor

from entropylens.mutual_information.critics import (
    BOUNDS,
    CRITICS,
    EVALUATED,
    Progress,
    Training,
    kept_rows,
)
from entropylens.mutual_information.extrapolation import Extrapolation, Row, extrapolate

__all__ = ["Estimate", "estimate_mutual_information"]

_FEWEST_ROWS: Final = 20
_SATURATED: Final = 0.85


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Mutual information of two variables."""

    value: float
    """Nats; 0 where none was found."""
    interval: tuple[float, float]
    """Confidence interval, nats: of the line and of the sample itself. Up to infinity where none
    was found, since a critic that finds nothing tells no upper bound."""
    found: bool
    """Whether there is any: above 0 on held-out rows, and above every shuffled sample."""
    reasons: tuple[str, ...]
    """Why the value is not to be relied on, in words."""
    rows: tuple[Row, ...]
    """By number of parts."""
    line: Extrapolation | None
    """None where nothing was found in the whole sample."""
    null: tuple[float, ...]
    """Estimates of the whole sample with y shuffled, nats."""

    @property
    def is_reliable(self) -> bool:
        """Whether nothing speaks against the value."""
        return not self.reasons


def estimate_mutual_information(
    x: Tensor | np.ndarray,
    y: Tensor | np.ndarray,
    *,
    bound: Literal["infonce", "smile"] = "infonce",
    critic: Literal["separable", "concatenated"] = "separable",
    embedding: int = 16,
    hidden: int = 64,
    epochs: int = 50,
    batch: int = 128,
    learning_rate: float = 5e-4,
    gammas: Sequence[int] = tuple(range(1, 11)),
    shuffles: int = 5,
    confidence: float = 0.68,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Estimate:
    """How many nats do x and y share, and is the number to be trusted?

    For each gamma the rows are split into gamma disjoint parts of one permutation. On each part a
    critic is trained on nine tenths of the rows, and its bound on the rest is smoothed over epochs
    (median of 5, Gaussian of width 1); where that is greatest, the bound *on the training rows* is
    the part's estimate: what overfits is cut off, and what is left of the bias is linear in gamma
    and taken off by `extrapolate`. All parts are trained for as many steps: in the library, which
    trains them for as many epochs, small parts are trained too little, which tilts the line.

    Args:
        x: ``[N, ...]`` real numbers; further axes are flattened, columns standardised.
        y: ``[N, ...]``, the same rows.
        bound: ``infonce``, which cannot exceed log n of the n rows it is evaluated on (at most
            2,000), or ``smile``, which can, with more variance.
        critic: ``separable``: the inner product of two embeddings, O(n) networks for n^2 scores;
            or ``concatenated``: one network of both, dearer and sometimes tighter.
        embedding: Dimensions of an embedding; raise it until the value no longer rises.
        hidden: Units of each of two hidden layers.
        epochs: Passes over the whole sample.
        batch: Rows in a step, at most.
        learning_rate: Of Adam.
        gammas: Numbers of parts, 1 among them.
        shuffles: Samples with y shuffled that the whole sample has to exceed; 0 leaves it out.
        confidence: Of the interval, which adds the standard error of the mean log density ratio to
            that of the line in squares: the line's alone, as in the library, tells how well it fits
            and not how much the sample could have differed.
        seed: Of permutations and initial weights; the global generator is not touched.
        progress: Called with epochs done and epochs in all.

    Returns:
        The estimate. Same input and seed on the same machine give the same.

    Raises:
        ValueError: Rows differ in number, are too few for the gammas or not finite; 1 is not among
            the gammas or they are fewer than 3; an unknown bound or critic.

    Unit: nats.
    Device: that of x; waits for the host.
    Cost: ``epochs * N / batch`` steps of sum(gammas) + shuffles networks.
    Source: Abdelaleem, Martini and Nemenman (2025), arXiv 2506.00330.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> x, noise = torch.randn(2, 200, 1, generator=generator)
        >>> small = dict(epochs=3, hidden=8, embedding=4, gammas=(1, 2, 3), shuffles=0)
        >>> estimate_mutual_information(x, x + noise, **small).is_reliable
        False
    """
    gammas = sorted(set(gammas))
    x, y = _rows("x", x), _rows("y", y)
    if bound not in BOUNDS or critic not in CRITICS:
        raise ValueError(
            f"estimate_mutual_information: expected bound to be one of {', '.join(BOUNDS)} and "
            f"critic one of {', '.join(CRITICS)}, got {bound!r} and {critic!r}"
        )
    if len(gammas) < 3 or gammas[0] != 1:
        raise ValueError(
            f"estimate_mutual_information: expected at least 3 gammas from 1 on, got {gammas}"
        )
    if len(x) != len(y) or len(x) // gammas[-1] < _FEWEST_ROWS:
        raise ValueError(
            f"estimate_mutual_information: expected the same rows twice, {_FEWEST_ROWS} for each "
            f"of {gammas[-1]} parts, got {len(x)} and {len(y)}; use smaller gammas"
        )
    generator = torch.Generator().manual_seed(seed)
    levels = len(gammas) + bool(shuffles)
    training = Training(
        bound=bound,
        critic=CRITICS[critic],
        sizes=(embedding, hidden),
        epochs=epochs,
        steps=max(1, kept_rows(len(x)) // batch),
        batch=batch,
        learning_rate=learning_rate,
        generator=generator,
        progress=Progress(progress, epochs * levels),
    )
    order = torch.randperm(len(x), generator=generator).to(x.device)
    x, y = x[order], y[order]
    whole, deviation = training.row(x, y, 1)
    null = training.shuffled(x, y, shuffles) if shuffles else ()
    if absent := _nothing(whole, null):
        return Estimate(
            value=0.0, interval=(0.0, math.inf), found=False, reasons=(absent,), rows=(whole,),
            line=None, null=null,
        )  # fmt: skip
    rows = (whole, *(training.row(x, y, gamma)[0] for gamma in gammas[1:]))
    line = extrapolate(
        [row.gamma for row in rows for _ in row.values],
        [value for row in rows for value in row.values],
        confidence,
    )
    error = math.hypot(line.error, float(norm.ppf((1 + confidence) / 2)) * deviation)
    return Estimate(
        value=line.value,
        interval=(line.value - error, line.value + error),
        found=True,
        reasons=line.reasons + (_saturation(rows, line.gammas) if bound == "infonce" else ()),
        rows=rows,
        line=line,
        null=null,
    )


def _rows(name: str, values: Tensor | np.ndarray) -> Tensor:
    """Standardised columns; those that do not vary stay 0."""
    values = torch.as_tensor(values)
    values = values.detach().to(torch.float64 if values.device.type != "mps" else torch.float32)
    values = values.flatten(1) if values.ndim > 1 else values[:, None]
    if not values.numel() or not bool(values.isfinite().all()):
        raise ValueError(
            f"estimate_mutual_information: expected {name} to hold finite numbers, got shape "
            f"{tuple(values.shape)} with {int((~values.isfinite()).sum())} others"
        )
    values = values - values.mean(0)
    deviation = values.square().mean(0).sqrt()
    return (values / torch.where(deviation > 0, deviation, 1.0)).float()


def _nothing(whole: Row, null: tuple[float, ...]) -> str:
    """Why there is no mutual information in the whole sample, or nothing."""
    if whole.held_out[0] <= 0:
        return f"no MI: the bound on held-out rows is never above 0 ({whole.held_out[0]:.3g} nats)"
    if null and whole.values[0] <= max(null):
        return (
            f"no MI: {whole.values[0]:.3g} nats are not above the {max(null):.3g} of "
            f"{len(null)} shuffled samples"
        )
    return ""


def _saturation(rows: Sequence[Row], used: Sequence[int]) -> tuple[str, ...]:
    full = [
        (row, ceiling)
        for row in rows
        if row.gamma in used
        and row.mean > _SATURATED * (ceiling := math.log(min(kept_rows(row.samples), EVALUATED)))
    ]
    return tuple(
        f"saturated: {row.mean:.3g} nats for gamma = {row.gamma}, where InfoNCE cannot exceed "
        f"{ceiling:.3g}; more rows or smile would tell more"
        for row, ceiling in full[:1]
    )
