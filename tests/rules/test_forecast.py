import numpy as np
import pytest
from numpy.typing import NDArray

from entropylens.rules.forecast import forecast_crossing, score_forecasts

Floats = NDArray[np.float64]

STEP = np.arange(1, 201)


def noisy(values: Floats, seed: int, deviation: float = 0.05) -> Floats:
    generator = np.random.default_rng(seed)
    return values * np.exp(deviation * generator.standard_normal(len(values)))


@pytest.mark.parametrize(
    ("course", "model"),
    [
        (lambda step: np.exp(-step / 60), "log H on step"),
        (lambda step: 1 - step / 250, "H on step"),
        (lambda step: 1 - 0.18 * np.log(step), "H on log step"),
        (lambda step: 1.3 * step**-0.45, "log H on log step"),
    ],
)
def test_each_curve_is_recognised_and_crossed_where_it_crosses(course, model) -> None:  # type: ignore[no-untyped-def]
    ahead = np.arange(1, 2000)
    truth = ahead[course(ahead) < 0.1][0]
    known = np.arange(1, int(truth * 0.6))
    found = forecast_crossing(known, course(known), 0.1)
    assert (found.status, found.model) == ("expected", model)
    assert found.step == pytest.approx(truth, abs=1)
    assert found.low <= found.step <= found.high


def test_intervals_hold_what_then_happens_about_as_often_as_they_say() -> None:
    inside = []
    for seed in range(40):
        course = noisy(np.exp(-STEP / 60), seed)
        (score,) = score_forecasts(STEP, course, 0.1, at=(0.45,), repetitions=100, seed=seed)
        inside.append(score.is_inside)
    assert 0.75 <= np.mean([bool(one) for one in inside]) <= 1.0


def test_what_has_happened_is_reached_and_one_low_value_has_not() -> None:
    course = np.where(STEP < 120, 0.5, 0.05)
    found = forecast_crossing(STEP, course, 0.1)
    assert (found.status, found.step) == ("reached", 120)
    course = np.where(STEP == 200, 0.05, 0.5)
    assert forecast_crossing(STEP, course, 0.1).status != "reached"
    back = np.where((STEP > 50) & (STEP < 90), 0.05, np.where(STEP < 150, 0.5, 0.04))
    assert forecast_crossing(STEP, back, 0.1).step == 150


def test_entropy_that_does_not_fall_is_not_forecast_to_end() -> None:
    flat = forecast_crossing(STEP, np.full(200, 0.5), 0.1)
    assert (flat.status, flat.step) == ("not within the horizon", np.inf)
    rising = forecast_crossing(STEP, noisy(0.5 + STEP / 400, 1), 0.1)
    assert rising.status == "not within the horizon"
    still = [forecast_crossing(STEP, noisy(np.full(200, 0.5), s), 0.1).status for s in range(10)]
    assert still.count("not identified") >= 7
    assert "expected" not in still
    few = forecast_crossing(STEP[:29], np.linspace(1, 0.5, 29), 0.1)
    assert (few.status, few.reason) == ("not identified", "29 steps measured, 30 are needed")
    assert forecast_crossing(np.zeros(0), np.zeros(0), 0.1).status == "not identified"


def test_beyond_the_horizon_nothing_is_promised() -> None:
    course = noisy(1 - STEP / 1000, 2, 0.005)
    assert forecast_crossing(STEP, course, 0.1).status == "not within the horizon"
    far = forecast_crossing(STEP, course, 0.1, horizon=2000)
    assert far.status == "expected"
    assert far.step == pytest.approx(900, rel=0.1)
    assert far.horizon == 2200


def test_only_the_past_is_read_and_what_is_not_finite_is_left_out() -> None:
    course = noisy(np.exp(-STEP / 60), 3)
    changed = np.where(STEP > 90, 7.0, course)
    (score,) = score_forecasts(STEP, changed, 0.1, at=(0.4,))
    made = int(score.forecast.made_at)
    found = forecast_crossing(STEP[:made], course[:made], 0.1, horizon=200 - made)
    assert score.forecast == found
    holed = np.insert(course[:made], 10, np.nan)
    assert (
        forecast_crossing(np.insert(STEP[:made], 10, 10), holed, 0.1, horizon=200 - made) == found
    )


