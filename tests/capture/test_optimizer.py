from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from entropylens.capture.optimizer import (
    OptimizerTap,
    _bias_corrections,
    named_optimizers,
    unwrap_optimizer,
)
from entropylens.registry import GradientReading, UpdateReading


class Events:
    def __init__(self, *wanted: str) -> None:
        self.due: dict[str, Any] = dict.fromkeys(wanted, ())
        self.taken: dict[str, Any] = {}

    def wants_update(self) -> bool:
        return "update" in self.due

    def take(self, reads: str, reading: Any) -> None:
        if isinstance(reading, GradientReading):
            # The step goes on to change them: a fused one writes them back without the loss scale.
            gradients = {name: value.clone() for name, value in reading.gradients.items()}
            reading = replace(reading, gradients=gradients)
        self.taken[reads] = reading


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
    _, tap = trained(events, clip=0.5)
    reading = events.taken["gradients"]
    assert isinstance(reading, GradientReading)
    assert set(reading.gradients) == {"weight"}
    assert reading.gradients["weight"].norm().item() == pytest.approx(0.5, rel=1e-4)
    assert tap.rates == [0.1, 0.5]
    assert reading.clipped


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
    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise RuntimeError("no step")

    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    events = Events("update")
    optimizer = Failing([parameter], lr=0.1)
    tap = OptimizerTap(optimizer, events, {}, unguarded)
    with pytest.raises(RuntimeError, match="no step"):
        optimizer.step()
    assert tap._before is not None
    events.due = {}
    with pytest.raises(RuntimeError, match="no step"):
        optimizer.step()
    assert tap._before is None


@pytest.mark.parametrize("as_keyword", [True, False])
def test_with_a_closure_gradients_and_parameters_are_those_it_leaves(as_keyword: bool) -> None:
    """Lightning's automatic optimisation and LBFGS run forward and backward within the step."""
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    events = Events("gradients", "update", "step")
    tap = OptimizerTap(optimizer, events, {id(model.weight): "weight"}, unguarded)
    inputs = torch.ones(4, 3)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(inputs).sum()
        loss.backward()
        return loss

    before = model.weight.detach().clone()
    loss = optimizer.step(closure=closure) if as_keyword else optimizer.step(closure)
    assert loss is not None
    gradients = events.taken["gradients"].gradients
    assert torch.equal(gradients["weight"], torch.full((1, 3), 4.0))
    update = events.taken["update"]
    assert torch.equal(update.before["weight"], before)
    assert torch.equal(update.after["weight"], before - 2.0)
    assert tap.rates == [0.5]
    assert (tap.calls, tap.skipped()) == (1, 0.0)


def test_of_the_many_calls_of_a_closure_the_first_is_read() -> None:
    parameter = nn.Parameter(torch.tensor([3.0]))
    optimizer = torch.optim.LBFGS([parameter], max_iter=5)
    events = Events("gradients", "update")
    OptimizerTap(optimizer, events, {id(parameter): "x"}, unguarded)
    calls = 0

    def closure() -> torch.Tensor:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = (parameter**2).sum()
        loss.backward()
        if calls == 1:
            seen.append(float(parameter.detach()))
        return loss

    seen: list[float] = []
    optimizer.step(closure)
    assert calls > 1
    assert events.taken["update"].before["x"].item() == seen[0] == 3.0


@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("overflow", [False, True])
def test_a_fused_step_shows_its_skip_and_its_gradients_without_the_loss_scale(
    unscaled: bool, overflow: bool
) -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    events = Events("gradients", "step", "update")
    tap = OptimizerTap(optimizer, events, {id(model.weight): "weight"}, unguarded)
    loss = model(torch.ones(2, 3)).sum() * (torch.inf if overflow else 1.0)
    scaler.scale(loss).backward()
    if unscaled:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    skipped = tap.skipped()
    assert isinstance(skipped, torch.Tensor)
    assert skipped.item() == overflow
    update = events.taken["update"]
    moved = torch.equal(update.before["weight"], update.after["weight"])
    assert moved == overflow
    if not overflow:
        gradient = events.taken["gradients"].gradients["weight"]
        assert torch.allclose(gradient, torch.full((1, 3), 2.0))


def test_a_step_that_a_scaler_does_not_make_is_skipped_once_it_is_known_to_be_called() -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    tap = OptimizerTap(optimizer, Events("step"), {}, unguarded)
    said = []
    for factor in (torch.inf, 1.0, torch.inf):
        tap.begin_step()
        tap.is_expected = True
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(2, 3)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        said.append(tap.skipped())
    assert said == [None, 0.0, 1.0]
    tap.begin_step()
    assert tap.skipped() is None


def test_optimisers_are_named_and_a_single_one_is_not() -> None:
    first, second = (torch.optim.SGD([nn.Parameter(torch.ones(1))]) for _ in range(2))
    assert named_optimizers(None) == {}
    assert named_optimizers(first) == named_optimizers([first]) == {"": first}
    assert named_optimizers([first, second]) == {"optimizer0": first, "optimizer1": second}
    assert list(named_optimizers({"generator": first, "critic": second})) == ["generator", "critic"]
    with pytest.raises(TypeError, match=r"a wrapper of one, got str"):
        named_optimizers({"generator": first, "critic": "none"})


def stepped(make: Callable[[list[Any]], torch.optim.Optimizer], steps: int = 3) -> Any:
    """The update reading of the last of some steps, whose gradients are 1, 2, 3, ..."""
    weight, bias = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(4))
    names = {id(weight): "weight", id(bias): "bias"}
    optimizer, events = make([weight, bias]), Events()
    tap = OptimizerTap(optimizer, events, names, unguarded)
    for number in range(1, steps + 1):
        weight.grad, bias.grad = torch.full_like(weight, number), torch.full_like(bias, -number)
        tap.begin_step()
        if number == steps:
            events.due = {"update": ()}
        optimizer.step()
    return events.taken["update"]


