"""Do the logits of attention grow until its softmax saturates?"""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from entropylens.diagnostics._summaries import weighted_mean, weighted_quantiles, wide_dtype
from entropylens.registry import (
    AttentionReading,
    AttentionRows,
    Block,
    Diagnostic,
    Metric,
    diagnostic,
)

__all__ = ["AttentionLogits", "largest_logits", "mean_log_partition"]

_QUERIES: Final = (
    "exact for the sampled queries of the probe set, in float32 logits; queries that may attend to "
    "nothing are left out. Module is the layer. A shift of all logits of a query changes this but "
    "not its attention: read it with attention/entropy. {}"
)
_DRIFT: Final = (
    "Now minus the first look of this run, which a resumed run keeps; absent at that look. The "
    "probe set stays the same, so that nothing but the weights changes it"
)
_GROWTH: Final = (
    "Dehghani et al. (2023), ViT-22B, arXiv 2302.05442; Wortsman et al. (2023), Small-scale "
    "proxies, arXiv 2309.14322"
)


def _metric(question: str, formula: str, high: str, low: str, **other: str) -> Metric:
    fixed = {
        "unit": "nats",
        "cost": "O(queries * heads) time and memory, besides what the capture takes",
        "source": _GROWTH,
    }
    return Metric(question=question, formula=formula, high=high, low=low, **{**fixed, **other})


_LARGE: Final = (
    "above 50 to 100: attention logit growth (Kimi K2, arXiv 2507.20534, clips at 100). The "
    "softmax saturates, entropy falls to 0; runs diverged at about 1e4 and more. A lower learning "
    "rate, or layer norm of queries and keys, cures it"
)
_SMALL: Final = "near 0: attention is nearly uniform, as at initialisation"
METRICS: Final[Mapping[str, Metric]] = {
    "attention/logit/max": _metric(
        "How large is the largest attention logit?",
        "max over queries, heads and keys in reach of l = q k / sqrt(d), as the softmax gets it",
        _LARGE,
        _SMALL,
        estimator=_QUERIES.format("The largest of sampled queries, at most that of all"),
        ranks="max",
    ),
    "attention/logit/p99": _metric(
        "How large is the largest attention logit of nearly every query?",
        "99 % quantile over queries and heads of max_j l_j",
        _LARGE,
        _SMALL,
        estimator=_QUERIES.format("Below attention/logit/max by much: few queries or one head"),
    ),
    "attention/logit/drift": _metric(
        "By how much has the largest attention logit grown since the run began?",
        "attention/logit/max now - attention/logit/max at the first look",
        "logits grow; steadily and faster than the loss falls: attention logit growth",
        "near 0: no growth; negative: logits shrink",
        estimator=_QUERIES.format(_DRIFT) + ". Over ranks the largest drift of any",
        ranks="max",
    ),
    "attention/log_partition/mean": _metric(
        "How large are the logits of attention as its softmax adds them up?",
        "mean over queries i and heads of log((1 / n_i) sum_j exp l_ij), n_i keys in reach of i",
        "logits that are large for all keys, or very large for some: rounding in half precision, "
        "saturation",
        "near 0: small logits, as at initialisation; negative: most keys are pushed away",
        estimator=_QUERIES.format(
            "log n is taken off, without which it would be the number of keys that sets it: 0 "
            "where all logits are 0, whatever T is"
        ),
        source="Definition; the log partition of z-loss, Chowdhery et al. (2022), arXiv "
        "2204.02311, Sec. 5",
    ),
    "attention/log_partition/drift": _metric(
        "By how much have the logits of attention shifted since the run began?",
        "attention/log_partition/mean now - at the first look",
        "logits rise; with a falling attention/entropy/mean, saturation",
        "logits fall; near 0: no drift",
        estimator=_QUERIES.format(_DRIFT),
        source="Definition",
    ),
}


def largest_logits(rows: AttentionRows) -> Tensor:
    """How large are the largest logits of these queries?

    Maximum and 99 % quantile over queries and heads of ``max_j l_j``.

    Args:
        rows: Of one layer; a query with a reach of 0 is ignored, NaN included.

    Returns:
        ``[2]`` maximum and quantile (Hazen's rule), float32; NaN where there is no such query, or
        one of them has a NaN.

    Unit: nats.
    Device: the input's; no host synchronisation.
    Cost: O(m H log(m H)).

    Example:
        >>> largest_logits(AttentionRows(
        ...     entropy=torch.zeros(2, 2), reach=torch.tensor([3, 0]),
        ...     largest_logit=torch.tensor([[4.0, 8.0], [90.0, 90.0]]),
        ...     log_partition=torch.zeros(2, 2)))
        tensor([8., 8.])
    """
    weight = (rows.reach > 0)[:, None].expand(rows.largest_logit.shape).flatten()
    return weighted_quantiles(rows.largest_logit.flatten(), weight, (1.0, 0.99))


def mean_log_partition(rows: AttentionRows) -> Tensor:
    """How large are the logits as the softmax adds them up?

    ``mean_ih (log sum_j exp l_ihj - log n_i)``, ``n_i`` the query's reach.

    Args:
        rows: Of one layer; a query with a reach of 0 is ignored, NaN included.

    Returns:
        ``[]``, nats, float32: 0 where all logits are; NaN where there is no such query.

    Device: the input's; no host synchronisation.
    Cost: O(m H).

    Example:
        >>> mean_log_partition(AttentionRows(
        ...     entropy=torch.zeros(2, 1), reach=torch.tensor([1, 0]),
        ...     largest_logit=torch.zeros(2, 1), log_partition=torch.tensor([[3.0], [torch.nan]])))
        tensor(3.)
    """
    size = rows.reach.clamp(min=1).to(wide_dtype(rows.log_partition)).log()
    values = rows.log_partition - size[:, None]
    return weighted_mean(values.flatten(), (rows.reach > 0)[:, None].expand(values.shape).flatten())


@diagnostic(
    reads="attention", every={"fast": 0, "balanced": 20, "full": 5}, floor=200, metrics=METRICS
)
class AttentionLogits(Diagnostic):
    """Size of the logits of each attention layer, and its drift since the run began."""

    def initial_state(self) -> dict[str, Tensor]:
        """Nothing has been seen yet."""
        return {}

    def measure(
        self, reading: AttentionReading, state: Mapping[str, Tensor]
    ) -> tuple[list[Block], dict[str, Tensor]]:
        """Measure the queries of one look at the probe set, layer by layer."""
        first, blocks = dict(state), []
        for name, rows in reading.layers.items():
            largest, quantile = largest_logits(rows)
            values = torch.stack([largest, mean_log_partition(rows), quantile])
            weight = (rows.reach > 0).sum().float()
            began = first.get(name, torch.full_like(values[:2], torch.nan))
            if began.device != values.device:
                began = began.to(values.device)
            drift = torch.where(began.isnan(), 0.0, weight)
            blocks.append(
                Block.metrics(
                    [
                        "attention/logit/max",
                        "attention/log_partition/mean",
                        "attention/logit/p99",
                        "attention/logit/drift",
                        "attention/log_partition/drift",
                    ],
                    torch.cat([values, values[:2] - began]),
                    weight=torch.cat([weight.expand(3), drift]),
                    modules=name,
                )
            )
            first[name] = torch.where(began.isnan(), values[:2], began)
        return blocks, first
