"""`Followers`: what the rules make of a run's numbers while it trains."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import isfinite
from time import perf_counter
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from entropylens.rules.agreement import Agreement
from entropylens.rules.entropy_law import LEAST_STEPS, EntropyLaw, fit_entropy_law, pair_by_step
from entropylens.rules.forecast import FLOOR, CrossingForecast, forecast_crossing

__all__ = ["Followed", "Followers"]

EVERY: Final = 25
"""Measured steps between two fits at least."""
SECONDS: Final = 10.0
"""Between two fits at least."""
SHARE: Final = 0.003
"""Of wall time that fits take at most: after a slow one the next waits longer."""
REPETITIONS: Final = 200
_ENTROPY: Final = "entropy/token/mean"
_OWN: Final = {_ENTROPY: "mean", "entropy/token/std": "std", "entropy/token/count": "count"}
_THEIRS: Final = "framework/entropy"
_REWARDS: Final = ("reward/mean", "framework/reward")
"""The first that has come is taken."""
_FOLLOWED: Final = frozenset({*_OWN, _THEIRS, *_REWARDS})
_BINS: Final = 2048
_WAITING: Final = 256
"""Steps whose entropy waits for the framework's."""


@dataclass(frozen=True)
class Followed:
    """What is to be written."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    step: int = 0
    """Of the metrics."""
    events: list[dict[str, Any]] = field(default_factory=list)
    """Arguments of `RunWriter.event`."""


class Followers:
    """Follows delivered metrics, refits law and forecast now and then, and says what changed.

    A verdict is told once two fits in a row agree on it. Nothing is forecast for a run without a
    reward: a supervised model that grows sure is right. Only the past is read.

    Args:
        clock: Seconds.

    Cost: microseconds a row; a fit of 1000 steps takes about 25 ms, at most once in ten seconds.
    """

    def __init__(self, clock: Callable[[], float] = perf_counter) -> None:
        self.checks_framework_entropy = False
        """Whether ``framework/entropy`` is one step's mean over one process's tokens, so that it
        can be compared with ours."""
        self._clock = clock
        self._entropy = _Course()
        self._rewards = {name: _Course() for name in _REWARDS}
        self._agreement = Agreement()
        self._own: dict[int, dict[str, float]] = {}
        self._theirs: dict[int, float] = {}
        self._measured, self._next_at = 0, -np.inf
        self._law = _Told("not identified")
        self._forecast = _Told("not identified")

    def follow(self, columns: Mapping[str, Any]) -> Followed:
        """Take delivered rows of the metrics table.

        Args:
            columns: On the host: each an array or list with one value a row, or one for all.

        Returns:
            What the rules say now; mostly nothing.
        """
        for name, step, phase, value, weight in _rows(columns):
            self._take(name, step, phase, value, weight)
        events = self._compared() if self.checks_framework_entropy else []
        if self._measured < EVERY or self._clock() < self._next_at:
            return Followed(events=events)
        began = self._clock()
        metrics, told = self._refitted()
        ended = self._clock()
        self._measured = 0
        self._next_at = ended + max(SECONDS, (ended - began) / SHARE)
        return Followed(metrics, self._entropy.last, events + told)

    def _take(self, name: str, step: int, phase: str, value: float, weight: float) -> None:
        if phase == "eval":
            return
        if name in _REWARDS:
            self._rewards[name].add(step, value)
        elif phase != "train":
            return
        elif name == _THEIRS:
            if self.checks_framework_entropy:
                self._theirs[step] = value
        else:
            if name == _ENTROPY:
                self._entropy.add(step, value)
                self._measured += 1
            if self.checks_framework_entropy:
                own = self._own.setdefault(step, {})
                own |= {_OWN[name]: value, "weight": weight}

    def _compared(self) -> list[dict[str, Any]]:
        events = []
        for step in sorted(self._own.keys() & self._theirs.keys()):
            own = self._own[step]
            if own.keys() >= {"mean", "std", "count"}:
                del self._own[step]
                is_complete = own["count"] >= own["weight"] - 0.5
                found = self._agreement.compare(
                    step, own["mean"], own["std"], own["count"], is_complete, self._theirs.pop(step)
                )
                events += [] if found is None else [found]
        for waiting in (self._own, self._theirs):
            for step in sorted(waiting)[:-_WAITING]:
                del waiting[step]
        return events

    def _refitted(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        reward = next((one for one in self._rewards.values() if len(one)), None)
        if reward is None:
            return {}, []
        step = self._entropy.last
        pairs = pair_by_step(*self._entropy.arrays(), *reward.arrays())
        law = fit_entropy_law(pairs[1], pairs[2], step=pairs[0], repetitions=REPETITIONS)
        found = forecast_crossing(*self._entropy.arrays(), FLOOR, repetitions=REPETITIONS)
        events = [*self._law.events(*_said_of_law(law), step)]
        events += self._forecast.events(*_said_of_forecast(found), step)
        return {**_law_metrics(law), **_forecast_metrics(found)}, events


class _Course:
    """A series in at most 2048 bins of steps; when they are full, neighbours become one."""

    def __init__(self) -> None:
        self._width = 1
        self._bins: dict[int, tuple[float, int]] = {}
        self.last = 0

    def __len__(self) -> int:
        return len(self._bins)

    def add(self, step: int, value: float) -> None:
        if isfinite(value):
            self.last = max(self.last, step)
            self._put(step // self._width, value, 1)
            while len(self._bins) > _BINS:
                old, self._width, self._bins = self._bins, 2 * self._width, {}
                for at, (total, count) in old.items():
                    self._put(at // 2, total, count)

    def arrays(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """First step of each bin, and mean."""
        ordered = sorted(self._bins.items())
        steps = np.array([at * self._width for at, _ in ordered], float)
        return steps, np.array([total / count for _, (total, count) in ordered])

    def _put(self, at: int, total: float, count: int) -> None:
        before = self._bins.get(at, (0.0, 0))
        self._bins[at] = (before[0] + total, before[1] + count)


class _Told:
    """A verdict that is told when two fits in a row agree on it and it is new."""

    def __init__(self, verdict: str) -> None:
        self._told = self._newest = (verdict, "info")

    def events(
        self, verdict: str, severity: str, event: dict[str, Any], step: int
    ) -> list[dict[str, Any]]:
        before, self._newest = self._newest, (verdict, severity)
        if before != self._newest or self._newest == self._told:
            return []
        self._told = self._newest
        return [{**event, "severity": severity, "step": step}]


def _rows(columns: Mapping[str, Any]) -> Iterator[tuple[str, int, str, float, float]]:
    names = columns["name"]

    def at(column: str, row: int, default: Any = None) -> Any:
        values = columns.get(column, default)
        is_many = isinstance(values, list | tuple) or np.ndim(values) > 0
        return values[row] if is_many else values

    for row, name in enumerate([names] if isinstance(names, str) else names):
        if name in _FOLLOWED and not at("module", row, ""):
            weight = at("weight", row)
            yield (
                name,
                int(at("step", row)),
                str(at("phase", row, "train")),
                float(at("value", row)),
                float("nan") if weight is None else float(weight),
            )


def _said_of_law(law: EntropyLaw) -> tuple[str, str, dict[str, Any]]:
    if law.is_identified:
        low, high = law.ceiling_interval
        message = (
            f"reward follows R = -{law.a:.3g} e^H + {law.b:.3g}: it would end at {law.ceiling:.3g} "
            f"({law.level:.0%}: {low:.3g} to {high:.3g}) with no entropy left; {law.reason}"
        )
    else:
        message = f"reward no longer follows R = -a e^H + b: {law.reason}"
    evidence = {"a": law.a, "b": law.b, "ceiling": law.ceiling_interval, "steps": law.steps}
    return law.verdict, "info", {"kind": "law", "message": message, "evidence": evidence}


def _said_of_forecast(found: CrossingForecast) -> tuple[str, str, dict[str, Any]]:
    is_sure = found.status == "reached" or (found.status == "expected" and isfinite(found.high))
    event = {
        "kind": "forecast",
        "rule": "forecast/floor",
        "message": f"entropy: {found.status}: {found.reason}",
        "evidence": {
            "floor": found.floor,
            "step": found.step,
            "low": found.low,
            "high": found.high,
            "model": found.model,
        },
    }
    return found.status, "warning" if is_sure else "info", event


def _law_metrics(law: EntropyLaw) -> dict[str, float]:
    if law.steps < LEAST_STEPS:
        return {}
    values = {
        "law/ceiling/estimate": law.ceiling,
        "law/ceiling/low": law.ceiling_interval[0],
        "law/ceiling/high": law.ceiling_interval[1],
        "law/slope": law.a,
        "law/r_squared": law.r_squared,
        "law/identified": float(law.is_identified),
    }
    return {name: value for name, value in values.items() if isfinite(value)}


def _forecast_metrics(found: CrossingForecast) -> dict[str, float]:
    values = {
        "forecast/floor/step": found.step,
        "forecast/floor/low": found.low,
        "forecast/floor/high": found.high,
    }
    return {name: value for name, value in values.items() if isfinite(value)}
