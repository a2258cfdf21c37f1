import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from entropylens.figures.thinning import Memory, kept, smoothed


def test_extremes_and_wild_values_are_kept_within_the_bound() -> None:
    steps = np.arange(100_000)
    values = np.sin(steps / 1000)
    values[54_321], values[77_777], values[31_415] = 40.0, -40.0, np.nan
    chosen = kept(steps, values, 600)
    assert len(chosen) <= 600
    assert (np.diff(chosen) > 0).all()
    assert {54_321, 77_777, 31_415, 99_999} <= set(chosen.tolist())


def test_the_last_point_is_kept_whatever_its_value() -> None:
    values = np.tile([0.0, 5.0, -5.0, 1.0], 1000)
    assert kept(np.arange(4000), values, 100)[-1] == 3999


def test_an_infinity_is_kept_as_nan_is() -> None:
    values = np.zeros(4000)
    values[1234] = np.inf
    assert 1234 in kept(np.arange(4000), values, 100)


def test_a_short_series_is_left_alone() -> None:
    assert kept(np.arange(3), np.array([1.0, np.inf, 2.0])).tolist() == [0, 1, 2]


@given(
    st.lists(st.integers(1, 40), min_size=30, max_size=400),
    st.integers(0, 2**31),
    st.integers(8, 60),
)
def test_no_spike_of_any_bucket_is_hidden(gaps: list[int], seed: int, points: int) -> None:
    steps = np.cumsum(gaps)
    values = np.random.default_rng(seed).normal(size=len(steps))
    values[::17] = np.nan
    chosen = kept(steps, values, points)
    assert len(chosen) <= max(points, 4)
    assert np.nanmax(values[chosen]) == np.nanmax(values)
    assert np.nanmin(values[chosen]) == np.nanmin(values)
    assert np.isnan(values[chosen]).any()


def test_what_was_drawn_stays_drawn_as_a_series_grows() -> None:
    """But for the end that was, and for what a doubled bucket merges."""
    rng = np.random.default_rng(1)
    steps, values = np.arange(40_000), rng.normal(size=40_000)
    doublings = 0
    before: set[int] = set()
    for end in range(5_000, 40_000, 500):
        now = set(kept(steps[:end], values[:end], 500).tolist())
        lost = before - now
        settled = {at for at in lost if at < max(before) - 512}
        if settled:
            doublings += 1
            inside = {at for at in now if at <= max(before)}
            # What remains of settled stretches was drawn before: nothing new appears in the past.
            assert {at for at in inside if at < max(before) - 512} <= before
        before = now
    assert doublings <= 4


def test_the_average_equals_its_definition_and_goes_on_from_its_memory() -> None:
    values = np.random.default_rng(2).normal(size=200)
    values[50:60] = np.nan
    total = weight = 0.0
    expected = []
    for value in values:
        if np.isfinite(value):
            total, weight = 0.9 * total + 0.1 * value, 0.9 * weight + 0.1
            expected.append(total / weight)
        else:
            expected.append(np.nan)
    result, _ = smoothed(values, 0.9)
    assert result == pytest.approx(np.array(expected), nan_ok=True)
    first, memory = smoothed(values[:77], 0.9)
    second, _ = smoothed(values[77:], 0.9, memory)
    assert np.r_[first, second] == pytest.approx(result, nan_ok=True)


def test_a_constant_is_its_own_average_from_the_first_value_on() -> None:
    assert smoothed(np.full(5, 3.0), 0.99)[0] == pytest.approx(np.full(5, 3.0))


def test_nothing_finite_leaves_nothing_and_the_memory() -> None:
    averages, memory = smoothed(np.array([np.nan, np.inf]), 0.5, Memory(1.0, 0.5))
    assert np.isnan(averages).all()
    assert memory == Memory(1.0, 0.5)
