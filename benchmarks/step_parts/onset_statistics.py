"""How alike are onsets of damage, by normaliser, and how sure is that?"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.step_parts.onset_lines import EVENTS, Floats

Record = dict[str, Any]
"""A line: what was followed, and what `follow` found."""

NORMALISERS = (
    "update_norm",
    "relative_update_norm",
    "curvature",
    "gradient_curvature",
    "quadratic_loss",
    "r_max",
    "r_q95",
    "r_median",
    "margin_min",
    "margin_q05",
    "exact_min",
    "exact_q05",
    "weighted_max",
    "weighted_q95",
    "weighted_rms",
    "linearised",
)
RESAMPLES = 2000


def onset(record: Record, event: str, normaliser: str) -> float:
    """Onset of an event in a normaliser's unit; NaN where either is unknown."""
    length = record["onset"][event]
    if normaliser == "linearised":
        told = record["linearised_onset"][event]
        scale = None if told is None else 1 / told
    else:
        scale = record["scales"][normaliser]
    return np.nan if length is None or scale is None else length * scale


def spread(
    records: Sequence[Record], event: str, *, base: float, within: Sequence[str] = ()
) -> dict[str, Any]:
    """How alike are the onsets of an event, by normaliser?

    Args:
        records: The lines.
        event: One of `EVENTS`.
        base: Of the logarithm.
        within: Keys of lines that belong together; deviations are from the mean of their like.

    Returns:
        ``lines`` whose onset is known, ``median`` onset, ``std`` of its logarithm with 95 %
        ``interval``, and ``to_r_max``, that of `r_max` on the same lines being 1, with an interval.
        A line on which the event does not happen by r = 100 counts for none.
    """
    trainings = np.array([f"{one['net']}-{one['seed']}" for one in records])
    likes = np.array(["-".join(str(one[key]) for key in within) for one in records])
    by_r_max = np.array([onset(one, event, "r_max") for one in records])
    found: dict[str, dict[str, Any]] = {}
    for normaliser in NORMALISERS:
        values = np.array([onset(one, event, normaliser) for one in records])
        known = np.isfinite(values)
        found[normaliser] = {"lines": int(known.sum())}
        if known.sum() < 3:
            continue
        drawn = Resampled(trainings[known], likes[known])
        std, stds = drawn.std(np.log(values[known]) / np.log(base))
        reference, references = drawn.std(np.log(by_r_max[known]) / np.log(base))
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = stds / references
        found[normaliser] |= {
            "median": float(np.median(values[known])),
            "std": std,
            "interval": _interval(stds),
            "to_r_max": std / reference,
            "to_r_max_interval": _interval(ratios),
        }
    return found


class Resampled:
    """Trainings drawn anew, each with all of its lines; the mean is that of their like."""

    def __init__(self, trainings: NDArray[np.str_], likes: NDArray[np.str_]) -> None:
        names, self.of = np.unique(trainings, return_inverse=True)
        kinds, self.kind = np.unique(likes, return_inverse=True)
        self.means = len(kinds)
        equal = np.full(len(names), 1 / len(names))
        self.times = np.random.default_rng(0).multinomial(len(names), equal, size=RESAMPLES)

    def std(self, values: Floats) -> tuple[float, Floats]:
        """Standard deviation of all values, and of each draw."""
        mean = np.bincount(self.kind, weights=values) / np.bincount(self.kind)
        deviations = (values - mean[self.kind]) * np.sqrt(len(values) / (len(values) - self.means))
        count, total, square = (
            self.times @ np.bincount(self.of, weights=deviations**power) for power in (0, 1, 2)
        )
        drawn = np.sqrt(np.maximum(0, square / count - (total / count) ** 2))
        return float(np.sqrt((deviations**2).mean())), drawn


def by_r(records: Sequence[Record]) -> dict[str, Any]:
    """At which r do the events happen, and what is the worst up to r = 1?"""
    found: dict[str, Any] = {"lines": len(records), "onset": {}}
    for event in EVENTS:
        values = np.array([onset(one, event, "r_max") for one in records])
        happened = values[np.isfinite(values)]
        found["onset"][event] = {
            "happened": len(happened),
            "below_1": int((happened < 1).sum()),
            "lowest": float(happened.min()) if len(happened) else None,
            "median": float(np.median(happened)) if len(happened) else None,
            "highest": float(happened.max()) if len(happened) else None,
        }
    within = [one["within"] for one in records]
    found["up_to_r_1"] = {
        "loss_up_by_a_tenth": sum(one["loss_ratio"] > 1.1 for one in within),
        "worst_loss_ratio": max(one["loss_ratio"] for one in within),
        "worst_accuracy_change": min(one["accuracy_change"] for one in within),
        "worst_held_out_accuracy_change": min(one["held_out_accuracy_change"] for one in within),
    }
    found["start"] = {
        key: float(np.median([one["start"][key] for one in records]))
        for key in ("loss", "accuracy", "held_out_accuracy")
    }
    return found


def _interval(draws: Floats) -> list[float]:
    """A draw of one training alone may have no deviation, and none to divide by."""
    finite = draws[np.isfinite(draws)]
    return np.quantile(finite, (0.025, 0.975)).tolist() if len(finite) else []
