from dataclasses import replace
from typing import Any

import pytest
import torch
from readings import probe
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from entropylens.diagnostics._cells import CELLS
from entropylens.diagnostics.entropy_change import (
    LEAST,
    MEMORY,
    EntropyChange,
    entropy_change,
    entropy_of,
)
from entropylens.registry import ProbeReading


def values_of(reading: ProbeReading, state: Any = None) -> tuple[dict[Any, float], Any]:
    blocks, state = EntropyChange().measure(reading, state)
    found = {}
    for block in blocks:
        if block.table != "metrics":
            continue
        names, modules = block.columns["name"], block.columns["module"]
        weights = block.columns["weight"].expand(len(names))
        modules = [modules] * len(names) if isinstance(modules, str) else modules
        for name, module, value, weight in zip(
            names, modules, block.columns["value"].tolist(), weights.tolist(), strict=True
        ):
            if weight > 0:
                found[name, module] = value
    return found, state


def entropy(logits: Tensor) -> Tensor:
    return torch.distributions.Categorical(logits=logits).entropy()


def test_the_discriminator_is_minus_the_gradient_of_the_entropy() -> None:
    """I1 of the theory, and I2: S is bounded below and sums to 0."""
    logits = 3 * torch.randn(20, 9, generator=torch.Generator().manual_seed(0)).double()
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(entropy(logits).sum(), logits)
    found, discriminator = entropy_of(logits.detach())
    assert torch.allclose(found, entropy(logits.detach()), atol=1e-14)
    assert torch.allclose(discriminator, -gradient, atol=1e-14)
    assert torch.allclose(discriminator.sum(-1), torch.zeros(20).double(), atol=1e-14)
    assert bool((discriminator >= -torch.exp(-1 - found)[:, None] - 1e-15).all())


def test_the_predicted_change_is_the_covariance_of_lemma_1() -> None:
    """I3: dH = -Cov_p(log p, dz)."""
    generator = torch.Generator().manual_seed(1)
    before, direction = (torch.randn(30, 12, generator=generator) for _ in range(2))
    predicted, *_ = entropy_change(before, before, direction)
    logp = before.double().log_softmax(-1)
    p, dz = logp.exp(), direction.double()
    means = [(p * value).sum(-1, keepdim=True) for value in (logp, dz)]
    covariance = (p * (logp - means[0]) * (dz - means[1])).sum(-1)
    assert torch.allclose(predicted, -covariance, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-2, 1e-4])
def test_prediction_and_measurement_part_with_the_square_of_the_step(scale: float) -> None:
    generator = torch.Generator().manual_seed(2)
    before, direction = (torch.randn(50, 30, generator=generator).double() for _ in range(2))
    predicted, measured, _ = entropy_change(before, before + scale * direction, scale * direction)
    assert torch.allclose(measured, entropy(before + scale * direction) - entropy(before))
    assert float((predicted - measured).abs().max()) < 2 * scale**2 * 8


def test_extrapolated_is_first_order_in_the_logits_and_exact_in_the_softmax() -> None:
    generator = torch.Generator().manual_seed(3)
    before, direction = (torch.randn(20, 9, generator=generator) for _ in range(2))
    _, _, extrapolated = entropy_change(before, before, 3 * direction)
    expected = entropy((before + 3 * direction).double()) - entropy(before.double())
    assert torch.allclose(extrapolated, expected, atol=1e-6)
    even = torch.zeros(1, 2)
    _, measured, moved = entropy_change(even, torch.tensor([[1.0, 0]]), torch.tensor([[1.0, 0]]))
    assert moved == measured < -0.1
    sure = torch.tensor([[3.0, 0.0, 0.0]])
    predicted, _, bounded = entropy_change(sure, sure, torch.tensor([[9.0, 0.0, 0.0]]))
    assert predicted < -entropy(sure).item() < bounded


def test_masked_classes_and_certain_distributions_are_no_nan() -> None:
    before = torch.tensor([[0.0, 1.0, -torch.inf], [200.0, 0.0, 0.0]])
    direction = torch.tensor([[0.1, 0.0, 0.0], [1.0, 0.0, 0.0]])
    predicted, measured, _ = entropy_change(before, before + direction, direction)
    assert bool(predicted.isfinite().all() & measured.isfinite().all())
    assert predicted[1].abs() < 1e-30


