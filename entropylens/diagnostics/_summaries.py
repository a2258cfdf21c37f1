"""Weighted summaries of a column of tokens, without looking at its content on the host."""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

__all__ = [
    "LEAST",
    "ROUNDING",
    "centred",
    "constants",
    "correlation",
    "share_where",
    "summarise",
    "weighted_mean",
    "weighted_quantiles",
    "wide_dtype",
]

LEAST: Final = 3
"""Rows below which two columns have no correlation: two points lie on a line whatever they are."""
ROUNDING: Final = 1e-6
"""Standard deviation, as a share of the root mean square, that float32 rounding alone may make."""


def constants(
    values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Numbers on a device, without waiting for its stream as a copy from the host would.

    On a CPU they are made at once; elsewhere they are filled in one by one.
    """
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype)
    filled = torch.empty(len(values), device=device, dtype=dtype)
    for at, value in enumerate(values):
        filled[at] = value
    return filled


def wide_dtype(values: Tensor) -> torch.dtype:
    return torch.float32 if values.device.type == "mps" else torch.float64


def weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """Mean of the values that carry weight.

    ``sum(w v) / sum(w)`` over ``w > 0``, accumulated in float64 where the device has it. NaN when
    nothing carries weight, and when a value that does is NaN.

    Args:
        values: ``[..., n]``; what stands where the weight is 0 is ignored, NaN included.
        weight: ``[..., n]``, at least 0.

    Returns:
        ``[...]``, float32.

    Example:
        >>> weighted_mean(torch.tensor([1.0, 4.0, float("nan")]), torch.tensor([1.0, 2.0, 0.0]))
        tensor(3.)
    """
    weight = weight.to(wide_dtype(values))
    total = torch.where(weight > 0, values * weight, 0.0).sum(-1)
    return (total / weight.sum(-1)).float()


def weighted_quantiles(values: Tensor, weight: Tensor, levels: tuple[float, ...]) -> Tensor:
    """Quantiles of the values that carry weight.

    Linear interpolation between the points ``((cumulative weight - w/2) / total, value)``: Hazen's
    rule, which for equal weights is ``numpy.quantile(method="hazen")``.

    Args:
        values: ``[n]``.
        weight: ``[n]``, at least 0.
        levels: Levels in 0..1.

    Returns:
        ``[len(levels)]``, float32; NaN when nothing carries weight or such a value is NaN.

    Example:
        >>> weighted_quantiles(torch.tensor([3.0, 1.0, 2.0]), torch.ones(3), (0.0, 0.5, 1.0))
        tensor([1., 2., 3.])
    """
    if values.numel() == 0:
        return values.new_full((len(levels),), torch.nan, dtype=torch.float32)
    # What carries no weight goes last, behind +inf too: NaN sorts after everything. Where a value
    # that counts is NaN the result is, whatever the order.
    weighted = weight > 0
    ordered, order = torch.where(weighted, values.float(), torch.nan).sort()
    weight = weight.to(wide_dtype(values))
    weights, count = weight[order], weighted.sum()
    cumulative = weights.cumsum(0)
    total = cumulative[-1]
    centre = (cumulative - weights / 2) / total
    last = (count - 1).clamp(min=0)
    level = constants(levels, values.device, weight.dtype)
    above = torch.minimum(torch.searchsorted(centre, level), last)
    below = (above - 1).clamp(min=0)
    left, low, high = centre[below], ordered[below], ordered[above]
    fraction = ((level - left) / (centre[above] - left).clamp(min=1e-30)).clamp(0.0, 1.0).float()
    # low + f * (high - low) is NaN where either is infinite, even at f = 0 and f = 1.
    mixed = torch.where(fraction > 0, low + fraction * (high - low), low)
    mixed = torch.where((fraction >= 1) | (low == high), high, mixed)
    return torch.where(ordered.gather(0, last[None]).isnan(), torch.nan, mixed)


def share_where(condition: Tensor, weight: Tensor) -> Tensor:
    """Share of the weight for which ``condition`` holds; NaN when there is no weight."""
    return weighted_mean(condition.float(), weight)


def summarise(values: Tensor, weight: Tensor, levels: tuple[float, ...]) -> Tensor:
    """Mean, standard deviation and quantiles of the values that carry weight.

    The standard deviation is the population's, ``sqrt(mean((v - mean)^2))``.

    Returns:
        ``[2 + len(levels)]``: mean, standard deviation, then a quantile for each level.
    """
    wide = weight.to(wide_dtype(values))
    total = wide.sum()
    kept = torch.where(wide > 0, values, 0.0)
    mean = (kept * wide).sum() / total
    deviation = ((kept - mean).square() * wide).sum().div(total).sqrt()
    moments = torch.stack([mean, deviation]).float()
    return torch.cat([moments, weighted_quantiles(values, weight, levels)]) if levels else moments


def centred(values: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """How far is each value from the mean, and is that more than rounding makes?

    ``v - mean v`` over the values that carry weight.

    Args:
        values: ``[..., n]``; what stands where the weight is 0 is ignored, NaN included.
        weight: ``[..., n]``, at least 0, or bool.

    Returns:
        Deviations ``[..., n]``, 0 where the weight is, in float64 where the device has it; and a
        bool ``[...]``: at least 3 values carry weight, and their standard deviation is above 1e-6
        of their root mean square.

    Unit: that of the values.
    Device: the input's; no host synchronisation.
    Cost: O(n).
    """
    weight = weight.to(wide_dtype(values))
    kept = torch.where(weight > 0, values, 0.0).to(weight.dtype)
    mean = (kept * weight).sum(-1, keepdim=True) / weight.sum(-1, keepdim=True)
    deviations = torch.where(weight > 0, kept - mean, 0.0)
    variance, square = ((part.square() * weight).sum(-1) for part in (deviations, kept))
    return deviations, ((weight > 0).sum(-1) >= LEAST) & (variance > ROUNDING**2 * square)


def correlation(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """Do two columns rise and fall together?

    Pearson's ``cov(x, y) / sqrt(var(x) var(y))``, weighted, population.

    Args:
        first: ``[..., n]``; what stands where the weight is 0 is ignored, NaN included.
        second: ``[..., n]``, likewise.
        weight: ``[..., n]``, at least 0, or bool.

    Returns:
        ``[...]`` in -1..1, float32; NaN where fewer than 3 values carry weight, where one that does
        is NaN, and where a column does not vary (`centred`).

    Device: the input's; no host synchronisation.
    Cost: O(n).
    Source: Pearson (1895).

    Example:
        >>> correlation(torch.arange(3.0), torch.tensor([0.0, 2.0, 4.0]), torch.ones(3))
        tensor(1.)
    """
    (x, x_varies), (y, y_varies) = (centred(column, weight) for column in (first, second))
    weight = weight.to(x.dtype)
    xx, yy, xy = ((weight * product).sum(-1) for product in (x * x, y * y, x * y))
    found = (xy / (xx.sqrt() * yy.sqrt())).clamp(-1.0, 1.0)
    return torch.where(x_varies & y_varies, found, torch.nan).float()
