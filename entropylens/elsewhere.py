"""Measuring on the host, beside the training, what would hold up an accelerator."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from time import perf_counter, sleep
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from entropylens.registry import Block, Diagnostic
from entropylens.transfer import Stamp, to_host

__all__ = ["Elsewhere", "Measured"]

MOST_WAITING: Final = 4
"""Readings whose numbers are not there yet: one more would be of no use, and fill memory."""
_POLL_SECONDS: Final = 0.001


@dataclass(frozen=True)
class Measured:
    """What became of one reading."""

    stamp: Stamp
    took: Callable[[float], None]
    """As `Elsewhere.measure` was given it."""
    blocks: list[tuple[str, list[Block], Any]] = field(default_factory=list)
    """By diagnostic: its rows, on the host, and its new state."""
    faults: list[tuple[str, Exception]] = field(default_factory=list)
    seconds: float | None = None
    """Wall time of the work, which is at least what it used of one core; further cores, on which
    torch spreads it, are not counted. None where it was left out."""


class Elsewhere:
    """Brings readings to the host without blocking and measures them in a thread of its own.

    Decompositions of matrices wait for the device and let it wait for them. Readings are measured
    one after the other, in order. A forked process measures none.

    Args:
        states: Of the diagnostics; each is given what was told of it last.
    """

    def __init__(self, states: Mapping[str, Any]) -> None:
        self._states = states
        self._waiting: deque[_Job] = deque()
        self._running: _Job | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._pid = os.getpid()

    @property
    def is_full(self) -> bool:
        """Whether another reading would have to wait long."""
        return len(self._waiting) >= MOST_WAITING

    def measure(
        self,
        diagnostics: Sequence[Diagnostic],
        tensors: Any,
        reading: Callable[[Any], Any],
        stamp: Stamp,
        took: Callable[[float], None],
    ) -> None:
        """Measure a reading when it has arrived.

        Args:
            diagnostics: What to measure.
            tensors: Of the reading, in lists and dicts; they may be written to afterwards.
            reading: Makes the reading of them, on the host and in the other thread.
            stamp: Of its rows.
            took: To be told the seconds that it took.
        """
        flat, form = tree_flatten(tensors)
        copies = [_copy(one) if isinstance(one, Tensor) else (one, None) for one in flat]
        there = tree_unflatten([copy for copy, _ in copies], form)
        events = [event for _, event in copies if event is not None]
        self._waiting.append(_Job(list(diagnostics), there, reading, stamp, took, events))

    def collect(self) -> Iterator[Measured]:
        """What has been measured since the last call; goes on with what has arrived."""
        while self._is_here and (self._running is not None or self._waiting):
            if self._running is None:
                if not self._waiting[0].has_arrived:
                    return
                self._start(self._waiting.popleft())
            running = self._running
            if running is None or not running.done.done():
                return
            self._running = None
            yield running.done.result()

    def finish(self, seconds: float) -> Iterator[Measured]:
        """All that has not been collected: at the end of a run, never during a step.

        What waits is measured in this thread, for a process that ends starts no others. What has
        not begun after so many seconds is left out, with a fault that says so, and what the other
        thread is at is not waited for any longer. Python waits for that one when it ends: a thread
        that it kills within torch takes the process down with SIGABRT.
        """
        if not self._is_here:
            return
        until, late = perf_counter() + seconds, f"not measured within {seconds:g} s"
        if (running := self._running) is not None:
            wait([running.done], seconds)
            if self._running is running:  # The handler of a signal may have collected it.
                self._running = None
                yield running.done.result() if running.done.done() else running.left_out(late)
        while self._waiting:
            job = self._waiting.popleft()
            yield job.run(self._of(job)) if job.arrives(until) else job.left_out(late)
        # Not `shutdown`, whose lock the code that a signal interrupted may hold.
        self._thread = None

    @property
    def _is_here(self) -> bool:
        return os.getpid() == self._pid

    def _of(self, job: _Job) -> dict[str, Any]:
        return {found.name: self._states[found.name] for found in job.diagnostics}

    def _start(self, job: _Job) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="entropylens-elsewhere")
        self._thread.submit(job.do, self._of(job))
        self._running = job


def _copy(tensor: Tensor) -> tuple[Tensor, torch.Event | None]:
    copy, event = to_host(tensor)
    return copy.detach().clone() if event is None else copy, event


@dataclass(frozen=True)
class _Job:
    diagnostics: list[Diagnostic]
    tensors: Any
    reading: Callable[[Any], Any]
    stamp: Stamp
    took: Callable[[float], None]
    events: list[torch.Event]
    done: Future[Measured] = field(default_factory=Future)

    @property
    def has_arrived(self) -> bool:
        return all(event.query() for event in self.events)

    def arrives(self, until: float) -> bool:
        """Wait for the copies; False if it is too late to begin."""
        while perf_counter() < until:
            if self.has_arrived:
                return True
            sleep(_POLL_SECONDS)
        return False

    def left_out(self, reason: str) -> Measured:
        error = TimeoutError(f"the reading of step {self.stamp.step} is left out: {reason}")
        return Measured(self.stamp, self.took, faults=[("elsewhere", error)])

    def do(self, states: Mapping[str, Any]) -> None:
        self.done.set_result(self.run(states))

    def run(self, states: Mapping[str, Any]) -> Measured:
        began, measured = perf_counter(), Measured(self.stamp, self.took)
        with torch.no_grad():
            self._measure(states, measured)
        return replace(measured, seconds=perf_counter() - began)

    def _measure(self, states: Mapping[str, Any], measured: Measured) -> None:
        try:
            reading = self.reading(self.tensors)
        except Exception as error:
            measured.faults.append(("reading", error))
            return
        for found in self.diagnostics:
            try:
                blocks, state = found.measure(reading, states[found.name])
            except Exception as error:
                measured.faults.append((f"diagnostic {found.name}", error))
                continue
            measured.blocks.append((found.name, blocks, state))
