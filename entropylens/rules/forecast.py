"""When will the entropy be gone? A forecast with an interval, and how good such forecasts were."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from entropylens.dictionary import Metric
from entropylens.rules.blocks import Floats, Line, fit_line, straight

__all__ = [
    "FLOOR",
    "METRICS",
    "CrossingForecast",
    "ForecastScore",
    "forecast_crossing",
    "score_forecasts",
]

FLOOR: Final = 0.1
"""Nats below which a policy's entropy is called gone."""
LEAST_STEPS: Final = 30
"""Values below which nothing is forecast."""
REACH: Final = 3.0
"""Default horizon, as a multiple of the steps from the first value to the newest."""
_MEDIAN: Final = 5
"""Values whose median says that the floor is crossed: one low value does not."""
_PLACES: Final = 256
"""Steps ahead at which paths are looked at."""


def _metric(question: str, formula: str, high: str, low: str) -> Metric:
    return Metric(
        question=question,
        formula=formula,
        unit="optimiser steps",
        estimator="from all steps so far of rank 0, refitted at most every 25 measured steps and "
        "every ten seconds, in runs that have a reward; 5 % and 95 % edges over bootstrapped "
        "paths; absent where there is no forecast or it lies beyond three times the steps so far",
        high=high,
        low=low,
        cost="20 ms a forecast from 1000 steps on one CPU core",
        source="entropylens; entropy collapse as in Cui et al. (2025), arXiv 2505.22617",
    )


METRICS: Final[Mapping[str, Metric]] = {
    "forecast/floor/step": _metric(
        "When will the entropy have fallen below 0.1 nats?",
        "median over paths of the first step with H < 0.1",
        "exploration lasts",
        "exploration is about to end",
    ),
    "forecast/floor/low": _metric(
        "When could the entropy be below 0.1 nats at the earliest?",
        "5 % quantile over paths of the first step with H < 0.1",
        "exploration lasts",
        "exploration may end soon",
    ),
    "forecast/floor/high": _metric(
        "When will the entropy be below 0.1 nats at the latest?",
        "95 % quantile over paths of the first step with H < 0.1",
        "exploration may last",
        "exploration is about to end",
    ),
}


@dataclass(frozen=True)
class CrossingForecast:
    """When the entropy falls below a floor, as far as is known at `made_at`."""

    status: str
    """``reached``, ``expected``, ``not within the horizon`` or ``not identified``."""
    reason: str
    """In words."""
    step: float
    """The median of the forecast; where reached, the step; infinite beyond the horizon; NaN where
    not identified."""
    low: float
    """Low edge of the interval."""
    high: float
    """High edge; infinite where it lies beyond the horizon."""
    floor: float
    """Nats."""
    made_at: float
    """The newest step behind it."""
    horizon: float
    """The last step looked at."""
    model: str
    """The curve with most paths, as ``log H on step``; empty where there is none."""
    level: float
    path_step: Floats = field(default_factory=lambda: np.zeros(0), repr=False, compare=False)
    """``[m]`` steps ahead."""
    path: Floats = field(default_factory=lambda: np.zeros((3, 0)), repr=False, compare=False)
    """``[3, m]`` entropy there: low edge, median and high edge, nats."""


@dataclass(frozen=True)
class ForecastScore:
    """One forecast against what then happened; errors are counted up to the end of the run."""

    share: float
    """Of the run's steps that the forecast knew."""
    forecast: CrossingForecast
    actual: float
    """The step at which the floor was crossed; infinite where it was not."""
    error: float
    """Steps between forecast and actual; NaN where there was no forecast."""
    is_inside: bool | None
    """Whether the actual step lies in the interval; None where there was no forecast."""
    persistence_error: float
    """Of the rival that says that entropy stays as it is."""
    straight_line_error: float
    """Of the rival that draws a straight line through all values so far."""


