"""What sets learning apart from memorising, how early, and how surely?

All functions read what `measuring` wrote, as a frame of seed, labels, epoch, rows, layer, name and
value.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from entropylens.analysis.compare import Interval, interval

__all__ = [
    "MEASURES",
    "NEED_LABELS",
    "Course",
    "Ranked",
    "changes_columns",
    "changes_rows",
    "courses",
    "effect_size",
    "follows",
    "rank",
    "ranking_columns",
    "ranking_rows",
    "told_apart",
]

MEASURES: Final = {
    "dse": "DSE, median bandwidth",
    "dse_half": "DSE, alpha 1/2",
    "dse_one": "DSE, alpha 1",
    "dse_released": "DSE as released (sigma 10)",
    "dsmi_labels": "DSMI with the labels",
    "rankme": "RankMe",
    "effective_rank": "effective rank",
    "participation_ratio": "participation ratio",
    "alpha_req": "alpha-ReQ",
    "within_between_ratio": "within/between ratio",
    "nearest_class_mean_accuracy": "nearest-class-mean accuracy",
    "norm": "norm of a state",
    "loss": "loss",
    "accuracy": "accuracy",
}
"""Compared, with their words; the last three are what they have to beat."""
NEED_LABELS: Final = frozenset(
    {"dsmi_labels", "within_between_ratio", "nearest_class_mean_accuracy", "loss", "accuracy"}
)
_ROWS: Final = ("training", "held_out")
_SURE: Final = 0.95
"""Share of left-out runs told apart, from which on a measure is called sure."""

Floats = NDArray[np.float64]


def told_apart(clean: Floats, other: Floats) -> float:
    """How often would a threshold from other seeds tell a run's labels?

    Each seed is left out once: the threshold lies half-way between the means of the others, and the
    seed's two runs are judged by it.

    Args:
        clean: ``[seeds]`` one value of each run with clean labels.
        other: ``[seeds]`` of the same seeds with shuffled labels.

    Returns:
        Share of the runs that are judged rightly; a half is chance, and what constant values give.

    Raises:
        ValueError: There are fewer than two seeds.

    Example:
        >>> told_apart(np.array([1.0, 2.0, 3.0]), np.array([7.0, 8.0, 9.0]))
        1.0
    """
    if len(clean) < 2 or len(clean) != len(other):
        raise ValueError(
            f"told_apart: expected two or more seeds with both, got {len(clean)} and {len(other)}"
        )
    right = 0.0
    for left_out in range(len(clean)):
        low, high = np.delete(clean, left_out).mean(), np.delete(other, left_out).mean()
        middle, sign = (low + high) / 2, np.sign(high - low)
        signs = np.sign([sign * (middle - clean[left_out]), sign * (other[left_out] - middle)])
        right += float((1 + signs).sum() / 2)
    return right / (2 * len(clean))


def effect_size(clean: Floats, other: Floats) -> float:
    """By how many standard deviations within a group do the means differ?

    ``(mean other - mean clean) / sqrt((var clean + var other) / 2)``, Cohen's d; NaN where neither
    group varies.

    Example:
        >>> round(effect_size(np.array([0.0, 2.0]), np.array([4.0, 6.0])), 3)
        2.828
    """
    spread = np.sqrt((clean.var(ddof=1) + other.var(ddof=1)) / 2)
    return float((other.mean() - clean.mean()) / spread) if spread > 0 else float("nan")


@dataclass(frozen=True)
class Ranked:
    """One measure on one kind of rows."""

    name: str
    told_apart: dict[int, float]
    """By epoch, mean over layers."""
    sure_from: int | None
    """First epoch from which on it is 0.95 or more at every one that follows; None is never."""
    effect: dict[int, float]
    """Cohen's d by epoch, median over layers of its size."""


def rank(found: pd.DataFrame, rows: str, layers: Sequence[str]) -> list[Ranked]:
    """Which measure tells the labels that a net was trained on, from which epoch?

    Args:
        found: The measurements.
        rows: ``training`` or ``held_out``.
        layers: To be taken together; accuracy and loss are of the whole net. Where a measure is
            unknown, as alpha-ReQ of too few ranks is, it tells nothing: a share of a half.

    Returns:
        Measures in the order of `MEASURES`.
    """
    known = set(found["name"])
    return [_ranked(found, rows, name, layers) for name in MEASURES if name in known]


def _ranked(found: pd.DataFrame, rows: str, name: str, layers: Sequence[str]) -> Ranked:
    shares: dict[int, list[float]] = {}
    effects: dict[int, list[float]] = {}
    own = found[(found["rows"] == rows) & (found["name"] == name) & (found["epoch"] > 0)]
    own = own[own["layer"].isin([*layers, ""])]
    for epoch, layer in sorted(set(zip(own["epoch"], own["layer"], strict=True))):
        here = own[(own["epoch"] == epoch) & (own["layer"] == layer)]
        pair = here.pivot(index="seed", columns="labels", values="value")
        pair = pair.reindex(columns=["clean", "shuffled"]).dropna()
        clean, other = pair.to_numpy(np.float64).T
        is_known = len(pair) > 1
        shares.setdefault(epoch, []).append(told_apart(clean, other) if is_known else 0.5)
        effects.setdefault(epoch, []).append(abs(effect_size(clean, other)) if is_known else 0.0)
    told = {epoch: float(np.mean(values)) for epoch, values in shares.items()}
    return Ranked(
        name, told, _sure_from(told), {e: float(np.median(v)) for e, v in effects.items()}
    )


