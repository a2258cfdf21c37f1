"""What the terminal shows of a run."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from entropylens.analysis.overview import read_overview, sentences
from entropylens.store.query import select, series, summarise
from entropylens.store.reader import Run

__all__ = ["MAIN_SERIES", "last_loss", "last_step", "summary"]

MAIN_SERIES: Final = (
    "loss/mean",
    "entropy/token/mean",
    "surprisal_gap/mean",
    "gradient/norm/before_clip",
    "learning_rate",
    "throughput/tokens_per_second",
    "overhead/fraction",
)
_MODULES: Final = 3
_EVENTS: Final = 5
_SAMPLES: Final = 4
_PHASES: Final = ("train", "rollout", "eval")
_FLOOR_STEPS: Final = 200
"""Twice the widest interval at which the loss is written."""


def last_step(run: Run) -> int:
    """The last optimiser step that any rank has told of."""
    return max((status.step for status in run.status()), default=0)


def last_loss(run: Run) -> float | None:
    """The last training loss, ranks weighted by their tokens; None if there is none."""
    for first in (last_step(run) - _FLOOR_STEPS, None):
        rows = run.metrics("loss/mean", phases="train", steps=(first, None)).to_arrow()
        if rows.num_rows:
            last = rows.filter(pc.field("step") == pc.max(rows["step"]))
            weights = last["weight"].to_numpy()
            known = bool((weights > 0).all())
            return float(np.average(last["value"].to_numpy(), weights=weights if known else None))
    return None


def summary(run: Run) -> dict[str, Any]:
    """What happened in a run, its state, its main series, worst samples and last events.

    Args:
        run: Finished or not.

    Returns:
        A document for JSON, but for ``values`` of each series, a numpy array.
    """
    overview, statuses = read_overview(run), run.status()
    events = run.events().to_arrow().sort_by("time")
    chosen, drawn = _chosen(summarise(run, MAIN_SERIES).to_pylist()), series(run, MAIN_SERIES)
    for one in chosen:
        one["values"] = _values(drawn, one)
    everything = select(run, "SELECT DISTINCT name, module, phase FROM metrics").num_rows
    faults: dict[str, int] = {}
    for status in statuses:
        for cause, count in status.faults.items():
            faults[cause] = faults.get(cause, 0) + count
    return {
        "name": run.name,
        "path": str(run.path),
        "run_id": run.run_id,
        "state": run.state(),
        "reason": next((status.reason for status in statuses if status.reason), ""),
        "created": run.created,
        "steps": max([last_step(run), *(one["last_step"] for one in chosen)]),
        "attempts": run.attempts,
        "ranks": [{"rank": s.rank, "state": s.seen_state(), "step": s.step} for s in statuses],
        "faults": faults,
        "lost_rows": sum(status.lost_rows for status in statuses),
        "happened": sentences(overview),
        "series": chosen,
        "more_series": everything - len(chosen),
        "samples": overview.samples[:_SAMPLES],
        "event_count": events.num_rows,
        "events": events.slice(max(events.num_rows - _EVENTS, 0)).to_pylist(),
    }


def _chosen(summaries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each main series the training phase, where there is one, and a few modules."""
    chosen = []
    for name in MAIN_SERIES:
        rows = [row for row in summaries if row["name"] == name]
        phases = {row["phase"] for row in rows}
        phase = next((phase for phase in _PHASES if phase in phases), None)
        chosen += [row for row in rows if row["phase"] == phase][:_MODULES]
    return chosen


def _values(drawn: pa.Table, one: dict[str, Any]) -> np.ndarray:
    for column in ("name", "module", "phase"):
        drawn = drawn.filter(pc.field(column) == one[column])
    return drawn["value"].to_numpy()
