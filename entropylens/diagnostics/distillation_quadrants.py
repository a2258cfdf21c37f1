"""Where does a student differ from its teacher: where it is undecided, or where it is sure?"""

from collections.abc import Mapping
from math import log
from typing import Any, Final

import torch
from torch import Tensor

from entropylens.diagnostics._summaries import (
    share_where,
    weighted_mean,
    weighted_quantiles,
    wide_dtype,
)
from entropylens.registry import Block, Diagnostic, Metric, PolicyReading, diagnostic

__all__ = [
    "DistillationQuadrants",
    "distribution_divergences",
    "overconfidence",
    "quadrants",
    "relative_position",
    "soft_or",
]

QUADRANTS: Final = ("q1", "q2", "q3", "q4")
ENTROPY_CEILING: Final = 0.98
"""Level of the entropy's quantile above which the soft scores take all entropies as equal."""
SCRATCH: Final = 2**20
"""Elements of one chunk of rows: 8 MiB for each of some eight float64 copies."""

_ESTIMATOR = (
    "as the distillation loss has it, over the whole vocabulary at its own temperature, for each "
    "token whose divergence and entropy are known (not NaN); over scored tokens (mask), weighted "
    "by the tokens each row stands for; cuts and ranges are this batch's own, on each rank its "
    "own, so values compare within a run and not between batches of another kind"
)
_COST = "O(n log n) over the measured tokens; the divergences come with the distillation loss"
_TIP = "TIP, arXiv 2604.14084; "
_CUTS = _TIP + (
    "the paper gives no thresholds, the cuts at the medians are ours, so its own shares (Q3 3 to "
    "15 %, Q4 40 to 47 %) do not compare: medians fix q1 + q2 = q1 + q3 = 1/2 but for ties, and "
    "what is left to see is whether the two go together"
)
_SCORE = _TIP + (
    "{} the released code (HJSang/OPSD, losses.py) has neither score: it draws tokens by entropy "
    "and Jensen-Shannon divergence, in a function that its worker never calls"
)
_MEANING: Final = {
    "q1": ("undecided, far from the teacher", "forking tokens still to be learnt"),
    "q2": ("undecided, near the teacher", "the teacher is undecided there too"),
    "q3": ("decided, far from the teacher", "overconfident errors, which entropy cannot show"),
    "q4": ("decided, near the teacher", "solved tokens: little left to learn from"),
}
_CELLS: Final = {
    "q1": "h > median h, delta > median delta",
    "q2": "h > median h, delta <= median delta",
    "q3": "h <= median h, delta > median delta",
    "q4": "h <= median h, delta <= median delta",
}


def _metric(question: str, formula: str, high: str, low: str, **other: str) -> Metric:
    fixed = {"unit": "1", "estimator": _ESTIMATOR, "cost": _COST, "source": _CUTS}
    return Metric(question=question, formula=formula, high=high, low=low, **{**fixed, **other})


METRICS: Final[Mapping[str, Metric]] = {
    **{
        f"distillation/quadrant/{name}/share": _metric(
            f"How many tokens are {meaning[0]}?",
            f"share of tokens with {_CELLS[name]}; h = H(student) / ln V, delta = KL(student || "
            "teacher)",
            meaning[1],
            "few tokens of this kind",
        )
        for name, meaning in _MEANING.items()
    },
    **{
        f"distillation/quadrant/{name}/kl_share": _metric(
            f"How much of the loss comes from tokens that are {meaning[0]}?",
            f"sum of delta over tokens with {_CELLS[name]}, divided by the sum over all; h = "
            "H(student) / ln V, delta = KL(student || teacher), the loss itself",
            meaning[1] + " dominate the gradient",
            "this kind hardly matters to the loss",
            estimator=_ESTIMATOR
            + "; absent where the loss is 0 or infinite; several ranks: mean by tokens",
        )
        for name, meaning in _MEANING.items()
    },
    "distillation/soft_or/mean": _metric(
        "How many tokens are worth learning from, by entropy or by divergence?",
        "mean of s = 1 - (1 - h^)(1 - d^); h^ = entropy cut off at its quantile 0.98, then scaled "
        "from its least to its greatest value to 0..1; d^ = KL(student || teacher) scaled alike, "
        "without the cut; a column of equal values is 0",
        "much is undecided or wrong",
        "most tokens are solved, or one token's divergence dwarfs all others",
        source=_SCORE.format("Eq. 7;"),
    ),
    "distillation/overconfident/mean": _metric(
        "How much does the teacher object where the student is sure?",
        "mean of KL(teacher || student) (1 - h^); h^ as in distillation/soft_or/mean",
        "confident errors: tokens with low entropy that the teacher would not have written",
        "where the student is sure it is right",
        unit="nats",
        source=_SCORE.format("the score that ranks Q3 tokens, with the forward KL;"),
    ),
}


