"""What a run's own past says is ordinary."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable
from math import exp, inf, isfinite, log

__all__ = ["History"]

_TO_SIGMA = 1.4826
"""Median absolute deviation to the standard deviation of a normal distribution."""


class History:
    """The newest values of a positive quantity, and which next one would be out of the ordinary.

    Ordinary is what lies below ``median * max(factor, exp(deviations * sigma))``, with sigma the
    spread of the logarithms (1.4826 times their median absolute deviation). No single value,
    however large, moves median and spread by more than one place among the sorted ones.

    Args:
        size: Values that are kept.
        values: To begin with, oldest first.
    """

    def __init__(self, size: int, values: Iterable[float] = ()) -> None:
        self._values: deque[float] = deque(maxlen=size)
        self._sorted: list[float] = []
        for value in values:
            self.add(value)

    def __len__(self) -> int:
        return len(self._values)

    @property
    def values(self) -> list[float]:
        """Oldest first."""
        return [*self._values]

    def add(self, value: float) -> None:
        """Take one more; one that is not finite or not positive is none."""
        if not value > 0 or not isfinite(value):
            return
        if len(self._values) == self._values.maxlen:
            del self._sorted[bisect_left(self._sorted, self._values[0])]
        self._values.append(value)
        insort(self._sorted, value)

    def median(self) -> float | None:
        """The lower median; None where there is no value."""
        return self._sorted[(len(self._sorted) - 1) // 2] if self._sorted else None

    def exceeds(self, value: float, factor: float, deviations: float) -> bool:
        """Whether a value is above what is ordinary; false where there is no history."""
        middle = self.median()
        return (
            middle is not None
            and value > middle * factor
            and value > self.limit(factor, deviations)
        )

    def limit(self, factor: float, deviations: float) -> float:
        """The largest ordinary value; infinite where there is no history."""
        if not self._sorted:
            return inf
        middle = log(self._sorted[(len(self._sorted) - 1) // 2])
        apart = sorted(abs(log(value) - middle) for value in self._sorted)
        sigma = _TO_SIGMA * apart[(len(apart) - 1) // 2]
        return exp(min(middle + max(log(factor), deviations * sigma), 700.0))
