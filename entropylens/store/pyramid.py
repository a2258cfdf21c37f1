"""A first look at series from the pyramid that merging left, where it still shows the log."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from entropylens.store.columns import Groups, Source, parts_of
from entropylens.store.gathering import gathered
from entropylens.store.layout import Layout
from entropylens.store.ranks import Floats, Integers, Key, Points
from entropylens.store.reader import Cursor, Run, View
from entropylens.store.segments import Footer
from entropylens.store.selection import Part, Selection

__all__ = [
    "FirstLook",
    "Sketch",
    "covered_by",
    "first_look",
    "pyramid_facts",
    "pyramid_parts",
    "read_sketches",
    "series_path",
]

_PREFIX: Final = "entropylens."
_TIME: Final = pa.timestamp("us", tz="UTC")
_KINDS: Final[dict[str, pa.DataType]] = {
    "rank": pa.int64(),
    "first_step": pa.int64(),
    "last_step": pa.int64(),
    "first_time": _TIME,
    "last_time": _TIME,
    "min_step": pa.int64(),
    "max_step": pa.int64(),
    "min": pa.float64(),
    "max": pa.float64(),
    "last": pa.float64(),
    "count": pa.int64(),
    "nonfinite": pa.int64(),
}


@dataclass(frozen=True)
class Sketch:
    """A first look at one series: at most 1,000 buckets in the order of steps."""

    first_steps: Integers
    last_steps: Integers
    first_times: Floats
    """Unix seconds."""
    last_times: Floats
    min_steps: Integers
    """Where the smallest finite value lies; -1 where there is none."""
    max_steps: Integers
    minima: Floats
    """The smallest finite value; NaN where there is none."""
    maxima: Floats
    lasts: Floats
    """The last value, finite or not."""
    counts: Integers
    nonfinite: Integers
    """How many are NaN or infinite."""


@dataclass(frozen=True)
class FirstLook:
    """Sketches of what was merged, and every point of what came after."""

    sketches: dict[Key, Sketch]
    rest: dict[Key, Points]
    cursor: Cursor
    """Give it to `read_points` as ``since`` to read what comes later."""


def read_sketches(
    run: Run,
    names: Sequence[str],
    *,
    modules: Sequence[str] | None = ("",),
    phases: Sequence[str] | None = ("train",),
) -> dict[Key, Sketch] | None:
    """Sketches of series of a run that is merged whole.

    Args:
        run: The run.
        names: Exact metric names.
        modules: Exact module names; "" is the whole run, None all.
        phases: Exact names; None is all.

    Returns:
        The sketches; None where there is no pyramid, where it does not show the log as it is now,
        or where several ranks hold one of the series.
    """
    found = _looked(run, names, modules, phases)
    return found[0].sketches if found is not None and found[1] else None


def first_look(
    run: Run,
    names: Sequence[str],
    *,
    modules: Sequence[str] | None = ("",),
    phases: Sequence[str] | None = ("train",),
) -> FirstLook | None:
    """Sketches of what was merged, and the points that were logged since.

    Args:
        run: The run.
        names: Exact metric names.
        modules: Exact module names; "" is the whole run, None all.
        phases: Exact names; None is all.

    Returns:
        The look; None where there is no pyramid, where rows that it shows have gone, where it is of
        another run or merge, where several ranks hold one of the series, or where a later row
        belongs to a step that a sketch covers.
    """
    found = _looked(run, names, modules, phases)
    return None if found is None else found[0]


def series_path(layout: Layout) -> Path:
    """``pyramid/series.parquet``: one row a series."""
    return layout.pyramid.with_name("series.parquet")


def pyramid_facts(run_id: str, footers: Sequence[Footer]) -> dict[str, str]:
    """What a pyramid says of itself: which rows of which run it shows."""
    ranks = sorted({footer.rank for footer in footers})
    mine = {rank: [footer for footer in footers if footer.rank == rank] for rank in ranks}
    facts = {
        "run_id": run_id,
        "generation": str(max(footer.generation for footer in footers)),
        "end_rows": json.dumps({rank: max(f.end_row for f in mine[rank]) for rank in ranks}),
        "rows": json.dumps({rank: sum(f.rows for f in mine[rank]) for rank in ranks}),
    }
    return {f"{_PREFIX}{name}": value for name, value in facts.items()}


def covered_by(groups: Groups, run_id: str, view: View) -> dict[int, int] | None:
    """The first ordinal of each rank that a pyramid does not show; None if it shows other rows."""
    facts = {key.decode().removeprefix(_PREFIX): value for key, value in groups.facts.items()}
    try:
        ends = {int(rank): int(end) for rank, end in json.loads(facts["end_rows"]).items()}
        shown = {int(rank): int(rows) for rank, rows in json.loads(facts["rows"]).items()}
        of_this = facts["run_id"].decode() == run_id
        generation = int(facts["generation"])
    except (KeyError, ValueError, AttributeError, TypeError):
        return None
    rows = dict.fromkeys(shown, 0)
    for _, footer in view.segments:
        end = ends.get(footer.rank, 0)
        if footer.first_row < end < footer.end_row:
            return None
        if footer.end_row <= end:
            rows[footer.rank] = rows.get(footer.rank, 0) + footer.rows
    newest = max((footer.generation for _, footer in view.segments), default=0)
    return ends if of_this and generation == newest and rows == shown else None


def pyramid_parts(
    run: Run, view: View, selection: Selection, path: Path, columns: Sequence[str]
) -> tuple[list[Part], dict[int, int]] | None:
    """Rows of the pyramid's file, and what it covers; None where it is of no use."""
    try:
        groups = run.remembered(path, Groups.of)
    except (pa.ArrowException, OSError, ValueError):
        return None
    covered = covered_by(groups, run.run_id, view)
    if covered is None or not groups.columns.issuperset(columns):
        return None
    kinds = {name: _KINDS[name] for name in columns}
    parts, damaged = parts_of([Source(path, groups)], selection, kinds)
    run.warn(damaged)
    return None if damaged else (parts, covered)


