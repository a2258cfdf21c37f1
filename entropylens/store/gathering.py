"""The rows of chosen series from all files of a view, and the series they make."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa

from entropylens.errors import EntropyLensError
from entropylens.records import SCHEMAS
from entropylens.store.columns import Groups, Late, Source, parts_of, whole
from entropylens.store.ranks import Floats, Integers, Key, Points, combined
from entropylens.store.reader import Run, View
from entropylens.store.selection import Part, Selection, part_of

__all__ = ["gathered", "parts_of_view", "too_late"]

_NUMBERS: Final = ("step", "time", "value", "weight")
_NEEDED: Final = ("step", "value")
_Rows = dict[str, list[np.ndarray]]


def gathered(
    run: Run, view: View, selection: Selection, deadline: float | None = None
) -> tuple[dict[Key, Points], list[str]]:
    """The series of a view, from where it was read to on, and notes on damaged files.

    Of a step to which rows were added since, its earlier rows are read again, so that every point
    is whole.

    Raises:
        FileNotFoundError: Files were sealed or merged meanwhile.
        Late: The deadline has passed.
    """
    ranks = {footer.rank for _, footer in view.segments} | {rank for rank, *_ in view.tails}
    # Weights are for steps with several rows, which one rank alone seldom writes.
    columns = _NUMBERS if len(ranks) > 1 else _NUMBERS[:-1]
    rows, notes = _rows(run, view, selection, columns, deadline)
    series = _series(rows, selection)
    if series is None:
        rows, notes = _rows(run, view, selection, _NUMBERS, deadline)
        series = _series(rows, selection)
    assert series is not None
    return series, notes


def parts_of_view(
    run: Run,
    view: View,
    selection: Selection,
    columns: Sequence[str],
    deadline: float | None = None,
    *,
    before: bool = False,
    made: Callable[[Part], Any] = whole,
) -> tuple[list[Any], list[str]]:
    """Rows of a view's files: those from where it was read to on, or those before.

    What ``made`` makes of each part is returned, so that its rows need not be held.
    """
    kinds = {name: SCHEMAS["metrics"].field(name).type for name in columns}
    sources, notes = _sources(run, view, before)
    parts, damaged = parts_of(sources, selection, kinds, _NEEDED, deadline, made=made)
    for rank, first, rows in view.tails:
        passed = view.passed(rank, first, rows.num_rows)
        rows = rows.slice(0, passed) if before else rows.slice(passed)
        if rows.num_rows:
            found = {name: rows[name] for name in rows.column_names}
            part = part_of(found, rows.num_rows, selection, kinds, _NEEDED)
            parts += [] if part is None else [made(part)]
    return parts, [*notes, *damaged]


def too_late(who: str, names: Sequence[str] | None, late: Late) -> EntropyLensError:
    """The error for a reading that took longer than it was allowed."""
    done, of = late.args or (0, 0)
    what = "all" if names is None else str(len(names))
    return EntropyLensError(
        f"{who}: expected to read {what} series within the time allowed, got through {done} of "
        f"{of} row groups; ask for fewer steps or merge the run with entropylens compact"
    )


def _sources(run: Run, view: View, before: bool) -> tuple[list[Source], list[str]]:
    sources, notes = [], []
    for path, footer in view.segments:
        passed = view.passed(footer.rank, footer.first_row, footer.rows, footer.end_row)
        if passed == (0 if before else footer.rows):
            continue
        try:
            groups = run.remembered(path, Groups.of)
        except FileNotFoundError:
            raise
        except (pa.ArrowException, OSError, ValueError) as error:
            notes.append(f"skipped: {path} cannot be read: {error}")
            continue
        sources.append(Source(path, groups, 0, passed) if before else Source(path, groups, passed))
    return sources, notes


def _by_key(parts: Iterable[Part]) -> dict[int, _Rows]:
    found: dict[int, _Rows] = {}
    for part in parts:
        for key, columns in part.series():
            rows = found.setdefault(key, {name: [] for name in columns})
            for name, column in columns.items():
                rows[name].append(column)
    return found


def _rows(
    run: Run,
    view: View,
    selection: Selection,
    columns: Sequence[str],
    deadline: float | None,
) -> tuple[dict[int, _Rows], list[str]]:
    """New rows, and of their steps those that were read before."""
    parts, notes = parts_of_view(run, view, selection, columns, deadline)
    new = _by_key(parts)
    if not view.start or not new:
        return new, notes
    earliest = min(int(steps.min()) for rows in new.values() for steps in rows["step"])
    older = selection.from_step(earliest)
    parts, _ = parts_of_view(run, view, older, columns, deadline, before=True)
    steps = {key: np.concatenate(rows["step"]) for key, rows in new.items()}
    for part in parts:
        for key, found in part.series():
            if key in new:
                again = np.isin(found["step"], steps[key])
                for name, column in found.items():
                    new[key][name].append(column[again])
    return new, notes


def _series(found: dict[int, _Rows], selection: Selection) -> dict[Key, Points] | None:
    series = {}
    for number, rows in found.items():
        key = selection.key(number)
        columns = {name: np.concatenate(parts) for name, parts in rows.items()}
        steps: Integers = columns["step"]
        times: Floats = columns["time"]
        points = combined(key.name, steps, times, columns["value"], columns.get("weight"))
        if points is None:
            return None
        series[key] = points
    return series
