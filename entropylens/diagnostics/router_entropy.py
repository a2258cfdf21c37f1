"""Do the routers of a mixture of experts still choose, and do all experts get work?"""

from collections.abc import Mapping
from math import log
from typing import Any, Final

import torch
from torch import Tensor

from entropylens.diagnostics._summaries import weighted_mean, wide_dtype
from entropylens.registry import Block, Diagnostic, Metric, RouterReading, diagnostic

__all__ = ["RouterEntropy", "assignment_counts", "load_entropy", "router_entropy"]

_TOKENS = (
    "exact for every token that is not padding, softmax over the logits of one layer's router; "
    "module is the layer; layers with a single expert are left out"
)
_LOADS = (
    "load = share of a layer's assignments that each expert gets: counted from the k greatest "
    "logits of each token that is not padding, where the model tells k; else the mean router "
    "probability. A selection bias, groups of experts or a capacity limit that the model adds "
    "after its logits are not seen. Loads of several ranks do not average: {} "
)
_COST = "O(tokens * experts) time and memory for each layer"
_SWITCH = "Fedus et al. (2021), Switch Transformers, arXiv 2101.03961, Sec. 2.2"


def _metric(question: str, formula: str, high: str, low: str, **other: str) -> Metric:
    fixed = {"unit": "1", "estimator": _TOKENS, "cost": _COST, "source": _SWITCH}
    return Metric(question=question, formula=formula, high=high, low=low, **{**fixed, **other})


_UNDECIDED = "the router hardly chooses: early training, or experts that are all alike"
_DECIDED = "the router is sure of each token; together with a low router/load/entropy, collapse"
METRICS: Final[Mapping[str, Metric]] = {
    "router/entropy/mean": _metric(
        "How undecided is a layer's router about one token?",
        "mean over tokens of H = -sum_e p_e log p_e, p = softmax(router logits)",
        _UNDECIDED,
        _DECIDED,
        unit="nats",
        source="Shannon (1948)",
    ),
    "router/entropy/normalised/mean": _metric(
        "How undecided is a layer's router, as a share of what its experts allow?",
        "mean H / ln E, E experts",
        _UNDECIDED,
        _DECIDED,
        source="Shannon (1948)",
    ),
    "router/load/entropy": _metric(
        "How evenly do a layer's experts share the work?",
        "-sum_e f_e log f_e / ln E, f = load; 1 for an even load, ln k / ln E where all tokens go "
        "to the same k experts",
        "balanced",
        "few experts do the work: routing collapse, or too weak a balancing loss",
        estimator=_LOADS.format(
            "the mean of the ranks' entropies, by tokens, is at most the entropy of all ranks' "
            "load, since entropy is concave."
        ),
    ),
    "router/load/largest/share": _metric(
        "How much of a layer's work falls to its busiest expert?",
        "max_e f_e, f = load; 1/E for an even load, at most 1/k where each token goes to k experts",
        "one expert is a bottleneck, and drops tokens where there is a capacity limit",
        "balanced",
        estimator=_LOADS.format(
            "the mean of the ranks' maxima, by tokens, is at least the maximum of all ranks' load."
        ),
    ),
    "router/dead/share": _metric(
        "How many of a layer's experts got no token?",
        "share of experts with a load of 0",
        "experts that are no longer trained; with few tokens for each expert also chance",
        "every expert learns",
        estimator=_LOADS.format(
            "an expert that is dead everywhere is dead on each rank, so the least of the ranks' "
            "shares is at least the share dead everywhere."
        )
        + "Only where the model tells k: no expert's mean probability is 0",
        ranks="min",
    ),
}


def router_entropy(logits: Tensor) -> Tensor:
    """How undecided is the router about each token?

    ``H = -sum_e p_e log p_e``, ``p = softmax(logits)``.

    Args:
        logits: ``[tokens, experts]``, any floating dtype; -inf is a probability of 0.

    Returns:
        ``[tokens]``, nats, 0..ln E, in float64 where the device has it.

    Device: the input's; no host synchronisation.
    Cost: O(tokens * experts).
    Source: Shannon (1948).

    Example:
        >>> router_entropy(torch.tensor([[0.0, 0.0, -torch.inf]])).exp()
        tensor([2.], dtype=torch.float64)
    """
    return torch.special.entr(logits.to(wide_dtype(logits)).softmax(-1)).sum(-1)


def assignment_counts(logits: Tensor, present: Tensor, experts_per_token: int) -> Tensor:
    """How many tokens does each expert get?

    Each present token goes to its ``experts_per_token`` greatest logits.

    Args:
        logits: ``[tokens, experts]``.
        present: ``[tokens]`` bool; what stands in other rows is ignored, NaN included.
        experts_per_token: k; all experts where there are no more.

    Returns:
        ``[experts]``, float64 where the device has it; sums to k times the present tokens.

    Device: the input's; no host synchronisation.
    Cost: O(tokens * experts).

    Example:
        >>> logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0]])
        >>> assignment_counts(logits, torch.ones(2, dtype=torch.bool), 2).tolist()
        [1.0, 2.0, 1.0]
    """
    experts = logits.shape[1]
    chosen = logits.topk(min(experts_per_token, experts), dim=-1).indices
    counted = present[:, None].expand_as(chosen).to(wide_dtype(logits))
    nothing = torch.zeros(experts, dtype=counted.dtype, device=logits.device)
    return nothing.index_add(0, chosen.flatten(), counted.flatten())


def load_entropy(load: Tensor) -> Tensor:
    """How evenly is the work shared?

    ``-sum_e f_e log f_e / ln E`` with ``f`` the load scaled to sum to 1.

    Args:
        load: ``[experts]``, at least 0 and at least two of them; counts or shares.

    Returns:
        ``[]`` in 0..1: 1 where all are equal, 0 where one has all; NaN where there is no load.

    Unit: 1.
    Device: the input's; no host synchronisation.
    Cost: O(experts).

    Example:
        >>> load_entropy(torch.tensor([5.0, 5.0, 0.0, 0.0]))
        tensor(0.5000)
    """
    return torch.special.entr(load / load.sum()).sum() / log(load.numel())


@diagnostic(
    reads="router",
    every={"fast": 50, "balanced": 10, "full": 1},
    floor=200,
    metrics=METRICS,
)
class RouterEntropy(Diagnostic):
    """Entropy of each layer's router, and how evenly it loads its experts."""

    def measure(self, reading: RouterReading, state: Any) -> tuple[list[Block], Any]:
        """Measure the routers of one forward pass, layer by layer."""
        return [
            _layer(name, logits, reading)
            for name, logits in reading.logits.items()
            if logits.shape[1] > 1
        ], state


def _layer(name: str, logits: Tensor, reading: RouterReading) -> Block:
    present = reading.present
    if present is None:
        present = torch.ones(logits.shape[0], dtype=torch.bool, device=logits.device)
    weight = present.float()
    entropy = weighted_mean(router_entropy(logits), weight)
    values = {
        "router/entropy/mean": entropy,
        "router/entropy/normalised/mean": entropy / log(logits.shape[1]),
    }
    if reading.experts_per_token is None:
        probability = logits.to(wide_dtype(logits)).softmax(-1)
        load = torch.where(present[:, None], probability, 0.0).sum(0)
    else:
        load = assignment_counts(logits, present, reading.experts_per_token)
        values["router/dead/share"] = (load == 0).float().mean()
    values["router/load/entropy"] = load_entropy(load).float()
    values["router/load/largest/share"] = (load.amax() / load.sum()).float()
    return Block.metrics(
        list(values), torch.stack(list(values.values())), weight=weight.sum(), modules=name
    )
