"""Which tokens lower the entropy when the policy learns from them, and which raise it?"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from entropylens.diagnostics._cells import CELLS
from entropylens.diagnostics._policy import distribution_weight, pull
from entropylens.diagnostics._summaries import share_where, summarise, weighted_mean
from entropylens.registry import Block, Diagnostic, Metric, PolicyReading, diagnostic

__all__ = ["EntropyDiscriminator", "discriminator", "entropy_change_term", "sign_cells"]

_TOKENS = (
    "over scored tokens (mask), all of them or a uniform sample of each micro-batch, weighted by "
    "the tokens each stands for"
)
_WHOLE = (
    "mean over the scored tokens whose whole distribution was looked at, weighted by the tokens "
    "each stands for; absent where none was"
)
_COST = "O(tokens), on top of token_statistics"
_SOURCE = "Wang et al. (2026), arXiv 2602.03392, Theorems 3.2 and 3.3; derived anew here"


def _metric(question: str, formula: str, **other: str) -> Metric:
    fixed = {"unit": "nats", "estimator": _WHOLE, "cost": _COST, "source": _SOURCE}
    return Metric(question=question, formula=formula, **{**fixed, **other})


METRICS: Final[Mapping[str, Metric]] = {
    "discriminator/mean": _metric(
        "How much would the entropy fall if each sampled token's logit alone rose?",
        "mean of S = p (log p + H); -dH/dz of the sampled token, exact",
        estimator=f"mean {_TOKENS}",
        high="sampled tokens are likely ones in undecided states: rewarding them collapses",
        low="tokens are certain already, or very rare; never below -exp(-1 - H)",
    ),
    "discriminator/std": _metric(
        "How much do tokens differ in what their logit does to the entropy?",
        "sqrt(mean (S - mean S)^2), population",
        estimator=f"standard deviation {_TOKENS}; the sigma of the paper's batch-normalised rule",
        high="a few forking tokens decide where the entropy goes",
        low="all tokens are alike: collapsed everywhere",
    ),
    "discriminator/expected/mean": _metric(
        "How much would the entropy fall if the policy pushed its own draws up?",
        "mean of N = E_p[S] = H sum_i p_i^2 + sum_i p_i^2 log p_i = Cov_p(p, log p), never below 0",
        high="likely tokens in undecided states",
        low="decided states, or flat ones with thousands of options",
    ),
    "discriminator/excess/mean": _metric(
        "Do the sampled tokens sit above or below what the policy expects of its draws?",
        "mean of S - N, whose expectation on-policy is 0",
        high="more likely tokens than the policy draws: greedy or truncated sampling",
        low="fewer likely tokens than the policy draws: a hotter sampler, or stale weights",
    ),
    "discriminator/excess/std": _metric(
        "How strongly can advantages steer the entropy, token by token?",
        "sqrt(mean (d - mean d)^2), d = S - N, population",
        estimator="standard deviation over the scored tokens whose whole distribution was looked "
        "at, weighted by the tokens each stands for; absent where none was",
        high="what is rewarded matters for the entropy",
        low="nothing left to steer: decided or flat everywhere",
    ),
    "entropy/change/estimate/discriminator": _metric(
        "What will this step do to the entropy of the tokens it learns from?",
        "-mean of r A I_clip (S - N): predicted dH per unit logit step, exact to first order for "
        "one sampled token's step in a tabular softmax",
        unit="nats per unit logit step",
        estimator=f"{_WHOLE}. Known up to one slope, the step size in logits, if the loss averages "
        "over tokens and has neither KL penalty nor entropy bonus; one that weighs tokens "
        'otherwise (TRL\'s loss_type "grpo": by 1 / length) sums these terms otherwise, where '
        "even the sign may differ. Says nothing of parameters shared between states, nor of other "
        "states being visited",
        high="the step raises the entropy",
        low="below 0 the step lowers the entropy",
    ),
    **{
        f"discriminator/cell/{cell}/share": _metric(
            f"Which share of tokens has {where}?",
            f"share of tokens with {where}",
            unit="1",
            estimator=f"{_WHOLE}; tokens with A = 0 or S = N are in no cell; in states that are "
            "certain to about 1e-6 the sign of S - N is rounding",
            high=f"much of the batch: learning from these {effect} the entropy of their state",
            low="few tokens are of this kind",
        )
        for cell, (where, effect) in CELLS.items()
    },
    **{
        f"discriminator/cell/{cell}/change": _metric(
            f"What do tokens with {where} do to the entropy?",
            f"-mean over all tokens of r A I_clip (S - N), taken as 0 unless {where}; the four "
            "cells add up to entropy/change/estimate/discriminator",
            unit="nats per unit logit step",
            high="a strong push up" if effect == "raises" else "0: no push, it cannot be above",
            low="0: no push, it cannot be below" if effect == "raises" else "a strong push down",
        )
        for cell, (where, effect) in CELLS.items()
    },
}


def discriminator(logprob: Tensor, entropy: Tensor) -> Tensor:
    """How much does the entropy fall when this token's logit alone rises?

    ``S = p (log p + H) = -dH/dz``, exactly. Over a distribution the S add up to 0, and
    ``S >= -exp(-1 - H)``. S goes to 0 where p goes to 0 or to 1.

    Args:
        logprob: ``[...]`` log p of a token, nats; -inf gives 0.
        entropy: ``[...]`` H of its distribution, nats.

    Returns:
        ``[...]``; NaN where an input is.

    Unit: nats.
    Device: the inputs'; no host synchronisation.
    Cost: O(n).
    Source: arXiv 2602.03392, Theorem 3.2.

    Example:
        >>> p = torch.tensor([0.5, 0.25, 0.25])
        >>> discriminator(p.log(), -(p * p.log()).sum())
        tensor([ 0.1733, -0.0866, -0.0866])
    """
    return torch.where(logprob == -torch.inf, 0.0, logprob.exp() * (logprob + entropy))


def entropy_change_term(
    logprob: Tensor, entropy: Tensor, expected_discriminator: Tensor, pull: Tensor
) -> Tensor:
    """By how much does learning from this sampled token lower the entropy of its state?

    ``r A I_clip (S_a - N)``. The policy-gradient step from one sampled token moves the logits by
    ``dz = alpha (e_a - p)``, ``alpha = eta r A I_clip``, so that
    ``dH = -alpha (S_a - N) + O(alpha^2)``: the predicted change is ``-eta`` times this.

    Args:
        logprob: ``[...]`` log p of the sampled token, nats.
        entropy: ``[...]`` H, nats.
        expected_discriminator: ``[...]`` N = E_p[S], nats.
        pull: ``[...]`` r A I_clip.

    Returns:
        ``[...]``; NaN where an input is.

    Unit: nats per unit logit step.
    Device: the inputs'; no host synchronisation.
    Cost: O(n).
    Source: arXiv 2602.03392, Theorem 3.3.
    """
    return pull * (discriminator(logprob, entropy) - expected_discriminator)


def sign_cells(advantage: Tensor, excess: Tensor) -> Tensor:
    """Which of the four pairs of signs does each token have?

    Args:
        advantage: ``[n]`` A.
        excess: ``[n]`` S_a - N.

    Returns:
        ``[4, n]`` bool in the order of `CELLS`: A above 0 with the excess above and below 0, then A
        below 0 with the same. Where either is 0 or NaN the token is in none.

    Device: the inputs'; no host synchronisation.
    Cost: O(n).
    Source: sign table of arXiv 2602.03392, Section 3.

    Example:
        >>> sign_cells(torch.tensor([1.0, -1.0, 0.0]), torch.tensor([0.2, 0.2, 0.2])).int().tolist()
        [[1, 0, 0], [0, 0, 0], [0, 1, 0], [0, 0, 0]]
    """
    return torch.stack(
        [
            (advantage > 0) & (excess > 0),
            (advantage > 0) & (excess < 0),
            (advantage < 0) & (excess > 0),
            (advantage < 0) & (excess < 0),
        ]
    )


@diagnostic(
    reads="policy",
    every={"fast": 10, "balanced": 1, "full": 1},
    floor={"fast": 200, "balanced": 50, "full": 20},
    metrics=METRICS,
)
class EntropyDiscriminator(Diagnostic):
    """The entropy discriminator of sampled tokens, and the entropy change it forecasts."""

    def measure(self, reading: PolicyReading, state: Any) -> tuple[list[Block], Any]:
        """Forecast the entropy change of one step's tokens."""
        tokens = reading.tokens
        sampled = discriminator(tokens.logprob, tokens.entropy)
        names = ["discriminator/mean", "discriminator/std"]
        own = summarise(sampled, tokens.weight, ())
        blocks = [Block.metrics(names, own, weight=tokens.weight.sum())]
        expected = tokens.expected_discriminator
        if expected is None:
            return blocks, state
        weight = distribution_weight(reading)
        excess = sampled - expected
        change = -entropy_change_term(tokens.logprob, tokens.entropy, expected, pull(reading))
        cells = sign_cells(reading.advantage, excess)
        values = torch.cat(
            [
                weighted_mean(torch.stack([expected, change]), weight),
                summarise(excess, weight, ()),
                share_where(cells, weight),
                weighted_mean(torch.where(cells, change, 0.0), weight),
            ]
        )
        names = ["discriminator/expected/mean", "entropy/change/estimate/discriminator"]
        names += ["discriminator/excess/mean", "discriminator/excess/std"]
        names += [f"discriminator/cell/{cell}/{of}" for of in ("share", "change") for cell in CELLS]
        if not reading.is_pull_known:
            kept = [n for n in names if not n.endswith(("estimate/discriminator", "/change"))]
            values = values[[names.index(name) for name in kept]]
            names = kept
        return [*blocks, Block.metrics(names, values, weight=weight.sum())], state
