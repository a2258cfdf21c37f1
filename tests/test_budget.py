import pytest

from entropylens import budget as module
from entropylens.budget import CALM_REVIEWS, SAMPLED_ROWS, Budget, Review


class Clock:
    """A clock that moves when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(module, "perf_counter", found)
    return found


def review(
    budget: Budget, clock: Clock, fraction: float, *, writer_cpu: float = 0.0, tokens: int = 10_000
) -> Review:
    """Run ten steps of 0.3 s of which ``fraction`` is ours; the tenth step is reviewed."""
    for _ in range(9):
        clock.now += 0.3
        budget.spend(0.3 * fraction)
        assert budget.end_step(writer_cpu, tokens) is None
    clock.now += 0.3
    budget.spend(0.3 * fraction)
    found = budget.end_step(writer_cpu, tokens)
    assert found is not None
    return found


def warm(budget: Budget, clock: Clock) -> Budget:
    for _ in range(module.WARM_UP_STEPS):
        budget.spend(50.0)
        clock.now += 60.0
        assert budget.end_step(0.0, 10_000) is None
    return budget


def test_it_measures_its_share_and_forgets_the_first_steps(clock: Clock) -> None:
    budget = warm(Budget(0.03, 1024), clock)
    assert review(budget, clock, 0.02).fraction == pytest.approx(0.02)


def test_the_writers_cpu_counts(clock: Clock) -> None:
    budget = warm(Budget(0.5, 1024), clock)
    assert review(budget, clock, 0.01, writer_cpu=0.3).fraction == pytest.approx(0.11)
    assert review(budget, clock, 0.01, writer_cpu=0.3).fraction == pytest.approx(0.01)


def test_time_in_evaluation_is_nobodys(clock: Clock) -> None:
    budget = warm(Budget(0.5, 1024), clock)
    clock.now += 1000.0
    budget.pause(1000.0)
    assert review(budget, clock, 0.1).fraction == pytest.approx(0.1)


def test_rows_give_way_before_intervals_as_far_as_the_excess_asks(clock: Clock) -> None:
    budget = warm(Budget(0.03, None), clock)
    changes = [review(budget, clock, 0.05, tokens=8192).change for _ in range(4)]
    assert changes[0] == "at most 2048 tokens a step are measured"
    assert changes[1] == "at most 512 tokens a step are measured"
    assert changes[2] == f"at most {SAMPLED_ROWS} tokens a step are measured"
    assert changes[3] == "intervals widened to 2 times the preset's"
    assert (budget.rows, budget.widening) == (SAMPLED_ROWS, 2)


def test_far_over_it_leaps_and_a_single_review_never_leaps_beyond_sixteen(clock: Clock) -> None:
    budget = warm(Budget(0.03, None), clock)
    changes = [review(budget, clock, f, tokens=8192).change for f in (0.3, 0.3, 0.031, 0.9)]
    assert changes[0] == "at most 512 tokens a step are measured"
    assert changes[1] == f"at most {SAMPLED_ROWS} tokens a step are measured"
    assert changes[2] == "intervals widened to 2 times the preset's"
    assert changes[3] == "intervals widened to 32 times the preset's"


def test_intervals_narrow_again_only_after_a_calm_while(clock: Clock) -> None:
    budget = warm(Budget(0.03, SAMPLED_ROWS), clock)
    review(budget, clock, 0.05)
    assert budget.widening == 2
    changes = [review(budget, clock, 0.001).change for _ in range(CALM_REVIEWS)]
    assert changes[:-1] == [None] * (CALM_REVIEWS - 1)
    assert changes[-1] == "intervals narrowed to 1 times the preset's"


@pytest.mark.parametrize("rows", [None, 2048])
def test_rows_come_back_one_doubling_at_a_time_after_intervals(
    clock: Clock, rows: int | None
) -> None:
    budget = warm(Budget(0.03, rows), clock)
    for _ in range(4):
        review(budget, clock, 0.05, tokens=2048)
    assert (budget.rows, budget.widening) == (SAMPLED_ROWS, 4)
    calm = [review(budget, clock, 0.001, tokens=2048).change for _ in range(7 * CALM_REVIEWS)]
    said = [change for change in calm if change is not None]
    assert said == [
        "intervals narrowed to 2 times the preset's",
        "intervals narrowed to 1 times the preset's",
        "at most 512 tokens a step are measured again",
        "at most 1024 tokens a step are measured again",
        f"{'all' if rows is None else 'at most 2048'} tokens a step are measured again",
    ]
    assert budget.rows == rows


def test_a_resumed_run_goes_on_as_thinned_but_never_beyond_what_is_allowed_now() -> None:
    budget = Budget(0.03, 1024)
    budget.resume(256, 8, 2)
    assert (budget.rows, budget.widening, budget.vitals_widening) == (256, 8, 2)
    budget = Budget(0.03, 128)
    budget.resume(256, 10**6, 0)
    assert (budget.rows, budget.widening) == (128, module.WIDEST)
    assert budget.vitals_widening == 1


def test_steps_in_which_nothing_is_due_count_too(clock: Clock) -> None:
    budget = warm(Budget(0.03, 1024), clock)
    budget.pass_steps(9)
    clock.now += 3.0
    budget.spend(0.3)
    found = budget.end_step(0.0, 100)
    assert found is not None
    assert found.fraction == pytest.approx(0.1)
    assert budget.next_review == pytest.approx(clock.now + module.REVIEW_SECONDS)


def test_no_limit_never_thins(clock: Clock) -> None:
    budget = warm(Budget(None, None), clock)
    assert review(budget, clock, 0.9).change is None
    assert (budget.rows, budget.widening) == (None, 1)


def test_widening_ends(clock: Clock) -> None:
    budget = warm(Budget(0.03, 1), clock)
    for _ in range(20):
        review(budget, clock, 0.9)
    assert budget.widening == module.WIDEST


@pytest.mark.parametrize("bad", [0.0, -0.1, 1.5])
def test_a_limit_that_is_no_share_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=r"Lens: expected max_overhead in \(0, 1\] or None"):
        Budget(bad, None)


def test_no_rows_at_all_are_refused() -> None:
    with pytest.raises(ValueError, match="Lens: expected rows >= 1 or None for all, got 0"):
        Budget(0.1, 0)


def steps_of(budget: Budget, clock: Clock, *, light: float, heavy: float) -> Review:
    """A hundred steps of 0.1 s with vitals in each and something else in every tenth."""
    found = None
    for step in range(1, 101):
        others = step % 10 == 0
        clock.now += 0.1
        budget.spend(light + heavy * others)
        found = budget.end_step(0.0, 100, vitals=True, others=others) or found
        if found is not None:
            return found
    raise AssertionError("no review in ten seconds")


def test_vitals_stay_while_they_are_cheap(clock: Clock) -> None:
    budget = warm(Budget(0.03, SAMPLED_ROWS), clock)
    assert steps_of(budget, clock, light=0.001, heavy=0.05).change == (
        "intervals widened to 2 times the preset's"
    )
    assert (budget.widening, budget.vitals_widening) == (2, 1)


def test_vitals_that_take_more_than_half_are_thinned_and_the_rest_is_left_alone(
    clock: Clock,
) -> None:
    budget = warm(Budget(0.03, SAMPLED_ROWS), clock)
    found = steps_of(budget, clock, light=0.005, heavy=0.001)
    assert found.fraction == pytest.approx(0.051, rel=0.02)
    assert found.change == "vitals every 4 steps or so"
    assert (budget.widening, budget.vitals_widening) == (1, 4)


def test_both_give_way_where_both_cost_too_much_and_vitals_come_back_first(clock: Clock) -> None:
    budget = warm(Budget(0.03, SAMPLED_ROWS), clock)
    found = steps_of(budget, clock, light=0.005, heavy=0.05)
    assert found.change == ("vitals every 4 steps or so; intervals widened to 4 times the preset's")
    said = [steps_of(budget, clock, light=0.0001, heavy=0.0).change for _ in range(20)]
    assert [change for change in said if change is not None] == [
        "vitals every 2 steps again",
        "vitals every 1 steps again",
        "intervals narrowed to 2 times the preset's",
        "intervals narrowed to 1 times the preset's",
    ]


def test_where_vitals_are_never_alone_the_others_give_way_first(clock: Clock) -> None:
    budget = warm(Budget(0.03, SAMPLED_ROWS), clock)
    for _ in range(25):
        clock.now += 0.1
        budget.spend(0.01)
        budget.end_step(0.0, 100, vitals=True, others=True)
    assert (budget.widening, budget.vitals_widening) == (4, 1)
