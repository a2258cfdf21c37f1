"""`Visits`: the spectra of a model's weights, a matrix at a time, as often as time allows."""

from __future__ import annotations

from time import perf_counter
from typing import Any, Final

from torch import nn

from entropylens.capture.matrices import Matrix, matrices_of
from entropylens.ration import Ration
from entropylens.registry import MatricesReading, WeightReading
from entropylens.session import Session
from entropylens.transfer import Stamp

__all__ = ["Visits"]

SHARE: Final = 1 / 12
"""Of the limit of overhead, that visits may take."""
MOST_SECONDS: Final = 0.1
"""In one step, after which no other visit begins: where nothing limits the overhead."""
LONGEST_SECONDS: Final = 2.0
"""Of one visit on a CPU, which holds the training up."""
LONGEST_SECONDS_ELSEWHERE: Final = 60.0
"""Of one visit beside a training on an accelerator, which goes on meanwhile."""
_SECONDS: Final = 3e-10
"""Of a visit by m n min(m, n), before any was timed."""
_UNTIMED: Final = 1e7
"""Value of m n min(m, n) up to which a visit's time says little of larger ones."""
_NAMED: Final = 5
_GOLDEN: Final = 0.618034
"""Multiples of it spread over the list however many ranks there are."""


class Visits:
    """Shows diagnostics the matrices of the trained weights in turn.

    In a step in which weights are due as many are visited as `Ration` pays for, and the next time
    those after them; each rank begins elsewhere in the list, so that several see all of it sooner.
    A matrix whose visit would take more than two seconds is left out for good, and an event names
    it; on an accelerator, where a thread beside the training measures, more than a minute.

    Args:
        session: Of the run.
    """

    def __init__(self, session: Session) -> None:
        self.ration = Ration(session.budget, SHARE)
        self._session = session
        self._matrices: list[Matrix] = []
        self._next = 0
        self._rate = _SECONDS
        self._left_out: set[str] = set()

    def ask(self, model: nn.Module, number: int) -> bool:
        """Visit the matrices of a model, if it has any, from step ``number`` on.

        Returns:
            Whether it has.
        """
        found = matrices_of(model, trained=True)
        self._matrices = found.matrices
        writer = self._session.writer
        self._next = int(_GOLDEN * writer.rank * len(self._matrices)) % max(len(self._matrices), 1)
        if found.refused:
            reasons: dict[str, list[str]] = {}
            for name, reason in found.refused.items():
                reasons.setdefault(reason, []).append(name)
            told = "; ".join(f"{_some(names)}: {reason}" for reason, names in reasons.items())
            writer.event("capture", f"no spectrum of {told}", step=number)
        return bool(self._matrices)

    def visit(self, stamp: Stamp) -> None:
        """Visit the matrices whose turn it is, at the end of a step."""
        session = self._session
        if "matrices" in session.due:
            session.measure("matrices", self._all)
        began = perf_counter()
        for _ in range(len(self._matrices) if "weight" in session.due else 0):
            is_late = perf_counter() - began > MOST_SECONDS
            if is_late or not (self.ration.is_open and session.can_decompose):
                return
            matrix = self._matrices[self._next]
            self._next = (self._next + 1) % len(self._matrices)
            if matrix.name in self._left_out:
                continue
            if self._rate * _size(matrix) > self._longest:
                self._leave_out(matrix, stamp)
            else:
                self._show(matrix, stamp)

    def _show(self, matrix: Matrix, stamp: Stamp) -> None:
        began = perf_counter()

        def reading(tensors: Any) -> WeightReading:
            return WeightReading(
                name=matrix.name,
                matrix=tensors[0],
                stored=matrix.stored,
                rank=matrix.rank,
                matrices=count,
            )

        def took(seconds: float) -> None:
            self.ration.owe(seconds)
            self._learn(size, seconds)

        size = _size(matrix)
        whole = [one.name for one in self._matrices if one.rank is None]
        count = len({*whole} - self._left_out)
        self._session.decompose("weight", [matrix.read()], reading, stamp, took)
        seconds = perf_counter() - began
        self.ration.charge(seconds)
        if self._session.is_host:
            self._learn(size, seconds)

    def _learn(self, size: float, seconds: float) -> None:
        if size > _UNTIMED:
            self._rate = seconds / size

    @property
    def _longest(self) -> float:
        return LONGEST_SECONDS if self._session.is_host else LONGEST_SECONDS_ELSEWHERE

    def _leave_out(self, matrix: Matrix, stamp: Stamp) -> None:
        self._left_out.add(matrix.name)
        out, width = matrix.shape
        cost = "hold the training up" if self._session.is_host else "keep a thread busy"
        self._session.writer.event(
            "capture",
            f"no spectrum of {matrix.name}: {out} x {width} would {cost} for "
            f"{self._rate * _size(matrix):.0f} s; `entropylens spectra` shows it of a checkpoint",
            step=stamp.step,
        )

    def _all(self) -> MatricesReading:
        single = [matrix for matrix in self._matrices if len(matrix.parameters) == 1]
        return MatricesReading(matrices={matrix.name: matrix.read() for matrix in single})


def _size(matrix: Matrix) -> float:
    out, width = matrix.shape
    return float(out) * width * min(out, width)


def _some(names: list[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")
