"""The horizontal axis of figures: along what, and what of it is in view."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["BY_STEP", "LABELS", "Axis", "axis_title", "view_of"]

LABELS: Final = {
    "step": "optimiser step",
    "tokens": "tokens seen",
    "time": "time (UTC)",
    "hours": "hours since the start",
}


@dataclass(frozen=True)
class Axis:
    """The horizontal axis."""

    by: str = "step"
    """step, tokens, time (unix seconds) or hours."""
    within: tuple[float, float] | None = None
    """What is in view; None is all."""
    extent: tuple[float, float] | None = None
    """What all is, so that figures over one another agree."""

    def placed(self, x: NDArray[Any]) -> NDArray[Any]:
        """Values as plotly.js takes them: time in milliseconds; NaN where it is not known."""
        if self.by != "time":
            return x
        milliseconds = np.round(x * 1e3)
        return milliseconds.astype(np.int64) if np.isfinite(milliseconds).all() else milliseconds


BY_STEP: Final = Axis()


def axis_title(axis: Axis, shown: int, total: int) -> str:
    """The title of the horizontal axis, with how many of how many points are drawn.

    Example:
        >>> axis_title(Axis(), 1998, 1000000)
        'optimiser step · 1,998 of 1,000,000 points'
    """
    count = f"{total:,}" if shown >= total else f"{shown:,} of {total:,}"
    return f"{LABELS[axis.by]} · {count} point{'s' * (total != 1)}"


def view_of(axis: Axis) -> list[Any]:
    """The range of the horizontal axis: what is in view, or all with a little room."""
    if axis.within is not None:
        edges = axis.within
    else:
        low, high = axis.extent or (0.0, 1.0)
        room = (high - low) * 0.015 or 0.5
        edges = low - room, high + room
    return [_edge_of_view(edge, axis) for edge in edges]


def _edge_of_view(edge: float, axis: Axis) -> Any:
    if axis.by != "time":
        return edge
    return datetime.fromtimestamp(edge, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")
