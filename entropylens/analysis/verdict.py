"""Is a run in trouble? One level and one sentence, for a list of runs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from entropylens.analysis.alarms import Alarm
from entropylens.analysis.lasting import LEAST_VALUES, left_range
from entropylens.analysis.overview import Curve, number
from entropylens.analysis.rank_divergence import RankDivergence
from entropylens.analysis.rank_divergence_words import loss_reason, parted_reason
from entropylens.analysis.spikes import Spike
from entropylens.figures.thinning import kept

__all__ = ["Series", "Verdict", "judge"]

FAR: Final = 0.2
"""Rise, as a share of the usual value, from which a loss that is out counts as failing."""
SMALL: Final = 0.01
"""Rise, as a share of the loss of the first tenth of the run, below which no loss is out."""
POLICY_RISE: Final = 1.0
"""Least rise of the loss of a run with a reward: policy losses lie near 0, within about 0.1."""
COLLAPSED: Final = 0.1
"""Nats, and share of its early level, that a collapsed entropy is below."""
BACK: Final = 0.1
"""Share of its best level by which a loss or reward that slid back is worse."""
GRADIENT_FACTOR: Final = 10.0
LONGEST: Final = 100
"""Characters of a reason."""

_NAMES: Final = {
    "loss/mean": "loss",
    "reward/mean": "reward",
    "entropy/token/mean": "entropy",
    "gradient/norm/before_clip": "gradient",
}
_MAIN: Final = ("loss", "reward", "entropy")
_IN_A_PART: Final = 5
"""Values that a part needs before its median is compared."""

_Part = tuple[float, float]
"""First and last step of a part, as shares of the step range."""
_FIRST: Final[_Part] = (0.0, 0.1)
_LAST: Final[_Part] = (0.9, 1.0)


class Series(Protocol):
    """What is judged."""

    @property
    def steps(self) -> NDArray[np.int64]:
        """Optimiser steps, increasing."""

    @property
    def values(self) -> NDArray[np.float64]:
        """One value a step."""


@dataclass(frozen=True)
class Verdict:
    """How a run does."""

    level: str
    """healthy, watch, failing or unknown."""
    reason: str
    """One sentence of at most 100 characters."""


def judge(
    state: str,
    ended_because: str,
    series: Mapping[str, Series],
    alarms: Sequence[Alarm] = (),
    ranks: RankDivergence | None = None,
) -> Verdict:
    """Is the run in trouble?

    The first of these that holds:

    - failing: the run failed or crashed; an alarm of severity error is open; the newest loss,
      reward or entropy is not finite; the loss left its usual range upwards (the reward downwards),
      as `find_spikes` sees it, has been out for 10 values, by more than chance, and is 20 % off;
      norms that were equal on all ranks are not any more; the run is stalled.
    - watch: the run was terminated; the loss or reward is out, but by less than 20 %; the median of
      its last tenth is worse than that of its best by 10 % and 3 times the spread of either; the
      entropy collapsed; an alarm of severity warning is open; the loss was once not finite; the
      median gradient norm of the last tenth is above 10 times the median before; the loss of one
      rank has left those of the others to the end.
    - unknown: fewer than 25 finite values.
    - healthy: otherwise.

    Where there is a reward, the loss is a policy's: it lies near 0, often begins at exactly 0, and
    does not tell how good the policy is, so it must rise by 1 to count as out. Any other must rise
    by 1 % of what it was at first: a loss that is nearly 0 may well become three times as high. The
    10 values are out by chance if their mean differs from that of the 25 values before the range
    was left by less than 3 standard errors: a reward of few levels has too narrow a usual range.

    The entropy collapsed if the median of its last tenth is below 10 % of that of its first tenth
    and below 0.1 nats. Or if the median of its last twentieth is less than half that of the last
    tenth but one, and 0.1 nats lower. A supervised loss that fell along excuses it (to half, in the
    second case to three quarters): such a model is sure because it is right. In the second case a
    reward that rose by more than its spread (its MAD) does too: the policy has found something.

    Weaknesses: these are plain thresholds, chosen by reason and tried on made-up series, not
    calibrated alarms. A slow slide is seen late. A lasting change of the data, and for a while a
    learning rate that starts anew, look like a loss that left its range or slid back. Learning by
    heart and collapse are told apart by the loss alone. In a long run the 10 values are of a
    thinned series, about 1 % of the run's steps.

    A series of more than 2,000 values is first thinned as figures thin it, so that a series and its
    thinned form get the same verdict. Of one of more than 500 points, whose minima and maxima
    hide a small rise, the medians of stretches of about four points are looked at too.

    Args:
        state: As `Run.state` says.
        ended_because: The reason that the status gives; may be empty.
        series: By metric name: ``loss/mean``, ``reward/mean``, ``entropy/token/mean`` and
            ``gradient/norm/before_clip``; any may be missing or empty, others are not read.
        alarms: From `entropylens.analysis.alarms.open_alarms`.
        ranks: From `entropylens.analysis.rank_divergence.read_rank_divergence`.

    Returns:
        The verdict.

    Cost: about 0.1 s for a loss of 2,000 points or more.

    Example:
        >>> loss = Curve("loss/mean", np.arange(40), np.linspace(4.0, 2.0, 40))
        >>> judge("running", "", {"loss/mean": loss})
        Verdict(level='healthy', reason='loss 2.08, at first 3.92')
    """
    named = {_NAMES[name]: one for name, one in series.items() if name in _NAMES and len(one.steps)}
    curves = {name: _thinned(name, one) for name, one in named.items()}
    seen = _Seen(state, ended_because, curves, tuple(alarms), ranks)
    for level, checks in (("failing", _FAILING), ("watch", _WATCH)):
        reason = next(filter(None, (check(seen) for check in checks)), "")
        if reason:
            return Verdict(level, _short(reason))
    main = next((curves[name] for name in _MAIN if name in curves), None)
    count = 0 if main is None else int(np.isfinite(main.values).sum())
    if count < LEAST_VALUES:
        return Verdict("unknown", f"too early to say: {count} value{'s' * (count != 1)}")
    return Verdict("healthy", _short(_course(seen)))


@dataclass(frozen=True)
class _Seen:
    state: str
    because: str
    curves: dict[str, Curve]
    alarms: tuple[Alarm, ...]
    ranks: RankDivergence | None = None

    @cached_property
    def out(self) -> list[tuple[str, Spike, float]]:
        """What left its range for good: name, spike, recent level; of a reward upside down."""
        found = []
        for name, sign in (("loss", 1.0), ("reward", -1.0)):
            left = left_range(self.curves[name], sign) if name in self.curves else None
            if left is not None:
                too_little = left[1] - left[0].usual < self.least_rise(name)
                found += [] if too_little else [(name, *left)]
        return found

    def least_rise(self, name: str) -> float:
        if name != "loss":
            return 0.0
        return POLICY_RISE if "reward" in self.curves else SMALL * abs(self.level(name, _FIRST))

    def level(self, name: str, part: _Part, least: int = 1) -> float:
        """Median of the finite values of a part; NaN of too few, which no comparison holds for."""
        inside = self.inside(name, part)
        return float(np.median(inside)) if len(inside) >= least else np.nan

    def inside(self, name: str, part: _Part) -> NDArray[np.float64]:
        """The finite values of a part."""
        if name not in self.curves:
            return np.zeros(0)
        steps, values = self.curves[name].steps, self.curves[name].values
        place = (steps - float(steps[0])) / max(float(steps[-1]) - float(steps[0]), 1.0)
        return values[(place >= part[0]) & (place <= part[1]) & np.isfinite(values)]


def _thinned(name: str, one: Series) -> Curve:
    steps, values = np.asarray(one.steps), np.asarray(one.values, dtype=np.float64)
    chosen = kept(steps, values)
    return Curve(name, steps[chosen], values[chosen])


# -- checks: an empty reason is none -------------------------------------------------------------


def _ended_badly(seen: _Seen) -> str:
    said = {"failed": "the run failed", "crashed": "the process is gone without a word"}
    return _because(said.get(seen.state, ""), seen.because)


def _is_not_finite(seen: _Seen) -> str:
    for name in _MAIN:
        if name in seen.curves and not np.isfinite(seen.curves[name].values[-1]):
            steps, values = seen.curves[name].steps, seen.curves[name].values
            finite = np.flatnonzero(np.isfinite(values))
            since = int(steps[finite[-1] + 1 if finite.size else 0])
            return f"the {name} is {number(values[-1])} since step {since:,}"
    return ""


def _is_far_out(seen: _Seen) -> str:
    far = [one for one in seen.out if one[2] - one[1].usual >= FAR * abs(one[1].usual)]
    return _out(*far[0]) if far else ""


def _is_out(seen: _Seen) -> str:
    return _out(*seen.out[0]) if seen.out else ""


def _slid_back(seen: _Seen) -> str:
    """Is the last tenth worse than the best tenth, by more than chance?"""
    name, sign = ("reward", -1.0) if "reward" in seen.curves else ("loss", 1.0)
    parts = [(tenth / 10, (tenth + 1) / 10) for tenth in range(10)]
    levels = np.array([seen.level(name, part, _IN_A_PART) for part in parts])
    if np.isnan(levels).any():
        return ""
    best = int(np.argmin(sign * levels))
    spread = max(_spread(seen.inside(name, parts[at])) for at in (best, -1))
    least = max(BACK * abs(levels[best]), 3 * spread, seen.least_rise(name))
    if not sign * (levels[-1] - levels[best]) > least:
        return ""
    steps = seen.curves[name].steps
    around = round(float(steps[0]) + (best + 0.5) / 10 * (float(steps[-1]) - float(steps[0])))
    was, now = number(float(levels[best])), number(float(levels[-1]))
    return f"the {name} is {now} and was {was} at its best, around step {around:,}"


def _spread(values: NDArray[np.float64]) -> float:
    return float(np.median(np.abs(values - np.median(values))))


def _stalled(seen: _Seen) -> str:
    return "the step has not moved for ten minutes" if seen.state == "stalled" else ""


def _terminated(seen: _Seen) -> str:
    said = "the run was terminated" if seen.state == "terminated" else ""
    return _because(said, seen.because)


def _collapsed(seen: _Seen) -> str:
    early, now = (seen.level("entropy", part, _IN_A_PART) for part in (_FIRST, _LAST))
    if not now < min(COLLAPSED, COLLAPSED * early) or _loss_fell(seen, _FIRST, _LAST, 0.5):
        return ""
    return f"the entropy collapsed from {number(early)} to {number(now)} nats"


def _fell_suddenly(seen: _Seen) -> str:
    before, after = (0.8, 0.9), (0.95, 1.0)
    was, now = (seen.level("entropy", part, _IN_A_PART) for part in (before, after))
    if not now < min(0.5 * was, was - COLLAPSED):
        return ""
    if _loss_fell(seen, before, after, 0.75) or _reward_rose(seen, before, after):
        return ""
    return f"the entropy fell from {number(was)} to {number(now)} nats in the last tenth of the run"


def _was_not_finite(seen: _Seen) -> str:
    loss = seen.curves.get("loss")
    wild = [] if loss is None else loss.steps[~np.isfinite(loss.values)].tolist()
    return f"the loss was NaN or infinite at step {wild[0]:,} and came back" if wild else ""


def _gradient_rose(seen: _Seen) -> str:
    was, now = (seen.level("gradient", part, _IN_A_PART) for part in ((0.0, 0.9), _LAST))
    if not 0 < GRADIENT_FACTOR * was < now:
        return ""
    return f"the median gradient norm rose from {number(was)} to {number(now)}"


def _error(seen: _Seen) -> str:
    return _alarm(seen, "error")


def _warning(seen: _Seen) -> str:
    return _alarm(seen, "warning")


def _ranks_parted(seen: _Seen) -> str:
    return "" if seen.ranks is None else parted_reason(seen.ranks)


def _rank_is_off(seen: _Seen) -> str:
    return "" if seen.ranks is None else loss_reason(seen.ranks)


_Checks = tuple[Callable[[_Seen], str], ...]
_FAILING: Final[_Checks] = (
    _ended_badly,
    _error,
    _is_not_finite,
    _ranks_parted,
    _is_far_out,
    _stalled,
)
_WATCH: Final[_Checks] = (
    _terminated,
    _is_out,
    _slid_back,
    _collapsed,
    _fell_suddenly,
    _warning,
    _was_not_finite,
    _gradient_rose,
    _rank_is_off,
)


# -- excuses and words ---------------------------------------------------------------------------


def _loss_fell(seen: _Seen, before: _Part, after: _Part, share: float) -> bool:
    """Did the loss fall too? A policy's, or one near 0 as theirs are, tells nothing."""
    was, now = seen.level("loss", before), seen.level("loss", after)
    return "reward" not in seen.curves and was > COLLAPSED and now < share * was