def forecast_crossing(
    step: NDArray[np.number],
    entropy: NDArray[np.floating],
    floor: float,
    *,
    level: float = 0.9,
    horizon: float | None = None,
    repetitions: int = 400,
    seed: int = 0,
) -> CrossingForecast:
    """At which step will the entropy have fallen below a floor?

    H or log H is fitted by a straight line against step or log(step). Each of the four is fitted
    to the first two thirds and predicts H in the last; it gets so many of the paths ahead as its
    error there makes likely, among values that remember each other. A path is a line drawn by
    `entropylens.rules.blocks.fit_line`, plus the newest value's distance from it, fading with
    the residuals' memory, plus the median of five residuals drawn from the past, growing as that
    fades. The forecast is the median over all paths of the first step below the floor, the
    interval their quantiles.

    Crossed means that the median of five values in a row lies below the floor; the third of them
    is the step. Only the past is read: the forecast of a prefix is the forecast that was made then.

    On made-up runs of the four forms an interval of 90 % made at 15 % of the run held what happened
    in 67 to 98 % of cases, one made at half in 80 to 100 %. A course that bends where nothing
    announced it (a collapse after a plateau) is not foreseen, and the interval misses it.

    Args:
        step: ``[n]`` increasing, at least 1.
        entropy: ``[n]`` nats; what is not finite is left out.
        floor: Nats.
        level: Of the interval.
        horizon: Steps ahead that are looked at; by default three times those from the first value
            to the newest.
        repetitions: Paths.
        seed: Of the draws; no global random state is touched.

    Returns:
        The forecast. ``not identified``: fewer than 30 values, or a trend whose interval holds 0.

    Cost: 20 ms for 1000 values and 400 paths on one CPU core.
    Source: Curves and interval are ours. That entropy falls fast first, and log-like, is in Cui et
    al. (2025), arXiv 2505.22617: 73 % of the fall in the first 200 of 2400 steps.

    Example:
        >>> step = np.arange(1.0, 101.0)
        >>> found = forecast_crossing(step, np.exp(-step / 50), 0.1)
        >>> found.status, round(found.step), found.model
        ('expected', 116, 'log H on step')
    """
    steps, known = _finite(step, entropy)
    made_at = float(steps[-1]) if len(steps) else np.nan
    known_for = made_at - float(steps[0]) if len(steps) else np.nan
    last = made_at + (REACH * known_for if horizon is None else horizon)

    def said(status: str, reason: str, *when: float, model: str = "") -> CrossingForecast:
        middle, low, high = when or (np.nan,) * 3
        return CrossingForecast(
            status, reason, middle, low, high, floor, made_at, last, model, level
        )

    crossed = _crossing(steps, known, floor)
    if crossed is not None and _median_of_last(known) < floor:
        reason = f"below {floor:g} nats since step {crossed:.0f}"
        return said("reached", reason, crossed, crossed, crossed)
    if len(steps) < LEAST_STEPS:
        return said("not identified", f"{len(steps)} steps measured, {LEAST_STEPS} are needed")
    if np.ptp(known) <= 1e-9 * np.abs(known).max():
        return said("not within the horizon", "entropy does not move", np.inf, np.inf, np.inf)
    places = _places(made_at, last)
    bundles = _bundles(steps, known, places, repetitions, seed)
    slopes = np.quantile(np.concatenate([one.slopes for one in bundles]), _edges(level))
    if slopes[0] <= 0 <= slopes[1] and slopes[0] < slopes[1]:
        return said("not identified", "entropy has no trend that is more than chance")
    paths = np.concatenate([one.paths for one in bundles])
    first = _first_below(places, paths, floor)
    low, middle, high = np.quantile(
        first, [_edges(level)[0], 0.5, _edges(level)[1]], method="nearest"
    )
    edges = np.quantile(paths, [_edges(level)[0], 0.5, _edges(level)[1]], axis=0)
    status = "expected" if np.isfinite(middle) else "not within the horizon"
    reason = (
        f"below {floor:g} nats around step {middle:.0f} ({level:.0%}: {low:.0f} to {_word(high)})"
        if status == "expected"
        else f"above {floor:g} nats until step {last:.0f} in most paths"
    )
    return CrossingForecast(
        status,
        reason,
        float(middle),
        float(low),
        float(high),
        floor,
        made_at,
        last,
        max(bundles, key=lambda one: len(one.paths)).curve.name,
        level,
        places,
        edges,
    )


