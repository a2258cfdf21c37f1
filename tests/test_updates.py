"""What looking at updates costs, and how the budget is charged with it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from untouched import tiny

from entropylens import ration, updates
from entropylens.budget import Budget
from entropylens.capture.call import Call
from entropylens.capture.probe import Batch
from entropylens.capture.tokens import LogitTokens
from entropylens.registry import UpdateReading
from entropylens.updates import SHARE, Updates

pytestmark = pytest.mark.filterwarnings("ignore")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Session:
    """What `Updates` asks of the run."""

    def __init__(self, limit: float | None) -> None:
        self.budget = Budget(limit, None)
        self.due = {"probe": ()}
        self.events: list[str] = []
        self.writer = SimpleNamespace(event=lambda kind, text, **_: self.events.append(text))
        self.measured = 0

    def measure(self, reads: str, take: Any) -> None:
        take()
        self.measured += 1


def looked(
    monkeypatch: pytest.MonkeyPatch, session: Any, number: int = 1, took: float = 0.5
) -> tuple[Updates, Clock, nn.Module]:
    clock, model = Clock(), tiny.llama()
    for module in (updates, ration):
        monkeypatch.setattr(module, "perf_counter", clock)
    found = Updates(session, 1.0)
    assert found.ask(model, 1, 0)
    look(found, clock, model, number, took)
    return found, clock, model


def look(found: Updates, clock: Clock, model: nn.Module, number: int, took: float) -> bool:
    ids = torch.randint(2, 10, (4, 8), generator=torch.Generator().manual_seed(0))
    source = LogitTokens.of(torch.zeros(4, 7, len(tiny.VOCABULARY)), ids[:, 1:])
    found.begin(number)
    call = Call(module=model, kwargs={"input_ids": ids})
    batch = Batch(call=call, grid=source.grid)
    found.keep(batch, source, None, None, torch.Generator())
    if not found.has_states:
        return False
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    probe: Any = found._probe
    reading = probe.reading

    def slow(*args: Any) -> Any:
        clock.now += took
        return reading(*args)

    probe.reading = slow
    found.take(UpdateReading(before=before, after=before))
    probe.reading = reading
    return True


def test_the_next_look_waits_until_the_last_one_is_within_its_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = Session(0.03)
    found, clock, model = looked(monkeypatch, session)
    # Half a second at a sixth of 3 % takes 100 s to pay.
    clock.now += 99.0
    found.ration.pay()
    assert not look(found, clock, model, 50, 0.5)
    clock.now += 1.0
    found.ration.pay()
    assert look(found, clock, model, 52, 0.5)
    assert session.measured == 2
    # How it is done is said once.
    assert session.events == ["derivatives along updates are differentiated (forward mode)"]


def test_without_a_limit_every_due_step_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(None)
    found, clock, model = looked(monkeypatch, session)
    assert look(found, clock, model, 2, 0.5)
    found.ration.pay()
    assert session.budget._spent == 0.0


def test_a_look_is_charged_in_parts_that_add_up_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(0.03)
    found, clock, _ = looked(monkeypatch, session)
    # Taken out of the burst, which the hook that ran it is charged with.
    assert session.budget._spent == pytest.approx(-0.5)
    session.budget.spend(0.5)
    clock.now += 10.0
    found.ration.pay()
    assert session.budget._spent == pytest.approx(SHARE * 0.03 * 10.5)
    for _ in range(20):
        clock.now += 10.0
        found.ration.pay()
    assert session.budget._spent == pytest.approx(0.5)
