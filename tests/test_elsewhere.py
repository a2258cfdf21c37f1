"""What lives on an accelerator is measured beside the training; here the copies are on a CPU."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import entropylens as el
from entropylens.budget import Budget
from entropylens.elsewhere import Elsewhere, Measured
from entropylens.ration import Ration
from entropylens.registry import Block, Diagnostic
from entropylens.schedule import Schedule
from entropylens.session import Session
from entropylens.store.writer import RunWriter
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


def ignore(seconds: float) -> None:
    pass


def give(
    elsewhere: Elsewhere, found: Diagnostic, step: int, value: torch.Tensor, took: Any = ignore
) -> None:
    elsewhere.measure([found], {"value": value}, dict, Stamp(step, 0.0, "train"), took)


def collected(elsewhere: Elsewhere, states: dict[str, Any], count: int) -> list[Measured]:
    """As many readings as given, taken as steps take them."""
    found: list[Measured] = []
    until = time.monotonic() + 20.0
    while len(found) < count and time.monotonic() < until:
        for measured in elsewhere.collect():
            states.update({name: state for name, _, state in measured.blocks})
            found.append(measured)
        time.sleep(0.001)
    return found


def test_readings_are_measured_in_order_in_another_thread_with_the_state_of_the_last() -> None:
    states: dict[str, Any] = {"count": None}
    elsewhere, count = Elsewhere(states), Count()
    for step in range(3):
        give(elsewhere, count, step, torch.full((2,), 10.0 * step))
    found = collected(elsewhere, states, 3)
    assert [one.stamp.step for one in found] == [0, 1, 2]
    assert values(found) == [1.0, 22.0, 43.0]
    assert threading.get_ident() not in count.threads
    assert not any(count.with_gradients)


def test_a_diagnostic_that_raises_is_told_and_does_not_stop_the_next_reading() -> None:
    elsewhere, count = Elsewhere({"count": None}), Count()
    for value in (torch.nan, 1.0):
        give(elsewhere, count, 1, torch.tensor([value]))
    first, second = elsewhere.finish(10.0)
    assert [(where, str(error)) for where, error in first.faults] == [
        ("diagnostic count", "no number")
    ]
    assert values([second]) == [2.0]


def test_a_reading_that_cannot_be_made_is_told() -> None:
    elsewhere = Elsewhere({"count": None})

    def broken(tensors: Any) -> Any:
        raise KeyError("value")

    elsewhere.measure([Count()], {}, broken, Stamp(1, 0.0, "train"), ignore)
    (measured,) = elsewhere.finish(10.0)
    assert [where for where, _ in measured.faults] == ["reading"]
    assert measured.seconds is not None


class Event:
    arrived = False

    def query(self) -> bool:
        return self.arrived


@pytest.fixture
def event(monkeypatch: pytest.MonkeyPatch) -> Event:
    found = Event()
    monkeypatch.setattr("entropylens.elsewhere.to_host", lambda tensor: (tensor, found))
    return found


def test_a_copy_under_way_is_not_waited_for(event: Event) -> None:
    elsewhere = Elsewhere({"count": None})
    for step in range(4):
        give(elsewhere, Count(), step, torch.ones(1))
    assert list(elsewhere.collect()) == []
    assert elsewhere.is_full
    event.arrived = True
    assert values(list(elsewhere.finish(10.0))) == [2.0] * 4


def test_a_copy_that_never_arrives_is_left_out_at_the_end(event: Event) -> None:
    elsewhere = Elsewhere({"count": None})
    give(elsewhere, Count(), 7, torch.ones(1))
    (measured,) = elsewhere.finish(0.05)
    assert [(where, str(error)) for where, error in measured.faults] == [
        ("elsewhere", "the reading of step 7 is left out: not measured within 0.05 s")
    ]
    assert measured.seconds is None


@pytest.mark.parametrize("where", ["alone", "in a list"])
def test_what_is_on_the_host_may_be_written_to_at_once(where: str) -> None:
    elsewhere = Elsewhere({"count": None})
    weight = torch.ones(3, requires_grad=True)
    tensors = {"value": weight} if where == "alone" else [weight]
    stamp = Stamp(1, 0.0, "train")

    def reading(tensors: Any) -> Any:
        return tensors if isinstance(tensors, dict) else {"value": tensors[0]}

    elsewhere.measure([Count()], tensors, reading, stamp, ignore)
    with torch.no_grad():
        weight.mul_(100.0)
    assert values(list(elsewhere.finish(10.0))) == [4.0]


def test_what_was_copied_is_not_copied_again(monkeypatch: pytest.MonkeyPatch) -> None:
    arrived, copy = Event(), torch.ones(2)
    arrived.arrived = True
    monkeypatch.setattr("entropylens.elsewhere.to_host", lambda tensor: (copy, arrived))
    elsewhere = Elsewhere({"count": None})
    seen: list[torch.Tensor] = []
    stamp = Stamp(1, 0.0, "train")
    elsewhere.measure([], torch.ones(2), seen.append, stamp, ignore)
    list(elsewhere.finish(10.0))
    assert seen[0] is copy


class Held(Count):
    """Measures when it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.free = threading.Event(), threading.Event()

    def measure(self, reading: Any, state: Any) -> tuple[list[Block], Any]:
        self.begun.set()
        assert self.free.wait(20.0)
        return super().measure(reading, state)


