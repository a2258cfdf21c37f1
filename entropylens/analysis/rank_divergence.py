"""Has a rank gone its own way?"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from entropylens.analysis.rank_grid import TO_DEVIATION, Flags, Floats, Grid, deviation_of
from entropylens.analysis.rank_losses import LossShift, of_others, shifts
from entropylens.store.reader import Run

__all__ = [
    "EQUAL",
    "LossShift",
    "NotFinite",
    "Parting",
    "RankDivergence",
    "Straggler",
    "read_rank_divergence",
]

EQUAL: Final = {
    "gradient/norm/after_clip": "gradient norm",
    "parameter/norm": "parameter norm",
    "update/norm": "update norm",
}
"""What is the same on all ranks where each holds the whole model; shards have other names."""
LOSS: Final = "loss/mean"
SECONDS: Final = "step/seconds"
SLOWER: Final = 1.2
"""Factor on the other ranks' step time from which a rank is a straggler."""
LEAST_STEPS: Final = 20
APART: Final = 1e-4
"""Relative spread of a norm over ranks above which they differ: float32 sums differ by less."""
NOTHING: Final = 1e-12
"""Share of the largest norm that a metric has in the run, up to which a difference counts as none:
relative to a norm of about 0 rounding alone would be a wide spread."""
_BEFORE: Final = 10
"""Steps in which two ranks agreed that tell which of them has left."""
_FEW: Final = 3
_CLEARLY: Final = 3.0


@dataclass(frozen=True)
class Parting:
    """A norm that should be equal on all ranks, and is not."""

    name: str
    module: str
    """The optimiser, where there are several."""
    since: int
    """First step in which ranks differ."""
    agreed: int | None
    """Last step before in which they did not; None if they never agreed."""
    ranks: tuple[int, ...]
    """Those off the median, or of two the one whose norm left what it was; empty if it cannot be
    told."""
    values: dict[int, float]
    """By rank, in that first step."""
    spread: float
    """Largest (max - min) / |median|; infinite where one is not finite and another is. What differs
    by at most 1e-12 of the run's largest norm counts as equal."""
    differing: int
    """Steps in which ranks differ."""
    compared: int
    """Steps from the first on in which at least two ranks told."""


@dataclass(frozen=True)
class NotFinite:
    """A rank whose loss is not a number where other ranks' are."""

    rank: int
    first: int
    steps: int
    lasts: bool


@dataclass(frozen=True)
class Straggler:
    """A rank whose steps take longer than the other ranks'."""

    rank: int
    factor: float
    """Median over steps of its time against the median of the others'."""
    steps: int


@dataclass(frozen=True)
class RankDivergence:
    """In what the ranks of a run differ that should not."""

    ranks: tuple[int, ...]
    partings: tuple[Parting, ...]
    """The earliest first."""
    shifts: tuple[LossShift, ...]
    """The clearest first."""
    not_finite: tuple[NotFinite, ...]
    stragglers: tuple[Straggler, ...]

    @cached_property
    def parted(self) -> tuple[Parting, ...]:
        """Norms that were equal, and are not any more."""
        return tuple(one for one in self.partings if one.agreed is not None)


def read_rank_divergence(run: Run) -> RankDivergence | None:
    """Has a rank of this run gone its own way?

    Norms of gradients, weights and updates must be equal on all ranks where each holds the whole
    model (DDP): a relative spread above 1e-4 is a corrupted tensor or a rank that is not
    synchronised, unless it is at most 1e-12 of the largest norm that the metric has in the run. The
    rank that is off is the one off the median; of two, the one whose norm lies at least 3 times as
    far from what both had in the 10 steps before as the other's. Where ranks never agreed, each may
    hold a part of the model, which is no fault.

    The loss is of each rank's own data, and noisy. What is judged is its difference from the median
    of the other ranks (of four or more, of all), as an exponential average over medians of 10 steps
    (more in runs of over 4,000) that covers 10 of them: it has shifted where, for 5 of those
    medians, it is 5 deviations away from its own median before. The deviation is the largest of
    three: what the noise between neighbouring medians makes, 1.4826 MAD of the averages before,
    and, of four ranks or more, 1.4826 MAD of the shifts of all ranks. Of four ranks or more one may
    also be different from the start: by 6 (from 16 ranks on), 8 (8), 11 (6) or 18 (4) times 1.4826
    MAD of the ranks' medians, which the most different of ranks that differ for good by normal
    amounts exceeds in 1 of 100 runs.

    False alarms in simulated runs of falling losses and falling noise, each rank with its own: none
    in 1,750 runs of 5,000 steps with 2 or 3 ranks, nor in 300 of 2,500 steps with 4 or 8, of
    normal, t (3 degrees of freedom) and lognormal noise; noise that remembers (AR(1), 0.9) made 1
    in 250 runs with 2 ranks. A shift by 2 standard deviations of one rank's loss was seen in 2 to 9
    of 10 runs with 2 or 3 ranks, and in nearly all with 4 or 8.

    Args:
        run: Finished or not.

    Returns:
        What was found; None of a run of one rank.

    Cost: one look at the metrics table, and up to 0.02 s for each rank.
    """
    names = [*EQUAL, LOSS, SECONDS]
    rows = run.metrics(names, phases="train").to_pandas()
    rows["module"] = rows["module"].astype("object").fillna("")
    ranks = tuple(sorted(int(rank) for rank in rows["rank"].unique()))
    if len(ranks) < 2:
        return None
    grids = {key: Grid.of(part) for key, part in rows.groupby(["name", "module"], sort=True)}
    partings = [
        found
        for (name, module), grid in grids.items()
        if name in EQUAL and (found := _parting(str(name), str(module), grid)) is not None
    ]
    losses, seconds = grids.get((LOSS, "")), grids.get((SECONDS, ""))
    return RankDivergence(
        ranks,
        tuple(sorted(partings, key=lambda one: (one.since, not one.ranks))),
        () if losses is None else tuple(shifts(losses)),
        () if losses is None else tuple(_not_finite(losses)),
        () if seconds is None else tuple(_stragglers(seconds)),
    )


