import re
from typing import Any

import numpy as np
import pytest

from entropylens.analysis.alarms import Alarm
from entropylens.analysis.overview import Curve
from entropylens.analysis.verdict import Verdict, judge
from entropylens.figures.thinning import kept

LOSS, REWARD = "loss/mean", "reward/mean"
ENTROPY, GRADIENT = "entropy/token/mean", "gradient/norm/before_clip"
LENGTHS = [400, 12_000]
"""Judged as it is, and thinned first."""


def drawn(values: Any) -> Curve:
    return Curve("", np.arange(1, len(values) + 1), np.asarray(values, dtype=float))


def noisy(count: int, level: Any = 2.0, share: float = 0.02, seed: int = 0) -> Any:
    return level * (1 + share * np.random.default_rng(seed).standard_normal(count))


def falling(count: int, first: float, last: float) -> Any:
    return noisy(count, np.geomspace(first, last, count))


def judged(state: str = "running", because: str = "", *alarms: Alarm, **values: Any) -> Verdict:
    names = {"loss": LOSS, "reward": REWARD, "entropy": ENTROPY, "gradient": GRADIENT}
    curves = {names[name]: drawn(value) for name, value in values.items()}
    thinned = {}
    for name, curve in curves.items():
        chosen = kept(curve.steps, curve.values)
        thinned[name] = Curve("", curve.steps[chosen], curve.values[chosen])
    verdict = judge(state, because, curves, alarms)
    assert verdict == judge(state, because, thinned, alarms)
    assert len(verdict.reason) <= 100
    return verdict


def alarm(severity: str, step: int = 7) -> Alarm:
    return Alarm("entropy_floor", severity, step, "the entropy is low", "train")


# -- failing -------------------------------------------------------------------------------------


def test_a_run_that_failed_or_crashed_is_failing_whatever_its_series_say() -> None:
    said = judged("failed", "CUDA out of\nmemory", loss=noisy(50))
    assert said == Verdict("failing", "the run failed: CUDA out of memory")
    assert judged("crashed").reason == "the process is gone without a word"
    long = judged("failed", "x" * 300)
    assert len(long.reason) == 100
    assert long.reason.endswith("x…")


def test_an_alarm_of_severity_error_is_failing_and_a_warning_is_to_be_watched() -> None:
    said = judged("running", "", alarm("warning"), alarm("error", 1200), loss=noisy(50))
    assert said == Verdict("failing", "entropy_floor at step 1,200: the entropy is low")
    assert judged("running", "", alarm("warning"), loss=noisy(50)).level == "watch"


@pytest.mark.parametrize("count", LENGTHS)
@pytest.mark.parametrize(
    ("wild", "said"), [(np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, "-infinity")]
)
def test_a_newest_value_that_is_no_number_is_failing(count: int, wild: float, said: str) -> None:
    values = noisy(count)
    values[-1] = wild
    assert judged(loss=values) == Verdict("failing", f"the loss is {said} since step {count:,}")
    assert judged(loss=noisy(count), entropy=values).reason.startswith(f"the entropy is {said}")
    assert judged(loss=noisy(count), reward=values).reason.startswith(f"the reward is {said}")


def test_since_when_it_is_no_number_is_told() -> None:
    values = noisy(400)
    values[100] = values[300:] = np.nan
    assert judged(loss=values).reason == "the loss is NaN since step 301"
    assert judged(loss=np.full(3, np.nan)).reason == "the loss is NaN since step 1"


