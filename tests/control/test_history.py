"""What is ordinary, by the newest values of a quantity."""

import numpy as np
import pytest

from entropylens.control.history import History


def drawn(count: int, seed: int = 0) -> list[float]:
    return np.exp(np.random.default_rng(seed).normal(2.0, 0.7, count)).tolist()


def expected(values: list[float], factor: float, deviations: float) -> tuple[float, float]:
    """Lower median, and the largest ordinary value, from the definitions."""
    logs = np.log(values)
    middle = np.quantile(logs, 0.5, method="lower")
    spread = 1.4826 * np.quantile(np.abs(logs - middle), 0.5, method="lower")
    return np.exp(middle), np.exp(middle) * max(factor, np.exp(deviations * spread))


@pytest.mark.parametrize("count", [1, 2, 7, 16, 40])
@pytest.mark.parametrize(("factor", "deviations"), [(5.0, 8.0), (5.0, 0.1), (1.01, 2.0)])
def test_median_and_limit_are_those_of_the_newest_values(
    count: int, factor: float, deviations: float
) -> None:
    history, values = History(16), drawn(count)
    for value in values:
        history.add(value)
    middle, limit = expected(values[-16:], factor, deviations)
    assert history.values == values[-16:]
    assert len(history) == min(count, 16)
    assert history.median() == pytest.approx(middle, rel=1e-12)
    assert history.limit(factor, deviations) == pytest.approx(limit, rel=1e-12)


def test_a_value_exceeds_what_is_ordinary_only_above_both_limits() -> None:
    history = History(8, [1.0, 2.0, 4.0, 8.0, 16.0])
    # The median is 4, and 1.4826 log 2 the spread: one deviation is a factor of 2.795.
    assert history.limit(2.0, 1.0) == pytest.approx(4 * 2**1.4826)
    assert not history.exceeds(11.17, 2.0, 1.0)
    assert history.exceeds(11.19, 2.0, 1.0)
    assert not history.exceeds(11.99, 3.0, 1.0)
    assert history.exceeds(12.01, 3.0, 1.0)
    assert history.exceeds(float("inf"), 3.0, 1.0)
    assert not history.exceeds(float("nan"), 3.0, 1.0)


def test_without_values_nothing_is_out_of_the_ordinary() -> None:
    history = History(4)
    assert history.median() is None
    assert history.limit(2.0, 2.0) == float("inf")
    assert not history.exceeds(1e300, 2.0, 2.0)


def test_equal_values_have_a_spread_of_none_and_only_the_factor_counts() -> None:
    history = History(4, [3.0] * 9)
    assert history.limit(5.0, 8.0) == pytest.approx(15.0)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), float("-inf")])
def test_what_is_not_positive_and_finite_is_no_value(value: float) -> None:
    history = History(3, [1.0, 2.0])
    history.add(value)
    assert history.values == [1.0, 2.0]


def test_one_outlier_however_large_moves_the_limit_by_one_place_at_most() -> None:
    values = drawn(15)
    order = sorted(values)
    for outlier in (1e10, 1e300):
        history = History(16, [*values, outlier])
        assert history.median() == pytest.approx(order[7], rel=1e-12)
        assert history.limit(1.01, 8.0) < 1e6


def test_limits_beyond_the_range_of_numbers_are_finite() -> None:
    assert History(4, [1e300, 1e-300, 1e300]).limit(5.0, 8.0) < float("inf")


@pytest.mark.parametrize("count", [3, 50])
def test_one_made_of_its_values_goes_on_to_the_bit(count: int) -> None:
    history = History(16, drawn(count))
    again = History(16, history.values)
    for value in drawn(40, seed=1):
        assert again.median() == history.median()
        assert again.limit(2.0, 3.0) == history.limit(2.0, 3.0)
        history.add(value)
        again.add(value)
        assert again.values == history.values
