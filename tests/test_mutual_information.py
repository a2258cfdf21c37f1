import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from entropylens.mutual_information import (
    Estimate,
    estimate_mutual_information,
    extrapolate,
    infonce,
    smile,
)

SMALL: dict[str, Any] = {
    "epochs": 15,
    "hidden": 24,
    "embedding": 6,
    "learning_rate": 3e-3,
    "gammas": range(1, 6),
    "shuffles": 2,
}


def gaussian(rows: int, correlation: float, pairs: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + seed)
    x, noise = torch.randn(2, rows, pairs, generator=generator)
    return x, correlation * x + (1 - correlation**2) ** 0.5 * noise


def information(correlation: float, pairs: int = 1) -> float:
    return -pairs / 2 * math.log(1 - correlation**2)


def small(x: Any, y: Any, **other: Any) -> Estimate:
    return estimate_mutual_information(x, y, **{**SMALL, **other})


def scores(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def test_infonce_of_a_perfect_critic_is_the_logarithm_of_the_batch() -> None:
    for size in (2, 16, 100):
        assert infonce(1e4 * torch.eye(size)).item() == pytest.approx(math.log(size), rel=1e-5)


def test_infonce_of_a_critic_that_knows_nothing_is_zero() -> None:
    assert infonce(torch.full((16, 16), 3.0)).item() == pytest.approx(0, abs=1e-6)


def test_infonce_is_the_gain_over_guessing_among_the_rows_own_candidates() -> None:
    given = scores(2, 7, 7)
    s = given.double().numpy()
    for batch in range(2):
        slow = np.mean(
            [
                math.log(math.exp(s[batch, i, i]) / np.mean([math.exp(v) for v in s[batch, i]]))
                for i in range(7)
            ]
        )
        assert infonce(given)[batch].item() == pytest.approx(slow, rel=1e-5)
    assert infonce(given + torch.arange(7.0)[:, None]).tolist() == pytest.approx(
        infonce(given).tolist(), rel=1e-4
    )


def test_smile_is_donsker_and_varadhans_bound_where_nothing_is_clipped() -> None:
    given = scores(2, 7, 7)
    s = given.double().numpy()
    for batch in range(2):
        others = [math.exp(s[batch, i, j]) for i in range(7) for j in range(7) if i != j]
        slow = np.trace(s[batch]) / 7 - math.log(np.mean(others))
        assert smile(given, math.inf)[batch].item() == pytest.approx(slow, rel=1e-5)


def test_smile_clips_what_is_not_paired_alone() -> None:
    given = torch.tensor([[9.0, 8.0], [-8.0, 9.0]])
    expected = 9 - math.log((math.exp(5) + math.exp(-5)) / 2)
    assert smile(given).item() == pytest.approx(expected, rel=1e-6)


def of_all(gammas: range) -> list[int]:
    return [gamma for gamma in gammas for _ in range(gamma)]


def test_a_bias_in_proportion_to_the_number_of_parts_is_taken_off_exactly() -> None:
    gammas = of_all(range(1, 11))
    line = extrapolate(gammas, [1.5 + 0.04 * gamma for gamma in gammas])
    assert line.value == pytest.approx(1.5)
    assert line.slope == pytest.approx(0.04)
    assert line.error == pytest.approx(0, abs=1e-9)
    assert line.gammas == tuple(range(1, 11))
    assert line.reasons == ()


def test_the_line_weighs_every_gamma_alike_and_its_interval_is_students() -> None:
    gammas = np.array(of_all(range(1, 9)))
    values = 2 + 0.1 * gammas + 0.1 * np.random.default_rng(0).normal(size=len(gammas))
    line = extrapolate(gammas.tolist(), values.tolist(), confidence=0.9)
    design = np.column_stack([np.ones(len(gammas)), gammas])
    weights = np.diag(1 / gammas)
    inverse = np.linalg.inv(design.T @ weights @ design)
    value, slope = inverse @ design.T @ weights @ values
    residuals = values - value - slope * gammas
    variance = residuals @ weights @ residuals / (len(gammas) - 2) * inverse[0, 0]
    assert line.value == pytest.approx(value)
    assert line.slope == pytest.approx(slope)
    # Student's t with 34 degrees of freedom at 0.95.
    assert line.error == pytest.approx(1.6909 * variance**0.5, rel=1e-4)


def test_the_interval_of_a_line_holds_the_truth_as_often_as_it_says() -> None:
    gammas, generator = np.array(of_all(range(1, 8))), np.random.default_rng(1)
    inside = 0
    for _ in range(300):
        values = 1 + 0.2 * gammas + 0.1 * gammas**0.5 * generator.normal(size=len(gammas))
        line = extrapolate(gammas.tolist(), values.tolist())
        inside += abs(line.value - 1) < line.error
    assert inside / 300 == pytest.approx(0.68, abs=0.08)


def test_the_largest_gammas_are_dropped_until_the_rest_lie_on_a_line() -> None:
    gammas = of_all(range(1, 11))
    bent = [1 + 0.1 * g + (0.2 * (g - 7) if g > 7 else 0) for g in gammas]
    line = extrapolate(gammas, bent)
    assert line.gammas[-1] in (7, 8)
    assert line.value == pytest.approx(1, abs=0.03)
    assert line.reasons == ()


def test_estimates_that_lie_on_no_line_are_unreliable_and_it_says_so() -> None:
    gammas = of_all(range(1, 11))
    line = extrapolate(gammas, [1 + 0.1 * g**3 for g in gammas])
    assert line.gammas == (1, 2, 3, 4, 5)
    assert "lie on no line for 5 gammas" in line.reasons[0]
    few = extrapolate(of_all(range(1, 4)), [1 + 0.1 * g for g in of_all(range(1, 4))])
    assert "lie on no line for 5 gammas" in few.reasons[0]


def test_a_curvature_counts_that_is_a_tenth_of_the_slope_and_two_standard_errors() -> None:
    gammas = of_all(range(1, 11))
    tiny = extrapolate(gammas, [1 + 0.1 * g + 0.001 * g**2 for g in gammas])
    assert tiny.gammas == tuple(range(1, 11))
    assert tiny.reasons == ()
    strong = extrapolate(gammas, [1 + 0.1 * g + 0.02 * g**2 for g in gammas])
    assert "lie on no line" in strong.reasons[0]


def test_flat_noise_is_a_line_although_its_curvature_is_large_beside_its_slope() -> None:
    gammas, generator = of_all(range(1, 11)), np.random.default_rng(2)
    lines = [
        extrapolate(gammas, (1 + 0.01 * generator.normal(size=len(gammas))).tolist())
        for _ in range(40)
    ]
    assert sum(line.gammas == tuple(range(1, 11)) for line in lines) >= 34


def test_a_value_that_hangs_on_the_whole_sample_alone_is_unreliable() -> None:
    gammas = of_all(range(1, 7))
    line = extrapolate(gammas, [0.4 if g == 1 else 1 + 0.05 * g for g in gammas])
    assert any("hangs on the whole sample alone" in reason for reason in line.reasons)


def test_a_part_that_stands_out_has_a_large_residual() -> None:
    gammas = of_all(range(1, 9))
    values = 1 + 0.01 * np.random.default_rng(0).normal(size=len(gammas))
    assert extrapolate(gammas, values.tolist()).largest_residual < 4
    values[20] += 0.3
    assert extrapolate(gammas, values.tolist()).largest_residual > 10


@pytest.mark.parametrize("correlation", [0.5, 0.9])
def test_a_bivariate_gaussian_has_its_information_within_the_interval(correlation: float) -> None:
    found = small(*gaussian(1000, correlation), confidence=0.95)
    low, high = found.interval
    assert low < information(correlation) < high
    assert high - low < 0.2
    assert found.is_reliable, found.reasons
    assert max(found.null) < found.rows[0].mean


@pytest.mark.parametrize("bound", ["infonce", "smile"])
def test_independent_variables_share_nothing(bound: str) -> None:
    found = small(*gaussian(600, 0), bound=bound, seed=4)
    assert not found.found
    assert found.value == 0
    assert found.interval[0] <= 0 < found.interval[1]
    assert found.reasons[0].startswith("no MI: ")
    assert not found.is_reliable


def test_more_than_rows_can_tell_by_infonce_is_called_saturated() -> None:
    x, _ = gaussian(200, 0, pairs=16)
    found = small(x, x, epochs=20, shuffles=0, embedding=16, batch=32)
    assert any(reason.startswith("saturated: ") for reason in found.reasons), found.rows
    assert found.rows[0].mean < math.log(180)
    free = small(x, x, epochs=20, shuffles=0, embedding=16, batch=32, bound="smile")
    assert not any(reason.startswith("saturated: ") for reason in free.reasons)


def test_it_is_the_same_for_a_seed_and_touches_no_generator_of_the_training() -> None:
    x, y = gaussian(300, 0.9)
    before = torch.get_rng_state()
    short = {"epochs": 3, "gammas": (1, 2, 3)}
    first, again = (small(x, y, seed=5, **short) for _ in range(2))
    assert first == again
    assert small(x, y, seed=6, **short).rows[0].values != first.rows[0].values
    assert torch.equal(before, torch.get_rng_state())


def test_it_does_not_change_with_the_units_of_the_variables() -> None:
    x, y = gaussian(300, 0.9)
    short = {"epochs": 6, "gammas": (1, 2, 3), "shuffles": 0}
    first = small(x, y, **short)
    units = small((1024 * x.double() + 7).numpy(), -y.double() / 8, **short)
    assert units.rows[0].values[0] == pytest.approx(first.rows[0].values[0], abs=0.05)


def test_parts_are_disjoint_and_reported_with_their_sizes() -> None:
    shown: list[tuple[int, int]] = []
    found = small(
        *gaussian(307, 0.9), epochs=4, gammas=(3, 2, 1), shuffles=1,
        progress=lambda done, total: shown.append((done, total)),
    )  # fmt: skip
    assert [(row.gamma, row.samples, len(row.values)) for row in found.rows] == [
        (1, 307, 1), (2, 153, 2), (3, 102, 3)
    ]  # fmt: skip
    assert shown == [(done, 16) for done in range(1, 17)]


def test_a_concatenated_critic_finds_the_same() -> None:
    x, y = gaussian(250, 0.9)
    found = small(x, y, critic="concatenated", gammas=(1, 2, 3), shuffles=0, batch=50)
    assert found.rows[0].mean == pytest.approx(information(0.9), abs=0.2)


def test_what_cannot_be_estimated_is_refused() -> None:
    x, y = gaussian(100, 0.5)
    for arguments, message in [
        ((x, y[:50]), "expected the same rows twice, 20 for each of 5 parts, got 100 and 50"),
        ((x[:99], y[:99]), "20 for each of 5 parts, got 99 and 99; use smaller gammas"),
        ((x * torch.nan, y), r"expected x to hold finite numbers, got shape \(100, 1\)"),
        ((x, y[:0]), r"expected y to hold finite numbers, got shape \(0, 1\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            small(*arguments)
    with pytest.raises(ValueError, match=r"at least 3 gammas from 1 on, got \[2, 3, 4\]"):
        small(x, y, gammas=(2, 3, 4))
    with pytest.raises(
        ValueError, match=r"infonce, smile and critic .* got 'mine' and 'separable'"
    ):
        small(x, y, bound="mine")
    with pytest.raises(ValueError, match="expected at least 3 different gammas"):
        extrapolate([1, 2], [0.5, 0.6])


@pytest.mark.soak
@pytest.mark.parametrize("pairs", [1, 5])
def test_over_seeds_the_bias_is_small_and_the_interval_covers(pairs: int) -> None:
    truth = information(0.8, pairs)
    found = [
        estimate_mutual_information(
            *gaussian(1000, 0.8, pairs, seed), seed=seed, epochs=25, hidden=32, embedding=8,
            learning_rate=2e-3, gammas=range(1, 7), shuffles=0, confidence=0.95,
        )
        for seed in range(10)
    ]  # fmt: skip
    assert np.mean([one.value for one in found]) == pytest.approx(truth, abs=0.1 * truth)
    assert sum(one.interval[0] < truth < one.interval[1] for one in found) >= 7