def score_forecasts(
    step: NDArray[np.number],
    entropy: NDArray[np.floating],
    floor: float,
    at: Sequence[float] = (0.15, 0.3, 0.5),
    *,
    level: float = 0.9,
    repetitions: int = 400,
    seed: int = 0,
) -> list[ForecastScore]:
    """How good would forecasts of this run have been?

    The run is replayed: a forecast made at a share of its steps knows only what came before, and
    looks ahead to the run's end. It is scored against the first crossing after it. A crossing that
    did not come, or was not forecast, before the end counts as the end, so that a forecast of
    never and a run that never crossed agree exactly.

    Args:
        step: ``[n]`` increasing.
        entropy: ``[n]`` nats.
        floor: Nats.
        at: Shares of the run's steps.
        level: Of the intervals.
        repetitions: As in `forecast_crossing`.
        seed: As in `forecast_crossing`.

    Returns:
        A score for each share at which the floor was not already reached.

    Cost: that of a `forecast_crossing` for each share.

    Example:
        >>> step = np.arange(1.0, 301.0)
        >>> scores = score_forecasts(step, np.exp(-step / 100), 0.1)
        >>> [round(score.error) <= 1 for score in scores]
        [True, True, True]
    """
    steps, known = _finite(step, entropy)
    scores = []
    for share in at if len(steps) else ():
        first, last = float(steps[0]), float(steps[-1])
        past = steps <= first + share * (last - first)
        made_at = float(steps[past][-1])
        found = forecast_crossing(
            steps[past],
            known[past],
            floor,
            level=level,
            horizon=last - made_at,
            repetitions=repetitions,
            seed=seed,
        )
        if found.status == "reached":
            continue
        crossed = _crossing(steps, known, floor, after=made_at)
        actual = np.inf if crossed is None else crossed
        has = found.status != "not identified"
        scores.append(
            ForecastScore(
                share=share,
                forecast=found,
                actual=actual,
                error=abs(min(found.step, last) - min(actual, last)) if has else np.nan,
                is_inside=bool(found.low <= actual <= found.high) if has else None,
                persistence_error=last - min(actual, last),
                straight_line_error=abs(
                    min(_straight_line(steps[past], known[past], floor), last) - min(actual, last)
                ),
            )
        )
    return scores


@dataclass(frozen=True)
class _Curve:
    by_log_step: bool
    of_log: bool

    @property
    def name(self) -> str:
        return f"{'log H' if self.of_log else 'H'} on {'log step' if self.by_log_step else 'step'}"

    def time(self, steps: Floats) -> Floats:
        return np.log(np.maximum(steps, 1.0)) if self.by_log_step else steps

    def scaled(self, entropy: Floats) -> Floats:
        return np.log(entropy) if self.of_log else entropy

    def unscaled(self, values: Floats) -> Floats:
        return np.exp(np.minimum(values, 300.0)) if self.of_log else values


def _curves(entropy: Floats) -> list[_Curve]:
    scales = (False, True) if entropy.min() > 0 else (False,)
    return [_Curve(by, of) for by in (False, True) for of in scales]


def _finite(step: NDArray[np.number], entropy: NDArray[np.floating]) -> tuple[Floats, Floats]:
    steps, known = np.asarray(step, float), np.asarray(entropy, float)
    kept = np.isfinite(known)
    return steps[kept], known[kept]


def _edges(level: float) -> tuple[float, float]:
    return (1 - level) / 2, (1 + level) / 2


def _word(step: float) -> str:
    return f"{step:.0f}" if np.isfinite(step) else "beyond the horizon"


def _median_of_last(entropy: Floats) -> float:
    return float(np.median(entropy[-_MEDIAN:]))


