"""Figures of a run's series, shared by whatever shows them; a figure never reads a file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

__all__ = ["COLOURS", "Line", "Span", "band_figure", "line_figure", "thin"]

COLOURS: Final = {
    "blue": "#3b82c4",
    "orange": "#e08214",
    "green": "#1b9e77",
    "purple": "#9467bd",
    "grey": "#8a8f98",
    "red": "#d6604d",
}
"""Told apart with every common colour blindness, and on light and dark ground; lines also differ in
their dashes."""

POINTS: Final = 2000
"""Points of a line at most; what lies between is kept as its minimum and maximum."""

_DASHES: Final = ("solid", "dash", "dot", "dashdot")


class Series(Protocol):
    """What a figure draws."""

    @property
    def steps(self) -> NDArray[np.int64]:
        """Optimiser steps, increasing."""

    @property
    def values(self) -> NDArray[np.float64]:
        """One value a step."""


@dataclass(frozen=True)
class Line:
    """A series and how it is drawn."""

    label: str
    series: Series
    colour: str = "blue"
    points: bool = False
    """Draw single points too: sparse measurements."""


@dataclass(frozen=True)
class Span:
    """Steps that are shaded, and why."""

    first: int
    last: int
    label: str


def thin(
    steps: NDArray[np.int64], values: NDArray[np.float64], points: int = POINTS
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """At most so many points, with the smallest and the largest value of every stretch among them.

    Values that are not finite are kept too, as NaN, which breaks the line: one of each stretch.

    Args:
        steps: ``[n]``, increasing.
        values: ``[n]``.
        points: At most.

    Returns:
        Steps and values.

    Example:
        >>> steps, values = thin(np.arange(10_000), np.eye(1, 10_000, 777)[0], 100)
        >>> len(steps) <= 100, values.max()
        (True, np.float64(1.0))
    """
    values = np.where(np.isfinite(values), values, np.nan)
    if len(steps) <= points:
        return steps, values
    kept: list[int] = []
    for part in np.array_split(np.arange(len(steps)), max(points // 3, 1)):
        finite = part[np.isfinite(values[part])]
        chosen = set(part[~np.isfinite(values[part])][:1].tolist())
        if finite.size:
            chosen |= {
                int(finite[np.argmin(values[finite])]),
                int(finite[np.argmax(values[finite])]),
            }
        kept += sorted(chosen)
    return steps[kept], values[kept]


def line_figure(
    lines: Sequence[Line],
    *,
    unit: str,
    spans: Sequence[Span] = (),
    logarithmic: bool = False,
) -> go.Figure:
    """Lines over optimiser steps; a cross at the lower edge where a value was not a number.

    Args:
        lines: Drawn in order.
        unit: Title of the vertical axis; "1" is left out.
        spans: Shaded steps; the first is labelled.
        logarithmic: Scale of the vertical axis; values that are not positive are left out of it.

    Returns:
        The figure, on transparent ground.
    """
    figure = _empty(unit, spans, logarithmic)
    for number, line in enumerate(lines):
        steps, values = thin(line.series.steps, line.series.values)
        figure.add_scatter(
            x=steps,
            y=values,
            name=line.label,
            mode="lines+markers" if line.points else "lines",
            marker={"size": 5},
            line={
                "color": COLOURS[line.colour],
                "width": 1.8,
                "dash": _DASHES[number % len(_DASHES)],
            },
        )
        _mark_nonfinite(figure, line)
    return figure


def band_figure(
    quantiles: Mapping[str, Series],
    mean: Series,
    *,
    unit: str,
    label: str = "mean",
    spans: Sequence[Span] = (),
) -> go.Figure:
    """A mean within its quantiles: 5 to 95 % lightly shaded, 25 to 75 % more, the median dashed.

    Args:
        quantiles: By ``p05``, ``p25``, ``p50``, ``p75``, ``p95``; pairs that are missing are left
            out.
        mean: Drawn on top.
        unit: Title of the vertical axis.
        label: Of the mean.
        spans: Shaded steps.

    Returns:
        The figure, on transparent ground.
    """
    figure = _empty(unit, spans, False)
    for low, high, text, opacity in (
        ("p05", "p95", "5 to 95 % of tokens", 0.16),
        ("p25", "p75", "25 to 75 %", 0.28),
    ):
        if low in quantiles and high in quantiles:
            below, above = (thin(quantiles[k].steps, quantiles[k].values) for k in (low, high))
            outline = {
                "x": np.concatenate([below[0], above[0][::-1]]),
                "y": np.concatenate([below[1], above[1][::-1]]),
            }
            figure.add_scatter(
                **outline,
                name=text,
                fill="toself",
                mode="lines",
                line={"width": 0},
                fillcolor=_with_opacity(COLOURS["blue"], opacity),
                hoverinfo="skip",
            )
    if "p50" in quantiles:
        line = {"color": COLOURS["blue"], "width": 1.2, "dash": "dot"}
        steps, values = thin(quantiles["p50"].steps, quantiles["p50"].values)
        figure.add_scatter(x=steps, y=values, name="median", mode="lines", line=line)
    steps, values = thin(mean.steps, mean.values)
    figure.add_scatter(
        x=steps,
        y=values,
        name=label,
        mode="lines+markers",
        marker={"size": 5},
        line={"color": COLOURS["orange"], "width": 2},
    )
    return figure


def _empty(unit: str, spans: Sequence[Span], logarithmic: bool) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        height=300,
        margin={"l": 64, "r": 16, "t": 28, "b": 44},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        hovermode="x unified",
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        showlegend=True,
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": COLOURS["grey"]},
    )
    figure.update_xaxes(title="optimiser step", zeroline=False)
    figure.update_yaxes(
        title="" if unit == "1" else unit, zeroline=False, type="log" if logarithmic else "linear"
    )
    if logarithmic:
        figure.update_yaxes(dtick="D2")
    for number, span in enumerate(spans):
        figure.add_vrect(
            x0=span.first - 0.5,
            x1=span.last + 0.5,
            fillcolor=COLOURS["orange"],
            opacity=0.14,
            line_width=0,
            layer="below",
            annotation_text=span.label if number == 0 else "",
            annotation_position="top left",
            annotation_font_size=11,
        )
    return figure


def _mark_nonfinite(figure: go.Figure, line: Line) -> None:
    wild = ~np.isfinite(line.series.values)
    if not wild.any():
        return
    finite = line.series.values[~wild]
    steps = line.series.steps[wild][:POINTS]
    figure.add_scatter(
        x=steps,
        y=np.full(len(steps), finite.min() if finite.size else 0.0),
        name=f"{line.label}: not a number",
        mode="markers",
        marker={"symbol": "x", "size": 9, "color": COLOURS["red"]},
    )


def _with_opacity(colour: str, opacity: float) -> str:
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"
