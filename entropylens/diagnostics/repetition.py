"""Do completions repeat themselves?"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from entropylens.diagnostics._summaries import share_where, weighted_mean, weighted_quantiles
from entropylens.registry import Block, Diagnostic, Metric, RolloutReading, diagnostic

__all__ = ["Repetition", "longest_run", "repeated_ngrams"]

LENGTH: Final = 4
THRESHOLD: Final = 0.5

_MULTIPLIER: Final = 0x5851F42D4C957F2D
"""Knuth's for MMIX: odd, so that no token's difference is lost modulo 2^64."""
_ABSENT: Final = 2**63 - 1

_SOURCE = "rep-n of Welleck et al. (2020), arXiv 1908.04319, for each completion"


def _metric(question: str, formula: str, high: str, low: str, **other: str) -> Metric:
    fixed = {
        "unit": "1",
        "estimator": f"completions of this rank with more than {LENGTH} tokens; weighted by their "
        "number",
        "cost": "a sort of the tokens of each completion; about 40 bytes a token slot for a moment",
        "source": _SOURCE,
    }
    return Metric(question=question, formula=formula, high=high, low=low, **{**fixed, **other})


METRICS: Final[Mapping[str, Metric]] = {
    "repetition/ngram/mean": _metric(
        "How much of a completion repeats what it said before?",
        f"mean over completions of 1 - distinct {LENGTH}-grams / all {LENGTH}-grams",
        "loops: a policy on its way to collapse, or a temperature too low",
        "hardly anything is said twice",
    ),
    "repetition/ngram/p95": _metric(
        "How repetitive are the worst twentieth of the completions?",
        f"quantile 0.95 over completions of 1 - distinct {LENGTH}-grams / all, Hazen interpolation",
        "some completions loop to their end",
        "not even the worst loop",
    ),
    "repetition/ngram/share": _metric(
        "How many completions are mostly repetition?",
        f"share of completions with 1 - distinct {LENGTH}-grams / all above {THRESHOLD:g}",
        "degenerate text is common",
        "degenerate text is rare",
    ),
    "repetition/longest_run/mean": _metric(
        "How much of a completion is one token over and over?",
        "mean over completions of the longest run of one and the same token / length",
        "one token repeated without end: a collapsed policy",
        "no token is stuck: about 1 / length",
        source="Longest run",
    ),
}


def repeated_ngrams(tokens: Tensor, mask: Tensor, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """How much of each completion repeats what it said before?

    ``1 - distinct n-grams / all n-grams``; an n-gram is ``length`` neighbouring slots that are all
    the completion's. N-grams are told apart by a polynomial of their tokens modulo 2^64, of which
    63 bits are kept: two different ones count as one with odds near 2^-63 a pair, below 1e-10 for
    all pairs of a completion of 32,768 tokens together.

    Args:
        tokens: ``[m, T]`` integers; what stands where the mask is false is ignored.
        mask: ``[m, T]`` bool, true where a token belongs to the completion.
        length: Tokens of an n-gram.

    Returns:
        Shares ``[m]``, float32 in 0..1, NaN where there is no n-gram, and the n-grams of each
        completion ``[m]``.

    Device: the input's; no host synchronisation.
    Cost: O(m T log T) time, about 40 m T bytes.
    Source: rep-n of Welleck et al. (2020), arXiv 1908.04319.

    Example:
        >>> tokens = torch.tensor([[1, 2, 1, 2, 1, 2, 0]])
        >>> repeated_ngrams(tokens, tokens > 0, length=2)
        (tensor([0.6000]), tensor([5]))
    """
    columns = tokens.shape[1] - length + 1
    if columns < 1:
        nothing = torch.zeros_like(mask).sum(-1)
        return torch.full_like(nothing, torch.nan, dtype=torch.float32), nothing
    value = torch.zeros_like(tokens[:, :columns], dtype=torch.int64)
    whole = torch.ones_like(mask[:, :columns])
    for start in range(length):
        value = (value + tokens[:, start : start + columns]) * _MULTIPLIER
        whole &= mask[:, start : start + columns]
    ordered = torch.where(whole, value >> 1, _ABSENT).sort(-1).values
    first = pad(ordered[:, 1:] != ordered[:, :-1], (1, 0), value=True)
    distinct, total = (first & (ordered != _ABSENT)).sum(-1), whole.sum(-1)
    return 1 - (distinct / total).float(), total


def longest_run(tokens: Tensor, mask: Tensor) -> Tensor:
    """How long is each completion's longest run of one and the same token?

    Args:
        tokens: ``[m, T]`` integers; what stands where the mask is false is ignored.
        mask: ``[m, T]`` bool, true where a token belongs to the completion; a gap ends a run.

    Returns:
        ``[m]`` integers, tokens; 0 for an empty completion.

    Device: the input's; no host synchronisation.
    Cost: O(m T) time, about 20 m T bytes.

    Example:
        >>> longest_run(torch.tensor([[5, 5, 5, 2, 2]]), torch.tensor([[True] * 2 + [False] * 3]))
        tensor([2])
    """
    place = torch.arange(1, tokens.shape[1] + 1, device=tokens.device).expand_as(tokens)
    goes_on = pad(tokens[:, 1:] == tokens[:, :-1], (1, 0)) & mask
    before = torch.where(goes_on, 0, place - mask.to(place.dtype)).cummax(-1).values
    return (place - before).amax(-1)


@diagnostic(
    reads="rollout",
    every={"fast": 1, "balanced": 1, "full": 1},
    floor=50,
    metrics=METRICS,
)
class Repetition(Diagnostic):
    """Repeated n-grams and runs of one token, by completion."""

    def measure(self, reading: RolloutReading, state: Any) -> tuple[list[Block], Any]:
        """Summarise how repetitive the completions of one rollout are."""
        tokens, mask = reading.token_id, reading.mask
        if tokens is None or mask is None or not tokens.numel():
            return [], state
        repeated, total = repeated_ngrams(tokens, mask)
        judged = (total > 1).float()
        run = longest_run(tokens, mask) / mask.sum(-1)
        values = {
            "ngram/mean": weighted_mean(repeated, judged),
            "ngram/p95": weighted_quantiles(repeated, judged, (0.95,))[0],
            "ngram/share": share_where(repeated > THRESHOLD, judged),
            "longest_run/mean": weighted_mean(run, judged),
        }
        names = [f"repetition/{name}" for name in values]
        stacked = torch.stack(list(values.values()))
        return [Block.metrics(names, stacked, weight=judged.sum())], state