def _crossing(
    steps: Floats, entropy: Floats, floor: float, after: float | None = None
) -> float | None:
    """The first step after one, or of the newest stretch, where the median of five is below."""
    if len(entropy) < _MEDIAN:
        return None
    windows = np.lib.stride_tricks.sliding_window_view(entropy, _MEDIAN)
    below = np.median(windows, axis=1) < floor
    middles = steps[_MEDIAN // 2 : len(steps) - _MEDIAN // 2]
    if after is not None:
        found = np.flatnonzero(below & (middles > after))
    else:
        above = np.flatnonzero(~below)
        found = (
            np.flatnonzero(below[above[-1] + 1 :]) + above[-1] + 1
            if above.size
            else (np.flatnonzero(below))
        )
    return float(middles[found[0]]) if found.size else None


def _error_on_last_third(curve: _Curve, steps: Floats, entropy: Floats) -> float:
    seen = len(steps) * 2 // 3
    x, y = curve.time(steps), curve.scaled(entropy)
    intercept, slope = straight(x[:seen], y[:seen])
    predicted = curve.unscaled(intercept + slope * x[seen:])
    return float(((predicted - entropy[seen:]) ** 2).mean())


def _places(made_at: float, last: float) -> Floats:
    """Whole steps ahead, closer together near the present."""
    apart = np.geomspace(1.0, max(last - made_at, 1.0), _PLACES)
    return made_at + np.unique(np.ceil(apart - 1e-9))


@dataclass(frozen=True, eq=False)
class _Bundle:
    """Paths of one curve."""

    curve: _Curve
    slopes: Floats
    paths: Floats


def _bundles(
    steps: Floats, entropy: Floats, places: Floats, repetitions: int, seed: int
) -> list[_Bundle]:
    """Paths of each curve, as many as it deserves by how it predicted the last third."""
    curves = _curves(entropy)
    errors = np.array([_error_on_last_third(one, steps, entropy) for one in curves])
    best = int(errors.argmin())
    line = fit_line(curves[best].time(steps), curves[best].scaled(entropy), repetitions=1)
    rho = max(line.memory, 0.0)
    told = len(steps) / 3 * (1 - rho) / (1 + rho)
    likelihood = np.maximum(errors / max(errors[best], 1e-300), 1.0) ** (-told / 2)
    shares = np.round(repetitions * likelihood / likelihood.sum()).astype(int)
    bundles = []
    for curve, share in zip(curves, shares, strict=True):
        if share:
            x, y = curve.time(steps), curve.scaled(entropy)
            drawn = fit_line(x, y, repetitions=int(share), seed=seed)
            bundles.append(
                _Bundle(curve, drawn.draws[:, 1], _paths(curve, drawn, steps, places, seed))
            )
    return bundles


def _paths(curve: _Curve, line: Line, steps: Floats, places: Floats, seed: int) -> Floats:
    """``[repetitions, m]`` entropies ahead."""
    between = float(np.median(np.diff(steps)))
    remembered = max(line.memory, 0.0) ** ((places - steps[-1]) / between)
    windows = np.lib.stride_tricks.sliding_window_view(line.residuals, _MEDIAN)
    levels = np.median(windows, axis=1)
    drawn = np.random.default_rng(seed + 1).choice(levels, len(line.draws))
    now = curve.time(steps[-1:])
    newest = line.intercept + line.slope * now + line.residuals[-1]
    off = newest - line.draws[:, :1] - line.draws[:, 1:] * now
    noise = remembered * off + np.sqrt(1 - remembered**2) * drawn[:, None]
    trend = line.draws[:, :1] + line.draws[:, 1:] * curve.time(places)
    return curve.unscaled(trend + noise)


def _first_below(places: Floats, paths: Floats, floor: float) -> Floats:
    """``[repetitions]`` the first step below the floor, infinite where there is none."""
    below = paths < floor
    at = below.argmax(1)
    before = np.maximum(at - 1, 0)
    row = np.arange(len(paths))
    high, low = paths[row, before], paths[row, at]
    share = np.where(at > before, (high - floor) / np.where(high > low, high - low, 1.0), 1.0)
    crossed = np.ceil(places[before] + share * (places[at] - places[before]))
    return np.where(below.any(1), crossed, np.inf)


def _straight_line(steps: Floats, entropy: Floats, floor: float) -> float:
    """Where a straight line through all values crosses; infinite where it does not fall."""
    intercept, slope = straight(steps, entropy)
    return max(float((floor - intercept) / slope), float(steps[-1])) if slope < 0 else np.inf
