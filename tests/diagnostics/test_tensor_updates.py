from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from entropylens.diagnostics import _tensor_norms
from entropylens.diagnostics._layers import layer_of
from entropylens.diagnostics._tensor_norms import (
    limit_shares,
    sizes_of,
    staleness,
    tensor_norms,
    update_norms,
    zero_update_shares,
)
from entropylens.diagnostics.tensor_updates import TensorUpdates
from entropylens.registry import UpdateReading

Rows = dict[tuple[str, str], float]


def measured(reading: UpdateReading) -> Rows:
    blocks, _ = TensorUpdates().measure(reading, None)
    found: Rows = {}
    for block in blocks:
        columns = [block.columns[key] for key in ("name", "module", "value", "weight")]
        for name, module, value, weight in zip(*columns, strict=True):
            assert (name, module) not in found
            if float(weight) > 0:
                found[name, module] = float(value)
    return found


def random(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SHAPES = {
    "layers.0.attention.weight": (6, 5),
    "head.weight": (3,),
    "layers.0.norm.weight": (7,),
    "layers.1.attention.weight": (2, 3, 4),
    "scale": (),
}


def reading(**changes: Any) -> UpdateReading:
    before = {n: random(shape, at) for at, (n, shape) in enumerate(SHAPES.items())}
    after = {n: old + random(tuple(old.shape), 50 + len(n), 1e-2) for n, old in before.items()}
    after["head.weight"][1] = before["head.weight"][1]
    gradients = {n: random(tuple(old.shape), 90 + len(n), 3.0) for n, old in before.items()}
    gradients["layers.0.norm.weight"][2:4] = 0.0
    gradients["layers.1.attention.weight"].clamp_(-1.5, 1.5)
    moments = {n: random(tuple(old.shape), 70 + len(n)).square() for n, old in before.items()}
    corrections: dict[str, Any] = {"head.weight": 0.25, "scale": torch.tensor(0.5)}
    found = {"gradients": gradients, "second_moments": moments, "bias_corrections": corrections}
    return UpdateReading(before=before, after=after, **{**found, **changes})


def reference(of: UpdateReading) -> Rows:
    """Element by element, on the host."""
    found: Rows = {}
    squares: dict[str, dict[str, float]] = {}
    for name in of.before:
        old, new, g, v = (
            [float(x) for x in values[name].flatten()]
            for values in (of.before, of.after, of.gradients, of.second_moments)
        )
        layer = squares.setdefault(layer_of(name), {"old": 0.0, "moved": 0.0, "g": 0.0})
        moved = sum((a - b) ** 2 for a, b in zip(new, old, strict=True))
        weights, gradient = sum(x * x for x in old), sum(x * x for x in g)
        for key, square in (("old", weights), ("moved", moved), ("g", gradient)):
            layer[key] += square
        c = float(of.bias_corrections.get(name, 1.0))
        ratios = [x * x / max(y / c, 1e-16) for x, y in zip(g, v, strict=True)]
        having = [at for at, x in enumerate(g) if x != 0]
        largest = max(abs(x) for x in g)
        at_limit = sum(abs(x) == largest for x in g)
        values = {
            "update_rms": (moved / len(old)) ** 0.5,
            "update_to_weight": (moved / weights) ** 0.5,
            "gradient_norm": gradient**0.5,
            "staleness": (sum(ratios) / len(ratios)) ** 0.5,
            "zero_update/share": sum(new[at] == old[at] for at in having) / len(having),
            "gradient_at_limit/share": at_limit / len(g) if at_limit > 1 else 0.0,
        }
        found.update({(f"tensor/{key}", name): value for key, value in values.items()})
    for owner, sums in squares.items():
        found["layer/gradient_norm", owner] = sums["g"] ** 0.5
        found["layer/update_to_weight", owner] = (sums["moved"] / sums["old"]) ** 0.5
    return found


def test_every_number_equals_a_loop_over_the_elements() -> None:
    assert measured(reading()) == pytest.approx(reference(reading()), rel=1e-6)


def test_large_tensors_are_measured_in_pieces_and_come_to_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = measured(reading())
    for held in (1, 4, 7):
        monkeypatch.setattr(_tensor_norms, "_HELD", held)
        assert measured(reading()) == pytest.approx(whole, rel=1e-6)


def test_tensors_of_any_memory_layout_are_compared_element_by_element(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turned = reading()
    for values in (turned.after, turned.gradients):
        assert isinstance(values, dict)
        name = "layers.0.attention.weight"
        values[name] = values[name].t().contiguous().t()
    for held in (1 << 24, 4):
        monkeypatch.setattr(_tensor_norms, "_HELD", held)
        assert measured(turned) == pytest.approx(reference(reading()), rel=1e-6)


def test_layers_are_named_up_to_the_first_number_or_by_their_module() -> None:
    names = {
        "model.layers.3.mlp.experts.7.weight": "model.layers.3",
        "transformer.h.11.attn.weight": "transformer.h.11",
        "0.weight": "0",
        "layer1.conv.weight": "layer1.conv",
        "lm_head.weight": "lm_head",
        "scale": "scale",
    }
    assert {name: layer_of(name) for name in names} == names


def test_each_of_several_optimisers_has_layers_of_its_own() -> None:
    found = measured(reading(optimizer="muon"))
    layers = {module for name, module in found if name.startswith("layer/")}
    assert layers == {"muon/layers.0", "muon/head", "muon/layers.1", "muon/scale"}
    tensors = {module for name, module in found if name.startswith("tensor/")}
    assert tensors == set(SHAPES)


def test_what_the_step_left_no_trace_of_is_absent() -> None:
    without = measured(reading(gradients={}))
    assert {name for name, _ in without} == {
        "tensor/update_rms",
        "tensor/update_to_weight",
        "layer/update_to_weight",
    }
    some = {"head.weight": torch.ones(3)}
    partly = measured(reading(gradients=some, second_moments={}))
    assert {m for n, m in partly if n == "tensor/gradient_norm"} == {"head.weight"}
    assert {m for n, m in partly if n == "layer/gradient_norm"} == {"head"}
    assert not [n for n, _ in partly if n == "tensor/staleness"]
    assert measured(UpdateReading(before={}, after={})) == {}


def test_weights_of_zero_have_no_relative_update() -> None:
    before = {"a.weight": torch.zeros(3), "a.bias": torch.ones(4), "b.weight": torch.zeros(2)}
    after = {n: old + 0.5 for n, old in before.items()}
    found = measured(UpdateReading(before=before, after=after))
    relative = {m: v for (n, m), v in found.items() if n == "tensor/update_to_weight"}
    assert relative == {"a.bias": 0.5}
    assert found["layer/update_to_weight", "a"] == pytest.approx((0.25 * 7 / 4) ** 0.5)
    assert ("layer/update_to_weight", "b") not in found
    assert found["tensor/update_rms", "b.weight"] == 0.5


def test_a_tensor_that_is_not_finite_says_so_and_leaves_the_others_alone() -> None:
    whole, broken = measured(reading()), reading()
    broken.gradients["head.weight"][0] = torch.nan
    broken.after["scale"].fill_(torch.inf)
    found = measured(broken)
    assert np.isnan(found["tensor/gradient_norm", "head.weight"])
    assert np.isnan(found["tensor/staleness", "head.weight"])
    assert ("tensor/gradient_at_limit/share", "head.weight") not in found
    assert ("tensor/zero_update/share", "scale") not in found
    assert found["tensor/update_rms", "scale"] == np.inf
    touched = {"head.weight", "head", "scale"}
    others = {key: value for key, value in whole.items() if key[1] not in touched}
    assert {k: v for k, v in found.items() if k[1] not in touched} == pytest.approx(others)


def test_sharded_empty_and_integer_tensors_are_left_out() -> None:
    class Sharded(torch.Tensor):
        placements = ()

    before: Mapping[str, torch.Tensor] = {
        "sharded": torch.ones(2).as_subclass(Sharded),
        "empty": torch.ones(0),
        "whole": torch.ones(2),
    }
    found = measured(UpdateReading(before=before, after=before, gradients=before))
    assert {module for _, module in found} == {"whole"}


def on_two_devices(of: UpdateReading, away: Collection[str]) -> UpdateReading:
    """The same with some tensors on another device: meta, which has no values and cannot wait."""

    def moved(values: Mapping[str, Any]) -> dict[str, Any]:
        return {n: v.to("meta") if n in away and v.ndim else v for n, v in values.items()}

    return replace(
        of,
        before=moved(of.before),
        after=moved(of.after),
        gradients=moved(of.gradients),
        second_moments=moved(of.second_moments),
    )


def test_tensors_of_each_device_are_measured_there_and_a_layer_of_two_has_no_norm() -> None:
    whole = reading(optimizer="adam")
    away = ["layers.1.attention.weight", "layers.0.norm.weight"]
    blocks, _ = TensorUpdates().measure(on_two_devices(whole, away), None)
    by_device = {block.columns["value"].device.type: block.columns for block in blocks}
    assert len(blocks) == 2
    assert by_device.keys() == {"cpu", "meta"}
    here = by_device["cpu"]
    keys = list(zip(here["name"], here["module"], strict=True))
    wanted = measured(whole)
    assert dict(zip(keys, here["value"].tolist(), strict=True)) == pytest.approx(
        {key: wanted[key] for key in keys}
    )
    told = {
        kind: {
            (name, module) for name, module in zip(columns["name"], columns["module"], strict=True)
        }
        for kind, columns in by_device.items()
    }
    assert not told["cpu"] & told["meta"]
    left_out = {key for key in wanted if key[1] == "adam/layers.0"}
    assert told["cpu"] | told["meta"] == wanted.keys() - left_out
    assert {module for _, module in told["meta"]} == {*away, "adam/layers.1"}


def test_a_second_moment_on_another_device_is_left_out() -> None:
    far = reading()
    moments = {n: v.to("meta") if n == "scale" else v for n, v in far.second_moments.items()}
    moments["head.weight"] = moments["head.weight"].to("meta")
    found = measured(replace(far, second_moments=moments))
    stale = {module for name, module in found if name == "tensor/staleness"}
    assert stale == SHAPES.keys() - {"scale", "head.weight"}


def test_a_sparse_gradient_is_left_out_and_its_update_is_not() -> None:
    table, head = nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2)
    head(table(torch.tensor([1, 3]))).sum().backward()
    named = {"table.weight": table.weight, "head.weight": head.weight}
    before = {name: value.detach().clone() for name, value in named.items()}
    for optimizer in (torch.optim.SGD([head.weight]), torch.optim.SGD([table.weight])):
        optimizer.step()
    after = {name: value.detach() for name, value in named.items()}
    gradients = {name: value.grad for name, value in named.items() if value.grad is not None}
    assert gradients["table.weight"].is_sparse
    found = measured(UpdateReading(before=before, after=after, gradients=gradients))
    told = {name for name, module in found if module == "table.weight"}
    assert told == {"tensor/update_rms", "tensor/update_to_weight"}
    assert ("layer/gradient_norm", "table") not in found
    assert ("layer/update_to_weight", "table") in found
    assert ("tensor/gradient_norm", "head.weight") in found
    only = {"table.weight": gradients["table.weight"]}
    assert measured(UpdateReading(before=before, after=after, gradients=only)).keys() == {
        key for key in found if "update_" in key[0] and "zero" not in key[0]
    }


def trained(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, gradient: torch.Tensor
) -> UpdateReading:
    before = parameter.detach().clone()
    parameter.grad = gradient.clone()
    optimizer.step()
    state = optimizer.state[parameter]
    beta = optimizer.param_groups[0]["betas"][1]
    return UpdateReading(
        before={"w": before},
        after={"w": parameter.detach()},
        gradients={"w": parameter.grad},
        second_moments={"w": state["exp_avg_sq"]},
        bias_corrections={"w": 1 - beta ** float(state["step"])},
    )


def test_staleness_is_one_in_the_first_step_and_has_its_bound_after_a_jump() -> None:
    beta, parameter = 0.95, nn.Parameter(random((400,), 0))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, betas=(0.9, beta))
    key = ("tensor/staleness", "w")
    for step in range(1, 60):
        found = measured(trained(optimizer, parameter, random((400,), step)))[key]
        assert found == pytest.approx(1.0, abs=1e-4 if step == 1 else 0.2)
    jumped = measured(trained(optimizer, parameter, random((400,), 99, 1e4)))[key]
    assert jumped == pytest.approx(((1 - beta**60) / (1 - beta)) ** 0.5, rel=1e-4)


