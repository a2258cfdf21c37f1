"""From estimates on ever smaller parts of a sample to infinitely many rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy.stats import t

__all__ = ["Extrapolation", "Row", "extrapolate"]

_FEWEST_GAMMAS: Final = 5
_CURVATURE: Final = 0.1
"""Share of the slope that a curvature may have."""
_CURVATURE_T: Final = 2.0
"""Standard errors from 0 below which a curvature is none."""
_SHIFT: Final = 0.2


@dataclass(frozen=True, kw_only=True)
class Row:
    """Estimates from one split of the sample into disjoint parts."""

    gamma: int
    """Parts."""
    samples: int
    """Rows of each part, a tenth of them held out."""
    values: tuple[float, ...]
    """Estimate of each part, nats; 0 where it was not above 0 on held-out rows."""
    held_out: tuple[float, ...]
    """Best smoothed estimate of each part on held-out rows, nats."""

    @property
    def mean(self) -> float:
        """Mean of the parts, nats."""
        return float(np.mean(self.values))


@dataclass(frozen=True, kw_only=True)
class Extrapolation:
    """A line through estimates against the number of parts, read at 0 parts."""

    value: float
    """Intercept, nats."""
    error: float
    """Half width of its confidence interval, nats."""
    slope: float
    """Bias of the whole sample, nats: what each part more adds."""
    gammas: tuple[int, ...]
    """Numbers of parts that lie on the line."""
    largest_residual: float
    """Largest externally studentised residual in size; above 2.5 a part stands out."""
    reasons: tuple[str, ...]
    """Why it is not to be relied on, in words."""


def extrapolate(
    gammas: Sequence[int], values: Sequence[float], confidence: float = 0.68
) -> Extrapolation:
    """What would the estimate be of infinitely many rows?

    The bias of an estimate from N / gamma rows is ``a gamma / N`` to first order: a line through
    all estimates against gamma, weights 1/gamma (gamma of them have a gamma-th of the rows each),
    has the unbiased value as its intercept. The largest gammas are dropped while a parabola has a
    curvature of a tenth of its slope or more that is two standard errors or more from 0. NeuralMI
    1.0.0 asks for the tenth alone, which clean data fail whose slope is near 0; later ones for the
    standard errors alone.

    Args:
        gammas: Of each estimate, the number of parts that the sample was split into.
        values: Estimates, nats.
        confidence: Of the interval of the intercept.

    Returns:
        The line. Reasons against it are: fewer than 5 gammas lie on a line, or the intercept moves
        by more than a fifth without gamma = 1.

    Raises:
        ValueError: Fewer than 3 different gammas, or numbers that do not match.

    Cost: O(n).
    Source: Abdelaleem, Martini and Nemenman (2025), arXiv 2506.00330; Holmes and Nemenman (2019).

    Example:
        >>> gammas = [g for g in range(1, 7) for _ in range(g)]
        >>> line = extrapolate(gammas, [2 + 0.1 * g for g in gammas])
        >>> round(line.value, 6), round(line.slope, 6), line.reasons
        (2.0, 0.1, ())
    """
    g, y = np.asarray(gammas, dtype=float), np.asarray(values, dtype=float)
    kept = sorted(set(gammas))
    if len(kept) < 3 or g.shape != y.shape:
        raise ValueError(
            f"extrapolate: expected at least 3 different gammas and as many values, got {kept} and "
            f"{len(y)} values of {len(g)} gammas"
        )
    fewest = min(_FEWEST_GAMMAS, len(kept))
    while is_curved := _is_curved(*_among(g, y, kept)):
        if len(kept) <= fewest:
            break
        kept.pop()
    g, y = _among(g, y, kept)
    (value, slope), errors, residuals = _weighted_line(g, y, 1)
    error = float(t.ppf((1 + confidence) / 2, len(g) - 2) * errors[0])
    reasons = []
    if is_curved or len(kept) < _FEWEST_GAMMAS:
        reasons.append(
            f"estimates against the number of parts lie on no line for {_FEWEST_GAMMAS} gammas: "
            f"the sample is too small for its bias to be taken off"
        )
    if 1 in kept:
        without = _weighted_line(g[g > 1], y[g > 1], 1)[0][0]
        if abs(value - without) > _SHIFT * abs(value):
            reasons.append(
                f"it hangs on the whole sample alone: without gamma = 1 it moves from {value:.3g} "
                f"to {without:.3g} nats"
            )
    return Extrapolation(
        value=float(value),
        error=error,
        slope=float(slope),
        gammas=tuple(kept),
        largest_residual=float(np.abs(residuals).max()),
        reasons=tuple(reasons),
    )


def _among(g: np.ndarray, y: np.ndarray, kept: list[int]) -> tuple[np.ndarray, np.ndarray]:
    chosen = np.isin(g, kept)
    return g[chosen], y[chosen]


def _is_curved(g: np.ndarray, y: np.ndarray) -> bool:
    (_, slope, curvature), errors, _ = _weighted_line(g, y, 2)
    return bool(
        abs(curvature) >= _CURVATURE * abs(slope) and abs(curvature) >= _CURVATURE_T * errors[2]
    )


def _weighted_line(
    g: np.ndarray, y: np.ndarray, degree: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coefficients from the constant up, their standard errors, and studentised residuals."""
    root = g**-0.5
    design = np.vander(g, degree + 1, increasing=True) * root[:, None]
    orthogonal, triangle = np.linalg.qr(design)
    coefficients = np.linalg.solve(triangle, orthogonal.T @ (y * root))
    residuals = y * root - design @ coefficients
    free = len(g) - degree - 1
    squares = (residuals**2).sum()
    inverse = np.linalg.inv(triangle)
    errors = np.sqrt((inverse**2).sum(1) * squares / max(free, 1))
    left = np.maximum(1 - (orthogonal**2).sum(1), 1e-12)
    without = np.maximum(squares - residuals**2 / left, 1e-30) / max(free - 1, 1)
    return coefficients, errors, residuals / np.sqrt(without * left)