def _reward_rose(seen: _Seen, before: _Part, after: _Part) -> bool:
    was = seen.inside("reward", before)
    middle = seen.level("reward", before)
    return was.size > 0 and seen.level("reward", after) > middle + np.median(np.abs(was - middle))


def _out(name: str, spike: Spike, level: float) -> str:
    sign = -1 if name == "reward" else 1
    was, now = number(sign * spike.usual + 0.0), number(sign * level + 0.0)  # no "-0"
    return (
        f"the {name} left its range at step {spike.start:,}, from {was} to {now}, and is not back"
    )


def _alarm(seen: _Seen, severity: str) -> str:
    alarm = next((one for one in seen.alarms if one.severity == severity), None)
    return "" if alarm is None else f"{alarm.rule} at step {alarm.step:,}: {alarm.message}"


def _because(said: str, reason: str) -> str:
    return f"{said}: {reason}" if said and reason else said


def _course(seen: _Seen) -> str:
    said = []
    for name, unit in (("reward" if "reward" in seen.curves else "loss", ""), ("entropy", " nats")):
        first, last = seen.level(name, _FIRST), seen.level(name, _LAST)
        if np.isfinite([first, last]).all():
            said.append(f"{name} {number(last)}{unit}, at first {number(first)}")
    return "; ".join(said) or "nothing speaks against it"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else line[: LONGEST - 1].rstrip() + "…"
