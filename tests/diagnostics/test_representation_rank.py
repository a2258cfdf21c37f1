import math

import numpy as np
import pytest
import torch
from readings import representation
from torch import Tensor

from entropylens.diagnostics._state_ranks import (
    alpha_req,
    effective_rank,
    linear_cka,
    mean_cosine,
    nsdim,
    numerical_rank,
    participation_ratio,
    rankme,
    singular_values,
    stable_rank,
    state_norm,
)
from entropylens.diagnostics.representation_rank import RepresentationRank
from entropylens.registry import RepresentationReading


def measured(states: Tensor) -> dict[str, float]:
    """What is written of one layer; metrics with weight 0 are left out, as in the log."""
    (block,), _ = RepresentationRank().measure(RepresentationReading(states={"a": states}), None)
    names, values, weight = (block.columns[key] for key in ("name", "value", "weight"))
    rows = zip(names, values.tolist(), weight.tolist(), strict=True)
    return {name.removeprefix("representation/"): value for name, value, w in rows if w > 0}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def orthogonal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(rows, columns, seed=seed).double()).Q


def centred_directions(rows: int, columns: int) -> Tensor:
    """Orthonormal columns that are all orthogonal to a constant one."""
    filled = torch.cat([torch.ones(rows, 1), normal(rows, columns)], 1).double()
    return torch.linalg.qr(filled).Q[:, 1:]


@pytest.mark.parametrize("shape", [(40, 12), (12, 40)])
def test_every_measure_agrees_with_the_singular_value_decomposition(
    shape: tuple[int, int],
) -> None:
    states = normal(*shape) * torch.linspace(0.2, 2, shape[1]) + 0.7
    found = measured(states)
    a = states.numpy().astype(np.float64)
    n, d = a.shape
    s = np.linalg.svd(a, compute_uv=False)
    p = s / s.sum() + 1e-7
    assert found["rankme"] == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-6)
    eigenvalues = np.clip(np.linalg.eigvalsh(np.cov(a.T, bias=True)), 0, None)
    eigenvalues = eigenvalues[eigenvalues > 1e-12]
    q = np.sqrt(eigenvalues) / np.sqrt(eigenvalues).sum()
    assert found["effective_rank"] == pytest.approx(math.exp(-(q * np.log(q)).sum()), rel=1e-5)
    assert found["participation_ratio"] == pytest.approx(
        eigenvalues.sum() ** 2 / (eigenvalues**2).sum(), rel=1e-6
    )
    assert found["stable_rank"] == pytest.approx(eigenvalues.sum() / eigenvalues.max(), rel=1e-6)
    assert found["norm"] == pytest.approx(np.mean([row @ row for row in a]) ** 0.5, rel=1e-6)
    cosines = [
        a[i] @ a[j] / np.linalg.norm(a[i]) / np.linalg.norm(a[j])
        for i in range(n)
        for j in range(n)
        if i != j
    ]
    assert found["mean_cosine"] == pytest.approx(np.mean(cosines), rel=1e-6)
    assert found["numerical_rank"] == min(n, d + 1)
    assert "alpha_req" not in found


def test_it_writes_each_layer_with_the_number_of_its_rows_as_weight() -> None:
    blocks, _ = RepresentationRank().measure(representation(), None)
    assert [block.columns["module"] for block in blocks] == ["layers.0", "layers.1"]
    for block in blocks:
        kept = block.columns["weight"][block.columns["value"].isfinite()]
        assert set(kept.tolist()) == {60.0}


def test_equal_directions_count_as_many_as_there_are() -> None:
    states = 3 * centred_directions(50, 7) @ orthogonal(20, 7, seed=1).T
    found = measured(states.float())
    for name in ("rankme", "effective_rank", "participation_ratio", "stable_rank"):
        assert found[name] == pytest.approx(7, rel=1e-4), name
    assert found["numerical_rank"] == 8
    assert found["numerical_rank_coarse"] == 8


def test_a_large_mean_shows_in_rankme_and_in_no_centred_measure() -> None:
    spread = centred_directions(50, 7) @ orthogonal(20, 7, seed=1).T
    found = measured((spread + 1000).float())
    assert found["rankme"] < 1.1
    # Rounding of the states is left out: its 13 directions would add 0.05.
    assert found["effective_rank"] == pytest.approx(7, rel=2e-3)
    assert found["stable_rank"] == pytest.approx(7, rel=2e-3)
    assert found["mean_cosine"] == pytest.approx(1, abs=1e-6)


def test_rank_one_states_have_rank_one() -> None:
    direction = normal(30, seed=2)
    found = measured(torch.outer(normal(40), direction))
    for name in ("effective_rank", "participation_ratio", "stable_rank"):
        assert found[name] == pytest.approx(1, abs=1e-6), name
    # The paper's epsilon: 30 directions of 1e-7 each, of which 29 hold nothing.
    empty = 29 * 1e-7 * -math.log(1e-7)
    assert found["rankme"] == pytest.approx(math.exp(empty - 1e-7), abs=1e-6)
    assert found["numerical_rank"] == 2