def test_a_gradient_that_grew_fourfold_is_stale_and_a_smaller_one_is_not() -> None:
    parameter = nn.Parameter(torch.zeros(1000))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, betas=(0.9, 0.999))
    for step in range(300):
        found = measured(trained(optimizer, parameter, random((1000,), step)))
    assert found["tensor/staleness", "w"] == pytest.approx(1.0, abs=0.1)
    grown = measured(trained(optimizer, parameter, random((1000,), 500, 4.0)))
    assert grown["tensor/staleness", "w"] == pytest.approx(4.0, abs=0.4)
    small = measured(trained(optimizer, parameter, random((1000,), 501, 0.1)))
    assert small["tensor/staleness", "w"] < 0.2


def test_elements_without_gradient_and_without_moment_are_not_stale() -> None:
    zeros = torch.zeros(4)
    assert staleness([zeros], [zeros], [1.0]).item() == 0.0
    gradient = torch.tensor([1e-9, 0.0, 0.0, 0.0])
    assert staleness([gradient], [zeros], [1.0]).item() == pytest.approx(0.05)


@pytest.mark.parametrize(("rate", "share"), [(1e-6, 1.0), (1e-1, 0.0)])
def test_bfloat16_swallows_small_updates_and_float32_does_not(rate: float, share: float) -> None:
    gradient = random((64,), 3).sign()
    for dtype, expected in ((torch.bfloat16, share), (torch.float32, 0.0)):
        old = torch.ones(64, dtype=dtype)
        new = old - rate * gradient.to(dtype)
        assert zero_update_shares([old], [new], [gradient.to(dtype)]).item() == expected


