"""Figures as plain documents for plotly.js, shared by whatever shows them; none reads a file."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from entropylens.figures.axes import BY_STEP, LABELS, Axis, axis_title, view_of
from entropylens.figures.colours import COLOURS, SEVERITIES, with_opacity
from entropylens.figures.panels import Shown
from entropylens.figures.thinning import POINTS, kept

__all__ = [
    "SPARSE",
    "Drawn",
    "Mark",
    "Span",
    "draw",
    "figure",
    "lines_of",
    "marks_figure",
    "traces",
]

_SMALL: Final[dict[str, Any]] = {
    "height": None,
    "autosize": True,
    "margin": {"l": 44, "r": 10, "t": 18, "b": 36},
    "font": {"size": 10.5},
    "legend": {"orientation": "h", "y": 1, "yanchor": "bottom", "x": 0, "font": {"size": 10}},
}
SPARSE: Final = 60
"""Points below which each is drawn as a dot too."""
_LEGEND: Final = 14
"""Lines beyond which a legend would take the figure's place."""
_MARKS: Final = 30
"""Vertical lines of a figure at most."""


@dataclass(frozen=True)
class Span:
    """A stretch that is shaded, and why."""

    first: float
    last: float
    label: str


@dataclass(frozen=True)
class Mark:
    """Something that happened: an alarm, a control action, a start."""

    x: float
    kind: str
    severity: str
    message: str


@dataclass(frozen=True)
class Drawn:
    """A series, thinned for a figure."""

    shown: Shown
    key: str
    """Which series it is, for who extends it."""
    x: NDArray[Any]
    y: NDArray[np.float64]
    """Finite, or NaN where the line is broken."""
    wild: NDArray[Any]
    """Where values were NaN or infinite."""
    total: int
    """Values that stand behind it."""
    dash: str = "solid"
    smooth: tuple[NDArray[Any], NDArray[np.float64]] | None = None
    """The moving average, thinned like it; the series itself is then drawn faintly."""


def draw(
    shown: Shown,
    steps: NDArray[np.int64],
    values: NDArray[np.float64],
    x: NDArray[Any] | None = None,
    *,
    key: str = "",
    total: int | None = None,
    dash: str = "solid",
    points: int = POINTS,
) -> Drawn:
    """Thin a series for a figure; every stretch keeps its extremes and its NaN.

    Args:
        shown: How it is drawn.
        steps: ``[n]``, increasing.
        values: ``[n]``.
        x: ``[n]``, its places on the axis; None is its steps.
        key: Which series it is.
        total: Values that stand behind it, where ``values`` is not all of them.
        dash: Of the line.
        points: At most.

    Returns:
        The series, to be given to `figure`.
    """
    x = steps if x is None else x
    chosen = kept(steps, values, points)
    taken, is_finite = values[chosen], np.isfinite(values)
    return Drawn(
        shown,
        key,
        x[chosen],
        np.where(np.isfinite(taken), taken, np.nan),
        x[chosen][~np.isfinite(taken)] if not is_finite.all() else x[:0],
        len(values) if total is None else total,
        dash,
    )


def figure(
    drawn: Sequence[Drawn],
    *,
    unit: str,
    axis: Axis = BY_STEP,
    logarithmic: bool = False,
    reference: float | None = None,
    spans: Sequence[Span] = (),
    marks: Sequence[Mark] = (),
    revision: str = "",
    is_small: bool = False,
) -> dict[str, Any]:
    """Lines and bands over one axis, on transparent ground.

    A cross at the lower edge says where a value was NaN or infinite, the title of the axis how many
    of how many points are drawn, a vertical line that something happened.

    Args:
        drawn: In order; low and high edges of a band follow one another.
        unit: Title of the vertical axis.
        axis: The horizontal one.
        logarithmic: Scale of the vertical axis; what is not positive is left out of it.
        reference: A value drawn across.
        spans: Shaded stretches; the first is labelled.
        marks: Those of severity warning and error get a line.
        revision: What a person has set (zoom, hidden lines) survives while this stays the same.
        is_small: One of many on a screen: it fills its frame, which names the unit.

    Returns:
        A document with ``data`` and ``layout``; arrays are numpy.
    """
    layout = _layout("" if is_small else unit, axis, logarithmic, revision)
    layout["shapes"] = [*_shades(spans), *lines_of(marks, axis, reference)]
    layout["annotations"] = _labels(spans)
    counts = sum(len(one.x) for one in drawn), sum(one.total for one in drawn)
    layout["meta"] = counts
    layout["xaxis"]["title"]["text"] = axis_title(axis, *counts)
    layout["showlegend"] = _needs_legend(drawn)
    if logarithmic and _decades(drawn) < 3:
        layout["yaxis"]["dtick"] = "D2"  # 1, 2 and 5 of each
    if _is_constant(drawn):
        layout["yaxis"]["rangemode"] = "tozero"  # else plotly.js takes the value +- 1
    if is_small:
        layout |= _SMALL
        if axis.by == "time":
            layout["margin"] = {**_SMALL["margin"], "b": 48}
    data = [trace for one in drawn for trace in traces(one, axis)]
    return {"data": data, "layout": layout}


