"""Did a series leave its usual range for good?"""

from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from entropylens.analysis.overview import Curve
from entropylens.analysis.spikes import Spike, find_spikes
from entropylens.figures.thinning import buckets

__all__ = ["CHANCE", "LASTING", "LEAST_VALUES", "left_range"]

LEAST_VALUES: Final = 25
"""Fewer are not judged: `find_spikes` needs as many to know a usual range."""
LASTING: Final = 10
"""Values for which a loss must have been out; one bad batch is no verdict."""
CHANCE: Final = 3.0
"""Standard errors by which the mean of what is out must differ from the mean before."""
_LONG: Final = 500
"""Points from which a series is looked at twice."""


def left_range(curve: Curve, sign: float) -> tuple[Spike, float] | None:
    """Has a series been out of its usual range for 10 values, to its end and not by chance?

    Args:
        curve: The series, thinned if it is long.
        sign: 1.0 for upwards, -1.0 for downwards.

    Returns:
        Where it left its range and the median of its last 10 values, both times the sign; None if
        it did not.
    """
    for steps, values in _looks(curve.steps, sign * curve.values):
        spike = next(reversed(find_spikes(steps, values)), None)
        if spike is None or spike.end is not None:
            continue
        after = values[steps >= spike.start]
        recent = after[-LASTING:][np.isfinite(after[-LASTING:])]
        if (
            len(after) < LASTING
            or not recent.size
            or _by_chance(values[steps < spike.start], recent)
        ):
            continue
        if np.median(recent) > spike.limit:
            return spike, float(np.median(recent))
    return None


def _by_chance(before: NDArray[np.float64], recent: NDArray[np.float64]) -> bool:
    usual = before[np.isfinite(before)][-LEAST_VALUES:]
    recent = np.minimum(recent, np.median(recent))  # what explodes has a wide spread too
    error = np.sqrt(usual.var() / len(usual) + recent.var() / len(recent))
    return bool(recent.mean() < usual.mean() + CHANCE * error)


def _looks(
    steps: NDArray[np.int64], values: NDArray[np.float64]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """A series, and the medians of stretches of about four points if it is long.

    Minima and maxima in turn have so wide a range that only a very large rise leaves it. Stretches
    are those of thinning, or several whole ones: each has as many minima as maxima.
    """
    yield steps, values
    finite = np.isfinite(values)
    if finite.sum() > _LONG:
        steps, values = steps[finite], values[finite]
        stretch = buckets(steps, len(steps) // 4 + 1)
        starts = np.flatnonzero(np.r_[True, stretch[1:] != stretch[:-1]])
        medians = [np.median(part) for part in np.split(values, starts[1:])]
        yield steps[starts], np.array(medians)
