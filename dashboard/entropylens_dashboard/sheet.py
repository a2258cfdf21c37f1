"""From what a page asks for to figures, and from new rows to what is added to them."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from entropylens.analysis.compare import aligned, ratio
from entropylens.figures.axes import Axis
from entropylens.figures.drawing import Drawn, Mark, draw, figure
from entropylens.figures.panels import Panel, Shown, unit_of
from entropylens.figures.thinning import smoothed
from entropylens.store.points import Key, Points
from entropylens.store.reader import Run
from entropylens_dashboard.readings import Readings, Stretch

__all__ = ["Ask", "Picture", "Sheet", "View", "mapping", "texts"]

TOKENS: Final = Key("tokens/seen", "", "train")
STARTS: Final = (TOKENS, Key("loss/mean", "", "train"), Key("step/seconds", "", "train"))
POINTS: Final = 600
"""Points of a line, in a figure some 300 pixels wide; less where many runs share one."""
POINTS_OF_ALL: Final = 20_000
"""Points of a figure."""
LONGEST: Final = 1000
"""Characters of a name that a browser may ask for."""
FARTHEST: Final = 1e15
"""No step, token or second lies beyond."""
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
        controls = mapping(controls)
        by = controls.get("by")
        scale = controls.get("scale")
        return cls(
            by if by in AXES else "step",
            min(max(_number(controls.get("smooth")) or 0.0, 0.0), 0.999),
            {"log": True, "linear": False}.get(str(scale)),
            _range(within),
        )


def texts(value: Any, default: Sequence[str], most: int) -> list[str]:
    """A control's list, or the text of it that an address carries; at most so many."""
    if value is None or value == "":
        return list(default)[:most]
    found = value.split(",") if isinstance(value, str) else value
    known = (
        [_without_halves(one) for one in found if isinstance(one, str)] if _is_list(found) else []
    )
    known = [one for one in known if one and len(one) <= LONGEST]
    return list(dict.fromkeys(known if _is_list(found) else default))[:most]


def _without_halves(text: str) -> str:
    """Without half characters, which no answer could carry."""
    return text.encode("utf-8", "ignore").decode("utf-8")


def mapping(value: Any) -> Mapping[str, Any]:
    """What a browser keeps under names; nothing where it sends something else."""
    return value if isinstance(value, Mapping) else {}


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _number(value: Any) -> float | None:
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if abs(found) < FARTHEST else None


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
        self._hours, self.marks = hours, marks
        self._series: dict[str, dict[Key, Stretch]] = {}
        self.starts: dict[str, float] = {}
        """When each run began, unix seconds."""
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
            if run_id == self.baseline:
                asks = [ask for _, asks in self.panels for ask in asks]
            # The run's start must not depend on which series are looked at.
            keys = [*(ask.key for ask in asks), *(STARTS if self._hours else ())]
            keys += [TOKENS] if view.by == "tokens" else []
            whole = view.smoothing > 0 or (view.within is not None and view.by != "step")
            found, self.cursors[run_id] = readings.look(run, keys, is_whole=whole)
            starts = [float(s.times[0]) for s in found.values() if len(s.times)]
            self.starts[run_id] = min(starts, default=0.0)
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

    def has_lines(self) -> bool:
        """Whether anything was asked for."""
        return any(asks for _, asks in self.panels)

    def signature(self) -> list[Any]:
        """What the figures depend on but for rows; figures of another are not to be extended."""
        view = self.view
        within = None if view.within is None else list(view.within)
        asked = [view.by, view.smoothing, view.logarithmic, within, self.baseline]
        return [*asked, sorted({ask.run_id for _, asks in self.panels for ask in asks})]

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
        tokens = self._series.get(run_id, {}).get(TOKENS) if axis.by == "tokens" else None
        seconds = aligned(
            stretch.steps,
            stretch.times,
            None if tokens is None else (tokens.steps, tokens.values),
            "time" if axis.by == "hours" else "tokens",
            start=self.starts[run_id],
        )
        return seconds / 3600 if axis.by == "hours" else seconds

    def pictures(self) -> Iterator[Picture]:
        """The panels that have something to show."""
        for panel, asks in self.panels:
            there = sum(ask.key in self._series.get(ask.run_id, {}) for ask in asks)
            most = max(min(POINTS, POINTS_OF_ALL // max(there, 1)), 100)
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
            "view": self.signature(),
            "marks": len(self.marks),
            "constant": {p.panel.key: _constant(p.figure) for p in pictures},
            "cursors": self.cursors,
            "starts": self.starts,
            "reaches_end": self.reaches_end(),
            "extent": self._extent(),
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
            marks=self.marks,
            revision=f"{self.view.by} {self.baseline}",
        )


def _margins(within: tuple[float, float]) -> tuple[float, float]:
    """A quarter of the view on either side, so that a short pan shows no void."""
    low, high = within
    return low - (high - low) / 4, high + (high - low) / 4


def _constant(document: Mapping[str, Any]) -> float | None:
    """The value that a figure drawn as constant has."""
    if "rangemode" not in document["layout"]["yaxis"]:
        return None
    drawn = next(t["y"][np.isfinite(t["y"])] for t in document["data"] if np.isfinite(t["y"]).any())
    return float(drawn[0])


def _counted(document: Mapping[str, Any]) -> list[int]:
    return list(document["layout"]["meta"])