def test_an_entropy_of_zero_has_no_logarithm_and_is_forecast_all_the_same() -> None:
    course = np.maximum(1 - STEP[:80] / 100, 0.0)
    course[3] = 0.0
    found = forecast_crossing(STEP[:80], course, 0.1)
    assert found.status == "expected"
    assert found.model.startswith("H on")


def test_the_path_ahead_starts_at_the_present_and_ends_at_the_horizon() -> None:
    course = noisy(np.exp(-STEP / 100), 4)[:100]
    found = forecast_crossing(STEP[:100], course, 0.1, horizon=150)
    assert (found.path_step[0], found.path_step[-1]) == (101, 250)
    low, middle, high = found.path
    assert (low <= middle).all()
    assert (middle <= high).all()
    assert middle[0] == pytest.approx(np.exp(-1), rel=0.1)


def test_scores_count_errors_up_to_the_end_and_beat_those_who_know_less() -> None:
    step = np.arange(1, 301)
    course = noisy(np.exp(-step / 90), 5, 0.03)
    for score in score_forecasts(step, course, 0.1, at=(0.3, 0.5)):
        assert score.actual == pytest.approx(207, abs=10)
        assert score.is_inside
        assert score.error < score.straight_line_error < score.persistence_error
        assert score.persistence_error == 300 - score.actual
    past = step <= 90
    slope, intercept = np.polyfit(step[past], course[past], 1)
    (early,) = score_forecasts(step, course, 0.1, at=(89 / 299,))
    line = (0.1 - intercept) / slope
    assert early.straight_line_error == pytest.approx(abs(line - early.actual))


def test_a_run_that_never_crosses_is_scored_as_such() -> None:
    (score,) = score_forecasts(STEP, noisy(0.5 + STEP / 400, 6), 0.1, at=(0.5,))
    assert score.actual == np.inf
    assert score.is_inside
    assert score.error == score.persistence_error == score.straight_line_error == 0
    gone = np.where(STEP < 20, 0.5, 0.05)
    assert score_forecasts(STEP, gone, 0.1) == []
    assert score_forecasts(np.zeros(0), np.zeros(0), 0.1) == []


def test_a_dip_before_the_forecast_is_not_the_crossing_after_it() -> None:
    course = noisy(1 - STEP / 190, 7, 0.02)
    course[20:40] = 0.05
    (score,) = score_forecasts(STEP, course, 0.1, at=(0.5,))
    assert score.forecast.made_at == 100
    assert score.actual == pytest.approx(171, abs=6)
    course[130:150] = 0.05  # a dip that comes after it is
    (score,) = score_forecasts(STEP, course, 0.1, at=(0.5,))
    assert score.actual == 131


def test_noise_that_remembers_leaves_more_curves_possible_and_intervals_wide() -> None:
    step, inside = np.arange(1, 301), []
    for course in (np.exp(-step / 100), 1 - 0.155 * np.log(step)):
        for seed in range(30):
            noise = np.random.default_rng(seed).standard_normal(300)
            for at in range(1, 300):
                noise[at] = 0.9 * noise[at - 1] + np.sqrt(1 - 0.9**2) * noise[at]
            values = course * np.exp(0.1 * noise)
            scores = score_forecasts(step, values, 0.1, at=(0.3,), repetitions=100, seed=seed)
            inside += [score.is_inside for score in scores if score.is_inside is not None]
    assert len(inside) >= 50
    assert np.mean(inside) >= 0.8  # 0.56 if each value counted as news


def test_a_far_crossing_is_placed_between_the_steps_that_are_looked_at() -> None:
    found = forecast_crossing(STEP[:100], np.exp(-STEP[:100] / 60), np.exp(-10.0), horizon=1000)
    assert found.step == pytest.approx(600, abs=1)


def test_the_path_ahead_sets_out_from_where_the_entropy_is_now() -> None:
    step = STEP[:100]
    course = np.exp(-step / 100 + 0.3 * np.sin(2 * np.pi * step / 80))  # ends on a crest
    found = forecast_crossing(step, course, 0.1)
    assert found.path[1][0] == pytest.approx(course[-1], rel=0.1)
