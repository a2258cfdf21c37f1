"""What the values of several ranks make together: `query.combine_ranks` in numpy."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from entropylens.dictionary import definitions

__all__ = ["Floats", "Integers", "Key", "Points", "combined"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class Key(NamedTuple):
    """Which series."""

    name: str
    module: str
    """Empty for the whole run."""
    phase: str


@dataclass(frozen=True)
class Points:
    """One series, one value a step, all ranks together."""

    steps: Integers
    """Increasing, each once."""
    times: Floats
    """Unix seconds, the latest of the ranks; NaN where the log has none."""
    values: Floats
    """NaN and the infinities as they were logged."""


def combined(
    name: str, steps: Integers, times: Floats, values: Floats, weights: Floats | None
) -> Points | None:
    """One value a step, as the metric dictionary says under ``ranks``.

    Args:
        name: Of the metric: it decides the rule.
        steps: Of each row, in any order.
        times: Of each row.
        values: Of each row.
        weights: Of each row, NaN where there is none; None if they were not read.

    Returns:
        The series; None where weights are needed to tell, and were not read.
    """
    known = definitions().get(name)
    rule = known.ranks if known else "mean"
    later = steps[1:] > steps[:-1]
    if not later.all():
        order = np.argsort(steps, kind="stable")
        steps, times, values = steps[order], times[order], values[order]
        weights = None if weights is None else weights[order]
        later = steps[1:] > steps[:-1]
    if later.all():
        return Points(steps, times, _alone(rule, values))
    starts = np.flatnonzero(np.concatenate([[True], later]))
    together = _together(rule, values, weights, starts)
    if together is None:
        return None
    return Points(steps[starts], np.fmax.reduceat(times, starts), together)


def _alone(rule: str, values: Floats) -> Floats:
    if rule != "root_sum_square":
        return values
    with np.errstate(over="ignore"):
        return np.sqrt(values * values)


def _together(rule: str, values: Floats, weights: Floats | None, starts: Integers) -> Floats | None:
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        if rule == "sum":
            return np.add.reduceat(values, starts)
        if rule == "root_sum_square":
            return np.sqrt(np.add.reduceat(values * values, starts))
        smallest = np.minimum.reduceat(values, starts)
        largest = np.maximum.reduceat(values, starts)
        if rule in ("min", "max"):
            return smallest if rule == "min" else largest
        if weights is None:
            return None
        weight = np.add.reduceat(weights, starts)
        rows = np.diff(starts, append=len(values))
        mean = np.add.reduceat(values, starts) / rows
        weighted = np.add.reduceat(values * weights, starts) / weight
        return np.where(smallest == largest, largest, np.where(weight > 0, weighted, mean))
