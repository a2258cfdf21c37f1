"""Does the policy, or the reward model, come to prefer what people prefer, and at what price?"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from entropylens.diagnostics._summaries import share_where, summarise, weighted_mean, wide_dtype
from entropylens.registry import Block, Diagnostic, Metric, PreferenceReading, diagnostic

__all__ = ["Preference", "log_ratio", "pair_margins"]

_SEQUENCES = (
    "exact for the {} sequences of the step whose value is known (not NaN); every one counts once, "
    "however long; weighted by their number"
)
_PAIRS = (
    "exact for the pairs of the step of which both values are known (not NaN), weighted by their "
    "number; absent for data that is not paired (KTO) and where no reference is known"
)
_WITHIN = (
    "exact for the scored tokens of {} sequences whose entropy is known (not NaN), weighted by "
    "their number"
)
_RANKS = "ranks' own deviations are averaged, which leaves out how their means differ"
_DPO = "Rafailov et al. (2023), Direct Preference Optimization, arXiv 2305.18290, Sec. 4"
_DISPLACEMENT = (
    "likelihood displacement: Razin et al. (2024), arXiv 2410.08847; Pal et al. (2024), arXiv "
    "2402.13228; TRL logs it as logps/{}"
)
_BRADLEY_TERRY = "Bradley and Terry (1952); TRL's RewardTrainer"


def _metric(question: str, formula: str, high: str, low: str, **other: str) -> Metric:
    fixed = {
        "unit": "nats",
        "estimator": _PAIRS,
        "cost": "a sum over the log-probabilities that the loss computes; O(sequences)",
        "source": _DPO,
    }
    return Metric(question=question, formula=formula, high=high, low=low, **{**fixed, **other})


METRICS: Final[Mapping[str, Metric]] = {
    "preference/chosen/logprob/mean": _metric(
        "How likely are the answers that people chose?",
        "mean over chosen sequences of log pi(y | x) = sum_t log pi(y_t | x, y_<t), not divided by "
        "the length",
        "the policy gives the chosen answers",
        "where it falls while margins grow the likelihood is displaced, the known failure of DPO: "
        "probability leaves the chosen answers as well, for ones that nobody compared",
        estimator=_SEQUENCES.format("chosen"),
        source=_DISPLACEMENT.format("chosen"),
    ),
    "preference/rejected/logprob/mean": _metric(
        "How likely are the answers that people rejected?",
        "mean over rejected sequences of log pi(y | x), not divided by the length",
        "the policy still gives the rejected answers",
        "the loss pushes them away; far below preference/chosen/logprob/mean it pushes at nothing",
        estimator=_SEQUENCES.format("rejected"),
        source=_DISPLACEMENT.format("rejected"),
    ),
    "preference/chosen/entropy/mean": _metric(
        "How undecided is the policy within the answers that people chose?",
        "sum of token entropies over all chosen sequences / number of their tokens",
        "many continuations are open",
        "it has made up its mind: collapse, if it falls to near 0",
        estimator=_WITHIN.format("chosen"),
        source="Shannon (1948)",
    ),
    "preference/rejected/entropy/mean": _metric(
        "How undecided is the policy within the answers that people rejected?",
        "sum of token entropies over all rejected sequences / number of their tokens",
        "what takes the place of the rejected tokens is not settled",
        "it has made up its mind: for other tokens, where these have become unlikely",
        estimator=_WITHIN.format("rejected"),
        source="Shannon (1948)",
    ),
    "preference/chosen/log_ratio/mean": _metric(
        "How far has the policy moved towards the answers that people chose?",
        "mean over chosen sequences of log pi(y | x) - log pi_ref(y | x), without beta",
        "chosen answers became likelier than they were",
        "below 0 they became less likely than they were: likelihood displacement",
        estimator=_SEQUENCES.format("chosen"),
        source=f"{_DPO}: the implicit reward / beta; TRL's rewards/chosen is beta times it",
    ),
    "preference/rejected/log_ratio/mean": _metric(
        "How far has the policy moved towards the answers that people rejected?",
        "mean over rejected sequences of log pi(y | x) - log pi_ref(y | x), without beta",
        "above 0 rejected answers became likelier than they were",
        "the loss pushes them away",
        estimator=_SEQUENCES.format("rejected"),
        source=f"{_DPO}: the implicit reward / beta; TRL's rewards/rejected is beta times it",
    ),
    "preference/margin/mean": _metric(
        "By how much is the chosen answer preferred to the rejected one?",
        "mean over pairs of m = chosen - rejected, of the log-ratios to the reference without "
        "beta, or of a reward model's rewards",
        "pairs are told apart by far; look whether preference/chosen/logprob/mean paid for it",
        "pairs are not told apart; below 0 the wrong way round",
        unit="nats, or the reward's own",
        source=f"{_DPO}: TRL's rewards/margins is beta times it; for reward models TRL's margin",
    ),
    "preference/margin/std": _metric(
        "How much do pairs differ in how well they are told apart?",
        "sqrt(mean (m - mean m)^2) over pairs, population",
        "some pairs are settled and others are not, or are labelled the wrong way round",
        "pairs are alike",
        unit="nats, or the reward's own",
        estimator=f"{_PAIRS}, and below two pairs; {_RANKS}",
    ),
    "preference/accuracy": _metric(
        "How many pairs are the right way round?",
        "share of pairs with m > 0; a tie counts as wrong, as in TRL, so it is 0 while the policy "
        "still is its reference",
        "the preference is learnt; close to 1 on training pairs also memorised",
        "around 1/2 nothing is learnt; below it labels may be swapped",
        unit="1",
        source=f"{_DPO}: TRL's rewards/accuracies; for reward models TRL's accuracy",
    ),
    "preference/reward/chosen/mean": _metric(
        "What does the reward model give the answers that people chose?",
        "mean over chosen sequences of r(x, y)",
        "rewards drift up with those of rejected answers: only differences are trained",
        "rewards drift down with those of rejected answers",
        unit="reward",
        estimator=_SEQUENCES.format("chosen"),
        source=_BRADLEY_TERRY,
    ),
    "preference/reward/rejected/mean": _metric(
        "What does the reward model give the answers that people rejected?",
        "mean over rejected sequences of r(x, y)",
        "rewards drift up with those of chosen answers: only differences are trained",
        "rejected answers are found bad",
        unit="reward",
        estimator=_SEQUENCES.format("rejected"),
        source=_BRADLEY_TERRY,
    ),
    "preference/reward/std": _metric(
        "Over what range does the reward model give rewards?",
        "sqrt(mean (r - mean r)^2) over chosen and rejected sequences together, population",
        "rewards grow without bound: only their differences are held by the loss",
        "the reward model hardly distinguishes: early training, or collapse",
        unit="reward",
        estimator=_SEQUENCES.format("chosen and rejected") + f"; absent below two; {_RANKS}",
        source=_BRADLEY_TERRY,
    ),
}


def log_ratio(logprob: Tensor, reference_logprob: Tensor) -> Tensor:
    """How much likelier is each sequence than it was for the reference?

    ``log pi(y | x) - log pi_ref(y | x)``: DPO's implicit reward without its factor beta.

    Args:
        logprob: ``[n]``, nats, summed over a sequence's tokens.
        reference_logprob: ``[n]``, of the same tokens.

    Returns:
        ``[n]``, nats, in float64 where the device has it.

    Device: the input's; no host synchronisation.
    Cost: O(n).
    Source: Rafailov et al. (2023), arXiv 2305.18290, Eq. 5.

    Example:
        >>> log_ratio(torch.tensor([-3.0, -9.0]), torch.tensor([-4.0, -8.0])).tolist()
        [1.0, -1.0]
    """
    wide = wide_dtype(logprob)
    return logprob.to(wide) - reference_logprob.to(wide)


def pair_margins(score: Tensor) -> Tensor:
    """By how much is each chosen sequence preferred to its rejected one?

    ``m_i = score_i - score_{i + n/2}``.

    Args:
        score: ``[n]``: the chosen sequences, then the rejected ones in the same order; log-ratios
            or rewards.

    Returns:
        ``[n / 2]``, in the unit of ``score`` and in float64 where the device has it.

    Raises:
        ValueError: ``n`` is odd.

    Device: the input's; no host synchronisation.
    Cost: O(n).

    Example:
        >>> pair_margins(torch.tensor([2.0, 1.0, 0.5, 3.0])).tolist()
        [1.5, -2.0]
    """
    half, rest = divmod(score.shape[0], 2)
    if rest:
        raise ValueError(f"pair_margins: expected chosen and rejected rows, got {len(score)}")
    score = score.to(wide_dtype(score))
    return score[:half] - score[half:]


@diagnostic(
    reads="preference",
    every={"fast": 10, "balanced": 1, "full": 1},
    floor={"fast": 200, "balanced": 50, "full": 20},
    metrics=METRICS,
)
class Preference(Diagnostic):
    """Likelihoods, entropies, rewards and margins of chosen and rejected sequences."""

    def measure(self, reading: PreferenceReading, state: Any) -> tuple[list[Block], Any]:
        """Compare the sequences of one step."""
        ratio = None
        if reading.logprob is not None and reading.reference_logprob is not None:
            ratio = log_ratio(reading.logprob, reading.reference_logprob)
        values = {
            **_of_side("chosen", reading.chosen, reading, ratio),
            **_of_side("rejected", ~reading.chosen, reading, ratio),
            **_of_rewards(reading.reward),
        }
        score = ratio if reading.reward is None else reading.reward
        if reading.paired and score is not None:
            values |= _of_pairs(pair_margins(score))
        if not values:
            return [], state
        block = Block.metrics(
            [f"preference/{name}" for name in values],
            torch.stack([value for value, _ in values.values()]),
            weight=torch.stack([weight.float() for _, weight in values.values()]),
        )
        return [block], state


_Values = dict[str, tuple[Tensor, Tensor]]
"""By metric without its first part: the value, and the weight behind it."""


def _of_side(
    side: str, belongs: Tensor, reading: PreferenceReading, ratio: Tensor | None
) -> _Values:
    columns = {
        f"{side}/logprob/mean": reading.logprob,
        f"{side}/log_ratio/mean": ratio,
        f"reward/{side}/mean": reading.reward,
    }
    values = {}
    for name, column in columns.items():
        if column is not None:
            known = belongs & ~column.isnan()
            values[name] = weighted_mean(column, known), known.sum()
    if reading.entropy is not None and reading.tokens is not None:
        tokens = torch.where(belongs & ~reading.entropy.isnan(), reading.tokens, 0)
        values[f"{side}/entropy/mean"] = (
            weighted_mean(reading.entropy / reading.tokens, tokens),
            tokens.sum(),
        )
    return values


def _of_rewards(reward: Tensor | None) -> _Values:
    return {} if reward is None else {"reward/std": _deviation(reward)}


def _of_pairs(margin: Tensor) -> _Values:
    known = ~margin.isnan()
    return {
        "margin/mean": (weighted_mean(margin, known), known.sum()),
        "margin/std": _deviation(margin),
        "accuracy": (share_where(margin > 0, known), known.sum()),
    }


def _deviation(values: Tensor) -> tuple[Tensor, Tensor]:
    """Standard deviation and the weight behind it; one value alone has none."""
    known = ~values.isnan()
    count = known.sum()
    return summarise(values, known, ())[1], torch.where(count > 1, count, 0)
