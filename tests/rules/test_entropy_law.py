from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from entropylens.rules.blocks import fit_line
from entropylens.rules.entropy_law import METRICS, EntropyLaw, fit_entropy_law, pair_by_step

Floats = NDArray[np.float64]


def falling(count: int) -> Floats:
    return 0.1 + np.exp(-np.linspace(0, 4, count))


def walk(generator: np.random.Generator, count: int, reach: float) -> Floats:
    return generator.standard_normal(count).cumsum() * reach / np.sqrt(count)


def refused(law: EntropyLaw, reason: str) -> bool:
    return law.verdict == "not identified" and reason in law.reason


def test_an_exact_law_is_recovered() -> None:
    entropy = np.random.default_rng(0).uniform(0.05, 1.5, 60)
    law = fit_entropy_law(entropy, -0.2 * np.exp(entropy) + 0.6)
    assert law.verdict == "identified"
    assert abs(law.a - 0.2) < 1e-12
    assert abs(law.b - 0.6) < 1e-12
    assert abs(law.ceiling - 0.4) < 1e-12
    assert law.residual_std < 1e-12
    assert law.r_squared == pytest.approx(1)
    np.testing.assert_allclose(law.ceiling_interval, 0.4, atol=1e-9)


def test_figures_of_a_noisy_law_are_those_of_plain_least_squares() -> None:
    generator = np.random.default_rng(11)
    entropy = falling(150) + 0.03 * generator.standard_normal(150)
    reward = 0.6 - 0.2 * np.exp(entropy) + 0.02 * generator.standard_normal(150)
    law = fit_entropy_law(entropy, reward)
    slope, intercept = np.polyfit(np.exp(entropy), reward, 1)
    left = reward - intercept - slope * np.exp(entropy)
    assert (law.a, law.b) == pytest.approx((-slope, intercept))
    assert law.residual_std == pytest.approx(np.sqrt((left**2).sum() / 148))
    assert law.r_squared == pytest.approx(1 - left.var() / reward.var())
    step = np.arange(1, 151)
    rivals = [np.corrcoef(by, reward)[0, 1] ** 2 for by in (step, np.log(step))]
    assert law.time_r_squared == pytest.approx(max(rivals))
    for low, value, high in (
        (law.a_interval[0], 0.2, law.a_interval[1]),
        (law.b_interval[0], 0.6, law.b_interval[1]),
        (law.ceiling_interval[0], 0.4, law.ceiling_interval[1]),
    ):
        assert low < value < high
    assert law.is_identified
    assert law.steps == 150
    assert law.lowest_entropy == entropy.min()


def test_the_error_on_unseen_fifths_is_a_loop_over_fits_without_them() -> None:
    generator = np.random.default_rng(2)
    entropy = falling(53)
    reward = 0.6 - 0.2 * np.exp(entropy) + 0.02 * generator.standard_normal(53)
    step, errors = np.arange(1, 54), {"law": 0.0, "log": 0.0, "step": 0.0}
    for name, x in (("law", np.exp(entropy)), ("log", np.log(step)), ("step", step)):
        for fold in np.array_split(np.arange(53), 5):
            seen = np.setdiff1d(np.arange(53), fold)
            predicted = np.polyval(np.polyfit(x[seen], reward[seen], 1), x[fold])
            errors[name] += ((predicted - reward[fold]) ** 2).sum()
    law = fit_entropy_law(entropy, reward)
    assert law.prediction_error == pytest.approx(np.sqrt(errors["law"] / 53))
    best = min(errors["log"], errors["step"])
    assert law.time_prediction_error == pytest.approx(np.sqrt(best / 53))


def test_constant_entropy_few_steps_and_a_constant_reward_identify_nothing() -> None:
    reward = np.linspace(0, 1, 50)
    assert refused(fit_entropy_law(np.full(50, 0.7), reward), "hardly moved")
    assert refused(fit_entropy_law(falling(50), np.full(50, 0.3)), "reward never moved")
    assert refused(fit_entropy_law(falling(29), reward[:29]), "29 steps")
    nothing = fit_entropy_law(np.zeros(0), np.zeros(0))
    assert np.isnan([nothing.a, nothing.ceiling, *nothing.ceiling_interval]).all()
    with pytest.raises(ValueError, match="expected a fit, got none: 0 steps"):
        nothing.band(np.ones(1))


