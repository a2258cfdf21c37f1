"""The logs that are committed: what they show, and that they are read as any other."""

from pathlib import Path

import numpy as np
import pytest

import entropylens as el
from entropylens.analysis.entropy_change import read_entropy_change
from entropylens.analysis.overview import read_overview, sentences

LOGS = Path(__file__).parents[2] / "sample_runs" / "grpo_countdown" / "logs"


def ends(run: el.Run, name: str) -> tuple[float, float]:
    """Means of the first and of the last 20 steps."""
    rows = sorted((r["step"], r["value"]) for r in run.metrics(name).to_arrow().to_pylist())
    values = [value for _, value in rows]
    return float(np.mean(values[:20])), float(np.mean(values[-20:]))


@pytest.mark.parametrize("name", ["collapse", "destroyed", "adaptive", "small"])
def test_they_are_whole_and_hold_no_path_of_a_machine(name: str) -> None:
    run = el.open_run(LOGS / name)
    assert run.state() == "finished"
    assert run.status()[0].faults == {}
    for file in ("run.json", "status/rank-000.json", "evaluation.json"):
        assert "/tmp" not in (LOGS / name / file).read_text()
    assert "/tmp" not in str(run.events().to_arrow().to_pylist())
    said = "\n".join(sentences(read_overview(run)))
    assert "Mean reward went from" in said
    assert "the updates should have changed the entropy by" in said


def test_each_fails_or_holds_in_its_own_way() -> None:
    collapse, destroyed, adaptive = (
        el.open_run(LOGS / name) for name in ("collapse", "destroyed", "adaptive")
    )
    first, last = ends(collapse, "entropy/token/mean")
    assert last < 0.45 * first
    first, last = ends(collapse, "answer/distinct/mean")
    assert last < 0.5 * first
    first, last = ends(destroyed, "reward/mean")
    assert last < 0.25 * first
    first, last = ends(destroyed, "entropy/token/mean")
    assert last > 0.8 * first
    first, last = ends(adaptive, "entropy/token/mean")
    assert last > 0.95 * first


def test_first_order_is_all_there_is_of_small_steps() -> None:
    """The issue's own line: slope 1 within 5 %, R^2 of at least 0.99, on the same states."""
    found = read_entropy_change(el.open_run(LOGS / "small"))
    assert found is not None
    exact = found.agreements[0]
    assert exact.name == "exact"
    assert exact.slope == pytest.approx(1.0, abs=0.05)
    assert exact.correlation**2 > 0.99
    assert exact.identity > 0.99


def test_with_the_softmax_taken_exactly_adam_s_own_steps_are_foretold_too() -> None:
    for name in ("collapse", "adaptive"):
        found = read_entropy_change(el.open_run(LOGS / name))
        assert found is not None
        extrapolated = next(one for one in found.agreements if one.name == "extrapolated")
        assert extrapolated.slope == pytest.approx(1.0, abs=0.05)
        assert extrapolated.identity > 0.95


def test_small_logs_stay_small() -> None:
    size = sum(file.stat().st_size for file in LOGS.rglob("*") if file.is_file())
    assert size < 2e6
