"""The steps of real optimisers are bounded, and nothing else of a training is touched."""

import gc
import weakref
from collections.abc import Callable
from copy import deepcopy
from math import inf, nan, pi
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from untouched import tiny

from entropylens.capture.call import Call
from entropylens.capture.probe import Batch
from entropylens.capture.tokens import Grid
from entropylens.control import Action, StepBound, StepGuard
from entropylens.control.looking import Looker
from entropylens.control.ranks import stacked
from entropylens.control.signals import SCALES

DOUBLE = torch.float64
CLASSES = 4
Make = Callable[[nn.Module], torch.optim.Optimizer]


def bound_of(**settings: Any) -> StepBound:
    known = {"mode": "enforce", "warmup": 5, "every": 1, "settle": 3, "gradient_factor": 5.0,
             "loss_factor": 3.0, "deviations": 8.0}  # fmt: skip
    return StepBound(**{**known, **settings})


def perceptron(dtype: torch.dtype = DOUBLE) -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, CLASSES))
    return nn.Sequential(*layers).to(dtype)


def normed() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, CLASSES))
    return nn.Sequential(*layers).double()


def linear(dtype: torch.dtype = DOUBLE) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(6, CLASSES).to(dtype)


def batch(number: int, dtype: torch.dtype = DOUBLE) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(32, 6, generator=generator, dtype=DOUBLE)
    return x.to(dtype), (x[:, :CLASSES] + 0.3).argmax(1)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def fused(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-2, fused=True)


class Loop:
    """A plain training whose gradients, rates and batches may be tampered with."""

    def __init__(
        self, model: nn.Module, make: Make, bound: StepBound | None, **options: Any
    ) -> None:
        self.model, self.make, self.optimizer = model, make, make(model)
        self.actions: list[Action] = []
        self.messages: list[str] = []
        self.guard = None
        if bound is not None:
            options = {"report": self.report, "run": run, **options}
            self.guard = StepGuard(model, self.optimizer, bound, **options)

    def report(self, action: Action | None, message: str) -> None:
        if action is None:
            self.messages.append(message)
        else:
            self.actions.append(action)

    def step(self, number: int, *, gradient: float = 1.0, rate: float = 1.0, **shown: Any) -> None:
        x, y = batch(
            number,
            next(
                p.dtype for p in self.model.parameters() if p.requires_grad or p.is_floating_point()
            ),
        )
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] * rate
        self.optimizer.zero_grad()
        loss = cross_entropy(self.model(x), y)
        (loss * gradient).backward()
        if self.guard is not None:
            self.guard.observe(**{"targets": y, "loss": loss, **shown})
        self.optimizer.step()
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] / rate

    def after(self, count: int) -> "Loop":
        for number in range(count):
            self.step(number)
        return self

    def unbounded(self) -> "Loop":
        """The same training as it is now, without a guard."""
        twin = Loop(deepcopy(self.model), self.make, None)
        for module in twin.model.modules():
            module._forward_hooks.clear()
        twin.optimizer.load_state_dict(deepcopy(self.optimizer.state_dict()))
        return twin


def run(where: str, work: Callable[[], None]) -> None:
    work()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [
        torch.as_tensor(value).clone()
        for one in optimizer.state.values()
        for value in one.values()
        if value is not None
    ]


def are_equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def are_near(one: list[Tensor], other: list[Tensor], rtol: float = 1e-9) -> bool:
    near = (
        torch.allclose(a, b, rtol=rtol, atol=rtol * 1e-3) for a, b in zip(one, other, strict=True)
    )
    return all(near)


def gradient_norms(count: int, make: Make = adamw) -> list[float]:
    twin, found = Loop(perceptron(), make, None), []
    for number in range(count):
        twin.step(number)
        norms = [p.grad.norm() for p in twin.model.parameters() if p.grad is not None]
        found.append(torch.stack(norms).norm().item())
    return found


# -- updates are scaled ----------------------------------------------------------------------------


def two_rates(model: nn.Module) -> torch.optim.Optimizer:
    first, *others = model.parameters()
    groups: Any = [{"params": [first], "lr": 1e-3}, {"params": others}]
    return torch.optim.AdamW(groups, lr=1e-2)


def tensor_rate(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=torch.tensor(1e-2))


def frozen_first(model: nn.Module) -> torch.optim.Optimizer:
    next(model.parameters()).requires_grad_(False)
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


