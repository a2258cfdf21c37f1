"""Do attention heads choose where to look, or look everywhere or at one place?"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from entropylens.diagnostics._summaries import weighted_mean, wide_dtype
from entropylens.registry import (
    AttentionReading,
    AttentionRows,
    Block,
    Diagnostic,
    Metric,
    diagnostic,
)

__all__ = ["AttentionEntropy", "entropy_bands", "head_entropy", "normalised_head_entropy"]

COLLAPSED: Final = 0.1
"""Normalised entropy below which a head counts as collapsed. Ours: the paper has no number."""
BANDS: Final = ("first", "second", "third", "fourth")
_PAPER: Final = "Jha & Reagen (2025), Entropy-guided attention, arXiv 2501.03489, {}"
_QUERIES: Final = (
    "exact for the sampled queries of the probe set, in float32 logits; queries that may attend to "
    "nothing are left out. The first query of a causal layer counts, with 0. Layers that see "
    "different numbers of keys (sliding windows) are not comparable in nats. {}"
)
_NORMALISED: Final = (
    "queries that may attend to one key only are left out: they have no choice. Under a causal "
    "mask query t can reach log(t + 1) at most, so that a mean entropy never reaches the paper's "
    "log T (for T = 128 it is 0.80 of it at most); this is 1 for attention that is uniform. {}"
)
_SHARES: Final = "share of heads, all layers together where module is empty, else of one layer. {}"


def _metric(question: str, formula: str, high: str, low: str, **other: str) -> Metric:
    fixed = {
        "unit": "1",
        "cost": "O(queries * heads) time and memory, besides what the capture takes",
        "source": _PAPER.format("Sec. 3"),
    }
    return Metric(question=question, formula=formula, high=high, low=low, **{**fixed, **other})


_WIDE: Final = "attention is spread over all it may see: the head hardly chooses (overload)"
_NARROW: Final = "attention sits on single keys: sharp heads, or entropy collapse if many are"
_BAND: Final = "share of heads whose entropy is in {} of the largest head entropy of this look"
_RELATIVE: Final = _SHARES.format(
    "The four bands sum to 1. They are relative to the model's own widest head, which is always in "
    "the fourth: read them with attention/entropy/mean. Absent where every head's entropy is 0, "
    "NaN where one is NaN"
)
_MIDDLE: Final = ("with the other middle band about 0.9: well-behaved heads", "heads at the ends")
METRICS: Final[Mapping[str, Metric]] = {
    "attention/head_entropy": _metric(
        "How widely does one head spread its attention?",
        "E = mean over queries i of -sum_j a_ij log a_ij",
        _WIDE,
        _NARROW,
        unit="nats",
        estimator=_QUERIES.format(
            "Module is LAYER.head.H; every head of every layer is written, a row each"
        ),
        source=_PAPER.format("Eq. 7"),
    ),
    "attention/head_entropy_normalised": _metric(
        "How widely does one head spread its attention, as a share of what its mask allows?",
        "mean over queries i of (-sum_j a_ij log a_ij) / log n_i, n_i keys that i may attend to",
        _WIDE,
        _NARROW,
        estimator=_NORMALISED.format("Module is LAYER.head.H"),
        source="Definition",
    ),
    "attention/entropy/mean": _metric(
        "How widely does a layer spread its attention?",
        "mean over heads of E",
        _WIDE,
        _NARROW,
        unit="nats",
        estimator=_QUERIES.format("Module is the layer"),
        source=_PAPER.format("Eq. 7 and Fig. 3"),
    ),
    "attention/entropy/normalised/mean": _metric(
        "How widely does a layer spread its attention, as a share of what its mask allows?",
        "mean over heads of the normalised head entropy",
        _WIDE,
        _NARROW,
        estimator=_NORMALISED.format("Module is the layer"),
        source="Definition",
    ),
    "attention/bands/first": _metric(
        "How many heads are nearly one-hot beside the model's widest head?",
        _BAND.format("[0, 1/4)"),
        "entropy collapse if in deep layers: 33 % of heads of the paper's model without layer norm "
        "and nonlinearity, whose loss became NaN",
        "hardly any sharp heads",
        estimator=_RELATIVE,
    ),
    "attention/bands/second": _metric(
        "How many heads are of lower middling entropy?",
        _BAND.format("[1/4, 1/2)"),
        *_MIDDLE,
        estimator=_RELATIVE,
    ),
    "attention/bands/third": _metric(
        "How many heads are of upper middling entropy?",
        _BAND.format("[1/2, 3/4)"),
        *_MIDDLE,
        estimator=_RELATIVE,
    ),
    "attention/bands/fourth": _metric(
        "How many heads are near the entropy of the model's widest head?",
        _BAND.format("[3/4, 1]"),
        "entropic overload as the paper defines it; it gives no number: 58 %, 45 % and 23 % of "
        "heads in its models without layer norm. Also the case where all heads are alike",
        "few heads look everywhere",
        estimator=_RELATIVE,
    ),
    "attention/collapsed/share": _metric(
        "How many heads have collapsed onto single keys?",
        f"share of heads with a normalised entropy below {COLLAPSED}",
        "entropy collapse, a sign of instability to come; a few sharp heads (previous token, "
        "attention sink) are usual",
        "no collapse",
        estimator=_SHARES.format("The cut is ours: the paper speaks of near-zero heads"),
        source=_PAPER.format("Sec. 3; Zhai et al. (2023), arXiv 2303.06296"),
    ),
    "attention/overloaded/share": _metric(
        "How many heads look everywhere?",
        "share of heads in the fourth band that have not collapsed",
        "above about 0.4: entropic overload, heads that do no work of their own",
        "heads differ in what they attend to",
        estimator=_SHARES.format(
            "The fourth band alone is the paper's; where all heads have collapsed alike, it holds "
            "them all, which is no overload. The 0.4 is ours"
        ),
    ),
}


def head_entropy(rows: AttentionRows) -> Tensor:
    """How widely does each head spread its attention?

    ``E_h = mean_i H_ih`` over queries that may attend to something.

    Args:
        rows: Of one layer, m queries and H heads; a query with a reach of 0 is ignored, NaN
            included.

    Returns:
        ``[H]``, nats, float32; NaN where there is no such query.

    Device: the input's; no host synchronisation.
    Cost: O(m H).
    Source: arXiv 2501.03489, Eq. 7, of the sampled queries in place of all T.

    Example:
        >>> head_entropy(AttentionRows(
        ...     entropy=torch.tensor([[0.0, 1.0], [2.0, 2.0]]), reach=torch.tensor([3, 9]),
        ...     largest_logit=torch.zeros(2, 2), log_partition=torch.zeros(2, 2)))
        tensor([1.0000, 1.5000])
    """
    return weighted_mean(rows.entropy.T, (rows.reach > 0).expand(rows.entropy.T.shape))


def normalised_head_entropy(rows: AttentionRows) -> Tensor:
    """How widely does each head spread its attention, as a share of what its mask allows?

    ``mean_i H_ih / log n_i`` over queries with ``n_i > 1`` keys in reach.

    Args:
        rows: Of one layer, m queries and H heads; a query with a reach below 2 is ignored, NaN
            included.

    Returns:
        ``[H]`` in 0..1, float32; NaN where there is no such query.

    Unit: 1.
    Device: the input's; no host synchronisation.
    Cost: O(m H).

    Example:
        >>> normalised_head_entropy(AttentionRows(
        ...     entropy=torch.tensor([[0.0], [2.0], [0.0]]).log1p(), reach=torch.tensor([1, 3, 9]),
        ...     largest_logit=torch.zeros(3, 1), log_partition=torch.zeros(3, 1)))
        tensor([0.5000])
    """
    chooses = rows.reach > 1
    most = torch.where(chooses, rows.reach, 2).to(wide_dtype(rows.entropy)).log()
    return weighted_mean(rows.entropy.T / most, chooses.expand(rows.entropy.T.shape))


def entropy_bands(entropy: Tensor, largest: Tensor) -> Tensor:
    """In which quarter of the model's largest head entropy is each head?

    ``[0, 1/4), [1/4, 1/2), [1/2, 3/4), [3/4, 1]`` of ``largest``.

    Args:
        entropy: ``[n]`` head entropies, 0..largest.
        largest: ``[]`` the largest head entropy observed in the model, above 0.

    Returns:
        ``[4, n]``: 1 in the head's band, else 0; NaN where the entropy or ``largest`` is.

    Unit: 1.
    Device: the input's; no host synchronisation.
    Cost: O(n).
    Source: arXiv 2501.03489, Sec. 3: relative to the largest entropy observed, not to log T.

    Example:
        >>> entropy_bands(torch.tensor([0.9, 1.0, 4.0]), torch.tensor(4.0)).mean(1)
        tensor([0.3333, 0.3333, 0.0000, 0.3333])
    """
    quarters = [largest * quarter for quarter in (0.25, 0.5, 0.75)]
    band = torch.stack([entropy >= quarter for quarter in quarters]).sum(0)
    places = torch.arange(len(BANDS), device=entropy.device)
    found = (places[:, None] == band).float()
    return torch.where((entropy + largest).isnan(), torch.nan, found)


@diagnostic(
    reads="attention", every={"fast": 0, "balanced": 20, "full": 5}, floor=200, metrics=METRICS
)
class AttentionEntropy(Diagnostic):
    """Entropy of every attention head, by layer, and in which band of the model's heads it is."""

    def measure(self, reading: AttentionReading, state: Any) -> tuple[list[Block], Any]:
        """Measure the queries of one look at the probe set."""
        if not reading.layers:
            return [], state
        layers = {name: _heads(rows) for name, rows in reading.layers.items()}
        model = torch.cat(list(layers.values()), 1)
        entropy, _, queries, _ = model
        largest = torch.where(queries > 0, entropy, 0.0).amax()
        blocks = [_shares("", model, largest)]
        for name, heads in layers.items():
            blocks += [*_entropies(name, heads), _shares(name, heads, largest)]
        return blocks, state


