"""How few tokens carry the batch's covariance of log-probability and advantage?"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from entropylens.diagnostics._summaries import constants, wide_dtype
from entropylens.diagnostics.covariance import token_covariance
from entropylens.registry import Block, Diagnostic, Metric, PolicyReading, diagnostic

__all__ = ["CovarianceConcentration", "concentration", "top_means"]

SHARES: Final = {
    "top_0_02_percent": 0.0002,
    "top_0_2_percent": 0.002,
    "top_2_percent": 0.02,
    "top_20_percent": 0.2,
}
"""Shares of the tokens by their part of a metric's name."""

_ESTIMATOR = (
    "over scored tokens (mask), all of them or a uniform sample of each micro-batch, a row "
    "counting as the tokens it stands for, the last one in part; scores are centred, sorted and "
    "cut within each rank; absent where the share is less than one measured row"
)
_COST = "a sort of the tokens, O(tokens log tokens)"
_SOURCE = "Cui et al. (2025), arXiv 2505.22617, Eq. 10 and Table 1"

METRICS: Final[Mapping[str, Metric]] = {
    **{
        f"covariance/{name}/mean": Metric(
            question=f"How large is the covariance of the {100 * share:g} % of tokens that have "
            "most of it?",
            formula=f"mean of c over the {100 * share:g} % of tokens with the largest c, "
            "c = (log p - mean log p)(A - mean A)",
            unit="nats",
            estimator=_ESTIMATOR,
            high="a few tokens, likely and rewarded or unlikely and punished, drive the entropy "
            "down: what Clip-Cov and KL-Cov act on",
            low="no outliers",
            cost=_COST,
            source=f"{_SOURCE}; there, for Qwen2.5-7B at step 1, 5.654, 3.112, 1.385 and 0.351 at "
            "0.02, 0.2, 2 and 20 %",
        )
        for name, share in SHARES.items()
    },
    **{
        f"covariance/concentration/{name}/share": Metric(
            question=f"What part of all covariance, up or down, do {100 * share:g} % of tokens "
            "carry?",
            formula=f"sum of |c| over the {100 * share:g} % of tokens with the largest |c|, over "
            "the sum of all |c|, c = (log p - mean log p)(A - mean A)",
            unit="1",
            estimator=f"{_ESTIMATOR}, or every c is 0",
            high="a handful of tokens decides",
            low=f"even: {share:g} where all tokens carry the same",
            cost=_COST,
            source=f"{_SOURCE}, as a share instead of a mean",
        )
        for name, share in SHARES.items()
    },
}


def top_means(scores: Tensor, weight: Tensor, shares: tuple[float, ...]) -> Tensor:
    """How large are the largest scores, on average?

    The mean over the ``share`` of the total weight that has the largest scores, signed. A row of
    weight w counts as w equal tokens; the row that a share ends in counts in part, so that a share
    of less than one token is the largest score itself.

    Args:
        scores: ``[n]``; what stands where the weight is 0 is ignored, NaN included.
        weight: ``[n]``, at least 0.
        shares: Shares in (0, 1].

    Returns:
        ``[len(shares)]``, float32; NaN when nothing carries weight, and when a score that does is
        NaN.

    Unit: that of the scores.
    Device: the input's; no host synchronisation.
    Cost: a sort; O(n len(shares)) memory.
    Source: Cui et al. (2025), arXiv 2505.22617, Table 1.

    Example:
        >>> top_means(torch.tensor([1.0, 8.0, -9.0, 4.0]), torch.ones(4), (0.25, 0.5, 1.0))
        tensor([8., 6., 1.])
    """
    taken, ordered = _largest_first(scores, weight, shares)
    return (torch.where(taken > 0, taken * ordered, 0.0).sum(-1) / taken.sum(-1)).float()


def concentration(scores: Tensor, weight: Tensor, shares: tuple[float, ...]) -> Tensor:
    """What part of the sum of absolute scores do the largest of them carry?

    ``sum of |score| over the share of the weight with the largest |score| / sum of all |score|``,
    a row that a share ends in counting in part.

    Args:
        scores: ``[n]``; what stands where the weight is 0 is ignored, NaN included.
        weight: ``[n]``, at least 0.
        shares: Shares in (0, 1].

    Returns:
        ``[len(shares)]`` in 0..1 and not below ``shares``, float32; NaN when every score is 0, when
        nothing carries weight, and when a score that does is NaN.

    Unit: 1.
    Device: the input's; no host synchronisation.
    Cost: a sort; O(n len(shares)) memory.
    Source: the Lorenz curve, read from its upper end.

    Example:
        >>> concentration(torch.tensor([1.0, -6.0, 3.0, 0.0]), torch.ones(4), (0.25, 0.5, 1.0))
        tensor([0.6000, 0.9000, 1.0000])
    """
    taken, ordered = _largest_first(scores.abs(), weight, (*shares, 1.0))
    sums = torch.where(taken > 0, taken * ordered, 0.0).sum(-1)
    return (sums[:-1] / sums[-1]).float()


def _largest_first(
    values: Tensor, weight: Tensor, shares: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """Weight ``[len(shares), n]`` that each share takes of the values, and these, largest first."""
    weight = weight.to(wide_dtype(values))
    ordered, order = values.sort(descending=True)
    weights = weight[order]
    before = weights.cumsum(0) - weights
    budget = constants(shares, weight.device, weight.dtype)[:, None] * weight.sum()
    return torch.minimum((budget - before).clamp(min=0), weights), ordered.to(weight.dtype)


@diagnostic(
    reads="policy",
    every={"fast": 10, "balanced": 1, "full": 1},
    floor={"fast": 200, "balanced": 50, "full": 20},
    metrics=METRICS,
)
class CovarianceConcentration(Diagnostic):
    """How much of the covariance of log-probability and advantage a few tokens carry."""

    def measure(self, reading: PolicyReading, state: Any) -> tuple[list[Block], Any]:
        """Sort one step's tokens by their part in the covariance."""
        weight, shares = reading.tokens.weight, tuple(SHARES.values())
        scores = token_covariance(reading.tokens.logprob, reading.advantage, weight)
        means = top_means(scores, weight, shares)
        carried = concentration(scores, weight, shares)
        least = constants([1 / share for share in shares], weight.device)
        behind = torch.where((weight > 0).sum() > least - 0.5, weight.sum(), 0.0)
        any_score = torch.where(weight > 0, scores, 0.0).abs().sum() != 0
        return [
            Block.metrics(
                list(METRICS),
                torch.cat([means, carried]),
                weight=torch.cat([behind, torch.where(any_score, behind, 0.0)]),
            )
        ], state
