"""Weights are visited in turn, under a share of what watching may cost."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import entropylens as el
from entropylens import ration, visits
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
    given: dict[str, Any] = {"diagnostics": EVERY_STEP, "max_overhead": 0.08}
    with el.Lens(trained, optimizer, run_dir=tmp_path / "run", **given) as lens:
        for _ in range(5):
            trained(torch.ones(2, 6)).square().mean().backward()
            optimizer.step()
            # An eighth of 8 % pays for half a second in 50.
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
    for rank in range(3):
        trained = model()
        optimizer = torch.optim.SGD(trained.parameters(), 0.1)
        run_dir = tmp_path / str(rank)
        with el.Lens(trained, optimizer, run_dir=run_dir, rank=0) as lens:
            session = lens.watch._session
            session.writer.rank = rank
            asked = visits.Visits(session)
            asked.ask(trained, 0)
            started.add(asked._next)
            session.writer.rank = 0
    assert len(started) > 1
