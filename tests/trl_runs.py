"""A TRL training watched, its log, and what TRL itself logged."""

from pathlib import Path
from typing import Any

import entropylens as el
from entropylens_callbacks.transformers import attach

__all__ = ["logged", "series", "trained"]


def trained(trainer: Any, folder: Path, **options: Any) -> el.Run:
    settings = {"preset": "full", "max_overhead": None, **options}
    attach(trainer, folder / "run", **settings)
    trainer.train()
    run = el.open_run(folder / "run")
    assert run.status()[0].faults == {}
    return run


def series(run: el.Run, name: str, module: str = "") -> dict[int, float]:
    """Values by step, without evaluations; there is one a step."""
    rows = run.metrics(name).to_arrow().to_pylist()
    rows = [r for r in rows if r["module"] == module and r["phase"] != "eval"]
    found = {row["step"]: row["value"] for row in rows}
    assert len(found) == len(rows), "one row a step"
    return found


def logged(trainer: Any, name: str) -> dict[int, float]:
    return {e["step"]: e[name] for e in trainer.state.log_history if e.get(name) is not None}