def traces(one: Drawn, axis: Axis) -> Iterator[dict[str, Any]]:
    """The traces of one series: the line, its moving average, where it was no number.

    Each says in ``meta`` which it is.
    """
    shown, name = one.shown, escape(one.shown.label, quote=False)
    if shown.role != "line":
        yield _edge(one, axis, name)
        return
    faint = one.smooth is not None
    line = {"color": COLOURS.get(shown.colour, shown.colour), "width": 1.6, "dash": one.dash}
    sparse = len(one.x) < SPARSE and not faint
    common = {"name": name, "legendgroup": one.key, "hovertemplate": "%{y:.6~g}"}
    yield {
        **common,
        "meta": [one.key, "line"],
        "x": axis.placed(one.x),
        "y": one.y,
        "mode": "lines+markers" if sparse else "lines",
        "marker": {"size": 4},
        "line": line,
        "opacity": 0.3 if faint else 1,
        "showlegend": not faint,
    }
    if one.smooth is not None:
        x, y = one.smooth
        yield {
            **common,
            "meta": [one.key, "smooth"],
            "x": axis.placed(x),
            "y": y,
            "mode": "lines",
            "line": {**line, "width": 2},
        }
    yield _wild(one, axis, name)


def _wild(one: Drawn, axis: Axis, name: str) -> dict[str, Any]:
    return {
        "name": f"{name}: not a number",
        "legendgroup": one.key,
        "meta": [one.key, "wild"],
        "x": axis.placed(one.wild),
        "y": np.full(len(one.wild), 0.03),
        "yaxis": "y2",
        "mode": "markers",
        "marker": {"symbol": "x", "size": 8, "color": COLOURS["red"]},
        "hovertemplate": "NaN or infinite",
        "showlegend": bool(len(one.wild)),
    }


def marks_figure(marks: Sequence[Mark], axis: Axis, revision: str = "") -> dict[str, Any]:
    """A lane of what happened: shape and colour say how bad, the text what.

    Args:
        marks: In order.
        axis: As the figures' below it.
        revision: As theirs.

    Returns:
        A document with ``data`` and ``layout``.
    """
    layout = _layout("", axis, False, revision)
    layout |= {**_SMALL, "margin": {"l": 54, "r": 10, "t": 4, "b": 18}, "hovermode": "closest"}
    layout["xaxis"] |= {"title": {"text": ""}, "fixedrange": True}
    if axis.by == "time":
        layout["margin"]["b"] = 30
    lanes = {"error": 2, "warning": 1, "info": 0}
    layout["yaxis"] |= {
        "range": [-0.6, 2.6],
        "fixedrange": True,
        "tickvals": [0, 1, 2],
        "ticktext": ["note", "warning", "error"],
    }
    data = []
    for severity, (colour, symbol) in SEVERITIES.items():
        own = [mark for mark in marks if mark.severity == severity]
        data.append(
            {
                "x": axis.placed(np.array([mark.x for mark in own])),
                "y": [lanes[severity]] * len(own),
                "text": [escape(f"{m.kind}: {_cut(m.message)}", quote=False) for m in own],
                "hovertemplate": "%{text}<extra></extra>",
                "name": severity,
                "mode": "markers",
                "marker": {"color": colour, "symbol": symbol, "size": 10},
                "showlegend": False,
            }
        )
    return {"data": data, "layout": layout}


