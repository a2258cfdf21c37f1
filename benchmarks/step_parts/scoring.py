"""Cells to figures: each run against its twin, the same seed and policy without the fault."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any, Final

import numpy as np

from benchmarks.step_parts.guards import DEFAULT
from benchmarks.step_parts.training import TWIN

__all__ = ["Scored", "report", "score", "summarise"]

BAND: Final = (2.0, 4.0)
"""Points, or standard deviations of the twins over seeds: the larger is the band."""
SPIKE: Final = 10.0
"""Points that a run may lose on the way."""
STILL: Final = 0.01
"""A step shorter than this share of the twin's median step has not been made."""
OTHER_DATA: Final = "other_data_first"
"""The healthy course whose data change on the way."""

Cell = Mapping[str, Any]


@dataclass(frozen=True)
class Scored:
    """One run with a fault, in points of accuracy below its twin.

    Args:
        policy, program, optimiser, seed, fault: Which.
        final: At the end, on all test samples.
        unguarded: The same, below the twin of the same seed that no policy was on; None where that
            has not been trained.
        spike: The largest at any moment on the way.
        band: That the final one must not exceed.
        applied: Share of the steps up to the last moment on the way that were made.
        length: The median length of these steps, relative to the twin's; None where that is 0.
        progress: Nats of held-out loss gained from the fault to the end. Over the faulted steps
            alone it is within its noise even for twins.
        twin_progress: The twin's.
    """

    policy: str
    program: str
    optimiser: str
    seed: int
    fault: str
    final: float
    unguarded: float | None
    spike: float
    band: float
    applied: float
    length: float | None
    progress: float
    twin_progress: float

    @property
    def is_kept(self) -> bool:
        """Whether it ended within the band, and lost no more on the way than it may."""
        return self.final <= self.band and self.spike <= SPIKE


def score(cells: Sequence[Cell]) -> list[Scored]:
    """Every run with a fault against its twin.

    Args:
        cells: What `training.run_cell` gave.
    """
    twins: dict[tuple[str, ...], list[float]] = defaultdict(list)
    bare: dict[tuple[str, ...], float] = {}
    for cell in cells:
        final = _final(cell["runs"][TWIN])
        twins[_group(cell)].append(final)
        if cell["policy"] == "none":
            bare[cell["program"], cell["optimiser"], cell["seed"]] = final
    return [
        _score(
            cell,
            name,
            _band(twins[_group(cell)]),
            bare.get((cell["program"], cell["optimiser"], cell["seed"])),
        )
        for cell in cells
        for name in cell["runs"]
        if name != TWIN
    ]


def _score(cell: Cell, fault: str, band: float, bare: float | None) -> Scored:
    run, twin = cell["runs"][fault], cell["runs"][TWIN]
    final = _final(run)
    typical, usual = _median(twin["updates"]), _median(run["updates"])
    made = [length is None or length > STILL * typical for length in run["updates"]]
    return Scored(
        policy=cell["policy"],
        program=cell["program"],
        optimiser=cell["optimiser"],
        seed=cell["seed"],
        fault=fault,
        final=_final(twin) - final,
        unguarded=None if bare is None else bare - final,
        spike=max(
            twin["moments"][at]["accuracy"] - seen["accuracy"]
            for at, seen in run["moments"].items()
        ),
        band=band,
        applied=float(np.mean(made)),
        length=_ratio(usual, typical),
        progress=_progress(cell, run),
        twin_progress=_progress(cell, twin),
    )


def _median(lengths: Iterable[float | None]) -> float:
    return float(np.median([inf if length is None else length for length in lengths]))


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None


def _progress(cell: Cell, run: Mapping[str, Any]) -> float:
    """Losses above twice the first count as that: what has diverged would outweigh all others."""
    before, after = cell["before"]["loss"], run["final_part"]["loss"]
    if before is None:
        return 0.0
    return before - min(inf if after is None else after, 2 * before)


def _final(run: Mapping[str, Any]) -> float:
    return float(run["final"]["accuracy"])


def _group(cell: Cell) -> tuple[str, str, str]:
    return cell["program"], cell["optimiser"], cell["policy"]


def _band(finals: Sequence[float]) -> float:
    points, deviations = BAND
    return max(points, deviations * float(np.std(finals, ddof=1)) if len(finals) > 1 else 0.0)


def summarise(runs: Sequence[Scored]) -> dict[str, Any]:
    """What some runs come to together.

    Returns:
        ``runs``; worst and 95 % quantile of the drops; shares of runs within the band at the end,
        within `SPIKE` on the way, and both; share of steps made, its mean and least; their
        length, and progress to the end, relative to the twins'.
    """
    if not runs:
        return {"runs": 0}
    final, spike = (np.array([getattr(run, name) for run in runs]) for name in ("final", "spike"))
    unguarded = [run.unguarded for run in runs if run.unguarded is not None]
    worst = max(runs, key=lambda run: run.final)
    worst_spike = max(runs, key=lambda run: run.spike)
    return {
        "runs": len(runs),
        "worst_final_drop": float(final.max()),
        "worst_final_drop_at": _where(worst),
        "final_drop_95": float(np.quantile(final, 0.95)),
        "worst_final_drop_from_unguarded": max(unguarded, default=None),
        "worst_spike_drop": float(spike.max()),
        "worst_spike_drop_at": _where(worst_spike),
        "spike_drop_95": float(np.quantile(spike, 0.95)),
        "share_within_band": float(np.mean([run.final <= run.band for run in runs])),
        "share_within_spike": float((spike <= SPIKE).mean()),
        "share_kept": float(np.mean([run.is_kept for run in runs])),
        "updates_applied_share": float(np.mean([run.applied for run in runs])),
        "least_updates_applied_share": float(min(run.applied for run in runs)),
        "median_update_length": _finite(_median(run.length for run in runs)),
        "progress_share": _ratio(
            sum(run.progress for run in runs), sum(run.twin_progress for run in runs)
        ),
    }


