"""Does the trainer agree with the engine that drew the tokens about how likely they were?"""

from collections.abc import Mapping
from math import log
from typing import Any, Final

import torch

from entropylens.diagnostics._summaries import (
    correlation,
    share_where,
    summarise,
    weighted_mean,
    weighted_quantiles,
    wide_dtype,
)
from entropylens.diagnostics.importance_ratio import effective_sample_size_share, sequence_sums
from entropylens.diagnostics.reference_kl import k3
from entropylens.registry import Block, Diagnostic, Metric, PolicyReading, diagnostic

__all__ = ["SamplerMismatch"]

TAIL: Final = log(2)

_WHICH = (
    "over scored tokens (mask) whose log-probability the sampler told (not NaN), weighted by the "
    "tokens each row stands for; the trainer's is that of the policy at the time of generation "
    "(old log-probabilities) where the loop has it, else the current policy's, which from the "
    "second update on adds the update's own change"
)
_COST = "O(n log n) over the measured tokens' log-probabilities"
_HIGH = (
    "stale weights in the engine, another temperature or a truncated sampler (top-p, top-k), or "
    "kernels of different precision; the gradient is then off-policy without saying so"
)
_LOW = "trainer and engine agree to within rounding"
_TIS = "Yao et al. (2025), Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"


def _metric(question: str, formula: str, **other: str) -> Metric:
    fixed = {
        "unit": "nats",
        "estimator": _WHICH,
        "high": _HIGH,
        "low": _LOW,
        "cost": _COST,
        "source": _TIS,
    }
    return Metric(question=question, formula=formula, **{**fixed, **other})


_D = "d = log p_trainer(a) - log p_sampler(a)"
METRICS: Final[Mapping[str, Metric]] = {
    "mismatch/log_ratio/mean": _metric(
        "Which way do trainer and sampler disagree?",
        f"mean of {_D}; its negative is the k1 estimate of KL(sampler || trainer), verl's "
        "rollout_corr/kl; both signs cancel, so a value near 0 proves nothing",
        high="above 0, which in expectation no sampler gives that reports what it drew from: the "
        "engine reports other log-probabilities (before temperature or truncation), or the sample "
        "is small",
        low="below 0: by as much as the two distributions differ",
    ),
    "mismatch/log_ratio/std": _metric(
        "How widely do trainer and sampler disagree?",
        f"sqrt(mean (d - mean d)^2), population, {_D}",
    ),
    "mismatch/log_ratio/absolute/mean": _metric(
        "How far apart are trainer and sampler on an average token?",
        f"mean of |d|, {_D}; TRL's sampling/sampling_logp_difference/mean",
    ),
    "mismatch/log_ratio/p01": _metric(
        "How far below the sampler does the trainer go?",
        f"quantile 0.01 of {_D}, Hazen interpolation",
        high="near 0: the lower tail is thin",
        low="tokens that the engine drew and the trainer thinks far less likely",
    ),
    "mismatch/log_ratio/p99": _metric(
        "How far above the sampler does the trainer go?",
        f"quantile 0.99 of {_D}, Hazen interpolation",
        high="tokens with a large importance weight: they carry the variance",
        low="near 0: the upper tail is thin",
    ),
    "mismatch/log_ratio/largest": _metric(
        "What is the worst disagreement about one token?",
        f"max of |d|, {_D}; TRL's sampling/sampling_logp_difference/max",
        ranks="max",
    ),
    "mismatch/kl": _metric(
        "How far is the trainer's policy from the one that drew the tokens?",
        f"mean of k3 = exp(d) - 1 - d, {_D}; estimates KL(sampler || trainer) and is never "
        "negative; verl's rollout_corr/k3_kl and prime-rl's mismatch_kl, without their bounds "
        "on d",
        source="Schulman (2020), http://joschu.net/blog/kl-approx.html",
    ),
    "mismatch/chi2": _metric(
        "How much variance would exact correction of the mismatch add?",
        f"mean of exp(2 d) - 1, {_D}; estimates chi^2(trainer || sampler), and may be negative in "
        "a sample; verl's rollout_corr/chi2_token without its bound on d",
        unit="1",
        high="a few tokens would dominate the corrected gradient",
        source=_TIS,
    ),
    "mismatch/ratio/tail/share": _metric(
        "For how many tokens do trainer and sampler differ by more than a factor of 2?",
        f"share of tokens with |d| > log 2, {_D}",
        unit="1",
    ),
    "mismatch/effective_sample_size/share": _metric(
        "What part of the tokens would be left after exact correction of the mismatch?",
        f"(sum w)^2 / (n sum w^2), w = exp(d), {_D}",
        unit="1",
        high="near 1: next to no correction is needed",
        low="near 0: a few tokens outweigh the rest",
        estimator=_WHICH + "; the mean over ranks leaves out how far ranks differ",
        source="Kish (1965); as in verl's rollout_is_eff_sample_size, untruncated",
    ),
    "mismatch/sequence/effective_sample_size/share": _metric(
        "What part of the completions would be left after exact correction of the mismatch?",
        "(sum W)^2 / (n sum W^2), W = product of exp(d) over a sequence's tokens",
        unit="1",
        high="near 1: next to no correction is needed",
        low="near 1/n: small disagreements add up over a completion until one outweighs all",
        estimator="sequences of which every scored token was measured and told by the sampler, "
        "all counting alike (TRL takes a token that the sampler did not tell as d = 0); absent "
        "where there is none; the mean over ranks leaves out how far ranks differ",
        source="Kish (1965)",
    ),
    "mismatch/probability/correlation": _metric(
        "Do trainer and sampler agree on which tokens were likely?",
        "Pearson correlation of p_trainer(a) and p_sampler(a) over tokens; verl's "
        "training/rollout_actor_probs_pearson_corr",
        unit="1",
        high="near 1: they agree; blind to differences among improbable tokens",
        low="below about 0.99: the two score different text, or different weights",
        estimator=_WHICH + "; absent where one of the two does not vary beyond float32 rounding, "
        "and below 3 tokens",
        source="Pearson (1895)",
    ),
}


