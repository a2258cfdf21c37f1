"""The law that ties reward to entropy, R = -a e^H + b, and whether a run shows it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from entropylens.dictionary import Metric
from entropylens.rules.blocks import Floats, Line, fit_line, straight

__all__ = ["METRICS", "EntropyLaw", "fit_entropy_law", "pair_by_step"]

LEAST_STEPS: Final = 30
"""Pairs below which nothing is said; the paper fits the first 36 steps."""
LEAST_SPREAD: Final = 0.02
"""Nats between the 5 % and the 95 % quantile of H below which entropy hardly moved."""
WANDERING: Final = 8.0
"""Residuals with a memory above 1 - 8/n wander as a random walk does."""
_FOLDS: Final = 5
_COSINES: Final = 4
_HIGHEST: Final = 300.0
"""Nats; e^H is no longer a number that can be squared. Sums over sequences reach it."""


def _metric(question: str, formula: str, high: str, low: str, unit: str = "1") -> Metric:
    return Metric(
        question=question,
        formula=formula,
        unit=unit,
        estimator="least squares over all steps so far of rank 0 that have entropy and reward, "
        "refitted at most every 25 of them and every ten seconds; intervals at 95 % by a moving-"
        "block bootstrap of the whitened residuals; a resumed run begins anew",
        high=high,
        low=low,
        cost="7 ms a fit of 1000 steps on one CPU core",
        source="Cui et al. (2025), arXiv 2505.22617, Eq. 6; intervals, and the test against time, "
        "are ours",
    )


METRICS: Final[Mapping[str, Metric]] = {
    "law/ceiling/estimate": _metric(
        "Which reward will be left when the entropy is used up?",
        "b - a of R = -a e^H + b",
        "there is still reward to be bought with entropy",
        "this run is near its end, unless something gives entropy back",
        "reward",
    ),
    "law/ceiling/low": _metric(
        "Which reward is reached at least when the entropy is used up?",
        "2.5 % edge of the interval of b - a",
        "as law/ceiling/estimate",
        "as law/ceiling/estimate, or little is known yet",
        "reward",
    ),
    "law/ceiling/high": _metric(
        "Which reward is reached at most when the entropy is used up?",
        "97.5 % edge of the interval of b - a",
        "as law/ceiling/estimate, or little is known yet",
        "as law/ceiling/estimate",
        "reward",
    ),
    "law/slope": _metric(
        "How much reward does entropy buy?",
        "a of R = -a e^H + b",
        "each unit of e^H given up brings much reward",
        "about 0: entropy is lost for nothing; below 0: reward falls with it",
        unit="reward per unit of e^H",
    ),
    "law/r_squared": _metric(
        "How much of the reward's course does entropy explain?",
        "1 - sum (R + a e^H - b)^2 / sum (R - mean R)^2",
        "the two go together; so do any two series that drift: see law/identified",
        "reward is noise about the law, or does not follow it",
    ),
    "law/identified": _metric(
        "Does this run show the law at all?",
        "1 if all hold: 5 % and 95 % quantiles of H are 0.02 nats apart; the interval of a lies "
        "above 0; so does that of a fitted to what smooth courses of time leave of R and e^H "
        "(straight lines and four cosines each in step and log(step)); the noise about the law "
        "has a lag-1 autocorrelation below 1 - 8/n; left out in turn, each fifth of the run is "
        "predicted better by the law than by lines in step and log(step); else 0",
        "1: reward follows entropy's ups and downs too, not only its trend; ceiling and slope may "
        "be read",
        "0: they are numbers without meaning; report and events say why; a true law stays unseen "
        "where entropy falls so smoothly, or is so noisily measured, that time explains as much",
    ),
}


@dataclass(frozen=True)
class EntropyLaw:
    """A fit of R = -a e^H + b."""

    a: float
    """How much reward one unit of e^H costs; NaN where nothing could be fitted."""
    b: float
    ceiling: float
    """b - a: the reward at entropy 0, when nothing is left to trade."""
    a_interval: tuple[float, float]
    b_interval: tuple[float, float]
    ceiling_interval: tuple[float, float]
    detrended_interval: tuple[float, float]
    """Of a, from what smooth courses of time leave of reward and e^H."""
    residual_std: float
    """Of the reward about the law, ddof 2."""
    r_squared: float
    time_r_squared: float
    """Of the better of R = c + d step and R = c + d log(step), which know only time."""
    prediction_error: float
    """Root mean square error on fifths of the run that the fit did not see."""
    time_prediction_error: float
    """The same of the better of the two that know only time."""
    verdict: str
    """``identified`` or ``not identified``."""
    reason: str
    """Why, in words."""
    steps: int
    """Pairs of entropy and reward behind the fit."""
    lowest_entropy: float
    """Nats; the ceiling is extrapolated from there."""
    level: float
    line: Line | None = field(default=None, repr=False, compare=False)
    """Of R on e^H, with the bootstrap's draws."""

    @property
    def is_identified(self) -> bool:
        """Whether the run shows the law."""
        return self.verdict == "identified"

    def band(self, entropy: NDArray[np.floating]) -> tuple[Floats, Floats, Floats]:
        """What reward does the law give at these entropies?

        Args:
            entropy: ``[m]`` nats.

        Returns:
            The law, and the low and the high edge of its pointwise interval at `level`, ``[m]``
            each. It is the law's: single rewards scatter about it by `residual_std` too.

        Raises:
            ValueError: Nothing could be fitted.
        """
        if self.line is None:
            raise ValueError(f"EntropyLaw.band: expected a fit, got none: {self.reason}")
        x = np.exp(np.asarray(entropy, float))
        drawn = self.line.draws[:, :1] + self.line.draws[:, 1:] * x
        low, high = np.quantile(drawn, _edges(self.level), axis=0)
        return self.b - self.a * x, low, high


