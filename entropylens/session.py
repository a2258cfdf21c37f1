"""One run being measured: what is due, the way of its numbers to the log, and what that costs."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import torch

from entropylens.budget import Budget
from entropylens.capture.device import DeviceClock
from entropylens.elsewhere import Elsewhere, Measured
from entropylens.following import Followers
from entropylens.registry import Block, Diagnostic, all_diagnostics
from entropylens.schedule import Schedule
from entropylens.store.writer import RunWriter
from entropylens.transfer import Stamp, Transfer

__all__ = ["Session"]

FLUSH_SECONDS: Final = 1.0
FLUSH_BLOCKS: Final = 512
CLOSE_SECONDS: Final = 60.0
"""How long `close` and `flush` wait for readings that are measured elsewhere."""
EXIT_SECONDS: Final = 10.0
"""How long they are waited for where the process is told to end, or ends without `close`."""
LOOK_SECONDS: Final = 0.1
"""Longest time without a look at the clock, where nothing is due."""
UNTIMED_SECONDS: Final = 4e-6
"""What every step costs beyond what we time within: being called at all, by the loop and by hooks,
with caches that the training has filled. Timed from outside on a step of a millisecond."""
CONTROL: Final = "control"
"""Stands among what is due where a controller sees every step."""
_NEVER: Final = 1 << 62
_ALWAYS_READ: Final = frozenset(("tokens", "gradients", "update", "step"))
"""Readings of any training; the others make nothing due before somebody expects them."""
_COMES_RARELY: Final = frozenset(("rollout",))
"""Readings that not every step has: due at the first that comes an interval after the last."""


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
        self.due: dict[str, list[Diagnostic]] = {}
        """Diagnostics of the step in progress by what they read; what nothing reads is no key."""
        self.wakes_at = 0.0
        """On the clock of `time.perf_counter`: from then on a step in which nothing is due must be
        ended all the same, because rows wait to be flushed or the cost to be reviewed."""
        self.looks_at_every_step = False
        """Whether every step is to be seen though no diagnostic is due: a controller asks."""
        self.followers = Followers() if writer.rank == 0 else None
        """Laws and forecasts of the numbers delivered here; of rank 0's alone."""
        self._schedules = {known[name].name: schedule for name, schedule in schedules.items()}
        self._diagnostics = {name: known[name] for name in schedules}
        self._states = {name: found.initial_state() for name, found in self._diagnostics.items()}
        self._elsewhere = Elsewhere(self._states)
        self._is_host = device.type == "cpu"
        self._decided, self._next_due, self._unlooked = -1, -1, 0
        self._expected = set(_ALWAYS_READ)
        self._measured_at: dict[str, int] = {}
        """Step at which a diagnostic of what comes rarely was measured last."""
        self._transfer = Transfer(self._deliver)
        self._measured: list[tuple[str, Block, str | None]] = []
        self._flushed = perf_counter()
        self._decode = decode
        self._texts: dict[int, str | None] = {}
        self._steps_done = 0
        self._is_aside = False
        self._closed = False
        self._pid = os.getpid()
        self._forwarded: Sequence[str] = ()
        self._latest: dict[str, float] = {}
        atexit.register(self._leave)
        writer.before_exit = self._leave

    @property
    def run_dir(self) -> Path:
        """The directory really written to."""
        return self.writer.run_dir

    # -- what is due -------------------------------------------------------------------------

    def begin_step(self, number: int) -> None:
        """Decide which diagnostics are due in step ``number``."""
        if self._decided < number < self._next_due:
            if self.due:
                self.due = self._nothing()
            return
        self._decided, self.due = number, self._nothing()
        following = []
        for name, schedule in self._schedules.items():
            found, budget = self._diagnostics[name], self.budget
            if found.reads not in self._expected:
                continue
            widening = budget.vitals_widening if found.reads == "step" else budget.widening
            if found.reads in _COMES_RARELY:
                since = number - self._measured_at.get(name, -_NEVER)
                is_due, later = since >= schedule.interval(widening), number + 1
            else:
                is_due = schedule.is_due(number, widening)
                later = schedule.next_due(number, widening) or _NEVER
            if is_due:
                self.due.setdefault(found.reads, []).append(found)
            following.append(later)
        self._next_due = min(following, default=_NEVER)

    def _nothing(self) -> dict[str, list[Diagnostic]]:
        return {CONTROL: []} if self.looks_at_every_step else {}

    def expect(self, number: int, *reads: str) -> None:
        """Have diagnostics of these readings be due, from step ``number`` on: they will come."""
        if not self._expected.issuperset(reads):
            self._expected.update(reads)
            self._decided = self._next_due = -1
            if number:
                self.begin_step(number)

    def pass_step(self, number: int, began: float, seconds: float) -> int:
        """Close a step in which nothing was due, and that ended before `wakes_at`.

        Args:
            number: Of the step.
            began: When, on the clock of `time.perf_counter`, closing it began.
            seconds: Since the step before it that was closed here.

        Returns:
            How many of the steps after it need not be closed at all: nothing is due in them, and
            all together take no longer than a look at the clock can wait. Before a step in which
            something is due one is closed, for that step's time begins at its end.
        """
        passed = self._unlooked + 1
        self._unlooked = 0
        self._steps_done += passed
        self.writer.step = number
        self.budget.pass_steps(passed)
        if number + 1 >= self._next_due or number + 1 <= self._decided:
            self.begin_step(number + 1)
        else:
            ahead = self._next_due - number - 2
            self._unlooked = max(min(ahead, int(LOOK_SECONDS * passed / max(seconds, 1e-9))), 0)
        self.budget.spend(perf_counter() - began + passed * UNTIMED_SECONDS)
        return self._unlooked

    # -- guarded work ------------------------------------------------------------------------

    def aside(self, where: str, work: Callable[[], Any], *, raises: bool = False) -> None:
        """Run ``work`` so that neither its errors nor its time escape unseen.

        Args:
            where: Names the fault's cause.
            work: Runs without gradients.
            raises: Let `TypeError` and `ValueError` out while no step has ended: setup errors.
        """
        started = perf_counter()
        is_outermost, self._is_aside = not self._is_aside, True
        try:
            with torch.no_grad():
                work()
        except Exception as error:
            if raises and self._steps_done == 0 and isinstance(error, TypeError | ValueError):
                raise
            self.writer.fault(where, error)
        finally:
            if is_outermost:
                self._is_aside = False
                self.budget.spend(perf_counter() - started)

    def measure(
        self, reads: str, take_reading: Callable[[], Any], phase: str | None = None
    ) -> None:
        """Measure what is due on a reading; what raises is left out and does not stop the rest.

        The rows bear the number of the step in progress, which `end_step` tells, and its phase
        unless one is given.
        """
        due = self.due.get(reads)
        if not due:
            return
        self.clock.start()
        try:
            reading = take_reading()
        except Exception as error:
            self.writer.fault(f"reading {reads}", error)
            due = []
        for found in due:
            if reads in _COMES_RARELY:
                self._measured_at[found.name] = self._decided
            try:
                blocks, self._states[found.name] = found.measure(reading, self._states[found.name])
            except Exception as error:
                self.writer.fault(f"diagnostic {found.name}", error)
                continue
            self._measured += [(found.name, block, phase) for block in blocks]
        self.clock.stop()

    @property
    def is_host(self) -> bool:
        """Whether the model lives where `decompose` measures, which then does so at once."""
        return self._is_host

    @property
    def can_decompose(self) -> bool:
        """Whether a reading for `decompose` would be measured soon."""
        return not self._elsewhere.is_full

    def decompose(
        self,
        reads: str,
        tensors: Any,
        reading: Callable[[Any], Any],
        stamp: Stamp,
        took: Callable[[float], None],
    ) -> None:
        """Measure what is due on a reading whose diagnostics decompose matrices.

        On a CPU at once; what lives on an accelerator is brought to the host and measured there
        beside the training, and its rows come later, with this stamp.

        Args:
            reads: What it is.
            tensors: Of the reading, in lists and dicts.
            reading: Makes the reading of them.
            stamp: Of its rows.
            took: Told, on this thread and in a later step, the seconds that a reading measured
                beside the training took: the budget is not charged with them here.
        """
        if self._is_host:
            self.measure(reads, lambda: reading(tensors))
        elif reads in self.due:
            self._elsewhere.measure(self.due[reads], tensors, reading, stamp, took)

    def _collect(self, found: Iterable[Measured]) -> None:
        for measured in found:
            if measured.seconds is not None:
                measured.took(measured.seconds)
            for where, error in measured.faults:
                self.writer.fault(where, error)
            for name, blocks, state in measured.blocks:
                self._states[name] = state
                for block in blocks:
                    self.add(block, measured.stamp)

    # -- to the log --------------------------------------------------------------------------

    def add(self, block: Block, stamp: Stamp) -> None:
        """Hand on a block that no diagnostic made."""
        self._transfer.add(block, stamp)
        self.wakes_at = min(self.wakes_at, self._flushed + FLUSH_SECONDS)

    def end_step(self, stamp: Stamp, slots: int) -> None:
        """Close a step: queue its rows, review the budget and flush when it is time.

        Args:
            stamp: Of all rows measured in the step.
            slots: Token positions of the step, known from shapes.
        """
        self._steps_done += 1
        self._unlooked = 0
        self.writer.step = stamp.step
        measured, self._measured = self._measured, []
        for name, block, phase in measured:
            try:
                self._transfer.add(block, replace(stamp, phase=phase) if phase else stamp)
            except TypeError as error:
                self.writer.fault(f"diagnostic {name}", error)
        self._collect(self._elsewhere.collect())
        self._review(stamp.step, slots)
        now = perf_counter()
        if now - self._flushed >= FLUSH_SECONDS or len(self._transfer) >= FLUSH_BLOCKS:
            self._flush(now)
        waits = self._transfer.is_empty
        flush_at = float("inf") if waits else self._flushed + FLUSH_SECONDS
        self.wakes_at = min(flush_at, self.budget.next_review)

    def _review(self, step: int, slots: int) -> None:
        self.budget.spend(self.clock.collect() + UNTIMED_SECONDS)
        review = self.budget.end_step(
            self.writer.cpu_seconds,
            slots,
            vitals="step" in self.due,
            others=bool(self.due.keys() - {"step", CONTROL}),
        )
        if review is None:
            return
        self.overhead = review.fraction
        if review.change is None:
            return
        self._next_due = -1
        self.writer.event(
            "budget",
            f"overhead was {review.fraction:.1%} of wall time: {review.change}",
            step=step,
            evidence={
                "fraction": review.fraction,
                "max_overhead": self.budget.max_overhead,
                "rows": self.budget.rows,
                "widening": self.budget.widening,
                "vitals_widening": self.budget.vitals_widening,
            },
        )

    def _flush(self, now: float) -> None:
        self._flushed = now
        try:
            self._transfer.flush()
        except Exception as error:
            self.writer.fault("transfer", error)

    def _deliver(self, table: str, columns: dict[str, Any]) -> None:
        if table == "tokens" and self._decode is not None:
            columns["text"] = [self._text(int(token)) for token in columns["token_id"]]
        if table == "metrics" and self._forwarded:
            self._remember(columns)
        self.writer.write(table, columns)
        if table == "metrics" and self.followers is not None:
            self._follow(self.followers, columns)

    def _follow(self, followers: Followers, columns: Mapping[str, Any]) -> None:
        try:
            found = followers.follow(columns)
        except Exception as error:
            self.writer.fault("following", error)
            return
        if found.metrics:
            names, values = list(found.metrics), list(found.metrics.values())
            rows = {"name": names, "value": values, "module": "", "phase": "train"}
            if self._forwarded:
                self._remember(rows)
            self.writer.write("metrics", {**rows, "step": found.step})
        for event in found.events:
            self.writer.event(**event)

    def _text(self, token: int) -> str | None:
        if token not in self._texts and self._decode is not None:
            try:
                self._texts[token] = self._decode(token)
            except Exception as error:
                self._texts[token] = None
                self.writer.fault("decode", error)
        return self._texts.get(token)

    # -- to other loggers --------------------------------------------------------------------

    def forward(self, patterns: Sequence[str]) -> None:
        """Keep the newest value of these metrics for `take_latest`; ``*`` is any text."""
        self._forwarded = tuple(patterns)

    def take_latest(self) -> dict[str, float]:
        """Newest values that reached the host since the last call, without waiting for more."""
        self._flush(perf_counter())
        taken, self._latest = self._latest, {}
        return taken

    def _remember(self, columns: Mapping[str, Any]) -> None:
        count = len(columns["name"])
        modules, phases = (
            [columns[name]] * count if isinstance(columns[name], str) else columns[name]
            for name in ("module", "phase")
        )
        rows = zip(columns["name"], modules, phases, columns["value"], strict=True)
        for name, module, phase, value in rows:
            if module or phase != "train" or name.startswith(("framework/", "user/")):
                continue
            if any(fnmatchcase(name, pattern) for pattern in self._forwarded):
                self._latest[name] = float(value)

    # -- state and end -----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with: the diagnostics' memory and the budget's settings."""
        return {
            "diagnostics": {name: s for name, s in self._states.items() if s is not None},
            "rows": self.budget.rows,
            "widening": self.budget.widening,
            "vitals_widening": self.budget.vitals_widening,
        }

    def forget(self, reads: str) -> None:
        """Have diagnostics of a reading begin anew: what they remember is of something else."""
        for name, found in self._diagnostics.items():
            if found.reads == reads:
                self._states[name] = found.initial_state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state_dict` gave; diagnostics that are off now are left out."""
        known = state.get("diagnostics", {})
        self._states.update({name: known[name] for name in self._states if name in known})
        self.budget.resume(
            state.get("rows"), state.get("widening", 1), state.get("vitals_widening", 1)
        )
        self._next_due = -1

    def flush(self) -> None:
        """Bring everything measured so far to files, waiting for device and disk."""
        self._drain(CLOSE_SECONDS)
        self.writer.flush()

    def close(self, state: str, reason: str) -> bool:
        """Write everything and seal the log.

        Returns:
            Whether this call did it; a second call does nothing.
        """
        if self._closed:
            return False
        self._closed = True
        atexit.unregister(self._leave)
        self._drain(CLOSE_SECONDS)
        self.writer.close(state, reason)
        return True

    def _leave(self) -> None:
        self._drain(EXIT_SECONDS)

    def _drain(self, seconds: float) -> None:
        if os.getpid() != self._pid:  # A fork has the rows that wait, but not the threads.
            return
        self.aside("elsewhere", lambda: self._collect(self._elsewhere.finish(seconds)))
        self.aside("transfer", lambda: self._transfer.flush(wait=True))
