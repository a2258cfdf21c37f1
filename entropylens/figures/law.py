"""Reward against entropy with the law through it, and entropy with a forecast of its end."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from entropylens.figures.axes import Axis, axis_title
from entropylens.figures.colours import COLOURS
from entropylens.figures.drawing import Drawn, draw, figure
from entropylens.figures.panels import Shown

__all__ = ["forecast_figure", "law_figure"]

Floats = NDArray[np.float64]

_DOTS = 2000


def law_figure(
    step: Floats,
    entropy: Floats,
    reward: Floats,
    grid: Floats,
    law: tuple[Floats, Floats, Floats] | None,
) -> dict[str, Any]:
    """Reward against entropy, one dot a step, and the law with its band.

    Args:
        step: ``[n]`` of the dots.
        entropy: ``[n]`` nats.
        reward: ``[n]``.
        grid: ``[m]`` entropies at which the law is drawn, nats.
        law: Its value, low and high edge at ``grid``, ``[m]`` each; None where there is none.

    Returns:
        A document with ``data`` and ``layout``.
    """
    lines = [] if law is None else _banded(grid, law, "law", "orange", "interval of the law")
    picture = figure(lines, unit="reward", axis=Axis(within=(0.0, 1.02 * float(max(entropy)))))
    chosen = np.unique(np.linspace(0, len(step) - 1, min(len(step), _DOTS)).astype(int))
    dots = {
        "name": "a step",
        "x": entropy[chosen],
        "y": reward[chosen],
        "customdata": step[chosen],
        "mode": "markers",
        "marker": {"size": 5, "color": COLOURS["blue"], "opacity": 0.5},
        "hovertemplate": "step %{customdata:,}: entropy %{x:.4~g}, reward %{y:.4~g}<extra></extra>",
    }
    picture["data"] = [dots, *picture["data"]]
    picture["layout"] |= {"height": 320, "hovermode": "closest", "showlegend": True}
    title = f"mean token entropy, nats · {len(chosen):,} of {len(step):,} steps"
    picture["layout"]["xaxis"]["title"]["text"] = title
    return picture


def forecast_figure(
    step: NDArray[np.int64],
    entropy: Floats,
    floor: float,
    path_step: Floats,
    path: Floats,
    share: float,
) -> dict[str, Any]:
    """Entropy over steps, and what was forecast early in the run.

    Args:
        step: ``[n]``.
        entropy: ``[n]`` nats.
        floor: Drawn across, nats.
        path_step: ``[m]`` steps of the forecast.
        path: ``[3, m]`` its low edge, median and high edge, nats.
        share: Of the run that the forecast knew.

    Returns:
        A document with ``data`` and ``layout``.
    """
    label = f"forecast at {share:.0%}"
    edges = (path[1], path[0], path[2])
    lines = _banded(path_step, edges, label, "orange", "interval") if len(path_step) else []
    measured = Shown("entropy/token/mean", "measured", "blue")
    lines.append(draw(measured, step, entropy, key="measured"))
    last = 1.01 * float(step[-1])
    axis = Axis(within=(0.0, last))
    picture = figure(lines, unit="nats", axis=axis, reference=floor)
    picture["layout"] |= {"height": 300, "showlegend": True}
    title = axis_title(axis, len(lines[-1].x), lines[-1].total)
    picture["layout"]["xaxis"]["title"]["text"] = title
    return picture


def _banded(
    x: Floats, law: tuple[Floats, Floats, Floats], label: str, colour: str, band: str
) -> list[Drawn]:
    middle, low, high = law
    roles = (("low", low, "low", band), ("high", high, "high", band), ("line", middle, "", label))
    nowhere = x[:0]
    return [
        Drawn(
            Shown(label, name, colour, role=role), f"{label} {key}", x, y, nowhere, len(x), "dash"
        )
        for role, y, key, name in roles
    ]
