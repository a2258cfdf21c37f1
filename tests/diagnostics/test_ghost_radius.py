from dataclasses import replace
from math import pi, sqrt
from typing import Any

import numpy as np
import pytest
import torch
from readings import probe
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from entropylens.analysis.exact_radius import exact_radius
from entropylens.diagnostics import ghost_radius as module
from entropylens.diagnostics.ghost_radius import (
    METRICS,
    GhostRadius,
    binary_radius,
    flips,
    loss_change,
    margin_radius,
    may_flip,
    radius,
    ratio,
    spread,
    weighted_ratio,
)
from entropylens.registry import ProbeReading


def values_of(reading: ProbeReading) -> dict[str, float]:
    blocks, _ = GhostRadius().measure(reading, None)
    found: dict[str, float] = {}
    for block in blocks:
        if block.table == "metrics":
            names, weights = block.columns["name"], block.columns["weight"]
            rows = zip(
                names,
                block.columns["value"].tolist(),
                weights.expand(len(names)).tolist(),
                strict=True,
            )
            found |= {name: value for name, value, weight in rows if weight > 0}
    return found


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def by_loop(z: list[float], dz: list[float]) -> tuple[float, float, float]:
    """r, 1 / rho_margin and the weighted ratio of one state, in plain numbers."""
    kept = [k for k in range(len(z)) if z[k] != -np.inf]
    a = np.array([dz[k] for k in kept])
    p = np.exp([z[k] - max(z) for k in kept])
    p /= p.sum()
    k = int(p.argmax())
    odds = np.log(p[k]) - np.log(np.delete(p, k).sum())
    delta, farthest = a.max() - a.min(), np.abs(a - a[k]).max()
    rho = np.sqrt((pi / delta) ** 2 + (max(odds, 0.0) / farthest) ** 2)
    deviation = np.sqrt((p * a**2).sum() - (p * a).sum() ** 2)
    return float(delta / pi), float(1 / rho), float(2 * deviation / pi)


def test_the_three_ratios_equal_a_loop_over_the_definition() -> None:
    z, dz = random(40, 9, scale=2), random(40, 9, seed=1)
    z[::3, 4], dz[::3, 4] = -torch.inf, 50.0
    expected = [by_loop(*rows) for rows in zip(z.tolist(), dz.tolist(), strict=True)]
    found = torch.stack([ratio(z, dz), 1 / margin_radius(z, dz), weighted_ratio(z, dz)], 1)
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-11)
    assert torch.allclose(radius(z, dz), 1 / found[:, 0])
    assert bool((weighted_ratio(z, dz) <= ratio(z, dz)).all())


def test_two_classes_have_the_exact_radius() -> None:
    z, dz = random(200, 2, scale=4), random(200, 2, seed=1)
    exact = torch.tensor(exact_radius(z.numpy(), dz.numpy()))
    assert torch.allclose(binary_radius(z, dz), exact, rtol=1e-12)
    assert torch.allclose(margin_radius(z, dz), exact, rtol=1e-12)
    gap, speed = z[:, 0] - z[:, 1], dz[:, 0] - dz[:, 1]
    assert torch.allclose(exact, (gap**2 + pi**2).sqrt() / speed.abs())
    with pytest.raises(ValueError, match=r"expected logits \[\.\.\., 2\], got \[4, 3\]"):
        binary_radius(torch.zeros(4, 3), torch.zeros(4, 3))


def nearest_roots(z: np.ndarray[Any, Any], slopes: np.ndarray[Any, Any]) -> Any:
    """``min |log w|`` over the roots of ``sum_k e^z_k w^slope_k``, row by row at once."""
    rows, degree = len(z), int(slopes.max())
    polynomial = np.zeros((rows, degree + 1))
    np.add.at(polynomial, (np.arange(rows)[:, None], slopes), np.exp(z))
    companion = np.zeros((rows, degree, degree))
    companion[:, 1:, :-1] = np.eye(degree - 1)
    companion[:, :, -1] = -polynomial[:, :-1] / polynomial[:, -1:]
    return np.abs(np.log(np.linalg.eigvals(companion).astype(complex))).min(1)