def fit_entropy_law(
    entropy: NDArray[np.floating],
    reward: NDArray[np.floating],
    *,
    step: NDArray[np.number] | None = None,
    block: int | None = None,
    repetitions: int = 400,
    level: float = 0.95,
    seed: int = 0,
) -> EntropyLaw:
    """Is this run's reward bought with its entropy, and where does that end?

    ``R = -a e^H + b`` by least squares of R on e^H; the ceiling is b - a. Intervals are of
    `entropylens.rules.blocks.fit_line`. ``identified`` is said only if

    - there are 30 pairs, and the 5 % and 95 % quantiles of H are at least 0.02 nats apart;
    - a is positive, and its interval does not hold 0;
    - the noise about the law dies out: its `memory` is below 1 - 8/n, for two series that wander
      on their own leave residuals that wander too;
    - fitted without a fifth of the run, the law predicts that fifth (all five in turn) better than
      R = c + d step and R = c + d log(step) do;
    - a is positive also beside smooth courses of time: straight lines and four cosines, each in
      step and in log(step), are taken out of R and of e^H, and the interval of a line through what
      is left does not hold 0. Both series of a run drift, and two drifts always correlate: where
      time alone explains as much, entropy has explained nothing.

    So a law shows by reward following entropy's ups and downs. Of 48 pairs of smooth courses with
    nothing but time in common at most 3 % are called a law in runs of 40 to 2000 steps; without the
    last condition 8 to 23 %, and nine in ten for some pairs. The price: where the noise of R is
    0.03 and entropy's own is 0.05, 0.02 or 0.01 nats, 100, 55 and 11 % of true laws are told from
    300 steps.

    H is taken as exact. Noise in H (few tokens) makes a too small, and the ceiling too low.

    Args:
        entropy: ``[n]`` mean token entropy H, nats, in the order of time.
        reward: ``[n]`` mean reward of the same steps. Pairs that are not finite are left out.
        step: ``[n]`` increasing; by default 1 .. n.
        block: Length of the bootstrap's blocks; by default chosen from the data.
        repetitions: Of the bootstrap.
        level: Of the intervals.
        seed: Of the bootstrap.

    Returns:
        The fit and the verdict.

    Cost: 7 ms for 1000 pairs and 400 repetitions on one CPU core.
    Source: Cui et al. (2025), arXiv 2505.22617, Eq. 6. The paper gives no interval and no test
    against time.

    Example:
        >>> entropy = np.geomspace(1.5, 0.1, 50)
        >>> law = fit_entropy_law(entropy, 0.6 - 0.2 * np.exp(entropy))
        >>> law.verdict, round(law.ceiling, 9)
        ('identified', 0.4)
    """
    known, rewards = np.asarray(entropy, float), np.asarray(reward, float)
    steps = np.arange(1.0, len(known) + 1) if step is None else np.asarray(step, float)
    kept = np.isfinite(known) & np.isfinite(rewards) & (known < _HIGHEST)
    known, rewards, steps = known[kept], rewards[kept], steps[kept]
    if len(known) < LEAST_STEPS:
        return _unfitted(f"{len(known)} steps with both, {LEAST_STEPS} are needed", known, level)
    low, high = np.quantile(known, [0.05, 0.95])
    if high - low < LEAST_SPREAD:
        return _unfitted(f"entropy hardly moved: {high - low:.2g} nats", known, level)
    if np.ptp(rewards) <= 1e-12 * np.abs(rewards).max():
        return _unfitted("reward never moved", known, level)
    x = np.exp(known)
    line = fit_line(x, rewards, block=block, repetitions=repetitions, seed=seed)
    edges = np.quantile(line.draws, _edges(level), axis=0)
    ceilings = np.quantile(line.draws.sum(1), _edges(level))
    past = steps - steps[0] + 1
    rivals = np.log(past), past
    error = _prediction_error(x, rewards)
    rival_error = min(_prediction_error(rival, rewards) for rival in rivals)
    a_interval = (float(-edges[1, 1]), float(-edges[0, 1]))
    detrended = _detrended_interval(x, rewards, past, repetitions, level, seed)
    reason = _objection(line, a_interval, detrended, error, rival_error)
    return EntropyLaw(
        a=-line.slope,
        b=line.intercept,
        ceiling=line.intercept + line.slope,
        a_interval=a_interval,
        b_interval=(float(edges[0, 0]), float(edges[1, 0])),
        ceiling_interval=(float(ceilings[0]), float(ceilings[1])),
        detrended_interval=detrended,
        residual_std=float(np.sqrt(line.residuals @ line.residuals / (len(x) - 2))),
        r_squared=_r_squared(x, rewards),
        time_r_squared=max(_r_squared(rival, rewards) for rival in rivals),
        prediction_error=error,
        time_prediction_error=rival_error,
        verdict="not identified" if reason else "identified",
        reason=reason
        or f"fifths of the run are predicted with an error of {error:.3g} from the others, by time "
        f"alone with {rival_error:.3g}",
        steps=len(x),
        lowest_entropy=float(known.min()),
        level=level,
        line=line,
    )