def test_of_an_embedding_only_rows_with_a_gradient_count() -> None:
    gradient = torch.zeros(10, 4)
    gradient[:2] = 1.0
    old, new = torch.ones(10, 4), torch.ones(10, 4)
    new[0] = 0.5
    assert zero_update_shares([old], [new], [gradient]).item() == 0.5
    assert zero_update_shares([old], [new], [0 * gradient]).isnan().all()


def test_value_clipping_shows_and_norm_clipping_does_not() -> None:
    parameter = nn.Parameter(torch.zeros(500))
    gradient = random((500,), 7)
    parameter.grad = gradient.clone()
    nn.utils.clip_grad_norm_([parameter], 0.1)
    assert limit_shares([parameter.grad]).item() == 0.0
    parameter.grad = gradient.clone()
    nn.utils.clip_grad_value_([parameter], 1.0)
    clipped = float((gradient.abs() >= 1.0).double().mean())
    assert limit_shares([parameter.grad]).item() == pytest.approx(clipped)
    assert clipped > 0.2


def test_no_limit_is_seen_in_gradients_that_are_zero_or_of_one_element() -> None:
    assert (
        limit_shares([torch.zeros(5), torch.tensor([3.0]), torch.tensor(-2.0)]).tolist() == [0] * 3
    )
    assert limit_shares([torch.tensor([torch.inf, torch.inf])]).isnan().all()


