from collections.abc import Mapping
from dataclasses import replace
from math import log
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from entropylens.diagnostics._attention import rows_of_logits
from entropylens.diagnostics.attention_logits import (
    AttentionLogits,
    largest_logits,
    mean_log_partition,
)
from entropylens.registry import AttentionReading, AttentionRows

LENGTH, HEADS = 30, 4


def measured(
    layers: Mapping[str, AttentionRows], state: Any = None
) -> tuple[dict[str, dict[str, float]], dict[str, Tensor]]:
    """By layer, then by metric, without what carries no weight; and the new state."""
    diagnostic = AttentionLogits()
    before = diagnostic.initial_state() if state is None else state
    blocks, after = diagnostic.measure(AttentionReading(layers=layers), before)
    found = {}
    for block in blocks:
        columns = (block.columns["name"], block.columns["value"], block.columns["weight"])
        rows = zip(columns[0], columns[1].tolist(), columns[2].tolist(), strict=True)
        kept = {name: value for name, value, weight in rows if weight > 0}
        if kept:
            found[str(block.columns["module"])] = kept
    return found, after


def causal_logits(scale: float = 3.0, seed: int = 0, length: int = LENGTH) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(length, HEADS, length, generator=generator)
    hidden = ~torch.ones(length, length, dtype=torch.bool).tril()
    return logits.masked_fill(hidden[:, None], -torch.inf)


def test_a_layer_equals_a_loop_over_queries_and_heads() -> None:
    logits = causal_logits()
    largest, partitions = [], []
    for query in range(LENGTH):
        for head in range(HEADS):
            row = logits[query, head, : query + 1].double().numpy()
            largest.append(row.max())
            partitions.append(np.log(np.mean(np.exp(row))))
    found, _ = measured({"m": rows_of_logits(logits)})
    assert found["m"] == pytest.approx(
        {
            "attention/logit/max": max(largest),
            "attention/logit/p99": np.quantile(largest, 0.99, method="hazen"),
            "attention/log_partition/mean": np.mean(partitions),
        },
        rel=1e-6,
    )
    assert found["m"]["attention/logit/p99"] < found["m"]["attention/logit/max"]


@pytest.mark.parametrize("length", [2, 50])
def test_logits_that_are_all_the_same_give_that_whatever_the_length(length: int) -> None:
    logits = 0 * causal_logits(length=length) + 2.5
    logits = logits.masked_fill(logits.isnan(), -torch.inf)
    found, _ = measured({"m": rows_of_logits(logits)})
    assert list(found["m"].values()) == pytest.approx([2.5] * 3, rel=1e-6)


def test_a_shift_of_the_logits_shifts_everything_and_a_flip_nothing() -> None:
    logits = causal_logits()
    before, _ = measured({"m": rows_of_logits(logits)})
    after, _ = measured({"m": rows_of_logits(logits + 40)})
    assert after["m"] == pytest.approx({k: v + 40 for k, v in before["m"].items()}, rel=1e-5)
    flipped, _ = measured({"m": rows_of_logits(logits.flip(0, 1, 2))})
    assert flipped["m"] == pytest.approx(before["m"], rel=1e-6)


def test_one_large_logit_is_the_maximum_and_not_the_quantile() -> None:
    logits = torch.zeros(50, HEADS, 20)
    logits[7, 2, 3] = 900.0
    found, _ = measured({"m": rows_of_logits(logits)})
    assert found["m"]["attention/logit/max"] == 900
    assert found["m"]["attention/logit/p99"] == 0


