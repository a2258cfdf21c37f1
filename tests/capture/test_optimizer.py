from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from entropylens.capture.optimizer import OptimizerTap, unwrap_optimizer
from entropylens.registry import GradientReading, UpdateReading


class Events:
    def __init__(self, *wanted: str) -> None:
        self.wanted = wanted
        self.taken: dict[str, Any] = {}
        self.rates: list[torch.Tensor | float] = []

    def wants(self, reads: str) -> bool:
        return reads in self.wanted

    def take(self, reads: str, reading: Any) -> None:
        self.taken[reads] = reading

    def take_learning_rates(self, rates: list[torch.Tensor | float]) -> None:
        self.rates = rates


def unguarded(where: str, work: Callable[[], None]) -> None:
    work()


def trained(events: Events, *, clip: float | None = None) -> tuple[nn.Linear, OptimizerTap]:
    model = nn.Linear(3, 2)
    frozen, weight = model.bias, model.weight
    frozen.requires_grad_(False)
    groups: list[dict[str, Any]] = [{"params": [weight]}, {"params": [frozen], "lr": 0.5}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    names = {id(p): n for n, p in model.named_parameters()}
    tap = OptimizerTap(optimizer, events, names, unguarded)
    model(torch.ones(4, 3)).sum().backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return model, tap


def test_gradients_are_read_as_the_optimiser_uses_them() -> None:
    events = Events("gradients", "step")
    _, _ = trained(events, clip=0.5)
    reading = events.taken["gradients"]
    assert isinstance(reading, GradientReading)
    assert set(reading.gradients) == {"weight"}
    assert reading.gradients["weight"].norm().item() == pytest.approx(0.5, rel=1e-4)
    assert events.rates == [0.1, 0.5]


def test_the_update_is_what_the_step_did_to_trainable_parameters() -> None:
    events = Events("update")
    model, _ = trained(events)
    reading = events.taken["update"]
    assert isinstance(reading, UpdateReading)
    assert set(reading.before) == {"weight"}
    assert torch.equal(reading.after["weight"], model.weight)
    assert model.weight.grad is not None
    moved = reading.before["weight"] - reading.after["weight"]
    assert torch.allclose(moved, 0.1 * model.weight.grad, atol=1e-6)


def test_nothing_is_copied_where_nothing_is_due() -> None:
    events = Events()
    _, tap = trained(events)
    assert events.taken == {}
    assert tap._before is None


def test_hooks_go_when_removed() -> None:
    events = Events("gradients", "update", "step")
    _model, tap = trained(events)
    tap.remove()
    assert not tap._optimizer._optimizer_step_pre_hooks
    assert not tap._optimizer._optimizer_step_post_hooks


def test_a_wrapper_is_unwrapped_and_anything_else_refused() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)

    class Wrapper:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer

    assert unwrap_optimizer(Wrapper(Wrapper(optimizer))) is optimizer
    with pytest.raises(
        TypeError, match=r"expected a torch.optim.Optimizer or a wrapper .* got int"
    ):
        unwrap_optimizer(3)


def test_a_step_that_raised_leaves_no_copy_for_the_next_ones_update() -> None:
    events = Events("update")
    _, tap = trained(events)
    tap._pre()
    assert tap._before is not None
    events.wanted = ()
    tap._pre()
    assert tap._before is None
