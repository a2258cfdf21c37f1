from math import inf, nan

import pytest

from entropylens.rules.agreement import Agreement, allowed_difference


def test_a_sample_is_allowed_four_standard_errors_and_a_complete_mean_none() -> None:
    assert allowed_difference(0.5, 400, False, 2.0) == pytest.approx(4 * 0.025 + 0.001 + 0.02)
    assert allowed_difference(0.5, 400, True, -2.0) == pytest.approx(0.021)


def test_values_that_agree_say_nothing() -> None:
    agreement = Agreement()
    assert agreement.compare(1, 1.0, 0.5, 400, False, 1.1) is None
    assert agreement.compare(2, 1.0, 0.5, 400, True, 1.01) is None
    assert agreement.compare(3, nan, 0.5, 400, True, nan) is None
    assert agreement.steps == 0


def test_a_difference_is_told_once_and_again_when_it_has_doubled() -> None:
    agreement = Agreement()
    first = agreement.compare(7, 1.0, 0.5, 100, True, 1.03)
    assert first is not None
    assert agreement.compare(8, 1.0, 0.5, 100, True, 1.04) is None
    third = agreement.compare(9, 1.0, 0.5, 100, True, 1.2)
    assert third is not None
    assert (first["kind"], first["severity"], first["step"]) == ("agreement", "warning", 7)
    assert third["evidence"]["first_step"] == 7
    assert third["evidence"]["steps"] == 3
    for part in ("1.2 nats", "measure 1 ", "standard error 0", "step 9", "3 steps since step 7"):
        assert part in third["message"]
    for cause in ("temperature", "padding", "bfloat16", "micro-batch", "sum over sequences"):
        assert cause in third["message"]


def test_the_standard_error_of_a_sample_is_named() -> None:
    told = Agreement().compare(1, 1.0, 0.5, 100, False, 2.0)
    assert told is not None
    assert told["evidence"]["standard_error"] == pytest.approx(0.05)


@pytest.mark.parametrize("theirs", [nan, inf])
def test_one_value_that_is_no_number_is_told_once(theirs: float) -> None:
    agreement = Agreement()
    assert agreement.compare(1, 1.0, 0.5, 100, True, theirs) is not None
    assert agreement.compare(2, 1.0, 0.5, 100, True, theirs) is None


@pytest.mark.parametrize(
    "spoiled", [(1.0, 0.5, nan), (1.0, 0.5, inf), (nan, 0.5, 1.0), (1, nan, 2)]
)
def test_a_value_that_is_no_number_silences_nothing(spoiled: tuple[float, float, float]) -> None:
    ours, std, theirs = spoiled
    agreement = Agreement()
    assert agreement.compare(1, ours, std, 100, False, theirs) is not None
    assert agreement.compare(2, 1.0, 0.5, 100, True, 1.03) is not None
    assert agreement.compare(3, ours, std, 100, False, theirs) is None
    assert agreement.compare(4, 1.0, 0.5, 100, True, 1.04) is None
    assert agreement.compare(5, 1.0, 0.5, 100, True, 5.0) is not None
    assert agreement.steps == 5
