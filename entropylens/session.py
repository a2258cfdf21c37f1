"""One run being measured: what is due, the way of its numbers to the log, and what that costs."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import torch

from entropylens.budget import Budget
from entropylens.capture.device import DeviceClock
from entropylens.registry import Block, Diagnostic, all_diagnostics
from entropylens.schedule import Schedule
from entropylens.store.writer import RunWriter
from entropylens.transfer import Stamp, Transfer

__all__ = ["Session"]

FLUSH_SECONDS: Final = 1.0
FLUSH_BLOCKS: Final = 512
VITALS_LAG: Final = 16
"""Vitals, which are cheap, keep their intervals until the budget has widened others so far."""


class Session:
    """Measures due diagnostics, moves their rows to the writer, and keeps the budget.

    Args:
        writer: Of the run's log.
        schedules: By diagnostic; those left out are off.
        budget: Charged for all time spent here.
        device: Where the model lives.
        decode: Token id to text for the tokens table.
    """

    def __init__(
        self,
        writer: RunWriter,
        schedules: Mapping[str, Schedule],
        budget: Budget,
        device: torch.device,
        decode: Callable[[int], str] | None,
    ) -> None:
        known = all_diagnostics()
        self.writer = writer
        self.budget = budget
        self.clock = DeviceClock(device)
        self.overhead: float | None = None
        self._schedules = {known[name].name: schedule for name, schedule in schedules.items()}
        self._diagnostics = {name: known[name] for name in schedules}
        self._states = {name: found.initial_state() for name, found in self._diagnostics.items()}
        self._due: dict[str, list[Diagnostic]] = {}
        self._transfer = Transfer(self._deliver)
        self._measured: list[tuple[str, Block]] = []
        self._flushed = perf_counter()
        self._decode = decode
        self._texts: dict[int, str | None] = {}
        self._steps_done = 0
        self._closed = False
        atexit.register(self._drain)
        writer.before_exit = self._drain

    @property
    def run_dir(self) -> Path:
        """The directory really written to."""
        return self.writer.run_dir

    def begin_step(self, number: int) -> None:
        """Decide which diagnostics are due in step ``number``."""
        self._due = {}
        for name, schedule in self._schedules.items():
            found, widening = self._diagnostics[name], self.budget.widening
            if found.reads == "step":
                widening = max(widening // VITALS_LAG, 1)
            if schedule.is_due(number, widening):
                self._due.setdefault(found.reads, []).append(found)

    def wants(self, reads: str) -> bool:
        """Whether a diagnostic that reads this is due in the step in progress."""
        return reads in self._due

    def aside(self, where: str, work: Callable[[], None], *, raises: bool = False) -> None:
        """Run ``work`` so that neither its errors nor its time escape unseen.

        Args:
            where: Names the fault's cause.
            work: Runs without gradients.
            raises: Let `TypeError` and `ValueError` out while no step has ended: setup errors.
        """
        started = perf_counter()
        try:
            with torch.no_grad():
                work()
        except Exception as error:
            if raises and self._steps_done == 0 and isinstance(error, TypeError | ValueError):
                raise
            self.writer.fault(where, error)
        finally:
            self.budget.spend(perf_counter() - started)

    def measure(self, reads: str, take_reading: Callable[[], Any]) -> None:
        """Measure what is due on a reading; what raises is left out and does not stop the rest.

        The rows bear the number of the step in progress, which `end_step` tells.
        """
        due = self._due.get(reads, [])
        self.clock.start()
        try:
            reading = take_reading() if due else None
        except Exception as error:
            self.writer.fault(f"reading {reads}", error)
            due = []
        for found in due:
            try:
                blocks, self._states[found.name] = found.measure(reading, self._states[found.name])
            except Exception as error:
                self.writer.fault(f"diagnostic {found.name}", error)
                continue
            self._measured += [(found.name, block) for block in blocks]
        self.clock.stop()

    def add(self, block: Block, stamp: Stamp) -> None:
        """Hand on a block that no diagnostic made."""
        self._transfer.add(block, stamp)

    def end_step(self, stamp: Stamp, slots: int) -> None:
        """Close a step: queue its rows, review the budget and flush when it is time.

        Args:
            stamp: Of all rows measured in the step.
            slots: Token positions of the step, known from shapes.
        """
        self.writer.step = number = stamp.step
        measured, self._measured = self._measured, []
        for name, block in measured:
            try:
                self._transfer.add(block, stamp)
            except TypeError as error:
                self.writer.fault(f"diagnostic {name}", error)
        self.budget.spend(self.clock.collect())
        review = self.budget.end_step(self.writer.cpu_seconds, slots)
        if review is not None:
            self.overhead = review.fraction
            if review.change is not None:
                self.writer.event(
                    "budget",
                    f"overhead was {review.fraction:.1%} of wall time: {review.change}",
                    step=number,
                    evidence={
                        "fraction": review.fraction,
                        "max_overhead": self.budget.max_overhead,
                        "rows": self.budget.rows,
                        "widening": self.budget.widening,
                    },
                )
        now = perf_counter()
        if now - self._flushed >= FLUSH_SECONDS or len(self._transfer) >= FLUSH_BLOCKS:
            self._flushed = now
            try:
                self._transfer.flush()
            except Exception as error:
                self.writer.fault("transfer", error)

    def count_step(self) -> None:
        """A step is over: from now on nothing is a setup error."""
        self._steps_done += 1

    def close(self, state: str, reason: str) -> bool:
        """Write everything and seal the log.

        Returns:
            Whether this call did it; a second call does nothing.
        """
        if self._closed:
            return False
        self._closed = True
        atexit.unregister(self._drain)
        self._drain()
        self.writer.close(state, reason)
        return True

    def _drain(self) -> None:
        self.aside("transfer", lambda: self._transfer.flush(wait=True))

    def _deliver(self, table: str, columns: dict[str, Any]) -> None:
        if table == "tokens" and self._decode is not None:
            columns["text"] = [self._text(int(token)) for token in columns["token_id"]]
        self.writer.write(table, columns)

    def _text(self, token: int) -> str | None:
        if token not in self._texts and self._decode is not None:
            try:
                self._texts[token] = self._decode(token)
            except Exception as error:
                self._texts[token] = None
                self.writer.fault("decode", error)
        return self._texts.get(token)
