from dataclasses import replace

import pytest
import torch
from readings import policy

from entropylens.diagnostics.entropy_between_rollouts import EntropyBetweenRollouts
from entropylens.registry import PolicyReading


def reading(entropy: list[float], weight: list[float]) -> PolicyReading:
    found = policy(rows=1, columns=len(entropy))
    tokens = replace(found.tokens, entropy=torch.tensor(entropy), weight=torch.tensor(weight))
    return replace(found, tokens=tokens)


def changes(*readings: PolicyReading) -> list[float | None]:
    state, told = None, []
    for one in readings:
        (block,), state = EntropyBetweenRollouts().measure(one, state)
        weight = float(block.columns["weight"])
        told.append(float(block.columns["value"]) if weight > 0 else None)
    return told


def test_it_is_the_difference_of_weighted_means_and_absent_in_the_first_step() -> None:
    first = reading([1.0, 3.0, float("nan")], [1.0, 3.0, 0.0])
    second = reading([0.5, 0.5, 9.0], [1.0, 1.0, 0.0])
    third = reading([0.7, 0.0, 0.0], [2.0, 0.0, 0.0])
    assert changes(first, second, third) == [None, -2.0, pytest.approx(0.2)]


def test_a_step_without_tokens_is_passed_over() -> None:
    nothing = reading([1.0, 1.0], [0.0, 0.0])
    assert changes(reading([1.0, 1.0], [1.0, 1.0]), nothing, reading([0.4, 0.6], [1.0, 1.0])) == [
        None,
        None,
        -0.5,
    ]
