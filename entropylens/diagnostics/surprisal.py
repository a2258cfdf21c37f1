"""How surprised is the model by the tokens it is scored on, and is that what it expected?"""

from collections.abc import Mapping
from typing import Any, Final

import torch

from entropylens.diagnostics._summaries import summarise, weighted_mean
from entropylens.registry import Block, Diagnostic, Metric, TokenReading, diagnostic

__all__ = ["Surprisal"]

_ESTIMATOR = (
    "exact for each measured token, at the loss's own temperature; over scored tokens (mask), all "
    "of them or a uniform sample of each micro-batch, weighted by the tokens each stands for"
)
_COST = "one pass over the logits of the measured tokens; nothing beyond token_statistics"
_SOURCE = "Shannon (1948)"


def _metric(question: str, formula: str, high: str, low: str, **other: str) -> Metric:
    fixed = {"unit": "nats", "estimator": _ESTIMATOR, "cost": _COST, "source": _SOURCE}
    return Metric(question=question, formula=formula, high=high, low=low, **{**fixed, **other})


_RARE = "tokens the model thought impossible: bad data, or a loss spike with its cause"
METRICS: Final[Mapping[str, Metric]] = {
    "surprisal/token/mean": _metric(
        "How surprised is the model by the tokens it is scored on?",
        "mean of -log p(target); equals the cross-entropy when every scored token is measured",
        "the model does not predict this text",
        "the model predicts this text",
    ),
    "surprisal/token/std": _metric(
        "How much do tokens differ in surprise?",
        "sqrt(mean (s - mean s)^2), s = -log p(target), population",
        "a few tokens carry most of the loss",
        "all tokens are alike",
    ),
    "surprisal/token/p50": _metric(
        "How surprising is the middle token?",
        "median of -log p(target)",
        "most tokens are unpredicted",
        "most tokens are predicted",
    ),
    "surprisal/token/p95": _metric(
        "How surprising are the worst twentieth of the tokens?",
        "quantile 0.95 of -log p(target), Hazen interpolation",
        _RARE,
        "no outliers",
    ),
    "surprisal/token/max": _metric(
        "How surprising is the worst measured token?",
        "max of -log p(target) over the measured tokens",
        _RARE,
        "no outliers",
        ranks="max",
    ),
    "surprisal_gap/mean": _metric(
        "Is the model as surprised as it expects to be?",
        "mean of Y = -log p(target) - H",
        "the text is less likely than the model believes: overconfident, or off its own policy",
        "the text is more likely than the model believes: underconfident, or sampled greedily",
        source="Y of the zero-shot tests, arXiv 2501.02406, as implemented in their notebook; "
        "a martingale difference of mean 0 where the model itself sampled the tokens",
    ),
    "surprisal_gap/std": _metric(
        "How widely does surprise scatter around what the model expected?",
        "sqrt(mean (Y - mean Y)^2), population; its square should equal varentropy/token/mean on "
        "text that the model sampled itself",
        "heavy tails: the model errs by much where it errs",
        "an even scatter",
    ),
    "varentropy/token/mean": _metric(
        "How widely does the model itself expect its surprise to scatter?",
        "mean of V = sum_i p_i (log p_i + H)^2",
        "forking points: a few likely continuations and a long tail",
        "either certain or uniform",
        unit="nats^2",
        source="Variance of the information content",
    ),
    "probability/max/mean": _metric(
        "How much does the model put on its first choice?",
        "mean of max_i p_i",
        "decided",
        "undecided",
        unit="1",
    ),
}


@diagnostic(
    reads="tokens",
    every={"fast": 50, "balanced": 10, "full": 1},
    floor={"fast": 1000, "balanced": 200, "full": 200},
    metrics=METRICS,
)
class Surprisal(Diagnostic):
    """Surprisal of the targets, its gap to the entropy, and the scatter the model expects."""

    def measure(self, reading: TokenReading, state: Any) -> tuple[list[Block], Any]:
        """Summarise the surprisals of one step's tokens."""
        weight = reading.weight
        surprisal = summarise(-reading.logprob, weight, (0.5, 0.95, 1.0))
        gap = summarise(-reading.logprob - reading.entropy, weight, ())
        names = [f"surprisal/token/{name}" for name in ("mean", "std", "p50", "p95", "max")]
        names += ["surprisal_gap/mean", "surprisal_gap/std"]
        blocks = [Block.metrics(names, torch.cat([surprisal, gap]), weight=weight.sum())]
        known = {
            "varentropy/token/mean": reading.varentropy,
            "probability/max/mean": reading.max_probability,
        }
        columns = {name: column for name, column in known.items() if column is not None}
        if columns:
            whole = weight if reading.distribution_weight is None else reading.distribution_weight
            means = weighted_mean(torch.stack(list(columns.values())), whole)
            blocks.append(Block.metrics(list(columns), means, weight=whole.sum()))
        return blocks, state