def _cut(text: str, most: int = 160) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _decades(drawn: Sequence[Drawn]) -> float:
    values = np.concatenate([one.y[one.y > 0] for one in drawn]) if drawn else np.zeros(0)
    return float(np.log10(values.max() / values.min())) if values.size else 0.0


def _needs_legend(drawn: Sequence[Drawn]) -> bool:
    if len(drawn) > _LEGEND:
        return False
    is_plain = len(drawn) == 1 and drawn[0].shown.phase == "train" and not len(drawn[0].wild)
    return not is_plain


def _is_constant(drawn: Sequence[Drawn]) -> bool:
    values = np.concatenate([np.zeros(0), *(one.y[np.isfinite(one.y)] for one in drawn)])
    return bool(values.size) and values.min() == values.max()


def _edge(one: Drawn, axis: Axis, name: str) -> dict[str, Any]:
    is_high = one.shown.role == "high"
    trace = {
        "name": name,
        "meta": [one.key, "line"],
        "x": axis.placed(one.x),
        "y": one.y,
        "mode": "lines",
        "line": {"width": 0, "color": COLOURS[one.shown.colour]},
        "showlegend": is_high and bool(name),
        "hovertemplate": "%{y:.4~g}",
        "hoverinfo": "skip" if not is_high else "all",
    }
    if is_high:
        trace |= {"fill": "tonexty", "fillcolor": with_opacity(COLOURS[one.shown.colour], 0.2)}
    return trace


def _layout(unit: str, axis: Axis, logarithmic: bool, revision: str) -> dict[str, Any]:
    x: dict[str, Any] = {
        "title": {"text": LABELS[axis.by], "standoff": 4, "font": {"size": 11}},
        "zeroline": False,
        "type": "date" if axis.by == "time" else "linear",
        "uirevision": f"{revision} {axis.within}",
    }
    if axis.within is None and axis.extent is None:
        x["autorange"] = True
    else:
        x["range"] = view_of(axis)
    y: dict[str, Any] = {
        "title": {"text": unit},
        "zeroline": False,
        "type": "log" if logarithmic else "linear",
    }
    y |= {"automargin": True, "exponentformat": "power"}
    return {
        "height": 260,
        "margin": {"l": 64, "r": 16, "t": 24, "b": 40},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hovermode": "x unified",
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": COLOURS["grey"]},
        "uirevision": f"{revision} {logarithmic}",
        "xaxis": x,
        "yaxis": y,
        "yaxis2": {"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True},
    }


def _shades(spans: Sequence[Span]) -> list[dict[str, Any]]:
    style = {"fillcolor": COLOURS["orange"], "opacity": 0.14, "line": {"width": 0}}
    return [
        {"type": "rect", "x0": s.first, "x1": s.last, "y0": 0, "y1": 1, "yref": "y domain"}
        | {"layer": "below", **style}
        for s in spans
    ]


def _labels(spans: Sequence[Span]) -> list[dict[str, Any]]:
    return [
        {"x": s.first, "y": 1, "yref": "y domain", "xanchor": "left", "yanchor": "top"}
        | {"text": escape(s.label, quote=False), "showarrow": False, "font": {"size": 11}}
        for s in spans[:1]
    ]


def lines_of(marks: Sequence[Mark], axis: Axis, reference: float | None) -> list[dict[str, Any]]:
    """Vertical lines of the gravest and newest marks, and the value that must not be passed."""
    grave = [mark for mark in marks if mark.severity in ("error", "warning")]
    grave = sorted(grave, key=lambda mark: (mark.severity != "error", -mark.x))[:_MARKS]
    lines = [
        {"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "y domain", "opacity": 0.7}
        | {"line": {"width": 1, "dash": "dot", "color": SEVERITIES[mark.severity][0]}}
        for mark, x in ((m, axis.placed(np.array([m.x]))[0].item()) for m in grave)
    ]
    if reference is not None:
        line = {"width": 1.5, "dash": "dash", "color": COLOURS["red"]}
        across = {"type": "line", "y0": reference, "y1": reference, "x0": 0, "x1": 1}
        lines.append({**across, "xref": "x domain", "line": line})
    return lines