def pair_by_step(
    entropy_step: NDArray[np.number],
    entropy: NDArray[np.floating],
    reward_step: NDArray[np.number],
    reward: NDArray[np.floating],
) -> tuple[Floats, Floats, Floats]:
    """Which entropy belongs to which reward?

    A rollout's reward goes with the mean of the finite entropies measured from its step until the
    next rollout's, but no further than the median distance between rollouts.

    Args:
        entropy_step: ``[n]`` increasing.
        entropy: ``[n]`` nats.
        reward_step: ``[m]`` increasing.
        reward: ``[m]``.

    Returns:
        Steps, entropies and rewards of those that have both.

    Example:
        >>> pair_by_step(np.array([1, 2, 3, 4]), np.array([1.0, 2.0, 3.0, 5.0]),
        ...              np.array([1, 3]), np.array([0.1, 0.2]))
        (array([1., 3.]), array([1.5, 4. ]), array([0.1, 0.2]))
    """
    rewarded = np.isfinite(reward)
    starts, rewards = np.asarray(reward_step, float)[rewarded], np.asarray(reward, float)[rewarded]
    measured = np.isfinite(entropy)
    at, known = np.asarray(entropy_step, float)[measured], np.asarray(entropy, float)[measured]
    if not len(starts):
        return np.zeros(0), np.zeros(0), np.zeros(0)
    reach = float(np.median(np.diff(starts))) if len(starts) > 1 else 1.0
    owner = np.searchsorted(starts, at, side="right") - 1
    belongs = (owner >= 0) & (at - starts[np.maximum(owner, 0)] < reach)
    counts = np.bincount(owner[belongs], minlength=len(starts))
    sums = np.bincount(owner[belongs], known[belongs], minlength=len(starts))
    has = counts > 0
    return starts[has], sums[has] / counts[has], rewards[has]


