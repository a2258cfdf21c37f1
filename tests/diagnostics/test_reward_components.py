from typing import Any

import numpy as np
import pytest
import torch

from entropylens.diagnostics.reward_components import RewardComponents, scored_std
from entropylens.registry import RolloutReading

NAN = float("nan")


def measured(reading: RolloutReading) -> dict[tuple[str, str], Any]:
    blocks, _ = RewardComponents().measure(reading, None)
    found: dict[tuple[str, str], Any] = {}
    for block in blocks:
        names, modules = block.columns["name"], block.columns["module"]
        modules = [modules] * len(names) if isinstance(modules, str) else modules
        columns = zip(names, modules, block.columns["value"], block.columns["weight"], strict=True)
        found |= {(n, m): (float(v), float(w)) for n, m, v, w in columns if w > 0}
    return found


def nanstd_of_trl(values: torch.Tensor) -> torch.Tensor:
    """As trl.trainer.utils.nanstd is written, in float64."""
    values = values.double()
    mean = torch.nanmean(values, dim=-1, keepdim=True)
    variance = torch.nanmean((values - mean) ** 2, dim=-1, keepdim=True)
    count = torch.sum(~torch.isnan(values), dim=-1, keepdim=True)
    correction = count / (count - 1)
    correction = torch.where(count > 1, correction, torch.full_like(correction, NAN))
    return torch.sqrt(variance * correction).squeeze(-1)


def random_rewards(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(11)
    rewards = torch.randn(rows, columns, generator=generator) + 3
    rewards[torch.rand(rows, columns, generator=generator) < 0.3] = NAN
    return rewards


def test_the_standard_deviation_is_that_of_trl_gaps_and_lone_values_included() -> None:
    rewards = random_rewards(200, 5)
    expected = nanstd_of_trl(rewards)
    assert expected.isnan().any()
    assert torch.equal(scored_std(rewards).isnan(), expected.isnan())
    assert torch.allclose(scored_std(rewards), expected.float(), rtol=1e-6, equal_nan=True)


def test_equal_rewards_have_no_deviation_however_large() -> None:
    assert scored_std(torch.full((7,), 10.1)) == 0
    assert scored_std(torch.full((1001,), 1e6 + 0.1)) == 0


def test_totals_equal_numpy_over_the_scored_completions() -> None:
    reward = random_rewards(1, 40)[0]
    found = measured(RolloutReading(reward=reward))
    kept = reward.double().numpy()[~reward.isnan().numpy()]
    expected = {"mean": kept.mean(), "std": kept.std(ddof=1), "min": kept.min(), "max": kept.max()}
    for name, value in expected.items():
        assert found[f"reward/{name}", ""] == (pytest.approx(value, rel=1e-6), len(kept))
    assert len(found) == 4


def test_components_equal_numpy_where_they_applied_under_their_own_name() -> None:
    total, one, other = random_rewards(3, 60)
    found = measured(RolloutReading(reward=total, rewards={"verifier": one, "format": other}))
    r = total.double().numpy()
    for name, part in (("verifier", one), ("format", other)):
        c = part.double().numpy()
        kept, both = c[~np.isnan(c)], ~np.isnan(c) & ~np.isnan(r)
        mean, std = (found[f"reward/component/{s}", name] for s in ("mean", "std"))
        assert mean == (pytest.approx(kept.mean(), rel=1e-6), len(kept))
        assert std == (pytest.approx(kept.std(ddof=1), rel=1e-6), len(kept))
        missing = found["reward/component/missing/share", name]
        assert missing == (pytest.approx(np.isnan(c).mean()), 60)
        expected = np.corrcoef(c[both], r[both])[0, 1]
        correlation = found["reward/component/correlation", name]
        assert correlation == (pytest.approx(expected, abs=1e-6), both.sum())


def test_correlation_is_unknown_where_a_side_is_constant_or_two_completions_are_all() -> None:
    total = torch.tensor([0.0, 1.0, 0.5, NAN])
    constant = torch.full((4,), 0.1)
    two = torch.tensor([0.3, 0.9, NAN, 0.7])
    rounded = torch.tensor([1.0, 1.0 + 2**-23, 1.0, 1.0])
    parts = {"constant": constant, "two": two, "rounded": rounded}
    found = measured(RolloutReading(reward=total, rewards=parts))
    assert not [name for name, _ in found if name == "reward/component/correlation"]
    assert found["reward/component/std", "constant"] == (0.0, 4.0)


def test_a_component_that_never_applied_has_no_mean_but_is_reported_missing() -> None:
    nowhere = torch.full((3,), NAN)
    found = measured(RolloutReading(reward=torch.ones(3), rewards={"nowhere": nowhere}))
    of_it = {name: value for (name, module), value in found.items() if module == "nowhere"}
    assert of_it == {"reward/component/missing/share": (1.0, 3.0)}


def test_a_component_that_applied_once_has_a_mean_and_no_deviation() -> None:
    once = torch.tensor([NAN, 0.5, NAN])
    found = measured(RolloutReading(rewards={"once": once}))
    assert found.keys() == {
        ("reward/component/mean", "once"),
        ("reward/component/missing/share", "once"),
    }


def test_one_scored_completion_has_a_mean_but_no_deviation_and_none_has_nothing() -> None:
    found = measured(RolloutReading(reward=torch.tensor([NAN, 2.0, NAN])))
    assert found == {(f"reward/{name}", ""): (2.0, 1.0) for name in ("mean", "min", "max")}
    assert measured(RolloutReading(reward=torch.full((3,), NAN))) == {}
    assert measured(RolloutReading()) == {}