def test_the_weights_of_rankme_and_effective_rank_are_singular_values_not_eigenvalues() -> None:
    values = torch.tensor([3.0, 1.0])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(values).item() == pytest.approx(math.exp(entropy), rel=1e-6)
    assert rankme(values).item() == pytest.approx(math.exp(entropy), rel=1e-5)
    assert participation_ratio(values).item() == pytest.approx(100 / 82, rel=1e-6)
    assert stable_rank(values).item() == pytest.approx(10 / 9, rel=1e-6)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_the_exponent_of_an_exact_power_law_is_found(alpha: float) -> None:
    values = torch.arange(1, 121, dtype=torch.float64) ** (-alpha / 2)
    assert alpha_req(values).item() == pytest.approx(alpha, rel=1e-10)
    states = centred_directions(200, 120) * values @ orthogonal(130, 120, seed=3).T
    assert measured(states.float())["alpha_req"] == pytest.approx(alpha, rel=1e-4)


def test_the_power_law_is_fitted_to_ranks_6_to_100_with_weights_of_one_over_rank() -> None:
    generator = np.random.default_rng(0)
    eigenvalues = np.sort(np.exp(generator.normal(size=130)))[::-1]
    ranks = np.arange(6, 101)
    slope = np.polyfit(np.log(ranks), np.log(eigenvalues[5:100]), 1, w=ranks**-0.5)[0]
    assert alpha_req(torch.tensor(eigenvalues**0.5)).item() == pytest.approx(-slope, rel=1e-10)


def test_directions_below_rounding_take_no_part_in_the_power_law() -> None:
    values = torch.arange(1, 41, dtype=torch.float64) ** -0.5
    states = centred_directions(100, 40) * values @ orthogonal(80, 40, seed=3).T
    assert measured(states.float())["alpha_req"] == pytest.approx(1, rel=1e-3)
    assert alpha_req(values[:15]).item() == pytest.approx(1)
    assert alpha_req(values[:14]).isnan()
    assert alpha_req(torch.cat([values[:14], torch.zeros(30)])).isnan()
    assert alpha_req(values[:3]).isnan()


def test_ranks_do_not_change_with_scale_rotation_order_or_a_shift_where_centred() -> None:
    states = normal(60, 24) * torch.linspace(0.1, 2, 24) + 0.3
    rotated = states[torch.randperm(60, generator=torch.Generator().manual_seed(1))].double()
    rotated = 1e-3 * rotated @ orthogonal(24, 24, seed=5)
    before, after = measured(states), measured(rotated.float())
    assert before.pop("norm") == pytest.approx(1e3 * after.pop("norm"), rel=1e-5)
    assert after == pytest.approx(before, rel=1e-4)
    shifted = measured(states + 5)
    for name in ("effective_rank", "participation_ratio", "stable_rank", "alpha_req"):
        assert shifted[name] == pytest.approx(before[name], rel=1e-4), name


def test_states_that_are_all_alike_have_no_spread_but_a_size() -> None:
    states = normal(1, 16).expand(30, 16) * 3
    found = measured(states)
    assert set(found) == {
        "rankme", "norm", "mean_cosine", "numerical_rank", "numerical_rank_coarse"
    }  # fmt: skip
    assert found["mean_cosine"] == pytest.approx(1)
    assert found["numerical_rank"] == 1
    noise = 5e-7 * normal(30, 16, seed=4)
    assert set(measured(states + noise * states.abs())) == set(found)


def test_zero_states_have_neither_rank_nor_direction() -> None:
    found = measured(torch.zeros(10, 4))
    assert found == {"numerical_rank": 0, "numerical_rank_coarse": 0, "norm": 0}


def test_one_row_has_a_size_only_in_part() -> None:
    found = measured(torch.tensor([[3.0, 4.0]]))
    assert found["norm"] == pytest.approx(5)
    assert "effective_rank" not in found
    assert "mean_cosine" not in found


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_layer_with_a_state_that_is_not_finite_writes_nothing(bad: float) -> None:
    states = normal(20, 30)
    states[3, 4] = bad
    assert measured(states) == {}
    assert singular_values(states).isnan().all()


def test_rows_that_are_zero_have_no_direction() -> None:
    states = torch.tensor([[1.0, 0.0], [0.0, 0.0], [3.0, 3.0]])
    assert mean_cosine(states).item() == pytest.approx(0.5**0.5)
    assert state_norm(states).item() == pytest.approx((19 / 3) ** 0.5)
    assert mean_cosine(torch.eye(2)[:1]).isnan()


def test_opposite_rows_have_the_least_cosine() -> None:
    assert mean_cosine(torch.tensor([[1.0, 2.0], [-2.0, -4.0]])).item() == pytest.approx(-1)