def test_a_law_of_the_wrong_sign_and_a_reward_of_noise_are_refused() -> None:
    generator = np.random.default_rng(3)
    noise = 0.02 * generator.standard_normal(100)
    assert refused(fit_entropy_law(falling(100), 0.2 * np.exp(falling(100)) + noise), "falls where")
    assert refused(fit_entropy_law(falling(100), noise), "may be 0")


def test_a_trend_in_time_is_not_taken_for_the_law() -> None:
    generator = np.random.default_rng(4)
    step = np.arange(1, 151)
    for trend in (step / 150, np.log(step) / 5):
        entropy = 1.2 - 0.9 * trend / trend.max() + 0.05 * generator.standard_normal(150)
        law = fit_entropy_law(entropy, 0.3 * trend + 0.02 * generator.standard_normal(150))
        assert refused(law, "time alone explains as much")
        assert law.a_interval[0] > 0  # by itself entropy looks convincing
        assert law.r_squared > 0.8


Course = Callable[[Floats], Floats]
SMOOTH: list[tuple[Course, Course]] = [
    (lambda s: 1 - 0.75 * s, lambda s: 0.1 + 0.5 * np.sqrt(s)),
    (lambda s: 0.1 + np.exp(-3 * s), lambda s: 0.2 + 0.4 / (1 + np.exp(-(s - 0.27) / 0.13))),
    (lambda s: 0.1 + np.exp(-20 * s), lambda s: 0.6 - 0.4 * np.exp(-25 * s)),
]


def remembering(generator: np.random.Generator, count: int, deviation: float) -> Floats:
    noise = deviation * generator.standard_normal(count)
    for at in range(1, count):
        noise[at] = 0.5 * noise[at - 1] + np.sqrt(0.75) * noise[at]
    return noise


@pytest.mark.parametrize(("entropy_course", "reward_course"), SMOOTH)
def test_smooth_courses_of_time_are_not_taken_for_the_law_but_ups_and_downs_are(
    entropy_course: Course, reward_course: Course
) -> None:
    share = np.arange(1.0, 301) / 300
    found, lasting, true = 0, 0, 0
    for seed in range(40):
        generator = np.random.default_rng(seed)
        entropy = np.maximum(entropy_course(share) + remembering(generator, 300, 0.05), 0.01)
        noise = remembering(generator, 300, 0.03)
        law = fit_entropy_law(entropy, reward_course(share) + noise, repetitions=100, seed=seed)
        found += law.is_identified
        lasting += "beside smooth courses" in law.reason
        law = fit_entropy_law(entropy, 0.6 - 0.2 * np.exp(entropy) + noise, repetitions=100)
        true += law.is_identified
    assert found <= 4
    assert lasting >= 20
    assert true >= 36


def test_beside_time_the_slope_is_that_of_one_regression_on_all() -> None:
    generator = np.random.default_rng(8)
    entropy = falling(120) + 0.05 * generator.standard_normal(120)
    reward = 0.6 - 0.2 * np.exp(entropy) + 0.02 * generator.standard_normal(120)
    times = (np.arange(120) / 119, np.log(np.arange(1, 121)) / np.log(120))
    waves = [np.cos(np.pi * j * time) for time in times for j in range(1, 5)]
    design = np.column_stack([np.exp(entropy), np.ones(120), *times, *waves])
    solved, *_ = np.linalg.lstsq(design, reward, rcond=None)
    parts = [y - design[:, 1:] @ np.linalg.pinv(design[:, 1:]) @ y for y in (design[:, 0], reward)]
    line = fit_line(parts[0], parts[1], repetitions=4000, parameters=12)
    left = reward - design @ solved
    error = np.sqrt(left @ left / (120 - 12) * np.linalg.pinv(design.T @ design)[0, 0])
    low, high = fit_entropy_law(entropy, reward, repetitions=4000).detrended_interval
    assert (-high, -low) == pytest.approx(tuple(np.quantile(line.draws[:, 1], [0.025, 0.975])))
    assert (low + high) / 2 == pytest.approx(-solved[0], abs=0.3 * error)
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.25)


