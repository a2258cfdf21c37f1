from collections import Counter
from math import log

import numpy as np
import pytest
import torch

from entropylens.diagnostics.router_entropy import (
    RouterEntropy,
    assignment_counts,
    load_entropy,
    router_entropy,
)
from entropylens.registry import RouterReading

EXPERTS, K = 8, 2


def measured(reading: RouterReading) -> dict[str, dict[str, float]]:
    """By layer, then by metric."""
    blocks, _ = RouterEntropy().measure(reading, None)
    return {
        str(block.columns["module"]): dict(
            zip(block.columns["name"], block.columns["value"].tolist(), strict=True)
        )
        for block in blocks
        if float(block.columns["weight"]) > 0
    }


def routed(seed: int = 0, tokens: int = 60, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    lean = torch.linspace(0, 2, EXPERTS)
    return scale * torch.randn(tokens, EXPERTS, generator=generator) + lean


def counted(logits: torch.Tensor, k: int = K) -> np.ndarray:
    chosen: Counter[int] = Counter()
    for row in logits.tolist():
        chosen.update(sorted(range(len(row)), key=lambda e: -row[e])[:k])
    return np.array([chosen[e] for e in range(logits.shape[1])], dtype=np.float64)


def test_each_layer_equals_a_loop_over_its_tokens() -> None:
    layers = {"layers.0": routed(0), "layers.3": routed(1, scale=4)}
    present = torch.arange(60) % 3 > 0
    found = measured(RouterReading(logits=layers, present=present, experts_per_token=K))
    assert set(found) == set(layers)
    for name, logits in layers.items():
        kept = logits[present].double().numpy()
        p = np.exp(kept) / np.exp(kept).sum(1, keepdims=True)
        entropy = float(np.mean([-sum(q * np.log(q) for q in row) for row in p]))
        load = counted(logits[present]) / (K * int(present.sum()))
        balance = -sum(f * np.log(f) for f in load if f > 0) / log(EXPERTS)
        assert found[name] == pytest.approx(
            {
                "router/entropy/mean": entropy,
                "router/entropy/normalised/mean": entropy / log(EXPERTS),
                "router/load/entropy": balance,
                "router/load/largest/share": load.max(),
                "router/dead/share": np.mean(load == 0),
            },
            rel=1e-6,
        )


def test_uniform_and_certain_routers_are_at_the_ends() -> None:
    uniform = router_entropy(torch.zeros(3, EXPERTS))
    assert uniform.tolist() == pytest.approx([log(EXPERTS)] * 3)
    certain = torch.full((1, EXPERTS), -torch.inf)
    certain[0, 5] = 0.0
    assert router_entropy(certain).item() == 0.0


def test_collapse_onto_the_same_experts_shows_in_the_load() -> None:
    logits = torch.zeros(50, EXPERTS)
    logits[:, [2, 6]] = 5.0
    collapsed = RouterReading(logits={"m": logits}, experts_per_token=K)
    found = measured(collapsed)["m"]
    assert found["router/load/entropy"] == pytest.approx(log(2) / log(EXPERTS))
    assert found["router/load/largest/share"] == 0.5
    assert found["router/dead/share"] == 0.75


def test_an_even_load_of_sure_routers_is_balanced() -> None:
    """Token t goes to expert t: no single token is undecided, and no expert idle."""
    logits = 50 * torch.eye(EXPERTS)
    found = measured(RouterReading(logits={"m": logits}, experts_per_token=1))["m"]
    assert found["router/entropy/mean"] == pytest.approx(0, abs=1e-6)
    assert found["router/load/entropy"] == pytest.approx(1)
    assert found["router/load/largest/share"] == pytest.approx(1 / EXPERTS)
    assert found["router/dead/share"] == 0


def test_without_the_number_of_experts_the_load_is_the_mean_probability() -> None:
    logits = routed(2)
    logits[50:] = torch.nan
    present = torch.arange(60) < 50
    found = measured(RouterReading(logits={"m": logits}, present=present))["m"]
    load = logits[:50].double().softmax(-1).mean(0).numpy()
    expected = -(load * np.log(load)).sum() / log(EXPERTS)
    assert found["router/load/entropy"] == pytest.approx(expected, rel=1e-6)
    assert found["router/load/largest/share"] == pytest.approx(load.max(), rel=1e-6)
    assert "router/dead/share" not in found


@pytest.mark.parametrize("experts_per_token", [K, None])
@pytest.mark.parametrize("filler", [torch.nan, torch.inf, 1e4])
def test_padding_does_not_count(filler: float, experts_per_token: int | None) -> None:
    logits = routed(3)
    alone = RouterReading(logits={"m": logits[:40]}, experts_per_token=experts_per_token)
    spoilt = logits.clone()
    spoilt[40:] = filler
    spoilt[40:, 0] = -filler
    padded = RouterReading(
        logits={"m": spoilt}, present=torch.arange(60) < 40, experts_per_token=experts_per_token
    )
    assert measured(padded)["m"] == pytest.approx(measured(alone)["m"], rel=1e-6)


def test_the_names_of_experts_and_a_shift_of_the_logits_change_nothing() -> None:
    logits = routed(4)
    order = torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(0))
    shift = torch.linspace(-5, 5, 60)[:, None]
    one = measured(RouterReading(logits={"m": logits}, experts_per_token=K))["m"]
    other = measured(RouterReading(logits={"m": logits[:, order] + shift}, experts_per_token=K))
    assert other["m"] == pytest.approx(one, rel=1e-5)


