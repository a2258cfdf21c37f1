"""Entropy, reach and size of the logits of single attention queries."""

from typing import Final

import torch
from torch import Tensor

from entropylens.diagnostics._summaries import wide_dtype
from entropylens.registry import AttentionRows

__all__ = ["row_entropy", "rows_of_logits", "rows_of_query_key"]

_LOWEST: Final = torch.finfo(torch.float32).min


def row_entropy(logits: Tensor) -> Tensor:
    """How widely does each query spread its attention?

    ``H = log sum_j exp(l_j) - sum_j p_j l_j``, ``p = softmax(l)``, over keys that are not masked.

    Args:
        logits: ``[..., T]``, any floating dtype; a masked key holds -inf, or at most half the
            dtype's lowest number (half of float32's, for float64). A mask of -10,000 or the like is
            a logit.

    Returns:
        ``[...]``, nats, 0..ln T, float32; 0 where all keys are masked, NaN where a logit is NaN or
        +inf.

    Device: the input's; no host synchronisation.
    Cost: O(numel) time, four copies of the logits in float64 where the device has it.
    Source: Shannon (1948). The attention maps of arXiv 2501.03489 give it as
        ``-sum_j a_j log(a_j + 1e-9)``, which is lower by up to 1e-9 T.

    Example:
        >>> row_entropy(torch.tensor([[0.0, 0.0, -torch.inf], [0.0, 50.0, 0.0]])).exp().round()
        tensor([2., 1.])
    """
    return _reduce(logits, ~_is_masked(logits))[0]


def rows_of_logits(logits: Tensor) -> AttentionRows:
    """What do these queries attend to, by the logits that the softmax gets?

    Args:
        logits: ``[m, H, T]``, masked as for `row_entropy`.

    Returns:
        Rows in float32. ``reach`` counts the keys that are not masked, in the head that sees most.
        Where a head sees none, entropy, largest logit and log partition are 0 and mean nothing.

    Unit: nats.
    Device: the input's; no host synchronisation.
    Cost: O(m H T) time, four copies of the logits in float64 where the device has it.

    Example:
        >>> rows_of_logits(torch.zeros(1, 2, 5)).reach
        tensor([5])
    """
    visible = ~_is_masked(logits)
    entropy, largest, log_partition = _reduce(logits, visible)
    return AttentionRows(
        entropy=entropy,
        reach=visible.sum(-1).amax(-1),
        largest_logit=largest,
        log_partition=log_partition,
    )


def rows_of_query_key(
    query: Tensor,
    key: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    visible: Tensor | None = None,
) -> AttentionRows:
    """What do these queries attend to, by the vectors that attention compares?

    ``l = scale q k^T + bias``.

    Args:
        query: ``[m, H, d]``, queries of one sequence, any floating dtype.
        key: ``[H, T, d]``, its keys; what stands where a key is masked is ignored, NaN included.
        scale: Usually ``1 / sqrt(d)``.
        bias: ``[m, H, T]`` or ``[m, 1, T]``, added to the logits; may hold a mask, as for
            `row_entropy` in the bias's own dtype.
        visible: ``[m, T]`` bool: false where a query may not attend.

    Returns:
        As `rows_of_logits`.

    Unit: nats.
    Device: the input's; no host synchronisation.
    Cost: O(m H T d) time; the keys and five times the logits in float64 where the device has it.
    """
    # Neither autocast nor TF32 touches float64: the model's own logits may have fewer digits.
    wide = wide_dtype(query)
    logits = scale * torch.einsum("mhd,htd->mht", query.to(wide), key.to(wide))
    if bias is not None:
        logits = (logits + bias).masked_fill(_is_masked(bias), -torch.inf)
    if visible is not None:
        logits = logits.masked_fill(~visible[:, None], -torch.inf)
    return rows_of_logits(logits)


def _is_masked(logits: Tensor) -> Tensor:
    return logits <= max(torch.finfo(logits.dtype).min, _LOWEST) / 2


def _reduce(logits: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Entropy, largest logit and log partition over the last axis, float32."""
    logits = logits.to(wide_dtype(logits))
    sees_any = visible.any(-1)
    largest = torch.where(visible, logits, -torch.inf).amax(-1)
    largest = torch.where(sees_any, largest, 0.0)
    # Both terms of the entropy are at least 0 once the largest logit is 0.
    depth = torch.where(visible, logits - largest[..., None], 0.0)
    share = torch.where(visible, depth.exp(), 0.0)
    total = torch.where(sees_any, share.sum(-1), 1.0)
    entropy = total.log() - (share * depth).sum(-1) / total
    return entropy.float(), largest.float(), (largest + total.log()).float()