def test_neither_bound_exceeds_the_exact_radius_in_ten_thousand_cases() -> None:
    generator = np.random.default_rng(0)
    tightness = []
    for classes in range(2, 13):
        z = generator.normal(size=(910, classes)) * 10 ** generator.uniform(-1, 0.7, (910, 1))
        slopes = generator.integers(0, 9, (910, classes))
        slopes[:, 0], slopes[:, 1] = 0, 8
        scale = 10 ** generator.uniform(-6, 3, (910, 1))
        exact = torch.tensor(nearest_roots(z, slopes)) / torch.tensor(scale[:, 0])
        order = generator.permutation(classes)
        logits, direction = torch.tensor(z[:, order]), torch.tensor((slopes * scale)[:, order])
        plain, margin = radius(logits, direction), margin_radius(logits, direction)
        assert bool((plain <= margin).all())
        assert bool((margin <= exact * (1 + 1e-6)).all())
        tightness.append(float((exact / plain).min()))
    assert max(tightness) < 1.2


def test_the_margin_bound_is_below_the_exact_radius_where_slopes_are_not_whole() -> None:
    z, dz = random(100, 6, scale=2), random(100, 6, seed=1)
    exact = torch.tensor(exact_radius(z.numpy(), dz.numpy()))
    plain, margin = radius(z, dz), margin_radius(z, dz)
    assert bool(((plain <= margin) & (margin <= exact)).all())
    assert float((margin / plain).mean()) > 1.1


def test_the_ratio_grows_with_the_step_and_the_temperature_divides_it() -> None:
    z, dz = random(30, 8), random(30, 8, seed=1)
    for factor in (-1.0, 1e-4, 1e4):
        assert torch.allclose(ratio(z, factor * dz), abs(factor) * ratio(z, dz), rtol=1e-12)
        assert torch.allclose(
            margin_radius(z, factor * dz), margin_radius(z, dz) / abs(factor), rtol=1e-12
        )
    for temperature in (0.25, 1.0, 8.0):
        found = radius(z / temperature, dz / temperature)
        delta = dz.max(1).values - dz.min(1).values
        assert torch.allclose(found, pi * temperature / delta, rtol=1e-12)


def test_what_moves_all_logits_alike_changes_nothing() -> None:
    z, dz = random(20, 7), random(20, 7, seed=1)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(2))
    for function in (ratio, margin_radius, weighted_ratio, may_flip):
        expected = function(z, dz)
        assert torch.allclose(function(z + 30, dz - 20), expected, rtol=1e-10)
        assert torch.allclose(function(z[:, order], dz[:, order]), expected, rtol=1e-12)


def test_the_loss_of_a_binary_model_has_a_taylor_series_up_to_the_radius_and_no_further() -> None:
    z, dz = torch.tensor([1.5, -0.5]).double(), torch.tensor([0.4, -1.1]).double()
    limit = float(binary_radius(z, dz))
    weights, slopes = z.softmax(0).numpy(), dz.numpy() * limit
    # Coefficients of log F by dividing series: n l_n = n f_n - sum_j j l_j f_(n-j), f_0 = 1.
    terms = weights * np.ones(2)
    series, coefficients = [1.0], [0.0]
    for n in range(1, 200):
        terms = terms * slopes / n
        series.append(terms.sum())
        known = sum(j * coefficients[j] * series[n - j] for j in range(1, n))
        coefficients.append(series[n] - known / n)

    def error(share: float, count: int) -> float:
        partial = sum(c * share**n for n, c in enumerate(coefficients[:count]))
        return abs(partial - float(np.log(weights @ np.exp(slopes * share))))

    assert error(0.9, 200) < 1e-8 < 1e-3 < error(0.9, 20)
    assert error(-0.9, 200) < 1e-8
    assert error(1.1, 200) > 1e4 > error(1.1, 100) > error(1.1, 20)
    # A step of r = 1 is shorter than that: the bound leaves out the margin.
    assert float(radius(z, dz)) < limit


def test_the_weighted_ratio_is_the_divergence_of_the_step_to_third_order() -> None:
    """Both statements hold, each of its own divergence: the paper's does not bound ours, nor ours
    the other."""
    generator = torch.Generator().manual_seed(0)
    skew = (1 - 1 / sqrt(3)) / 2
    odds = torch.tensor([[0.0, np.log(skew / (1 - skew))], [0.0, np.log((1 - skew) / skew)]])
    worst = torch.cat([odds, torch.full((2, 3), -40.0)], 1).double()
    z = torch.cat([worst.repeat(100, 1), random(2000, 5, scale=2)])
    dz = torch.rand(2200, 5, generator=generator).double() * torch.logspace(-2, 1, 2200)[:, None]
    dz[:200] = torch.tensor([0.0, 1.0, 0.5, 0.5, 0.5]) * dz[:200].amax(1, keepdim=True)
    old, new = z.log_softmax(1), (z + dz).log_softmax(1)
    square = (pi * weighted_ratio(z, dz) / 2) ** 2 / 2
    cubes = spread(z, dz) ** 3 / sqrt(3)
    before_after = (old.exp() * (old - new)).sum(1)
    after_before = (new.exp() * (new - old)).sum(1)
    assert bool(((before_after - square).abs() <= cubes / 36 + 1e-15).all())
    assert bool(((after_before - square).abs() <= cubes / 18 + 1e-15).all())
    assert float(((before_after - square).abs() * 36 / cubes).max()) > 0.9
    assert float(((after_before - square).abs() * 36 / cubes).max()) > 1.8