def _where(run: Scored) -> str:
    return f"{run.program} {run.optimiser} seed {run.seed}, {run.fault}"


def _ratio(over: float, under: float) -> float | None:
    return over / under if under > 0 else None


def healthy(cells: Iterable[Cell]) -> dict[str, Any]:
    """Looks and interventions where there was no fault.

    Where the data become others nothing is wrong, but nothing is as it was: that course is told
    apart, and by course.

    Returns:
        ``healthy_steps``, and per 10,000 of them triggers (steps made smaller or dropped) and
        looks; ``other_data_triggers_per_10k_steps``; triggers by course, all of them;
        ``worst_healthy_triggers_at``, the pair and course with the most.
    """
    steps: dict[str, int] = defaultdict(int)
    triggers: dict[str, int] = defaultdict(int)
    places: dict[str, int] = defaultdict(int)
    looks = 0
    for cell in cells:
        for course, seen in cell["healthy"].items():
            steps[course] += seen["steps"]
            triggers[course] += seen["interventions"]
            if course != OTHER_DATA:
                places[f"{cell['program']} {cell['optimiser']}, {course}"] += seen["interventions"]
                looks += seen["looks"]
    quiet = [course for course in steps if course != OTHER_DATA]
    whole = sum(steps[course] for course in quiet)
    found = sum(triggers[course] for course in quiet)
    most = max(places, key=places.__getitem__, default="")
    return {
        "healthy_steps": whole,
        "healthy_triggers_per_10k_steps": _ratio(1e4 * found, whole),
        "other_data_triggers_per_10k_steps": _ratio(1e4 * triggers[OTHER_DATA], steps[OTHER_DATA]),
        "healthy_looks_per_10k_steps": _ratio(1e4 * looks, whole),
        "healthy_triggers_by_course": {
            course: _ratio(1e4 * triggers[course], steps[course]) for course in steps
        },
        "worst_healthy_triggers_at": most if places and places[most] else None,
    }


def healthy_cost(cells: Sequence[Cell], policy: str) -> dict[str, Any]:
    """What a policy costs where there is no fault: points of the twin below that of no policy.

    Returns:
        ``healthy_cost``, the mean over pairs of model and optimiser and over seeds, and
        ``worst_healthy_cost``, that of the worst pair. None where "none" has not been trained.
    """
    bare = {_key(cell): _final(cell["runs"][TWIN]) for cell in cells if cell["policy"] == "none"}
    costs: dict[tuple[str, str], list[float]] = defaultdict(list)
    for cell in cells:
        if cell["policy"] == policy and _key(cell) in bare:
            lost = bare[_key(cell)] - _final(cell["runs"][TWIN])
            costs[cell["program"], cell["optimiser"]].append(lost)
    if not costs:
        return {"healthy_cost": None, "worst_healthy_cost": None}
    means = [float(np.mean(lost)) for lost in costs.values()]
    return {"healthy_cost": float(np.mean(means)), "worst_healthy_cost": max(means)}


def _key(cell: Cell) -> tuple[str, str, int]:
    return cell["program"], cell["optimiser"], cell["seed"]


def report(cells: Sequence[Cell], default: str = DEFAULT) -> dict[str, Any]:
    """All figures.

    Args:
        cells: What `training.run_cell` gave.
        default: The policy whose figures are at the top.

    Returns:
        The default's, as `summarise`, `healthy` and `healthy_cost` have them; the same
        ``by_policy``; the default's ``by_fault``, ``by_program`` and ``by_optimiser``.
    """
    runs = score(cells)
    policies = [*dict.fromkeys(cell["policy"] for cell in cells)]

    def of(policy: str) -> dict[str, Any]:
        mine = [cell for cell in cells if cell["policy"] == policy]
        return {
            **summarise([run for run in runs if run.policy == policy]),
            **healthy(mine),
            **healthy_cost(cells, policy),
            "cells": len(mine),
            "seconds_per_run": _seconds(mine),
        }

    def by(what: Callable[[Scored], str]) -> dict[str, Any]:
        parts: dict[str, list[Scored]] = defaultdict(list)
        for run in runs:
            if run.policy == default:
                parts[what(run)].append(run)
        return {name: summarise(part) for name, part in parts.items()}

    return {
        "default": default,
        **of(default),
        "by_policy": {policy: of(policy) for policy in policies},
        "by_fault": by(lambda run: run.fault),
        "by_program": by(lambda run: run.program),
        "by_optimiser": by(lambda run: run.optimiser),
    }


def _seconds(cells: Iterable[Cell]) -> float | None:
    found = [run["seconds"] for cell in cells for run in cell["runs"].values()]
    return float(np.mean(found)) if found else None