def second_moment(beta: float, steps: int) -> float:
    found = 0.0
    for number in range(1, steps + 1):
        found = beta * found + (1 - beta) * number**2
    return found


ADAM: Mapping[str, Any] = {
    "adamw": torch.optim.AdamW,
    "fused": lambda p, **more: torch.optim.AdamW(p, fused=True, **more),
    "amsgrad": lambda p, **more: torch.optim.AdamW(p, amsgrad=True, **more),
    "foreach": lambda p, **more: torch.optim.Adam(p, foreach=True, **more),
    "nadam": torch.optim.NAdam,
}


@pytest.mark.parametrize("kind", ADAM)
def test_second_moments_are_those_after_the_step_with_what_divides_them(kind: str) -> None:
    reading = stepped(lambda p: ADAM[kind](p, lr=0.1, betas=(0.9, 0.99)))
    assert set(reading.second_moments) == set(reading.bias_corrections) == {"weight", "bias"}
    for name, sign in (("weight", 1.0), ("bias", -1.0)):
        assert reading.gradients[name].unique().item() == 3 * sign
        moment = reading.second_moments[name]
        assert moment.shape == reading.before[name].shape
        assert moment.unique().item() == pytest.approx(second_moment(0.99, 3), rel=1e-5)
        assert float(reading.bias_corrections[name]) == pytest.approx(1 - 0.99**3, rel=1e-9)


def test_each_group_has_its_own_beta() -> None:
    def make(parameters: list[Any]) -> torch.optim.Optimizer:
        first: dict[str, Any] = {"params": parameters[:1], "betas": (0.9, 0.5)}
        return torch.optim.AdamW([first, {"params": parameters[1:]}])

    reading = stepped(make)
    assert reading.bias_corrections["weight"] == pytest.approx(1 - 0.5**3)
    assert reading.bias_corrections["bias"] == pytest.approx(1 - 0.999**3)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adafactor, torch.optim.Muon])
def test_an_optimiser_without_plain_second_moments_has_none(optimizer: Any) -> None:
    of_matrices = optimizer is torch.optim.Muon
    reading = stepped(lambda p: optimizer(p[:1] if of_matrices else p, lr=0.1))
    assert reading.second_moments == {}
    assert reading.bias_corrections == {}
    assert reading.gradients["weight"].unique().item() == 3.0


def test_moments_that_are_quantised_factored_or_without_bias_correction_are_told_apart() -> None:
    class Custom(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            weight, bias = self.param_groups[0]["params"]
            self.state[weight]["exp_avg_sq"] = torch.ones(2, 3, dtype=torch.uint8)
            self.state[bias]["exp_avg_sq"] = torch.ones(4)

    reading = stepped(lambda p: Custom(p, lr=0.1))
    assert set(reading.second_moments) == {"bias"}
    assert reading.bias_corrections == {}


class Idle(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        pass


def test_steps_that_live_on_a_device_stay_there() -> None:
    """Of capturable and fused optimisers; meta stands for an accelerator."""
    parameters = [nn.Parameter(torch.ones(2, device="meta")) for _ in range(2)]
    optimizer, events = Idle(parameters, lr=0.1), Events("update")
    OptimizerTap(optimizer, events, {}, unguarded)
    optimizer.param_groups[0]["betas"] = (0.9, 0.99)
    for at, parameter in enumerate(parameters):
        step = torch.zeros((1,) * at, device="meta")
        optimizer.state[parameter] = {"step": step, "exp_avg_sq": torch.zeros_like(parameter)}
    optimizer.step()
    corrections = events.taken["update"].bias_corrections
    assert set(corrections) == {"parameter_0", "parameter_1"}
    assert all(one.device.type == "meta" and one.shape == () for one in corrections.values())


def test_steps_on_a_device_give_what_numbers_give(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = {"a": torch.tensor(1.0), "b": torch.tensor([1000.0])}
    on_host = _bias_corrections(0.999, steps)
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    on_device = _bias_corrections(0.999, steps)
    assert all(isinstance(one, torch.Tensor) for one in on_device.values())
    for name, step in (("a", 1), ("b", 1000)):
        exact = pytest.approx(1 - 0.999**step, rel=1e-12)
        assert float(on_host[name]) == exact
        assert float(on_device[name]) == exact


@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("overflow", [False, True])
def test_gradients_left_by_a_fused_step_bear_no_loss_scale(unscaled: bool, overflow: bool) -> None:
    """torch's fused steps take it off themselves, unless they skip."""
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    optimizer, events = torch.optim.AdamW([first, second], fused=True), Events("update")
    OptimizerTap(optimizer, events, {id(first): "first", id(second): "second"}, unguarded)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loss = 2 * first.sum() + second.sum() * (torch.inf if overflow else 1.0)
    scaler.scale(loss).backward()
    if unscaled:
        scaler.unscale_(optimizer)
    taken: dict[str, torch.Tensor] = {}
    events.take = lambda reads, reading: taken.update(reading.gradients)  # type: ignore[method-assign]
    scaler.step(optimizer)
    assert taken["first"].tolist() == [2.0] * 3


def test_gradients_that_the_step_dropped_are_not_there() -> None:
    class Dropping(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            self.zero_grad()

    assert stepped(lambda p: Dropping(p, lr=0.1)).gradients == {}
