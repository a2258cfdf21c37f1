"""Which tokens carry the entropy: by advantage, by outcome, before and after the thinking ends?"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from entropylens.diagnostics._summaries import weighted_mean
from entropylens.diagnostics.length_entropy import sequence_entropy
from entropylens.registry import Block, Diagnostic, Metric, PolicyReading, TokenReading, diagnostic

__all__ = ["EntropySplit", "pear_penalty", "split_entropy"]

_TOKENS = (
    "exact entropy of each measured token at the loss's temperature; over scored tokens of that "
    "kind, all of them or a uniform sample of each micro-batch, weighted by the tokens each stands "
    "for; absent where there are none"
)
_SEQUENCES = (
    "over sequences with at least one thinking token, each counting once; only in steps where "
    "every scored token was measured, since a sample may miss a short answer; absent otherwise"
)
_PEAR = "PEAR (2025), arXiv 2510.08026"


def _metric(question: str, formula: str, high: str, low: str, **other: str) -> Metric:
    fixed = {"unit": "nats", "estimator": _TOKENS, "source": "Split of the mean token entropy"}
    fixed["cost"] = "O(tokens); no logits"
    return Metric(question=question, formula=formula, high=high, low=low, **{**fixed, **other})


METRICS: Final[Mapping[str, Metric]] = {
    "entropy/advantage/positive/mean": _metric(
        "How undecided is the policy where it is told to do more of the same?",
        "mean H over tokens with A > 0",
        "rewarded choices are still open: reinforcing them costs entropy",
        "it rewards what it was sure of: little is left to learn, and entropy falls slowly",
    ),
    "entropy/advantage/negative/mean": _metric(
        "How undecided is the policy where it is told to do less of the same?",
        "mean H over tokens with A < 0",
        "punished choices were open ones: exploration is what gets punished",
        "it was sure and wrong: pushing down a sure token raises entropy",
    ),
    "entropy/advantage/zero/mean": _metric(
        "How undecided is the policy where the step teaches it nothing?",
        "mean H over tokens with A = 0",
        "groups that are all right or all wrong in spite of open choices: too easy or too hard",
        "solved or given-up prompts on which the policy no longer varies",
    ),
    "entropy/outcome/correct/mean": _metric(
        "How undecided is the policy along right answers?",
        "mean H over tokens of sequences with correct = 1",
        "right answers are found by exploring",
        "right answers come without hesitation",
    ),
    "entropy/outcome/wrong/mean": _metric(
        "How undecided is the policy along wrong answers?",
        "mean H over tokens of sequences with correct = 0",
        "it hesitates where it fails: entropy tells right from wrong",
        "confidently wrong",
    ),
    "entropy/phase/thinking/mean": _metric(
        "How undecided is the policy while it thinks?",
        "mean H over tokens before the thinking delimiter; the delimiter is in neither phase",
        "explores while thinking",
        "thinks along fixed lines",
    ),
    "entropy/phase/answer/mean": _metric(
        "How undecided is the policy while it writes the answer?",
        "mean H over tokens after the thinking delimiter",
        "the thinking did not settle the answer",
        "the answer only writes down what the thinking decided",
    ),
    "entropy/phase/answer/missing/share": _metric(
        "How many completions think but never come to an answer?",
        "sequences without an answer token / sequences with a thinking token",
        "thinking runs into the length limit, or the delimiter is forgotten",
        "completions end their thinking",
        unit="1",
        estimator=_SEQUENCES,
        source="The case k = T of " + _PEAR,
    ),
    "entropy/phase/penalty": _metric(
        "How much would PEAR take off the reward of right answers for undecided thinking?",
        "mean over sequences with correct = 1 (all where correctness is not known) of max(0, "
        "H_think - H_ans), each the mean of its phase; H_ans = 0 where no answer token is",
        "thinking is far less decided than the answer; above 1 nat PEAR ranks a right answer "
        "below a wrong one (rewards 1 and 0)",
        "0: the answer is as undecided as the thinking, which PEAR does not tell from good",
        estimator=_SEQUENCES + ", and where no right answer is among them",
        source=_PEAR + ", alpha = 1, from two secondary notes that agree; the paper takes the old "
        "policy's entropies, we this step's",
    ),
}


def split_entropy(entropy: Tensor, weight: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor]:
    """How undecided is the model at each kind of token?

    ``sum_t w_t H_t / sum_t w_t`` over the tokens of a kind.

    Args:
        entropy: ``[n]``, nats; ignored where the weight is 0.
        weight: ``[n]``, scored tokens each stands for.
        kinds: ``[kinds, n]`` bool; a token may be of several kinds or of none.

    Returns:
        Means ``[kinds]``, float32, NaN for a kind without tokens, and the tokens behind each
        ``[kinds]``.

    Unit: nats.
    Device: the input's; no host synchronisation.
    Cost: O(kinds n).

    Example:
        >>> kinds = torch.tensor([[True, True, False], [False, False, True]])
        >>> split_entropy(torch.tensor([1.0, 3.0, 5.0]), torch.ones(3), kinds)
        (tensor([2., 5.]), tensor([2., 1.]))
    """
    weights = torch.where(kinds, weight, 0.0)
    return weighted_mean(entropy, weights), weights.sum(1)


def pear_penalty(thinking: Tensor, answer: Tensor, *, alpha: float = 1.0) -> Tensor:
    """How much more undecided is each completion's thinking than its answer?

    ``max(0, H_think - alpha H_ans)``, with ``H_ans = 0`` where there is no answer token, as the
    paper has it for a missing delimiter.

    As a reward, ``min(1, s - penalty)`` for right answers and ``r_fmt`` for wrong ones, it has no
    lower bound: a penalty above ``s - r_fmt`` (1 nat by the defaults) puts a right answer below a
    wrong one, which an unfinished completion with undecided thinking reaches easily. It is flat
    where ``H_ans >= H_think / alpha``, so that a policy may escape it by answering with more
    entropy, and the ``min`` never binds for ``s <= 1``.

    Args:
        thinking: ``[sequences]``, mean entropy of the tokens before the delimiter, nats.
        answer: ``[sequences]``, mean entropy of those after it; NaN where there are none.
        alpha: Weight of the answer.

    Returns:
        ``[sequences]``; NaN where ``thinking`` is.

    Unit: nats.
    Device: the input's; no host synchronisation.
    Cost: O(sequences).
    Source: PEAR (2025), arXiv 2510.08026; its code could not be read.

    Example:
        >>> pear_penalty(torch.tensor([1.0, 0.5]), torch.tensor([0.5, float("nan")]))
        tensor([0.5000, 0.5000])
    """
    return (thinking - alpha * torch.where(answer.isnan(), 0.0, answer)).clamp(min=0.0)


@diagnostic(
    reads="policy",
    every={"fast": 10, "balanced": 1, "full": 1},
    floor={"fast": 200, "balanced": 50, "full": 20},
    metrics=METRICS,
)
class EntropySplit(Diagnostic):
    """Mean token entropy by sign of the advantage, by outcome and by phase."""

    def measure(self, reading: PolicyReading, state: Any) -> tuple[list[Block], Any]:
        """Split the entropies of one step's tokens."""
        tokens, advantage = reading.tokens, reading.advantage
        kinds = {
            "advantage/positive": advantage > 0,
            "advantage/negative": advantage < 0,
            "advantage/zero": advantage == 0,
        }
        if reading.correct is not None:
            correct = reading.correct[torch.where(tokens.weight > 0, tokens.sequence, 0)]
            kinds |= {"outcome/correct": correct == 1, "outcome/wrong": correct == 0}
        if reading.thoughts is not None and reading.answers is not None:
            kinds |= {"phase/thinking": reading.thoughts, "phase/answer": reading.answers}
        means, weights = split_entropy(
            tokens.entropy, tokens.weight, torch.stack([*kinds.values()])
        )
        blocks = [Block.metrics([f"entropy/{kind}/mean" for kind in kinds], means, weight=weights)]
        if reading.thoughts is not None and reading.answers is not None:
            blocks.append(_phase_block(tokens, reading.thoughts, reading.answers, reading.correct))
        return blocks, state


def _phase_block(
    tokens: TokenReading, thoughts: Tensor, answers: Tensor, correct: Tensor | None
) -> Block:
    sequences = tokens.sequence_tokens.numel()
    (thinking, thought), (answer, answered) = (
        sequence_entropy(
            tokens.entropy, torch.where(phase, tokens.weight, 0.0), tokens.sequence, sequences
        )
        for phase in (thoughts, answers)
    )
    is_whole = (tokens.weight > 0).sum() == tokens.sequence_tokens.sum()
    thinks = (thought > 0) & is_whole
    right = thinks if correct is None else thinks & (correct == 1)
    counted = torch.stack([thinks, right])
    missing = torch.where(answered > 0, 0.0, 1.0)
    means = weighted_mean(torch.stack([missing, pear_penalty(thinking, answer)]), counted)
    return Block.metrics(
        ["entropy/phase/answer/missing/share", "entropy/phase/penalty"],
        means,
        weight=counted.sum(1),
    )
