from itertools import groupby, product
from typing import Any

import numpy as np
import pytest
import torch

from entropylens.diagnostics.repetition import Repetition, longest_run, repeated_ngrams
from entropylens.registry import RolloutReading


def measured(tokens: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
    blocks, _ = Repetition().measure(RolloutReading(token_id=tokens, mask=mask), None)
    found: dict[str, Any] = {}
    for block in blocks:
        names, weight = block.columns["name"], float(block.columns["weight"])
        values = block.columns["value"].tolist()
        found |= {n: (v, weight) for n, v in zip(names, values, strict=True) if weight > 0}
    return found


def random_completions(vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(vocabulary)
    tokens = torch.randint(0, vocabulary, (60, 50), generator=generator)
    length = torch.randint(0, 51, (60,), generator=generator)
    length[:2] = torch.tensor([0, 4])
    start = (torch.rand(60, generator=generator) * (51 - length)).long()
    places = torch.arange(50)
    return tokens, (places >= start[:, None]) & (places < (start + length)[:, None])


def kept(tokens: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    return [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)]


def share_of_set(row: list[int], length: int) -> float:
    ngrams = [tuple(row[i : i + length]) for i in range(len(row) - length + 1)]
    return 1 - len(set(ngrams)) / len(ngrams)


@pytest.mark.parametrize("vocabulary", [1, 2, 3, 40])
@pytest.mark.parametrize("length", [1, 2, 4])
def test_shares_equal_a_python_set_wherever_the_padding_stands(
    vocabulary: int, length: int
) -> None:
    tokens, mask = random_completions(vocabulary)
    found, total = repeated_ngrams(tokens, mask, length)
    for row, share, count in zip(kept(tokens, mask), found.tolist(), total.tolist(), strict=True):
        assert count == max(len(row) - length + 1, 0)
        if count:
            assert share == pytest.approx(share_of_set(row, length), abs=1e-6)


def test_padding_is_no_token_whatever_its_number() -> None:
    tokens, mask = random_completions(3)
    expected = measured(tokens, mask)
    for padding in (0, 2, -100, 151_643, 2**63 - 1):
        assert measured(torch.where(mask, tokens, padding), mask) == expected


def test_a_gap_in_the_mask_makes_no_ngram_of_what_stands_on_both_sides() -> None:
    tokens = torch.tensor([[1, 2, 9, 1, 2, 9, 1, 2]])
    mask = tokens != 9
    share, total = repeated_ngrams(tokens, mask, length=2)
    assert share.item() == pytest.approx(2 / 3)
    assert total.item() == 3
    assert longest_run(torch.full((1, 4), 9), torch.tensor([[True, True, False, True]])) == 2


def test_ngrams_that_differ_in_one_place_by_one_are_not_confused() -> None:
    everything = torch.tensor(list(product(range(12), repeat=4))).flatten()[None]
    share, _ = repeated_ngrams(everything, torch.ones_like(everything, dtype=torch.bool))
    expected = share_of_set(everything[0].tolist(), 4)
    assert share.item() == pytest.approx(expected, abs=1e-6)
    last = torch.tensor([[151_642, 3, 151_000, at] for at in range(100_000, 100_200)])
    for place in range(4):
        rows = last.roll(place, 1).flatten()[None]
        found, _ = repeated_ngrams(rows, torch.ones_like(rows, dtype=torch.bool))
        assert found.item() == pytest.approx(share_of_set(rows[0].tolist(), 4), abs=1e-6)


def test_a_quarter_of_a_million_different_ngrams_are_told_apart() -> None:
    """24 bits would confuse some two thousand pairs of them, 32 bits some eight."""
    generator = torch.Generator().manual_seed(9)
    tokens = torch.randint(0, 151_643, (1, 2**18), generator=generator)
    share, _ = repeated_ngrams(tokens, torch.ones_like(tokens, dtype=torch.bool))
    assert share.item() == 0


def test_a_loop_and_fresh_text_are_the_extremes() -> None:
    loop, fresh = torch.full((1, 104), 7), torch.arange(104)[None]
    mask = torch.ones(1, 104, dtype=torch.bool)
    assert measured(loop, mask) == {
        "repetition/ngram/mean": (pytest.approx(1 - 1 / 101), 1.0),
        "repetition/ngram/p95": (pytest.approx(1 - 1 / 101), 1.0),
        "repetition/ngram/share": (1.0, 1.0),
        "repetition/longest_run/mean": (1.0, 1.0),
    }
    found = measured(fresh, mask)
    assert found["repetition/ngram/mean"][0] == 0
    assert found["repetition/ngram/share"][0] == 0
    assert found["repetition/longest_run/mean"][0] == pytest.approx(1 / 104)


def test_a_period_of_p_leaves_p_distinct_ngrams() -> None:
    tokens = torch.arange(60)[None] % 6
    share, total = repeated_ngrams(tokens, torch.ones_like(tokens, dtype=torch.bool))
    assert share.item() == pytest.approx(1 - 6 / 57)
    assert total.item() == 57


def test_new_names_for_the_tokens_change_nothing() -> None:
    tokens, mask = random_completions(40)
    generator = torch.Generator().manual_seed(3)
    names = torch.randperm(150_000, generator=generator)
    assert measured(names[tokens], mask) == measured(tokens, mask)
    assert measured(tokens.int(), mask) == measured(tokens, mask)


def test_summaries_equal_numpy_over_completions_of_more_than_four_tokens() -> None:
    tokens, mask = random_completions(2)
    rows = [row for row in kept(tokens, mask) if len(row) > 4]
    assert 0 < len(rows) < 60
    shares = np.array([share_of_set(row, 4) for row in rows])
    runs = [max(len(list(run)) for _, run in groupby(row)) / len(row) for row in rows]
    found = measured(tokens, mask)
    n = float(len(rows))
    assert found["repetition/ngram/mean"] == (pytest.approx(shares.mean(), rel=1e-5), n)
    p95 = np.quantile(shares, 0.95, method="hazen")
    assert found["repetition/ngram/p95"] == (pytest.approx(p95, rel=1e-5), n)
    assert 0 < (shares > 0.5).mean() < 1
    assert found["repetition/ngram/share"] == (pytest.approx((shares > 0.5).mean()), n)
    assert found["repetition/longest_run/mean"] == (pytest.approx(np.mean(runs), rel=1e-5), n)


def test_exactly_half_repeated_is_not_more_than_half() -> None:
    tokens = torch.tensor([[1, 1, 1, 1, 1]])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    assert repeated_ngrams(tokens, mask)[0].item() == 0.5
    assert measured(tokens, mask)["repetition/ngram/share"] == (0.0, 1.0)


@pytest.mark.parametrize("vocabulary", [1, 2, 4])
def test_longest_runs_equal_itertools(vocabulary: int) -> None:
    tokens, mask = random_completions(vocabulary)
    expected = [
        max((len(list(run)) for _, run in groupby(row)), default=0) for row in kept(tokens, mask)
    ]
    assert 0 in expected
    assert longest_run(tokens, mask).tolist() == expected


def test_short_completions_are_not_judged() -> None:
    mask = torch.ones(3, 4, dtype=torch.bool)
    assert measured(torch.zeros(3, 4, dtype=torch.long), mask) == {}
    assert measured(torch.zeros(3, 2, dtype=torch.long), mask[:, :2]) == {}
    assert measured(torch.zeros(3, 0, dtype=torch.long), mask[:, :0]) == {}
    assert Repetition().measure(RolloutReading(), None) == ([], None)