@pytest.mark.parametrize("make", [sgd, adamw, fused, two_rates, tensor_rate, frozen_first])
@pytest.mark.parametrize("policy", ["combined", "update_norm", "radius", "radius_relative"])
def test_a_spike_of_the_rate_scales_the_whole_update_and_leaves_the_moments(
    make: Make, policy: str
) -> None:
    loop = Loop(perceptron(), make, bound_of(policy=policy, level=2.0)).after(14)
    assert loop.actions == []
    twin = loop.unbounded()
    before = weights(loop.model)
    twin.step(14, rate=1000.0)
    loop.step(14, rate=1000.0)
    (action,) = loop.actions
    assert (action.step, action.mode) == (15, "enforce")
    assert 0 < action.scale < 0.1
    expected = [
        start + action.scale * (end - start)
        for start, end in zip(before, weights(twin.model), strict=True)
    ]
    assert are_near(weights(loop.model), expected, 1e-13)
    assert are_equal(moments(loop.optimizer), moments(twin.optimizer))


def test_the_typical_size_is_the_median_of_those_before() -> None:
    loop = Loop(perceptron(), adamw, bound_of(loss_factor=1e9))
    sizes = []
    for number in range(14):
        before = weights(loop.model)
        loop.step(number)
        moved = zip(before, weights(loop.model), strict=True)
        sizes.append(torch.stack([(b - a).norm() for a, b in moved]).norm().item())
    before = weights(loop.model)
    loop.step(14, rate=1000.0)
    moved = zip(before, weights(loop.model), strict=True)
    size = torch.stack([(b - a).norm() for a, b in moved]).norm().item()
    (action,) = loop.actions
    assert action.cause == "update norm"
    # Lower median of 14.
    assert size == pytest.approx(sorted(sizes)[6], rel=1e-6)
    assert action.evidence["typical"] == pytest.approx(sorted(sizes)[6], rel=1e-6)
    assert action.evidence["rate"] == pytest.approx(10.0)
    assert action.evidence["highest_rate"] == pytest.approx(1e-2)
    assert action.suspicions == ("rate",)


def spread(model: nn.Module, before: list[Tensor], x: Tensor) -> float:
    """r of a linear model's update, by the logits themselves."""
    old = nn.functional.linear(x, before[0], before[1])
    change = (model(x) - old).detach()
    return float((change.amax(1) - change.amin(1)).max()) / pi


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("level", [0.01, 0.1])
def test_after_capping_r_is_the_level(dtype: torch.dtype, level: float) -> None:
    def fast(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.5)

    loop = Loop(linear(dtype), fast, bound_of(policy="radius", level=level))
    ratios = []
    for number in range(6):
        before = weights(loop.model)
        loop.step(number)
        ratios.append(spread(loop.model, before, batch(number, dtype)[0]))
    capped = {action.step - 1 for action in loop.actions}
    assert len(capped) >= 3
    for number, ratio in enumerate(ratios):
        if number in capped:
            assert ratio == pytest.approx(level, rel=1e-5)
        else:
            assert ratio < level


def test_of_linear_logits_the_linearised_losses_are_the_true_ones_at_every_scale() -> None:
    model = linear()
    x, y = batch(0)
    before = weights(model)
    update = [3.0 * torch.randn_like(p) for p in before]
    grid = Grid(targets=y[:, None], present=torch.ones(32, 1, dtype=torch.bool))
    looked = Looker(model, 0.7, 0).look(
        [*model.parameters()],
        before,
        update,
        Batch(call=Call(module=model, args=(x,)), grid=grid, classes=CLASSES),
        0,
    )
    assert looked is not None
    expected = []
    for scale in SCALES:
        weight, bias = (b + scale * u for b, u in zip(before, update, strict=True))
        expected.append(cross_entropy(nn.functional.linear(x, weight, bias) / 0.7, y).item())
    assert looked[1:].tolist() == pytest.approx(expected, rel=1e-12)
    change = nn.functional.linear(x, *update) / 0.7
    r = (change.amax(1) - change.amin(1)).max().item() / pi
    assert looked[0].item() == pytest.approx(r, rel=1e-12)


def test_rows_of_a_large_batch_are_chosen_by_seed_and_step_alone() -> None:
    model = linear()
    x, y = torch.randn(600, 6, dtype=DOUBLE), torch.randint(CLASSES, (600, 1))
    grid = Grid(targets=y, present=torch.ones_like(y, dtype=torch.bool))
    seen = Batch(call=Call(module=model, args=(x,)), grid=grid, classes=CLASSES)
    before = weights(model)
    update = [torch.ones_like(p) for p in before]
    random = torch.get_rng_state()

    def loss(seed: int, step: int) -> float:
        found = Looker(model, 1.0, seed).look([*model.parameters()], before, update, seen, step)
        assert found is not None
        return found[-1].item()

    assert loss(3, 5) == loss(3, 5)
    assert len({loss(3, 5), loss(3, 6), loss(4, 6)}) == 3
    assert torch.equal(random, torch.get_rng_state())