# -- norms that must be equal --------------------------------------------------------------------


def _parting(name: str, module: str, grid: Grid) -> Parting | None:
    compared = grid.told.sum(1) >= 2
    steps, values, told = grid.steps[compared], grid.values[compared], grid.told[compared]
    floor = NOTHING * float(np.max(np.abs(values), where=np.isfinite(values), initial=0.0))
    spread = _spreads(values, told, floor)
    apart = np.flatnonzero(spread > APART)
    if not len(apart):
        return None
    first = int(apart[0])
    off = _off(values[: first + 1], told[first], floor)
    return Parting(
        name,
        module,
        int(steps[first]),
        int(steps[first - 1]) if first else None,
        tuple(grid.ranks[at] for at in off),
        {rank: float(values[first, at]) for at, rank in enumerate(grid.ranks) if told[first, at]},
        float(spread.max()),
        len(apart),
        len(steps) - first,
    )


def _spreads(values: Floats, told: Flags, floor: float) -> Floats:
    """(max - min) / |median| over the ranks that told; infinite where only some are finite.

    0 where max - min is at most the floor.
    """
    finite = np.isfinite(values) & told
    some = finite.any(1)
    kept = np.where(finite, values, np.nan)[some]
    found = np.zeros(len(values))
    with np.errstate(divide="ignore", invalid="ignore"):
        width = np.nanmax(kept, 1) - np.nanmin(kept, 1)
        found[some] = np.where(width > floor, width / np.abs(np.nanmedian(kept, 1)), 0.0)
    found[some & (finite.sum(1) < told.sum(1))] = np.inf
    return found


def _off(values: Floats, told: Flags, floor: float) -> list[int]:
    """Which ranks are off in the last row, given the rows before, in which they agreed."""
    row = values[-1]
    wild = told & ~np.isfinite(row)
    if told.sum() == 2 and not wild.any():
        return _left(values, np.flatnonzero(told))
    middle = np.median(row[told & ~wild])
    apart = np.abs(row - middle) > max(APART * np.abs(middle), floor)
    off = wild if wild.any() else told & apart
    is_minority = 2 * np.count_nonzero(off) <= np.count_nonzero(told)
    return np.flatnonzero(off).tolist() if is_minority else []


def _left(values: Floats, two: NDArray[np.int64]) -> list[int]:
    """Of two ranks that differ now, the one that is clearly not where both were before."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(values[-_BEFORE - 1 :, two])
    before, now = logs[:-1].mean(1), logs[-1]
    before = before[np.isfinite(before)]
    if len(before) < _FEW:
        return []
    middle = float(np.median(before))
    distance = np.abs(now - middle)
    near, far = np.argsort(distance)
    least = _CLEARLY * max(float(distance[near]), TO_DEVIATION * deviation_of(before))
    return [int(two[far])] if distance[far] > least else []


# -- single ranks --------------------------------------------------------------------------------


def _not_finite(grid: Grid) -> Iterator[NotFinite]:
    wild = grid.told & ~np.isfinite(grid.values)
    some = np.asarray((grid.told & ~wild).any(1))
    alone = wild & some[:, None]
    for at, rank in enumerate(grid.ranks):
        places = np.flatnonzero(alone[:, at])
        if len(places):
            last = np.flatnonzero(grid.told[:, at])[-1]
            first = int(grid.steps[places[0]])
            yield NotFinite(rank, first, len(places), bool(alone[last, at]))


def _stragglers(grid: Grid) -> Iterator[Straggler]:
    factors = grid.values / of_others(grid.values)
    for at, rank in enumerate(grid.ranks):
        known = factors[:, at][np.isfinite(factors[:, at])]
        if len(known) >= LEAST_STEPS and np.median(known) > SLOWER:
            yield Straggler(rank, float(np.median(known)), len(known))
