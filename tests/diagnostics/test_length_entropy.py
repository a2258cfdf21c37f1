import numpy as np
import pytest
import torch
from scipy import stats

from entropylens.diagnostics.length_entropy import (
    LengthEntropy,
    average_ranks,
    group_deviations,
    length_slope,
    sequence_entropy,
)
from entropylens.registry import PolicyReading, TokenReading


def reading(
    sequences: list[list[float]], group: list[int] | None = None, *, extra: int = 0
) -> PolicyReading:
    """Sequences one after the other, then ``extra`` rows without a token that hold NaN."""
    length = torch.tensor([len(sequence) for sequence in sequences])
    n = int(length.sum()) + extra
    present = torch.arange(n) < n - extra
    rows = torch.arange(len(sequences)).repeat_interleave(length)
    entropy = torch.tensor([h for sequence in sequences for h in sequence] + [torch.nan] * extra)
    tokens = TokenReading(
        logprob=-entropy,
        entropy=entropy,
        present=present,
        weight=present.float(),
        position=torch.zeros(n, dtype=torch.long),
        sequence=torch.cat([rows, torch.full((extra,), 10**6)]),
        token_id=torch.zeros(n, dtype=torch.long),
        key=torch.linspace(0, 1, n),
        sequence_tokens=length,
        vocabulary=50,
    )
    return PolicyReading(
        tokens=tokens,
        advantage=torch.zeros(n),
        group=None if group is None else torch.tensor(group),
    )


def measured(found: PolicyReading) -> dict[str, tuple[float, float]]:
    """Value and weight of each metric."""
    blocks, _ = LengthEntropy().measure(found, None)
    return {
        name.removeprefix("length_entropy/"): (value, weight)
        for block in blocks
        for name, value, weight in zip(
            block.columns["name"],
            block.columns["value"].tolist(),
            block.columns["weight"].tolist(),
            strict=True,
        )
    }


def random_sequences(seed: int, count: int = 12) -> list[list[float]]:
    generator = np.random.default_rng(seed)
    return [
        generator.uniform(0, 3, size=length).astype(np.float32).tolist()
        for length in generator.integers(1, 20, size=count)
    ]


def everything(n: int) -> torch.Tensor:
    return torch.ones(n, dtype=torch.bool)


def test_correlations_and_slope_equal_scipys_and_ignore_rows_without_a_token() -> None:
    sequences = [*random_sequences(0), [], []]
    found = measured(reading(sequences, extra=5))
    means = np.array([np.mean(s) for s in sequences if s])
    length = np.array([len(s) for s in sequences if s])
    assert found["correlation"] == pytest.approx((stats.pearsonr(means, length)[0], 12), abs=1e-5)
    assert found["rank_correlation"] == pytest.approx(
        (stats.spearmanr(means, length)[0], 12), abs=1e-5
    )
    slope = np.polyfit(np.log(length), means, 1)[0]
    assert found["slope"] == pytest.approx((slope, 12), abs=1e-5)
    assert found["sequences"] == (12, 12)
    assert "within_group/correlation" not in found


def test_within_groups_the_difficulty_of_prompts_is_taken_out() -> None:
    """Hard prompts are long and undecided; among answers to one prompt it is the other way."""
    sequences, group = [], []
    for prompt, (tokens, entropy) in enumerate([(5, 0.5), (20, 1.5), (40, 3.0)]):
        for offset in (-1, 0, 1):
            sequences.append([entropy - 0.1 * offset] * (tokens + offset))
            group.append(7 * prompt)
    found = measured(reading(sequences, group))
    assert found["correlation"][0] > 0.95
    assert found["within_group/correlation"] == pytest.approx((-1.0, 9), abs=1e-5)