@diagnostic(
    reads="policy",
    every={"fast": 10, "balanced": 1, "full": 1},
    floor={"fast": 200, "balanced": 50, "full": 20},
    metrics=METRICS,
)
class SamplerMismatch(Diagnostic):
    """Log-probabilities of the trainer against those of the engine that drew the tokens."""

    def measure(self, reading: PolicyReading, state: Any) -> tuple[list[Block], Any]:
        """Summarise the disagreement of one step; nothing where the sampler told nothing."""
        sampler, tokens = reading.sampler_logprob, reading.tokens
        if sampler is None:
            return [], state
        trainer = tokens.logprob if reading.old_logprob is None else reading.old_logprob
        known = tokens.present & ~sampler.isnan()
        weight = torch.where(known, tokens.weight, 0.0)
        difference = trainer.to(wide_dtype(weight)) - sampler
        absolute = difference.abs()
        sums, complete = sequence_sums(difference, known, tokens.sequence, tokens.sequence_tokens)
        sequences = complete.float()
        by_sequence = effective_sample_size_share(sums, sequences)
        agreement = correlation(trainer.exp(), sampler.exp(), weight)
        mean, std, p01, p99 = summarise(difference, weight, (0.01, 0.99))
        by_token = {
            "mismatch/log_ratio/mean": mean,
            "mismatch/log_ratio/std": std,
            "mismatch/log_ratio/p01": p01,
            "mismatch/log_ratio/p99": p99,
            "mismatch/log_ratio/absolute/mean": weighted_mean(absolute, weight),
            "mismatch/log_ratio/largest": weighted_quantiles(absolute, weight, (1.0,))[0],
            "mismatch/kl": weighted_mean(k3(difference), weight),
            "mismatch/chi2": weighted_mean((2 * difference).expm1(), weight),
            "mismatch/ratio/tail/share": share_where(absolute > TAIL, weight),
            "mismatch/effective_sample_size/share": effective_sample_size_share(difference, weight),
        }
        return [
            Block.metrics(
                list(by_token), torch.stack(list(by_token.values())), weight=weight.sum()
            ),
            Block.metrics(
                ["mismatch/sequence/effective_sample_size/share"],
                by_sequence[None],
                weight=sequences.sum(),
            ),
            Block.metrics(
                ["mismatch/probability/correlation"],
                agreement[None],
                weight=torch.where(agreement.isnan(), 0.0, weight.sum()),
            ),
        ], state
