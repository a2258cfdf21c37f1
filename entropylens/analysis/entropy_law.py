"""What a run's reward owes to its entropy, when that was to end, and who could have told."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from entropylens.figures.law import forecast_figure, law_figure
from entropylens.rules.entropy_law import EntropyLaw, fit_entropy_law, pair_by_step
from entropylens.rules.forecast import (
    FLOOR,
    CrossingForecast,
    ForecastScore,
    forecast_crossing,
    score_forecasts,
)

__all__ = ["EntropyAndReward", "law_figures", "law_sentences", "read_entropy_law", "score_rows"]

_GRID: Final = 100


class Series(Protocol):
    """What is read."""

    @property
    def steps(self) -> NDArray[np.int64]:
        """Optimiser steps, increasing."""

    @property
    def values(self) -> NDArray[np.float64]:
        """One value a step."""


@dataclass(frozen=True)
class EntropyAndReward:
    """The two series of a policy, and what the rules make of them."""

    reward_name: str
    step: NDArray[np.float64]
    """Of the pairs."""
    entropy: NDArray[np.float64]
    reward: NDArray[np.float64]
    course: Series
    """Entropy at all its steps."""
    law: EntropyLaw
    forecast: CrossingForecast
    """From all of the run."""
    scores: list[ForecastScore]
    """Of forecasts made at 15, 30 and 50 % of the run."""


def read_entropy_law(
    train: Mapping[str, Series], rollout: Mapping[str, Series]
) -> EntropyAndReward | None:
    """What did this run's reward owe to its entropy?

    Args:
        train: Series of phase train, by metric name.
        rollout: Series of phase rollout.

    Returns:
        The answer; None for a run that has no reward, no entropy, or no step with both.
    """
    course = train.get("entropy/token/mean")
    rewards = (
        ("reward/mean", rollout.get("reward/mean")),
        ("reward/mean", train.get("reward/mean")),
        ("framework/reward", train.get("framework/reward")),
    )
    name, reward = next(((n, one) for n, one in rewards if one is not None), ("", None))
    if course is None or reward is None:
        return None
    step, entropy, paid = pair_by_step(course.steps, course.values, reward.steps, reward.values)
    if not len(step):
        return None
    return EntropyAndReward(
        name,
        step,
        entropy,
        paid,
        course,
        fit_entropy_law(entropy, paid, step=step),
        forecast_crossing(course.steps, course.values, FLOOR),
        score_forecasts(course.steps, course.values, FLOOR),
    )


def law_sentences(found: EntropyAndReward) -> list[str]:
    """The verdict and the forecast in plain words.

    Args:
        found: From `read_entropy_law`.

    Returns:
        One or two sentences each.
    """
    return [_law(found), *_end(found), *_early(found)]


def law_figures(found: EntropyAndReward) -> dict[str, dict[str, Any]]:
    """Reward against entropy, and entropy with its earliest forecast, by key.

    Args:
        found: From `read_entropy_law`.

    Returns:
        Documents for plotly.js.
    """
    grid = np.linspace(0.0, float(found.entropy.max()), _GRID)
    law = None if found.law.line is None else found.law.band(grid)
    figures = {"law": law_figure(found.step, found.entropy, found.reward, grid, law)}
    course = found.course.steps, found.course.values, FLOOR
    early = next((one for one in found.scores if len(one.forecast.path_step)), None)
    if early is not None:
        told = early.forecast
        figures["forecast"] = forecast_figure(*course, told.path_step, told.path, early.share)
    return figures


def score_rows(found: EntropyAndReward) -> list[list[str]]:
    """A row of text for each early forecast and what came of it.

    Args:
        found: From `read_entropy_law`.

    Returns:
        Known share of the run, forecast, interval, what happened, and errors in steps: the
        forecast's, and of "it stays as it is" and of a straight line.
    """
    return [
        [
            f"{one.share:.0%}",
            _step(one.forecast.step, one.forecast.status),
            f"{_step(one.forecast.low)} to {_step(one.forecast.high)}"
            if one.is_inside is not None
            else "none",
            _step(one.actual),
            "-" if one.is_inside is None else ("yes" if one.is_inside else "no"),
            f"{one.error:,.0f}" if np.isfinite(one.error) else "-",
            f"{one.persistence_error:,.0f}",
            f"{one.straight_line_error:,.0f}",
        ]
        for one in found.scores
    ]


def _law(found: EntropyAndReward) -> str:
    law = found.law
    if not law.is_identified:
        return f"Reward and entropy show no law R = -a e^H + b in this run: {law.reason}."
    low, high = law.ceiling_interval
    newest = np.mean(found.reward[-max(len(found.reward) // 10, 1) :])
    return (
        f"Reward followed R = -{law.a:.3g} e^H + {law.b:.3g}, H the entropy: with none left it "
        f"would end at {law.ceiling:.3g} ({law.level:.0%}: {low:.3g} to {high:.3g}), told from "
        f"entropies down to {law.lowest_entropy:.2g} nats; it was {newest:.3g} in the last tenth."
    )


def _end(found: EntropyAndReward) -> list[str]:
    told = found.forecast
    if told.status == "reached":
        return [f"Entropy has been below {FLOOR:g} nats since step {told.step:,.0f}."]
    if told.status == "expected":
        return [
            f"Going on like this, entropy would fall below {FLOOR:g} nats around step "
            f"{told.step:,.0f} ({told.level:.0%}: {_step(told.low)} to {_step(told.high)})."
        ]
    return []


def _early(found: EntropyAndReward) -> list[str]:
    one = next((one for one in found.scores if np.isfinite(one.actual)), None)
    if one is None or one.is_inside is None:
        return []
    where = "inside" if one.is_inside else "outside"
    return [
        f"A forecast from the first {one.share:.0%} of the run said {_step(one.forecast.step)} for "
        f"entropy below {FLOOR:g} nats; it came at step {one.actual:,.0f}, {where} the interval of "
        f"{_step(one.forecast.low)} to {_step(one.forecast.high)}."
    ]


def _step(step: float, status: str = "") -> str:
    if np.isnan(step):
        return status or "none"
    return f"step {step:,.0f}" if np.isfinite(step) else "not in this run"