def test_an_entropy_that_is_a_smooth_course_of_time_shows_nothing() -> None:
    x = 2 + np.cos(np.pi * np.arange(100) / 99)
    noise = 0.02 * np.random.default_rng(9).standard_normal(100)
    law = fit_entropy_law(np.log(x), 0.6 - 0.2 * x + noise)
    assert refused(law, "a smooth course of it")
    assert np.isnan(law.detrended_interval).all()


def test_noise_that_wanders_is_refused_however_well_all_else_fits() -> None:
    generator = np.random.default_rng(10)
    entropy = generator.uniform(0.3, 1.2, 150)
    still = 0.6 - 0.2 * np.exp(entropy) + 0.01 * generator.standard_normal(150)
    assert fit_entropy_law(entropy, still).is_identified
    wandering = 0
    for seed in range(20):
        drift = walk(np.random.default_rng(seed), 150, 0.3)
        law = fit_entropy_law(entropy, still + drift, repetitions=100)
        assert law.line is not None
        fits = (
            min(law.a_interval[0], law.detrended_interval[0]) > 0
            and law.prediction_error < law.time_prediction_error
        )
        if fits:
            assert law.is_identified == (law.line.memory <= 1 - 8 / 150)
            wandering += refused(law, "does not die out")
    assert wandering >= 5


def test_two_walks_that_know_nothing_of_each_other_are_seldom_taken_for_the_law() -> None:
    generator = np.random.default_rng(5)
    found, naive, runs = 0, 0, 120
    for seed in range(runs):
        entropy = 1 + np.abs(walk(generator, 150, 0.5))
        reward = walk(generator, 150, 0.2)
        law = fit_entropy_law(entropy, reward, repetitions=100, seed=seed)
        found += law.is_identified
        x = np.exp(entropy)
        error = law.residual_std / np.sqrt(((x - x.mean()) ** 2).sum())
        naive += abs(law.a) > 2 * error
    assert found / runs < 0.05
    assert naive / runs > 0.6


def test_the_band_holds_the_law_and_narrows_where_the_data_are() -> None:
    generator = np.random.default_rng(6)
    entropy = falling(200)
    reward = 0.6 - 0.2 * np.exp(entropy) + 0.02 * generator.standard_normal(200)
    law = fit_entropy_law(entropy, reward)
    middle, low, high = law.band(np.array([0.0, float(np.median(entropy)), 2.0]))
    np.testing.assert_allclose(middle, law.b - law.a * np.exp([0.0, np.median(entropy), 2.0]))
    assert (low < middle).all()
    assert (middle < high).all()
    assert np.argmin(high - low) == 1
    assert (low[0], high[0]) == pytest.approx(law.ceiling_interval)


def test_what_is_not_finite_is_left_out_and_seeds_decide_the_draws() -> None:
    generator = np.random.default_rng(7)
    entropy = falling(80)
    reward = 0.6 - 0.2 * np.exp(entropy) + 0.02 * generator.standard_normal(80)
    step = np.arange(80.0)
    spoiled = np.insert(entropy, [5, 9, 20], [np.nan, 1.0, 1e4])
    paid = np.insert(reward, [5, 9, 20], [0.1, np.inf, 0.1])
    at = np.insert(step, [5, 9, 20], [4.5, 8.5, 19.5])
    law = fit_entropy_law(entropy, reward, step=step)
    assert fit_entropy_law(spoiled, paid, step=at) == law
    assert fit_entropy_law(entropy, reward, step=step, seed=1).a_interval != law.a_interval


def test_a_reward_goes_with_the_entropies_until_the_next_rollout() -> None:
    step, entropy, reward = pair_by_step(
        np.array([2, 4, 5, 8, 9, 30]),
        np.array([1.0, 2.0, 4.0, np.nan, 6.0, 9.0]),
        np.array([1, 4, 7, 10]),
        np.array([0.1, 0.2, 0.3, 0.4]),
    )
    assert step.tolist() == [1, 4, 7]
    assert entropy.tolist() == [1.0, 3.0, 6.0]
    assert reward.tolist() == [0.1, 0.2, 0.3]
    none = np.zeros(0)
    assert not len(pair_by_step(np.arange(3), np.ones(3), none, none)[0])


def test_ceilings_are_rewards() -> None:
    units = {name: metric.unit for name, metric in METRICS.items() if "ceiling" in name}
    assert set(units.values()) == {"reward"}
