"""What would STEER's estimate say that this step does to the entropy?"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from entropylens.diagnostics._policy import pull
from entropylens.diagnostics._summaries import weighted_mean
from entropylens.diagnostics.entropy_discriminator import discriminator
from entropylens.registry import Block, Diagnostic, Metric, PolicyReading, diagnostic

__all__ = ["Steer", "steer_released_term", "steer_term"]

_FIXED: Final = {
    "unit": "nats per unit logit step",
    "high": "the step raises the entropy, as far as the estimate goes",
    "low": "below 0 the step lowers the entropy, as far as the estimate goes",
    "cost": "O(tokens), on top of token_statistics",
}
_TOKENS = (
    "mean over scored tokens (mask), all of them or a uniform sample of each micro-batch, weighted "
    "by the tokens each stands for. Known up to one slope, the step size in logits, if the loss "
    'averages over tokens and has neither KL penalty nor entropy bonus (TRL\'s loss_type "grpo" '
    "weighs tokens by 1 / length)"
)
METRICS: Final[Mapping[str, Metric]] = {
    "entropy/change/estimate/steer": Metric(
        question="What will this step do to the entropy, by STEER's theorem?",
        formula="-mean of r A I_clip (1 - p) S, S = p (log p + H)",
        estimator=f"{_TOKENS}. Only the sampled logit is taken to move: right where the sampled "
        "token is likely and the rest is spread, half the change between two tokens, thousands of "
        "times too small where the sampled token is rare",
        source="STEER, arXiv 2510.10150, Theorem 1, without eta / L; the theorem as restated by a "
        "third party, its body was not at hand",
        **_FIXED,
    ),
    "entropy/change/estimate/steer_released": Metric(
        question="What will this step do to the entropy, by the code that STEER released?",
        formula="-mean of (A / clip(p_old, 1e-8, 1)) x (1 - x)(log x + H), "
        "x = clip(p, 1e-8, 1 - 1e-8)",
        estimator=f"{_TOKENS}. The code takes the absolute value; the sign is kept here. It lacks "
        "one factor p and I_clip against the theorem, so that rare tokens weigh too much",
        source="STEER's repository, verl/trainer/ppo/core_algos.py:609-635 of 2026-01-15",
        **_FIXED,
    ),
}


def steer_term(logprob: Tensor, entropy: Tensor, pull: Tensor) -> Tensor:
    """What does learning from this sampled token do to the entropy, if only its logit moves?

    ``-r A I_clip (1 - p)(p (log p + H)) = -r A I_clip (1 - p) S``: Omega of the paper without
    ``eta / L``. The step itself moves every logit, ``dz = alpha (e_a - p)``; what is missing is
    ``alpha sum_{b != a} p_b S_b``. That is small where ``p_a`` is large and the rest is spread over
    many tokens, exactly half the change where there are two tokens, and almost all of it where the
    sampled token is rare.

    Args:
        logprob: ``[...]`` log p of the sampled token, nats; -inf gives 0.
        entropy: ``[...]`` H, nats.
        pull: ``[...]`` r A I_clip.

    Returns:
        ``[...]`` predicted entropy change; NaN where an input is.

    Unit: nats per unit logit step.
    Device: the inputs'; no host synchronisation.
    Cost: O(n).
    Source: STEER, arXiv 2510.10150, Theorem 1.

    Example:
        >>> steer_term(torch.tensor(0.5).log(), torch.tensor(2.0).log(), torch.tensor(1.0)).abs()
        tensor(0.)
    """
    return pull * torch.expm1(logprob) * discriminator(logprob, entropy)


def steer_released_term(
    logprob: Tensor, entropy: Tensor, advantage: Tensor, old_logprob: Tensor
) -> Tensor:
    """What does STEER's released code make of this sampled token, sign kept?

    ``-(A / clip(pi_old, 1e-8, 1)) x (1 - x)(log x + H)`` with ``x = clip(p, 1e-8, 1 - 1e-8)``.
    The code is wrong against its own theorem: the coefficient is ``A / pi_old`` where
    ``r A = A pi / pi_old`` is due, one factor pi short, and clipped tokens count. It takes the
    absolute value and sets what is not finite to 0; here the sign stays and NaN stays NaN. In
    float32 ``1 - 1e-8`` is 1, there as here.

    Args:
        logprob: ``[...]`` log p of the sampled token, nats.
        entropy: ``[...]`` H, nats.
        advantage: ``[...]`` A.
        old_logprob: ``[...]`` log-probability under the policy that the ratio is taken against.

    Returns:
        ``[...]`` predicted entropy change; NaN where an input is.

    Unit: nats per unit logit step.
    Device: the inputs'; no host synchronisation.
    Cost: O(n).
    Source: STEER's repository, verl/trainer/ppo/core_algos.py:609-635 of 2026-01-15.
    """
    probability = logprob.exp().clamp(1e-8, 1 - 1e-8)
    coefficient = advantage / old_logprob.exp().clamp(1e-8, 1)
    return -coefficient * probability * (1 - probability) * (probability.log() + entropy)


@diagnostic(
    reads="policy",
    every={"fast": 10, "balanced": 1, "full": 1},
    floor={"fast": 200, "balanced": 50, "full": 20},
    metrics=METRICS,
)
class Steer(Diagnostic):
    """STEER's forecast of the entropy change: by its theorem and by its released code."""

    def measure(self, reading: PolicyReading, state: Any) -> tuple[list[Block], Any]:
        """Forecast the entropy change of one step's tokens."""
        tokens, old = reading.tokens, reading.old_logprob
        logprob, entropy = tokens.logprob, tokens.entropy
        terms = {
            "entropy/change/estimate/steer_released": steer_released_term(
                logprob, entropy, reading.advantage, logprob if old is None else old
            )
        }
        if reading.is_pull_known:
            terms["entropy/change/estimate/steer"] = steer_term(logprob, entropy, pull(reading))
        means = weighted_mean(torch.stack(list(terms.values())), tokens.weight)
        return [Block.metrics(list(terms), means, weight=tokens.weight.sum())], state