def test_a_flip_is_another_class_above_and_needs_a_margin_below_the_spread() -> None:
    z, dz = random(4000, 6), random(4000, 6, seed=1, scale=0.4)
    expected = (z + dz).argmax(1) != z.argmax(1)
    found = flips(z, z + dz)
    assert torch.equal(found, expected.double())
    assert 0.05 < float(found.mean()) < 0.9
    two = z.topk(2, 1).values
    possible = two[:, 0] - two[:, 1] < pi * ratio(z, dz)
    assert torch.equal(may_flip(z, dz), possible.double())
    assert bool((found <= possible).all())
    assert float(possible.double().mean()) < 0.99
    # Best against runner-up: a step of just over the margin flips, one of just under it does not.
    sure = torch.tensor([[1.0, 0.0, -5.0]]).double()
    for size, answer in ((0.51, 1.0), (0.49, 0.0)):
        step = size * torch.tensor([[-1.0, 1.0, 0.0]]).double()
        assert flips(sure, sure + step).item() == may_flip(sure, step).item() == answer


def test_small_steps_flip_what_float32_cannot_tell_apart() -> None:
    z = torch.tensor([[10.0, 10.0 - 1e-6, 0.0], [10.0, 10.0, 0.0]])
    direction = torch.tensor([[0.0, 1e-9, 0.0], [0.0, 1e-9, 0.0]])
    reading = replace(probe(rows=2, vocabulary=3), before=z, after=z, direction=direction)
    assert values_of(reading)["ghost/flip/predicted/share"] == 0.5


def test_the_loss_changes_as_its_gradient_and_as_cross_entropy_say() -> None:
    z, dz = random(50, 8, scale=2).requires_grad_(), 1e-4 * random(50, 8, seed=1)
    target = torch.randint(0, 8, (50,), generator=torch.Generator().manual_seed(2))

    def losses(logits: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits, target, reduction="none")

    (gradient,) = torch.autograd.grad(losses(z).sum(), z)
    after = z.detach() + 3 * dz
    predicted, measured = loss_change(z.detach(), after, dz, target)
    assert torch.allclose(predicted, (gradient * dz).sum(1), atol=1e-15)
    assert torch.allclose(measured, losses(after) - losses(z.detach()), atol=1e-14)
    masked = z.detach().clone()
    masked[0, target[0]] = -torch.inf
    for change in loss_change(masked, masked, dz, target):
        assert change.isnan().tolist() == [True] + [False] * 49


def test_classes_that_are_masked_or_move_alike_are_no_nan() -> None:
    z = torch.tensor([[1.0, 0.0, -torch.inf], [2.0, -torch.inf, -torch.inf], [3.0, 2.0, 1.0]])
    dz = torch.tensor([[1.0, 2.0, torch.nan], [5.0, torch.inf, 9.0], [0.1, 0.1, 0.1]])
    assert spread(z, dz).tolist() == [1.0, 0.0, 0.0]
    assert radius(z, dz).tolist() == [pi, torch.inf, torch.inf]
    assert margin_radius(z, dz).tolist() == pytest.approx([np.hypot(pi, 1), np.inf, np.inf])
    assert weighted_ratio(z, dz)[1:].tolist() == pytest.approx([0.0, 0.0], abs=1e-8)
    assert may_flip(z, dz).tolist() == [0.0, 0.0, 0.0]
    certain = torch.tensor([[200.0, 0.0, 0.0]]).double(), torch.tensor([[1.0, 0, 0]]).double()
    expected = np.hypot(pi, 200 - np.log(2))
    assert margin_radius(*certain).item() == pytest.approx(expected, rel=1e-12)
    lone = torch.tensor([[3.0]]), torch.tensor([[2.0]])
    assert margin_radius(*lone).item() == torch.inf
    pair = torch.tensor([[0.0, -torch.inf]]), torch.tensor([[1.0, 7.0]])
    assert binary_radius(*pair).item() == torch.inf


