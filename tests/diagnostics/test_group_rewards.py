import math
from statistics import fmean, stdev
from typing import Any

import pytest
import torch

from entropylens.diagnostics.group_rewards import GroupRewards, group_correctness, has_no_spread
from entropylens.registry import RolloutReading

NAN = float("nan")


def measured(reading: RolloutReading) -> dict[str, Any]:
    blocks, _ = GroupRewards().measure(reading, None)
    found: dict[str, Any] = {}
    for block in blocks:
        names, values = block.columns["name"], block.columns["value"]
        weights = block.columns["weight"].expand(len(names))
        columns = zip(names, values.tolist(), weights.tolist(), strict=True)
        found |= {name: (value, weight) for name, value, weight in columns if weight > 0}
    return found


def rollout(groups: list[list[float]], *, correct: bool = False) -> RolloutReading:
    flat = torch.tensor(groups).flatten()
    size = len(groups[0])
    if correct:
        return RolloutReading(correct=flat, group_size=size)
    return RolloutReading(reward=flat, group_size=size)


def frac_reward_zero_std(reward: torch.Tensor) -> float:
    """As TRL's GRPOTrainer computes it, in float64, over completions rather than groups."""
    grouped = reward.double()
    mean = torch.nanmean(grouped, dim=1, keepdim=True)
    count = (~grouped.isnan()).sum(1, keepdim=True)
    correction = torch.where(count > 1, count / (count - 1), NAN)
    std = (torch.nanmean((grouped - mean) ** 2, dim=1, keepdim=True) * correction).sqrt()[:, 0]
    std = std.repeat_interleave(reward.shape[1])
    return torch.isclose(std, torch.zeros_like(std)).float().mean().item()


def test_groups_are_counted_apart_by_their_correctness() -> None:
    found = measured(rollout([[1, 1], [0, 0], [0, 1], [1, 0], [0, 0], [1, NAN]], correct=True))
    assert found == {
        "group/all_correct/share": (pytest.approx(1 / 5), 5.0),
        "group/all_wrong/share": (pytest.approx(2 / 5), 5.0),
        "group/mixed/share": (pytest.approx(2 / 5), 5.0),
    }


def test_every_known_group_is_of_exactly_one_kind() -> None:
    generator = torch.Generator().manual_seed(5)
    correct = torch.randint(0, 2, (300, 3), generator=generator).float()
    correct[torch.rand(300, 3, generator=generator) < 0.1] = NAN
    kinds, known = group_correctness(correct)
    assert kinds.sum(0).tolist() == known.int().tolist()
    for row, kind in zip(correct.tolist(), kinds.T.tolist(), strict=True):
        if not any(map(math.isnan, row)):
            rate = sum(row) / 3
            assert kind == [rate == 1, rate == 0, 0 < rate < 1]


def test_the_share_without_spread_is_trls_number() -> None:
    generator = torch.Generator().manual_seed(6)
    reward = torch.randint(0, 2, (400, 3), generator=generator).float()
    reward[torch.rand(400, 3, generator=generator) < 0.2] = NAN
    found = measured(RolloutReading(reward=reward.flatten(), group_size=3))
    share, weight = found["group/no_spread/share"]
    assert share == pytest.approx(frac_reward_zero_std(reward))
    assert weight == 400


def test_rewards_alike_at_any_level_have_no_spread_and_a_small_difference_is_one() -> None:
    alike = torch.full((1, 7), 10.1)
    assert has_no_spread(alike).item()
    apart = alike.clone()
    apart[0, 3] += 1e-5
    assert not has_no_spread(apart).item()


def test_spread_within_and_between_groups_equals_plain_statistics() -> None:
    groups = [[0.1, 0.5, 0.4], [2.0, NAN, 3.0], [NAN, NAN, 7.0], [NAN, NAN, NAN]]
    scored = [[0.1, 0.5, 0.4], [2.0, 3.0], [7.0]]
    found = measured(rollout(groups))
    within = fmean([stdev(scored[0]), stdev(scored[1])])
    assert found["group/reward/std/mean"] == (pytest.approx(within, rel=1e-6), 2.0)
    between = stdev([fmean(group) for group in scored])
    assert found["group/reward/between_std"] == (pytest.approx(between, rel=1e-6), 3.0)
    assert found["group/unscorable/share"] == (0.75, 4.0)
    assert found["group/no_spread/share"] == (0.0, 4.0)


def test_the_order_of_groups_and_of_their_members_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(7)
    reward = torch.randn(20, 4, generator=generator)
    reward[:5] = 1.0
    one = measured(RolloutReading(reward=reward.flatten(), group_size=4))
    shuffled = reward[torch.randperm(20, generator=generator)].flip(1)
    other = measured(RolloutReading(reward=shuffled.flatten(), group_size=4))
    assert one["group/no_spread/share"][0] == 0.25
    assert {k: v[0] for k, v in other.items()} == pytest.approx({k: v[0] for k, v in one.items()})


def test_groups_of_one_have_no_spread_to_speak_of() -> None:
    found = measured(rollout([[1.0], [0.0], [NAN]]))
    assert set(found) == {"group/reward/between_std", "group/unscorable/share"}
    assert found["group/reward/between_std"] == (pytest.approx(stdev([1.0, 0.0])), 2.0)


def test_one_group_is_not_compared_with_others() -> None:
    assert "group/reward/between_std" not in measured(rollout([[1.0, 0.0]]))


def test_what_is_not_known_at_all_is_not_written() -> None:
    assert measured(RolloutReading()) == {}
    assert measured(rollout([[NAN, NAN]], correct=True)) == {}
    unscored = measured(rollout([[NAN, NAN]]))
    assert unscored == {"group/no_spread/share": (0.0, 1.0), "group/unscorable/share": (1.0, 1.0)}
