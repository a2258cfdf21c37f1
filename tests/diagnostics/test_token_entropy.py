from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from entropylens.diagnostics._summaries import summarise, weighted_mean, weighted_quantiles
from entropylens.diagnostics.token_entropy import (
    POSITIONS,
    TokenEntropy,
    entropy_by_position,
    entropy_spikes,
)
from entropylens.registry import Block, TokenReading


def values_of(blocks: list[Block]) -> dict[str, float]:
    return {
        name: float(value)
        for block in blocks
        for name, value in zip(block.columns["name"], block.columns["value"], strict=True)
    }


def reading(entropy: torch.Tensor, present: torch.Tensor, vocabulary: int = 100) -> TokenReading:
    rows, columns = entropy.shape
    n = entropy.numel()
    return TokenReading(
        logprob=-entropy.flatten(),
        entropy=entropy.flatten(),
        present=present.flatten(),
        weight=present.flatten().float(),
        position=(present.cumsum(1) - 1).clamp(min=0).flatten(),
        sequence=torch.arange(n) // columns,
        token_id=torch.zeros(n, dtype=torch.long),
        key=torch.linspace(0, 1, n),
        sequence_tokens=present.sum(1),
        vocabulary=vocabulary,
        grids=[(rows, columns)],
    )


def test_summaries_equal_numpy_on_the_present_tokens() -> None:
    generator = torch.Generator().manual_seed(1)
    entropy = torch.rand(4, 60, generator=generator) * 3
    present = torch.rand(4, 60, generator=generator) < 0.7
    entropy[~present] = torch.nan
    blocks, _ = TokenEntropy().measure(reading(entropy, present, vocabulary=64), None)
    found = values_of(blocks)
    kept = entropy[present].double().numpy()
    assert found["entropy/token/mean"] == pytest.approx(kept.mean(), rel=1e-6)
    assert found["entropy/token/std"] == pytest.approx(kept.std(), rel=1e-6)
    assert found["entropy/normalised/mean"] == pytest.approx(kept.mean() / np.log(64), rel=1e-6)
    assert found["entropy/token/count"] == len(kept)
    for name, level in (("p05", 0.05), ("p50", 0.5), ("p95", 0.95)):
        expected = np.quantile(kept, level, method="hazen")
        assert found[f"entropy/token/{name}"] == pytest.approx(expected, rel=1e-6)
    assert found["entropy/token/min"] == pytest.approx(kept.min())
    assert found["entropy/token/max"] == pytest.approx(kept.max())


def test_a_weight_counts_like_that_many_tokens() -> None:
    values = torch.tensor([1.0, 2.0, 5.0, 7.0])
    weight = torch.tensor([2.0, 0.0, 1.0, 3.0])
    repeated = torch.tensor([1.0, 1.0, 5.0, 7.0, 7.0, 7.0])
    assert torch.allclose(summarise(values, weight, ()), summarise(repeated, torch.ones(6), ()))
    assert weighted_quantiles(values, weight, (0.5,)).item() == pytest.approx(
        np.interp(0.5, [1 / 6, 2.5 / 6, 4.5 / 6], [1.0, 5.0, 7.0])
    )


@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=40), st.floats(0, 1))
def test_quantiles_equal_numpys_hazen_rule(values: list[float], level: float) -> None:
    found = weighted_quantiles(torch.tensor(values), torch.ones(len(values)), (level,))
    expected = np.quantile(np.array(values, dtype=np.float64), level, method="hazen")
    assert found.item() == pytest.approx(expected, abs=1e-4)


def test_nothing_measured_is_not_zero() -> None:
    nothing = torch.zeros(3)
    assert weighted_mean(torch.ones(3), nothing).isnan()
    assert weighted_quantiles(torch.ones(3), nothing, (0.0, 1.0)).isnan().all()
    assert weighted_quantiles(torch.ones(0), torch.ones(0), (0.5,)).isnan().all()


def test_a_value_that_is_not_a_number_shows_in_mean_and_quantiles() -> None:
    values = torch.tensor([1.0, torch.nan, 2.0])
    assert weighted_mean(values, torch.ones(3)).isnan()
    assert weighted_quantiles(values, torch.ones(3), (0.0, 0.5, 1.0)).isnan().all()


def test_infinite_values_keep_their_rank() -> None:
    values = torch.tensor([torch.inf, 1.0, -torch.inf, torch.inf])
    found = weighted_quantiles(values, torch.tensor([1.0, 1.0, 1.0, 0.0]), (0.0, 0.5, 1.0))
    assert found.tolist() == [-torch.inf, 1.0, torch.inf]


def test_position_buckets_cover_every_token_once() -> None:
    position = torch.arange(5000)
    entropy = position.float()
    means, weights = entropy_by_position(entropy, position, torch.ones(5000))
    edges = [*POSITIONS, 5000]
    assert weights.tolist() == [b - a for a, b in pairwise(edges)]
    assert means.tolist() == [(a + b - 1) / 2 for a, b in pairwise(edges)]


def test_an_empty_position_bucket_has_no_weight() -> None:
    means, weights = entropy_by_position(torch.ones(4), torch.arange(4), torch.ones(4))
    assert weights.tolist() == [4.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert means[0] == 1.0
    assert means[1:].isnan().all()


def test_spikes_equal_a_loop_over_the_definition() -> None:
    generator = torch.Generator().manual_seed(3)
    entropy = torch.rand(3, 80, generator=generator)
    entropy[0, 40], entropy[1, 30], entropy[2, 70] = 5.0, 2.9, 3.5
    present = torch.ones(3, 80, dtype=torch.bool)
    present[1, 20] = False
    spikes, judged = entropy_spikes(entropy, present)
    for row in range(3):
        for column in range(80):
            before = slice(column - 25, column)
            can = column >= 25 and bool(present[row, before].all()) and bool(present[row, column])
            assert judged[row, column] == can
            if can:
                window = entropy[row, before].double().numpy()
                limit = window.mean() + 4 * max(window.std(ddof=1), 0.5)
                assert spikes[row, column] == (entropy[row, column].item() > limit)
            else:
                assert not spikes[row, column]
    assert spikes.sum() >= 2


def test_a_constant_series_never_spikes_and_two_nats_above_it_do() -> None:
    flat = torch.full((1, 40), 0.3)
    everything = torch.ones(1, 40, dtype=torch.bool)
    assert not entropy_spikes(flat, everything)[0].any()
    flat[0, 39] = 0.3 + 2.01
    assert entropy_spikes(flat, everything)[0].sum() == 1
    flat[0, 39] = 0.3 + 1.99
    assert not entropy_spikes(flat, everything)[0].any()


def test_spikes_are_absent_where_rows_were_sampled_or_sequences_are_short() -> None:
    short = reading(torch.rand(2, 10), torch.ones(2, 10, dtype=torch.bool))
    blocks, _ = TokenEntropy().measure(short, None)
    spike = next(b for b in blocks if b.columns["name"] == ["entropy/spike/share"])
    assert float(spike.columns["weight"]) == 0.0
    sampled = TokenReading(**{**vars(short), "grids": None})
    blocks, _ = TokenEntropy().measure(sampled, None)
    assert "entropy/spike/share" not in values_of(blocks)
