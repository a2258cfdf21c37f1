"""Does a bounded step survive what goes wrong in training, and is it idle while nothing does?

Six models on Fashion-MNIST and on text, each with four optimisers at the best learning rate of a
sweep, are trained for 200 steps and then meet a fault: a learning rate ten to ten thousand times as
large for 20 steps, a batch of garbage once or five times, gradients times 1,000, another beta2 or
eps, an overflow. Each run is judged against its twin, the same seed and policy without the fault:
by how many points of accuracy it is below at the end (it should be within the twins' band, 2 points
or 4 standard deviations over seeds) and at the worst moment of the first 20 steps (at most 10),
and by how many steps it made. Healthy trainings count looks and interventions per 10,000 steps.

    python -m benchmarks.step_faults [--only NAME ...] [--seeds N] [--policies NAME ...] [--jobs N]
    python -m benchmarks.step_faults --report
    python -m benchmarks.step_faults --sweep

A cell is a model, an optimiser, a policy and a seed; it is kept in ``benchmarks/.cache`` under what
it was made by, and made anew where that has changed. Figures of all cells that are there go to
``benchmarks/results/step_faults.json``. The whole takes hours: it can be stopped and goes on.
"""

import argparse
import ast
import hashlib
import inspect
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

import entropylens.control
from benchmarks.step_parts import faults, programs, training
from benchmarks.step_parts.faults import COURSES
from benchmarks.step_parts.guards import BASELINES, DEFAULT, GUARDS, PRODUCT, Product, concerns
from benchmarks.step_parts.programs import FOLDER, OPTIMISERS, PROGRAMS, RATES, SWEPT
from benchmarks.step_parts.scoring import report
from benchmarks.step_parts.training import TWIN, Plan, run_cell
from entropylens.control import StepBound
from entropylens.errors import EntropyLensError

SEEDS: Final = 5
HEALTHY_SEEDS: Final = 2
"""Seeds with the courses of `COURSES`; the default policy has them at every seed."""
CACHE: Final = Path("benchmarks/.cache/step_faults")
RESULTS: Final = Path("benchmarks/results/step_faults.json")


@dataclass(frozen=True, order=True)
class Wanted:
    """A cell."""

    seed: int
    policy: str
    program: str
    optimiser: str

    @property
    def path(self) -> Path:
        """Where it is kept."""
        return CACHE / f"{self.policy}-{self.program}-{self.optimiser}-{self.seed}.json"

    @property
    def has_courses(self) -> bool:
        """Whether the healthy courses are trained, too."""
        return self.seed < HEALTHY_SEEDS or self.policy == DEFAULT


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--only", nargs="+", choices=(*PROGRAMS, *OPTIMISERS), help="these models, or optimisers"
    )
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"so many, by default {SEEDS}")
    parser.add_argument("--policies", nargs="+", choices=GUARDS, default=[*GUARDS])
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--report", action="store_true", help="figures of what is there")
    parser.add_argument("--sweep", action="store_true", help="find the learning rates")
    parser.add_argument("--stale", action="store_true", help="count cells of changed code, too")
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST's .gz files")
    asked = parser.parse_args()
    if asked.data is not None:
        os.environ[FOLDER] = str(asked.data)
    console, which = Console(width=None if sys.stdout.isatty() else 120), names(asked.only)
    failed = 0
    try:
        if asked.sweep:
            console.print(sweep(which, asked.jobs))
            return 0
        if not asked.report:
            cells = every(which, asked.policies, asked.seeds)
            failed = make([c for c in cells if read(c, stale=asked.stale) is None], asked.jobs)
    except EntropyLensError as error:
        console.print(str(error), soft_wrap=True)
        return 1
    found = figures(stale=asked.stale)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    for table in tables(found):
        console.print(table)
    return 1 if failed else 0


def names(only: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Models and optimisers that are asked for; of a kind of which none is named, all."""
    chosen = only or ()
    return (
        [name for name in PROGRAMS if name in chosen] or [*PROGRAMS],
        [name for name in OPTIMISERS if name in chosen] or [*OPTIMISERS],
    )


def every(
    which: tuple[Sequence[str], Sequence[str]], policies: Sequence[str], seeds: int
) -> list[Wanted]:
    """All cells, one seed of all policies before the next seed of any."""
    return [
        Wanted(seed, policy, program, optimiser)
        for seed in range(seeds)
        for policy in policies
        for program in which[0]
        for optimiser in which[1]
        if concerns(policy, optimiser)
    ]


# -- cells -------------------------------------------------------------------------------------


def make(wanted: Sequence[Wanted], jobs: int) -> int:
    """Train cells and keep each as soon as it is there; how many failed."""
    for program in {cell.program for cell in wanted}:
        PROGRAMS[program].material()  # what is missing is said before anything is begun
    failed = 0
    bar = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*bar) as progress, processes(jobs) as pool:
        task = progress.add_task("cells", total=len(wanted))
        doing = {pool.submit(keep, cell, made_by(cell.policy)): cell for cell in wanted}
        for done in as_completed(doing):
            if error := done.exception():
                failed += 1
                progress.console.print(f"{doing[done].path.stem} failed: {error!r}")
            progress.advance(task)
    return failed


@contextmanager
def processes(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Processes of one thread each; what has not begun is dropped where this is interrupted."""
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), partial(torch.set_num_threads, 1))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def keep(wanted: Wanted, maker: str) -> None:
    """Train a cell in this process and write it, with the hash of the code from when all began."""
    found = run_cell(
        wanted.program,
        wanted.optimiser,
        wanted.seed,
        wanted.policy,
        courses=COURSES if wanted.has_courses else {},
    )
    wanted.path.parent.mkdir(parents=True, exist_ok=True)
    beside = wanted.path.with_suffix(f".{os.getpid()}")
    beside.write_text(json.dumps({"made_by": maker, **found}))
    beside.replace(wanted.path)


