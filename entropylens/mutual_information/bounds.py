"""Lower bounds of mutual information from the scores of a critic."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["densities", "infonce", "jensen_shannon", "smile"]


def infonce(scores: Tensor) -> Tensor:
    """How much does a critic's score tell of which y goes with which x, by InfoNCE?

    ``log B + mean_i (S_ii - log sum_j exp S_ij)``, a lower bound of the mutual information in
    expectation; never above log B.

    Args:
        scores: ``[..., B, B]`` score of x_i with y_j; the pairs are on the diagonal.

    Returns:
        ``[...]``, nats.

    Device: the input's; no host synchronisation.
    Cost: O(B^2).
    Source: van den Oord et al. (2018), arXiv 1807.03748; Poole et al. (2019).

    Example:
        >>> round(infonce(1000 * torch.eye(8)).exp().item(), 2)
        8.0
    """
    return densities(scores).mean(-1)


def densities(scores: Tensor) -> Tensor:
    """What each pair adds to InfoNCE: an estimate of log p(x, y) / p(x) p(y)."""
    pairs = scores.diagonal(dim1=-2, dim2=-1)
    return pairs - scores.logsumexp(-1) + math.log(scores.shape[-1])


def smile(scores: Tensor, clip: float = 5.0) -> Tensor:
    """How much does a critic's score tell of which y goes with which x, by SMILE?

    ``mean_i S_ii - log mean_{i != j} exp(clip(S_ij, -clip, clip))``: not limited by the batch, at
    the price of a bias where the clip acts. NeuralMI clips ``S_ii`` too; the paper does not, and
    here it is not.

    Args:
        scores: ``[..., B, B]`` score of x_i with y_j; the pairs are on the diagonal.
        clip: tau; infinity is the Donsker-Varadhan bound.

    Returns:
        ``[...]``, nats.

    Device: the input's; no host synchronisation.
    Cost: O(B^2).
    Source: Song and Ermon (2020), arXiv 1910.06222, Eq. 8.

    Example:
        >>> smile(torch.tensor([[3.0, 1.0], [1.0, 3.0]]))
        tensor(2.)
    """
    size = scores.shape[-1]
    own = torch.eye(size, dtype=torch.bool, device=scores.device)
    others = scores.clamp(-clip, clip).masked_fill(own, -torch.inf)
    partition = others.flatten(-2).logsumexp(-1) - math.log(size * (size - 1))
    return scores.diagonal(dim1=-2, dim2=-1).mean(-1) - partition


def jensen_shannon(scores: Tensor) -> Tensor:
    """The bound whose gradient trains a critic for SMILE: its optimum is the log density ratio."""
    size = scores.shape[-1]
    pairs = scores.diagonal(dim1=-2, dim2=-1)
    softplus = torch.nn.functional.softplus
    others = (softplus(scores).sum((-2, -1)) - softplus(pairs).sum(-1)) / (size * (size - 1))
    return -softplus(-pairs).mean(-1) - others
