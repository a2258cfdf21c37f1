from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from readings import policy

from entropylens.diagnostics.covariance_concentration import (
    SHARES,
    CovarianceConcentration,
    concentration,
    top_means,
)
from entropylens.registry import PolicyReading


def measured(reading: PolicyReading) -> dict[str, tuple[float, float]]:
    ((block,), _) = CovarianceConcentration().measure(reading, None)
    columns = [block.columns["value"].tolist(), block.columns["weight"].tolist()]
    return dict(zip(block.columns["name"], zip(*columns, strict=True), strict=True))


def test_group_means_and_shares_equal_a_sorted_float64_list() -> None:
    example = policy(rows=125)
    n = len(example.advantage)
    assert n == 5000
    lp, a = example.tokens.logprob.double().numpy(), example.advantage.double().numpy()
    scores = sorted(((lp - lp.mean()) * (a - a.mean())).tolist(), reverse=True)
    sizes = sorted((abs(score) for score in scores), reverse=True)
    found = measured(example)
    for name, count in zip(SHARES, (1, 10, 100, 1000), strict=True):
        mean, weight = found[f"covariance/{name}/mean"]
        assert mean == pytest.approx(sum(scores[:count]) / count, rel=1e-5)
        share, _ = found[f"covariance/concentration/{name}/share"]
        assert share == pytest.approx(sum(sizes[:count]) / sum(sizes), rel=1e-5)
        assert weight == n


def test_the_names_say_the_per_cent() -> None:
    for name, share in SHARES.items():
        spelled = name.removeprefix("top_").removesuffix("_percent").replace("_", ".")
        assert share == pytest.approx(float(spelled) / 100)


def test_a_share_of_less_than_one_row_is_absent() -> None:
    weights = {name: weight for name, (_, weight) in measured(policy()).items()}
    assert [weights[f"covariance/{name}/mean"] for name in SHARES] == [0.0, 0.0, 320.0, 320.0]
    of = [weights[f"covariance/concentration/{name}/share"] for name in SHARES]
    assert of == [0.0, 0.0, 320.0, 320.0]


def test_rows_that_stand_for_many_tokens_do_not_make_a_share_measurable() -> None:
    example = policy()
    heavy = replace(example, tokens=replace(example.tokens, weight=torch.full((320,), 100.0)))
    found = measured(heavy)
    assert found["covariance/top_0_2_percent/mean"][1] == 0.0
    assert found["covariance/top_2_percent/mean"] == (
        measured(example)["covariance/top_2_percent/mean"][0],
        32000,
    )


def test_the_exact_fewest_rows_of_each_share_are_enough() -> None:
    for name, share in SHARES.items():
        rows = round(1 / share)
        example = policy(rows=rows // 5 + 1, columns=5)
        for present, expected in ((rows, float(rows)), (rows - 1, 0.0)):
            weight = (torch.arange(len(example.advantage)) < present).float()
            found = measured(replace(example, tokens=replace(example.tokens, weight=weight)))
            assert found[f"covariance/{name}/mean"][1] == expected


def test_a_weight_counts_like_that_many_tokens_and_the_last_row_in_part() -> None:
    scores = torch.tensor([5.0, -7.0, 1.0, 9.0])
    weight = torch.tensor([3.0, 2.0, 4.0, 1.0])
    repeated = torch.repeat_interleave(scores, weight.long())
    shares = (0.05, 0.1, 0.25, 0.3, 0.8, 1.0)
    for function in (top_means, concentration):
        expected = function(repeated, torch.ones(10), shares)
        assert torch.allclose(function(scores, weight, shares), expected)
    found = top_means(scores, weight, shares).tolist()
    assert found == pytest.approx([9.0, 9.0, (9 + 1.5 * 5) / 2.5, (9 + 10) / 3, 28 / 8, 14 / 10])


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=60))
def test_larger_shares_have_smaller_means_and_carry_more(values: list[float]) -> None:
    scores, shares = torch.tensor(values), (0.01, 0.1, 0.5, 1.0)
    means = top_means(scores, torch.ones(len(values)), shares)
    assert (means.diff() <= 1e-4).all()
    assert means[0] >= scores.mean() - 1e-4
    assert means[-1].item() == pytest.approx(np.mean(values), abs=1e-4)
    if any(values):
        carried = concentration(scores, torch.ones(len(values)), shares)
        assert (carried.diff() >= -1e-6).all()
        assert carried[-1] == 1.0
        assert all(c >= share - 1e-6 for c, share in zip(carried.tolist(), shares, strict=True))


def test_order_and_scale_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(2)
    scores, shares = torch.randn(50, generator=generator), (0.02, 0.2)
    weight = torch.rand(50, generator=generator)
    order = torch.randperm(50, generator=generator)
    for function in (top_means, concentration):
        plain = function(scores, weight, shares)
        assert torch.allclose(function(scores[order], 7 * weight[order], shares), plain)


def test_rows_that_are_not_scored_do_not_leak() -> None:
    example = policy()
    weight = (torch.arange(320) % 3 > 0).float()
    logprob, advantage = example.tokens.logprob.clone(), example.advantage.clone()
    logprob[weight == 0], advantage[weight == 0] = torch.inf, torch.nan
    spoilt = replace(
        example,
        tokens=replace(example.tokens, logprob=logprob, weight=weight),
        advantage=advantage,
    )
    kept = weight > 0
    lp, a = logprob[kept].double(), advantage[kept].double()
    scores = ((lp - lp.mean()) * (a - a.mean())).sort(descending=True).values
    budget = 0.2 * len(scores)
    top = scores[: int(budget)].sum() + (budget - int(budget)) * scores[int(budget)]
    assert measured(spoilt)["covariance/top_20_percent/mean"][0] == pytest.approx(
        float(top / budget)
    )


def test_a_score_that_is_not_a_number_shows() -> None:
    scores = torch.tensor([1.0, torch.nan, 3.0])
    assert top_means(scores, torch.ones(3), (0.1, 1.0)).isnan().all()
    assert concentration(scores, torch.ones(3), (0.1, 1.0)).isnan().all()


def test_an_infinite_score_shows_only_where_it_is_among_the_largest() -> None:
    scores = torch.tensor([1.0, -torch.inf, 3.0, 2.0])
    assert top_means(scores, torch.ones(4), (0.25, 0.75, 1.0)).tolist() == [3.0, 2.0, -torch.inf]


def test_no_concentration_where_nothing_varies_and_nothing_at_all_without_tokens() -> None:
    example = policy()
    same = measured(replace(example, advantage=torch.full((320,), 0.3)))
    assert same["covariance/top_20_percent/mean"] == (0.0, 320.0)
    assert same["covariance/concentration/top_20_percent/share"][1] == 0.0
    weight = torch.ones(320)
    advantage = torch.full((320,), 0.3)
    weight[7], advantage[7] = 0.0, torch.nan
    masked = replace(example.tokens, weight=weight)
    found = measured(replace(example, tokens=masked, advantage=advantage))
    assert found["covariance/top_20_percent/mean"] == (0.0, 319.0)
    assert found["covariance/concentration/top_20_percent/share"][1] == 0.0
    empty = replace(example, tokens=replace(example.tokens, weight=torch.zeros(320)))
    assert {weight for _, weight in measured(empty).values()} == {0.0}
    assert top_means(torch.ones(0), torch.ones(0), (0.5,)).isnan().all()