def test_within_group_correlation_equals_a_loop_and_leaves_lone_answers_out() -> None:
    sequences = [*random_sequences(1, 11), [], []]
    group = [3, 9, 3, 500, 9, 0, 3, 9, 0, 9, 77, 9, 77]
    found = measured(reading(sequences, group))
    dx, dy = [], []
    for number in set(group):
        members = [s for s, g in zip(sequences, group, strict=True) if g == number and s]
        if len(members) > 1:
            means = np.array([np.mean(s) for s in members])
            length = np.array([len(s) for s in members])
            dx += list(means - means.mean())
            dy += list(length - length.mean())
    expected = np.dot(dx, dy) / np.sqrt(np.dot(dx, dx) * np.dot(dy, dy))
    assert found["within_group/correlation"] == pytest.approx((expected, 9), abs=1e-5)


def test_the_order_of_sequences_and_the_names_of_groups_do_not_matter() -> None:
    sequences, group = random_sequences(2, 8), [0, 0, 1, 1, 1, 2, 2, 2]
    order = [5, 0, 7, 2, 1, 6, 4, 3]
    renamed = [100 - 10 * group[i] for i in order]
    first = measured(reading(sequences, group))
    second = measured(reading([sequences[i] for i in order], renamed))
    assert second.keys() == first.keys()
    for name, pair in first.items():
        assert second[name] == pytest.approx(pair, abs=1e-6)


def test_tokens_weigh_what_they_stand_for_in_the_mean_of_their_sequence() -> None:
    entropy = torch.tensor([1.0, 4.0, torch.nan, 2.0])
    weight = torch.tensor([3.0, 1.0, 0.0, 2.0])
    means, behind = sequence_entropy(entropy, weight, torch.tensor([0, 0, 99, 2]), 3)
    assert means[[0, 2]].tolist() == [1.75, 2.0]
    assert means[1].isnan()
    assert behind.tolist() == [4.0, 0.0, 2.0]


def test_slope_is_exact_for_an_entropy_that_grows_with_the_logarithm_of_length() -> None:
    tokens = torch.tensor([1, 10, 100, 1000])
    entropy = 0.3 + 0.25 * tokens.double().log()
    assert length_slope(entropy, tokens, everything(4)).item() == pytest.approx(0.25)
    flat = torch.full((4,), 0.7)
    assert length_slope(flat, tokens, everything(4)).item() == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize(
    "sequences",
    [[[1.0], [2.0, 3.0]], [[1.0, 2.0], [3.0, 4.0], [0.0, 1.0]], [[], [], []], [[0.5]]],
    ids=["two", "equally long", "empty", "one"],
)
def test_correlations_are_absent_for_few_sequences_or_one_length(
    sequences: list[list[float]],
) -> None:
    found = measured(reading(sequences, list(range(len(sequences)))))
    for name in ("correlation", "rank_correlation", "slope", "within_group/correlation"):
        assert found[name][1] == 0, name


def test_equal_entropies_have_no_correlation_but_a_slope_of_zero() -> None:
    found = measured(reading([[0.1] * length for length in (3, 7, 11, 13)], [0, 0, 1, 1]))
    for name in ("correlation", "rank_correlation", "within_group/correlation"):
        assert found[name][1] == 0, name
    assert found["slope"] == pytest.approx((0.0, 4), abs=1e-7)


def test_a_token_without_an_entropy_makes_all_unknown() -> None:
    found = measured(reading([[1.0, torch.nan], [2.0], [1.0, 2.0, 3.0], [1.0]], [0, 0, 0, 0]))
    for name in ("correlation", "rank_correlation", "slope", "within_group/correlation"):
        assert found[name][1] == 0, name


def test_ties_share_the_average_of_their_places() -> None:
    values = torch.tensor([2.0, 1.0, 2.0, -5.0, 2.0, 3.0])
    counted = torch.tensor([True, True, True, False, True, True])
    ranks = average_ranks(values, counted)[counted]
    assert ranks.tolist() == stats.rankdata(values[counted].numpy()).tolist() == [3, 1, 3, 3, 5]


def test_deviations_that_only_rounding_makes_are_none() -> None:
    value = torch.tensor([1.0, 1.0 + 2**-23, 3.0])
    deviations, shared = group_deviations(value, torch.tensor([5, 5, 8]), everything(3))
    assert deviations.tolist() == [0.0, 0.0, 0.0]
    assert shared.tolist() == [True, True, False]