def _sure_from(told: dict[int, float]) -> int | None:
    sure = None
    for epoch in sorted(told, reverse=True):
        if told[epoch] < _SURE:
            break
        sure = epoch
    return sure


@dataclass(frozen=True)
class Course:
    """How one measure of one layer went, over seeds."""

    rows: str
    labels: str
    by_epoch: dict[int, Interval]
    change: Interval
    """Of the last epoch on the first, by seed."""


def courses(found: pd.DataFrame, layer: str, name: str) -> list[Course]:
    """How did a measure go from before training to the end of it, with clean labels and others?

    Args:
        found: The measurements.
        layer: Of the net; "" where the measure is of the whole net.
        name: Of the measure.

    Returns:
        For each kind of rows and labels; intervals are of 95 %, Student's, over seeds.
    """
    own = found[(found["layer"] == layer) & (found["name"] == name)]
    result = []
    for (rows, labels), group in own.groupby(["rows", "labels"], observed=True):
        by_seed = group.pivot(index="seed", columns="epoch", values="value").astype(np.float64)
        by_epoch = {int(epoch): interval(list(by_seed[epoch])) for epoch in by_seed.columns}
        change = interval(list(by_seed[max(by_epoch)] - by_seed[min(by_epoch)]))
        result.append(Course(str(rows), str(labels), by_epoch, change))
    return result


def follows(found: pd.DataFrame, layer: str, name: str, other: str) -> float:
    """How closely does one measure of a layer follow another, over all epochs, seeds and labels?

    Returns:
        Spearman's rank correlation, -1 to 1, of the values on held-out rows.
    """
    own = found[(found["layer"] == layer) & (found["rows"] == "held_out")]
    keys = ["seed", "labels", "epoch"]
    pair = own.pivot(index=keys, columns="name", values="value")[[name, other]]
    return float(np.corrcoef(pair.rank().to_numpy().T)[0, 1])


def changes_columns(found: pd.DataFrame) -> list[str]:
    """What stands over the cells of `changes_rows`."""
    after = [f"after {epoch}" for epoch in _shown(found)]
    return ["measure", "rows", "labels", "before", *after, "change"]


def changes_rows(found: pd.DataFrame, layer: str = "hidden") -> list[list[str]]:
    """The claim's quantities before and after training; on both kinds of rows if labels matter."""
    epochs = [0, *_shown(found)]
    return [
        [
            MEASURES[name],
            one.rows.replace("_", " "),
            one.labels,
            *(_between(one.by_epoch[epoch]) for epoch in epochs),
            _between(one.change, "+.2f"),
        ]
        for name in ("dse", "dse_released", "dsmi_labels", "norm", "accuracy")
        for one in courses(found, "" if name == "accuracy" else layer, name)
        if name in NEED_LABELS or one.rows == "held_out"
    ]


def ranking_columns(found: pd.DataFrame) -> list[str]:
    """What stands over the cells of `ranking_rows`."""
    epochs = ", ".join(map(str, _shown(found)))
    told = [
        f"{rows.replace('_', ' ')}: {what}"
        for rows in _ROWS
        for what in ("sure from epoch", "effect", f"all layers, after {epochs}")
    ]
    return ["measure", "needs labels", *told]


def ranking_rows(found: pd.DataFrame, layer: str = "hidden") -> list[list[str]]:
    """How early and how surely does each measure tell the labels of a run that was left out?

    Args:
        found: The measurements.
        layer: Whose first sure epoch and effect after the last one are told; the share of runs told
            apart is the mean over all layers.

    Returns:
        Cells under `ranking_columns`; first the measures that are sure earliest on rows held out,
        then on those trained on, then those that tell more on all layers.
    """
    layers = [one for one in found["layer"].unique() if one]
    here = {rows: rank(found, rows, [layer]) for rows in _ROWS}
    everywhere = {rows: rank(found, rows, layers) for rows in _ROWS}
    shown, result = _shown(found), []
    for at, name in enumerate(one.name for one in here[_ROWS[0]]):
        cells = [MEASURES[name], "yes" if name in NEED_LABELS else "no"]
        place: list[float] = []
        for rows in _ROWS:
            one, told = here[rows][at], everywhere[rows][at].told_apart
            cells.append("never" if one.sure_from is None else str(one.sure_from))
            effect = one.effect[shown[-1]]
            cells.append("none varies" if np.isnan(effect) else f"{effect:.0f}")
            cells.append(", ".join(f"{told[epoch]:.2f}" for epoch in shown))
            place += [-sum(told.values()), np.inf if one.sure_from is None else one.sure_from]
        result.append((place[::-1], cells))
    return [cells for _, cells in sorted(result)]


def _shown(found: pd.DataFrame) -> list[int]:
    epochs = [int(epoch) for epoch in sorted(set(found["epoch"])) if epoch > 0]
    return sorted({epochs[0], epochs[len(epochs) // 2], epochs[-1]})


def _between(found: Interval, form: str = ".2f") -> str:
    if found.mean is None:
        return ""
    if found.low is None or found.high is None:
        return f"{found.mean:{form}}"
    return f"{found.mean:{form}} ± {found.high - found.mean:.2f}"