def _heads(rows: AttentionRows) -> Tensor:
    """``[4, H]``: entropy, normalised entropy, and how many queries are behind each."""
    queries = [(rows.reach > least).sum().float() for least in (0, 1)]
    counts = torch.stack(queries)[:, None].expand(2, rows.entropy.shape[1])
    return torch.cat([torch.stack([head_entropy(rows), normalised_head_entropy(rows)]), counts])


def _entropies(layer: str, heads: Tensor) -> list[Block]:
    values, weight = heads[:2], heads[2:]
    count = values.shape[1]
    names = ["attention/head_entropy"] * count + ["attention/head_entropy_normalised"] * count
    modules = [f"{layer}.head.{head}" for head in range(count)] * 2
    return [
        Block.metrics(names, values.flatten(), weight=weight.flatten(), modules=modules),
        Block.metrics(
            ["attention/entropy/mean", "attention/entropy/normalised/mean"],
            values.mean(1),
            weight=weight[:, 0],
            modules=layer,
        ),
    ]


def _shares(module: str, heads: Tensor, largest: Tensor) -> Block:
    entropy, normalised, queries, choosing = heads
    bands = entropy_bands(entropy, largest)
    collapsed = torch.where(normalised.isnan(), torch.nan, (normalised < COLLAPSED).float())
    values = torch.stack([*bands, collapsed, bands[-1] * (1 - collapsed)])
    counts = torch.stack([queries] * len(BANDS) + [choosing] * 2)
    weight = counts.amax(1)
    in_bands = torch.where(largest == 0, 0.0, weight[: len(BANDS)])
    names = [f"attention/bands/{band}" for band in BANDS]
    return Block.metrics(
        [*names, "attention/collapsed/share", "attention/overloaded/share"],
        weighted_mean(values, (counts > 0).float()),
        weight=torch.cat([in_bands, weight[len(BANDS) :]]),
        modules=module,
    )