@pytest.mark.parametrize("count", LENGTHS)
def test_a_loss_that_left_its_range_for_good_is_failing(count: int) -> None:
    values = noisy(count)
    values[int(0.8 * count) :] += 4
    said = judged(loss=values)
    assert said.level == "failing"
    words = re.fullmatch(
        r"the loss left its range at step ([\d,]+), from (\S+) to (\S+), and is not back",
        said.reason,
    )
    assert words is not None
    assert [float(word) for word in words.groups()[1:]] == pytest.approx([2, 6], rel=0.05)
    start = int(words[1].replace(",", ""))
    assert 0.8 * count < start <= 0.8 * count + max(count // 500, 1)


@pytest.mark.parametrize("count", LENGTHS)
def test_a_loss_that_came_back_is_healthy(count: int) -> None:
    values = noisy(count)
    values[int(0.5 * count) : int(0.6 * count)] += 4
    assert judged(loss=values).level == "healthy"


def test_one_bad_batch_at_the_end_is_no_verdict_and_ten_are() -> None:
    for bad, level in ((1, "healthy"), (9, "healthy"), (10, "failing")):
        values = noisy(400)
        values[-bad:] = 6.0
        assert judged(loss=values).level == level


def test_a_small_lasting_rise_is_to_be_watched_and_a_large_one_failing() -> None:
    for rise, level in ((1.02, "healthy"), (1.1, "watch"), (1.3, "failing")):
        values = noisy(400, share=0.005)
        values[320:] *= rise
        assert judged(loss=values).level == level


def test_a_rise_beyond_the_noise_is_seen_in_a_long_run_whatever_the_noise() -> None:
    for seed in range(20):
        noise = 0.2 * np.random.default_rng(seed).standard_normal(20_000)
        for bad in (1000, 10_000):
            course = 2 + 2.0 * (np.arange(20_000) >= 20_000 - bad)
            assert judged(loss=course + noise).level == "failing"


def test_a_reward_of_few_levels_that_stays_as_it_is_is_healthy() -> None:
    levels = []
    for seed in range(60):
        generator = np.random.default_rng(seed)
        levels.append(judged(reward=generator.binomial(1, 0.6, 500)).level)
        levels.append(judged(reward=generator.binomial(8, 0.95, 500) / 8).level)
    assert levels.count("healthy") >= 114


def test_a_reward_that_became_0_is_said_to_be_0() -> None:
    said = judged(reward=np.r_[np.full(100, 0.5), np.zeros(20)]).reason
    assert said == "the reward left its range at step 101, from 0.5 to 0, and is not back"


def test_a_loss_that_is_nearly_0_may_become_three_times_as_high() -> None:
    course = np.r_[np.full(40, 4.0), np.geomspace(4, 1e-5, 200), np.full(200, 1e-5)]
    for rise, level in ((3e-5, "healthy"), (0.03, "healthy"), (0.06, "failing")):
        assert judged(loss=np.r_[course, np.full(20, rise)]).level == level


def test_a_loss_that_was_no_number_at_first_is_judged_later() -> None:
    values = np.r_[np.full(60, np.nan), noisy(400), np.full(40, 9.0)]
    assert judged(loss=values).level == "failing"


def test_a_loss_that_explodes_is_not_out_by_chance() -> None:
    values = np.r_[noisy(400), 2 * np.exp(np.exp(np.arange(14) / 4))]
    assert judged(loss=values).level == "failing"


@pytest.mark.parametrize("count", LENGTHS)
def test_a_reward_that_fell_for_good_is_failing(count: int) -> None:
    values = noisy(count, 0.8, 0.05)
    values[int(0.9 * count) :] = noisy(count - int(0.9 * count), 0.05, 0.05)
    said = judged(reward=values, loss=noisy(count, 0.01, 1.0))
    assert said.level == "failing"
    assert said.reason.startswith("the reward left its range at step")
    assert judged(reward=values[::-1], loss=noisy(count, 0.01, 1.0)).level == "healthy"


def test_a_policy_loss_that_begins_at_0_and_rises_a_little_is_healthy() -> None:
    loss = np.r_[np.zeros(60), np.linspace(0, 0.04, 340)]
    assert judged(loss=loss, reward=noisy(400, 0.5, 0.1)).level == "healthy"
    assert judged(loss=loss + 20 * (loss > 0.03), reward=noisy(400, 0.5, 0.1)).level == "failing"


def test_a_stalled_run_is_failing() -> None:
    said = judged("stalled", loss=noisy(50))
    assert said == Verdict("failing", "the step has not moved for ten minutes")


def test_what_is_worse_is_said_before_that_the_run_is_stalled() -> None:
    assert (
        judged("stalled", loss=np.r_[noisy(50), np.nan]).reason == "the loss is NaN since step 51"
    )


# -- watch ---------------------------------------------------------------------------------------


def test_a_terminated_run_is_to_be_watched_unless_something_worse_is_known() -> None:
    said = judged("terminated", "SIGTERM", loss=noisy(50))
    assert said == Verdict("watch", "the run was terminated: SIGTERM")
    assert judged("terminated", loss=np.r_[noisy(50), np.nan]).level == "failing"


@pytest.mark.parametrize("count", LENGTHS)
def test_a_policys_entropy_that_goes_to_0_is_to_be_watched(count: int) -> None:
    said = judged(entropy=falling(count, 1.0, 0.02), reward=noisy(count, 0.5, 0.1))
    assert said.level == "watch"
    assert said.reason.startswith("the entropy collapsed from 0.8")
    low_already = falling(count, 0.09, 0.02)
    assert judged(entropy=low_already, reward=noisy(count, 0.5, 0.1)).level == "healthy"


@pytest.mark.parametrize("count", LENGTHS)
def test_learning_by_heart_is_no_collapse_and_being_sure_and_wrong_is(count: int) -> None:
    entropy = falling(count, 2.0, 0.01)
    assert judged(loss=falling(count, 2.2, 0.02), entropy=entropy).level == "healthy"
    assert judged(loss=noisy(count, 2.2), entropy=entropy).level == "watch"


def test_an_entropy_that_is_low_but_not_near_0_or_was_low_before_is_no_collapse() -> None:
    flat = noisy(400, 0.5, 0.1)
    assert judged(reward=flat, entropy=falling(400, 4.0, 0.2)).level == "healthy"
    assert judged(reward=flat, entropy=falling(400, 0.3, 0.05)).level == "healthy"
    late = np.arange(400) > 0.92 * 400
    assert judged(reward=flat, entropy=noisy(400, 0.15) * np.where(late, 0.4, 1)).level == "healthy"


def test_a_loss_near_0_that_falls_excuses_no_collapse() -> None:
    entropy = falling(400, 2.0, 0.01)
    assert judged(loss=falling(400, 0.05, 0.001), entropy=entropy).level == "watch"


@pytest.mark.parametrize("count", LENGTHS)
def test_an_entropy_that_halves_of_a_sudden_is_to_be_watched_unless_it_is_learning(
    count: int,
) -> None:
    late = np.arange(count) > 0.92 * count
    entropy = noisy(count, 2.0) * np.where(late, 0.4, 1.0)
    flat = noisy(count, 0.5, 0.1)
    said = judged(entropy=entropy, reward=flat)
    assert said.level == "watch"
    assert re.fullmatch(
        r"the entropy fell from (1\.9\d|2|2\.0\d) to 0\.[78]\d* nats in the last tenth of the run",
        said.reason,
    )
    assert judged(entropy=entropy, reward=flat + 0.4 * late).level == "healthy"
    assert judged(entropy=entropy, loss=noisy(count, 2.0)).level == "watch"
    assert judged(entropy=entropy, loss=entropy).level == "healthy"


@pytest.mark.parametrize("count", LENGTHS)
@pytest.mark.parametrize("wild", [np.nan, np.inf])
def test_a_loss_that_was_once_no_number_is_to_be_watched(count: int, wild: float) -> None:
    values = noisy(count)
    values[119] = wild
    said = judged(loss=values)
    assert said == Verdict("watch", "the loss was NaN or infinite at step 120 and came back")


@pytest.mark.parametrize("count", LENGTHS)
def test_a_gradient_that_grew_tenfold_is_to_be_watched(count: int) -> None:
    for factor, level in ((8.0, "healthy"), (15.0, "watch")):
        gradient = noisy(count, 1.0, 0.1) * np.where(np.arange(count) > 0.88 * count, factor, 1.0)
        said = judged(loss=noisy(count), gradient=gradient)
        assert said.level == level
        assert (level == "healthy") or said.reason.startswith("the median gradient norm rose from")
    zero_before = np.r_[np.zeros(int(0.9 * count)), np.ones(count - int(0.9 * count))]
    assert judged(loss=noisy(count), gradient=zero_before).level == "healthy"


# -- unknown and healthy -------------------------------------------------------------------------


def test_few_values_are_no_verdict() -> None:
    assert judged() == Verdict("unknown", "too early to say: 0 values")
    assert judged(loss=[2.0]).reason == "too early to say: 1 value"
    assert judged(loss=noisy(24)) == Verdict("unknown", "too early to say: 24 values")
    assert judged(loss=noisy(25)).level == "healthy"
    assert judged(loss=np.zeros(0), entropy=noisy(30)).level == "healthy"
    assert judge("running", "", {"other": drawn(noisy(99))}).level == "unknown"


def test_a_healthy_run_is_told_in_numbers() -> None:
    loss, entropy = np.linspace(4, 2, 101), np.linspace(3, 1, 101)
    assert judged(loss=loss).reason == "loss 2.1, at first 3.9"
    said = judged(loss=loss, entropy=entropy, reward=loss[::-1])
    assert said == Verdict("healthy", "reward 3.9, at first 2.1; entropy 1.1 nats, at first 2.9")


# -- together ------------------------------------------------------------------------------------


def random_course(seed: int) -> dict[str, Any]:
    """A loss that decays to a floor with noise, an entropy that follows, gradients of any tail."""
    generator = np.random.default_rng(seed)
    count = int(np.exp(generator.uniform(np.log(30), np.log(8000))))
    scale = generator.uniform(0.01, 1) * count
    course = (1 + np.arange(count) / scale) ** -generator.uniform(0.2, 1.5)
    course = generator.uniform(0.05, 3) + generator.uniform(0.5, 9) * course
    share = np.exp(generator.uniform(np.log(0.002), np.log(0.3)))
    tails = [generator.standard_normal((3, count)), generator.standard_t(3, (3, count))]
    noise = tails[seed % 2]
    return {
        "loss": np.abs(course * (1 + share * noise[0])),
        "entropy": np.abs(0.9 * course * (1 + share * noise[1])),
        "gradient": np.exp(0.5 * noise[2]),
    }


def test_losses_that_converge_are_healthy() -> None:
    levels = [judged(**random_course(seed)).level for seed in range(200)]
    assert "failing" not in levels
    assert levels.count("healthy") >= 198


def test_a_coarser_thinning_seldom_changes_the_level() -> None:
    changed = 0
    for seed in range(60):
        curve = drawn(noisy(10_000, seed=seed) + 4 * (np.arange(10_000) > 8000) * (seed % 2))
        for points in (500, 1000):
            chosen = kept(curve.steps, curve.values, points)
            coarse = Curve("", curve.steps[chosen], curve.values[chosen])
            levels = {judge("running", "", {LOSS: one}).level for one in (curve, coarse)}
            changed += len(levels) > 1
    assert changed <= 2


@pytest.mark.parametrize("n", [700, 20_000])
def test_a_slow_slide_is_watched_as_reward_and_as_loss(n: int) -> None:
    places = np.linspace(0, 1, n)
    noise = np.random.default_rng(3).normal(0, 0.03, n)
    reward = np.clip(0.2 + 0.6 * places, None, 0.7) - 0.45 * np.clip((places - 0.7) / 0.3, 0, 1)
    loss = 4 - 2.5 * np.clip(places / 0.5, 0, 1) + 0.9 * np.clip((places - 0.6) / 0.3, 0, 1)
    steps = np.arange(n)
    for name, values in (("reward/mean", reward), ("loss/mean", loss)):
        found = judge("running", "", {name: Curve(name, steps, values + noise)})
        assert found.level in ("watch", "failing"), (name, found)
        assert "at its best, around step" in found.reason or "left its range" in found.reason


def test_noise_around_a_level_is_no_slide() -> None:
    steps = np.arange(2000)
    for seed in range(60):
        rng = np.random.default_rng(seed)
        reward = 0.5 + 0.2 * rng.normal(size=2000)
        found = judge("running", "", {"reward/mean": Curve("reward/mean", steps, reward)})
        assert found.level == "healthy", found
