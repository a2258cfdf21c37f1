import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from entropylens.diagnostics.preference import Preference, log_ratio, pair_margins
from entropylens.registry import PreferenceReading

NAN = float("nan")
SIDES = ("chosen", "rejected")


def measured(reading: PreferenceReading) -> dict[str, tuple[float, float]]:
    """Value and weight by metric, without what carries no weight."""
    blocks, _ = Preference().measure(reading, None)
    found: dict[str, tuple[float, float]] = {}
    for block in blocks:
        columns = (block.columns["name"], block.columns["value"], block.columns["weight"])
        found |= {n: (float(v), float(w)) for n, v, w in zip(*columns, strict=True) if w > 0}
    return found


def values(reading: PreferenceReading) -> dict[str, float]:
    return {name: value for name, (value, _) in measured(reading).items()}


def compared(pairs: int = 7, seed: int = 0, **known: Any) -> PreferenceReading:
    drawn = torch.Generator().manual_seed(seed)
    n = 2 * pairs
    fields = {
        "logprob": -30 * torch.rand(n, generator=drawn),
        "reference_logprob": -30 * torch.rand(n, generator=drawn),
        "entropy": 20 * torch.rand(n, generator=drawn),
        "tokens": torch.randint(1, 9, (n,), generator=drawn),
        "chosen": torch.arange(n) < pairs,
        "paired": True,
    }
    return PreferenceReading(**{**fields, **known})


def scored(chosen: list[float], rejected: list[float]) -> PreferenceReading:
    reward = torch.tensor(chosen + rejected)
    return PreferenceReading(
        chosen=torch.arange(len(reward)) < len(chosen), paired=True, reward=reward
    )


def test_a_policys_pairs_equal_a_loop_over_them() -> None:
    reading = compared()
    assert reading.logprob is not None
    assert reading.reference_logprob is not None
    assert reading.entropy is not None
    assert reading.tokens is not None
    columns = (reading.logprob, reading.reference_logprob, reading.entropy, reading.tokens)
    rows = list(zip(*(column.double().tolist() for column in columns), strict=True))
    expected: dict[str, tuple[float, float]] = {}
    for side, part in zip(SIDES, (rows[:7], rows[7:]), strict=True):
        tokens = sum(row[3] for row in part)
        expected |= {
            f"preference/{side}/logprob/mean": (sum(r[0] for r in part) / 7, 7),
            f"preference/{side}/log_ratio/mean": (sum(r[0] - r[1] for r in part) / 7, 7),
            f"preference/{side}/entropy/mean": (sum(r[2] for r in part) / tokens, tokens),
        }
    margins = [(c[0] - c[1]) - (r[0] - r[1]) for c, r in zip(rows[:7], rows[7:], strict=True)]
    expected |= {
        "preference/margin/mean": (float(np.mean(margins)), 7),
        "preference/margin/std": (float(np.std(margins)), 7),
        "preference/accuracy": (sum(margin > 0 for margin in margins) / 7, 7),
    }
    found = measured(reading)
    assert found.keys() == expected.keys()
    for name, known in expected.items():
        assert found[name] == pytest.approx(known, rel=1e-6), name
    assert 0 < found["preference/accuracy"][0] < 1


def test_a_reward_models_pairs_in_closed_form() -> None:
    found = measured(scored([3.0, 1.0, 2.0], [1.0, 1.0, 4.0]))
    assert found == {
        "preference/reward/chosen/mean": (2.0, 3),
        "preference/reward/rejected/mean": (2.0, 3),
        "preference/reward/std": (pytest.approx(math.sqrt(8 / 6)), 6),
        "preference/margin/mean": (0.0, 3),
        "preference/margin/std": (pytest.approx(math.sqrt(8 / 3)), 3),
        "preference/accuracy": (pytest.approx(1 / 3), 3),
    }


