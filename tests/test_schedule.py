import pytest

from entropylens.schedule import PRESETS, Schedule, check_preset


def test_the_first_step_and_every_nth_are_due() -> None:
    schedule = Schedule(every=10, floor=100)
    assert [s for s in range(1, 41) if schedule.is_due(s)] == [1, 10, 20, 30, 40]


def test_zero_is_off() -> None:
    assert not any(Schedule(0).is_due(step) for step in range(1, 100))


def test_widening_never_passes_the_floor() -> None:
    schedule = Schedule(every=10, floor=100)
    assert schedule.interval(4) == 40
    assert schedule.interval(1024) == 100
    assert [s for s in range(1, 401) if schedule.is_due(s, 1024)] == [1, 100, 200, 300, 400]


def test_bad_intervals_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Schedule: expected every >= 0 \(0 is off\), got -1"):
        Schedule(-1)
    with pytest.raises(ValueError, match="expected floor >= every, got floor 5 and every 10"):
        Schedule(10, floor=5)


def test_an_unknown_preset_names_the_nearest() -> None:
    assert [check_preset("Lens", preset) for preset in PRESETS] == list(PRESETS)
    with pytest.raises(ValueError, match=r"Lens: expected a preset .* did you mean 'balanced'\?"):
        check_preset("Lens", "balance")