def test_the_end_waits_for_none_of_what_would_take_too_long() -> None:
    elsewhere, held = Elsewhere({"count": None}), Held()
    for step in range(4):
        give(elsewhere, held, step, torch.ones(1))
    assert list(elsewhere.collect()) == []
    assert held.begun.wait(20.0)
    began = time.monotonic()
    found = list(elsewhere.finish(0.1))
    assert time.monotonic() - began < 5.0
    assert [one.stamp.step for one in found] == [0, 1, 2, 3]
    assert [[type(error) for _, error in one.faults] for one in found] == [[TimeoutError]] * 4
    held.free.set()


def test_the_end_waits_for_what_is_under_way_and_measures_the_rest_itself() -> None:
    states: dict[str, Any] = {"count": None}
    elsewhere, held = Elsewhere(states), Held()
    for step in range(3):
        give(elsewhere, held, step, torch.ones(1))
    assert list(elsewhere.collect()) == []
    threading.Timer(0.05, held.free.set).start()
    found = list(elsewhere.finish(20.0))
    assert values(found) == [2.0] * 3
    assert held.threads[0] != threading.get_ident()
    assert held.threads[1:] == [threading.get_ident()] * 2


def test_after_an_end_it_goes_on_in_another_thread() -> None:
    states: dict[str, Any] = {"count": None}
    elsewhere, count = Elsewhere(states), Count()
    for step in range(2):
        give(elsewhere, count, step, torch.ones(1))
        assert len(collected(elsewhere, states, 1)) == 1
        assert list(elsewhere.finish(10.0)) == []
    assert threading.get_ident() not in count.threads


def test_another_process_takes_in_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = Elsewhere({"count": None})
    give(elsewhere, Count(), 1, torch.ones(1))
    pid = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: pid + 1)
    assert list(elsewhere.collect()) == []
    assert elsewhere._running is None
    assert list(elsewhere.finish(1.0)) == []


def test_the_time_told_is_that_of_the_wall() -> None:
    class Asleep(Count):
        def measure(self, reading: Any, state: Any) -> tuple[list[Block], Any]:
            time.sleep(0.1)
            return super().measure(reading, state)

    elsewhere = Elsewhere({"count": None})
    give(elsewhere, Asleep(), 1, torch.ones(1))
    (measured,) = collected(elsewhere, {}, 1)
    assert measured.seconds is not None
    assert measured.seconds >= 0.1


# -- a whole run, whose model is taken to live on an accelerator ---------------------------------