def distribution_divergences(
    logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    *,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """How far apart are the distributions of a student and a teacher?

    With ``p = softmax(z / T)`` the student's and ``q`` the teacher's, ``m = (p + q) / 2``:
    reverse ``KL(p || q) = sum_i p_i (log p_i - log q_i)``, forward ``KL(q || p)``, and
    Jensen-Shannon ``(KL(p || m) + KL(q || m)) / 2``, at most ln 2.

    Args:
        logits: ``[n, V]`` of the student, any floating dtype; -inf is a probability of 0.
        teacher_logits: ``[n, V]`` of the teacher.
        temperature: T, of both.
        chunk_rows: Rows taken at once; by default as many as keep the scratch under 64 MiB, and
            at least one.

    Returns:
        Reverse, forward and Jensen-Shannon divergence, each ``[n]``, nats, float32; a KL is
        infinite where its second distribution lacks a class that its first one has.

    Device: the input's; no host synchronisation.
    Cost: O(n V) time; computed in float64 where the device has it, chunk by chunk.
    Source: Kullback and Leibler (1951); Lin (1991).

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -torch.inf]])
        >>> [f"{float(d):.4f}" for d in distribution_divergences(student, teacher)]
        ['inf', '0.6931', '0.2158']
    """
    rows, classes = logits.shape
    step = chunk_rows or max(SCRATCH // max(classes, 1), 1)
    chunks = [
        _divergences(
            logits[start : start + step], teacher_logits[start : start + step], temperature
        )
        for start in range(0, rows, step)
    ]
    if not chunks:
        chunks = [logits.new_empty(3, 0, dtype=torch.float32)]
    reverse, forward, jensen_shannon = torch.cat(chunks, 1)
    return reverse, forward, jensen_shannon


def _divergences(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    student, teacher = (
        (part.to(wide_dtype(part)) / temperature).log_softmax(-1)
        for part in (logits, teacher_logits)
    )
    middle = torch.logaddexp(student, teacher) - log(2)
    reverse, forward = _kl(student, teacher), _kl(teacher, student)
    jensen_shannon = (_kl(student, middle) + _kl(teacher, middle)) / 2
    return torch.stack([reverse, forward, jensen_shannon]).float()


def _kl(first: Tensor, second: Tensor) -> Tensor:
    absent = first == -torch.inf
    return torch.where(absent, 0.0, first.exp() * (first - second)).sum(-1)


def quadrants(entropy: Tensor, divergence: Tensor, weight: Tensor) -> Tensor:
    """Which tokens are undecided or not, far from the teacher or not?

    Cut at the weighted medians; what equals a median is low. Whatever scales the entropy, as
    1 / ln V does, changes nothing.

    Args:
        entropy: ``[n]``, of the student, any unit.
        divergence: ``[n]``, KL(student || teacher), nats.
        weight: ``[n]``, at least 0.

    Returns:
        ``[4, n]`` bool, one true a column: Q1 both high, Q2 entropy alone, Q3 divergence alone,
        Q4 neither.

    Device: the input's; no host synchronisation.
    Cost: O(n log n).
    Source: TIP, arXiv 2604.14084, whose thresholds are not given; the medians are ours.

    Example:
        >>> cells = quadrants(torch.tensor([3.0, 4.0, 1.0, 2.0]), torch.arange(4.0), torch.ones(4))
        >>> cells.int().argmax(0)
        tensor([1, 1, 2, 2])
    """
    undecided, far = (
        column > weighted_quantiles(column, weight, (0.5,)) for column in (entropy, divergence)
    )
    return torch.stack([undecided & far, undecided & ~far, ~undecided & far, ~undecided & ~far])


def relative_position(values: Tensor, weight: Tensor, ceiling: float = 1.0) -> Tensor:
    """Where between the batch's least and greatest value does each value lie?

    ``(min(v, c) - min) / (c - min)`` with ``c`` the quantile ``ceiling`` of the values.

    Args:
        values: ``[n]``.
        weight: ``[n]``, at least 0; rows without weight decide nothing.
        ceiling: Level of the quantile that counts as the greatest value.

    Returns:
        ``[n]`` in 0..1, float32, where there is weight: 1 from the ceiling up, infinity included,
        and 0 everywhere where the values are equal.

    Device: the input's; no host synchronisation.
    Cost: O(n log n).
    Source: TIP, arXiv 2604.14084, Eq. 7.

    Example:
        >>> relative_position(torch.tensor([1.0, 2.0, 5.0]), torch.ones(3))
        tensor([0.0000, 0.2500, 1.0000])
    """
    low, high = weighted_quantiles(values, weight, (0.0, ceiling))
    position = ((values - low) / (high - low)).float().clamp(0.0, 1.0)
    position = torch.where(values >= high, 1.0, position)
    return torch.where(high > low, position, torch.where(high == low, 0.0, torch.nan))


def soft_or(entropy: Tensor, divergence: Tensor, weight: Tensor) -> Tensor:
    """Which tokens are worth learning from, by entropy or by divergence?

    ``s = h^ + d^ - h^ d^ = 1 - (1 - h^)(1 - d^)``, both scaled to 0..1 in the batch
    (`relative_position`), the entropy after a cut at its quantile 0.98.

    Args:
        entropy: ``[n]``, of the student, any unit.
        divergence: ``[n]``, KL(student || teacher), nats.
        weight: ``[n]``, at least 0.

    Returns:
        ``[n]`` in 0..1, float32: 0 where both are the batch's least, and at least the greater of
        the two.

    Device: the input's; no host synchronisation.
    Cost: O(n log n).
    Source: TIP, arXiv 2604.14084, Eq. 7; not in its released code.
    """
    undecided = relative_position(entropy, weight, ENTROPY_CEILING)
    far = relative_position(divergence, weight)
    return undecided + far - undecided * far


def overconfidence(entropy: Tensor, forward_kl: Tensor, weight: Tensor) -> Tensor:
    """Which tokens is the student sure of that the teacher would not have written?

    ``KL(teacher || student) (1 - h^)``, h^ as in `soft_or`.

    Args:
        entropy: ``[n]``, of the student, any unit.
        forward_kl: ``[n]``, KL(teacher || student), nats: the forward one only ranks tokens, the
            loss stays the reverse one.
        weight: ``[n]``, at least 0.

    Returns:
        ``[n]``, nats.

    Device: the input's; no host synchronisation.
    Cost: O(n log n).
    Source: TIP, arXiv 2604.14084, the score for Q3; not in its released code.
    """
    return forward_kl * (1 - relative_position(entropy, weight, ENTROPY_CEILING))


@diagnostic(
    reads="policy",
    every={"fast": 10, "balanced": 1, "full": 1},
    floor={"fast": 200, "balanced": 50, "full": 20},
    metrics=METRICS,
)
class DistillationQuadrants(Diagnostic):
    """Tokens by the student's entropy and its divergence from a teacher."""

    def measure(self, reading: PolicyReading, state: Any) -> tuple[list[Block], Any]:
        """Sort one step's tokens into quadrants; nothing where there is no teacher."""
        entropy, blocks = reading.tokens.entropy, []
        whole = torch.where(entropy.isnan(), 0.0, reading.tokens.weight)
        if reading.reverse_kl is not None:
            blocks += _reverse(entropy, reading.reverse_kl, whole)
        if reading.forward_kl is not None:
            weight = _where_known(reading.forward_kl, whole)
            score = weighted_mean(overconfidence(entropy, reading.forward_kl, weight), weight)
            blocks.append(
                Block.metrics(["distillation/overconfident/mean"], score[None], weight=weight.sum())
            )
        return blocks, state


def _where_known(values: Tensor, weight: Tensor) -> Tensor:
    return torch.where(values.isnan(), 0.0, weight)


def _reverse(entropy: Tensor, divergence: Tensor, weight: Tensor) -> list[Block]:
    weight = _where_known(divergence, weight)
    cells = quadrants(entropy, divergence, weight)
    shares = share_where(cells, weight)
    score = weighted_mean(soft_or(entropy, divergence, weight), weight)
    loss = torch.where(cells & (weight > 0), divergence * weight, 0.0).sum(
        1, dtype=wide_dtype(weight)
    )
    total = loss.sum()
    return [
        Block.metrics(
            [*(f"distillation/quadrant/{q}/share" for q in QUADRANTS), "distillation/soft_or/mean"],
            torch.cat([shares, score[None]]),
            weight=weight.sum(),
        ),
        Block.metrics(
            [f"distillation/quadrant/{q}/kl_share" for q in QUADRANTS],
            (loss / total).float(),
            weight=torch.where((total > 0) & total.isfinite(), weight.sum(), 0.0),
        ),
    ]