def read(wanted: Wanted, *, stale: bool = False) -> dict[str, Any] | None:
    """A cell that is kept, or None: there is none, or other code made it and that matters."""
    try:
        found = dict(json.loads(wanted.path.read_text()))
    except FileNotFoundError:
        return None
    return found if stale or found["made_by"] == made_by(wanted.policy) else None


@cache
def made_by(policy: str) -> str:
    """A hash of the code that a policy's cells depend on, docstrings and layout apart.

    Of the product that is ``entropylens.control``: what it calls elsewhere is not looked at.
    """
    parts = [torch.__version__, *map(str, sys.version_info[:2])]
    parts += [plain(inspect.getsource(module)) for module in (programs, faults, training)]
    if policy in PRODUCT:
        folder = Path(str(entropylens.control.__file__)).parent
        parts += [plain(path.read_text()) for path in sorted(folder.glob("*.py"))]
        parts += [plain(inspect.getsource(Product)), repr(StepBound(policy=policy, mode="enforce"))]
    else:
        parts += [plain(inspect.getsource(one)) for one in BASELINES[policy].__mro__[:-1]]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def plain(source: str) -> str:
    """Code without its layout, comments and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for name in ("body", "orelse"):
            if isinstance(body := getattr(node, name, None), list):
                setattr(node, name, [one for one in body if not is_docstring(one)])
    return ast.dump(tree)


def is_docstring(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


# -- learning rates ----------------------------------------------------------------------------


def sweep(which: tuple[Sequence[str], Sequence[str]], jobs: int) -> Table:
    """Accuracy at the end of a healthy run, seed 0, at every rate of `SWEPT`."""
    with processes(jobs) as pool:
        found = {
            (program, optimiser): [
                pool.submit(accuracy_at, program, optimiser, rate) for rate in SWEPT[optimiser]
            ]
            for program in which[0]
            for optimiser in which[1]
        }
        table = Table("model", "optimiser", "accuracy by learning rate", "best", "in use")
        for (program, optimiser), asked in found.items():
            by_rate = dict(zip(SWEPT[optimiser], (one.result() for one in asked), strict=True))
            shown = "  ".join(f"{rate:g}: {got:.1f}" for rate, got in by_rate.items())
            best = max(by_rate, key=by_rate.__getitem__)
            table.add_row(program, optimiser, shown, f"{best:g}", f"{RATES[program][optimiser]:g}")
    return table


def accuracy_at(program: str, optimiser: str, rate: float) -> float:
    found = run_cell(program, optimiser, 0, "none", Plan(rate=rate), faults={}, courses={})
    return float(found["runs"][TWIN]["final"]["accuracy"])


# -- figures -----------------------------------------------------------------------------------


def figures(*, stale: bool = False) -> dict[str, Any]:
    """`scoring.report` of all cells that are kept, and what of the whole is not there."""
    wanted = every(names(None), [*GUARDS], SEEDS)
    kept = {one: cell for one in wanted if (cell := read(one, stale=stale)) is not None}
    missing = Counter(one.policy for one in wanted if one not in kept)
    return {
        **report([*kept.values()]),
        "seeds": sorted({one.seed for one in kept}),
        "cells_of": len(wanted),
        "cells_missing": missing.total(),
        "cells_missing_by_policy": dict(missing),
        "rates": {program: dict(rates) for program, rates in RATES.items()},
        "torch": torch.__version__,
    }


DROPS: Final = {
    "worst_final_drop": "end, worst",
    "final_drop_95": "95 %",
    "share_within_band": "in band, %",
    "worst_spike_drop": "way, worst",
    "spike_drop_95": "95 %",
    "share_within_spike": "to 10, %",
    "updates_applied_share": "made, %",
    "progress_share": "gain, %",
}
IDLE: Final = {
    "healthy_triggers_per_10k_steps": "triggers",
    "healthy_looks_per_10k_steps": "looks",
    "other_data_triggers_per_10k_steps": "other data",
    "healthy_cost": "points lost",
    "worst_healthy_cost": "worst",
}


SHARES: Final = ("_share", "_within_band", "_within_spike")


def tables(found: Mapping[str, Any]) -> list[Table]:
    """Of policies, and of the default's faults, models and optimisers.

    Columns: points of accuracy below the twin at the end and on the way, the worst run and the 95 %
    quantile; share of runs within the band and within 10 points; share of the first 20 steps that
    were made; held-out loss gained from the fault to the end, relative to the twins'.
    """
    default = found["default"]
    missing = f"{found['cells_missing']:,} of {found['cells_of']:,} cells are missing"
    shown = [
        table(f"points below the twin; {missing}", found["by_policy"], DROPS),
        table("per 10,000 healthy steps", found["by_policy"], IDLE),
    ]
    for key, what in (("fault", "faults"), ("program", "models"), ("optimiser", "optimisers")):
        shown.append(table(f"{default}: {what}", found[f"by_{key}"], DROPS))
    return [one for one in shown if one.row_count]


def table(title: str, rows: Mapping[str, Any], heads: Mapping[str, str]) -> Table:
    columns = [Column(head, justify="right") for head in ("runs", *heads.values())]
    made = Table(Column("", no_wrap=True), *columns, title=title)
    for name, row in rows.items():
        made.add_row(name, f"{row['runs']:,}", *(told(key, row.get(key)) for key in heads))
    return made


def told(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{100 * value if key.endswith(SHARES) else value:,.1f}"


if __name__ == "__main__":
    sys.exit(main())
