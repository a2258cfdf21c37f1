import numpy as np
import pytest
from scipy import stats

from entropylens.analysis.compare import (
    FinalValue,
    Interval,
    aligned,
    final_value,
    interval,
    ratio,
)

NAN = float("nan")


def test_the_final_value_is_the_mean_of_the_last_twentieth_of_the_steps() -> None:
    steps = np.r_[np.arange(0, 90, 10), 96, 98, 100]
    assert final_value(steps, steps.astype(float)) == FinalValue(98.0, 3, 0)
    assert final_value(steps, steps.astype(float), 1.0).count == 12
    assert final_value(np.array([0, 1000]), np.array([5.0, 3.0])) == FinalValue(3.0, 1, 0)
    assert final_value(np.array([7]), np.array([3.0])) == FinalValue(3.0, 1, 0)


def test_what_is_not_finite_is_counted_and_left_out() -> None:
    steps = np.arange(101)
    values = np.ones(101)
    values[[3, 98, 99]] = [NAN, NAN, np.inf]
    assert final_value(steps, values) == FinalValue(1.0, 4, 2)
    assert final_value(steps, np.full(101, NAN)) == FinalValue(None, 0, 6)
    assert final_value(np.zeros(0, int), np.zeros(0)) == FinalValue(None, 0, 0)


def test_a_wrong_share_or_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"final_value: expected a share above 0 .* got 0"):
        final_value(np.arange(3), np.ones(3), 0)
    with pytest.raises(ValueError, match="steps and values of one length, got 3 and 2"):
        final_value(np.arange(3), np.ones(2))


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("n", [2, 3, 10])
def test_an_interval_is_students(n: int, level: float) -> None:
    values = np.random.default_rng(n).normal(3, 2, n)
    found = interval(list(values), level)
    expected = stats.t.interval(level, n - 1, loc=values.mean(), scale=stats.sem(values))
    assert (found.low, found.high) == pytest.approx(expected, rel=1e-9)
    assert found.mean == pytest.approx(values.mean())
    assert found.n == n


@pytest.mark.parametrize("n", [2, 3, 5])
def test_an_interval_holds_the_mean_as_often_as_it_says(n: int) -> None:
    generator = np.random.default_rng(0)
    draws = [interval(generator.normal(1, 3, n), 0.9) for _ in range(4000)]  # type: ignore[arg-type]
    held = sum(one.low <= 1 <= one.high for one in draws if one.low is not None and one.high)
    assert held / 4000 == pytest.approx(0.9, abs=4 * np.sqrt(0.9 * 0.1 / 4000))


def test_an_interval_of_too_few_or_of_a_failed_seed_has_no_ends() -> None:
    assert interval([]) == Interval(None, None, None, 0)
    assert interval([2.0]) == Interval(2.0, None, None, 1)
    assert interval([2.0, 2.0]) == Interval(2.0, 2.0, 2.0, 2)
    failed = interval([2.0, NAN, 3.0])
    assert failed.mean is not None
    assert np.isnan(failed.mean)
    assert (failed.low, failed.high, failed.n) == (None, None, 3)
    with pytest.raises(ValueError, match="interval: expected a level between 0 and 1, got 95"):
        interval([1.0, 2.0], 95)


# -- a common axis -------------------------------------------------------------------------------


def test_the_axis_is_steps_seconds_or_tokens() -> None:
    steps, times = np.array([1, 2, 5, 10, 11]), np.array([100.0, 101, 104, 200, 201])
    tokens = np.array([2, 10]), np.array([20.0, 100.0])
    by_step = aligned(steps, times, tokens, "step")
    assert by_step.dtype == np.float64
    assert by_step.tolist() == [1, 2, 5, 10, 11]
    assert aligned(steps, times, None, "time", start=100.0).tolist() == [0, 1, 4, 100, 101]
    np.testing.assert_array_equal(aligned(steps, times, tokens, "tokens"), [NAN, 20, 50, 100, NAN])


def test_tokens_that_are_not_known_are_nan() -> None:
    steps = np.array([1, 2, 3])
    for tokens in (None, (np.zeros(0, int), np.zeros(0))):
        assert np.isnan(aligned(steps, steps.astype(float), tokens, "tokens")).all()
    holed = np.array([1, 2, 3]), np.array([10.0, NAN, 30.0])
    at = aligned(steps, steps.astype(float), holed, "tokens")
    np.testing.assert_array_equal(at, [10, NAN, 30])


def test_another_axis_or_length_is_refused() -> None:
    steps = np.array([1, 2])
    with pytest.raises(ValueError, match="aligned: expected by step, tokens or time, got 'epoch'"):
        aligned(steps, steps.astype(float), None, "epoch")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="aligned: expected steps and times of one length"):
        aligned(steps, np.zeros(3), None, "time")


def test_a_ratio_of_lines_is_the_ratio_of_their_formulas() -> None:
    base_x = np.array([0.0, 1, 4, 9])
    x = np.linspace(0, 9, 50)
    found = ratio(x, 3 * x + 5, base_x, 2 * base_x + 1)
    np.testing.assert_allclose(found, (3 * x + 5) / (2 * x + 1))
    np.testing.assert_allclose(ratio(base_x, base_x + 1, base_x, base_x + 1), np.ones(4))


def test_a_ratio_is_nan_where_it_is_not_known() -> None:
    base_x, base_y = np.array([0.0, 1, 2, 3, 4]), np.array([1.0, 2, NAN, 0, 1])
    x = np.array([-1.0, 0, 0.5, 1.5, 2, 3, 3.5, 4, 5, NAN])
    found = ratio(x, np.full(10, 3.0), base_x, base_y)
    np.testing.assert_array_equal(found, [NAN, 3, 2, NAN, NAN, NAN, 6, 3, NAN, NAN])
    endless = ratio(np.array([0.5, 1.0]), np.ones(2), np.array([0.0, 1]), np.array([np.inf, 2]))
    np.testing.assert_array_equal(endless, [NAN, 0.5])
    wild = ratio(np.arange(3.0), np.array([NAN, np.inf, 1]), np.arange(3.0), np.ones(3))
    np.testing.assert_array_equal(wild, [NAN, NAN, 1])


def test_a_baseline_with_unknown_places_or_without_values_does_no_harm() -> None:
    known = ratio(np.array([1.5, 9]), np.ones(2), np.array([NAN, 1, 2, NAN]), np.full(4, 0.5))
    np.testing.assert_array_equal(known, [2, NAN])
    assert np.isnan(ratio(np.ones(2), np.ones(2), np.zeros(0), np.zeros(0))).all()
    assert np.isnan(ratio(np.ones(1), np.ones(1), np.full(2, NAN), np.ones(2))).all()
    assert ratio(np.zeros(0), np.zeros(0), np.ones(1), np.ones(1)).shape == (0,)
    with pytest.raises(ValueError, match="ratio: expected base_x and base_y of one length"):
        ratio(np.ones(1), np.ones(1), np.ones(2), np.ones(3))
