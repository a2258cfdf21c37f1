"""What lives on an accelerator is measured beside the training; here the copies are the tensors."""

import threading
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from entropylens.elsewhere import Elsewhere, Measured
from entropylens.registry import Block, Diagnostic
from entropylens.schedule import Schedule
from entropylens.transfer import Stamp


class Count(Diagnostic):
    name, reads = "count", "weight"
    metrics: Mapping[str, Any] = {}  # type: ignore[misc]
    schedules: Mapping[str, Schedule] = {}  # type: ignore[misc]

    def __init__(self) -> None:
        self.threads: list[int] = []
        self.with_gradients: list[bool] = []

    def measure(self, reading: Any, state: Any) -> tuple[list[Block], Any]:
        self.threads.append(threading.get_ident())
        self.with_gradients.append(torch.is_grad_enabled())
        if reading["value"].isnan().any():
            raise ValueError("no number")
        seen = (state or 0) + 1
        return [Block.metrics(["count"], reading["value"].sum()[None] + seen)], seen


def values(found: list[Measured]) -> list[float]:
    return [
        float(b.columns["value"][0]) for m in found for _, blocks, _ in m.blocks for b in blocks
    ]


def test_readings_are_measured_in_order_in_another_thread_with_the_state_of_the_last() -> None:
    states: dict[str, Any] = {"count": None}
    elsewhere, count = Elsewhere(states), Count()
    for step in range(3):
        tensors = {"value": torch.full((2,), 10.0 * step)}
        elsewhere.measure([count], tensors, dict, Stamp(step, 0.0, "train"))
    found = []
    for measured in elsewhere.collect(wait=True):
        states.update({name: state for name, _, state in measured.blocks})
        found.append(measured)
    assert [one.stamp.step for one in found] == [0, 1, 2]
    assert values(found) == [1.0, 22.0, 43.0]
    assert threading.get_ident() not in count.threads
    assert not any(count.with_gradients)


def test_a_diagnostic_that_raises_is_told_and_does_not_stop_the_next_reading() -> None:
    elsewhere, count = Elsewhere({"count": None}), Count()
    for value in (torch.nan, 1.0):
        tensors = {"value": torch.tensor([value])}
        elsewhere.measure([count], tensors, dict, Stamp(1, 0.0, "train"))
    first, second = elsewhere.collect(wait=True)
    assert [(where, str(error)) for where, error in first.faults] == [
        ("diagnostic count", "no number")
    ]
    assert values([second]) == [2.0]


def test_a_reading_that_cannot_be_made_is_told() -> None:
    elsewhere = Elsewhere({"count": None})

    def broken(tensors: Any) -> Any:
        raise KeyError("value")

    elsewhere.measure([Count()], {}, broken, Stamp(1, 0.0, "train"))
    (measured,) = elsewhere.collect(wait=True)
    assert [where for where, _ in measured.faults] == ["reading"]


def test_a_copy_under_way_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        arrived = False

        def query(self) -> bool:
            return self.arrived

        def synchronize(self) -> None:
            assert self.arrived

    event = Event()
    monkeypatch.setattr("entropylens.elsewhere.to_host", lambda tensor: (tensor, event))
    elsewhere = Elsewhere({"count": None})
    for step in range(4):
        stamp = Stamp(step, 0.0, "train")
        elsewhere.measure([Count()], {"value": torch.ones(1)}, dict, stamp)
    assert list(elsewhere.collect()) == []
    assert elsewhere.is_full
    event.arrived = True
    assert values(list(elsewhere.collect(wait=True))) == [2.0] * 4