def _looked(
    run: Run,
    names: Sequence[str],
    modules: Sequence[str] | None,
    phases: Sequence[str] | None,
) -> tuple[FirstLook, bool] | None:
    path = Layout(run.path).pyramid

    def look() -> tuple[FirstLook, bool, list[str]] | None:
        view = run.view("metrics")
        selection = Selection(names, modules, phases)
        found = pyramid_parts(run, view, selection, path, list(_KINDS))
        sketches = None if found is None else _sketches(found[0], selection)
        if found is None or sketches is None:
            return None
        after = replace(view, start=found[1])
        rest, notes = gathered(run, after, selection)
        if any(_overlaps(sketches[key], rest[key]) for key in rest.keys() & sketches.keys()):
            return None
        whole = dict(view.cursor.next_rows) == found[1]
        return FirstLook(sketches, rest, view.cursor), whole, [*view.notes, *notes]

    seen = run.steadily("metrics", look)
    if seen is None:
        return None
    run.warn(seen[2], stacklevel=4)
    return seen[0], seen[1]


def _overlaps(sketch: Sketch, points: Points) -> bool:
    return bool(points.steps[0] <= sketch.last_steps[-1])


def _sketches(parts: Sequence[Part], selection: Selection) -> dict[Key, Sketch] | None:
    """None where a series is of several ranks, or a step of it has several rows."""
    rows: dict[int, list[dict[str, Any]]] = {}
    for part in parts:
        for number, columns in part.series():
            rows.setdefault(number, []).append(columns)
    sketches = {}
    for number, found in rows.items():
        columns = {name: np.concatenate([part[name] for part in found]) for name in _KINDS}
        ranks, steps = columns.pop("rank"), columns["last_step"]
        crowded = columns["count"] > steps - columns["first_step"] + 1
        if (
            (ranks != ranks[0]).any()
            or crowded.any()
            or (columns["first_step"][1:] <= steps[:-1]).any()
        ):
            return None
        for name in ("min_step", "max_step"):
            columns[name] = np.maximum(columns[name], -1)
        names = (field.name for field in fields(Sketch))
        order = dict(zip(names, [name for name in _KINDS if name != "rank"], strict=True))
        sketches[selection.key(number)] = Sketch(**{k: columns[v] for k, v in order.items()})
    return sketches
