"""A training can be taken back to before an alarm."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from entropylens.control import StepBound, StepGuard
from entropylens.control.ring import Ring


def training() -> tuple[nn.Module, torch.optim.Optimizer, Callable[[int], Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step(number: int) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        x, y = torch.randn(32, 6, generator=generator), torch.randint(4, (32,), generator=generator)
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    return model, optimizer, step


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    moments = [value for one in optimizer.state.values() for value in one.values()]
    return [value.clone() for value in [*model.state_dict().values(), *moments]]


def test_what_is_put_back_trains_on_as_if_nothing_had_happened() -> None:
    model, optimizer, step = training()
    ring = Ring(model, optimizer, 2)
    for number in range(10):
        step(number)
    ring.take(10)
    for number in range(10, 14):
        step(number)
    expected = state(model, optimizer)
    for number in range(100, 105):
        step(number)
    assert ring.rewind(14) == 10
    for number in range(10, 14):
        step(number)
    assert all(map(torch.equal, expected, state(model, optimizer)))
    # The copy is not what the training goes on to write to.
    assert ring.rewind(14) == 10
    for number in range(10, 14):
        step(number)
    assert all(map(torch.equal, expected, state(model, optimizer)))


def test_the_oldest_copy_gives_way_and_newer_ones_are_forgotten() -> None:
    model, optimizer, _ = training()
    ring = Ring(model, optimizer, 2)
    for number in (1, 2, 3):
        ring.take(number)
    assert ring.steps == [2, 3]
    assert ring.rewind(3) == 2
    assert ring.steps == [2]
    with pytest.raises(ValueError, match="expected a copy from before step 2, got none that old"):
        ring.rewind(2)


def test_a_guard_goes_back_to_before_the_row_of_steps_that_it_bounded() -> None:
    model, optimizer, step = training()
    bound = StepBound(mode="enforce", ring=5, ring_every=10, warmup=10)
    guard = StepGuard(model, optimizer, bound)
    for number in range(1, 46):
        for group in optimizer.param_groups:
            group["lr"] = 10.0 if 31 <= number <= 41 else 1e-2
        step(number)
    assert guard.interventions >= 11
    assert guard.rewind() == 30
    guard.close()
    with pytest.raises(ValueError, match=r"expected copies to be kept, got none; use StepBound"):
        guard.rewind()
