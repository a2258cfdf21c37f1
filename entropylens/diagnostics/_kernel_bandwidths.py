"""At which width a Gaussian kernel changes what it shows."""

from collections.abc import Callable
from math import exp, log1p, sqrt
from typing import NamedTuple

from scipy.optimize import brentq

__all__ = ["KernelBandwidths", "kde_bandwidths"]


class KernelBandwidths(NamedTuple):
    """Bandwidths at which a Gaussian kernel changes what it shows, in standard deviations."""

    condensation: float
    """h_G: below it, one or few points make all of a density estimate."""
    gaussian: float
    """h_CLT = sqrt(2) h_G: above it, estimates scatter as the central limit theorem says."""
    self_loop: float
    """h_self: below it, each point is its own nearest neighbour in S, and the DSE is log2 N."""


def kde_bandwidths(alpha: float) -> KernelBandwidths:
    """How wide must a kernel be for so many points in so many dimensions?

    Data N(0, s^2 I_d), ``b = (s/h)^2``, ``phi(b) = -log(1 + b) / 2 - b / (2 (1 + b))`` the rate of
    ``E exp(-b |x - y|^2 / (2 s^2))`` and ``I(b) = b phi' - phi = log(1 + b) / 2 - b / (2 (1 +
    b)^2)``: ``I(1 / h_G^2) = alpha``, ``I(2 / h_CLT^2) = alpha``, ``-phi(1 / h_self^2) = alpha``.

    Args:
        alpha: ``log(n) / d``, 1e-9..100.

    Returns:
        `KernelBandwidths`, each in units of s.

    Raises:
        ValueError: ``alpha`` is not in that range.

    Device: the host's; numbers.
    Cost: three roots.
    Source: the regimes are those of Biroli and Mezard (2024), arXiv 2408.05807; the formulas
        follow from the random energy model, h_self from the diagonal that the DSE keeps.

    Example:
        >>> [round(h, 3) for h in kde_bandwidths(1.0)]
        [0.372, 0.526, 0.621]
    """
    if not 1e-9 <= alpha <= 100:
        raise ValueError(f"kde_bandwidths: expected log(n) / d in 1e-9..100, got {alpha}")

    def bandwidth(rate: Callable[[float], float]) -> float:
        root = brentq(lambda size: rate(exp(size)) - alpha, -40.0, 300.0, xtol=1e-13)
        return exp(-float(root) / 2)

    condensation = bandwidth(lambda b: log1p(b) / 2 - b / (2 * (1 + b) ** 2))
    self_loop = bandwidth(lambda b: log1p(b) / 2 + b / (2 * (1 + b)))
    return KernelBandwidths(condensation, sqrt(2) * condensation, self_loop)
