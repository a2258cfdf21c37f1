from collections import Counter
from fractions import Fraction
from itertools import product
from math import comb, log
from typing import Any

import pytest
import torch

from entropylens.diagnostics.pass_at_k import PassAtK, answer_counts, pass_at_k
from entropylens.registry import RolloutReading

NAN = float("nan")


def measured(reading: RolloutReading) -> dict[str, Any]:
    blocks, _ = PassAtK().measure(reading, None)
    found: dict[str, Any] = {}
    for block in blocks:
        names, values = block.columns["name"], block.columns["value"]
        weights = block.columns["weight"].expand(len(names))
        columns = zip(names, values.tolist(), weights.tolist(), strict=True)
        found |= {name: (value, weight) for name, value, weight in columns if weight > 0}
    return found


def exact(right: int, completions: int, attempts: int) -> Fraction:
    return 1 - Fraction(comb(completions - right, attempts), comb(completions, attempts))


@pytest.mark.parametrize("completions", [1, 2, 5, 8, 64, 300])
def test_it_equals_exact_combinatorics(completions: int) -> None:
    right = torch.arange(completions + 1)
    attempts = list(range(1, completions + 1))
    found = pass_at_k(right, completions, attempts)
    for k in {1, 2, 3, completions // 2, completions - 1, completions} & set(attempts):
        expected = [float(exact(c, completions, k)) for c in right.tolist()]
        assert found[k - 1].tolist() == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_it_is_exactly_0_without_and_exactly_1_with_too_few_wrong_completions() -> None:
    found = pass_at_k(torch.arange(11), 10, [1, 3, 10])
    assert found[:, 0].tolist() == [0.0, 0.0, 0.0]
    assert found[1, 8:].tolist() == [1.0] * 3
    assert found[1, 7] < 1
    assert found[2, 1:].tolist() == [1.0] * 10


@pytest.mark.parametrize("chance", [Fraction(1, 7), Fraction(1, 2), Fraction(4, 5)])
def test_its_mean_over_all_outcomes_is_the_chance_of_one_right_in_k(chance: Fraction) -> None:
    size = 6
    outcomes = list(product((0, 1), repeat=size))
    right = torch.tensor([sum(outcome) for outcome in outcomes])
    odds = [chance ** sum(o) * (1 - chance) ** (size - sum(o)) for o in outcomes]
    weight = torch.tensor([float(p) for p in odds], dtype=torch.float64)
    for k, found in zip((1, 2, 4), pass_at_k(right, size, [1, 2, 4]), strict=True):
        expected = float(1 - (1 - chance) ** k)
        assert (found.double() * weight).sum().item() == pytest.approx(expected, rel=1e-6)


def test_attempts_double_up_to_the_size_of_the_group_and_unknown_groups_are_left_out() -> None:
    correct = torch.tensor([[1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, NAN]])
    found = measured(RolloutReading(correct=correct.flatten(), group_size=6))
    assert found == {
        f"pass_at/{k}": (pytest.approx(float((exact(1, 6, k) + 1) / 2)), 2.0) for k in (1, 2, 4)
    }


def test_more_attempts_never_pass_less_and_one_attempt_is_the_pass_rate() -> None:
    generator = torch.Generator().manual_seed(8)
    correct = (torch.rand(50, 16, generator=generator) < 0.2).float()
    found = measured(RolloutReading(correct=correct.flatten(), group_size=16))
    chances = [found[f"pass_at/{k}"][0] for k in (1, 2, 4, 8, 16)]
    assert chances == sorted(chances)
    assert chances[0] == pytest.approx(correct.mean().item())
    assert chances[-1] == pytest.approx(correct.any(1).float().mean().item())


def test_answers_equal_a_count_in_python() -> None:
    generator = torch.Generator().manual_seed(9)
    answer = torch.randint(-3, 4, (40, 9), generator=generator) * 2**40
    correct = (torch.rand(40, 9, generator=generator) < 0.4).float()
    correct[3, 2] = NAN
    found = measured(
        RolloutReading(answer=answer.flatten(), correct=correct.flatten(), group_size=9)
    )
    distinct, majority, entropy, right = [], [], [], []
    for answers, flags in zip(answer.tolist(), correct.tolist(), strict=True):
        counts = Counter(answers)
        distinct.append(len(counts))
        majority.append(max(counts.values()) / 9)
        entropy.append(sum(-c / 9 * log(c / 9) for c in counts.values()))
        if all(flag in (0.0, 1.0) for flag in flags):
            right.append(len({a for a, flag in zip(answers, flags, strict=True) if flag == 1}))
    assert len(right) == 39
    assert found["answer/distinct/mean"] == (pytest.approx(sum(distinct) / 40), 40.0)
    assert found["answer/distinct/share"] == (pytest.approx(sum(distinct) / 360), 40.0)
    assert found["answer/majority/share"] == (pytest.approx(sum(majority) / 40), 40.0)
    assert found["answer/entropy/mean"] == (pytest.approx(sum(entropy) / 40, rel=1e-6), 40.0)
    assert found["answer/correct_distinct/mean"] == (pytest.approx(sum(right) / 39), 39.0)


def test_counts_are_those_of_comparing_every_pair() -> None:
    generator = torch.Generator().manual_seed(10)
    answer = torch.randint(0, 5, (30, 7), generator=generator)
    counts = answer_counts(answer, torch.ones_like(answer, dtype=torch.bool))
    same = (answer[:, :, None] == answer[:, None, :]).sum(-1)
    assert torch.equal((counts**2).sum(-1), same.sum(-1).float())
    assert torch.equal(counts.amax(-1), same.amax(-1).float())


def test_all_alike_and_all_different_are_the_extremes() -> None:
    alike = measured(RolloutReading(answer=torch.full((8,), 5), group_size=8))
    assert [alike[f"answer/{name}"][0] for name in ("distinct/mean", "entropy/mean")] == [1, 0]
    assert alike["answer/majority/share"][0] == 1
    different = measured(RolloutReading(answer=torch.arange(8), group_size=8))
    assert different["answer/distinct/share"][0] == 1
    assert different["answer/entropy/mean"][0] == pytest.approx(log(8))
    assert different["answer/majority/share"][0] == 1 / 8


def test_the_same_number_in_two_groups_is_not_the_same_answer() -> None:
    answer = torch.tensor([1, 2, 2, 1])
    one = measured(RolloutReading(answer=answer, group_size=2))
    assert one["answer/distinct/mean"] == (2.0, 2.0)


def test_what_is_not_known_is_not_written() -> None:
    assert measured(RolloutReading(correct=torch.tensor([NAN, 1.0]), group_size=2)) == {}
    lone = measured(RolloutReading(correct=torch.ones(3), answer=torch.arange(3), group_size=1))
    assert lone == {"pass_at/1": (1.0, 3.0)}
    unjudged = measured(RolloutReading(answer=torch.arange(4), group_size=2))
    assert "answer/correct_distinct/mean" not in unjudged