def test_likelihood_displacement_shows_beside_a_growing_margin() -> None:
    """Both answers became less likely: the margin and the accuracy alone would look well."""
    reading = PreferenceReading(
        chosen=torch.tensor([True, False]),
        paired=True,
        logprob=torch.tensor([-15.0, -40.0]),
        reference_logprob=torch.tensor([-10.0, -10.0]),
    )
    found = values(reading)
    assert found["preference/margin/mean"] == 25
    assert found["preference/accuracy"] == 1
    assert found["preference/chosen/log_ratio/mean"] == -5
    assert found["preference/chosen/logprob/mean"] == -15


def test_a_policy_that_is_its_reference_prefers_nothing() -> None:
    reading = compared()
    found = values(replace(reading, reference_logprob=reading.logprob))
    assert found["preference/margin/mean"] == 0
    assert found["preference/margin/std"] == 0
    assert found["preference/accuracy"] == 0


def test_sequences_that_are_not_paired_have_no_margin() -> None:
    chosen = torch.tensor([True, False, False, True, False])
    logprob = torch.tensor([-1.0, -10.0, -20.0, -3.0, -60.0])
    reading = PreferenceReading(
        chosen=chosen, paired=False, logprob=logprob, reference_logprob=logprob - 2
    )
    assert measured(reading) == {
        "preference/chosen/logprob/mean": (-2, 2),
        "preference/rejected/logprob/mean": (-30, 3),
        "preference/chosen/log_ratio/mean": (2, 2),
        "preference/rejected/log_ratio/mean": (2, 3),
    }


def test_a_side_without_sequences_is_absent() -> None:
    reading = PreferenceReading(
        chosen=torch.tensor([False, False]), paired=False, logprob=torch.tensor([-1.0, -2.0])
    )
    assert measured(reading) == {"preference/rejected/logprob/mean": (-1.5, 2)}


def test_without_a_reference_there_are_no_ratios_and_no_margin() -> None:
    found = measured(compared(reference_logprob=None))
    kinds = ("logprob", "entropy")
    assert found.keys() == {f"preference/{side}/{kind}/mean" for side in SIDES for kind in kinds}


def test_where_nothing_is_known_nothing_is_written() -> None:
    reading = PreferenceReading(chosen=torch.tensor([True, False]), paired=True)
    assert Preference().measure(reading, None) == ([], None)


def test_a_sequence_without_a_scored_token_has_no_part_in_the_entropy() -> None:
    reading = compared(
        pairs=2,
        entropy=torch.tensor([0.0, 6.0, 1.0, 1.0]),
        tokens=torch.tensor([0, 3, 1, 1]),
    )
    assert measured(reading)["preference/chosen/entropy/mean"] == (2.0, 3)
    nothing = replace(reading, tokens=torch.tensor([0, 0, 1, 1]))
    assert "preference/chosen/entropy/mean" not in measured(nothing)


def test_one_pair_has_a_margin_and_no_spread() -> None:
    found = measured(compared(pairs=1))
    assert found["preference/margin/mean"][1] == 1
    assert "preference/margin/std" not in found
    alone = PreferenceReading(chosen=torch.tensor([True]), paired=False, reward=torch.tensor([1.0]))
    assert measured(alone) == {"preference/reward/chosen/mean": (1.0, 1)}


def test_what_the_other_side_holds_does_not_leak() -> None:
    reading = compared()
    assert reading.logprob is not None
    for spoilt in (NAN, math.inf):
        logprob = torch.where(reading.chosen, reading.logprob, spoilt)
        found, clean = values(replace(reading, logprob=logprob)), values(reading)
        for kind in ("logprob", "log_ratio"):
            name = f"preference/chosen/{kind}/mean"
            assert found[name] == clean[name]


