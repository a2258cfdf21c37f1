"""How long are completions, how many were cut off, and how fast do they come?"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from entropylens.diagnostics._summaries import share_where, summarise, weighted_mean, wide_dtype
from entropylens.registry import Block, Diagnostic, Metric, RolloutReading, Scalars, diagnostic

__all__ = ["CompletionLength", "completion_lengths"]

LEVELS: Final = {"min": 0.0, "p50": 0.5, "p95": 0.95, "max": 1.0}
_EXTREMES: Final = {"min": "shortest", "max": "longest"}

_OWN = "all completions of this rank; weighted by their number"
_LONG = "long reasoning, rambling, or generation that does not find its end"
_SHORT = "terse, or generation that breaks off"
_TRL = "completions/* of TRL's GRPOTrainer"


def _metric(question: str, formula: str, **other: str) -> Metric:
    fixed = {
        "unit": "tokens",
        "estimator": _OWN,
        "high": _LONG,
        "low": _SHORT,
        "cost": "one pass over the completion mask and a sort of the lengths",
        "source": _TRL,
    }
    return Metric(question=question, formula=formula, **{**fixed, **other})


METRICS: Final[Mapping[str, Metric]] = {
    "completion/length/mean": _metric(
        "How long are completions?", "mean of l, l = tokens of a completion"
    ),
    "completion/length/std": _metric(
        "How much do completions differ in length?",
        "sqrt(mean (l - mean l)^2), population",
        high="short and very long completions side by side",
        low="all alike: often all at the limit",
    ),
    **{
        f"completion/length/{name}": _metric(
            f"How long is the {which} completion?", f"{name} of l", ranks=name
        )
        for name, which in _EXTREMES.items()
    },
    **{
        f"completion/length/{name}": _metric(
            f"Below which length do {level:.0%} of the completions lie?",
            f"quantile {level:g} of l, Hazen interpolation",
        )
        for name, level in LEVELS.items()
        if name not in _EXTREMES
    },
    "completion/truncated/share": _metric(
        "How many completions were cut off at the length limit?",
        "share of completions that reached the limit without an end",
        unit="1",
        high="the limit is too short, or completions do not end; unfinished text is rewarded",
        low="completions end by themselves",
    ),
    "completion/length/terminated/mean": _metric(
        "How long are the completions that ended by themselves?",
        "mean l over completions that were not cut off",
        estimator="completions of this rank that were not cut off; weighted by their number",
        source=f"{_TRL}, which writes 0 where none ended; here it is absent",
    ),
    "completion/tokens": _metric(
        "How many tokens were generated?",
        "sum of l",
        ranks="sum",
        high="a large or long-winded rollout",
        low="a small or terse rollout",
    ),
    "completion/length/correct/mean": _metric(
        "How long are the right completions?",
        "mean l over completions known to be right",
        estimator="completions of this rank known to be right; weighted by their number; absent "
        "where groups cross ranks",
        source="Length by correctness as in Dr. GRPO (2025), arXiv 2503.20783, Figure 5",
    ),
    "completion/length/wrong/mean": _metric(
        "How long are the wrong completions?",
        "mean l over completions known to be wrong",
        high="wrong answers are long: overthinking, or a loss that favours long wrong answers",
        low="wrong answers are given quickly",
        estimator="completions of this rank known to be wrong; weighted by their number; absent "
        "where groups cross ranks",
        source="Length by correctness as in Dr. GRPO (2025), arXiv 2503.20783, Figure 5",
    ),
    "rollout/seconds": _metric(
        "How long does generating and scoring take?",
        "wall time of the rollout",
        unit="s",
        ranks="max",
        estimator="the whole rollout; of several ranks the slowest",
        high="generation is the bottleneck: long completions or a slow scorer",
        low="generation is quick",
        cost="nothing: the trainer's clock",
        source="Wall time",
    ),
    "rollout/tokens_per_second": _metric(
        "How fast are completions generated and scored?",
        "completion tokens / wall time of generating and scoring",
        unit="tokens/s",
        ranks="sum",
        estimator="the whole rollout; ranks add up",
        high="an efficient rollout",
        low="long tails: many wait for the last completion, or for the scorer",
        source="Wall time",
    ),
}


def completion_lengths(mask: Tensor) -> Tensor:
    """How many tokens has each completion?

    Args:
        mask: ``[m, T]`` bool, true where a token belongs to the completion.

    Returns:
        ``[m]`` float32, tokens.

    Device: the input's; no host synchronisation.
    Cost: O(m T).

    Example:
        >>> completion_lengths(torch.tensor([[True, True, False], [False, False, False]]))
        tensor([2., 0.])
    """
    return mask.sum(-1).float()


@diagnostic(
    reads="rollout",
    every={"fast": 1, "balanced": 1, "full": 1},
    floor=50,
    metrics=METRICS,
)
class CompletionLength(Diagnostic):
    """Lengths of completions, by how they ended and whether they are right, and their pace."""

    def measure(self, reading: RolloutReading, state: Any) -> tuple[list[Block], Any]:
        """Summarise the lengths of one rollout."""
        blocks = []
        if reading.seconds is not None:
            blocks.append(Block.metrics(["rollout/seconds"], Scalars([reading.seconds])))
        if reading.mask is not None:
            lengths = completion_lengths(reading.mask)
            blocks += _length_blocks(reading, lengths)
            blocks.append(_token_block(reading, lengths))
        return blocks, state


def _length_blocks(reading: RolloutReading, lengths: Tensor) -> list[Block]:
    everything = torch.ones_like(lengths)
    summary = summarise(lengths, everything, tuple(LEVELS.values()))
    names = [f"completion/length/{name}" for name in ("mean", "std", *LEVELS)]
    blocks = [Block.metrics(names, summary, weight=everything.sum())]
    members = {}
    if reading.truncated is not None:
        share = share_where(reading.truncated, everything)[None]
        blocks.append(Block.metrics(["completion/truncated/share"], share, weight=everything.sum()))
        members["terminated"] = ~reading.truncated
    if reading.correct is not None and len(reading.correct) == len(lengths):
        members["correct"], members["wrong"] = reading.correct == 1, reading.correct == 0
    if members:
        weight = torch.stack(list(members.values())).float()
        blocks.append(
            Block.metrics(
                [f"completion/length/{name}/mean" for name in members],
                weighted_mean(lengths, weight),
                weight=weight.sum(-1),
            )
        )
    return blocks


def _token_block(reading: RolloutReading, lengths: Tensor) -> Block:
    total = lengths.sum(dtype=wide_dtype(lengths))
    values = {"completion/tokens": total}
    if reading.seconds:
        values["rollout/tokens_per_second"] = total / reading.seconds
    return Block.metrics(
        list(values), torch.stack(list(values.values())), weight=float(len(lengths))
    )