def test_counts_sum_to_the_assignments_of_present_tokens() -> None:
    logits = routed(5)
    present = torch.arange(60) % 2 == 0
    for k in (1, 3, EXPERTS, EXPERTS + 4):
        counts = assignment_counts(logits, present, k)
        assert counts.sum() == 30 * min(k, EXPERTS)
        assert counts.tolist() == counted(logits[present], k).tolist()


def test_half_precision_logits_are_measured_in_full() -> None:
    logits = routed(6).bfloat16()
    half = measured(RouterReading(logits={"m": logits}, experts_per_token=K))["m"]
    full = measured(RouterReading(logits={"m": logits.float()}, experts_per_token=K))["m"]
    assert half["router/entropy/mean"] == pytest.approx(full["router/entropy/mean"], rel=1e-6)


def test_what_ranks_write_bounds_the_load_of_all_of_them() -> None:
    parts = [routed(7, tokens=12, scale=2), routed(8, tokens=30, scale=3).flip(1)]
    sizes = np.array([len(part) for part in parts])
    ranks = [measured(RouterReading(logits={"m": p}, experts_per_token=1))["m"] for p in parts]
    together = RouterReading(logits={"m": torch.cat(parts)}, experts_per_token=1)
    whole = measured(together)["m"]

    def mean(name: str) -> float:
        return float(np.average([rank[name] for rank in ranks], weights=sizes))

    assert mean("router/entropy/mean") == pytest.approx(whole["router/entropy/mean"])
    assert mean("router/load/entropy") < whole["router/load/entropy"]
    assert mean("router/load/largest/share") > whole["router/load/largest/share"]
    least = min(rank["router/dead/share"] for rank in ranks)
    assert RouterEntropy.metrics["router/dead/share"].ranks == "min"
    assert whole["router/dead/share"] <= least


def test_load_entropy_of_shares_and_of_counts_is_the_same() -> None:
    counts = torch.tensor([3.0, 1.0, 0.0, 4.0])
    assert load_entropy(counts).item() == pytest.approx(load_entropy(counts / 8).item())
    assert load_entropy(torch.zeros(4)).isnan()


def test_a_layer_with_one_expert_and_a_step_without_tokens_write_nothing() -> None:
    lone = RouterReading(logits={"m": torch.zeros(5, 1)}, experts_per_token=1)
    assert RouterEntropy().measure(lone, None) == ([], None)
    nothing = torch.zeros(60, dtype=torch.bool)
    empty = RouterReading(logits={"m": routed(9)}, present=nothing, experts_per_token=K)
    assert measured(empty) == {}