def test_states_without_weight_count_for_nothing() -> None:
    reading = probe()
    nothing = torch.arange(24) % 3 == 0
    broken = reading.before.clone()
    broken[nothing] = torch.nan
    weighted = replace(reading, before=broken, weight=(~nothing).float() * 2)
    found, _ = values_of(weighted)
    predicted, measured, _ = entropy_change(reading.before, reading.after, reading.direction)
    kept = ~nothing
    assert found["entropy/change/predicted", ""] == pytest.approx(float(predicted[kept].mean()))
    assert found["entropy/change/measured", ""] == pytest.approx(float(measured[kept].mean()))
    pair = torch.stack([predicted[kept], measured[kept]])
    assert found["entropy/change/state/correlation", "exact"] == pytest.approx(
        float(torch.corrcoef(pair)[0, 1]), abs=1e-6
    )


def test_the_four_cells_and_the_tokens_without_advantage_add_up() -> None:
    reading = probe()
    assert reading.advantage is not None
    advantage = reading.advantage.clone()
    advantage[:5] = 0.0
    found, _ = values_of(replace(reading, advantage=advantage))
    predicted, *_ = entropy_change(reading.before, reading.after, reading.direction)
    cells = sum(found[f"entropy/change/at/{cell}", ""] for cell in CELLS)
    assert cells + float(predicted[:5].sum() / 24) == pytest.approx(
        found["entropy/change/predicted", ""], rel=1e-5
    )
    logp = reading.before.double().log_softmax(-1)
    rows = torch.arange(24)
    discriminator = logp.exp() * (logp + entropy(reading.before.double())[:, None])
    excess = discriminator[rows, reading.token_id] - (logp.exp() * discriminator).sum(-1)
    one = (advantage > 0) & (excess > 0)
    assert found["entropy/change/at/positive_above", ""] == pytest.approx(
        float(predicted[one].sum() / 24), rel=1e-5
    )


def test_a_sampled_token_that_is_masked_is_in_a_cell() -> None:
    before = torch.tensor([[0.0, -torch.inf, 1.0], [0.0, 1.0, 2.0], [0.0, 1.0, 0.0]])
    direction = torch.tensor([0.1, 0.0, -0.1]).expand(3, 3)
    reading = replace(
        probe(rows=3, vocabulary=3),
        before=before,
        after=before + direction,
        direction=direction,
        token_id=torch.tensor([1, 2, 1]),
        advantage=torch.tensor([1.0, 1.0, -1.0]),
    )
    found, _ = values_of(reading)
    parts = [found[f"entropy/change/at/{cell}", ""] for cell in CELLS]
    assert sum(parts) == pytest.approx(found["entropy/change/predicted", ""], rel=1e-5)
    predicted, *_ = entropy_change(before, before, direction)
    assert found["entropy/change/at/positive_below", ""] == pytest.approx(float(predicted[0] / 3))


def test_slopes_are_those_of_least_squares_that_forgets() -> None:
    state, x, y = None, [], []
    for step in range(12):
        reading = probe()
        direction = 1e-3 * reading.direction * (1 + step % 5)
        factor = 2 if step < 6 else 3
        shifted = replace(reading, direction=direction, after=reading.before + factor * direction)
        found, state = values_of(shifted, state)
        x.append(found["entropy/change/predicted", ""])
        y.append(found["entropy/change/measured", ""])
        for name in ("slope", "correlation"):
            assert ((f"entropy/change/fit/{name}", "exact") in found) == (step + 1 >= LEAST)
    one_another = torch.tensor([x, y]).double()
    weights = torch.tensor([MEMORY ** (11 - step) for step in range(12)]).double()
    covariance = torch.cov(one_another, aweights=weights, correction=0)
    slope = float(covariance[0, 1] / covariance[0, 0])
    assert found["entropy/change/fit/slope", "exact"] == pytest.approx(slope, rel=1e-4)
    plain = torch.cov(one_another)
    assert abs(float(plain[0, 1] / plain[0, 0]) / slope - 1) > 0.003
    correlation = float(covariance[0, 1] / (covariance[0, 0] * covariance[1, 1]).sqrt())
    assert found["entropy/change/fit/correlation", "exact"] == pytest.approx(correlation, abs=1e-4)


