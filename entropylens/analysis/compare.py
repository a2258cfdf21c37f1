"""What came of runs: final values, their interval over seeds, a common axis, a ratio."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

__all__ = ["FinalValue", "Interval", "aligned", "final_value", "interval", "ratio"]


@dataclass(frozen=True)
class FinalValue:
    """Where a series ended: the mean of its last finite values, their number, and the others'."""

    value: float | None
    count: int
    nonfinite: int


@dataclass(frozen=True)
class Interval:
    """The mean of n values, and between what the mean of all may lie."""

    mean: float | None
    low: float | None
    high: float | None
    n: int


# -- settings ------------------------------------------------------------------------------------


def final_value(
    steps: NDArray[np.int64], values: NDArray[np.float64], share: float = 0.05
) -> FinalValue:
    """Where did a series end?

    The mean of the finite values within the last ``share`` of the step range, which has at least
    the last value in it.

    Args:
        steps: ``[n]``, increasing.
        values: ``[n]``.
        share: Of the step range, above 0 and at most 1.

    Returns:
        The mean, how many values it is of, and how many were not finite.

    Raises:
        ValueError: The share is another, or steps and values differ in length.

    Example:
        >>> final_value(np.arange(101), np.arange(101.0))
        FinalValue(value=97.5, count=6, nonfinite=0)
    """
    if not 0 < share <= 1:
        raise ValueError(f"final_value: expected a share above 0 and at most 1, got {share}")
    _check_lengths("final_value", steps=steps, values=values)
    if not len(steps):
        return FinalValue(None, 0, 0)
    first, end = float(steps[0]), float(steps[-1])
    last = values[steps >= end - share * (end - first)]
    finite = last[np.isfinite(last)]
    mean = float(finite.mean()) if finite.size else None
    return FinalValue(mean, int(finite.size), int(last.size - finite.size))


def interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """What may the mean over all seeds be, judged by a few?

    ``mean +- t s / sqrt(n)``, t the ``(1 + level) / 2`` quantile of Student's distribution with
    ``n - 1`` degrees of freedom: exact for independent, normally distributed values.

    Args:
        values: One a seed. A value that is not finite makes the mean NaN: a seed that failed is
            not silently left out.
        level: Share of such intervals that hold the true mean.

    Returns:
        The interval; low and high are None of fewer than two values or of one that is not finite,
        the mean None of no value.

    Raises:
        ValueError: The level is not between 0 and 1.

    Source: Student (1908), The probable error of a mean, Biometrika 6 (1).

    Example:
        >>> one = interval([1.0, 2.0, 3.0])
        >>> one.mean, round(one.low, 3), round(one.high, 3), one.n
        (2.0, -0.484, 4.484, 3)
    """
    if not 0 < level < 1:
        raise ValueError(f"interval: expected a level between 0 and 1, got {level}")
    found = np.asarray(values, dtype=np.float64)
    n = int(found.size)
    if n == 0:
        return Interval(None, None, None, 0)
    if not np.isfinite(found).all():
        return Interval(float("nan"), None, None, n)
    mean = float(found.mean())
    if n == 1:
        return Interval(mean, None, None, 1)
    reach = float(stdtrit(n - 1, (1 + level) / 2) * found.std(ddof=1) / np.sqrt(n))
    return Interval(mean, mean - reach, mean + reach, n)


# -- a common axis -------------------------------------------------------------------------------


def aligned(
    steps: NDArray[np.int64],
    times: NDArray[np.float64],
    tokens: tuple[NDArray[np.int64], NDArray[np.float64]] | None,
    by: Literal["step", "tokens", "time"],
    start: float = 0.0,
) -> NDArray[np.float64]:
    """Where do the values of a series stand on an axis that runs can share?

    Args:
        steps: ``[n]``, increasing.
        times: ``[n]`` seconds, of any epoch.
        tokens: Steps and values of the run's ``tokens/seen``, increasing; between two of them the
            tokens are taken to grow evenly, outside of them they are not known.
        by: step, tokens, or time, in seconds since ``start``; a pause before a resume counts.
        start: When the run began, in seconds of the same epoch.

    Returns:
        ``[n]``; NaN where it is not known.

    Raises:
        ValueError: ``by`` is something else, or lengths differ.

    Example:
        >>> seen = np.array([10, 20]), np.array([100.0, 300.0])
        >>> aligned(np.array([5, 10, 15]), np.zeros(3), seen, "tokens").tolist()
        [nan, 100.0, 200.0]
    """
    if by == "step":
        return np.asarray(steps, dtype=np.float64)
    if by == "time":
        _check_lengths("aligned", steps=steps, times=times)
        return np.asarray(times, dtype=np.float64) - start
    if by != "tokens":
        raise ValueError(f"aligned: expected by step, tokens or time, got {by!r}")
    if tokens is None:
        return np.full(len(steps), np.nan)
    _check_lengths("aligned", token_steps=tokens[0], tokens=tokens[1])
    return _interpolated(np.asarray(steps, dtype=np.float64), *tokens)


def ratio(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    base_x: NDArray[np.float64],
    base_y: NDArray[np.float64],
) -> NDArray[np.float64]:
    """How many times the baseline's value is a series' value at the same place?

    ``y(x) / b(x)``, with b the baseline, linear between its values. Values of the baseline whose
    place is not known (NaN) are left out.

    Args:
        x: ``[n]``.
        y: ``[n]``.
        base_x: ``[m]``, increasing.
        base_y: ``[m]``.

    Returns:
        ``[n]``; NaN where x is NaN or outside of the baseline's range, where y or a value of the
        baseline beside x is not finite, and where the baseline is 0.

    Raises:
        ValueError: Lengths differ.

    Example:
        >>> x = np.array([0.5, 1.0, 3.0])
        >>> ratio(x, np.array([3.0, 4.0, 5.0]), np.array([0.0, 1.0]), np.array([1.0, 2.0])).tolist()
        [2.0, 2.0, nan]
    """
    _check_lengths("ratio", x=x, y=y)
    _check_lengths("ratio", base_x=base_x, base_y=base_y)
    base = _interpolated(np.asarray(x, dtype=np.float64), base_x, base_y)
    base[base == 0] = np.nan
    with np.errstate(over="ignore"):
        result = np.asarray(y, dtype=np.float64) / base
    return np.where(np.isfinite(result), result, np.nan)


# -- parts ---------------------------------------------------------------------------------------


def _interpolated(
    at: NDArray[np.float64], x: NDArray[Any], y: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Linear between known places, NaN outside of them and beside a value that is not finite."""
    known = ~np.isnan(x)
    if not known.any():
        return np.full(len(at), np.nan)
    finite = np.where(np.isfinite(y), y, np.nan)[known]
    return np.interp(at, x[known], finite, left=np.nan, right=np.nan)


def _check_lengths(who: str, **arrays: NDArray[Any]) -> None:
    (first, one), (second, other) = arrays.items()
    if len(one) != len(other):
        raise ValueError(
            f"{who}: expected {first} and {second} of one length, got {len(one)} and {len(other)}"
        )
