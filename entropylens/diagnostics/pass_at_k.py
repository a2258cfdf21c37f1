"""Would more attempts at a prompt solve it, and do the attempts differ?"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from entropylens.diagnostics._summaries import weighted_mean, wide_dtype
from entropylens.registry import Block, Diagnostic, Metric, RolloutReading, diagnostic

__all__ = ["PassAtK", "answer_counts", "pass_at_k"]

_JUDGED = (
    "groups whose completions are all known to be right or wrong; weighted by their number; "
    "unbiased for completions drawn independently"
)
_ANSWERED = "all groups of at least two completions; weighted by their number"


def _metric(question: str, formula: str, high: str, low: str, **other: str) -> Metric:
    fixed = {
        "unit": "1",
        "estimator": _ANSWERED,
        "cost": "one sort of the answers within groups",
        "source": "Self-consistency (2023), arXiv 2203.11171, counts the same votes",
    }
    return Metric(question=question, formula=formula, high=high, low=low, **{**fixed, **other})


METRICS: Final[Mapping[str, Metric]] = {
    "pass_at/*": _metric(
        "With this many attempts at a prompt, how often is at least one right?",
        "mean over groups of 1 - C(G - c, k) / C(G, k), c right completions of G, k = the number "
        "in the name: 1, 2, 4, ... up to G",
        "the policy can solve the prompts; far above pass_at/1: it does not do so reliably yet",
        "out of reach; no more than pass_at/1: attempts are all alike, exploration is gone",
        estimator=_JUDGED,
        cost="O(completions)",
        source="Codex (2021), arXiv 2107.03374, Eq. 1",
    ),
    "answer/distinct/mean": _metric(
        "How many different answers does a prompt get?",
        "mean over groups of the number of distinct answers",
        "the policy explores, or guesses",
        "the policy has settled on one answer for each prompt",
        unit="answers",
    ),
    "answer/distinct/share": _metric(
        "What share of a prompt's completions are different answers?",
        "mean over groups of distinct answers / G",
        "near 1: every completion answers something else",
        "near 1 / G: all completions answer the same",
    ),
    "answer/majority/share": _metric(
        "How large is the majority behind a prompt's most frequent answer?",
        "mean over groups of max_a n_a / G, n_a completions with answer a; right or wrong",
        "completions agree",
        "votes are split",
    ),
    "answer/entropy/mean": _metric(
        "How evenly are a prompt's completions spread over answers?",
        "mean over groups of -sum_a (n_a / G) ln(n_a / G); at most ln G",
        "answers are spread",
        "one answer has nearly all votes",
        unit="nats",
        estimator=f"{_ANSWERED}; plug-in, hence biased low by about (answers - 1) / (2 G): compare "
        "only at equal G",
        source="Plug-in entropy; bias by Miller (1955)",
    ),
    "answer/correct_distinct/mean": _metric(
        "How many different right answers does a prompt get?",
        "mean over groups of the number of distinct answers among right completions, 0 where none "
        "is right",
        "several ways to be right are found",
        "one right answer or none",
        unit="answers",
        estimator="groups of at least two completions that are all known to be right or wrong; "
        "weighted by their number",
    ),
}


def pass_at_k(right: Tensor, completions: int, attempts: Sequence[int]) -> Tensor:
    """With k attempts at a prompt, how likely is at least one right?

    ``1 - C(n - c, k) / C(n, k) = 1 - prod_{i < k} (n - c - i) / (n - i)``: the chance that k of
    the n completions, drawn without replacement, hold one of the c right ones. Unbiased for
    ``1 - (1 - p)^k`` where completions are right independently with chance p.

    Args:
        right: ``[groups]``, c in 0..n.
        completions: n.
        attempts: Each k in 1..n.

    Returns:
        ``[len(attempts), groups]``, float32; exactly 0 where c = 0, exactly 1 where c > n - k.

    Device: the input's; no host synchronisation; products in float64 where it has it.
    Cost: O(groups * max k) time and memory.
    Source: Codex (2021), arXiv 2107.03374, Eq. 1.

    Example:
        >>> pass_at_k(torch.tensor([0, 1, 4]), 4, [1, 2])
        tensor([[0.0000, 0.2500, 1.0000],
                [0.0000, 0.5000, 1.0000]])
    """
    drawn = torch.arange(max(attempts), device=right.device)
    wrong = (completions - right.to(wide_dtype(right)))[:, None]
    all_wrong = ((wrong - drawn) / (completions - drawn)).cumprod(-1)
    return torch.stack([1 - all_wrong[:, k - 1] for k in attempts]).float()


def answer_counts(answer: Tensor, counted: Tensor) -> Tensor:
    """How many completions of each prompt give each of its answers?

    Args:
        answer: ``[groups, G]`` integers; equal in a group is the same answer.
        counted: ``[groups, G]`` bool, which completions are counted.

    Returns:
        ``[groups, G]`` float32: a count for each distinct answer of the group, in the order of
        the answers; 0 for those with no counted completion and in the places that are left.

    Device: the input's; no host synchronisation.
    Cost: O(groups * G log G) time, O(groups * G) memory: a sort within groups.

    Example:
        >>> answer_counts(torch.tensor([[7, 3, 7]]), torch.ones(1, 3, dtype=torch.bool))
        tensor([[1., 2., 0.]])
    """
    ordered, order = answer.sort(-1)
    place = pad(ordered[:, 1:] != ordered[:, :-1], (1, 0)).cumsum(-1)
    counts = torch.zeros_like(answer, dtype=torch.float32)
    return counts.scatter_add(-1, place, counted.gather(-1, order).float())


@diagnostic(
    reads="rollout",
    every={"fast": 1, "balanced": 1, "full": 1},
    floor=50,
    metrics=METRICS,
)
class PassAtK(Diagnostic):
    """Chance of a right answer in k attempts, and how the answers to a prompt differ."""

    def measure(self, reading: RolloutReading, state: Any) -> tuple[list[Block], Any]:
        """Compare the answers to each prompt of one rollout, where its groups are known."""
        size = reading.group_size
        if size is None:
            return [], state
        return _pass_block(reading, size) + _answer_block(reading, size), state


def _pass_block(reading: RolloutReading, size: int) -> list[Block]:
    if reading.correct is None:
        return []
    correct = reading.correct.view(-1, size)
    known = (~correct.isnan().any(-1)).float()
    attempts = [1 << power for power in range(size.bit_length())]
    chances = pass_at_k((correct == 1).sum(-1), size, attempts)
    names = [f"pass_at/{k}" for k in attempts]
    return [Block.metrics(names, weighted_mean(chances, known), weight=known.sum())]


def _answer_block(reading: RolloutReading, size: int) -> list[Block]:
    if reading.answer is None or size < 2:
        return []
    answer = reading.answer.view(-1, size)
    counts = answer_counts(answer, torch.ones_like(answer, dtype=torch.bool))
    distinct, votes = (counts > 0).sum(-1).float(), counts / size
    columns = {
        "distinct/mean": distinct,
        "distinct/share": distinct / size,
        "majority/share": votes.amax(-1),
        "entropy/mean": -torch.special.xlogy(votes, votes).sum(-1),
    }
    weights = [torch.ones_like(distinct)] * len(columns)
    if reading.correct is not None:
        correct = reading.correct.view(-1, size)
        right = answer_counts(answer, correct == 1)
        columns["correct_distinct/mean"] = (right > 0).sum(-1).float()
        weights.append((~correct.isnan().any(-1)).float())
    weight = torch.stack(weights)
    means = weighted_mean(torch.stack(list(columns.values())), weight)
    return [Block.metrics([f"answer/{name}" for name in columns], means, weight=weight.sum(-1))]
