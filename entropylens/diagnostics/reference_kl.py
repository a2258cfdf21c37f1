"""How far has the policy moved from the reference it is held to?"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from entropylens.diagnostics._summaries import weighted_mean, weighted_quantiles, wide_dtype
from entropylens.registry import Block, Diagnostic, Metric, PolicyReading, diagnostic

__all__ = ["ReferenceKL", "k3"]

_ESTIMATOR = (
    "one sampled token for each state, at the loss's own temperature; over scored tokens (mask), "
    "weighted by the tokens each row stands for; unbiased where the policy itself drew the tokens, "
    "so from the second update on one rollout it also holds what the importance ratio would undo"
)
_COST = "O(n) over the measured tokens' log-probabilities"
_SOURCE = "Schulman (2020), Approximating KL divergence, http://joschu.net/blog/kl-approx.html; "
_HIGH = "the policy has left the reference: much learnt, or reward hacking under a small KL weight"
_LOW = "the policy stays with the reference: early training, or a KL weight that holds it back"


def _metric(question: str, formula: str, **other: str) -> Metric:
    fixed = {
        "unit": "nats",
        "estimator": _ESTIMATOR,
        "high": _HIGH,
        "low": _LOW,
        "cost": _COST,
        "source": _SOURCE + "per-token term of Shao et al. (2024), arXiv 2402.03300, Eq. 4",
    }
    return Metric(question=question, formula=formula, **{**fixed, **other})


METRICS: Final[Mapping[str, Metric]] = {
    "kl/mean": _metric(
        "How far is the policy from the reference, per token?",
        "mean of k3 = exp(d) - 1 - d, d = log pi_ref(a) - log pi(a); estimates KL(policy || "
        "reference) and is never negative; the `kl` of TRL's GRPO without use_bias_correction_kl",
    ),
    "kl/k1/mean": _metric(
        "How far is the policy from the reference, by the plain log-ratio?",
        "mean of k1 = log pi(a) - log pi_ref(a); estimates KL(policy || reference), may be "
        "negative",
        low="below 0: tokens that the policy has come to think less likely than the reference "
        "does; a small sample, or tokens that another policy drew",
        source=_SOURCE + "TRL's RLOO logs the same of the policy at the time of generation",
    ),
    "kl/p95": _metric(
        "How far has the policy moved at the worst twentieth of the tokens?",
        "quantile 0.95 of k3 over tokens, Hazen interpolation",
        high="the change sits in many tokens",
        low="the change sits in fewer than one token in twenty, or there is none",
    ),
    "kl/max": _metric(
        "How far has the policy moved at the one worst token?",
        "max of k3 over the measured tokens",
        high="a token that the reference finds far likelier than the policy: k3 grows with "
        "pi_ref / pi there, and one such token can carry kl/mean",
        low="no outliers",
        ranks="max",
    ),
    "kl/sequence/mean": _metric(
        "How far is the policy from the reference over a whole completion?",
        "mean over sequences of the sum of k1 over the sequence's tokens; the KL penalty of "
        "RLOO's reward up to its weight",
        estimator=_ESTIMATOR + "; the sum over all measured tokens by weight, divided by the "
        "number of sequences that hold a scored token",
        low="below 0: as for kl/k1/mean",
        source=_SOURCE + "summed over tokens as in Ahmadian et al. (2024), arXiv 2402.14740",
    ),
}


def k3(log_ratio: Tensor) -> Tensor:
    """What does one sample say of the divergence between two distributions?

    ``k3 = exp(d) - 1 - d`` with ``d = log q(a) - log p(a)`` for an ``a`` drawn from ``p``. Its mean
    under ``p`` is ``KL(p || q)`` wherever ``q`` has no mass outside the support of ``p``; each
    value is at least 0, and its variance is far below that of ``-d`` while the two are close.

    Args:
        log_ratio: d, nats, any shape; infinite, and so is its value, where one of the two has no
            mass.

    Returns:
        Values of the same shape, nats, in float64 where the device has it: for small d the
        float32 difference would be rounding alone.

    Device: the input's; no host synchronisation.
    Cost: O(n).
    Source: Schulman (2020), http://joschu.net/blog/kl-approx.html.

    Example:
        >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
        >>> (p * k3((q / p).log())).sum(), (p * (p / q).log()).sum()
        (tensor(0.1438, dtype=torch.float64), tensor(0.1438))
    """
    log_ratio = log_ratio.to(wide_dtype(log_ratio))
    return torch.where(log_ratio == torch.inf, torch.inf, log_ratio.expm1() - log_ratio)


@diagnostic(
    reads="policy",
    every={"fast": 10, "balanced": 1, "full": 1},
    floor={"fast": 200, "balanced": 50, "full": 20},
    metrics=METRICS,
)
class ReferenceKL(Diagnostic):
    """Divergence of the policy from the reference policy, on the tokens of the step."""

    def measure(self, reading: PolicyReading, state: Any) -> tuple[list[Block], Any]:
        """Summarise the divergence of one step's tokens; nothing where there is no reference."""
        if reading.reference_logprob is None:
            return [], state
        tokens, weight = reading.tokens, reading.tokens.weight
        k1 = tokens.logprob.to(wide_dtype(weight)) - reading.reference_logprob
        divergence = k3(-k1)
        means = weighted_mean(torch.stack([divergence, k1]), weight)
        quantiles = weighted_quantiles(divergence, weight, (0.95, 1.0))
        sequences = (tokens.sequence_tokens > 0).sum().float()
        total = torch.where(weight > 0, k1 * weight, 0.0).sum()
        return [
            Block.metrics(
                ["kl/mean", "kl/k1/mean", "kl/p95", "kl/max"],
                torch.cat([means, quantiles]),
                weight=weight.sum(),
            ),
            Block.metrics(
                ["kl/sequence/mean"], (total / sequences).float()[None], weight=sequences
            ),
        ], state
