"""How undecided is the model about its next token, and where?"""

from collections.abc import Mapping
from math import log
from typing import Any, Final

import torch
from torch import Tensor

from entropylens.diagnostics._summaries import constants, share_where, summarise, weighted_mean
from entropylens.registry import Block, Diagnostic, Metric, TokenReading, diagnostic

__all__ = ["TokenEntropy", "entropy_by_position", "entropy_spikes"]

LEVELS: Final = {"min": 0.0, "p05": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95}
LEVELS_MAX: Final = {**LEVELS, "max": 1.0}
POSITIONS: Final = (0, 16, 64, 256, 1024, 4096)
"""Lower bounds of the position buckets; each reaches to the next, the last to the end."""

WINDOW: Final = 25
DEVIATIONS: Final = 4.0
DEVIATION_FLOOR: Final = 0.5

_SOURCE = "Shannon (1948); token entropy as in Cui et al. (2025), arXiv 2505.22617, Eq. 5"
_ESTIMATOR = (
    "exact over the whole vocabulary for each measured token, at the loss's own temperature; over "
    "scored tokens (mask), all of them or a uniform sample of each micro-batch, weighted by the "
    "tokens each stands for"
)
_COST = "one pass over the logits of the measured tokens; nothing beyond token_statistics"
_HIGH = "undecided: early training, hard text, or a policy that is falling apart"
_LOW = "decided: memorised text, or a policy whose exploration has collapsed"


def _metric(question: str, formula: str, unit: str = "nats", **other: str) -> Metric:
    fixed = {"estimator": _ESTIMATOR, "high": _HIGH, "low": _LOW, "cost": _COST, "source": _SOURCE}
    return Metric(question=question, formula=formula, unit=unit, **{**fixed, **other})


METRICS: Final[Mapping[str, Metric]] = {
    "entropy/token/mean": _metric(
        "How undecided is the model about its next token, on average?",
        "mean over tokens of H = -sum_i p_i log p_i, p = softmax(z / T)",
    ),
    "entropy/token/std": _metric(
        "How much do tokens differ in how undecided the model is?",
        "sqrt(mean (H - mean H)^2), population",
        high="few forking tokens carry most of the entropy",
        low="all tokens are alike: near the start, or collapsed everywhere",
    ),
    **{
        f"entropy/token/{name}": _metric(
            f"Below which entropy do {level:.0%} of the tokens lie?",
            f"quantile {level:g} of H over tokens, Hazen interpolation",
            ranks={"min": "min", "max": "max"}.get(name, "mean"),
        )
        for name, level in LEVELS_MAX.items()
    },
    "entropy/token/count": _metric(
        "How many tokens were measured for this step's entropy?",
        "number of measured tokens",
        "tokens",
        high="a small standard error",
        low="a large standard error: sampled rows",
        ranks="sum",
    ),
    "entropy/normalised/mean": _metric(
        "How undecided is the model, as a share of what the vocabulary allows?",
        "mean H / ln V",
        "1",
    ),
    "entropy/position/*/mean": _metric(
        "How undecided is the model at this depth into the sequence?",
        "mean H over tokens whose position, counted among the scored tokens of their sequence, "
        "lies from the number in the name up to the next of 0, 16, 64, 256, 1024, 4096",
        high="at late positions: long context does not help, or generation drifts",
        low="at late positions: context helps, or the text repeats itself",
    ),
    "entropy/spike/share": _metric(
        "How many tokens surprise by being undecided against the tokens before them?",
        f"share of tokens with H_t > mean(W) + max({DEVIATIONS:g} sd(W), "
        f"{DEVIATIONS * DEVIATION_FLOOR:g}), W = the {WINDOW} tokens before, sd with ddof 1",
        "1",
        estimator="tokens with a full window of scored tokens before them, and only in steps where "
        "every token was measured; absent where rows were sampled",
        high="many forking points, or text that breaks off",
        low="an even course",
        source="Trigger of SRGen (2025), arXiv 2510.02919, with the standard deviation floored at "
        "0.5 nats as in its code; the code's minimal threshold of 1.8 never binds and is left out",
    ),
}


