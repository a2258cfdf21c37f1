"""Which series a run has, and how each stands."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from entropylens.store.gathering import gathered, parts_of_view
from entropylens.store.layout import Layout
from entropylens.store.pyramid import pyramid_parts, series_path
from entropylens.store.ranks import Key
from entropylens.store.reader import Run, View
from entropylens.store.selection import Part, Selection

__all__ = ["SeriesFacts", "list_series"]


@dataclass(frozen=True, slots=True)
class SeriesFacts:
    """One series of a run."""

    key: Key
    count: int
    """Values in the log, of all ranks."""
    first_step: int
    last_step: int
    last: float
    """The value at ``last_step``, ranks combined; NaN and the infinities as they are.

    Where one rank logged several for that step before a merge, the last of them.
    """


@dataclass(frozen=True)
class _Tally:
    """Of each series, in the order of keys; and the values at its last step."""

    keys: Any
    counts: Any
    firsts: Any
    lasts: Any
    values: Any
    """One of them."""
    candidates: Any
    """How many there are: where more than one, ranks have to be combined."""


def list_series(run: Run) -> list[SeriesFacts]:
    """Every series of a run, by name, module and phase.

    From the pyramid where it still shows the log, else by one pass over the files.

    Args:
        run: The run.

    Returns:
        The series, in the order of names.

    Cost: One row group of each thread is held in memory, and a few numbers a series and row group.
    """
    facts, notes = run.steadily("metrics", lambda: _listed(run))
    run.warn(notes)
    return facts


def _listed(run: Run) -> tuple[list[SeriesFacts], list[str]]:
    view = run.view("metrics")
    selection = Selection(None, None, None)
    columns = ["first_step", "last_step", "last", "count"]
    found = pyramid_parts(run, view, selection, series_path(Layout(run.path)), columns)
    summaries, covered = found if found is not None else ([], {})
    rest = replace(view, start=covered)
    rows, notes = parts_of_view(run, rest, selection, ["step", "value"], made=_tally_of_rows)
    tallies = [_tally(p, *(p.columns[name] for name in columns)) for p in summaries] + rows
    if not tallies:
        return [], [*view.notes, *notes]
    tally = _merged(tallies)
    notes += _settle(tally, run, view, selection)
    named = [selection.key(number) for number in tally.keys.tolist()]
    numbers = (tally.counts, tally.firsts, tally.lasts, tally.values)
    listed = zip(named, *(column.tolist() for column in numbers), strict=True)
    return sorted((SeriesFacts(*row) for row in listed), key=lambda f: f.key), [*view.notes, *notes]


def _tally_of_rows(part: Part) -> _Tally:
    steps = part.columns["step"]
    return _tally(part, steps, steps, part.columns["value"])


def _tally(part: Part, first: Any, last: Any, value: Any, count: Any = None) -> _Tally:
    starts, rows = part.starts[:-1], np.diff(part.starts)
    lasts = np.maximum.reduceat(last, starts)
    newest = last == np.repeat(lasts, rows)
    candidates = np.add.reduceat(newest.astype(np.int64), starts)
    places = np.maximum.reduceat(np.where(newest, np.arange(len(last)), -1), starts)
    counts = rows if count is None else np.add.reduceat(count, starts)
    firsts = np.minimum.reduceat(first, starts)
    return _Tally(part.keys, counts, firsts, lasts, value[places], candidates)


def _merged(tallies: Sequence[_Tally]) -> _Tally:
    names = ("keys", "counts", "firsts", "lasts", "values", "candidates")
    columns = {name: np.concatenate([getattr(t, name) for t in tallies]) for name in names}
    order = np.argsort(columns["keys"], kind="stable")
    columns = {name: column[order] for name, column in columns.items()}
    keys, starts = np.unique(columns["keys"], return_index=True)
    rows = np.diff(starts, append=len(order))
    lasts = np.maximum.reduceat(columns["lasts"], starts)
    newest = columns["lasts"] == np.repeat(lasts, rows)
    places = np.maximum.reduceat(np.where(newest, np.arange(len(order)), -1), starts)
    return _Tally(
        keys,
        np.add.reduceat(columns["counts"], starts),
        np.minimum.reduceat(columns["firsts"], starts),
        lasts,
        columns["values"][places],
        np.add.reduceat(np.where(newest, columns["candidates"], 0), starts),
    )


def _settle(tally: _Tally, run: Run, view: View, selection: Selection) -> list[str]:
    """Combine the ranks' last values, for which their rows of the last steps are read again.

    Of a segment that was damaged after it was merged no row is there: what the pyramid says stays.
    """
    several = np.flatnonzero(tally.candidates > 1)
    if len(several) == 0:
        return []
    keys = [selection.key(number) for number in tally.keys[several].tolist()]
    lasts = tally.lasts[several]
    names, modules, phases = (list(dict.fromkeys(texts)) for texts in zip(*keys, strict=True))
    wanted = Selection(names, modules, phases).at_steps(np.unique(lasts))
    found, notes = gathered(run, view, wanted)
    for place, key, last in zip(several.tolist(), keys, lasts.tolist(), strict=True):
        if key in found and last in found[key].steps:
            points = found[key]
            tally.values[place] = points.values[np.searchsorted(points.steps, last)]
    return notes
