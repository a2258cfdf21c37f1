import numpy as np
import pytest

from entropylens.analysis.spikes import find_jumps, find_spikes


def noisy(count: int, level: float = 5.0, scale: float = 0.1) -> np.ndarray:
    return level + scale * np.random.default_rng(0).standard_normal(count)


def test_a_steady_series_has_no_spike() -> None:
    for values in (noisy(500), np.full(100, 3.0), np.linspace(8, 2, 300) + 0.05 * noisy(300, 0, 1)):
        assert find_spikes(np.arange(len(values)), values) == []


def test_a_rise_and_its_return_are_found_where_they_are() -> None:
    values = noisy(300)
    values[120:140] += np.linspace(4.0, 1.5, 20)
    (spike,) = find_spikes(10 * np.arange(300), values)
    assert (spike.start, spike.peak, spike.end) == (1200, 1200, 1400)
    assert spike.value == values[120]
    assert spike.usual == pytest.approx(np.median(values[95:120]))


def test_what_never_comes_back_has_no_end() -> None:
    values = noisy(200)
    values[150:] = 9.0
    (spike,) = find_spikes(np.arange(200), values)
    assert (spike.start, spike.end) == (150, None)


def test_a_short_dip_does_not_end_a_spike() -> None:
    values = noisy(200)
    values[100:120] = 9.0
    values[110:113] = 5.0
    (spike,) = find_spikes(np.arange(200), values)
    assert (spike.start, spike.end) == (100, 120)


@pytest.mark.parametrize("wild", [np.nan, np.inf])
def test_a_value_that_is_no_number_is_a_spike_and_its_peak(wild: float) -> None:
    values = noisy(100)
    values[60:63] = [7.0, wild, 6.0]
    (spike,) = find_spikes(np.arange(100), values)
    assert (spike.start, spike.peak, spike.end) == (60, 61, 63)
    assert not np.isfinite(spike.value)


def test_a_start_is_judged_by_earlier_values_only() -> None:
    values = noisy(200)
    values[150] = 8.0
    whole = find_spikes(np.arange(200), values)
    cut = find_spikes(np.arange(151), values[:151])
    assert whole[0].start == cut[0].start == 150


def test_the_first_values_and_an_empty_series_are_not_judged() -> None:
    assert find_spikes(np.arange(20), np.r_[np.ones(10), 50.0, np.ones(9)]) == []
    assert find_spikes(np.arange(0), np.zeros(0)) == []


def test_a_jump_is_a_rise_beyond_everything_before() -> None:
    warm_up = np.linspace(0.0, 1.0, 50)
    values = np.r_[warm_up, np.full(20, 1.0), 5.0, 1.0, 4.0]
    (jump,) = find_jumps(np.arange(1, 74), values)
    assert (jump.step, jump.before, jump.after) == (71, 1.0, 5.0)


def test_a_restart_to_the_old_rate_is_no_jump() -> None:
    cycle = np.cos(np.linspace(0, np.pi / 2, 50))
    assert find_jumps(np.arange(100), np.r_[cycle, cycle]) == []
