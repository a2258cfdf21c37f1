"""What every page works with, and the questions that pages share."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import numpy as np
import pyarrow as pa

from entropylens.analysis.alarms import Alarm, open_alarms
from entropylens.analysis.overview import number
from entropylens.analysis.summary import last_step
from entropylens.analysis.verdict import Verdict, judge
from entropylens.figures.colours import of_run
from entropylens.figures.drawing import Mark
from entropylens.store.points import Key
from entropylens.store.reader import Run
from entropylens_dashboard.library import Entry, Library
from entropylens_dashboard.readings import PHASES, Readings, Stretch
from entropylens_dashboard.sheet import mapping

__all__ = ["HEADLINES", "Desk", "age", "headlines", "looked", "marks", "verdict"]

HEADLINES: Final = (
    "loss/mean",
    "reward/mean",
    "framework/reward",
    "entropy/token/mean",
    "gradient/norm/before_clip",
    "surprisal_gap/mean",
    "throughput/tokens_per_second",
    "tokens/seen",
)
"""What a run's verdict and its row in the list are made of."""

_LONGEST: Final = 400
"""Characters of an event's text."""
_EVENTS: Final = 2000
"""Newest events that are looked at."""


@dataclass(frozen=True)
class Desk:
    """The runs, what was read of them, and where the app lives."""

    library: Library
    readings: Readings
    prefix: str = "/"

    def colour(self, run_id: str) -> tuple[str, str]:
        """Colour and dash of a run: by the order in which the folder's runs were started."""
        entries = self.library.entries()
        order = {entry.id: len(entries) - 1 - at for at, entry in enumerate(entries)}
        return of_run(order.get(run_id, 0))

    def href(self, entry: Entry, page: str = "") -> str:
        """The address of a run's page."""
        return f"{self.prefix}run/{entry.id}{page}"

    def asked(self, spec: Any) -> Entry | None:
        """The run that a page is about; None where it is gone, or nothing sensible was asked."""
        ids = mapping(spec).get("runs")
        first = ids[0] if isinstance(ids, list) and ids else None
        found = self.find([first]) if isinstance(first, str) else {}
        return next(iter(found.values()), None)

    def find(self, ids: Sequence[str]) -> dict[str, Entry]:
        """Those of the runs that are there and can be read, in order."""
        found = {run_id: self.library.find(run_id) for run_id in dict.fromkeys(ids)}
        return {i: e for i, e in found.items() if e is not None and _is_there(e)}


def _is_there(entry: Entry) -> bool:
    """Whether a run can be read and was not deleted since the folder was looked through."""
    return entry.run is not None and (entry.run.path / "run.json").exists()


def headlines(desk: Desk, run: Run) -> dict[str, Stretch]:
    """The series of `HEADLINES` that a run has."""
    return looked(desk, run, HEADLINES)


def looked(desk: Desk, run: Run, names: Sequence[str]) -> dict[str, Stretch]:
    """Series of the whole run by name, of training where there is one, else of the rollouts.

    Args:
        desk: Where series come from.
        run: The run.
        names: Metric names; those that the run lacks are left out.

    Returns:
        The series.

    Raises:
        EntropyLensError: Reading took too long.
    """
    keys = {phase: [Key(name, "", phase) for name in names] for phase in PHASES}
    found, _ = desk.readings.look(run, [key for own in keys.values() for key in own])
    return {
        key.name: found[key] for phase in reversed(PHASES) for key in keys[phase] if key in found
    }


def events(run: Run) -> list[dict[str, Any]]:
    """The newest events of a run, in order."""
    rows = run.events().to_arrow().sort_by("time")
    rows = rows.slice(max(rows.num_rows - _EVENTS, 0))
    try:
        found = rows.to_pylist()
    except (ValueError, OverflowError):  # a damaged text or time: the other rows are read
        found = [event for at in range(rows.num_rows) for event in _one(rows.slice(at, 1))]
    return [_shortened(event) for event in found]


def _one(row: pa.Table) -> list[dict[str, Any]]:
    try:
        return row.to_pylist()
    except (ValueError, OverflowError):
        return []


def _shortened(event: dict[str, Any]) -> dict[str, Any]:
    texts = {k: v[:_LONGEST] for k, v in event.items() if isinstance(v, str)}
    return {**event, **texts, "step": event["step"] or 0}


def verdict(
    entry: Entry, series: Mapping[str, Stretch], seen: Sequence[Mapping[str, Any]]
) -> tuple[Verdict, list[Alarm]]:
    """Is a run healthy, and why, and which alarms are open?"""
    alarms = open_alarms(seen)
    known = dict(series)
    if "reward/mean" not in known and "framework/reward" in known:
        known["reward/mean"] = known["framework/reward"]
    return judge(entry.state, entry.note, known, alarms), alarms


def marks(
    seen: Sequence[Mapping[str, Any]], by: str = "step", tokens: Stretch | None = None
) -> list[Mark]:
    """Events as marks on an axis; without ``tokens`` none has a place on that of tokens."""
    found = [
        Mark(
            _place(event, by, tokens),
            str(event["kind"]),
            str(event["severity"] or "info"),
            str(event["message"] or ""),
        )
        for event in seen
    ]
    return [mark for mark in found if math.isfinite(mark.x)]


def _place(event: Mapping[str, Any], by: str, tokens: Stretch | None) -> float:
    step = float(event["step"] or 0)
    if by == "step":
        return step
    if by == "time":
        return float(event["time"].timestamp())
    if tokens is None or not len(tokens.steps):
        return math.nan
    return float(np.interp(step, tokens.steps, tokens.values))


def facts(run: Run, series: Mapping[str, Stretch]) -> str:
    """Age, steps, speed and attempts in one line."""
    speed = series.get("throughput/tokens_per_second")
    parts = [
        f"{last_step(run):,} steps",
        None if speed is None else f"{number(float(speed.values[-1]))} tokens/s",
        age(run),
        f"{len(run.attempts)} attempts" if len(run.attempts) > 1 else None,
        str(run.config["model"]) if "model" in run.config else None,
        str(run.config["optimizer"]) if "optimizer" in run.config else None,
    ]
    return " · ".join(part for part in parts if part)


def age(run: Run) -> str:
    """How long ago a run was started."""
    try:
        began = datetime.fromisoformat(run.created).astimezone(UTC)
    except ValueError:
        return ""
    seconds = (datetime.now(UTC) - began).total_seconds()
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"started {seconds / size:.0f} {unit} ago"
    return f"started {max(seconds, 0):.0f} s ago"
