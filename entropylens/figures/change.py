"""Change of the entropy: predicted against measured, summed over the run, and by kind of token."""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from entropylens.figures.axes import Axis
from entropylens.figures.colours import COLOURS
from entropylens.figures.drawing import draw, figure
from entropylens.figures.panels import Shown

__all__ = ["cell_figure", "course_figure", "step_figure"]

Floats = NDArray[np.float64]
Pairs = tuple[Floats, Floats]

_DOTS: Final = 2000


def step_figure(step: Floats, predicted: Floats, measured: Floats) -> dict[str, Any]:
    """Measured against predicted change, one dot a step, and where both would be equal.

    Args:
        step: ``[n]``, at least one.
        predicted: ``[n]`` nats.
        measured: ``[n]`` nats.

    Returns:
        A document with ``data`` and ``layout``.
    """
    edges = np.array([predicted.min(), predicted.max()])
    room = 0.03 * np.ptp(edges) or 1e-3
    picture = figure(
        [], unit="measured, nats", axis=Axis(within=(edges[0] - room, edges[1] + room))
    )
    chosen = np.unique(np.linspace(0, len(step) - 1, min(len(step), _DOTS)).astype(int))
    same = {
        "name": "measured = predicted",
        "x": edges,
        "y": edges,
        "mode": "lines",
        "line": {"color": COLOURS["orange"], "width": 1.6, "dash": "dash"},
        "hoverinfo": "skip",
    }
    dots = {
        "name": "a step",
        "x": predicted[chosen],
        "y": measured[chosen],
        "customdata": step[chosen],
        "mode": "markers",
        "marker": {"size": 5, "color": COLOURS["blue"], "opacity": 0.5},
        "hovertemplate": "step %{customdata:,}: predicted %{x:.4~g}, measured %{y:.4~g} nats"
        "<extra></extra>",
    }
    picture["data"] = [dots, same]
    picture["layout"] |= {"height": 320, "hovermode": "closest", "showlegend": True}
    title = f"predicted to first order, nats · {len(chosen):,} of {len(step):,} steps"
    picture["layout"]["xaxis"]["title"]["text"] = title
    return picture


def course_figure(predicted: Pairs, measured: Pairs, entropy: Pairs) -> dict[str, Any]:
    """What the updates before each step come to, and the entropy less its start.

    Where not every update was measured, each stands for those up to the next that was.

    Args:
        predicted: ``[n]`` steps and changes by their updates, nats.
        measured: The same as it was measured.
        entropy: ``[m]`` steps and mean token entropy, nats.

    Returns:
        A document with ``data`` and ``layout``.
    """
    lines = []
    sums = (("predicted", predicted, "blue", "dash"), ("measured", measured, "orange", "solid"))
    for name, (step, change), colour, dash in sums:
        if len(step):
            reach = np.diff(step, append=2 * step[-1] - step[-2] if len(step) > 1 else step[0] + 1)
            most = int(reach.max())
            label = f"sum of {name}" if most == 1 else f"sum of {name}, each up to the next"
            x = np.r_[step[0], step + reach].astype(np.int64)
            y = np.r_[0.0, (reach * change).cumsum()]
            lines.append(draw(Shown(name, label, colour), x, y, key=name, dash=dash))
    step, values = entropy
    if len(step):
        start = lines[0].x[0] if lines else step[0]
        at = min(int(np.searchsorted(step, start)), len(step) - 1)
        shown = Shown("entropy", "mean token entropy less its start", "purple")
        moved = values[at:] - values[at]
        lines.append(draw(shown, step[at:].astype(np.int64), moved, key="entropy", dash="dot"))
    within = min(one.x[0] for one in lines), 1.01 * max(float(one.x[-1]) for one in lines)
    picture = figure(lines, unit="nats", axis=Axis(within=within))
    picture["layout"] |= {"height": 320, "showlegend": True}
    return picture


def cell_figure(cells: Mapping[str, float]) -> dict[str, Any]:
    """The parts of a sum as bars, to the left those that lower the entropy.

    Args:
        cells: Nats by label, the first at the top.

    Returns:
        A document with ``data`` and ``layout``.
    """
    values = np.array([*cells.values()])
    bars = {
        "type": "bar",
        "orientation": "h",
        "x": values,
        "y": [*cells],
        "text": [f"{value:+#.3g}" for value in values],
        "textposition": "outside",
        "cliponaxis": False,
        "marker": {
            "color": [COLOURS["orange" if value < 0 else "blue"] for value in values],
            "pattern": {"shape": ["/" if value < 0 else "" for value in values]},
        },
        "hovertemplate": "%{y}: %{x:.4~g} nats<extra></extra>",
        "showlegend": False,
    }
    low, high = min(values.min(), 0.0), max(values.max(), 0.0)
    room = 0.18 * (high - low) or 1.0
    picture = figure([], unit="", axis=Axis(within=(low - room, high + room)))
    picture["data"] = [bars]
    picture["layout"] |= {"height": 300, "hovermode": "closest"}
    picture["layout"]["xaxis"] |= {"zeroline": True, "zerolinecolor": COLOURS["grey"]}
    picture["layout"]["yaxis"] |= {"type": "category", "autorange": "reversed"}
    picture["layout"]["xaxis"]["title"]["text"] = (
        "summed predicted change, nats · left: lowers the entropy, right: raises it"
    )
    return picture
