"""What came since figures were drawn, as additions to them; the browser keeps how far they go."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from dash import Patch
from numpy.typing import NDArray

from entropylens.errors import EntropyLensError
from entropylens.figures.axes import Axis, axis_title, view_of
from entropylens.figures.drawing import SPARSE, lines_of
from entropylens.figures.thinning import Memory, smoothed
from entropylens.store.points import Points
from entropylens_dashboard.readings import Readings
from entropylens_dashboard.sheet import Ask, Sheet

__all__ = ["added"]

MOST_NEW: Final = 500
"""New points of a line that are added to it; where there are more the figure is drawn anew."""
MOST_SHOWN: Final = 2500
"""Points of a line beyond which its figure is drawn anew, thinned."""

Ledger = Mapping[str, Any]
"""What `Sheet.ledger` gives."""


def added(
    sheet: Sheet, readings: Readings, ledger: Ledger
) -> tuple[dict[str, Patch], dict[str, Any]] | None:
    """What is to be added to the figures since the ledger was written.

    Args:
        sheet: As the figures were drawn from; it need not have been read.
        readings: Where rows come from.
        ledger: What the browser kept.

    Returns:
        Patches by panel, and the ledger to keep; None where the figures have to be drawn anew: a
        run was resumed or merged, a series is new, or there is too much to add.

    Cost: Reads only rows after the ledger's cursors.
    """
    if not _is_whole(ledger, sheet):
        return None
    if ledger["view"] != sheet.signature() or not ledger["reaches_end"]:
        return {}, dict(ledger)  # other figures are on their way, or the end is out of view
    found = _read(sheet, readings, ledger)
    if found is None:
        return None
    fresh, cursors = found
    view = sheet.view
    if sheet.baseline is not None or view.by == "tokens" or view.within is not None:
        return None if fresh else ({}, {**ledger, "cursors": cursors})
    if not _can_be_added(fresh, ledger):
        return None
    sheet.starts = dict(ledger["starts"])
    kept = {**ledger, "cursors": cursors}
    kept |= {part: dict(ledger[part]) for part in ("last", "memory", "counts")}
    asks = {ask.name: ask for _, asks in sheet.panels for ask in asks}
    patches = {}
    for panel, lines in ledger["lines"].items():
        own = [asks[name] for name in lines]
        if any(ask.name in fresh for ask in own):
            patches[panel] = _extended(sheet, panel, own, fresh, kept)
    kept["last"] |= {name: int(points.steps[-1]) for name, points in fresh.items()}
    _widen(sheet, asks, fresh, kept, patches)
    _mark(sheet, kept, patches)
    return patches, kept


def _is_whole(ledger: Any, sheet: Sheet) -> bool:
    """Whether a ledger is one that this sheet could have written: it comes from a browser."""
    names = {ask.name for _, asks in sheet.panels for ask in asks}
    parts = ("cursors", "starts", "lines", "last", "memory", "counts", "constant")
    more = {"reaches_end", "extent", "view", "marks"}
    if not isinstance(ledger, Mapping) or {*parts, *more} - set(ledger):
        return False
    if not all(isinstance(ledger[part], Mapping) for part in parts):
        return False
    lines = [name for own in ledger["lines"].values() if isinstance(own, list) for name in own]
    if not _are(str, lines) or len(lines) > sum(len(asks) for _, asks in sheet.panels):
        return False
    averaged = {name for name in lines if "\nline\n" in name} if sheet.view.smoothing else set()
    return (
        set(sheet.runs) <= set(ledger["cursors"])
        and set(sheet.runs) <= set(ledger["starts"])
        and set(lines) <= names
        and set(ledger["last"]) <= names
        and averaged <= set(ledger["memory"])
        and set(ledger["lines"]) <= set(ledger["counts"])
        and _are(str, ledger["cursors"].values())
        and _are(float, ledger["starts"].values())
        and _are(float, ledger["last"].values())
        and all(_is_pair(pair) for part in ("memory", "counts") for pair in ledger[part].values())
        and (ledger["extent"] is None or _is_pair(ledger["extent"]))
    )


def _are(kind: type, values: Iterable[Any]) -> bool:
    kinds = (int, float) if kind is float else (kind,)
    return all(isinstance(value, kinds) and not isinstance(value, bool) for value in values)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and _are(float, value)


def _read(
    sheet: Sheet, readings: Readings, ledger: Ledger
) -> tuple[dict[str, Points], dict[str, str]] | None:
    """New points by line, and new cursors by run; None where a cursor is of no use any more."""
    fresh: dict[str, Points] = {}
    cursors = dict(ledger["cursors"])
    for run_id, run in sheet.runs.items():
        own = [ask for _, asks in sheet.panels for ask in asks if ask.run_id == run_id]
        try:
            found = readings.since(run, [ask.key for ask in own], cursors[run_id])
        except (ValueError, EntropyLensError):  # of another run, or none; or it took too long
            return None
        if found.restarted:
            return None
        cursors[run_id] = str(found.cursor)
        points = {ask.name: found.series.get(ask.key) for ask in own}
        fresh |= {name: p for name, p in points.items() if p is not None and len(p.steps)}
    return fresh, cursors


def _can_be_added(fresh: Mapping[str, Points], ledger: Ledger) -> bool:
    for name, points in fresh.items():
        before = ledger["last"].get(name)
        if before is None or points.steps[0] <= before or len(points.steps) > MOST_NEW:
            return False
    return all(_may_grow(panel, lines, fresh, ledger) for panel, lines in ledger["lines"].items())


def _may_grow(
    panel: str, lines: Sequence[str], fresh: Mapping[str, Points], ledger: Ledger
) -> bool:
    """Whether a figure stays right with new points: its scale, its dots, their number."""
    shown = ledger["counts"][panel][0]
    new = [fresh[name].values for name in lines if name in fresh]
    constant = ledger["constant"].get(panel)
    if constant is not None and any((values != constant).any() for values in new):
        return False
    grown = shown + sum(map(len, new))
    few = SPARSE * len(lines)
    return grown <= MOST_SHOWN * len(lines) and not shown < few <= grown


def _extended(
    sheet: Sheet,
    panel: str,
    asks: Sequence[Ask],
    fresh: Mapping[str, Points],
    kept: dict[str, Any],
) -> Patch:
    """Points at the end of a figure's traces, in the order that `figures.traces` gives them."""
    patch, at = Patch(), 0
    shown, total = kept["counts"][panel]
    for ask in asks:
        points = fresh.get(ask.name)
        width = 1 if ask.shown.role != "line" else 3 if sheet.view.smoothing else 2
        if points is not None:
            _extend_line(patch, at, width, sheet, ask, points, kept)
            shown, total = shown + len(points.steps), total + len(points.steps)
        at += width
    kept["counts"][panel] = [shown, total]
    patch["layout"]["xaxis"]["title"]["text"] = axis_title(sheet.axis, shown, total)
    return patch


