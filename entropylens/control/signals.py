"""What is known of a step, and what is decided about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["SCALES", "Admission", "Decision", "GradientSignals", "UpdateSignals"]

SCALES: Final = (*(2.0**-k for k in range(17)), 0.0)
"""Of the update, at which the linearised loss is asked for."""


@dataclass(frozen=True, kw_only=True)
class GradientSignals:
    """What is known of a step before the optimiser makes it."""

    norm: float
    """Of the gradients before clipping, where that is known; not finite where one of them is."""
    loss: float | None = None
    statistics: float | None = None
    """By which share of itself a running variance of batch norm moved, the largest of any layer."""
    rate: float = 0.0
    """The largest learning rate of any parameter group."""
    settings: tuple[float, ...] = ()
    """All other numbers of the parameter groups."""


@dataclass(frozen=True, kw_only=True)
class UpdateSignals:
    """What is known of an update that the optimiser proposes."""

    norm: float
    """||p||_2 over all parameters, entries that are not finite left out."""
    rate: float
    is_finite: bool = True
    ratio: float | None = None
    """r, the largest over the samples looked at; None where the step was not looked at."""
    losses: tuple[float, ...] | None = None
    """Linearised cross-entropy of samples of the last ordinary batch at `SCALES`."""
    suspicions: tuple[str, ...] = ()
    """Of the `Admission`."""


@dataclass(frozen=True, kw_only=True)
class Admission:
    """What to do before the optimiser makes a step."""

    gradient_scale: float = 1.0
    """Factor of the gradients; 0 is no step at all, moments and momentum untouched."""
    cause: str = ""
    """Why, where that is below 1: gradient, gradient not finite, batch."""
    keep: bool = False
    """Keep the parameters, to know the update."""
    look: bool = False
    """Ask the model what the update does."""
    suspicions: tuple[str, ...] = ()
    """Out of gradient, loss, statistics, rate, settings, and settling: still measured because of
    settings or of an update that was too large."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What to do with an update."""

    scale: float = 1.0
    """Factor of the whole update."""
    cause: str = ""
    """What bound it: update norm, radius, linearised loss, not finite; empty where nothing did."""