def entropy_by_position(entropy: Tensor, position: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """How undecided is the model at each depth into the sequence?

    The mean of the entropy over tokens in each bucket of `POSITIONS`.

    Args:
        entropy: ``[n]``, nats.
        position: ``[n]``, index among the scored tokens of the sequence.
        weight: ``[n]``, scored tokens each stands for.

    Returns:
        Means ``[6]``, NaN for an empty bucket, and the weight behind each ``[6]``.

    Unit: nats.
    Device: the input's; no host synchronisation.
    Cost: O(6 n).
    """
    bounds = constants(POSITIONS[1:], position.device, position.dtype)
    bucket = torch.bucketize(position, bounds, right=True)
    member = bucket[None, :] == torch.arange(len(POSITIONS), device=bucket.device)[:, None]
    weights = torch.where(member, weight, 0.0)
    return weighted_mean(entropy, weights), weights.sum(1)


def entropy_spikes(
    entropy: Tensor,
    present: Tensor,
    *,
    window: int = WINDOW,
    deviations: float = DEVIATIONS,
    deviation_floor: float = DEVIATION_FLOOR,
) -> tuple[Tensor, Tensor]:
    """Which tokens are far more undecided than the tokens just before them?

    ``H_t > mean(W_t) + deviations * max(sd(W_t), deviation_floor)`` with ``W_t`` the ``window``
    tokens before ``t``, ``t`` itself excluded, and ``sd`` with ddof 1.

    Args:
        entropy: ``[rows, columns]``, nats.
        present: ``[rows, columns]`` bool, which of them are scored tokens.
        window: Tokens before.
        deviations: Standard deviations above their mean.
        deviation_floor: Least standard deviation, nats.

    Returns:
        Two ``[rows, columns]`` bool tensors: spikes, and tokens that could be judged because all of
        their window is present.

    Device: the input's; no host synchronisation.
    Cost: O(window * rows * columns) time, O(window * rows * columns) memory.
    Source: SRGen (2025), arXiv 2510.02919.

    Example:
        >>> flat = torch.full((1, 30), 0.1)
        >>> flat[0, 27] = 2.2
        >>> spikes, judged = entropy_spikes(flat, torch.ones(1, 30, dtype=torch.bool))
        >>> spikes.nonzero().tolist(), int(judged.sum())
        ([[0, 27]], 5)
    """
    if entropy.shape[1] <= window:
        nothing = torch.zeros_like(present)
        return nothing, nothing
    before = entropy[:, :-1].unfold(1, window, 1)
    full = present[:, :-1].unfold(1, window, 1).all(-1) & present[:, window:]
    limit = before.mean(-1) + deviations * before.std(-1).clamp(min=deviation_floor)
    pad = (window, 0)
    judged = torch.nn.functional.pad(full, pad)
    return torch.nn.functional.pad(full & (entropy[:, window:] > limit), pad), judged


@diagnostic(
    reads="tokens",
    every={"fast": 50, "balanced": 10, "full": 1},
    floor={"fast": 1000, "balanced": 200, "full": 200},
    metrics=METRICS,
)
class TokenEntropy(Diagnostic):
    """Entropy of the next-token distribution: mean, quantiles, by position, spikes."""

    def measure(self, reading: TokenReading, state: Any) -> tuple[list[Block], Any]:
        """Summarise the entropies of one step's tokens."""
        entropy, weight = reading.entropy, reading.weight
        summary = summarise(entropy, weight, tuple(LEVELS_MAX.values()))
        count = reading.present.sum().float()
        values = torch.cat([summary, count[None]])
        names = [f"entropy/token/{name}" for name in ("mean", "std", *LEVELS_MAX)]
        means, weights = entropy_by_position(entropy, reading.position, weight)
        blocks = [
            Block.metrics(
                [*names, "entropy/token/count"],
                values,
                weight=weight.sum(),
            ),
            Block.metrics(
                [f"entropy/position/{bound}/mean" for bound in POSITIONS],
                means,
                weight=weights,
            ),
        ]
        if reading.vocabulary > 1:
            normalised = summary[:1] / log(reading.vocabulary)
            blocks.append(
                Block.metrics(["entropy/normalised/mean"], normalised, weight=weight.sum())
            )
        return blocks + _spike_block(reading), state


def _spike_block(reading: TokenReading) -> list[Block]:
    if reading.grids is None:
        return []
    spikes, judged, start = [], [], 0
    for rows, columns in reading.grids:
        tokens = slice(start, start + rows * columns)
        start = tokens.stop
        found = entropy_spikes(
            reading.entropy[tokens].view(rows, columns), reading.present[tokens].view(rows, columns)
        )
        spikes.append(found[0].flatten())
        judged.append(found[1].flatten())
    weight = torch.cat(judged).float()
    share = share_where(torch.cat(spikes), weight)
    return [Block.metrics(["entropy/spike/share"], share[None], weight=weight.sum())]