def test_singular_values_are_those_of_the_decomposition_down_to_rounding() -> None:
    exact = torch.logspace(0, -12, 13, dtype=torch.float64)
    matrix = orthogonal(30, 13) * exact @ orthogonal(20, 13, seed=1).T
    found = singular_values(matrix)
    assert found.shape == (20,)
    torch.testing.assert_close(found[:7], exact[:7], rtol=1e-2, atol=0)
    assert not found[7:].any()


def test_the_two_numerical_ranks_count_above_their_tolerances() -> None:
    exact = torch.tensor([1.0, 4e-3, 3e-4, 1e-5, 4e-6], dtype=torch.float64)
    states = centred_directions(60, 5) * exact @ orthogonal(10, 5, seed=1).T
    found = measured(states.float())
    # 60 * 1.2e-7 = 7e-6, the largest singular value being about 1 and the constant's 0.3.
    assert found["numerical_rank"] == 5
    assert found["numerical_rank_coarse"] == 3
    assert numerical_rank(exact, 1e-3).item() == 2
    assert numerical_rank(torch.tensor([1.0, torch.nan]), 0.1).isnan()


def test_random_polynomials_of_degree_5_span_6_dimensions() -> None:
    x = torch.linspace(-1, 1, 400, dtype=torch.float64)
    powers = torch.stack([x**k for k in range(6)], 1)
    assert nsdim(powers @ normal(6, 200).double()).item() == 6


def test_an_affine_family_spans_the_inputs_and_a_constant() -> None:
    x = normal(100, 3).double()
    family = torch.cat([x, torch.ones(100, 1).double()], 1) @ normal(4, 50, seed=1).double()
    assert nsdim(family).item() == 4
    assert nsdim(family[:, :2]).item() == 2


@pytest.mark.parametrize(
    ("bound", "width", "numerical", "coarse"),
    [
        (1, 200, 19, 5),
        (1, 800, 19, 5),
        (3, 200, 40, 9),
        (3, 800, 40, 9),
        (10, 200, 92, 20),
        (10, 800, 108, 21),
        (30, 200, 116, 42),
        (30, 800, 257, 46),
    ],
)
def test_units_of_bounded_weights_span_far_fewer_dimensions_than_their_number(
    bound: float, width: int, numerical: int, coarse: int
) -> None:
    """Counts of the specification, whose draws of the weights are not known."""
    generator = torch.Generator().manual_seed(0)
    w, b = bound * (2 * torch.rand(2, width, generator=generator).double() - 1)
    x = torch.linspace(-1, 1, 400, dtype=torch.float64)
    family = (x[:, None] * w + b).tanh()
    assert nsdim(family).item() == pytest.approx(numerical, rel=0.06, abs=1)
    assert nsdim(family, 1e-3).item() == pytest.approx(coarse, rel=0.06, abs=1)


def test_similarity_is_one_under_rotation_and_scale() -> None:
    x = normal(40, 10).double()
    rotated = x @ orthogonal(10, 10, seed=2)
    for debiased in (False, True):
        assert linear_cka(x, rotated, debiased=debiased).item() == pytest.approx(1)
        assert linear_cka(x, -7 * x + 3, debiased=debiased).item() == pytest.approx(1)


def test_similarity_is_that_of_the_cross_covariance() -> None:
    x, y = normal(30, 6).numpy(), normal(30, 9, seed=1).numpy() + 2
    xc, yc = (a.astype(np.float64) - a.mean(0, dtype=np.float64) for a in (x, y))
    expected = np.linalg.norm(yc.T @ xc) ** 2
    expected /= np.linalg.norm(xc.T @ xc) * np.linalg.norm(yc.T @ yc)
    assert linear_cka(torch.tensor(x), torch.tensor(y)).item() == pytest.approx(expected)


def test_debiased_similarity_of_unrelated_states_is_zero_on_average_and_can_be_negative() -> None:
    pairs = [(normal(20, 50, seed=2 * i), normal(20, 50, seed=2 * i + 1)) for i in range(60)]
    debiased = torch.stack([linear_cka(x, y, debiased=True) for x, y in pairs])
    assert debiased.min() < 0
    assert abs(debiased.mean()) < 3 * debiased.std() / 60**0.5
    assert min(linear_cka(x, y) for x, y in pairs) > 0.5


def test_what_is_no_matrix_or_no_pair_of_them_is_refused() -> None:
    with pytest.raises(ValueError, match=r"singular_values: expected a matrix .* got shape \(3,\)"):
        singular_values(torch.ones(3))
    with pytest.raises(ValueError, match=r"nsdim: expected a matrix .* got shape \(0, 3\)"):
        nsdim(torch.ones(0, 3))
    with pytest.raises(ValueError, match=r"linear_cka: expected the same rows twice.* got 3 and 4"):
        linear_cka(torch.ones(3, 2), torch.ones(4, 2))
    with pytest.raises(ValueError, match="at least 4 where debiased, got 3 and 3"):
        linear_cka(torch.ones(3, 2), torch.ones(3, 2), debiased=True)
