"""Measuring on the host, beside the training, what would hold up an accelerator."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from time import thread_time
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from entropylens.registry import Block, Diagnostic
from entropylens.transfer import Stamp, to_host

__all__ = ["Elsewhere", "Measured"]

MOST_WAITING: Final = 4
"""Readings whose numbers are not there yet: one more would be of no use, and fill memory."""


@dataclass(frozen=True)
class Measured:
    """What became of one reading."""

    stamp: Stamp
    blocks: list[tuple[str, list[Block], Any]] = field(default_factory=list)
    """By diagnostic: its rows, on the host, and its new state."""
    faults: list[tuple[str, Exception]] = field(default_factory=list)
    cpu_seconds: float = 0.0
    """Of the other thread."""


class Elsewhere:
    """Brings readings to the host without blocking and measures them in a thread of its own.

    Decompositions of matrices wait for the device and let it wait for them. Readings are measured
    one after the other, in order.

    Args:
        states: Of the diagnostics; each is given what `collect` was told of it last.
    """

    def __init__(self, states: Mapping[str, Any]) -> None:
        self._states = states
        self._waiting: deque[_Job] = deque()
        self._running: Future[Measured] | None = None
        self._thread: ThreadPoolExecutor | None = None

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
    ) -> None:
        """Measure a reading when it has arrived.

        Args:
            diagnostics: What to measure.
            tensors: Of the reading, in lists and dicts.
            reading: Makes the reading of them, on the host and in the other thread.
            stamp: Of its rows.
        """
        flat, form = tree_flatten(tensors)
        copies = [to_host(one) if isinstance(one, Tensor) else (one, None) for one in flat]
        there = tree_unflatten([copy for copy, _ in copies], form)
        events = [event for _, event in copies if event is not None]
        self._waiting.append(_Job(list(diagnostics), there, reading, stamp, events))

    def collect(self, *, wait: bool = False) -> Iterator[Measured]:
        """What has been measured since the last call; goes on with what has arrived.

        Args:
            wait: For everything: at the end of a run, never during a step.
        """
        while self._running is not None or self._waiting:
            if self._running is None:
                job = self._waiting[0]
                if not (wait or all(event.query() for event in job.events)):
                    return
                self._waiting.popleft()
                self._start(job)
            assert self._running is not None
            if not (wait or self._running.done()):
                return
            measured, self._running = self._running.result(), None
            yield measured
        if wait and self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def _start(self, job: _Job) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="entropylens-elsewhere")
        states = {found.name: self._states[found.name] for found in job.diagnostics}
        self._running = self._thread.submit(job.run, states)


@dataclass(frozen=True)
class _Job:
    diagnostics: list[Diagnostic]
    tensors: Any
    reading: Callable[[Any], Any]
    stamp: Stamp
    events: list[torch.Event]

    def run(self, states: Mapping[str, Any]) -> Measured:
        began, measured = thread_time(), Measured(self.stamp)
        try:
            for event in self.events:
                event.synchronize()
            with torch.no_grad():
                reading = self.reading(self.tensors)
        except Exception as error:
            measured.faults.append(("reading", error))
            return measured
        for found in self.diagnostics:
            try:
                with torch.no_grad():
                    blocks, state = found.measure(reading, states[found.name])
            except Exception as error:
                measured.faults.append((f"diagnostic {found.name}", error))
                continue
            measured.blocks.append((found.name, blocks, state))
        return Measured(measured.stamp, measured.blocks, measured.faults, thread_time() - began)
