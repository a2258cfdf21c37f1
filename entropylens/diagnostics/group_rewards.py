"""How many prompts teach nothing, because all of their completions are rewarded alike?"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from entropylens.diagnostics._summaries import share_where, weighted_mean
from entropylens.diagnostics.reward_components import scored_std
from entropylens.registry import Block, Diagnostic, Metric, RolloutReading, diagnostic

__all__ = ["GroupRewards", "group_correctness", "has_no_spread"]

_GROUPS = "all groups of the rollout; weighted by their number"
_JUDGED = "groups whose completions are all known to be right or wrong; weighted by their number"
_TRL = "frac_reward_zero_std of TRL's GRPOTrainer"


def _metric(question: str, formula: str, high: str, low: str, **other: str) -> Metric:
    fixed = {
        "unit": "1",
        "estimator": _JUDGED,
        "cost": "O(completions), nothing beside the rewards themselves",
        "source": "DAPO (2025), arXiv 2503.14476, Section 3.2: such groups have no gradient",
    }
    return Metric(question=question, formula=formula, high=high, low=low, **{**fixed, **other})


METRICS: Final[Mapping[str, Metric]] = {
    "group/no_spread/share": _metric(
        "How many groups have no differences in reward to learn from?",
        "share of groups whose rewards have a standard deviation of 0 (up to 1e-8); a group with "
        "fewer than two scored completions counts as one that has differences, as in TRL; absent "
        "for groups of one, where TRL writes 1",
        "most of the batch is wasted: prompts too easy or too hard, or collapse",
        "most groups carry a signal",
        estimator=_GROUPS,
        source=f"{_TRL} with scale_rewards group or none, but in float64: in float32 equal rewards "
        "that are no short binary fractions, such as seven times 10.1, often seem to differ",
    ),
    "group/all_correct/share": _metric(
        "How many prompts are solved by every completion?",
        "share of groups with pass rate 1",
        "prompts have become too easy: harder ones are due",
        "few prompts are mastered",
    ),
    "group/all_wrong/share": _metric(
        "How many prompts are solved by no completion?",
        "share of groups with pass rate 0",
        "prompts are too hard, the verifier is broken, or the policy collapsed",
        "nearly every prompt is within reach",
    ),
    "group/mixed/share": _metric(
        "How many prompts are solved by some completions and not by others?",
        "share of groups with a pass rate between 0 and 1",
        "most prompts teach",
        "most prompts teach nothing",
    ),
    "group/reward/std/mean": _metric(
        "How much do completions of one prompt differ in reward?",
        "mean over groups of sqrt(sum (r - mean r)^2 / (n - 1)), n the scored completions of the "
        "group",
        "completions of a prompt differ: a strong signal",
        "completions of a prompt are alike: advantages divided by this are noise",
        unit="reward",
        estimator="groups with at least two scored completions; weighted by their number",
        source="The divisor of GRPO's advantage, as TRL's nanstd",
    ),
    "group/reward/between_std": _metric(
        "How much do prompts differ in reward?",
        "standard deviation of the groups' mean rewards, with g - 1 in the divisor for g groups; "
        "absent below two",
        "the batch mixes easy and hard prompts",
        "prompts are equally hard",
        unit="reward",
        estimator="groups with at least one scored completion; weighted by their number; groups of "
        "other ranks are not compared",
        source="Between-group part of the analysis of variance",
    ),
    "group/unscorable/share": _metric(
        "How many groups hold a completion that could not be scored?",
        "share of groups with a NaN reward",
        "the scorer fails: timeouts, parse errors, or a component that applies to few prompts",
        "every completion is scored",
        estimator=_GROUPS,
        source="Rows that TRL's GRPOTrainer gives an advantage of 0",
    ),
}


def has_no_spread(reward: Tensor) -> Tensor:
    """Which groups have rewards that are all the same?

    True where the standard deviation of the scored rewards is 0 by `torch.isclose`.

    Args:
        reward: ``[groups, G]``; NaN is left out.

    Returns:
        ``[groups]`` bool; false below two scored rewards, as in TRL.

    Device: the input's; no host synchronisation.
    Cost: O(groups * G).
    Source: ``frac_reward_zero_std`` of TRL's GRPOTrainer is its mean.

    Example:
        >>> has_no_spread(torch.tensor([[0.1, 0.1], [0.0, 1.0], [1.0, torch.nan]]))
        tensor([ True, False, False])
    """
    spread = scored_std(reward)
    return torch.isclose(spread, torch.zeros_like(spread))


def group_correctness(correct: Tensor) -> tuple[Tensor, Tensor]:
    """Which prompts are solved always, never, or sometimes?

    Args:
        correct: ``[groups, G]``: 1 right, 0 wrong, NaN not known.

    Returns:
        ``[3, groups]`` bool: all right, all wrong, mixed; and ``[groups]`` bool, which of them are
        known in full: the others belong nowhere.

    Device: the input's; no host synchronisation.
    Cost: O(groups * G).

    Example:
        >>> kinds, known = group_correctness(torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
        >>> kinds.int().tolist(), known.tolist()
        ([[1, 0], [0, 0], [0, 1]], [True, True])
    """
    known = ~correct.isnan().any(-1)
    right, wrong = (correct == 1).all(-1), (correct == 0).all(-1)
    return torch.stack([right, wrong, known & ~right & ~wrong]), known


@diagnostic(
    reads="rollout",
    every={"fast": 1, "balanced": 1, "full": 1},
    floor=50,
    metrics=METRICS,
)
class GroupRewards(Diagnostic):
    """Groups without differences in reward, and how rewards spread within and between groups."""

    def measure(self, reading: RolloutReading, state: Any) -> tuple[list[Block], Any]:
        """Compare the completions of each prompt of one rollout, where its groups are known."""
        size = reading.group_size
        if size is None:
            return [], state
        return _reward_block(reading, size) + _correctness_block(reading, size), state


def _reward_block(reading: RolloutReading, size: int) -> list[Block]:
    if reading.reward is None:
        return []
    reward = reading.reward.view(-1, size)
    scored = ~reward.isnan()
    groups = torch.ones_like(reward[:, 0])
    several, some = scored.sum(-1) > 1, scored.any(-1)
    means = torch.where(some, weighted_mean(reward, scored), torch.nan)
    judged = groups if size > 1 else torch.zeros_like(groups)
    values = {
        "no_spread/share": (share_where(has_no_spread(reward), judged), judged.sum()),
        "unscorable/share": (share_where(~scored.all(-1), groups), groups.sum()),
        "reward/std/mean": (weighted_mean(scored_std(reward), several), several.sum()),
        "reward/between_std": (scored_std(means), torch.where(some.sum() > 1, some.sum(), 0)),
    }
    return [
        Block.metrics(
            [f"group/{name}" for name in values],
            torch.stack([value for value, _ in values.values()]),
            weight=torch.stack([weight.float() for _, weight in values.values()]),
        )
    ]


def _correctness_block(reading: RolloutReading, size: int) -> list[Block]:
    if reading.correct is None:
        return []
    kinds, known = group_correctness(reading.correct.view(-1, size))
    names = [f"group/{name}/share" for name in ("all_correct", "all_wrong", "mixed")]
    return [Block.metrics(names, share_where(kinds, known.float()), weight=known.sum().float())]
