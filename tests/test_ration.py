"""What is owed for rare looks is paid by training time, and by nothing else."""

import pytest

from entropylens import budget as budgeting
from entropylens import ration as rationing
from entropylens.budget import Budget
from entropylens.ration import Ration


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    for module in (budgeting, rationing):
        monkeypatch.setattr(module, "perf_counter", found)
    return found


def step(budget: Budget, ration: Ration, clock: Clock) -> budgeting.Review | None:
    clock.now += 0.3
    ration.pay()
    return budget.end_step(0.0, 64)


def test_what_another_thread_took_is_charged_only_as_it_is_paid(clock: Clock) -> None:
    budget = Budget(0.04, None)
    ration = Ration(budget, 0.25)
    ration.owe(2.0)
    assert budget._spent == 0.0
    clock.now += 50.0
    ration.pay()
    assert budget._spent == pytest.approx(0.5)
    assert not ration.is_open
    clock.now += 151.0
    ration.pay()
    assert budget._spent == pytest.approx(2.0)
    assert ration.is_open


def test_without_a_limit_nothing_is_owed(clock: Clock) -> None:
    ration = Ration(Budget(None, None), 0.25)
    ration.owe(2.0)
    assert ration.is_open


def test_a_pause_pays_for_nothing(clock: Clock) -> None:
    budget = Budget(0.04, None)
    ration = Ration(budget, 0.25)
    ration.owe(2.0)
    clock.now += 600.0
    budget.pause(600.0)
    ration.pay()
    assert budget._spent == 0.0
    clock.now += 50.0
    ration.pay()
    assert budget._spent == pytest.approx(0.5)


def test_a_pause_does_not_make_a_burst_of_what_is_owed(clock: Clock) -> None:
    budget = Budget(0.04, None)
    ration = Ration(budget, 0.25)
    for _ in range(budgeting.WARM_UP_STEPS):
        step(budget, ration, clock)
    ration.owe(2.0)
    clock.now += 600.0
    budget.pause(600.0)
    reviews = [step(budget, ration, clock) for _ in range(budgeting.REVIEW_STEPS)]
    (review,) = [found for found in reviews if found is not None]
    assert review.fraction == pytest.approx(0.01)
    assert review.change is None
    assert budget.widening == 1


def test_the_total_of_pauses_only_grows_and_no_review_forgets_it(clock: Clock) -> None:
    budget = Budget(0.04, None)
    ration = Ration(budget, 0.25)
    for pause in (10.0, 20.0):
        clock.now += pause
        budget.pause(pause)
        for _ in range(20):
            step(budget, ration, clock)
    assert budget.paused == 30.0


def test_paying_is_no_cost_of_the_vitals_of_the_steps_in_which_it_is_done(clock: Clock) -> None:
    budget = Budget(0.04, None)
    rations = [Ration(budget, share) for share in (0.25, 0.125, 0.125)]
    for ration in rations:
        ration.owe(1000.0)
    for number in range(100):
        clock.now += 0.3
        for ration in rations:
            ration.pay()
        is_full = number % 10 == 0
        budget.spend(0.3 * (0.019 + 0.03 * is_full))
        budget.end_step(0.0, 64, vitals=True, others=is_full)
    # Above 4 %, but vitals take less than half of it.
    assert budget.widening > 1
    assert budget.vitals_widening == 1


def test_vitals_give_way_where_nothing_else_can_any_more(clock: Clock) -> None:
    budget = Budget(0.04, None)
    budget.resume(None, 1024, 1)
    for _ in range(60):
        clock.now += 0.3
        budget.spend(0.3 * 0.045)
        budget.end_step(0.0, 64, others=True)
    assert budget.vitals_widening > 1
