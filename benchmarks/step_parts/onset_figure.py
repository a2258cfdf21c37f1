"""Where damage begins, drawn: a line from the lowest to the highest onset, a dot at the median."""

from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

COLOURS = {"loss": "#3b82c4", "accuracy": "#d9772b"}
"""Told apart by all eyes, on white and on black."""
INK = "#808080"


def draw(by_r: Mapping[str, Any], places: list[str]) -> go.Figure:
    """Onsets of loss and accuracy in r, a row for each of the places, on no background."""
    figure = go.Figure()
    for shift, (event, colour) in zip((0.17, -0.17), COLOURS.items(), strict=True):
        for row, place in enumerate(reversed(places)):
            one = by_r[place]["onset"][event]
            if one["happened"]:
                figure.add_scatter(
                    x=[one["lowest"], one["median"], one["highest"]],
                    y=[row + shift] * 3,
                    mode="lines+markers",
                    line={"color": colour, "width": 2},
                    marker={"color": colour, "size": [0, 8, 0]},
                    name=event,
                    legendgroup=event,
                    showlegend=row == 0,
                )
    figure.add_vline(1, line={"color": INK, "width": 1, "dash": "dot"})
    figure.update_xaxes(
        type="log",
        tickvals=[0.5, 1, 2, 5, 10, 20],
        title="r at which damage begins",
        gridcolor="rgba(128,128,128,0.25)",
    )
    figure.update_yaxes(
        tickvals=list(range(len(places))), ticktext=places[::-1], showgrid=False, zeroline=False
    )
    return figure.update_layout(
        width=720,
        height=110 + 24 * len(places),
        margin={"l": 10, "r": 10, "t": 30, "b": 10},
        font={"family": "sans-serif", "size": 12, "color": INK},
        legend={"orientation": "h", "y": 1.07, "x": 0},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
    )
