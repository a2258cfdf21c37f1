from typing import Any

import numpy as np
import pytest
import torch

from entropylens.diagnostics.completion_length import CompletionLength, completion_lengths
from entropylens.registry import RolloutReading

NAN = float("nan")


def measured(reading: RolloutReading) -> dict[str, Any]:
    blocks, _ = CompletionLength().measure(reading, None)
    found: dict[str, Any] = {}
    for block in blocks:
        names, values = block.columns["name"], block.columns["value"]
        values = getattr(values, "values", values) if not torch.is_tensor(values) else values
        weights = torch.as_tensor(block.columns.get("weight", 1.0)).expand(len(names))
        columns = zip(names, values, weights, strict=True)
        found |= {n: (float(value), float(weight)) for n, value, weight in columns if weight > 0}
    return found


def mask_of(*lengths: int) -> torch.Tensor:
    return torch.arange(max(lengths) + 3) < torch.tensor(lengths)[:, None]


def test_lengths_equal_numpy() -> None:
    generator = torch.Generator().manual_seed(12)
    lengths = torch.randint(0, 90, (37,), generator=generator)
    found = measured(RolloutReading(mask=mask_of(*lengths.tolist())))
    plain = lengths.double().numpy()
    expected = {
        "mean": plain.mean(),
        "std": plain.std(),
        "min": plain.min(),
        "max": plain.max(),
        "p50": np.quantile(plain, 0.5, method="hazen"),
        "p95": np.quantile(plain, 0.95, method="hazen"),
    }
    for name, value in expected.items():
        assert found[f"completion/length/{name}"] == (pytest.approx(value, rel=1e-6), 37.0)
    assert found["completion/tokens"] == (plain.sum(), 37.0)
    assert set(found) == {*(f"completion/length/{name}" for name in expected), "completion/tokens"}


def test_the_extremes_are_asked_for_by_name_and_are_those_of_all_ranks() -> None:
    for name, which in (("min", "shortest"), ("max", "longest")):
        metric = CompletionLength.metrics[f"completion/length/{name}"]
        assert metric.question == f"How long is the {which} completion?"
        assert metric.ranks == name
    assert CompletionLength.metrics["completion/length/p95"].question.startswith("Below which")


def test_where_the_padding_stands_does_not_matter() -> None:
    mask = mask_of(3, 0, 5)
    assert completion_lengths(mask).tolist() == [3.0, 0.0, 5.0]
    assert torch.equal(completion_lengths(mask), completion_lengths(mask.flip(1)))


def test_lengths_by_how_completions_ended_and_whether_they_are_right() -> None:
    reading = RolloutReading(
        mask=mask_of(2, 4, 9, 9, 6),
        truncated=torch.tensor([False, False, True, True, False]),
        correct=torch.tensor([1.0, 0.0, 0.0, 1.0, NAN]),
    )
    found = measured(reading)
    assert found["completion/truncated/share"] == (pytest.approx(0.4), 5.0)
    assert found["completion/length/terminated/mean"] == (4.0, 3.0)
    assert found["completion/length/correct/mean"] == (5.5, 2.0)
    assert found["completion/length/wrong/mean"] == (6.5, 2.0)


def test_no_completion_that_ended_is_not_a_length_of_0() -> None:
    reading = RolloutReading(
        mask=mask_of(4, 4), truncated=torch.tensor([True, True]), correct=torch.ones(2)
    )
    found = measured(reading)
    assert found["completion/truncated/share"] == (1.0, 2.0)
    assert "completion/length/terminated/mean" not in found
    assert "completion/length/wrong/mean" not in found
    assert found["completion/length/correct/mean"] == (4.0, 2.0)


def test_correctness_of_all_ranks_is_not_matched_with_the_lengths_of_one() -> None:
    found = measured(RolloutReading(mask=mask_of(4, 4), correct=torch.ones(8)))
    assert "completion/length/correct/mean" not in found


def test_pace_is_tokens_by_wall_time() -> None:
    found = measured(RolloutReading(mask=mask_of(10, 20), seconds=4.0))
    assert found["rollout/seconds"][0] == 4.0
    assert found["rollout/tokens_per_second"][0] == 7.5
    assert measured(RolloutReading(seconds=4.0)) == {"rollout/seconds": (4.0, 1.0)}
    instant = measured(RolloutReading(mask=mask_of(10), seconds=0.0))
    assert "rollout/tokens_per_second" not in instant


def test_token_counts_are_exact_where_float32_is_not() -> None:
    mask = torch.ones(1, 1, dtype=torch.bool).expand(5, 2**22 + 1)
    assert measured(RolloutReading(mask=mask))["completion/tokens"][0] == 5 * (2**22 + 1)


def test_ranks_are_put_together_as_totals_and_extremes() -> None:
    rules = {name: metric.ranks for name, metric in CompletionLength.metrics.items()}
    assert rules.pop("completion/tokens") == "sum"
    assert rules.pop("rollout/tokens_per_second") == "sum"
    assert rules.pop("rollout/seconds") == "max"
    assert rules.pop("completion/length/min") == "min"
    assert rules.pop("completion/length/max") == "max"
    assert set(rules.values()) == {"mean"}


def test_nothing_known_writes_nothing() -> None:
    assert measured(RolloutReading()) == {}
    assert measured(RolloutReading(mask=torch.zeros(0, 7, dtype=torch.bool))) == {}
