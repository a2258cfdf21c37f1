"""How far has the policy moved from the one its ratios are taken against, and what is clipped?"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from entropylens.diagnostics._policy import is_learnt_from, log_ratio
from entropylens.diagnostics._summaries import share_where, summarise, weighted_mean, wide_dtype
from entropylens.diagnostics.reference_kl import k3
from entropylens.registry import Block, Diagnostic, Metric, PolicyReading, diagnostic

__all__ = [
    "ImportanceRatio",
    "clip_shares",
    "effective_sample_size_share",
    "sequence_sums",
]

LEVELS: Final = {"min": 0.0, "p05": 0.05, "p95": 0.95, "max": 1.0}
_EXTREMES: Final = {"min": "smallest", "max": "largest"}

_LOSS = (
    "the ratio as the loss takes it: one for each scored token (mask), weighted by the tokens each "
    "row stands for; where the loss takes one for each sequence (GSPO: exp of the sequence's mean "
    "log-ratio), one for each sequence, all sequences counting alike. Absent where the step is "
    "on-policy"
)
_TOKENS = (
    "by token whatever the loss does, over scored tokens (mask), weighted by the tokens each row "
    "stands for. Absent where the step is on-policy"
)
_COST = "O(n log n) over the measured tokens' log-probabilities"
_PPO = "Schulman et al. (2017), arXiv 1707.06347"
_GRPO = (
    _PPO + ", Eq. 7; the shares that TRL's GRPO and RLOO log as clip_ratio/*_mean, save that "
    "those are means of micro-batch means and this is one mean over the step"
)
_KISH = "Kish (1965); as in verl's rollout_is_eff_sample_size"
_FAR = "many or large updates on one rollout: data is stale, clipping takes hold"
_NEAR = "the policy has hardly moved since the rollout"


def _metric(
    question: str, formula: str, high: str = _FAR, low: str = _NEAR, **other: str
) -> Metric:
    fixed = {"unit": "1", "estimator": _LOSS, "cost": _COST, "source": _PPO}
    return Metric(question=question, formula=formula, high=high, low=low, **{**fixed, **other})


METRICS: Final[Mapping[str, Metric]] = {
    "ratio/on_policy/share": _metric(
        "For how many tokens is the importance ratio exactly 1?",
        "share of tokens with log pi(a) = log pi_old(a) to the last bit; 1 where the loss takes "
        "this very policy as the old one, and then nothing else is written here",
        high="the first update on a rollout: ratio and clipping do nothing, and losses that act "
        "through |log r| (KL-Cov) have no gradient",
        low="later updates on one rollout, or log-probabilities that another pass computed",
        estimator="by token, over scored tokens (mask), weighted by the tokens each row stands for",
        source="definition; KL-Cov: Cui et al. (2025), arXiv 2505.22617, Eq. 14",
    ),
    "ratio/mean": _metric(
        "What is the importance ratio on average?",
        "mean of r = pi(a) / pi_old(a); over tokens that pi_old drew 1 in expectation for token "
        "ratios and products; below 1 for a sequence's mean log-ratio",
        "above 1: sampled tokens have become likelier",
        "below 1: sampled tokens have become less likely; where the loss takes a sequence's mean "
        "log-ratio, also that the policy has moved at all",
    ),
    "ratio/std": _metric(
        "How widely do importance ratios scatter?",
        "sqrt(mean (r - mean r)^2), population",
    ),
    **{
        f"ratio/{name}": _metric(
            f"What is the {_EXTREMES[name]} importance ratio?"
            if name in _EXTREMES
            else f"Below which importance ratio do {level:.0%} of them lie?",
            f"{name} of r"
            if name in _EXTREMES
            else f"quantile {level:g} of r, Hazen interpolation",
            "tokens that became far likelier" if level > 0.5 else _NEAR,
            _NEAR if level > 0.5 else "tokens that became far less likely",
            ranks=name if name in _EXTREMES else "mean",
        )
        for name, level in LEVELS.items()
    },
    "ratio/log/mean": _metric(
        "Which way have the sampled tokens' log-probabilities moved?",
        "mean of log r = log pi(a) - log pi_old(a); over tokens of pi_old its negative estimates "
        "KL(old || policy) (k1; verl's actor/ppo_kl is that negative)",
        "above 0: sampled tokens became likelier on average, which no KL explains: advantages are "
        "mostly positive, or the sample is small",
        "far below 0: the policy has left the old one",
        unit="nats",
        estimator=_TOKENS,
        source="Schulman (2020), http://joschu.net/blog/kl-approx.html",
    ),
    "ratio/kl": _metric(
        "How far is the policy from the old policy?",
        "mean of k3 = r - 1 - log r; over tokens of pi_old it estimates KL(old || policy), and it "
        "is never negative",
        unit="nats",
        estimator=_TOKENS,
        source="Schulman (2020), http://joschu.net/blog/kl-approx.html",
    ),
    "ratio/effective_sample_size/share": _metric(
        "What part of the tokens is left once they are weighted by their ratios?",
        "(sum r)^2 / (n sum r^2), unclipped ratios by token",
        "near 1: ratios are alike, every token counts",
        "near 0: a few tokens with large ratios outweigh the rest",
        estimator=_TOKENS + "; the mean over ranks leaves out how far ranks differ",
        source=_KISH,
    ),
    "ratio/sequence/effective_sample_size/share": _metric(
        "What part of the completions is left once they are weighted by their ratios?",
        "(sum R)^2 / (n sum R^2), R = product of r over a sequence's tokens, unclipped",
        "near 1: exact off-policy correction of whole completions is affordable",
        "near 1/n: one completion outweighs all others; usual for long ones, and the reason why "
        "losses use token ratios",
        estimator="sequences of which every scored token was measured, all counting alike; absent "
        "where there is none; the mean over ranks leaves out how far ranks differ",
        source=_KISH,
    ),
    "clip/low/share": _metric(
        "How much is left out for having been pushed down enough?",
        "share with r < 1 - low and A < 0",
        "bad tokens fall fast: large updates, or many on one rollout",
        "the lower bound hardly acts",
        source=_GRPO,
    ),
    "clip/high/share": _metric(
        "How much is left out for having been pushed up enough?",
        "share with r > 1 + high and A > 0",
        "good tokens rise fast; rare ones meet this bound first, which costs entropy",
        "the upper bound hardly acts",
        source=_GRPO,
    ),
    "clip/region/share": _metric(
        "How much does the loss not learn from because of clipping?",
        "clip/low/share + clip/high/share",
        "much of the batch has no gradient: steps too large or too many",
        "clipping hardly acts",
        source=_GRPO,
    ),
}


def effective_sample_size_share(log_weight: Tensor, count: Tensor) -> Tensor:
    """What part of a sample is left once it is weighted?

    Kish's ``(sum w)^2 / (n sum w^2)`` with ``w = exp(log_weight)``: 1 for equal weights, 1/n where
    one outweighs all others. Taken in logarithms, so that no weight overflows.

    Args:
        log_weight: ``[n]``, nats; what stands where ``count`` is 0 is ignored, NaN included.
        count: ``[n]``, samples that each row stands for, at least 0.

    Returns:
        ``[]`` in 0..1, float32; NaN when nothing counts.

    Device: the input's; no host synchronisation.
    Cost: O(n).
    Source: Kish (1965).

    Example:
        >>> effective_sample_size_share(torch.tensor([0.0, 0.0, -1000.0]), torch.ones(3))
        tensor(0.6667)
    """
    count = count.to(wide_dtype(count))
    kept = torch.where(count > 0, log_weight.to(count.dtype), 0.0)
    log_count = count.log()
    first, second = ((log_count + power * kept).logsumexp(0) for power in (1, 2))
    return (2 * first - second - count.sum().log()).exp().float()


def sequence_sums(
    values: Tensor, known: Tensor, sequence: Tensor, sequence_tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """What do a sequence's tokens add up to, and are they all there?

    Args:
        values: ``[n]``, any unit; what stands where ``known`` is false is ignored, NaN included.
        known: ``[n]`` bool.
        sequence: ``[n]`` index of each row's sequence.
        sequence_tokens: ``[sequences]`` scored tokens of each sequence.

    Returns:
        Two columns ``[sequences]``: sums over the known rows, in float64 where the device has it,
        and bool: every scored token of the sequence is among them, and there is one.

    Device: the input's; no host synchronisation.
    Cost: O(n).
    """
    kept = torch.where(known, values.to(wide_dtype(values)), 0.0)
    nothing = torch.zeros(sequence_tokens.shape, dtype=kept.dtype, device=kept.device)
    sums = nothing.index_add(0, sequence, kept)
    counts = nothing.index_add(0, sequence, known.to(kept.dtype))
    return sums, (counts == sequence_tokens) & (sequence_tokens > 0)


def clip_shares(
    ratio: Tensor, advantage: Tensor, weight: Tensor, clip: tuple[float, float]
) -> Tensor:
    """How much of the batch does clipping keep the loss from learning from?

    Low: ``A < 0`` and ``r < 1 - low``. High: ``A > 0`` and ``r > 1 + high``. Region: either.

    Args:
        ratio: ``[n]``, r of each token, or of each sequence.
        advantage: ``[n]``, A.
        weight: ``[n]``, what each row counts; 0 leaves it out.
        clip: ``(low, high)``.

    Returns:
        ``[3]`` shares of the weight: low, high, region; NaN when there is no weight.

    Device: the input's; no host synchronisation.
    Cost: O(n).
    Source: TRL's clip_ratio/low_mean, high_mean and region_mean: by token in GRPO, by sequence in
        GRPO with sequence-level ratios and in RLOO.

    Example:
        >>> r, A = torch.tensor([0.5, 0.5, 1.5, 1.0]), torch.tensor([-1.0, 1.0, 1.0, 1.0])
        >>> clip_shares(r, A, torch.ones(4), (0.2, 0.28))
        tensor([0.2500, 0.2500, 0.5000])
    """
    clipped = ~is_learnt_from(ratio, advantage, clip)
    cases = torch.stack([clipped & (advantage < 0), clipped & (advantage > 0), clipped])
    return share_where(cases, weight)


@diagnostic(
    reads="policy",
    every={"fast": 10, "balanced": 1, "full": 1},
    floor={"fast": 200, "balanced": 50, "full": 20},
    metrics=METRICS,
)
class ImportanceRatio(Diagnostic):
    """Importance ratios of a step, their spread, and what the loss clips."""

    def measure(self, reading: PolicyReading, state: Any) -> tuple[list[Block], Any]:
        """Summarise the ratios of one step; on-policy, say only that it is."""
        tokens, weight = reading.tokens, reading.tokens.weight
        if reading.old_logprob is None:
            always = weight.new_ones(1)
            return [Block.metrics(["ratio/on_policy/share"], always, weight=weight.sum())], state
        change = tokens.logprob.to(wide_dtype(weight)) - reading.old_logprob
        sums, complete = sequence_sums(
            change, tokens.present, tokens.sequence, tokens.sequence_tokens
        )
        sequences = complete.float()
        by_token = {
            "ratio/log/mean": weighted_mean(change, weight),
            "ratio/kl": weighted_mean(k3(change), weight),
            "ratio/effective_sample_size/share": effective_sample_size_share(change, weight),
            "ratio/on_policy/share": share_where(change == 0, weight),
        }
        share = effective_sample_size_share(sums, sequences)
        return [
            _as_the_loss_takes_it(reading),
            Block.metrics(
                list(by_token), torch.stack(list(by_token.values())), weight=weight.sum()
            ),
            Block.metrics(
                ["ratio/sequence/effective_sample_size/share"],
                share[None],
                weight=sequences.sum(),
            ),
        ], state


def _as_the_loss_takes_it(reading: PolicyReading) -> Block:
    tokens, logarithm, advantage = reading.tokens, log_ratio(reading), reading.advantage
    weight = tokens.weight
    if reading.ratio_level != "token":
        columns = [logarithm, advantage, torch.ones_like(logarithm)]
        sums = [
            sequence_sums(column, weight > 0, tokens.sequence, tokens.sequence_tokens)[0]
            for column in columns
        ]
        logarithm, advantage = ((part / sums[2]).float() for part in sums[:2])
        weight = (sums[2] > 0).float()
    names = [f"ratio/{name}" for name in ("mean", "std", *LEVELS)]
    values = [summarise(logarithm.to(wide_dtype(weight)).exp(), weight, tuple(LEVELS.values()))]
    if reading.clip is not None:
        names += [f"clip/{name}/share" for name in ("low", "high", "region")]
        values.append(clip_shares(logarithm.exp(), advantage, weight, reading.clip))
    return Block.metrics(names, torch.cat(values), weight=weight.sum())
