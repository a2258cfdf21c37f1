"""What a bound decides, by signals made by hand."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import cos, exp, inf, nan, pi
from typing import Any

import pytest

from entropylens.control import POLICIES, StepBound
from entropylens.control.memory import Memory
from entropylens.control.policies import POLICIES as RULES
from entropylens.control.signals import (
    SCALES,
    Admission,
    Decision,
    GradientSignals,
    UpdateSignals,
)
from entropylens.control.step_bound import admit, decide

ORDINARY = GradientSignals(norm=2.0, loss=1.0, statistics=0.01, rate=0.1, settings=(0.9, 0.01))

NUMBERS: dict[str, Any] = {
    "factor": 3.0, "gradient_factor": 8.0, "loss_factor": 3.0, "deviations": 8.0,
    "rate_factor": 3.0, "window": 64, "every": 8, "warmup": 20, "settle": 50, "patience": 8,
}  # fmt: skip


def bound_of(**settings: Any) -> StepBound:
    return StepBound(**{**NUMBERS, **settings})


class Steps:
    """A run of which only signals are made."""

    def __init__(self, bound: StepBound, state: Any = None) -> None:
        self.bound = bound
        self.memory = Memory(bound.window, bound.settle, bound.patience, state)

    def step(self, seen: GradientSignals = ORDINARY, **update: Any) -> tuple[Admission, Decision]:
        """One step whose update has half the learning rate for a norm, unless told otherwise."""
        admission = admit(self.bound, self.memory, seen)
        self.memory.take_gradients(seen, admission)
        if not admission.keep:
            return admission, Decision()
        known = {"norm": 0.5 * seen.rate, "rate": seen.rate, "suspicions": admission.suspicions}
        signals = UpdateSignals(**{**known, **update})
        decision = decide(self.bound, self.memory, signals)
        policy = RULES[self.bound.policy]
        always = policy.measures_always or policy.looks_always
        self.memory.take_update(signals, decision, always=always)
        return admission, decision

    def after(self, count: int) -> "Steps":
        for _ in range(count):
            assert self.step(ratio=0.25)[1] == Decision()
        return self


def after(count: int = 40, **settings: Any) -> Steps:
    return Steps(bound_of(**settings)).after(count)


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "combine"}, r"StepBound: expected a policy \(combined, gradient_norm, .*"
                                r"got 'combine'; did you mean 'combined'\?"),
        ({"mode": "shadw"}, r"StepBound: expected a mode \(enforce, off, shadow\), got 'shadw'; "
                            r"did you mean 'shadow'\?"),
        ({"factor": 1.0}, "StepBound: expected factor above 1, got 1.0; it multiplies what is "
                          "typical"),
        ({"gradient_factor": 0.5}, "expected gradient_factor above 1, got 0.5"),
        ({"loss_factor": nan}, "expected loss_factor above 1, got nan"),
        ({"rate_factor": -3.0}, "expected rate_factor above 1, got -3.0"),
        ({"level": 0.0}, "StepBound: expected level > 0, got 0.0"),
        ({"deviations": -1.0}, "StepBound: expected deviations > 0, got -1.0"),
        ({"window": 0}, "StepBound: expected window to be an int of at least 1, got 0"),
        ({"every": 2.5}, "expected every to be an int of at least 1, got 2.5"),
        ({"warmup": -1}, "expected warmup to be an int of at least 1, got -1"),
        ({"settle": 0}, "expected settle to be an int of at least 1, got 0"),
        ({"patience": 0}, "expected patience to be an int of at least 1, got 0"),
        ({"ring": -1}, "expected ring to be an int of at least 0, got -1"),
    ],
)  # fmt: skip
def test_a_setting_that_makes_no_sense_is_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepBound(**settings)


# -- when ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "suspicions"),
    [
        ({}, ()),
        ({"norm": 15.9}, ()),
        ({"norm": 16.1}, ("gradient",)),
        ({"loss": 2.9}, ()),
        ({"loss": 3.1}, ("loss",)),
        ({"loss": inf}, ("loss",)),
        ({"loss": None}, ()),
        ({"statistics": 0.079}, ()),
        ({"statistics": 0.081}, ("statistics",)),
        ({"statistics": inf}, ("statistics",)),
        ({"statistics": None}, ()),
        ({"rate": 0.29}, ()),
        ({"rate": 0.31}, ("rate",)),
        ({"rate": 1e-9}, ()),
        ({"settings": (0.9, 0.019)}, ()),
        ({"settings": (0.9, 0.021)}, ("settings",)),
        ({"settings": (0.9, 0.004)}, ("settings",)),
        ({"settings": (0.9, 0.0)}, ("settings",)),
        ({"settings": (0.85, 0.01)}, ()),
        ({"settings": (0.79, 0.01)}, ("settings",)),
        ({"settings": (0.96, 0.01)}, ("settings",)),
        ({"settings": (0.9, 0.5)}, ("settings",)),
        ({"settings": (0.0, 0.01)}, ("settings",)),
        ({"settings": (0.9, 0.01, 0.0)}, ()),
        ({"norm": 200.0, "loss": 50.0, "rate": 9.0, "settings": (0.0, 0.0)},
         ("gradient", "loss", "rate", "settings")),
    ],
)  # fmt: skip
def test_a_step_is_suspicious_by_what_differs_from_the_runs_past(
    changes: Any, suspicions: tuple[str, ...]
) -> None:
    run = after(40)
    admission = admit(run.bound, run.memory, replace(ORDINARY, **changes))
    assert admission.suspicions == suspicions
    ways = len({"gradient", "loss", "statistics"} & {*suspicions})
    assert admission.look == (bool(suspicions) and ways < 2)


def test_a_spread_past_is_ordinary_within_so_many_deviations() -> None:
    """Norms of a factor of 4 around their median, each way: a factor of 8 is nothing."""
    run = Steps(bound_of())
    for step in range(60):
        run.step(replace(ORDINARY, norm=2.0 * 4.0 ** ((step * 7 % 11 - 5) / 5)))
    admission = admit(run.bound, run.memory, replace(ORDINARY, norm=1e3))
    assert admission.suspicions == ()


def test_a_history_shorter_than_the_warm_up_says_nothing_but_a_full_one_does() -> None:
    run = Steps(bound_of())
    for step in range(40):
        run.step(replace(ORDINARY, loss=2.0 if step > 30 else -1.0, statistics=None))
    few = replace(ORDINARY, loss=50.0, statistics=None)
    assert admit(run.bound, run.memory, few).suspicions == ()
    run = after(40, window=10)
    assert admit(run.bound, run.memory, replace(ORDINARY, norm=1e3)).suspicions == ("gradient",)


def test_in_the_warm_up_only_what_is_not_finite_is_suspicious() -> None:
    run = Steps(bound_of(warmup=20))
    wild = GradientSignals(norm=1e6, loss=1e6, rate=1e3, settings=(0.0, 0.0))
    for step in range(20):
        admission, _ = run.step(wild if step == 19 else ORDINARY)
        assert admission.suspicions == ()
        assert admission.gradient_scale == 1
    assert admit(run.bound, run.memory, ORDINARY).suspicions == ("settings",)
    calm = after(20, warmup=20)
    assert admit(calm.bound, calm.memory, wild).suspicions == (
        "gradient",
        "loss",
        "rate",
        "settings",
    )


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("count", [0, 5, 40])
@pytest.mark.parametrize("norm", [inf, nan])
def test_gradients_that_are_not_finite_make_no_step_under_any_policy(
    policy: str, count: int, norm: float
) -> None:
    run = after(count, policy=policy)
    admission = admit(run.bound, run.memory, replace(ORDINARY, norm=norm))
    assert admission == Admission(
        gradient_scale=0.0, cause="gradient not finite", suspicions=("gradient",)
    )


def warm_up_and_restarts(step: int) -> tuple[float, tuple[float, ...]]:
    """Linear from 0, then two cosines down to almost nothing, with restarts."""
    if step < 50:
        return 0.1 * step / 50, (0.9,)
    return 0.05 * (1 + cos(pi * ((step - 50) % 60) / 60)) + 1e-6, (0.9,)


def one_cycle(step: int) -> tuple[float, tuple[float, ...]]:
    """Rates up and down by 25 times, momentum .95 down to .85 and up again."""
    share = (1 - cos(2 * pi * min(step, 150) / 150)) / 2
    return 0.004 + 0.096 * share, (0.95 - 0.1 * share,)


def steps_down(step: int) -> tuple[float, tuple[float, ...]]:
    return 0.1 * 0.1 ** (step // 50), (0.9, 0.999)


def exponential_warm_up(step: int) -> tuple[float, tuple[float, ...]]:
    return min(1e-7 * exp(0.12 * step), 0.1), (0.9,)


@pytest.mark.parametrize("policy", ["combined", "update_norm", "gradient_norm", "skip"])
@pytest.mark.parametrize(
    "schedule", [warm_up_and_restarts, one_cycle, steps_down, exponential_warm_up]
)
def test_ordinary_schedules_are_neither_looked_at_nor_bounded(
    schedule: Callable[[int], tuple[float, tuple[float, ...]]], policy: str
) -> None:
    run = Steps(bound_of(policy=policy, every=2))
    for step in range(170):
        rate, settings = schedule(step)
        admission, decision = run.step(replace(ORDINARY, rate=rate, settings=settings))
        assert admission.suspicions == ()
        assert not admission.look
        assert decision == Decision()


def test_a_learning_rate_of_nothing_is_no_measurement() -> None:
    run = Steps(bound_of(policy="update_norm", warmup=1))
    for _ in range(30):
        assert run.step(replace(ORDINARY, rate=0.0))[1] == Decision()
    assert len(run.memory.updates) == 0
    for _ in range(30):
        assert run.step()[1] == Decision()
    assert run.step(replace(ORDINARY, rate=0.0), norm=0.0)[1] == Decision()


def test_updates_are_measured_in_the_first_eight_steps_and_at_the_interval() -> None:
    run = Steps(bound_of(every=5))
    kept = [run.step()[0].keep for _ in range(31)]
    assert [step for step, one in enumerate(kept) if one] == [*range(8), 10, 15, 20, 25, 30]
    assert after(8, policy="update_norm").step()[0].keep
    assert not after(8, policy="gradient_norm", every=1).step()[0].keep


@pytest.mark.parametrize("policy", POLICIES)
def test_only_what_the_policy_needs_is_looked_at(policy: str) -> None:
    looks = policy in ("radius", "radius_relative", "linearised_search")
    assert after(40, policy=policy).step()[0].look == looks
    suspicious = after(40, policy=policy).step(replace(ORDINARY, rate=1.0))[0]
    assert suspicious.look == (looks or policy in ("combined", "skip"))
    assert suspicious.suspicions == ("rate",)


def test_after_a_change_of_settings_updates_are_measured_until_it_has_settled() -> None:
    run = after(40, settle=6)
    changed = replace(ORDINARY, settings=(0.9, 0.5))
    admissions = [run.step(changed)[0] for _ in range(12)]
    assert [a.suspicions for a in admissions] == [("settings",), *[("settling",)] * 5, *[()] * 6]
    assert [a.look for a in admissions] == [True, *[False] * 11]
    assert all(a.keep for a in admissions[:6])


def test_after_too_large_an_update_those_to_come_are_measured() -> None:
    run = after(41, settle=4)
    assert not run.step()[0].keep
    run = after(40, settle=4)
    assert run.step(norm=1.0)[1].cause == "update norm"
    assert [run.step()[0].suspicions for _ in range(6)] == [*[("settling",)] * 4, (), ()]


# -- what is remembered ----------------------------------------------------------------------------


def test_what_is_suspicious_is_not_remembered_as_ordinary() -> None:
    run = after(40)
    known = run.memory.state_dict()
    run.step(replace(ORDINARY, norm=1e3, loss=1e3, rate=100.0), norm=50.0)
    found = run.memory.state_dict()
    for name in ("gradients", "losses", "statistics", "updates", "highest_rate"):
        assert found[name] == known[name], name
    assert found["steps"] == 41


def test_gradients_that_stay_large_are_the_new_normal_after_some_patience() -> None:
    run = after(40, patience=5)
    large = replace(ORDINARY, norm=100.0)
    admissions = [run.step(large)[0] for _ in range(60)]
    assert [a.gradient_scale for a in admissions] == [*[2.0 / 100] * 5, *[1.0] * 55]
    assert run.memory.gradients.median() == pytest.approx(100.0)
    assert admit(run.bound, run.memory, replace(ORDINARY, norm=900.0)).suspicions[0] == "gradient"


def test_patience_starts_anew_after_an_ordinary_step() -> None:
    run = after(40, patience=5)
    for _ in range(6):
        for _ in range(4):
            assert run.step(replace(ORDINARY, norm=100.0))[0].gradient_scale < 1
        run.step()


def test_gradients_that_are_never_finite_do_not_become_normal() -> None:
    run = after(40, patience=5)
    for _ in range(30):
        assert run.step(replace(ORDINARY, norm=nan))[0].gradient_scale == 0
    assert run.memory.gradients.median() == pytest.approx(2.0)


def test_updates_that_grow_by_themselves_are_the_new_normal_after_some_patience() -> None:
    run = after(40, patience=5, every=1)
    scales = [run.step(norm=1.0)[1].scale for _ in range(40)]
    assert scales == [*[pytest.approx(0.05)] * 5, *[1.0] * 35]
    assert run.memory.typical_update(0.1) == pytest.approx(1.0)


def test_a_rate_that_somebody_raised_stays_bounded_until_it_is_accepted() -> None:
    run = after(40, patience=5)
    raised = replace(ORDINARY, rate=1.0)
    for _ in range(60):
        assert run.step(raised)[1] == bounded(0.1, "update norm")
    run.memory.accept(1.0, raised.settings)
    for _ in range(20):
        assert run.step(raised)[1] == Decision()
        assert run.memory.highest_rate == 1.0


def test_settings_that_are_accepted_are_not_suspicious() -> None:
    run = after(40)
    changed = replace(ORDINARY, settings=(0.9, 0.5))
    run.memory.accept(0.1, changed.settings)
    assert run.step(changed)[0].suspicions == ()


def test_a_raised_rate_whose_update_is_ordinary_is_taken_for_ordinary() -> None:
    run = after(40)
    raised = replace(ORDINARY, rate=0.4)
    admission, decision = run.step(raised, norm=0.1)
    assert (admission.suspicions, decision) == (("rate",), Decision())
    assert run.memory.highest_rate == 0.4
    assert run.step(raised)[0].suspicions == ()


def test_what_was_scaled_is_remembered_as_it_was_applied() -> None:
    run = after(40, policy="update_norm")
    before = run.memory.updates.values
    assert run.step(norm=1.0)[1].scale == pytest.approx(0.15)
    assert run.memory.updates.values[-1] == pytest.approx(1.0 * 0.15 / 0.1)
    assert len(before) == len(run.memory.updates.values) == 16
    run = after(40, policy="radius")
    run.step(ratio=4.0)
    assert run.memory.ratios.values[-1] == pytest.approx(1.0)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_state_that_was_saved_decides_as_the_run_itself(policy: str) -> None:
    def signals(step: int) -> tuple[GradientSignals, dict[str, Any]]:
        size = exp(0.3 * cos(1.7 * step) + 0.2 * cos(0.3 * step))
        spike = 40.0 if step % 31 == 3 else 1.0
        loss = size * (30 if step % 37 == 5 else 1)
        rate = 0.1 * (20 if step in (48, 49, 90) else 1)
        settings = (0.9,) if step < 70 else (0.3,)
        moved = 0.01 * size * (60 if step % 41 == 6 else 1)
        losses = tuple(1 + size * (s - 0.3) ** 2 * (50 if step in (48, 90) else 1) for s in SCALES)
        update = {"norm": size * rate * (9 if step % 23 == 7 else 1), "ratio": size * spike,
                  "losses": losses}  # fmt: skip
        gradients = {"norm": size * spike, "loss": loss, "statistics": moved, "rate": rate}
        return GradientSignals(**gradients, settings=settings), update

    for cut in (1, 17, 48, 49, 71, 91):
        run = Steps(bound_of(policy=policy, warmup=10, patience=4, settle=7, window=24))
        again = None
        acted = 0
        for step in range(120):
            seen, update = signals(step)
            if step == cut:
                again = Steps(run.bound, run.memory.state_dict())
            found = run.step(seen, **update)
            acted += found[0].gradient_scale < 1 or found[1].scale < 1
            if again is not None:
                assert again.step(seen, **update) == found
        assert again is not None
        assert again.memory.state_dict() == run.memory.state_dict()
        assert acted > 1


# -- how far ---------------------------------------------------------------------------------------


RATE = ("rate",)


def update(norm: float = 0.05, *, rate: float = 0.1, **known: Any) -> UpdateSignals:
    return UpdateSignals(norm=norm, rate=rate, **known)


def decided(policy: str, signals: UpdateSignals, **settings: Any) -> Decision:
    run = after(60, policy=policy, every=1, **settings)
    return decide(run.bound, run.memory, signals)


def bounded(scale: float, cause: str) -> Decision:
    near: Any = pytest.approx(scale, rel=1e-12)
    return Decision(scale=near, cause=cause)


def test_gradients_are_brought_to_the_size_that_the_policy_says() -> None:
    seen = replace(ORDINARY, norm=1000.0)
    scales = {}
    for policy in POLICIES:
        run = after(40, policy=policy)
        scales[policy] = admit(run.bound, run.memory, seen).gradient_scale
    # The median is 2; up to 8 times of it is ordinary.
    assert scales == {
        "combined": pytest.approx(2e-3),
        "gradient_norm": pytest.approx(16e-3),
        "skip": 0.0,
        **dict.fromkeys(("update_norm", "radius", "radius_relative", "linearised_search"), 1.0),
    }


def test_the_update_norm_is_capped_at_so_many_times_the_typical() -> None:
    # Half of the rate is typical.
    assert decided("update_norm", update(0.1499)) == Decision()
    assert decided("update_norm", update(0.5)) == bounded(0.15 / 0.5, "update norm")
    assert decided("update_norm", update(0.5), factor=2.0) == bounded(0.2, "update norm")
    assert decided("update_norm", update(inf)) == Decision(scale=0.0, cause="update norm")
    # At half the rate half of it is typical; a rate above any before has the highest one's.
    assert decided("update_norm", update(0.5, rate=0.05)) == bounded(0.15, "update norm")
    assert decided("update_norm", update(50.0, rate=100.0)) == bounded(0.003, "update norm")


def test_the_radius_policies_bring_r_to_their_level() -> None:
    assert decided("radius", update(ratio=1.0)) == Decision()
    assert decided("radius", update(ratio=None)) == Decision()
    assert decided("radius", update(ratio=4.0)) == bounded(0.25, "radius")
    assert decided("radius", update(ratio=4.0), level=0.5) == bounded(0.125, "radius")
    assert decided("radius", update(ratio=inf)) == Decision(scale=0.0, cause="radius")
    # A quarter is typical: three times of it is less than the level, or more.
    assert decided("radius_relative", update(ratio=4.0)) == bounded(0.25, "radius")
    assert decided("radius_relative", update(ratio=4.0), level=0.3) == bounded(0.75 / 4, "radius")
    assert decided("radius_relative", update(ratio=0.74), level=0.3) == Decision()


def test_the_relative_radius_is_not_known_before_eight_ratios() -> None:
    for count, scale in ((7, 1.0), (8, 0.25)):
        run = after(count, policy="radius_relative")
        assert decide(run.bound, run.memory, update(ratio=4.0)).scale == pytest.approx(scale)


def test_the_typical_update_is_not_known_before_eight_updates() -> None:
    for count, scale in ((7, 1.0), (8, 0.15)):
        run = after(count, policy="update_norm")
        assert decide(run.bound, run.memory, update(1.0)).scale == pytest.approx(scale)


def at_scales(loss_of: Callable[[float], float]) -> tuple[float, ...]:
    return tuple(map(loss_of, SCALES))


def test_the_search_goes_to_where_the_linearised_loss_is_least() -> None:
    for least in (1.0, 0.25, 2.0**-9, 0.0):
        losses = at_scales(lambda scale, least=least: (scale - least) ** 2)  # type: ignore[misc]
        expected = Decision() if least == 1 else Decision(scale=least, cause="linearised loss")
        assert decided("linearised_search", update(losses=losses)) == expected
    broken = (nan, inf, 0.5, *[0.7] * 15)
    assert decided("linearised_search", update(losses=broken)).scale == 0.25
    assert decided("linearised_search", update(losses=None)) == Decision()


def test_skipping_leaves_out_whole_updates() -> None:
    assert decided("skip", update(0.149)) == Decision()
    assert decided("skip", update(0.151)) == Decision(scale=0.0, cause="update norm")


def test_the_combination_brings_what_is_too_large_to_the_typical_size() -> None:
    # By itself an update may be as many times the typical as gradients may be.
    assert decided("combined", update(0.399)) == Decision()
    assert decided("combined", update(0.401)) == bounded(0.05 / 0.401, "update norm")
    assert decided("combined", update(0.149, suspicions=RATE)) == Decision()
    assert decided("combined", update(0.5, suspicions=RATE)) == bounded(0.1, "update norm")
    raised = update(50.0, rate=100.0, suspicions=RATE)
    assert decided("combined", raised) == bounded(0.001, "update norm")


def losses(without: float, harmful_above: float, spared_below: float) -> tuple[float, ...]:
    """Ruinous above one scale, hardly worse below another, and in between something between."""
    return at_scales(
        lambda s: (
            9.0 * without + 9.0
            if s > harmful_above
            else without
            if s <= spared_below
            else 1.5 * without + 0.05
        )
    )


@pytest.mark.parametrize(
    ("norm", "seen", "expected"),
    [
        # Nothing is too large, and nothing would be lost.
        (0.05, losses(1.0, 1.0, 0.25), Decision()),
        # The last ordinary batch would be lost: down to where it is spared.
        (0.05, losses(1.0, 0.5, 0.5), Decision(scale=0.5, cause="linearised loss")),
        (0.05, losses(1.0, 0.5, 0.125), Decision(scale=0.125, cause="linearised loss")),
        (0.05, losses(1.0, 0.0, 0.0), Decision(scale=0.0, cause="linearised loss")),
        # A tenth of the update is typical, and fits: what holds at an eighth holds there.
        (0.5, losses(1.0, 0.125, 0.0), bounded(0.1, "update norm")),
        # It may not fit: an eighth would be ruinous.
        (0.5, losses(1.0, 0.1, 0.0625), Decision(scale=0.0625, cause="linearised loss")),
        (0.5, losses(1.0, 0.0625, 2.0**-9), Decision(scale=2.0**-9, cause="linearised loss")),
        # Far below the grid's least scale the same.
        (5e6, losses(1.0, 2.0**-16, 0.0), bounded(1e-8, "update norm")),
        (5e6, losses(1.0, 0.0, 0.0), Decision(scale=0.0, cause="linearised loss")),
        # A small loss may rise by a tenth of a nat before it is lost.
        (0.05, (0.1009, *[0.001] * 17), Decision()),
        (0.05, (0.1011, *[0.001] * 17), Decision(scale=0.5, cause="linearised loss")),
        # What is not known to be harmless is not.
        (0.05, (nan, inf, nan, *[1.0] * 15), Decision(scale=0.125, cause="linearised loss")),
        (0.5, (*[nan] * 17, 1.0), Decision(scale=0.0, cause="linearised loss")),
        # A batch that is lost already says nothing.
        (0.05, (inf,) * 18, Decision()),
        (0.5, (inf,) * 18, bounded(0.1, "update norm")),
    ],
)
def test_the_combination_spares_the_last_ordinary_batch(
    norm: float, seen: Sequence[float], expected: Decision
) -> None:
    signals = update(norm, losses=tuple(seen), suspicions=RATE)
    assert decided("combined", signals) == expected


def test_from_the_second_suspicious_batch_on_the_ordinary_one_may_lose_nothing() -> None:
    """A rise of half was spared the first time."""
    for without, risen in ((1.0, 1.5), (1.0, 1.021), (0.01, 0.031)):
        signals = update(losses=(risen, *[without] * 17), suspicions=("loss",))
        run = after(40)
        for expected in (Decision(), Decision(scale=0.5, cause="linearised loss")):
            seen = replace(ORDINARY, loss=9.0)
            assert run.step(seen, losses=signals.losses)[1] == expected
    run = after(40)
    for _ in range(3):
        found = run.step(replace(ORDINARY, loss=9.0), losses=(1.019, *[1.0] * 17))[1]
        assert found == Decision()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_batch_that_is_suspicious_in_two_ways_is_left_out_by_the_combination(
    policy: str,
) -> None:
    for seen in (
        replace(ORDINARY, loss=9.0, norm=99.0),
        replace(ORDINARY, loss=9.0, statistics=1.0),
    ):
        run = after(40, policy=policy)
        admission = admit(run.bound, run.memory, seen)
        if policy == "combined":
            assert (admission.gradient_scale, admission.cause) == (0.0, "batch")
            assert not admission.keep
            assert not admission.look
        else:
            assert admission.cause in ("", "gradient")


def test_where_settings_were_changed_less_is_ordinary() -> None:
    """Updates are all alike: then 1.5 times the typical size, else as gradients."""
    for changes, scale in (((0.9, 0.01), 1.0), ((0.9, 0.5), 0.05 / 0.08)):
        run = after(60, every=1)
        _, decision = run.step(replace(ORDINARY, settings=changes), norm=0.08)
        assert decision.scale == pytest.approx(scale)


@pytest.mark.parametrize("policy", POLICIES)
def test_entries_that_are_not_finite_are_left_out_whatever_the_policy_says(policy: str) -> None:
    assert decided(policy, update(is_finite=False)) == Decision(scale=1.0, cause="not finite")
    run = after(60, policy=policy)
    before = run.memory.updates.values
    run.memory.take_update(update(9.0, is_finite=False), Decision(cause="not finite"), always=True)
    assert run.memory.updates.values == before
