"""Weights are visited in turn, under a share of what watching may cost."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import entropylens as el
from entropylens import ration, session, visits
from entropylens.schedule import Schedule

pytestmark = pytest.mark.filterwarnings("ignore")
EVERY_STEP = {"weight_spectrum": Schedule(1), "spectral_norm": False}


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3))


def watched(
    run_dir: Path, trained: nn.Module, steps: int, *, limit: float | None = None, **given: Any
) -> el.Run:
    optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], 0.1)
    given = {"diagnostics": EVERY_STEP, "max_overhead": limit, **given}
    with el.Lens(trained, optimizer, run_dir=run_dir, **given) as lens:
        for _ in range(steps):
            trained(torch.ones(2, 6)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            lens.step()
    return el.open_run(run_dir)


def rows(run: el.Run, name: str) -> list[tuple[int, str, float]]:
    table = run.metrics().to_pandas()
    found = table[table["name"] == name].sort_values(["step", "module"])
    return list(zip(found["step"], found["module"], found["value"], strict=True))


def messages(run: el.Run) -> list[str]:
    table = run.events().to_pandas()
    return list(table[table["kind"] == "capture"]["message"])


def test_a_visit_measures_the_weights_as_they_are_after_the_step(tmp_path: Path) -> None:
    trained = model()
    run = watched(tmp_path / "run", trained, 1)
    found = {module: value for _, module, value in rows(run, "conditioning/sigma_max")}
    for name, layer in enumerate(trained):
        expected = torch.linalg.matrix_norm(layer.weight.detach().double(), 2)  # type: ignore[operator]
        assert found[f"{name}.weight"] == pytest.approx(float(expected), rel=1e-6)


def test_a_spectrum_stands_in_the_log(tmp_path: Path) -> None:
    trained = model()
    run = watched(tmp_path / "run", trained, 1)
    table = run.spectra().to_pandas().set_index("module")
    expected = torch.linalg.svdvals(trained[1].weight.detach().double())  # type: ignore[operator]
    stored: Any = table.loc["1.weight", "values"]
    assert list(stored) == pytest.approx(expected.tolist(), rel=1e-6)


def test_one_comes_after_the_other_as_time_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock:
        now = 100.0

        def __call__(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(ration, "perf_counter", clock)
    shown: list[str] = []

    def slow(self: Any, matrix: Any, stamp: Any) -> None:
        shown.append(f"{stamp.step}: {matrix.name}")
        self.ration.charge(1.0)

    monkeypatch.setattr(visits.Visits, "_show", slow)
    trained = model()
    optimizer = torch.optim.SGD(trained.parameters(), 0.1)
    given: dict[str, Any] = {"diagnostics": EVERY_STEP, "max_overhead": 0.12}
    with el.Lens(trained, optimizer, run_dir=tmp_path / "run", **given) as lens:
        for _ in range(5):
            trained(torch.ones(2, 6)).square().mean().backward()
            optimizer.step()
            # A twelfth of 12 % pays for half a second in 50.
            clock.now += 50.0
            lens.step()
    assert shown == ["1: 0.weight", "3: 1.weight", "5: 2.weight"]


def test_what_cannot_be_read_or_would_take_too_long_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visits, "_SECONDS", 2.0 / 99)
    trained = model()
    trained[2].weight = nn.Parameter(trained[2].weight.detach().to(torch.complex64))  # type: ignore[operator]
    trained.forward = lambda x: trained[1](trained[0](x))  # type: ignore[method-assign]
    run = watched(tmp_path / "run", trained, 2)
    assert {module for _, module, _ in rows(run, "conditioning/sigma_max")} == {"1.weight"}
    told = messages(run)
    assert "no spectrum of 2.weight: it is complex" in told
    assert [m for m in told if m.startswith("no spectrum of 0.weight: 5 x 6 would hold")] == [
        "no spectrum of 0.weight: 5 x 6 would hold the training up for 3 s; `entropylens spectra` "
        "shows it of a checkpoint"
    ]


def test_frozen_weights_are_not_visited(tmp_path: Path) -> None:
    trained = model()
    trained[0].requires_grad_(False)
    run = watched(tmp_path / "run", trained, 1)
    found = {module for _, module, _ in rows(run, "conditioning/sigma_max")}
    assert found == {"1.weight", "2.weight"}


def test_every_rank_begins_elsewhere(tmp_path: Path) -> None:
    started = set()
    for rank in range(8):
        trained = nn.Sequential(*(nn.Linear(3, 3) for _ in range(24)))
        optimizer = torch.optim.SGD(trained.parameters(), 0.1)
        run_dir = tmp_path / str(rank)
        with el.Lens(trained, optimizer, run_dir=run_dir, rank=0) as lens:
            watched_by = lens.watch._session
            watched_by.writer.rank = rank
            asked = visits.Visits(watched_by)
            asked.ask(trained, 0)
            started.add(asked._next)
            watched_by.writer.rank = 0
    assert len(started) == 8


def beside(run_dir: Path, steps: int, before: Any = None) -> tuple[el.Run, visits.Visits]:
    """A run whose model passes for one on an accelerator."""
    trained = model()
    optimizer = torch.optim.SGD(trained.parameters(), 0.1)
    given: dict[str, Any] = {"diagnostics": EVERY_STEP, "max_overhead": None}
    with el.Lens(trained, optimizer, run_dir=run_dir, **given) as lens:
        measuring = lens.watch._session
        measuring._is_host = False
        for _ in range(steps):
            trained(torch.ones(2, 6)).square().mean().backward()
            optimizer.step()
            lens.step()
            measuring.flush()
            if before is not None:
                before(lens.watch._visits)
        asked = lens.watch._visits
    assert asked is not None
    return el.open_run(run_dir), asked


def test_a_visit_that_another_thread_makes_is_owed_for_and_timed_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owed: list[float] = []
    given: list[Any] = []

    def decompose(self: Any, reads: str, tensors: Any, reading: Any, stamp: Any, took: Any) -> None:
        given.append(took)

    monkeypatch.setattr(session.Session, "decompose", decompose)
    monkeypatch.setattr(ration.Ration, "owe", lambda self, seconds: owed.append(seconds))
    # The first has 150, the others 80 and 36.
    monkeypatch.setattr(visits, "_UNTIMED", 100.0)
    _, asked = beside(tmp_path / "run", 1)
    assert (asked._rate, owed) == (visits._SECONDS, [])
    for took, seconds in zip(given, (3.0, 4.0, 5.0), strict=True):
        took(seconds)
    assert (asked._rate, owed) == (3.0 / 150, [3.0, 4.0, 5.0])


def test_spectra_come_from_beside_the_training(tmp_path: Path) -> None:
    run, _ = beside(tmp_path / "run", 2)
    found = [(step, module) for step, module, _ in rows(run, "conditioning/sigma_max")]
    assert found == [(s, f"{n}.weight") for s in (1, 2) for n in range(3)]


@pytest.mark.parametrize(("seconds", "shown"), [(59.0, 3), (61.0, 2)])
def test_beside_the_training_a_visit_may_take_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, shown: int
) -> None:
    monkeypatch.setattr(visits, "_SECONDS", seconds / 150)
    run, _ = beside(tmp_path / "run", 1)
    assert len(rows(run, "conditioning/sigma_max")) == shown
    assert [m for m in messages(run) if m.startswith("no spectrum of 0.weight")] == [
        "no spectrum of 0.weight: 5 x 6 would keep a thread busy for 61 s; `entropylens spectra` "
        "shows it of a checkpoint"
    ] * (3 - shown)


def test_what_was_left_out_once_stays_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visits, "_SECONDS", 61.0 / 150)
    run, _ = beside(tmp_path / "run", 3, lambda asked: setattr(asked, "_rate", 0.0))
    found = {module for _, module, _ in rows(run, "conditioning/sigma_max")}
    assert found == {"1.weight", "2.weight"}
    assert sum(m.startswith("no spectrum of 0.weight") for m in messages(run)) == 1


def test_a_visit_on_a_cpu_is_not_owed_for_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owed: list[float] = []
    monkeypatch.setattr(ration.Ration, "owe", lambda self, seconds: owed.append(seconds))
    run = watched(tmp_path / "run", model(), 2)
    assert len(rows(run, "conditioning/sigma_max")) == 6
    assert not owed
