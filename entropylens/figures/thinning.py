"""Fewer points of a long series with nothing hidden, and smoothing on every point of it."""

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter

__all__ = ["NOTHING", "POINTS", "Memory", "buckets", "kept", "smoothed"]

POINTS: Final = 2000
"""Points of a line at most; what lies between is kept as its minimum and maximum."""


def kept(
    steps: NDArray[np.int64], values: NDArray[np.float64], points: int = POINTS
) -> NDArray[np.int64]:
    """Which points of a long series have to be drawn so that no spike and no NaN is hidden?

    Steps are cut into buckets of ``2^k`` steps that begin at multiples of ``2^k``; of each the
    smallest and the largest finite value and the first that is not finite are kept, and the
    series' last point. Buckets do not depend on where the series ends: as it grows, what is kept
    of all buckets but the last stays until ``k`` rises, and then what remains is among it.

    Args:
        steps: ``[n]``, increasing.
        values: ``[n]``.
        points: At most so many, at least 4.

    Returns:
        Indices, increasing.

    Cost: O(n), a few passes.

    Example:
        >>> steps, values = np.arange(10_000), np.eye(1, 10_000, 777)[0]
        >>> chosen = kept(steps, values, 100)
        >>> len(chosen) <= 100, values[chosen].max()
        (True, np.float64(1.0))
    """
    if len(steps) <= points:
        return np.arange(len(steps))
    bucket = buckets(steps, max((points - 1) // 3, 1))
    starts = np.flatnonzero(np.r_[True, bucket[1:] != bucket[:-1]])
    owner = np.repeat(np.arange(len(starts)), np.diff(np.r_[starts, len(steps)]))
    finite = np.isfinite(values)
    lowest = np.minimum.reduceat(np.where(finite, values, np.inf), starts)
    highest = np.maximum.reduceat(np.where(finite, values, -np.inf), starts)
    chosen = [
        _first_of_each(finite & (values == lowest[owner]), owner),
        _first_of_each(finite & (values == highest[owner]), owner),
        _first_of_each(~finite, owner),
        np.array([len(steps) - 1]),
    ]
    return np.unique(np.concatenate(chosen))


class Memory(NamedTuple):
    """What smoothing carries from one point to the next."""

    total: float = 0.0
    weight: float = 0.0


NOTHING: Final = Memory()
"""Before the first point."""


def smoothed(
    values: NDArray[np.float64], strength: float, memory: Memory = NOTHING
) -> tuple[NDArray[np.float64], Memory]:
    """The exponential moving average of every finite value, without the bias of its start.

    ``s_t = b s_{t-1} + (1 - b) v_t`` and ``w_t = b w_{t-1} + (1 - b)``, both from 0; the result is
    ``s_t / w_t``. A value that is not finite leaves a gap and does not enter the average.

    Args:
        values: ``[n]``.
        strength: b, from 0 to below 1.
        memory: Of the points before, so that a series can be smoothed as it comes.

    Returns:
        ``[n]`` averages, NaN where the value was not finite, and the memory after the last.

    Example:
        >>> smoothed(np.array([1.0, 3.0]), 0.5)[0].tolist()
        [1.0, 2.3333333333333335]
    """
    finite = np.isfinite(values)
    result = np.full(len(values), np.nan)
    if not finite.any():
        return result, memory
    totals, weights = (
        lfilter([1 - strength], [1, -strength], inputs, zi=[strength * before])[0]
        for inputs, before in (
            (values[finite], memory.total),
            (np.ones(int(finite.sum())), memory.weight),
        )
    )
    result[finite] = totals / weights
    return result, Memory(float(totals[-1]), float(weights[-1]))


def buckets(steps: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """In which of at most so many stretches of ``2^k`` steps does each step lie?

    Args:
        steps: ``[n]``, increasing, at least one.
        most: At least 2 if some steps are below 0 and others not.

    Returns:
        ``[n]`` numbers of stretches, increasing.

    Example:
        >>> buckets(np.arange(6), 2).tolist()
        [0, 0, 0, 0, 1, 1]
    """
    shift = 0
    while (int(steps[-1]) >> shift) - (int(steps[0]) >> shift) + 1 > most:
        shift += 1
    return steps >> shift


def _first_of_each(mask: NDArray[np.bool_], owner: NDArray[np.int64]) -> NDArray[np.int64]:
    places = np.flatnonzero(mask)
    return places[np.unique(owner[places], return_index=True)[1]]