def test_the_search_goes_where_the_true_loss_of_linear_logits_is_least() -> None:
    def plain(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=40.0)

    loop = Loop(linear(), plain, bound_of(policy="linearised_search"))
    before, twin = weights(loop.model), loop.unbounded()
    twin.step(0)
    x, y = batch(0)
    found = []
    for scale in SCALES:
        pairs = zip(before, weights(twin.model), strict=True)
        weight, bias = (start + scale * (end - start) for start, end in pairs)
        found.append(cross_entropy(nn.functional.linear(x, weight, bias), y).item())
    loop.step(0)
    (action,) = loop.actions
    assert action.scale == SCALES[found.index(min(found))] < 1
    assert action.evidence["loss_with"] == pytest.approx(found[0], rel=1e-6)
    assert action.evidence["loss_without"] == pytest.approx(found[-1], rel=1e-6)
    assert cross_entropy(loop.model(x), y).item() == pytest.approx(min(found), rel=1e-9)


@pytest.mark.filterwarnings("ignore")
def test_a_lora_adapter_alone_is_looked_at_and_scaled() -> None:
    torch.manual_seed(0)
    model: Any = tiny.lora(tiny.llama())
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p.detach().clone() for p in model.parameters() if not p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    actions: list[Action] = []
    bound = bound_of(policy="radius", level=1e-4)
    guard = StepGuard(model, optimizer, bound, report=lambda a, _: actions.append(a), run=run)  # type: ignore[arg-type]
    for ids in (next(tiny.token_batches(seed)) for seed in range(3)):
        before = [p.detach().clone() for p in trained]
        logits = model(input_ids=ids).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        guard.observe(targets=ids[:, 1:], loss=loss)
        optimizer.step()
        optimizer.zero_grad()
    assert guard.looks == 3
    assert actions
    assert all(0 < action.scale < 1 for action in actions)
    assert all("loss_without" in action.evidence for action in actions)
    assert not are_equal(before, [p.detach() for p in trained])
    assert are_equal(frozen, [p.detach() for p in model.parameters() if not p.requires_grad])
    guard.close()


# -- gradients are scaled or dropped ---------------------------------------------------------------


