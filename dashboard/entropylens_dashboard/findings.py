"""The sentences of a report, for a page: long series are looked at thinned."""

from typing import Final

import numpy as np

from entropylens.analysis.overview import Curve, Overview, sentences
from entropylens.analysis.spikes import find_jumps, find_spikes
from entropylens.figures.thinning import kept
from entropylens.store.points import Key
from entropylens.store.reader import Run
from entropylens_dashboard.desk import events
from entropylens_dashboard.readings import Readings, Stretch

__all__ = ["NAMES", "findings"]

NAMES: Final = (
    "loss/mean",
    "learning_rate",
    "entropy/token/mean",
    "gradient/norm/before_clip",
    "overhead/fraction",
)
"""Series that the sentences speak of."""
_REWARDS: Final = (Key("reward/mean", "", "rollout"), Key("framework/reward", "", "train"))
"""A policy's: its loss lies near 0 whatever happens, and is not spoken of."""
_MOST: Final = 4000
"""Points of a series that are looked at."""


def findings(readings: Readings, run: Run) -> list[str]:
    """What happened in a run, in plain words, the most important first.

    Args:
        readings: Where series come from.
        run: Finished or not.

    Returns:
        Sentences; the last says so where series were thinned.

    Raises:
        EntropyLensError: Reading took too long.
    """
    found, _ = readings.look(run, [*(Key(name, "", "train") for name in NAMES), *_REWARDS])
    curves = {key.name: _curve(key.name, stretch) for key, stretch in found.items()}
    loss, rate = curves.get("loss/mean"), curves.get("learning_rate")
    rollout = {name: curve for name, curve in curves.items() if name == "reward/mean"}
    is_policy = bool(rollout) or "framework/reward" in curves
    overview = Overview(
        run,
        run.state(),
        curves,
        {},
        [] if loss is None or is_policy else find_spikes(loss.steps, loss.values),
        [] if rate is None else find_jumps(rate.steps, rate.values),
        None,
        events=events(run),
        rollout=rollout,
    )
    said = sentences(overview)
    if any(len(curves[key.name].steps) < stretch.total for key, stretch in found.items()):
        said.append(
            "These words come from the extremes of stretches of a long run; `entropylens report` "
            "reads every value."
        )
    return said


def _curve(name: str, stretch: Stretch) -> Curve:
    chosen = kept(stretch.steps, stretch.values, _MOST)
    return Curve(name, stretch.steps[chosen], np.asarray(stretch.values[chosen]))