def _extend_line(
    patch: Patch,
    at: int,
    width: int,
    sheet: Sheet,
    ask: Ask,
    points: Points,
    kept: dict[str, Any],
) -> None:
    x = sheet.axis.placed(sheet.places(ask.run_id, points)).tolist()
    _extend(patch, at, x, points.values)
    if width == 3:
        before = Memory(*kept["memory"][ask.name])
        averages, memory = smoothed(points.values, sheet.view.smoothing, before)
        kept["memory"][ask.name] = list(memory)
        _extend(patch, at + 1, x, averages)
    wild = np.flatnonzero(~np.isfinite(points.values))
    if width > 1 and wild.size:
        last = at + width - 1
        _extend(patch, last, [x[place] for place in wild], np.full(wild.size, 0.03))
        patch["data"][last]["showlegend"] = True
        patch["layout"]["showlegend"] = True


def _extend(patch: Patch, trace: int, x: list[Any], y: NDArray[np.float64]) -> None:
    patch["data"][trace]["x"].extend(x)
    values = [float(f"{value:.7g}") if math.isfinite(value) else None for value in y.tolist()]
    patch["data"][trace]["y"].extend(values)


def _mark(sheet: Sheet, kept: dict[str, Any], patches: dict[str, Patch]) -> None:
    """Have every panel show what happened meanwhile."""
    if kept["marks"] == len(sheet.marks):
        return
    kept["marks"] = len(sheet.marks)
    references = {panel.key: panel.reference for panel, _ in sheet.panels}
    for panel in kept["lines"]:
        shown = lines_of(sheet.marks, sheet.axis, references[panel])
        patches.setdefault(panel, Patch())["layout"]["shapes"] = shown


def _widen(
    sheet: Sheet,
    asks: Mapping[str, Ask],
    fresh: Mapping[str, Points],
    kept: dict[str, Any],
    patches: dict[str, Patch],
) -> None:
    """Have every panel end where the newest value stands."""
    if not fresh or kept["extent"] is None:
        return
    ends = [float(sheet.places(asks[n].run_id, p)[-1]) for n, p in fresh.items()]
    low, high = kept["extent"]
    kept["extent"] = [low, max(high, *ends)]
    view = view_of(Axis(sheet.axis.by, None, (low, max(high, *ends))))
    for panel in kept["lines"]:
        patches.setdefault(panel, Patch())["layout"]["xaxis"]["range"] = view
