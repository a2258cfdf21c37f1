"""Which alarms of a run are open?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

__all__ = ["Alarm", "open_alarms"]


@dataclass(frozen=True)
class Alarm:
    """A warning or an error that nothing has taken back."""

    rule: str
    """Which rule saw it, or the event's kind where it names none."""
    severity: str
    """warning or error."""
    step: int
    message: str
    phase: str


def open_alarms(events: Sequence[Mapping[str, Any]]) -> list[Alarm]:
    """Which alarms are open?

    An event is an alarm's if it names a rule, or if its kind begins with ``alarm``. The newest of
    each rule (or kind) counts, by step and then by time: a warning or an error is open, anything
    milder has closed it. What the monitor tells of itself (kinds ``budget``, ``capture`` and
    ``run/...``) is none.

    Args:
        events: Rows of the events table, in any order.

    Returns:
        The open alarms, the newest first.

    Example:
        >>> rise = {"kind": "law", "rule": "rise", "severity": "error", "step": 7, "message": "m"}
        >>> [alarm.step for alarm in open_alarms([rise])]
        [7]
        >>> open_alarms([rise, rise | {"severity": "info", "step": 8}])
        []
    """
    newest: dict[str, Mapping[str, Any]] = {}
    for event in sorted(events, key=_when):
        rule = _rule(event)
        if rule:
            newest.pop(rule, None)
            newest[rule] = event
    return [
        Alarm(rule, event["severity"], _when(event)[0], *_words(event))
        for rule, event in reversed(newest.items())
        if event.get("severity") in ("warning", "error")
    ]


def _rule(event: Mapping[str, Any]) -> str:
    """Which alarm an event is about; empty for none."""
    kind, rule = str(event.get("kind") or ""), event.get("rule")
    if kind in ("budget", "capture") or kind.startswith("run/"):
        return ""
    if isinstance(rule, str) and rule:
        return rule
    return kind if kind.startswith("alarm") else ""


def _when(event: Mapping[str, Any]) -> tuple[int, float]:
    time = event.get("time")
    return int(event.get("step") or 0), time.timestamp() if isinstance(time, datetime) else 0.0


def _words(event: Mapping[str, Any]) -> tuple[str, str]:
    return str(event.get("message") or ""), str(event.get("phase") or "train")
