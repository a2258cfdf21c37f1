"""Are longer completions more undecided, or are hard prompts answered at length?"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from entropylens.diagnostics._summaries import (
    LEAST,
    ROUNDING,
    centred,
    correlation,
    wide_dtype,
)
from entropylens.registry import Block, Diagnostic, Metric, PolicyReading, diagnostic

__all__ = [
    "LengthEntropy",
    "average_ranks",
    "group_deviations",
    "length_slope",
    "sequence_entropy",
]

_ESTIMATOR = (
    "each sequence counts once: the mean entropy of its measured tokens (each weighted by the "
    "tokens it stands for) against all its scored tokens; where rows are sampled the noise of that "
    "mean pulls correlations towards 0; over ranks the mean of each rank's own; absent below "
    f"{LEAST} sequences and where a column does not vary"
)
_HIGH = "long completions are the undecided ones: exploration at length, or rambling"
_LOW = "short completions are the undecided ones; long ones settle, or repeat themselves"


def _metric(question: str, formula: str, **other: str) -> Metric:
    fixed = {"unit": "1", "estimator": _ESTIMATOR, "high": _HIGH, "low": _LOW, "source": "Pearson"}
    fixed["cost"] = "O(tokens + sequences log sequences); no logits"
    return Metric(question=question, formula=formula, **{**fixed, **other})


METRICS: Final[Mapping[str, Metric]] = {
    "length_entropy/correlation": _metric(
        "Are longer completions the more undecided ones?",
        "Pearson correlation over sequences of mean token entropy and number of scored tokens",
    ),
    "length_entropy/rank_correlation": _metric(
        "Are longer completions the more undecided ones, whatever the shape of the relation?",
        "Spearman: Pearson correlation of the average ranks of mean token entropy and of length",
        source="Spearman (1904), ties at their average rank",
    ),
    "length_entropy/slope": _metric(
        "By how much does entropy rise when a completion is e times as long?",
        "cov(H, ln L) / var(ln L) over sequences, H mean token entropy, L scored tokens",
        unit="nats per e-fold of length",
        source="Least squares",
    ),
    "length_entropy/within_group/correlation": _metric(
        "Among answers to the same prompt, are the longer ones the more undecided?",
        "Pearson correlation of mean token entropy and length, both less the mean of their group",
        estimator=_ESTIMATOR + "; sequences of groups of which at least two are in this step, "
        "which is less than the group where the trainer shuffles",
        high="undecided completions run long at equal difficulty: rambling, or reflection",
        low="at equal difficulty the undecided completions are the short ones",
        source="Within-group (fixed effects) correlation: takes prompt difficulty out",
    ),
    "length_entropy/sequences": _metric(
        "How many completions were compared?",
        "number of sequences with a measured token",
        unit="sequences",
        estimator="exact, this rank",
        high="correlations with a small standard error, about 1 / sqrt(sequences)",
        low="correlations with a large standard error",
        source="Definition",
        ranks="sum",
    ),
}


def sequence_entropy(
    entropy: Tensor, weight: Tensor, sequence: Tensor, sequences: int
) -> tuple[Tensor, Tensor]:
    """How undecided was the model along each sequence?

    ``sum_t w_t H_t / sum_t w_t`` over the measured tokens of each sequence.

    Args:
        entropy: ``[n]``, nats; ignored where the weight is 0.
        weight: ``[n]``, scored tokens each stands for.
        sequence: ``[n]``, index of the sequence; ignored where the weight is 0.
        sequences: Number of sequences.

    Returns:
        Mean entropies ``[sequences]``, float32, NaN where nothing was measured, and the weight
        behind each ``[sequences]``.

    Unit: nats.
    Device: the input's; no host synchronisation.
    Cost: O(n + sequences).

    Example:
        >>> H, index = torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1])
        >>> sequence_entropy(H, torch.ones(3), index, 2)[0]
        tensor([2., 5.])
    """
    counted = weight > 0
    place = torch.where(counted, sequence, 0)
    kept = torch.where(counted, weight, 0.0).to(wide_dtype(entropy))
    empty = kept.new_zeros(sequences)
    weights = empty.index_add(0, place, kept)
    sums = empty.index_add(0, place, torch.where(counted, entropy, 0.0) * kept)
    return (sums / weights).float(), weights


def average_ranks(values: Tensor, counted: Tensor) -> Tensor:
    """Which place does each value take, ties sharing theirs?

    The number of counted values below it, plus half of one more than those equal to it (itself
    included): 1 is the least.

    Args:
        values: ``[n]``.
        counted: ``[n]`` bool; other values take no place.

    Returns:
        ``[n]``, NaN for NaN; what stands where ``counted`` is false means nothing.

    Device: the input's; no host synchronisation.
    Cost: O(n log n).

    Example:
        >>> average_ranks(torch.tensor([7.0, 3.0, 7.0]), torch.ones(3, dtype=torch.bool))
        tensor([2.5000, 1.0000, 2.5000])
    """
    kept = torch.where(counted, values, torch.inf).contiguous()
    ordered = kept.sort().values
    below = torch.searchsorted(ordered, kept)
    up_to = torch.searchsorted(ordered, kept, right=True)
    return torch.where(values.isnan(), torch.nan, (below + up_to + 1).float() / 2)


def group_deviations(values: Tensor, group: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """How far is each sequence from the mean of the answers to its own prompt?

    Args:
        values: ``[n]``.
        group: ``[n]``, any integers.
        counted: ``[n]`` bool; other values are in no mean.

    Returns:
        Deviations ``[n]``, 0 where below 1e-6 of the largest magnitude, which rounding alone makes;
        and a bool ``[n]``: true where at least two of the group are counted.

    Unit: that of the values.
    Device: the input's; no host synchronisation: groups are numbered by sorting.
    Cost: O(n log n).

    Example:
        >>> group, counted = torch.tensor([4, 9, 4]), torch.ones(3, dtype=torch.bool)
        >>> deviations, shared = group_deviations(torch.tensor([1.0, 5.0, 3.0]), group, counted)
        >>> deviations.tolist(), shared.tolist()
        ([-1.0, 0.0, 1.0], [True, False, True])
    """
    ordered, order = group.sort()
    starts = torch.cat([torch.zeros_like(order[:1]), (ordered[1:] != ordered[:-1]).long()])
    number = torch.zeros_like(order).scatter(0, order, starts.cumsum(0))
    kept = torch.where(counted, values, 0.0).to(wide_dtype(values))
    empty = torch.zeros_like(kept)
    members = empty.index_add(0, number, counted.to(kept.dtype))
    means = empty.index_add(0, number, kept) / members
    deviations = kept - means[number]
    rounding = deviations.abs() <= ROUNDING * kept.abs().amax()
    return torch.where(rounding, 0.0, deviations), counted & (members >= 2)[number]


def length_slope(entropy: Tensor, tokens: Tensor, counted: Tensor) -> Tensor:
    """By how much does entropy rise when a completion is e times as long?

    ``cov(H, ln L) / var(ln L)``: least squares of H on ln L.

    Args:
        entropy: ``[n]``, mean token entropy of each sequence, nats.
        tokens: ``[n]``, scored tokens of each, at least 1 where counted.
        counted: ``[n]`` bool.

    Returns:
        ``[]``, float32; NaN with fewer than 3 counted, or where all are equally long.

    Unit: nats per e-fold of length.
    Device: the input's; no host synchronisation.
    Cost: O(n).
    """
    dy, _ = centred(entropy, counted)
    dx, varies = centred(tokens.to(wide_dtype(tokens)).log(), counted)
    return torch.where(varies, (dx * dy).sum() / dx.square().sum(), torch.nan).float()


@diagnostic(
    reads="policy",
    every={"fast": 10, "balanced": 1, "full": 1},
    floor={"fast": 200, "balanced": 50, "full": 20},
    metrics=METRICS,
)
class LengthEntropy(Diagnostic):
    """Length of completions against their mean entropy, over all and within prompts."""

    def measure(self, reading: PolicyReading, state: Any) -> tuple[list[Block], Any]:
        """Correlate the sequences of one step."""
        tokens = reading.tokens
        length = tokens.sequence_tokens
        if not length.numel():
            return [], state
        entropy, measured = sequence_entropy(
            tokens.entropy, tokens.weight, tokens.sequence, length.numel()
        )
        counted = measured > 0
        ranks = average_ranks(entropy, counted), average_ranks(length.float(), counted)
        sequences = counted.sum()
        found = {
            "sequences": sequences.float(),
            "correlation": correlation(entropy, length, counted),
            "rank_correlation": correlation(*ranks, counted),
            "slope": length_slope(entropy, length, counted),
        }
        behind = [sequences] * len(found)
        if reading.group is not None:
            undecided, shared = group_deviations(entropy, reading.group, counted)
            longer, _ = group_deviations(length, reading.group, counted)
            found["within_group/correlation"] = correlation(undecided, longer, shared)
            behind.append(shared.sum())
        values = torch.stack([*found.values()])
        weight = torch.where(values.isnan(), 0, torch.stack(behind))
        names = [f"length_entropy/{name}" for name in found]
        return [Block.metrics(names, values, weight=weight)], state
