"""Accuracy, diffusion spectral entropy and information about the labels, on one axis."""

from math import log2
from typing import Any, Final

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from entropylens.figures.colours import COLOURS, with_opacity

__all__ = ["draw"]

_SHOWN: Final = {
    "accuracy": ("accuracy", COLOURS["grey"]),
    "dsmi_labels": ("DSMI with the labels / log2 10", COLOURS["orange"]),
    "dse": ("DSE, median bandwidth / log2 N", COLOURS["blue"]),
    "dse_released": ("DSE as released / log2 N", COLOURS["green"]),
}
_DASHES: Final = {"clean": "solid", "shuffled": "dash"}
_INK: Final = "#808080"
_PANELS: Final = {
    "training": "rows trained on, their labels",
    "held_out": "rows held out, true labels",
}


def draw(found: pd.DataFrame, probe: int, layer: str = "hidden") -> go.Figure:
    """The course of the claim's quantities, each as a share of what it can be.

    Lines are means over seeds, bands reach from the least to the largest. Epochs are spaced as the
    root of their number, for most happens early.

    Args:
        found: The measurements, as `ranking` reads them.
        probe: Rows N that states were looked at of.
        layer: Whose entropy and information are shown.

    Returns:
        Two panels over one pair of axes, on no background.
    """
    figure = make_subplots(
        cols=2, shared_yaxes=True, horizontal_spacing=0.03, subplot_titles=list(_PANELS.values())
    )
    full = {"accuracy": 1.0, "dsmi_labels": log2(10), "dse": log2(probe)}
    full["dse_released"] = full["dse"]
    for column, rows in enumerate(_PANELS, 1):
        for name, share in full.items():
            own = found[(found["rows"] == rows) & (found["name"] == name)]
            own = own[own["layer"] == ("" if name == "accuracy" else layer)]
            for labels, group in own.groupby("labels"):
                _add(figure, column, name, str(labels), group, share)
    epochs = sorted(set(found["epoch"]))
    figure.update_xaxes(
        tickvals=np.sqrt(epochs),
        ticktext=[str(epoch) for epoch in epochs],
        title="epochs",
        gridcolor="rgba(128,128,128,0.25)",
        zeroline=False,
    )
    figure.update_yaxes(gridcolor="rgba(128,128,128,0.25)", zeroline=False)
    return figure.update_layout(
        width=900,
        height=440,
        margin={"l": 40, "r": 10, "t": 110, "b": 40},
        font={"family": "sans-serif", "size": 12, "color": _INK},
        legend={"orientation": "h", "y": 1.12, "yanchor": "bottom", "x": 0},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
    )


def _add(
    figure: go.Figure, column: int, name: str, labels: str, group: pd.DataFrame, share: float
) -> None:
    by_epoch = (group["value"] / share).groupby(group["epoch"]).agg(["min", "mean", "max"])
    x = np.sqrt(by_epoch.index.to_numpy(np.float64))
    low, mean, high = (by_epoch[of].to_numpy() for of in ("min", "mean", "max"))
    words, colour = _SHOWN[name]
    band: dict[str, Any] = {"x": x, "mode": "lines", "line": {"width": 0}, "showlegend": False}
    band |= {"hoverinfo": "skip"}
    figure.add_scatter(y=low, row=1, col=column, **band)
    fill = {"fill": "tonexty", "fillcolor": with_opacity(colour, 0.2)}
    figure.add_scatter(y=high, row=1, col=column, **band, **fill)
    figure.add_scatter(
        x=x,
        y=mean,
        mode="lines",
        line={"color": colour, "width": 2, "dash": _DASHES[labels]},
        name=f"{words}, {labels} labels",
        showlegend=column == 1,
        row=1,
        col=column,
    )