def test_what_is_not_a_number_is_not_made_one() -> None:
    z = torch.tensor([[0.0, 1.0], [torch.nan, 0.0], [-torch.inf, -torch.inf], [0.0, 1.0]])
    dz = torch.tensor([[torch.nan, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    for function in (spread, ratio, margin_radius, weighted_ratio, may_flip, binary_radius):
        assert function(z, dz).isnan().tolist() == [True, True, True, False]
    assert flips(z, z + dz).isnan().tolist() == [True, True, True, False]
    assert flips(z, torch.zeros(4, 2)).isnan().tolist() == [False, True, False, False]


def test_what_is_written_are_quantiles_and_shares_by_weight() -> None:
    reading = replace(
        probe(),
        before=4 * probe().before,
        direction=70 * probe().direction,
        weight=torch.arange(24) % 4.0,
    )
    found = values_of(reading)
    counts = (torch.arange(24) % 4).numpy()

    def repeated(values: Tensor) -> Any:
        return np.repeat(values.double().numpy(), counts)

    z, dz = reading.before.double(), reading.direction.double()
    r, margin = repeated(ratio(z, dz)), repeated(1 / margin_radius(z, dz))
    assert found["ghost/ratio/max"] == pytest.approx(r.max(), rel=1e-6)
    assert found["ghost/radius/min"] == pytest.approx(1 / r.max(), rel=1e-6)
    assert found["ghost/margin_ratio/max"] == pytest.approx(margin.max(), rel=1e-6)
    # Hazen's points are the middles of the weights, so that copies are no more than one point.
    order = np.argsort(ratio(z, dz).numpy())
    middles = counts[order].cumsum() - counts[order] / 2
    kept = counts[order] > 0
    for level in (50, 95):
        expected = np.interp(
            level / 100 * counts.sum(), middles[kept], ratio(z, dz).numpy()[order][kept]
        )
        assert found[f"ghost/ratio/p{level}"] == pytest.approx(expected, rel=1e-5)
    assert found["ghost/margin_ratio/p95"] < found["ghost/margin_ratio/max"]
    assert found["ghost/margin_ratio/p95"] < found["ghost/ratio/p95"]
    assert found["ghost/weighted_ratio/p95"] < found["ghost/ratio/p95"]
    assert found["ghost/above_one/share"] == pytest.approx((r > 1).mean())
    assert 0 < found["ghost/above_one/share"] < 1
    share = repeated(flips(z, z + dz)).mean()
    assert found["ghost/flip/predicted/share"] == pytest.approx(share)
    assert found["ghost/flip/measured/share"] == pytest.approx(
        repeated(flips(z, reading.after.double())).mean()
    )
    assert found["ghost/flip/possible/share"] == pytest.approx(repeated(may_flip(z, dz)).mean())
    assert found["ghost/states"] == 18
    assert reading.token_id is not None
    changes = loss_change(z, reading.after.double(), dz, reading.token_id)
    for name, change in zip(("predicted", "measured"), changes, strict=True):
        assert found[f"ghost/loss_change/{name}"] == pytest.approx(repeated(change).mean(), 1e-5)
    assert set(found) == set(METRICS)


def test_states_without_weight_count_for_nothing() -> None:
    reading = probe()
    nothing = torch.arange(24) % 3 == 0
    broken: dict[str, Any] = {
        name: torch.where(nothing[:, None], torch.nan, getattr(reading, name))
        for name in ("before", "after", "direction")
    }
    found = values_of(replace(reading, **broken, weight=(~nothing).float() * 2))
    kept: dict[str, Any] = {
        name: getattr(reading, name)[~nothing]
        for name in ("before", "after", "direction", "weight", "token_id", "position", "sequence")
    }
    assert found == pytest.approx(values_of(replace(reading, **kept)), rel=1e-6)
    assert found["ghost/states"] == 16
    assert values_of(replace(reading, weight=torch.zeros(24))) == {}


def test_an_update_that_moves_nothing_has_no_radius() -> None:
    reading = replace(probe(), direction=torch.full((24, 30), 0.5))
    found = values_of(reading)
    assert found["ghost/ratio/max"] == found["ghost/margin_ratio/max"] == 0.0
    assert "ghost/radius/min" not in found
    assert found["ghost/flip/predicted/share"] == 0.0


def test_states_that_are_not_a_number_show() -> None:
    reading = probe()
    direction = reading.direction.clone()
    direction[5] = torch.nan
    found = values_of(replace(reading, direction=direction))
    for name in ("ratio/max", "above_one/share", "flip/predicted/share", "loss_change/predicted"):
        assert np.isnan(found[f"ghost/{name}"]), name
    assert np.isfinite(found["ghost/loss_change/measured"])
    assert "ghost/radius/min" not in found


def test_without_targets_and_for_masked_ones_the_loss_is_not_known() -> None:
    reading = probe()
    unknown = replace(reading, token_id=None)
    found, whole = values_of(unknown), values_of(reading)
    missing = {"ghost/loss_change/predicted", "ghost/loss_change/measured"}
    assert set(whole) - set(found) == missing
    assert found == pytest.approx({name: whole[name] for name in found})
    blocks, _ = GhostRadius().measure(unknown, None)
    rows = next(block for block in blocks if block.table == "tokens").columns
    assert not {"token_id", "logprob"} & set(rows)
    before = reading.before.clone()
    before[:4, 0] = -torch.inf
    masked = replace(reading, before=before, after=before + reading.direction)
    zeros = torch.zeros(24, dtype=torch.long)
    changes = loss_change(masked.before, masked.after, masked.direction, zeros)
    found = values_of(masked)
    for name, change in zip(("predicted", "measured"), changes, strict=True):
        assert found[f"ghost/loss_change/{name}"] == pytest.approx(float(change[4:].mean()))
    every = torch.zeros(24, 30)
    every[:, 0] = -torch.inf
    assert not missing & set(values_of(replace(reading, before=every, after=every)))


def test_the_rows_of_the_tokens_table_are_the_tightest_states() -> None:
    reading = probe(rows=60)
    nothing = torch.arange(60) % 3 == 0
    direction = torch.where(nothing[:, None], 50.0, 1.0) * reading.direction
    direction[0] = torch.nan
    token_id = torch.arange(60) % 30
    weighted = replace(reading, direction=direction, weight=(~nothing).float(), token_id=token_id)
    blocks, _ = GhostRadius().measure(weighted, None)
    rows = next(block for block in blocks if block.table == "tokens").columns
    expected = ratio(reading.before, reading.direction)[~nothing].sort(descending=True).values
    assert torch.allclose(rows["ghost_ratio"], expected[:16].float())
    assert bool(rows["present"].all())
    assert set(rows["selection"]) == {"radius"}
    place = rows["sequence"] * 6 + rows["position"]
    logp = reading.before.log_softmax(-1)
    assert torch.equal(rows["token_id"], token_id[place])
    assert torch.allclose(rows["logprob"], logp[place, token_id[place]])
    assert torch.allclose(rows["entropy"], -(logp.exp() * logp).sum(-1)[place])
    assert rows["sample_id"].values is reading.sample_ids
    assert torch.equal(rows["sample_id"].index, rows["sequence"])
    masked = reading.before.clone()
    masked[:, 3] = -torch.inf
    blocks, _ = GhostRadius().measure(replace(weighted, before=masked), None)
    rows = next(block for block in blocks if block.table == "tokens").columns
    kept = torch.distributions.Categorical(logits=masked[:, [*range(3), *range(4, 30)]])
    place = rows["sequence"] * 6 + rows["position"]
    assert torch.allclose(rows["entropy"], kept.entropy()[place])
    few, _ = GhostRadius().measure(replace(probe(rows=3), sample_ids=None), None)
    columns = next(block for block in few if block.table == "tokens").columns
    assert len(columns["ghost_ratio"]) == 3
    assert "sample_id" not in columns


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
    whole = values_of(reading)
    monkeypatch.setattr(module, "_BLOCK", 500)
    with Sizes():  # type: ignore[no-untyped-call]
        found = values_of(reading)
    assert max(sizes) == 500
    assert found == pytest.approx(whole, rel=1e-6)


def test_ranks_keep_the_extremes_and_add_the_states() -> None:
    ranks = {name: metric.ranks for name, metric in METRICS.items() if metric.ranks != "mean"}
    assert ranks == {
        "ghost/ratio/max": "max",
        "ghost/margin_ratio/max": "max",
        "ghost/radius/min": "min",
        "ghost/states": "sum",
    }


def test_a_large_ratio_is_called_evidence_and_never_an_alarm() -> None:
    for name in ("ratio/max", "ratio/p95", "ratio/p50", "above_one/share", "margin_ratio/max"):
        assert "Evidence and never an alarm" in METRICS[f"ghost/{name}"].high
    assert "Evidence and never an alarm" in METRICS["ghost/radius/min"].low
