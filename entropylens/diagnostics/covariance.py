"""Do advantages fall on likely or on unlikely tokens, and is that so within a state or between?"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from entropylens.diagnostics._summaries import summarise, weighted_mean
from entropylens.diagnostics.entropy_discriminator import discriminator
from entropylens.registry import Block, Diagnostic, Metric, PolicyReading, diagnostic

__all__ = ["Covariance", "natural_gradient_term", "policy_gradient_term", "token_covariance"]

_TOKENS = (
    "over scored tokens (mask), all of them or a uniform sample of each micro-batch, weighted by "
    "the tokens each stands for"
)
_AS_DRAWN = (
    "tokens as they were drawn, without importance ratios: the policy's own covariance on-policy, "
    "and that under the sampler's tokens elsewhere"
)
_CENTRED = f"population covariance {_TOKENS}, centred by the means of each rank's own tokens"
_SINGLE = f"mean {_TOKENS}; needs no batch mean; {_AS_DRAWN}"
_COST = "O(tokens), on top of token_statistics"
_CUI = "Cui et al. (2025), arXiv 2505.22617"


def _metric(question: str, formula: str, **other: str) -> Metric:
    return Metric(question=question, formula=formula, **{"unit": "nats", "cost": _COST, **other})


METRICS: Final[Mapping[str, Metric]] = {
    "covariance/total/mean": _metric(
        "Do high advantages go with likely tokens, over the whole batch?",
        "mean of (log p - mean log p)(A - mean A); total - within - between = "
        "-mean(log p + H) mean(A), which on-policy vanishes with the number of sequences",
        estimator=_CENTRED,
        high="likely tokens are rewarded: read as falling entropy, though part of it may be that "
        "easy states have high advantages, which is no such force: see within and between",
        low="below 0, unlikely tokens are rewarded, or undecided states have high advantages",
        source=f"{_CUI}, mean of Eq. 10. Its Theorem 2 is about the covariance within a state, "
        "which this is not: the sum of within and between",
    ),
    "covariance/within/mean": _metric(
        "Do high advantages go with the likely tokens of the same state?",
        "mean of (log p + H) A; under p its expectation in a state is Cov_p(log p, A), whatever "
        "constant of the state is in A",
        estimator=f"unbiased from one token a state; {_SINGLE}",
        high="the natural-gradient step lowers the entropy, dH = -eta times this",
        low="below 0 the step raises the entropy",
        source=f"{_CUI}, Theorem 2, in the form E_p[(log p + H) A]: E_p[log p] = -H is known "
        "exactly and need not be estimated from the batch",
    ),
    "covariance/within/std": _metric(
        "How widely do tokens scatter around the covariance within states?",
        "sqrt(mean (c - mean c)^2), c = (log p + H) A, population",
        estimator=f"scatter {_TOKENS}; over the square root of the tokens it is about the standard "
        "error of covariance/within/mean",
        high="few tokens decide where the entropy goes: the mean is noisy",
        low="an even push, or hardly any advantages",
        source="Standard deviation of the single-token estimate",
    ),
    "covariance/between/mean": _metric(
        "Do high advantages go with states that are already decided?",
        "mean of (-H - mean(-H))(A - mean A); in expectation Cov_s(-H(s), E[A|s])",
        estimator=f"{_CENTRED}; one token's A stands for E[A|s], which leaves it unbiased",
        high="decided states belong to good completions; by itself no force on the entropy",
        low="below 0, undecided states belong to good completions",
        source=f"Law of total covariance, applied to Eq. 10 of {_CUI}",
    ),
    "covariance/policy_gradient/mean": _metric(
        "Does the plain policy gradient lower the entropy of the states it passes?",
        "mean of S A, S = p (log p + H); under p its expectation in a state is Cov_p(log p, p A)",
        estimator="unbiased from one token a state for Cov_p(log p, p A), which is -dH / eta where "
        "E_p[A] = 0 there, and too large by E_p[A] E_p[S] elsewhere "
        f"(entropy/change/estimate/discriminator is not); {_SINGLE}",
        high="the gradient step lowers the entropy, dH = -eta times this where E_p[A] = 0",
        low="below 0 the step raises the entropy where E_p[A] = 0",
        source=f"{_CUI}, Theorem 1",
    ),
}


def natural_gradient_term(logprob: Tensor, entropy: Tensor, advantage: Tensor) -> Tensor:
    """Which way would a natural-gradient step move the entropy, judged by one sampled token?

    ``c = (log p_a + H) A_a``. With ``a ~ p``, ``E[c] = Cov_p(log p, A)`` because
    ``E_p[log p] = -H``, and a constant of the state added to A drops out: unbiased from a single
    sample, for any state-dependent baseline. Its negative, times the step size, is the entropy
    change of the natural policy gradient, whose logit step is ``dz_i = eta A_i``.

    Args:
        logprob: ``[...]`` log p of the sampled token, nats.
        entropy: ``[...]`` H of its state, nats.
        advantage: ``[...]`` A.

    Returns:
        ``[...]``; what stands where an input is NaN is NaN.

    Unit: nats, times the unit of A.
    Device: the inputs'; no host synchronisation.
    Cost: O(n).
    Source: Cui et al. (2025), arXiv 2505.22617, Theorem 2.

    Example:
        >>> p = torch.tensor([0.5, 0.25, 0.25])
        >>> entropy = -(p * p.log()).sum()
        >>> terms = natural_gradient_term(p.log(), entropy, torch.tensor([1.0, 0.0, 0.0]))
        >>> round(float((p * terms).sum()), 4)
        0.1733
    """
    return (logprob + entropy) * advantage


def policy_gradient_term(logprob: Tensor, entropy: Tensor, advantage: Tensor) -> Tensor:
    """Which way does a plain policy-gradient step move the entropy, judged by one sampled token?

    ``S_a A_a`` with ``S_a = p_a (log p_a + H)``. With ``a ~ p`` its expectation is
    ``Cov_p(log p, p A)``, and the entropy change of the expected step ``dz_i = eta p_i A_i`` is
    ``-eta`` times that where ``E_p[A] = 0``. A baseline b left in A adds ``b E_p[S]``.

    Args:
        logprob: ``[...]`` log p of the sampled token, nats; -inf gives 0.
        entropy: ``[...]`` H of its state, nats.
        advantage: ``[...]`` A.

    Returns:
        ``[...]``; what stands where an input is NaN is NaN.

    Unit: nats, times the unit of A.
    Device: the inputs'; no host synchronisation.
    Cost: O(n).
    Source: Cui et al. (2025), arXiv 2505.22617, Theorem 1.
    """
    return discriminator(logprob, entropy) * advantage


def token_covariance(logprob: Tensor, advantage: Tensor, weight: Tensor) -> Tensor:
    """What does each token add to the batch's covariance of log-probability and advantage?

    ``(log p - mean log p)(A - mean A)``, means weighted over the tokens given; their own weighted
    mean is the population covariance.

    Args:
        logprob: ``[n]`` log p of the sampled token, nats.
        advantage: ``[n]`` A.
        weight: ``[n]`` scored tokens that each row stands for; rows with 0 enter no mean.

    Returns:
        ``[n]``; what stands in rows of weight 0 means nothing.

    Unit: nats, times the unit of A.
    Device: the inputs'; no host synchronisation.
    Cost: O(n).
    Source: Cui et al. (2025), arXiv 2505.22617, Eq. 10.

    Example:
        >>> token_covariance(torch.tensor([-1.0, -3.0]), torch.tensor([2.0, 0.0]), torch.ones(2))
        tensor([1., 1.])
    """
    return (logprob - weighted_mean(logprob, weight)) * (
        advantage - weighted_mean(advantage, weight)
    )


@diagnostic(
    reads="policy",
    every={"fast": 10, "balanced": 1, "full": 1},
    floor={"fast": 200, "balanced": 50, "full": 20},
    metrics=METRICS,
)
class Covariance(Diagnostic):
    """Covariance of log-probability and advantage: total, within states, between states."""

    def measure(self, reading: PolicyReading, state: Any) -> tuple[list[Block], Any]:
        """Split the covariance of one step's tokens."""
        tokens, advantage = reading.tokens, reading.advantage
        logprob, entropy, weight = tokens.logprob, tokens.entropy, tokens.weight
        means = weighted_mean(
            torch.stack(
                [
                    token_covariance(logprob, advantage, weight),
                    token_covariance(-entropy, advantage, weight),
                    policy_gradient_term(logprob, entropy, advantage),
                ]
            ),
            weight,
        )
        within = summarise(natural_gradient_term(logprob, entropy, advantage), weight, ())
        names = [f"covariance/{name}/mean" for name in ("total", "between", "policy_gradient")]
        names += ["covariance/within/mean", "covariance/within/std"]
        return [Block.metrics(names, torch.cat([means, within]), weight=weight.sum())], state
