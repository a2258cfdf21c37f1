"""When did a series leave its usual range, and did it come back? When did a schedule jump?"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Jump", "Spike", "find_jumps", "find_spikes"]

_TO_DEVIATION = 1.4826
"""Median absolute deviation to standard deviation, for a normal distribution."""


@dataclass(frozen=True)
class Spike:
    """A stretch in which a series stood above its usual range."""

    start: int
    """First step above it."""
    peak: int
    """Step of the largest value."""
    end: int | None
    """First step back within it; None if it never came back."""
    usual: float
    """Median before the start."""
    limit: float
    """What had to be exceeded."""
    value: float
    """The largest value; NaN or infinite if the series became so."""


@dataclass(frozen=True)
class Jump:
    """A step at which a series rose far above all it had been."""

    step: int
    before: float
    after: float


def find_spikes(
    steps: NDArray[np.int64],
    values: NDArray[np.float64],
    *,
    window: int = 25,
    deviations: float = 6.0,
    least_rise: float = 0.05,
    quiet: int = 10,
) -> list[Spike]:
    """When did a series leave its usual range, upwards?

    A spike starts where ``value > m + max(deviations * 1.4826 MAD, least_rise * |m|)``, with ``m``
    the median and MAD the median absolute deviation of the ``window`` values before it. The range
    is held while the spike lasts, and it lasts until ``quiet`` values in a row, or all that are
    left, lie within. A value that is not finite is above every range. That a spike has started is
    seen at once, that it has ended ``quiet`` values later.

    Args:
        steps: ``[n]``, increasing.
        values: ``[n]``.
        window: Values that make the usual range; none is judged before so many are there.
        deviations: Robust standard deviations above the median.
        least_rise: Least rise above the median, as a share of it.
        quiet: Values within the range that end a spike.

    Returns:
        Spikes in order.

    Example:
        >>> series = np.r_[np.full(30, 1.0), 3.0, np.full(5, 1.0)]
        >>> [(s.start, s.end, s.value) for s in find_spikes(np.arange(36), series)]
        [(30, 31, 3.0)]
    """
    spikes: list[Spike] = []
    usual: list[float] = []
    at = 0
    while at < len(values):
        if len(usual) >= window:
            middle, limit = _range(usual[-window:], deviations, least_rise)
            if not values[at] <= limit:
                back = _first_quiet(values, at, limit, quiet)
                spikes.append(_spike(steps, values, at, back, middle, limit))
                if back is None:
                    break
                at = back
        if np.isfinite(values[at]):
            usual.append(float(values[at]))
        at += 1
    return spikes


def find_jumps(
    steps: NDArray[np.int64], values: NDArray[np.float64], *, factor: float = 2.0
) -> list[Jump]:
    """When did a schedule rise to more than ``factor`` times all it had been before?

    A warm-up rises in small steps and is none; nor is the first rise from 0.

    Args:
        steps: ``[n]``, increasing.
        values: ``[n]``.
        factor: Rise in one step, against the largest value before it.

    Returns:
        Jumps in order.

    Example:
        >>> find_jumps(np.arange(1, 5), np.array([1.0, 1.0, 30.0, 1.0]))
        [Jump(step=3, before=1.0, after=30.0)]
    """
    jumps: list[Jump] = []
    largest = 0.0
    for at in range(1, len(values)):
        largest = max(largest, values[at - 1])
        if largest > 0 and values[at] > factor * largest:
            jumps.append(Jump(int(steps[at]), float(values[at - 1]), float(values[at])))
    return jumps


def _first_quiet(values: NDArray[np.float64], start: int, limit: float, quiet: int) -> int | None:
    """Where the first ``quiet`` values within the limit begin, or all that are left."""
    within = values[start:] <= limit
    for at in np.flatnonzero(within):
        if within[at : at + quiet].all():
            return start + int(at)
    return None


def _range(usual: list[float], deviations: float, least_rise: float) -> tuple[float, float]:
    middle = _median(usual)
    spread = _TO_DEVIATION * _median([abs(value - middle) for value in usual])
    return middle, middle + max(deviations * spread, least_rise * abs(middle))


def _median(values: list[float]) -> float:
    """Of a few values; numpy takes ten times as long for 25."""
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2


def _spike(
    steps: NDArray[np.int64],
    values: NDArray[np.float64],
    start: int,
    end: int | None,
    usual: float,
    limit: float,
) -> Spike:
    part = values[start:end]
    wild = ~np.isfinite(part)
    peak = start + int(np.argmax(wild) if wild.any() else np.argmax(part))
    back = None if end is None else int(steps[end])
    return Spike(int(steps[start]), int(steps[peak]), back, usual, limit, float(values[peak]))
