from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from entropylens.analysis.alarms import Alarm, open_alarms


def event(step: int, severity: str, rule: str | None = "floor", **more: Any) -> dict[str, Any]:
    row = {"kind": "law", "rule": rule, "severity": severity, "step": step, "phase": "train"}
    return row | {"message": f"at {step}"} | more


def test_the_newest_event_of_each_rule_counts_and_the_newest_alarm_comes_first() -> None:
    events = [event(5, "error"), event(9, "warning"), event(7, "error", "rise", phase="eval")]
    for order in (events, events[::-1]):
        assert open_alarms(order) == [
            Alarm("floor", "warning", 9, "at 9", "train"),
            Alarm("rise", "error", 7, "at 7", "eval"),
        ]


def test_a_later_info_closes_an_alarm_of_its_rule_only_and_an_earlier_one_does_not() -> None:
    assert open_alarms([event(5, "error"), event(6, "info")]) == []
    assert len(open_alarms([event(5, "error"), event(6, "info", "rise")])) == 1
    assert len(open_alarms([event(5, "error"), event(4, "info")])) == 1
    assert len(open_alarms([event(5, "info"), event(6, "info"), event(7, "warning")])) == 1


def test_within_a_step_the_time_decides() -> None:
    now = datetime.now(UTC)
    events = [event(5, "info", time=now), event(5, "error", time=now - timedelta(seconds=1))]
    assert open_alarms(events) == []


def test_events_without_a_rule_are_alarms_if_their_kind_says_so() -> None:
    for rule in (None, "", float("nan")):
        (one,) = open_alarms([event(5, "warning", rule, kind="alarm/loss")])  # type: ignore[arg-type]
        assert one.rule == "alarm/loss"
        assert open_alarms([event(5, "error", rule, kind="note")]) == []  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["budget", "capture", "run/failed", "run/signal"])
def test_what_the_monitor_says_of_itself_is_no_alarm(kind: str) -> None:
    assert open_alarms([event(5, "error", None, kind=kind), event(5, "error", kind=kind)]) == []
    assert open_alarms([]) == []