def test_measurements_that_hardly_differ_have_no_slope() -> None:
    state: Any = None
    for _ in range(9):
        found, state = values_of(probe(), state)
    assert not any("fit" in name for name, _ in found)


def test_every_estimate_is_compared_with_its_own_sign() -> None:
    reading = probe(rows=200)
    generator = torch.Generator().manual_seed(7)
    token = torch.multinomial(reading.before.softmax(-1), 1, generator=generator)[:, 0]
    advantage = torch.randn(200, generator=generator)
    p = reading.before.double().softmax(-1)
    step = 1e-3 * advantage[:, None] * (torch.nn.functional.one_hot(token, 30) - p)
    reading = replace(
        reading,
        token_id=token,
        advantage=advantage,
        log_ratio=None,
        direction=step.float(),
        after=reading.before.double() + step,
    )
    found, _ = values_of(reading)
    measured = entropy(reading.before.double() + step) - entropy(reading.before.double())
    logp = reading.before.double().log_softmax(-1)
    h, lp = -(p * logp).sum(-1), logp.gather(1, token[:, None])[:, 0]
    own, a = lp.exp() * (lp + h), advantage.double()
    expected = (p * p * (logp + h[:, None])).sum(-1)
    estimates = {
        "exact": -(p * (logp + h[:, None]) * step).sum(-1),
        "discriminator": -a * (own - expected),
        "steer": -a * (1 - lp.exp()) * own,
        "natural_gradient": -a * (lp + h),
        "clip_b": -a * own,
        "steer_released": -a / lp.exp() * (1 - lp.exp()) * own,
        "token_covariance": -(lp - lp.mean()) * (a - a.mean()),
    }
    for name, estimate in estimates.items():
        correlation = float(torch.corrcoef(torch.stack([estimate, measured]))[0, 1])
        value = found["entropy/change/state/correlation", name]
        assert value == pytest.approx(correlation, abs=1e-3), name
        assert value > 0.3, name
    assert found["entropy/change/state/correlation", "discriminator"] > 0.999


def test_the_rows_of_the_tokens_table_are_those_that_change_most() -> None:
    reading = probe(rows=60)
    nothing = torch.arange(60) % 3 == 0
    direction = torch.where(nothing[:, None], 50.0, 1.0) * reading.direction
    direction[0] = torch.nan
    unweighted = replace(reading, direction=direction, weight=(~nothing).float())
    blocks, _ = EntropyChange().measure(unweighted, None)
    rows = next(block for block in blocks if block.table == "tokens").columns
    predicted, *_ = entropy_change(reading.before, reading.after, reading.direction)
    largest = predicted[~nothing].abs().sort(descending=True).values[:16].float()
    assert torch.equal(rows["predicted_entropy_change"].abs(), largest)
    assert bool(rows["present"].all())
    assert set(rows["selection"]) == {"change"}
    logp = reading.before.log_softmax(-1)
    place = rows["sequence"] * 6 + rows["position"]
    assert reading.token_id is not None
    assert torch.allclose(rows["logprob"], logp[place, reading.token_id[place]])
    assert torch.allclose(rows["entropy"], entropy(reading.before)[place])


def test_no_more_logits_than_a_block_are_ever_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            found = function(*args, **(kwargs or {}))
            if isinstance(found, Tensor) and found.dtype == torch.float64:
                sizes.append(found.numel())
            return found

    reading = probe(rows=40, vocabulary=100)
    whole, _ = values_of(reading)
    monkeypatch.setattr("entropylens.diagnostics.entropy_change._BLOCK", 500)
    with Sizes():  # type: ignore[no-untyped-call]
        found, _ = values_of(reading)
    assert max(sizes) == 500
    assert found == pytest.approx(whole, rel=1e-6)


def test_outside_of_reinforcement_learning_the_exact_direction_stands_alone() -> None:
    found, _ = values_of(replace(probe(), advantage=None, log_ratio=None, clip=None))
    modules = {module for name, module in found if name == "entropy/change/state/correlation"}
    assert modules == {"exact", "extrapolated"}
    assert not any("/at/" in name for name, _ in found)
