"""What are completions rewarded for, and which part of the reward drives the total?"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from entropylens.diagnostics._summaries import (
    LEAST,
    correlation,
    share_where,
    weighted_mean,
    wide_dtype,
)
from entropylens.registry import Block, Diagnostic, Metric, RolloutReading, diagnostic

__all__ = ["RewardComponents", "scored_std"]

_SCORED = "all completions of the rollout that have a reward; NaN (not scored) is left out"
_APPLIED = "all completions to which the component applied; NaN (did not apply) is left out"
_SOURCE = "reward and reward_std of TRL's GRPOTrainer, sums taken in float64"
_PART_SOURCE = "rewards/<name>/mean and std of TRL's GRPOTrainer, sums taken in float64"


def _metric(question: str, formula: str, high: str, low: str, **other: str) -> Metric:
    fixed = {
        "unit": "reward",
        "estimator": _SCORED,
        "cost": "O(completions * components), nothing beside the rewards themselves",
        "source": _SOURCE,
    }
    return Metric(question=question, formula=formula, high=high, low=low, **{**fixed, **other})


METRICS: Final[Mapping[str, Metric]] = {
    "reward/mean": _metric(
        "How well are completions rewarded?",
        "mean r over scored completions, r as the trainer weighs it",
        "the policy does what is rewarded, wanted or not",
        "the policy is not rewarded: hard prompts, a broken verifier, or collapse",
    ),
    "reward/std": _metric(
        "How much do completions differ in reward?",
        "sqrt(sum (r - mean r)^2 / (n - 1)) over n scored completions of all groups together; "
        "absent below two",
        "rewards tell completions or prompts apart",
        "rewards hardly tell anything apart: little to learn from",
    ),
    "reward/min": _metric(
        "How bad is the worst completion?",
        "min r over scored completions",
        "no completion fails badly",
        "at least one completion is punished hard: an outlier that a group's mean inherits",
        ranks="min",
    ),
    "reward/max": _metric(
        "How good is the best completion?",
        "max r over scored completions",
        "a completion earned all there is, or exploited the reward",
        "not one completion was right: nothing to imitate in this rollout",
        ranks="max",
    ),
    "reward/component/mean": _metric(
        "How well does this component of the reward do?",
        "mean of the component, before its weight; module is its name",
        "the policy satisfies it",
        "the policy ignores it, or it seldom pays",
        estimator=_APPLIED,
        source=_PART_SOURCE,
    ),
    "reward/component/std": _metric(
        "How much do completions differ in this component?",
        "sqrt(sum (c - mean c)^2 / (n - 1)); absent below two values",
        "it tells completions apart and so can be learnt",
        "it is saturated or never met: it shifts the reward and teaches nothing",
        estimator=_APPLIED,
        source=_PART_SOURCE,
    ),
    "reward/component/missing/share": _metric(
        "To how many completions did this component not apply?",
        "share of completions whose component is NaN",
        "it is for some prompts only, or its scorer fails",
        "it judges every completion",
        unit="1",
        estimator="all completions of the rollout",
        source="rows that TRL's GRPOTrainer leaves out without saying how many",
    ),
    "reward/component/correlation": _metric(
        "Does this component decide the total reward?",
        "Pearson correlation of the component with the total over completions that have both; "
        f"absent below {LEAST} of them or where either is constant to within float32 rounding",
        "near 1: the total is mostly this component",
        "near 0: it drowns among the others; negative: it pulls against the total",
        unit="1",
        estimator="completions that have the component and a total reward",
        source="Pearson (1895)",
    ),
}


def scored_std(values: Tensor) -> Tensor:
    """How much do the values that are there differ?

    ``sqrt(sum (v - mean v)^2 / (n - 1))`` over the ``n`` values that are not NaN: TRL's ``nanstd``.

    Args:
        values: ``[..., n]``, any real unit; NaN is left out.

    Returns:
        ``[...]`` float32 in the unit of the values; NaN below two values, and with an infinity.

    Device: the input's; no host synchronisation; float64 sums, in which equal float32 values have
        a deviation of exactly 0. TRL's float32 mean of seven rewards of 10.1 gives 1e-6 instead.
    Cost: O(n) time and memory.

    Example:
        >>> scored_std(torch.tensor([[1.0, 3.0, torch.nan], [2.0, torch.nan, torch.nan]]))
        tensor([1.4142,    nan])
    """
    known = ~values.isnan()
    count = known.sum(-1)
    wide = torch.where(known, values, 0.0).to(wide_dtype(values))
    mean = wide.sum(-1, keepdim=True) / count[..., None]
    deviation = torch.where(known, wide - mean, 0.0)
    variance = deviation.square().sum(-1) / (count - 1)
    return torch.where(count > 1, variance.sqrt(), torch.nan).float()


@diagnostic(
    reads="rollout",
    every={"fast": 1, "balanced": 1, "full": 1},
    floor=50,
    metrics=METRICS,
)
class RewardComponents(Diagnostic):
    """The total reward, and each component's level, spread, gaps and part in the total."""

    def measure(self, reading: RolloutReading, state: Any) -> tuple[list[Block], Any]:
        """Summarise the rewards of one rollout."""
        return _total_block(reading) + _component_blocks(reading), state


def _total_block(reading: RolloutReading) -> list[Block]:
    reward = reading.reward
    if reward is None or not reward.numel():
        return []
    known = ~reward.isnan()
    values = [
        weighted_mean(reward, known),
        scored_std(reward),
        torch.where(known, reward, torch.inf).amin().float(),
        torch.where(known, reward, -torch.inf).amax().float(),
    ]
    count = known.sum().float()
    pair = torch.where(count > 1, count, 0.0)
    names = [f"reward/{name}" for name in ("mean", "std", "min", "max")]
    weight = torch.stack([count, pair, count, count])
    return [Block.metrics(names, torch.stack(values), weight=weight)]


def _component_blocks(reading: RolloutReading) -> list[Block]:
    modules = list(reading.rewards)
    if not modules:
        return []
    parts = torch.stack([part.float() for part in reading.rewards.values()])
    known = ~parts.isnan()
    count = known.sum(-1).float()
    everything = torch.ones_like(parts)
    columns = {
        "mean": (weighted_mean(parts, known), count),
        "std": (scored_std(parts), torch.where(count > 1, count, 0.0)),
        "missing/share": (share_where(~known, everything), everything.sum(-1)),
    }
    if reading.reward is not None:
        reward = reading.reward.float()
        both = known & ~reward.isnan()
        found = correlation(parts, reward.expand_as(parts), both)
        columns["correlation"] = found, torch.where(found.isnan(), 0.0, both.sum(-1).float())
    return [
        Block.metrics(
            [f"reward/component/{name}"] * len(modules), values, weight=weight, modules=modules
        )
        for name, (values, weight) in columns.items()
    ]