def test_drift_is_against_the_first_look_of_each_layer_and_absent_there() -> None:
    base, state = causal_logits(), None
    looks: list[dict[str, dict[str, float]]] = []
    for shift in (1.0, 4.0, -2.0):
        layers = {"old": rows_of_logits(base + shift)}
        if shift < 4.0:
            layers["young"] = rows_of_logits(base * shift)
        found, state = measured(layers, state)
        looks.append(found)
    drifts = ("attention/logit/drift", "attention/log_partition/drift")
    assert not set(drifts) & (set(looks[0]["old"]) | set(looks[0]["young"]))
    assert [looks[1]["old"][name] for name in drifts] == pytest.approx([3.0, 3.0], rel=1e-5)
    assert [looks[2]["old"][name] for name in drifts] == pytest.approx([-3.0, -3.0], rel=1e-5)
    assert "young" not in looks[1]
    expected = looks[2]["young"]["attention/logit/max"] - looks[0]["young"]["attention/logit/max"]
    assert looks[2]["young"]["attention/logit/drift"] == pytest.approx(expected)


def test_a_first_look_that_shows_nothing_is_not_the_one_compared_with() -> None:
    rows = rows_of_logits(causal_logits())
    unseen = replace(rows, reach=torch.zeros_like(rows.reach))
    broken = replace(rows, largest_logit=rows.largest_logit * torch.nan)
    nothing, state = measured({"unseen": unseen, "broken": broken})
    assert "unseen" not in nothing
    again, state = measured({"unseen": rows, "broken": rows}, state)
    assert "attention/logit/drift" not in again["unseen"] | again["broken"]
    assert again["broken"]["attention/log_partition/drift"] == 0
    third, _ = measured({"unseen": rows, "broken": rows}, state)
    assert third["unseen"]["attention/logit/drift"] == 0
    assert third["broken"]["attention/logit/drift"] == 0


def test_the_state_given_is_not_changed() -> None:
    rows = rows_of_logits(causal_logits())
    _, state = measured({"m": rows})
    kept = {name: value.clone() for name, value in state.items()}
    measured({"m": rows_of_logits(causal_logits(seed=3)), "other": rows}, state)
    assert set(state) == {"m"}
    assert torch.equal(state["m"], kept["m"])


@pytest.mark.parametrize("filler", [torch.nan, torch.inf, 1e5])
def test_queries_that_see_nothing_do_not_count(filler: float) -> None:
    rows = rows_of_logits(causal_logits())
    spoilt = replace(
        rows,
        reach=rows.reach.clone(),
        largest_logit=rows.largest_logit.clone(),
        log_partition=rows.log_partition.clone(),
    )
    spoilt.reach[20:], spoilt.largest_logit[20:], spoilt.log_partition[20:] = 0, filler, filler
    alone = AttentionRows(**{name: value[:20] for name, value in vars(rows).items()})
    assert measured({"m": spoilt})[0]["m"] == pytest.approx(measured({"m": alone})[0]["m"])
    blocks, _ = AttentionLogits().measure(AttentionReading(layers={"m": spoilt}), {})
    assert blocks[0].columns["weight"].tolist() == [20, 20, 20, 0, 0]


def test_a_single_query_and_none_at_all() -> None:
    rows = AttentionRows(
        entropy=torch.zeros(1, 1),
        reach=torch.tensor([8]),
        largest_logit=torch.tensor([[6.0]]),
        log_partition=torch.tensor([[6.5]]),
    )
    assert largest_logits(rows).tolist() == [6.0, 6.0]
    assert mean_log_partition(rows).item() == pytest.approx(6.5 - log(8))
    assert mean_log_partition(replace(rows, reach=torch.tensor([0]))).isnan()
    assert measured({})[0] == {}


def test_the_maximum_of_ranks_is_that_of_all_their_queries() -> None:
    rows = rows_of_logits(causal_logits())
    parts = [
        AttentionRows(**{name: value[at] for name, value in vars(rows).items()})
        for at in (slice(0, 12), slice(12, None))
    ]
    ranks, whole = [measured({"m": part})[0]["m"] for part in parts], measured({"m": rows})[0]["m"]
    assert AttentionLogits.metrics["attention/logit/max"].ranks == "max"
    assert max(rank["attention/logit/max"] for rank in ranks) == whole["attention/logit/max"]
    partitions = [rank["attention/log_partition/mean"] for rank in ranks]
    assert np.average(partitions, weights=[12, 18]) == pytest.approx(
        whole["attention/log_partition/mean"]
    )