def _edges(level: float) -> list[float]:
    return [(1 - level) / 2, (1 + level) / 2]


def _smooth_courses(past: Floats) -> Floats:
    """``[n, m]`` orthonormal columns that span a constant and smooth courses of time."""
    columns = [np.ones(len(past))]
    for time in (past - 1, np.log(past)):
        share = time / time[-1]
        columns += [share, *(np.cos(np.pi * j * share) for j in range(1, _COSINES + 1))]
    spanned, scale, _ = np.linalg.svd(np.column_stack(columns), full_matrices=False)
    return spanned[:, scale > 1e-9 * scale[0]]


def _detrended_interval(
    x: Floats, y: Floats, past: Floats, repetitions: int, level: float, seed: int
) -> tuple[float, float]:
    """Of a, from what smooth courses of time leave; NaN where they leave nothing of x."""
    courses = _smooth_courses(past)
    left, paid = (series - courses @ (courses.T @ series) for series in (x, y))
    if np.sqrt(left @ left) <= 1e-9 * np.sqrt(x @ x):
        return np.nan, np.nan
    parameters = courses.shape[1] + 1
    line = fit_line(left, paid, repetitions=repetitions, seed=seed, parameters=parameters)
    low, high = np.quantile(line.draws[:, 1], _edges(level))
    return float(-high), float(-low)


def _objection(
    line: Line,
    interval: tuple[float, float],
    detrended: tuple[float, float],
    error: float,
    rival_error: float,
) -> str:
    a, count = -line.slope, len(line.residuals)
    if interval[1] < 0:
        return f"the reward falls where the law has it rise: a = {a:.3g}"
    if interval[0] <= 0:
        return f"a = {a:.3g} may be 0: interval {interval[0]:.3g} to {interval[1]:.3g}"
    is_exact = error <= 1e-9 * max(abs(a), 1e-300)
    if line.memory > 1 - WANDERING / count and not is_exact:
        return f"the noise about the law does not die out: memory {line.memory:.3g}"
    if error >= rival_error:
        return f"time alone explains as much: error {rival_error:.3g}, the law's {error:.3g}"
    if np.isnan(detrended[0]):
        return "time alone explains as much: entropy is a smooth course of it"
    if detrended[0] <= 0:
        return (
            "time alone explains as much: beside smooth courses of it a may be 0: interval "
            f"{detrended[0]:.3g} to {detrended[1]:.3g}"
        )
    return ""


def _prediction_error(x: Floats, y: Floats) -> float:
    """Root mean square error on each contiguous fifth of a line through the other four."""
    total = 0.0
    for fold in np.array_split(np.arange(len(x)), _FOLDS):
        seen = np.ones(len(x), bool)
        seen[fold] = False
        intercept, slope = straight(x[seen], y[seen])
        total += float(((y[fold] - intercept - slope * x[fold]) ** 2).sum())
    return float(np.sqrt(total / len(x)))


def _r_squared(x: Floats, y: Floats) -> float:
    intercept, slope = straight(x, y)
    left = y - intercept - slope * x
    return 1 - float(left @ left) / float(((y - y.mean()) ** 2).sum())


def _unfitted(reason: str, entropy: Floats, level: float) -> EntropyLaw:
    nothing = (np.nan, np.nan)
    return EntropyLaw(
        *(np.nan,) * 3,
        *(nothing,) * 4,
        *(np.nan,) * 5,
        verdict="not identified",
        reason=reason,
        steps=len(entropy),
        lowest_entropy=float(entropy.min()) if len(entropy) else np.nan,
        level=level,
    )