def test_sizes_are_counts_of_elements() -> None:
    assert sizes_of([torch.ones(2, 3), torch.tensor(1.0), torch.ones(0)]).tolist() == [6, 1, 0]


def test_norms_of_small_and_many_elements_keep_their_digits() -> None:
    tiny = torch.full((100,), 1e-30)
    assert tensor_norms([tiny]).item() == pytest.approx(1e-29, rel=1e-6)
    many = torch.rand(3_000_000, generator=torch.Generator().manual_seed(0))
    expected = float(np.sqrt((many.double().numpy() ** 2).sum()))
    assert tensor_norms([many]).item() == pytest.approx(expected, rel=1e-10)


def test_norms_scale_with_their_tensors_and_differences_do_not_see_a_shift() -> None:
    old, new = random((9,), 1), random((9,), 2)
    assert update_norms([4 * old], [4 * new]).item() == pytest.approx(
        4 * update_norms([old], [new]).item(), rel=1e-6
    )
    assert update_norms([old + 1], [new + 1]).item() == pytest.approx(
        update_norms([old], [new]).item(), rel=1e-5
    )


def test_differences_of_bfloat16_are_not_rounded_again() -> None:
    old = torch.tensor([1.0078125, 3.0], dtype=torch.bfloat16)
    new = torch.tensor([-257.0, 3.015625], dtype=torch.float32).bfloat16()
    expected = float((new.double() - old.double()).norm())
    assert update_norms([old], [new]).item() == pytest.approx(expected, rel=1e-7)
