"""Is the loss of a rank not what it was, or should be, against the others'?"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from entropylens.analysis.rank_grid import TO_DEVIATION, Floats, Grid, deviation_of, median_of

__all__ = ["LossShift", "of_others", "shifts"]

LIMIT: Final = 5.0
"""Robust standard deviations by which the loss of a rank must leave what it was."""
_MAJORITY: Final = 4
"""Ranks from which one is compared with the spread of all."""
_OFFSET_LIMITS: Final = ((16, 6.0), (8, 8.0), (6, 11.0), (_MAJORITY, 18.0))
"""From so many ranks on: what the most different of them exceeds in 1 of 100 runs in which ranks
differ for good by normal amounts. Fewer ranks know their own spread worse."""
_VALUES: Final = 10
"""Losses in a block, at least."""
_BLOCKS: Final = 400
"""Blocks of a run, at most."""
_LEAST_BLOCKS: Final = 30
_SPAN: Final = 10
"""Blocks that the moving average covers."""
_LASTING: Final = 5
"""Blocks for which it must have left its range."""
_RECENT: Final = 50
"""Blocks whose differences tell the noise; of twice as many the drift is seen."""


@dataclass(frozen=True)
class LossShift:
    """A rank whose loss is another than that of the others, for longer than noise would be."""

    rank: int
    other: int | None
    """The one it is compared with; None for the median of all others."""
    since: int | None
    """Around which step it began; None if it was so from the start."""
    shift: float
    """By how much the loss is higher, against the difference before."""
    deviations: float
    lasts: bool
    """Whether it is so at the end."""


def shifts(grid: Grid) -> list[LossShift]:
    """Ranks whose losses are not what they were, or should be, against the others'."""
    size = max(_VALUES, -(-len(grid.steps) // _BLOCKS))
    count = len(grid.steps) // size
    if count < _LEAST_BLOCKS:
        return []
    values = np.where(np.isfinite(grid.values), grid.values, np.nan)
    apart = (values - of_others(values))[: count * size].reshape(count, size, -1)
    known = np.isfinite(apart).sum(1) * 2 > size
    blocks = np.where(known, median_of(apart, 1), np.nan)
    found = list(_left_their_level(grid.ranks, grid.steps[: count * size : size], blocks))
    if len(grid.ranks) >= _MAJORITY:
        known_already = {one.rank for one in found}
        found += [one for one in _offset(grid.ranks, blocks) if one.rank not in known_already]
    found.sort(key=lambda one: -one.deviations)
    # Of a few ranks the others are measured against the one that shifted.
    return found if len(grid.ranks) >= _MAJORITY else found[:1]


def of_others(values: Floats) -> Floats:
    """What each rank is compared with: the median of the others, of four or more that of all."""
    ranks = values.shape[1]
    if ranks >= _MAJORITY:
        return median_of(values, 1)[:, None]
    return np.stack([median_of(np.delete(values, at, 1), 1) for at in range(ranks)], 1)


def _left_their_level(
    ranks: tuple[int, ...], begins: NDArray[np.int64], blocks: Floats
) -> Iterator[LossShift]:
    courses = [_Course.of(blocks[:, at]) for at in range(len(ranks))]
    averages, usual, deviation = (
        np.stack([getattr(one, name) for one in courses], 1)
        for name in ("averages", "usual", "deviation")
    )
    shifts = averages - usual
    if len(ranks) >= _MAJORITY:
        middle = median_of(shifts, 1)[:, None]
        deviation = np.fmax(
            deviation, TO_DEVIATION * median_of(np.abs(shifts - middle), 1)[:, None]
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        signs = np.where(np.abs(shifts) / deviation > LIMIT, np.sign(shifts), 0.0)
    # Of two ranks one is as far from the other as that from it.
    for at in range(len(ranks))[1 if len(ranks) == 2 else 0 :]:
        start = _lasting(signs[:, at])
        if start is not None:
            other = ranks[0] if len(ranks) == 2 else None
            sign, level, unit = signs[start, at], usual[start, at], deviation[start, at]
            column = sign * (blocks[:, at] - level)
            half = np.nanmedian(column[start : start + _SPAN]) / 2
            while start > 0 and column[start - 1] > half:
                start -= 1
            away = sign * (averages[start:, at] - level)
            with np.errstate(divide="ignore"):
                most = float(np.nanmax(away) / unit)
            lasts = bool(away[-1] > unit * LIMIT / 2)
            shift = sign * float(np.nanmedian(column[start:] if lasts else column[start:][:_SPAN]))
            yield LossShift(ranks[at], other, int(begins[start]), shift, most, lasts)


@dataclass(frozen=True)
class _Course:
    """A column of blocks seen as it came."""

    averages: Floats
    """Exponential average up to each block."""
    usual: Floats
    """Median of the blocks before, the last few left out; NaN where there are too few."""
    deviation: Floats
    """Of the average from what is usual, if nothing happened."""

    @classmethod
    def of(cls, column: Floats) -> "_Course":
        rate = 2.0 / (_SPAN + 1)
        averages, usual, deviation = (np.full(len(column), np.nan) for _ in range(3))
        average = np.nan
        for at, value in enumerate(column):
            if np.isfinite(value):
                average = value if np.isnan(average) else average + rate * (value - average)
            averages[at] = average
            past = column[: max(at - _SPAN, 0)]
            past = past[np.isfinite(past)]
            if len(past) >= _LEAST_BLOCKS - _SPAN:
                usual[at] = np.median(past)
                share = rate / (2 - rate) + np.pi / 2 / len(past)
                earlier = averages[: at - _SPAN][-2 * _RECENT :]
                drift = TO_DEVIATION * deviation_of(earlier[np.isfinite(earlier)])
                deviation[at] = max(_noise(past) * share**0.5, drift)
        return cls(averages, usual, deviation)


def _noise(blocks: Floats) -> float:
    """Standard deviation between neighbours, which a drift does not add to."""
    return float(np.sqrt(np.mean(np.diff(blocks[-_RECENT:]) ** 2) / 2))


def _lasting(signs: Floats) -> int | None:
    """Where the first stretch of one sign begins that is long enough."""
    for at in np.flatnonzero(signs):
        stretch = signs[at : at + _LASTING]
        if len(stretch) == _LASTING and (stretch == signs[at]).all():
            return int(at)
    return None


def _offset(ranks: tuple[int, ...], blocks: Floats) -> Iterator[LossShift]:
    """Ranks that were off from the start."""
    levels = median_of(blocks, 0)
    apart = levels - np.nanmedian(levels)
    usual = TO_DEVIATION * float(np.nanmedian(np.abs(apart)))
    limit = next(limit for count, limit in _OFFSET_LIMITS if len(ranks) >= count)
    for at, rank in enumerate(ranks):
        column = blocks[:, at][np.isfinite(blocks[:, at])]
        if len(column) < _LEAST_BLOCKS:
            continue
        unit = max(usual, _noise(column) * (np.pi / 2 / len(column)) ** 0.5)
        last = float(np.median(column[-_SPAN:]) - np.nanmedian(levels))
        if abs(apart[at]) > limit * unit and last / apart[at] > 0.5:
            yield LossShift(rank, None, None, float(apart[at]), float(abs(apart[at]) / unit), True)
