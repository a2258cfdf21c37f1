"""From what a page asks for to figures, and from new rows to what is added to them."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from dash import Patch
from numpy.typing import NDArray

from entropylens.analysis.compare import aligned, ratio
from entropylens.figures.drawing import Axis, Drawn, Mark, axis_title, draw, figure
from entropylens.figures.panels import Panel, Shown, unit_of
from entropylens.figures.thinning import Memory, smoothed
from entropylens.store.points import Key, Points
from entropylens.store.reader import Run
from entropylens_dashboard.readings import Readings, Stretch

__all__ = ["Ask", "Picture", "Sheet", "View", "tick"]

TOKENS: Final = Key("tokens/seen", "", "train")
POINTS: Final = 1000
"""Points of a line; less where many runs share a figure."""
POINTS_OF_ALL: Final = 20_000
"""Points of a figure."""
MOST_NEW: Final = 500
"""New points of a line that are added to it; where there are more the figure is drawn anew."""
AXES: Final = ("step", "tokens", "time")


@dataclass(frozen=True)
class View:
    """What a person has set; every value may come from a browser, none is trusted."""

    by: str = "step"
    smoothing: float = 0.0
    logarithmic: bool | None = None
    """None is as each panel has it."""
    within: tuple[float, float] | None = None

    @classmethod
    def parse(cls, controls: Mapping[str, Any], within: Any = None) -> "View":
        """The view that controls ask for; what makes no sense is left at its default."""
        by = controls.get("by")
        scale = controls.get("scale")
        return cls(
            by if by in AXES else "step",
            min(max(_number(controls.get("smooth")) or 0.0, 0.0), 0.999),
            {"log": True, "linear": False}.get(str(scale)),
            _range(within),
        )


def _number(value: Any) -> float | None:
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None


def _range(value: Any) -> tuple[float, float] | None:
    if not isinstance(value, list | tuple) or len(value) != 2:
        return None
    low, high = _number(value[0]), _number(value[1])
    return (low, high) if low is not None and high is not None and low < high else None


@dataclass(frozen=True)
class Ask:
    """One line of a panel: which series of which run, drawn how."""

    run_id: str
    """Of the library."""
    shown: Shown
    module: str = ""
    dash: str = "solid"

    @property
    def key(self) -> Key:
        """The series."""
        return Key(self.shown.name, self.module, self.shown.phase)

    @property
    def name(self) -> str:
        """Of the line, among all of a page."""
        return "\n".join((self.run_id, self.shown.role, *self.key))


@dataclass(frozen=True)
class Picture:
    """A panel with the lines that the runs have for it."""

    panel: Panel
    figure: dict[str, Any]
    asks: tuple[Ask, ...]
    unit: str
    """Of the vertical axis."""


class Sheet:
    """The panels of a page over one run or several.

    Args:
        runs: By identifier.
        panels: Each with its lines.
        view: What a person has set.
        hours: Time is counted from each run's start; else it is the clock's.
        baseline: Identifier of the run that the others are divided by.
        marks: What happened, drawn as vertical lines; ``x`` is where on the view's axis.
    """

    def __init__(
        self,
        runs: Mapping[str, Run],
        panels: Sequence[tuple[Panel, Sequence[Ask]]],
        view: View,
        *,
        hours: bool = False,
        baseline: str | None = None,
        marks: Sequence[Mark] = (),
    ) -> None:
        self.runs, self.view, self.baseline = runs, view, baseline
        self.panels = [(panel, list(asks)) for panel, asks in panels]
        self._hours, self._marks = hours, marks
        self._series: dict[str, dict[Key, Stretch]] = {}
        self._starts: dict[str, float] = {}
        self._ends: dict[str, tuple[float, float]] = {}
        self.cursors: dict[str, str] = {}

    @property
    def axis(self) -> Axis:
        """The horizontal axis."""
        by = "hours" if self.view.by == "time" and self._hours else self.view.by
        return Axis(by, self.view.within, self._extent())

    def read(self, readings: Readings) -> None:
        """Read what the panels need, of all or of the steps in view."""
        view = self.view
        for run_id, run in self.runs.items():
            asks = [ask for _, asks in self.panels for ask in asks if ask.run_id == run_id]
            keys = [ask.key for ask in asks]
            keys += [TOKENS] if view.by == "tokens" else []
            whole = view.smoothing > 0 or (view.within is not None and view.by != "step")
            found, self.cursors[run_id] = readings.look(run, keys, is_whole=whole)
            starts = [float(s.times[0]) for s in found.values() if len(s.times)]
            self._starts[run_id] = min(starts, default=0.0)
            self._series[run_id] = found
            places = [self.places(run_id, s) for s in found.values() if len(s.steps)]
            edges = [p[[0, -1]] for p in places if np.isfinite(p[[0, -1]]).all()]
            if edges:
                low, high = np.min(edges, axis=0)[0], np.max(edges, axis=0)[1]
                self._ends[run_id] = float(low), float(high)
            if view.within is not None and view.by == "step" and not view.smoothing:
                first, last = _margins(view.within)
                narrow = readings.within(run, keys, math.floor(first), math.ceil(last))
                totals = {key: stretch.total for key, stretch in found.items()}
                found = {key: replace(s, total=totals[key]) for key, s in narrow.items()}
            self._series[run_id] = found

    def reaches_end(self) -> bool:
        """Whether the newest values are in view."""
        within = self.view.within
        extent = self._extent()
        return within is None or extent is None or extent[1] <= within[1]

    def places(self, run_id: str, stretch: Stretch | Points) -> NDArray[Any]:
        """Where values of a run stand on the axis; NaN where that is not known."""
        axis = self.axis
        if axis.by == "step":
            return stretch.steps
        if axis.by == "time":
            return stretch.times
        tokens = self._series[run_id].get(TOKENS)
        seconds = aligned(
            stretch.steps,
            stretch.times,
            None if tokens is None else (tokens.steps, tokens.values),
            "time" if axis.by == "hours" else "tokens",
            start=self._starts[run_id],
        )
        return seconds / 3600 if axis.by == "hours" else seconds

    def pictures(self) -> Iterator[Picture]:
        """The panels that have something to show."""
        for panel, asks in self.panels:
            most = max(min(POINTS, POINTS_OF_ALL // max(len(asks), 1)), 100)
            found = [(ask, one) for ask in asks if (one := self._drawn(ask, most)) is not None]
            if any(ask.shown.role == "line" for ask, _ in found):
                lines = tuple(ask for ask, _ in found)
                unit = unit_of(lines[-1].shown.name)
                unit = "ratio to the baseline" if self.baseline is not None else unit
                yield Picture(panel, self._figure(panel, found), lines, unit)

    def ledger(self, pictures: Iterable[Picture]) -> dict[str, Any]:
        """What a browser keeps, for `tick` to go on from."""
        pictures = list(pictures)
        asks = {ask.name: ask for picture in pictures for ask in picture.asks}
        return {
            "cursors": self.cursors,
            "starts": self._starts,
            "reaches_end": self.reaches_end(),
            "lines": {p.panel.key: [ask.name for ask in p.asks] for p in pictures},
            "last": {name: self._last(ask) for name, ask in asks.items()},
            "memory": {
                name: list(smoothed(self._whole(ask).values, self.view.smoothing)[1])
                for name, ask in asks.items()
                if self.view.smoothing and ask.shown.role == "line"
            },
            "counts": {p.panel.key: _counted(p.figure) for p in pictures},
        }

    # -- one panel -------------------------------------------------------------------------------

    def _extent(self) -> tuple[float, float] | None:
        starts = [low for low, _ in self._ends.values()]
        ends = [high for _, high in self._ends.values()]
        return (min(starts), max(ends)) if ends else None

    def _whole(self, ask: Ask) -> Stretch:
        return self._series[ask.run_id][ask.key]

    def _last(self, ask: Ask) -> int:
        return int(self._whole(ask).steps[-1])

    def _drawn(self, ask: Ask, most: int) -> Drawn | None:
        stretch = self._series.get(ask.run_id, {}).get(ask.key)
        if stretch is None or not len(stretch.steps):
            return None
        x, values = self.places(ask.run_id, stretch), stretch.values
        if self.baseline is not None:
            values = self._over_baseline(ask, x, values)
        # A moving average needs all values, also those that are out of view or have no place.
        smoothing = self.view.smoothing if ask.shown.role == "line" else 0.0
        averages = smoothed(values, smoothing) if smoothing else None
        inside = self._inside(x)
        one = draw(
            ask.shown,
            stretch.steps[inside],
            values[inside],
            x[inside],
            key=ask.name,
            dash=ask.dash,
            total=stretch.total,
            points=most,
        )
        if averages is None:
            return one
        line = draw(ask.shown, stretch.steps[inside], averages[0][inside], x[inside], points=most)
        return replace(one, smooth=(line.x, line.y))

    def _inside(self, x: NDArray[Any]) -> NDArray[np.bool_] | slice:
        if self.axis.by == "step" and self.view.within is None:
            return slice(None)
        inside = np.isfinite(x)
        if self.view.within is not None:
            low, high = _margins(self.view.within)
            inside &= (x >= low) & (x <= high)
        return inside

    def _over_baseline(
        self, ask: Ask, x: NDArray[Any], values: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        base = self._series.get(str(self.baseline), {}).get(ask.key)
        if base is None:
            return np.full(len(values), np.nan)
        return ratio(x, values, self.places(str(self.baseline), base), base.values)

    def _figure(self, panel: Panel, found: Sequence[tuple[Ask, Drawn]]) -> dict[str, Any]:
        wanted = self.view.logarithmic
        return figure(
            [one for _, one in found],
            unit="",
            is_small=True,
            axis=self.axis,
            logarithmic=panel.logarithmic if wanted is None else wanted,
            reference=panel.reference,
            marks=self._marks,
            revision=f"{self.view.by} {self.baseline}",
        )


def tick(
    sheet: Sheet, readings: Readings, ledger: Mapping[str, Any]
) -> tuple[dict[str, Patch], dict[str, Any]] | None:
    """What is added to the figures since the ledger was written.

    Args:
        sheet: As the figures were drawn from; it need not have been read.
        readings: Where rows come from.
        ledger: What the browser kept.

    Returns:
        Patches by panel, and the ledger to keep; None where the figures have to be drawn anew: a
        run was resumed or merged, a series is new, or there is too much to add.
    """
    if not ledger["reaches_end"]:
        return {}, dict(ledger)
    view = sheet.view
    if sheet.baseline is not None or view.by == "tokens" or view.within is not None:
        return None if _is_news(sheet, readings, ledger) else ({}, dict(ledger))
    fresh: dict[str, Points] = {}
    cursors = dict(ledger["cursors"])
    asks = {ask.name: ask for _, asks in sheet.panels for ask in asks}
    for run_id, run in sheet.runs.items():
        own = {name: ask for name, ask in asks.items() if ask.run_id == run_id}
        found = readings.since(run, [ask.key for ask in own.values()], cursors[run_id])
        if found.restarted:
            return None
        cursors[run_id] = str(found.cursor)
        keys = {name: ask.key for name, ask in own.items()}
        fresh |= {n: found.series[k] for n, k in keys.items() if k in found.series}
    fresh = {name: points for name, points in fresh.items() if len(points.steps)}
    if not _can_be_added(fresh, ledger):
        return None
    sheet._starts = dict(ledger["starts"])
    kept = {**ledger, "cursors": cursors, "last": dict(ledger["last"])}
    kept["memory"], kept["counts"] = dict(ledger["memory"]), dict(ledger["counts"])
    patches = {}
    for panel, lines in ledger["lines"].items():
        patch = _added(sheet, panel, [asks[name] for name in lines], fresh, kept)
        if patch is not None:
            patches[panel] = patch
    for name, points in fresh.items():
        kept["last"][name] = int(points.steps[-1])
    return patches, kept


def _is_news(sheet: Sheet, readings: Readings, ledger: Mapping[str, Any]) -> bool:
    for run_id, run in sheet.runs.items():
        keys = [ask.key for _, asks in sheet.panels for ask in asks if ask.run_id == run_id]
        found = readings.since(run, keys, ledger["cursors"][run_id])
        if found.restarted or any(len(points.steps) for points in found.series.values()):
            return True
    return False


def _can_be_added(fresh: Mapping[str, Points], ledger: Mapping[str, Any]) -> bool:
    for name, points in fresh.items():
        before = ledger["last"].get(name)
        if before is None or points.steps[0] <= before or len(points.steps) > MOST_NEW:
            return False
    return all(shown <= 4 * POINTS_OF_ALL // 10 for shown, _ in ledger["counts"].values())


def _added(
    sheet: Sheet,
    panel: str,
    asks: Sequence[Ask],
    fresh: Mapping[str, Points],
    kept: dict[str, Any],
) -> Patch | None:
    """Points at the end of a figure's traces, in the order that `figures.traces` gives them."""
    if not any(ask.name in fresh for ask in asks):
        return None
    patch, at, smoothing = Patch(), 0, sheet.view.smoothing
    shown, total = kept["counts"][panel]
    for ask in asks:
        is_line = ask.shown.role == "line"
        width = (3 if smoothing else 2) if is_line else 1
        points = fresh.get(ask.name)
        if points is not None:
            x = sheet.axis.placed(sheet.places(ask.run_id, points)).tolist()
            wild = ~np.isfinite(points.values)
            _extend(patch, at, x, points.values)
            if is_line and smoothing:
                memory = Memory(*kept["memory"][ask.name])
                averages, memory = smoothed(points.values, smoothing, memory)
                kept["memory"][ask.name] = list(memory)
                _extend(patch, at + 1, x, averages)
            if is_line and wild.any():
                places = [place for place, is_wild in zip(x, wild, strict=True) if is_wild]
                _extend(patch, at + width - 1, places, np.full(len(places), 0.03))
                patch["data"][at + width - 1]["showlegend"] = True
                patch["layout"]["showlegend"] = True
            shown, total = shown + len(x), total + len(x)
        at += width
    kept["counts"][panel] = [shown, total]
    patch["layout"]["xaxis"]["title"]["text"] = axis_title(sheet.axis, shown, total)
    return patch


def _extend(patch: Patch, trace: int, x: list[Any], y: NDArray[np.float64]) -> None:
    patch["data"][trace]["x"].extend(x)
    values = [float(f"{value:.7g}") if math.isfinite(value) else None for value in y.tolist()]
    patch["data"][trace]["y"].extend(values)


def _margins(within: tuple[float, float]) -> tuple[float, float]:
    """A quarter of the view on either side, so that a short pan shows no void."""
    low, high = within
    return low - (high - low) / 4, high + (high - low) / 4


def _counted(document: Mapping[str, Any]) -> list[int]:
    return list(document["layout"]["meta"])
