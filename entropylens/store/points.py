"""Series of a run as numpy arrays, fast: whole, by steps, from a cursor on, or a first look.

>>> from entropylens.store.points import Key
>>> Key("loss/mean", "", "train").name
'loss/mean'
"""

from collections.abc import Sequence
from dataclasses import dataclass

from entropylens.store.columns import Late
from entropylens.store.gathering import gathered, too_late
from entropylens.store.listing import SeriesFacts, list_series
from entropylens.store.pyramid import FirstLook, Sketch, first_look, read_sketches
from entropylens.store.ranks import Key, Points
from entropylens.store.reader import Cursor, Run
from entropylens.store.selection import Selection

__all__ = [
    "FirstLook",
    "Found",
    "Key",
    "Points",
    "SeriesFacts",
    "Sketch",
    "first_look",
    "list_series",
    "read_points",
    "read_sketches",
]


@dataclass(frozen=True)
class Found:
    """Series that were read."""

    series: dict[Key, Points]
    """Those that have points."""
    cursor: Cursor
    """Give it as ``since`` to read only what came later."""
    restarted: bool
    """The cursor given was of before a resume or merge: these are all points again."""
    warnings: list[str]
    """Files that were skipped, and why."""


def read_points(
    run: Run,
    names: Sequence[str],
    *,
    modules: Sequence[str] | None = ("",),
    phases: Sequence[str] | None = ("train",),
    steps: tuple[int | None, int | None] | None = None,
    since: Cursor | str | None = None,
    deadline: float | None = None,
) -> Found:
    """Points of series, one a step, ranks combined as the metric dictionary says.

    Rows without a step or a value make no point.

    Args:
        run: The run.
        names: Exact metric names.
        modules: Exact module names; "" is the whole run, None all.
        phases: Exact names; None is all.
        steps: First and last step, both included; None on either side is open.
        since: A cursor that an earlier read returned: only steps to which rows were added since.
            Such a step is there whole: where another rank had it before, it takes its place.
        deadline: Of `time.monotonic`.

    Returns:
        The series.

    Raises:
        ValueError: The cursor is of another run or table.
        EntropyLensError: The deadline has passed.

    Cost: What is wanted is held in memory, and one row group of each thread.
    """

    def read() -> Found:
        view = run.view("metrics", since)
        selection = Selection(names, modules, phases, steps)
        series, notes = gathered(run, view, selection, deadline)
        return Found(series, view.cursor, view.restarted, [*view.notes, *notes])

    try:
        found = run.steadily("metrics", read)
    except Late as late:
        raise too_late("read_points", names, late) from None
    run.warn(found.warnings)
    return found