def test_a_pair_that_cannot_be_compared_is_neither_right_nor_wrong() -> None:
    found = measured(scored([2.0, NAN, 0.0], [1.0, 0.0, 1.0]))
    assert found["preference/accuracy"] == (0.5, 2)
    assert found["preference/margin/mean"] == (0.0, 2)
    assert found["preference/margin/std"] == (1.0, 2)
    assert found["preference/reward/chosen/mean"] == (1.0, 2)
    assert found["preference/reward/rejected/mean"] == pytest.approx((2 / 3, 3))
    assert found["preference/reward/std"] == pytest.approx((np.std([2, 0, 1, 0, 1]), 5))
    lone = measured(scored([NAN, 3.0], [1.0, 0.0]))
    assert "preference/margin/std" not in lone
    assert lone["preference/margin/mean"] == (3.0, 1)
    unknown = measured(scored([NAN, NAN], [1.0, 0.0]))
    assert unknown.keys() == {"preference/reward/rejected/mean", "preference/reward/std"}


def test_a_sequence_whose_numbers_are_not_known_is_left_out_of_each_mean() -> None:
    whole = compared()
    rows = torch.arange(14) % 7 != 2
    columns = ("chosen", "logprob", "reference_logprob", "entropy", "tokens")
    kept = PreferenceReading(paired=True, **{c: getattr(whole, c)[rows] for c in columns})
    floats = ("logprob", "reference_logprob", "entropy")
    spoilt: dict[str, Any] = {c: torch.where(rows, getattr(whole, c), torch.nan) for c in floats}
    found, expected = measured(replace(whole, **spoilt)), measured(kept)
    assert found.keys() == expected.keys()
    for name, pair in expected.items():
        assert found[name] == pytest.approx(pair), name


def test_the_order_of_pairs_and_one_level_for_all_rewards_change_no_margin() -> None:
    reading = scored([3.0, 1.0, 2.5, 0.0], [1.0, 1.5, 4.0, -2.0])
    assert reading.reward is not None
    order = torch.tensor([2, 0, 3, 1])
    moved = reading.reward[torch.cat([order, order + 4])] + 100
    before, after = values(reading), values(replace(reading, reward=moved))
    for name in ("margin/mean", "margin/std", "accuracy", "reward/std"):
        assert after[f"preference/{name}"] == pytest.approx(before[f"preference/{name}"], rel=1e-6)
    swapped = values(replace(reading, reward=reading.reward.roll(4)))
    assert swapped["preference/margin/mean"] == -before["preference/margin/mean"]
    assert swapped["preference/accuracy"] == 1 - before["preference/accuracy"]


def test_small_differences_of_long_sequences_survive() -> None:
    """In float32 a thousandth of a nat is lost beside a hundred thousand."""
    logprob = torch.tensor([-100_000.0, -100_000.0], dtype=torch.float64)
    reference = logprob - torch.tensor([1e-3, 0.0], dtype=torch.float64)
    ratio = log_ratio(logprob, reference)
    assert pair_margins(ratio).item() == pytest.approx(1e-3, rel=1e-6)


def test_ranks_means_by_weight_are_the_mean_of_all() -> None:
    whole, n = compared(pairs=9), 9
    parts = []
    for at in (slice(0, 2), slice(2, 9)):
        rows = torch.cat([torch.arange(n)[at], torch.arange(n)[at] + n])
        columns = ("chosen", "logprob", "reference_logprob", "entropy", "tokens")
        parts.append(
            measured(
                PreferenceReading(paired=True, **{c: getattr(whole, c)[rows] for c in columns})
            )
        )
    for name, (value, weight) in measured(whole).items():
        if name == "preference/margin/std":
            continue
        total = sum(part[name][1] for part in parts)
        assert total == weight
        mean = sum(v * w for v, w in (part[name] for part in parts)) / total
        assert mean == pytest.approx(value, rel=1e-5), name


def test_an_odd_number_of_rows_is_no_pairs() -> None:
    with pytest.raises(ValueError, match="chosen and rejected rows, got 3"):
        pair_margins(torch.zeros(3))