@pytest.mark.filterwarnings("ignore")
def test_rows_of_a_model_that_is_not_on_the_host_stand_under_the_step_they_belong_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    took: list[tuple[float, int]] = []

    def owe(self: Ration, seconds: float) -> None:
        took.append((seconds, threading.get_ident()))

    monkeypatch.setattr(Ration, "owe", owe)
    torch.manual_seed(0)
    model = nn.Linear(6, 5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    given: dict[str, Any] = {"diagnostics": {"weight_spectrum": Schedule(1)}, "max_overhead": None}
    expected = []
    with el.Lens(model, optimizer, run_dir=tmp_path / "run", **given) as lens:
        run = lens.watch._session
        assert run.is_host
        run._is_host = False
        for _ in range(3):
            model(torch.ones(2, 6)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            lens.step()
            norm = torch.linalg.matrix_norm(model.weight.detach().double(), 2)
            expected.append(pytest.approx(float(norm), rel=1e-6))
            settle(run)
        assert not run.writer._faults
    table = el.open_run(tmp_path / "run").metrics("conditioning/sigma_max").to_pandas()
    table = table.sort_values("step")
    assert list(table["step"]) == [1, 2, 3]
    assert list(table["value"]) == expected
    assert len(took) == 3
    assert min(seconds for seconds, _ in took) > 0.0
    assert {thread for _, thread in took} == {threading.get_ident()}


def settle(run: Session) -> None:
    """Take in what is measured elsewhere, as later steps would."""
    run._collect(run._elsewhere.collect())
    while (running := run._elsewhere._running) is not None:
        running.done.exception(20.0)
        run._collect(run._elsewhere.collect())


def session(run_dir: Path, found: Diagnostic, limit: float | None = None) -> Session:
    """Of a run that measures one diagnostic, elsewhere and in every step."""
    made = Session(RunWriter(run_dir), {}, Budget(limit, None), torch.device("cpu"), None)
    made._states[found.name] = None
    made.due = {"weight": [found]}
    made._is_host = False
    return made


def test_a_reading_measured_elsewhere_is_told_and_not_charged(tmp_path: Path) -> None:
    class Nan(Count):
        name = "nan"

        def measure(self, reading: Any, state: Any) -> tuple[list[Block], Any]:
            time.sleep(0.05)
            raise ValueError("no number")

    took: list[float] = []
    run = session(tmp_path / "run", Count(), 0.03)
    run.due["weight"].append(Nan())
    run._states["nan"] = None
    stamp = Stamp(1, time.time(), "train")
    run.decompose("weight", {"value": torch.ones(1)}, dict, stamp, took.append)
    run.decompose("representation", {"value": torch.ones(1)}, dict, stamp, took.append)
    assert took == []
    settle(run)
    assert len(took) == 1
    assert took[0] >= 0.05
    assert run.budget._spent == 0.0
    assert run._states["count"] == 1
    assert run.writer._faults == {"diagnostic nan: ValueError": 1}
    run.close("finished", "")


def test_on_the_host_nothing_is_told(tmp_path: Path) -> None:
    took: list[float] = []
    run = session(tmp_path / "run", Count())
    run._is_host = True
    stamp = Stamp(1, time.time(), "train")
    run.decompose("weight", {"value": torch.ones(1)}, dict, stamp, took.append)
    assert run._states["count"] == 1
    assert took == []
    run.close("finished", "")


def test_another_process_moves_no_rows(tmp_path: Path) -> None:
    run = session(tmp_path / "run", Count())
    block = Block.metrics(["count"], torch.ones(1))
    run.add(block, Stamp(1, time.time(), "train"))
    pid, run._pid = run._pid, -1
    run.flush()
    assert len(run._transfer) == 1
    run._pid = pid
    run.flush()
    assert run._transfer.is_empty
    run.close("finished", "")


def test_what_is_left_out_is_told_as_a_fault_and_takes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("entropylens.session.CLOSE_SECONDS", 0.1)
    took: list[float] = []
    held = Held()
    run = session(tmp_path / "run", held)
    for step in range(3):
        stamp = Stamp(step, time.time(), "train")
        run.decompose("weight", {"value": torch.ones(1)}, dict, stamp, took.append)
        run._collect(run._elsewhere.collect())
    run.close("finished", "")
    assert run.writer._faults == {"elsewhere: TimeoutError": 3}
    assert took == []
    held.free.set()


# -- how processes end ---------------------------------------------------------------------------

ENDING = """
import os, signal, sys, threading, time
from pathlib import Path
import torch
import test_elsewhere as tests
from entropylens import session as module
from entropylens.store.writer import RunWriter
from entropylens.transfer import Stamp

class Slow(tests.Count):
    def measure(self, reading, state):
        time.sleep({seconds})
        return super().measure(reading, state)

run = tests.session(Path(sys.argv[1]), Slow())
for step in range(1, 4):
    stamp = Stamp(step, time.time(), "train")
    run.decompose("weight", {{"value": torch.ones(1)}}, dict, stamp, lambda seconds: None)
    run._collect(run._elsewhere.collect())
"""


def end(run_dir: Path, program: str, seconds: float) -> tuple[int, str, list[int], dict[str, int]]:
    """How a process of that program ended, what it said, the steps it measured, its faults."""
    done = subprocess.run(
        [sys.executable, "-c", ENDING.format(seconds=seconds) + program, str(run_dir)],
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": f"{Path(__file__).parents[1]}"},
        capture_output=True,
        text=True,
        timeout=60.0,
        check=False,
    )
    found = el.open_run(run_dir)
    table = found.metrics("count").to_arrow()
    steps = sorted(table["step"].to_pylist())
    return done.returncode, done.stderr, steps, faults(run_dir)


def faults(run_dir: Path) -> dict[str, int]:
    status = json.loads((run_dir / "status" / "rank-000.json").read_text())
    return dict(status["faults"])


def test_a_process_that_ends_without_closing_loses_no_reading(tmp_path: Path) -> None:
    code, said, steps, counted = end(tmp_path / "run", "", 0.1)
    assert (code, said, steps, counted) == (0, "", [1, 2, 3], {})


def test_a_fork_ends_at_once_and_its_parent_goes_on(tmp_path: Path) -> None:
    program = """
child = os.fork()
if child:
    until = time.monotonic() + 20.0
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < until:
        time.sleep(0.01)
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
    print(ended[1], file=sys.stderr) if ended[0] else print("hangs", file=sys.stderr)
else:
    run._collect(run._elsewhere.collect())
    run.flush()
"""
    code, said, steps, counted = end(tmp_path / "run", program, 0.5)
    assert (code, said, steps, counted) == (0, "0\n", [1, 2, 3], {})


def test_a_process_told_to_end_waits_for_readings_only_so_long(tmp_path: Path) -> None:
    program = """
module.EXIT_SECONDS = 0.3
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(50)
"""
    began = time.monotonic()
    code, said, steps, counted = end(tmp_path / "run", program, 50.0)
    assert time.monotonic() - began < 40.0
    assert code == -15
    assert steps == []
    assert counted == {"elsewhere: TimeoutError": 3}
    assert "the reading of step 1 is left out: not measured within 0.3 s" in said


def test_a_process_that_ends_begins_no_reading_that_is_late(tmp_path: Path) -> None:
    program = "module.EXIT_SECONDS = 0.3\n"
    code, said, steps, counted = end(tmp_path / "run", program, 0.5)
    assert (code, steps, counted) == (0, [1, 2], {"elsewhere: TimeoutError": 1})
    assert "the reading of step 3 is left out: not measured within 0.3 s" in said


def test_a_process_that_ends_after_closing_in_vain_does_not_abort(tmp_path: Path) -> None:
    program = """
def busy(self, reading, state):
    until = time.monotonic() + 3.0
    while time.monotonic() < until:
        torch.linalg.svdvals(torch.ones(60, 60))
    return [], state

Slow.measure = busy
run.decompose("weight", {"value": torch.ones(1)}, dict, stamp, lambda seconds: None)
run._elsewhere._running.done.exception()
run._collect(run._elsewhere.collect())
module.CLOSE_SECONDS = 0.1
run.close("finished", "")
"""
    code, _, steps, counted = end(tmp_path / "run", program, 0.1)
    assert (code, steps, counted) == (0, [1], {"elsewhere: TimeoutError": 3})