@pytest.mark.parametrize("make", [sgd, adamw, fused])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_gradients_a_thousand_times_too_large_leave_the_moments_of_a_clean_run(
    make: Make, clip: float | None
) -> None:
    """The clean run's gradients have the median norm in that step, and are clipped alike."""
    norms = gradient_norms(30, make) if clip is None else []
    runs = []
    for is_guarded in (True, False):
        loop = Loop(perceptron(), make, bound_of() if is_guarded else None)
        seen: list[float] = []
        for number in range(30):
            x, y = batch(number)
            loop.optimizer.zero_grad()
            loss = cross_entropy(loop.model(x), y)
            loss.backward()
            grads = [p.grad for p in loop.model.parameters() if p.grad is not None]
            size = torch.stack([g.norm() for g in grads]).norm().item()
            if number == 20:
                median = sorted(seen)[(len(seen) - 1) // 2]
                factor = 1000.0 if is_guarded else median / size
                torch._foreach_mul_(grads, factor)
                size *= factor
            seen.append(size)
            if clip is not None:
                torch._foreach_mul_(grads, min(clip / size, 1.0))
            if loop.guard is not None:
                loop.guard.observe(targets=y, loss=loss, gradient_norm=size)
            loop.optimizer.step()
        runs.append(loop)
    guarded, clean = runs
    assert are_near(moments(guarded.optimizer), moments(clean.optimizer), 1e-6)
    assert are_near(weights(guarded.model), weights(clean.model), 1e-6)
    if clip is None:
        (action,) = guarded.actions
        assert (action.step, action.cause) == (21, "gradient")
        assert action.evidence["gradient_norm"] == pytest.approx(1000 * norms[20], rel=1e-6)
        assert action.evidence["typical"] == pytest.approx(sorted(norms[:20])[9], rel=1e-6)
        assert action.scale == pytest.approx(sorted(norms[:20])[9] / norms[20] / 1000, rel=1e-6)
    else:
        assert guarded.actions == []  # they were clipped to their usual size already


@pytest.mark.parametrize("make", [sgd, adamw, fused])
@pytest.mark.parametrize("first", [0, 12])
@pytest.mark.parametrize("value", [nan, inf])
def test_a_gradient_that_is_not_finite_leaves_everything_as_it_was(
    make: Make, first: int, value: float
) -> None:
    loop = Loop(normed(), make, bound_of()).after(first)
    known = deepcopy(loop.model.state_dict())
    before = moments(loop.optimizer)
    loop.step(first, gradient=value)
    found = loop.model.state_dict()
    assert all(torch.equal(found[name], known[name]) for name in known)
    assert are_equal(moments(loop.optimizer), before)
    (action,) = loop.actions
    assert (action.cause, action.scale) == ("gradient not finite", 0.0)
    assert loop.guard is not None
    assert loop.guard.updates == first
    loop.after(20)
    assert len(loop.actions) == 1


def test_a_loop_that_zeroes_gradients_by_hand_finds_them_after_a_step_left_out() -> None:
    loop = Loop(perceptron(), sgd, bound_of()).after(12)
    known = weights(loop.model)
    loop.step(12, gradient=nan)
    gradients = [p.grad for p in loop.model.parameters()]
    assert all(g is not None and bool(g.isnan().any()) for g in gradients)
    assert are_equal(weights(loop.model), known)


class Words(nn.Module):
    """An embedding with sparse gradients, of words that occur several times."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(9, CLASSES, sparse=True, dtype=DOUBLE)

    def forward(self, words: Tensor) -> Tensor:
        return self.embedding(words).sum(1)


def test_sparse_gradients_are_brought_to_their_usual_norm() -> None:
    model = Words()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    actions: list[Any] = []
    guard = StepGuard(
        model, optimizer, bound_of(), report=lambda *told: actions.append(told), run=run
    )
    norms = []
    for number in range(20):
        words = torch.randint(9, (16, 5), generator=torch.Generator().manual_seed(number))
        before = model.embedding.weight.detach().clone()
        optimizer.zero_grad()
        loss = cross_entropy(model(words), words[:, 0] % CLASSES)
        (loss * (1e4 if number == 15 else 1)).backward()
        guard.observe(targets=words[:, 0] % CLASSES, loss=loss)
        optimizer.step()
        norms.append((model.embedding.weight.detach() - before).norm().item() / 0.05)
    ((action, _),) = actions
    assert (action.step, action.cause) == (16, "gradient")
    assert norms[15] == pytest.approx(sorted(norms[:15])[7], rel=1e-9)


def test_norms_on_several_devices_are_put_together_on_the_first() -> None:
    parts = [torch.ones((), device="meta"), torch.ones(())]
    found = stacked(parts)
    assert (found.shape, found.device.type) == ((2,), "meta")
    assert stacked([torch.tensor(1.0), torch.tensor(2.0)]).tolist() == [1.0, 2.0]


def test_a_bad_batch_leaves_no_trace_in_batch_norm() -> None:
    loop = Loop(normed(), adamw, bound_of()).after(12)
    known = {name: value.clone() for name, value in loop.model.state_dict().items()}
    loop.step(12, gradient=1e4)
    found = loop.model.state_dict()
    statistics = [name for name in known if "running" in name or "tracked" in name]
    assert len(statistics) == 3
    assert all(torch.equal(found[name], known[name]) for name in statistics)
    assert not torch.equal(found["0.weight"], known["0.weight"])
    loop.step(13)
    assert not any(torch.equal(found[name], known[name]) for name in statistics)


@pytest.mark.parametrize("make", [sgd, adamw])
def test_a_garbage_batch_leaves_no_trace_at_all(make: Make) -> None:
    """Inputs a thousand times too large: gradients, loss and statistics all show it."""
    loop = Loop(normed(), make, bound_of()).after(14)
    known, before = deepcopy(loop.model.state_dict()), moments(loop.optimizer)
    x, y = batch(14)
    loop.optimizer.zero_grad()
    loss = cross_entropy(50 * loop.model(1000 * x), y)
    loss.backward()
    assert loop.guard is not None
    loop.guard.observe(targets=y, loss=loss)
    loop.optimizer.step()
    assert all(torch.equal(value, known[n]) for n, value in loop.model.state_dict().items())
    assert are_equal(moments(loop.optimizer), before)
    (action,) = loop.actions
    assert (action.cause, action.scale) == ("batch", 0.0)
    assert "statistics" in action.suspicions


def test_batch_norm_that_was_moved_after_the_guard_came_is_looked_after() -> None:
    loop = Loop(normed(), adamw, bound_of()).after(6)
    loop.model.to(torch.float32).to(DOUBLE)
    loop.step(6)
    known = {name: value.clone() for name, value in loop.model.named_buffers()}
    loop.step(7, gradient=nan)
    assert all(torch.equal(value, known[name]) for name, value in loop.model.named_buffers())


@pytest.mark.parametrize("make", [sgd, adamw])
def test_the_skipping_policy_leaves_everything_as_it_was(make: Make) -> None:
    loop = Loop(normed(), make, bound_of(policy="skip")).after(14)
    known = deepcopy(loop.model.state_dict())
    before = moments(loop.optimizer)
    loop.step(14, gradient=1e4)
    assert all(torch.equal(value, known[n]) for n, value in loop.model.state_dict().items())
    assert are_equal(moments(loop.optimizer), before)
    loop.step(15, rate=1e4)
    assert are_equal(weights(loop.model), [known[n] for n, _ in loop.model.named_parameters()])
    assert not are_equal(moments(loop.optimizer), before)
    assert [a.cause for a in loop.actions] == ["gradient", "update norm"]


@pytest.mark.parametrize("make", [sgd, adamw])
def test_forward_and_backward_may_run_within_the_step(make: Make) -> None:
    """A closure: what is done before the optimiser is done when it returns."""
    found = []
    for with_closure in (False, True):
        loop = Loop(perceptron(), make, bound_of())
        for number in range(30):
            x, y = batch(number)

            def closure(
                x: Tensor = x, y: Tensor = y, number: int = number, loop: Loop = loop
            ) -> Tensor:
                loop.optimizer.zero_grad()
                loss = cross_entropy(loop.model(x), y)
                factor = {12: 1000.0, 15: nan}.get(number, 1.0)
                (loss * factor).backward()
                assert loop.guard is not None
                loop.guard.observe(targets=y, loss=loss)
                return loss

            rate = 100.0 if number == 20 else 1.0
            for group in loop.optimizer.param_groups:
                group["lr"] *= rate
            if with_closure:
                loop.optimizer.step(closure)  # type: ignore[arg-type]
            else:
                closure()
                loop.optimizer.step()
            for group in loop.optimizer.param_groups:
                group["lr"] /= rate
        found.append(loop)
    plain, closed = found
    assert [a.step for a in plain.actions] == [13, 16, 21]
    # A norm that is NaN is not equal to itself.
    assert [str(a) for a in closed.actions] == [str(a) for a in plain.actions]
    assert are_equal(weights(plain.model), weights(closed.model))


# -- gradient scalers ------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [sgd, adamw, fused])
def test_a_gradient_scalers_overflow_is_its_own_and_spikes_between_are_bounded(make: Make) -> None:
    """Scaled by 2^10, the losses are what they are without a scaler, to the bit."""
    runs = []
    for has_scaler in (True, False):
        loop = Loop(perceptron(torch.float32), make, bound_of())
        assert loop.guard is not None
        scaler = torch.amp.GradScaler(
            "cpu", init_scale=1024.0, growth_interval=10**6, enabled=has_scaler
        )
        for number in range(25):
            is_overflow, is_spike = number == 12, number == 18
            if is_overflow and not has_scaler:
                continue
            x, y = batch(number, torch.float32)
            loop.optimizer.zero_grad()
            loop.guard.begin()
            loss = cross_entropy(loop.model(x), y)
            factor = inf if is_overflow else 1000.0 if is_spike else 1.0
            scaler.scale(loss * factor).backward()
            loop.guard.observe(targets=y, loss=loss)
            known, before = weights(loop.model), loop.guard.state_dict()["memory"]
            scaler.step(loop.optimizer)
            scaler.update()
            if is_overflow:
                assert are_equal(weights(loop.model), known)
                assert loop.guard.state_dict()["memory"] == before
                assert scaler.get_scale() == 512.0
        runs.append(loop)
    scaled, plain = runs
    assert [a.cause for a in scaled.actions] == ["gradient"]
    assert [a.cause for a in plain.actions] == ["gradient"]
    assert scaled.actions[0].scale == pytest.approx(plain.actions[0].scale, rel=1e-5)
    assert are_near(weights(scaled.model), weights(plain.model), 1e-5)


# -- what a loop shows -----------------------------------------------------------------------------


def test_of_several_micro_batches_losses_are_averaged_and_the_first_is_looked_at() -> None:
    loop = Loop(perceptron(), sgd, bound_of(policy="linearised_search"))
    assert loop.guard is not None
    for group in loop.optimizer.param_groups:
        group["lr"] = 100.0
    first, losses = None, []
    for number in (0, 1):
        x, y = batch(number)
        loss = cross_entropy(loop.model(x), y)
        loss.backward()
        loop.guard.observe(targets=y, loss=loss, sample_id=[number, f"{number}b"])
        losses.append(loss.item())
        first = first or loss.item()
    loop.optimizer.step()
    (action,) = loop.actions
    assert action.evidence["samples"] == ["0", "0b", "1", "1b"]
    assert action.evidence["loss_without"] == pytest.approx(first, rel=1e-6)
    remembered = loop.guard.state_dict()["memory"]["losses"]
    assert remembered == [pytest.approx(sum(losses) / 2, rel=1e-12)]


class Grids(nn.Module):
    """Logits at ``[B, T]`` or ``[B, H, W]``, classes last or, as in torch's losses, second."""

    def __init__(self, *, classes_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.classes_first = nn.Linear(6, CLASSES).double(), classes_first

    def forward(self, x: Tensor) -> Tensor:
        logits = self.layer(x)
        return logits.movedim(-1, 1) if self.classes_first else logits


@pytest.mark.parametrize("shape", [(8,), (8, 5), (8, 3, 5)])
@pytest.mark.parametrize("masked", ["no", "by mask", "by targets"])
def test_targets_of_any_shape_are_looked_at_where_they_count(
    shape: tuple[int, ...], masked: str
) -> None:
    model = Grids(classes_first=len(shape) == 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=100.0)
    actions: list[Any] = []
    bound = bound_of(policy="linearised_search")
    guard = StepGuard(model, optimizer, bound, report=lambda a, _: actions.append(a), run=run)
    x = torch.randn(*shape, 6, dtype=DOUBLE)
    targets, mask = torch.randint(CLASSES, shape), torch.rand(shape) < 0.6
    mask.reshape(8, -1)[:, 0] = True
    mask[2] = False  # a whole row
    if masked == "no":
        mask = torch.ones_like(mask)
    logits = model(x)
    flat = logits.movedim(1, -1) if model.classes_first else logits
    loss = cross_entropy(flat[mask], targets[mask])
    loss.backward()
    if masked == "by targets":
        guard.observe(targets=targets.masked_fill(~mask, -100))
    else:
        guard.observe(targets=targets, mask=mask if masked == "by mask" else None)
    optimizer.step()
    (action,) = actions
    assert action.evidence["loss_without"] == pytest.approx(loss.item(), rel=1e-6)


def test_without_targets_only_sizes_are_known() -> None:
    loop = Loop(perceptron(), adamw, bound_of())
    for number in range(14):
        loop.step(number, targets=None)
    loop.step(14, targets=None, rate=1000.0)
    (action,) = loop.actions
    assert action.cause == "update norm"
    assert "ratio" in action.evidence
    assert "loss_without" not in action.evidence


def test_the_last_ordinary_batch_is_the_witness_not_a_suspicious_one() -> None:
    loop = Loop(perceptron(), adamw, bound_of()).after(14)
    x, y = batch(13)
    expected = []
    for number in (14, 15):
        with torch.no_grad():
            expected.append(cross_entropy(loop.model(x), y).item())
        loop.step(number, gradient=1000.0, rate=1000.0)
    updates = [a for a in loop.actions if a.cause != "gradient"]
    found = [a.evidence["loss_without"] for a in updates]
    assert found == pytest.approx(expected, rel=1e-6)
    assert loop.guard is not None
    assert loop.guard.interventions == 2
    assert loop.guard.looks == 2


def test_what_was_raised_on_purpose_may_be_accepted() -> None:
    loop = Loop(perceptron(), adamw, bound_of()).after(14)
    for group in loop.optimizer.param_groups:
        group["lr"], group["betas"] = 0.05, (0.5, 0.9)
    assert loop.guard is not None
    loop.guard.accept()
    for number in range(14, 20):
        loop.step(number)
    assert loop.actions == []
    assert loop.guard.looks == 0


def test_weights_that_are_unfrozen_as_a_group_of_their_own_train_on() -> None:
    def last(model: nn.Module) -> torch.optim.Optimizer:
        *frozen, weight, bias = model.parameters()
        for parameter in frozen:
            parameter.requires_grad_(False)
        return torch.optim.AdamW([weight, bias], lr=1e-2)

    loop = Loop(perceptron(), last, bound_of()).after(20)
    first = [*loop.model.parameters()][:2]
    for parameter in first:
        parameter.requires_grad_(True)
    loop.optimizer.add_param_group({"params": first})
    for number in range(20, 60):
        loop.step(number)
    assert loop.actions == []
    assert loop.guard is not None
    assert loop.guard.looks == 0


def test_an_optimiser_that_finds_its_own_rate_is_bounded_too() -> None:
    from transformers.optimization import Adafactor

    def own(model: nn.Module) -> torch.optim.Optimizer:
        return Adafactor(model.parameters())

    loop = Loop(perceptron(torch.float32), own, bound_of())
    for number in range(20):
        x, y = batch(number, torch.float32)
        loop.optimizer.zero_grad()
        loss = cross_entropy(loop.model(x), y)
        (loss * (1e4 if number == 15 else 1)).backward()
        assert loop.guard is not None
        loop.guard.observe(targets=y, loss=loss)
        loop.optimizer.step()
    assert [(a.step, a.cause) for a in loop.actions] == [(16, "gradient")]
    assert loop.guard is not None
    assert len(loop.guard.state_dict()["memory"]["updates"]) >= 8


# -- shadow, off, closed ---------------------------------------------------------------------------


def spiky(loop: Loop) -> Loop:
    torch.manual_seed(5)
    for number in range(30):
        gradient = {14: 1000.0, 22: nan}.get(number, 1.0)
        loop.step(number, gradient=gradient, rate=50.0 if number == 18 else 1.0)
    return loop


def dropping() -> nn.Module:
    model = normed()
    assert isinstance(model, nn.Sequential)
    model.insert(3, nn.Dropout(0.2))
    return model


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("policy", ["combined", "radius", "skip"])
def test_in_shadow_a_training_is_the_same_to_the_bit(make: Make, policy: str) -> None:
    bound = bound_of(mode="shadow", policy=policy, level=1e-3)
    watched, bare = spiky(Loop(dropping(), make, bound)), spiky(Loop(dropping(), make, None))
    assert {a.mode for a in watched.actions} == {"shadow"}
    assert {a.step for a in watched.actions} >= {19, 23}
    found, expected = watched.model.state_dict(), bare.model.state_dict()
    same = [torch.equal(found[n].nan_to_num(-7), expected[n].nan_to_num(-7)) for n in expected]
    assert all(same)
    random = torch.get_rng_state()
    spiky(Loop(dropping(), make, None))
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize("make", [sgd, adamw])
def test_in_shadow_a_spike_of_the_gradients_is_told_once_as_where_it_is_enforced(
    make: Make,
) -> None:
    told = []
    for mode in ("shadow", "enforce"):
        loop = Loop(perceptron(), make, bound_of(mode=mode)).after(14)
        loop.step(14, gradient=1000.0)
        told.append([(a.step, a.cause, a.scale, a.suspicions) for a in loop.actions])
    assert told[0] == told[1]
    assert len(told[0]) == 1


def hooks(loop: Loop) -> list[Any]:
    tables = [module._forward_hooks for module in loop.model.modules()]
    tables += [loop.optimizer._optimizer_step_pre_hooks, loop.optimizer._optimizer_step_post_hooks]
    return [hook for table in tables for hook in table.values()]


def test_hooks_are_gone_once_it_is_closed_and_off_installs_none() -> None:
    loop = Loop(perceptron(), adamw, bound_of())
    assert len(hooks(loop)) == 3
    assert loop.guard is not None
    loop.guard.close()
    assert hooks(loop) == []
    loop.step(0, gradient=nan, sample_id=["a"])
    assert loop.actions == []
    assert loop.guard._shown == {}
    off = Loop(perceptron(), adamw, bound_of(mode="off"))
    assert hooks(off) == []
    off.step(0)
    assert off.guard is not None
    assert off.guard._shown == {}
    assert off.guard._looker is None


ROWS, COLUMNS = 37, 41


def copies() -> int:
    """Tensors of the shape of the one trained matrix that are alive."""
    gc.collect()
    tensors = (one for one in gc.get_objects() if issubclass(type(one), Tensor))
    return len({one.data_ptr() for one in tensors if one.shape == (ROWS, COLUMNS)})


def test_no_copy_of_the_parameters_lives_between_steps() -> None:
    torch.manual_seed(0)
    model = nn.Linear(COLUMNS, ROWS, bias=False).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    during: list[int] = []
    guard = StepGuard(
        model,
        optimizer,
        bound_of(policy="radius", level=1e-6),
        report=lambda *_: during.append(copies()),
        run=run,
    )
    x, y = torch.randn(8, COLUMNS).double(), torch.randint(ROWS, (8,))

    def step() -> None:
        optimizer.zero_grad()
        logits = model(x)
        loss = cross_entropy(logits, y)
        loss.backward()
        guard.observe(targets=y, loss=loss)
        optimizer.step()

    for _ in range(4):
        step()
        assert copies() == 2  # the weight and its gradient
    assert len(during) == 4
    assert min(during) >= 4  # and those from before the step, and the update
    guard.close()
    assert copies() == 2


def test_logits_and_inputs_are_let_go() -> None:
    loop = Loop(perceptron(), sgd, bound_of()).after(2)
    assert loop.guard is not None
    x, y = batch(5)
    logits = loop.model(x)
    storage = weakref.ref(logits.untyped_storage())
    cross_entropy(logits, y).backward()
    loop.guard.observe(targets=y)
    del logits
    gc.collect()
    assert storage() is None
    loop.optimizer.step()
    given = weakref.ref(x)
    loop.guard.close()
    del x
    gc.collect()
    assert given() is None


# -- faults ----------------------------------------------------------------------------------------


class Fragile(nn.Module):
    """Refuses to be asked: forwards without gradients fail."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = perceptron()

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            raise RuntimeError("not like this")
        return self.inner(x)


def test_a_fault_while_looking_is_told_and_the_training_goes_on_as_without_a_guard() -> None:
    faults: list[tuple[str, str]] = []

    def caught(where: str, work: Callable[[], None]) -> None:
        try:
            work()
        except RuntimeError as error:
            faults.append((where, str(error)))

    bound = bound_of(policy="radius", level=1e-6)
    loop = Loop(Fragile(), adamw, bound, run=caught).after(12)
    bare = Loop(Fragile(), adamw, None).after(12)
    assert faults == [("step bound: look", "not like this")]
    assert are_equal(weights(loop.model), weights(bare.model))
    assert loop.actions == []


def test_without_anybody_to_tell_a_fault_is_a_warning() -> None:
    model = Fragile()
    optimizer = adamw(model)
    guard = StepGuard(model, optimizer, bound_of(policy="radius"))
    x, y = batch(0)
    cross_entropy(model(x), y).backward()
    with pytest.warns(RuntimeWarning, match="step bound: look: RuntimeError: not like this"):
        optimizer.step()
    guard.close()


@pytest.fixture
def broken_report() -> Callable[[Any, str], None]:
    def report(action: Any, message: str) -> None:
        raise RuntimeError("the disk is full")

    return report


def test_a_report_that_fails_does_not_stop_the_bound(broken_report: Any) -> None:
    """What cannot be told is done nevertheless, or not at all: never by half."""
    faults: list[str] = []

    def caught(where: str, work: Callable[[], None]) -> None:
        try:
            work()
        except RuntimeError as error:
            faults.append(str(error))

    loop = Loop(perceptron(), adamw, bound_of(), report=broken_report, run=caught).after(14)
    before, twin = weights(loop.model), loop.unbounded()
    twin.step(14, rate=1000.0)
    loop.step(14, rate=1000.0)
    assert faults == ["the disk is full"]
    ratios = [
        (end - start).norm() / (whole - start).norm()
        for start, end, whole in zip(before, weights(loop.model), weights(twin.model), strict=True)
    ]
    assert max(ratios) < 0.05
    assert torch.allclose(torch.stack(ratios), ratios[0], rtol=1e-9)
    known = weights(loop.model)
    loop.step(15, gradient=nan)
    assert are_equal(weights(loop.model), known)


def test_a_model_that_cannot_be_asked_is_bounded_by_sizes_alone() -> None:
    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = perceptron()
            codes = torch.ones(2, dtype=torch.int8)
            self.codes = nn.Parameter(codes, requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    loop = Loop(Quantised(), adamw, bound_of()).after(14)
    assert loop.messages == [
        "steps are bounded without looking at logits: its weights are quantised"
    ]
    loop.step(14, rate=1000.0)
    (action,) = loop.actions
    assert action.cause == "update norm"
    assert "ratio" not in action.evidence


def test_an_optimiser_that_searches_along_a_line_is_refused() -> None:
    model = perceptron()
    with pytest.raises(ValueError, match="expected an optimiser that makes one update a step, got "
                       "LBFGS, which searches"):  # fmt: skip
        StepGuard(model, torch.optim.LBFGS(model.parameters()), bound_of())
    with pytest.raises(TypeError, match=r"expected a torch.optim.Optimizer or a wrapper of one"):
        StepGuard(model, object(), bound_of())


# -- resumption ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [9, 14, 16, 19])
def test_a_resumed_training_is_bounded_to_the_bit_as_one_that_was_not(cut: int) -> None:
    whole = spiky(Loop(normed(), adamw, bound_of()))
    first = Loop(normed(), adamw, bound_of())
    parts: list[Action] = []
    loop = first
    for number in range(30):
        if number == cut:
            assert loop.guard is not None
            state = loop.guard.state_dict()
            parts += loop.actions
            again = Loop(deepcopy(loop.model), adamw, None)
            for module in again.model.modules():
                module._forward_hooks.clear()
            again.optimizer.load_state_dict(deepcopy(loop.optimizer.state_dict()))
            guard = StepGuard(
                again.model, again.optimizer, bound_of(), state=state, report=again.report, run=run
            )
            again.guard, loop = guard, again
        gradient = {14: 1000.0, 22: nan}.get(number, 1.0)
        loop.step(number, gradient=gradient, rate=50.0 if number == 18 else 1.0)
    parts += loop.actions
    assert [(a.step, a.cause) for a in parts] == [(a.step, a.cause) for a in whole.actions]
    assert len(parts) >= 3
    if cut != 14:
        assert [a.scale for a in parts] == [a.scale for a in whole.actions]
        assert are_equal(weights(loop.model), weights(whole.model))
