"""`RunWriter`: rows in, a crash-safe run directory out, without the training thread waiting."""

import atexit
import json
import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Final

import pyarrow as pa

from entropylens.errors import EntropyLensError
from entropylens.records import FORMAT_VERSION, SCHEMAS
from entropylens.store.batches import record_batch, row_count
from entropylens.store.manifest import plain, save_manifest
from entropylens.store.opening import checked_place, claim_place, open_manifest
from entropylens.store.seal import covered_rows, seal_tail
from entropylens.store.sigterm import install, uninstall
from entropylens.store.status import RankStatus
from entropylens.store.tail import Tail

__all__ = ["RunWriter"]

log = logging.getLogger("entropylens")

HEARTBEAT_SECONDS: Final = 5.0
_AT_ONCE: Final = 4096
"""Entries of the queue that go to the tails together."""
JOIN_SECONDS: Final = 60.0
"""How long closing waits for the last rows."""


class RunWriter:
    """Writes one process's rows of one run.

    `write` puts rows in a queue and returns; a thread appends them to Arrow tails every
    ``flush_seconds`` and seals a tail into an immutable Parquet segment every ``seal_seconds`` or
    ``seal_rows``, on SIGTERM, on `close` and when the process exits. After ``kill -9`` what had
    reached a tail is there.

    Args:
        run_dir: The run's directory. If it holds a run that has ended and ``resume_step`` is None,
            ``NAME-2`` (``NAME-3``, ...) beside it is taken.
        rank: Of this process.
        world_size: Number of processes.
        config: Kept in the manifest.
        resume_step: Continue the run after this optimiser step: rows beyond it are moved to
            ``superseded/``. Where there is no run yet, one is started.
        start_step: Of a new run: the optimiser step it begins after.
        name: Shown for the run; by default the directory's name.
        flush_seconds: Longest time that a row waits before it is in a file.
        seal_seconds: Longest time that a row stays in a tail.
        seal_rows: Most rows of a tail.
        queue_rows: Most rows that wait for a disk that is slow or full; more are counted as lost.

    Raises:
        EntropyLensError: The directory is a file, on an object store, not writable, in use by
            another live process, or of a newer format.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        rank: int = 0,
        world_size: int = 1,
        config: Mapping[str, Any] | None = None,
        resume_step: int | None = None,
        start_step: int = 0,
        name: str | None = None,
        flush_seconds: float = 1.0,
        seal_seconds: float = 60.0,
        seal_rows: int = 200_000,
        queue_rows: int = 1_000_000,
    ) -> None:
        self.rank = rank
        self.step = start_step if resume_step is None else resume_step
        self.cpu_seconds = 0.0
        self.before_exit: Callable[[], None] | None = None
        """Called before the last rows are written because the process is told to end."""
        self._flush_seconds, self._seal_seconds = flush_seconds, seal_seconds
        self._seal_rows, self._queue_rows = seal_rows, queue_rows
        self._queue: deque[tuple[str, float, Mapping[str, Any], int]] = deque()
        self._backlog: dict[str, deque[pa.RecordBatch]] = {table: deque() for table in SCHEMAS}
        self._entered, self._left, self._lost = 0, 0, 0
        self._faults: dict[str, int] = {}
        self._tails: dict[str, Tail] = {}
        self._seal_at: dict[str, float] = {}
        self._commands: SimpleQueue[tuple[str, Future[bool]]] = SimpleQueue()
        self._end: tuple[str, str] | None = None
        self._pid = os.getpid()
        self._old_error = getattr(sys, "last_value", None)
        root = checked_place(run_dir)
        try:
            self._layout, self._claim = claim_place(root, rank, resume_step)
            try:
                self._begin(name or root.name, world_size, config)
            except BaseException:
                self._claim.release()
                raise
        except OSError as error:
            raise EntropyLensError(
                f"RunWriter: expected to write into {root}, got {error}; choose another run_dir"
            ) from None
        self._thread = threading.Thread(target=self._run, name="entropylens-writer", daemon=True)
        self._thread.start()
        self._old_handler: Any = None
        self._old_handler = install(self._on_sigterm)
        atexit.register(self._at_exit)

    @property
    def run_dir(self) -> Path:
        """The directory really written to."""
        return self._layout.root

    @property
    def run_id(self) -> str:
        """Of the run, kept through resumes."""
        return str(self._manifest["run_id"])

    # -- called by whoever measures --------------------------------------------------------------

    def write(self, table: str, columns: Mapping[str, Any]) -> None:
        """Queue rows; neither waits nor raises.

        Args:
            table: A table of `entropylens.records.SCHEMAS`.
            columns: By name: an array or list with one value a row, or a scalar for all. ``time``
                is in unix seconds, by default now; ``step`` by default the writer's; what else is
                missing is null.
        """
        if self._end is not None or os.getpid() != self._pid:
            return
        rows = row_count(columns)
        if self._entered - self._left + rows > self._queue_rows:
            self._lost += rows
            self.fault("queue", RuntimeError(f"more than {self._queue_rows} rows wait for disk"))
            return
        self._entered += rows
        self._queue.append((table, time.time(), {"step": self.step, **columns}, rows))

    def event(
        self,
        kind: str,
        message: str,
        *,
        step: int = 0,
        phase: str = "train",
        severity: str = "info",
        rule: str | None = None,
        evidence: Mapping[str, Any] | None = None,
        before: float | None = None,
        after: float | None = None,
        mode: str | None = None,
    ) -> None:
        """Queue a row of the events table; neither waits nor raises.

        Args:
            kind: What happened, slash-separated: ``run/start``, ``budget``.
            message: For a person.
            step: Optimiser step.
            phase: train, eval or rollout.
            severity: info, warning or error.
            rule: Which rule saw it.
            evidence: Values behind it, kept as JSON.
            before: A value before it.
            after: The value after it.
            mode: shadow or enforce, of a controller.
        """
        try:
            text = None if evidence is None else json.dumps(plain(evidence))
        except Exception as error:
            text = None
            self.fault(f"evidence of {kind}", error)
        row = {"kind": kind, "message": message, "step": step, "phase": phase, "mode": mode}
        more = {"severity": severity, "rule": rule, "before": before, "after": after}
        self.write("events", {**row, **more, "evidence": text})

    def fault(self, cause: str, error: BaseException) -> None:
        """Log a fault the first time its cause is seen, and count it in the status."""
        key = f"{cause}: {type(error).__name__}"
        first = key not in self._faults
        self._faults[key] = self._faults.get(key, 0) + 1
        if first:
            log.error(
                "entropylens: %s failed with %s: %s; training goes on, more of these are only "
                "counted (entropylens show %s)",
                cause,
                type(error).__name__,
                error,
                self.run_dir,
            )

    def flush(self, timeout: float = JOIN_SECONDS) -> bool:
        """Wait until the rows queued so far are in files; False if the disk did not take them."""
        return self._ask("flush", timeout)

    def close(self, state: str = "finished", reason: str = "") -> None:
        """Write what is queued, seal all tails, wait for the disk; a second call does nothing.

        Args:
            state: finished, failed or terminated.
            reason: For a person.
        """
        if os.getpid() != self._pid:
            return
        if self._end is None:
            kind = {"finished": "end"}.get(state, state)
            severity = {"finished": "info", "failed": "error"}.get(state, "warning")
            message = reason or f"the run {state} at step {self.step}"
            self.event(f"run/{kind}", message, step=self.step, severity=severity)
            self._end = (state, reason)
            self._commands.put(("close", Future()))
        self._thread.join(JOIN_SECONDS)
        atexit.unregister(self._at_exit)
        uninstall(self._on_sigterm, self._old_handler)

    # -- opening ---------------------------------------------------------------------------------

    def _begin(self, name: str, world_size: int, config: Mapping[str, Any] | None) -> None:
        self._manifest = open_manifest(
            self._layout,
            self.rank,
            name=name,
            world_size=world_size,
            config=config,
            start_step=self.step,
        )
        run_id, self.attempt = self._manifest["run_id"], len(self._manifest["attempts"]) - 1
        self._next_row = {t: covered_rows(self._layout, run_id, t, self.rank) for t in SCHEMAS}
        self._covered = dict(self._next_row)
        self._status = RankStatus(run_id, self.rank, self.attempt, step=self.step)
        self._status.save(self._layout)
        self.event(
            "run/resume" if self.attempt else "run/start",
            f"attempt {self.attempt}, process {self._pid} on {self._status.host}",
            step=self.step,
        )
        self._drain()  # pyarrow imports pandas at its first row, which fails when Python is ending

    # -- leaving ---------------------------------------------------------------------------------

    def _at_exit(self) -> None:
        error = getattr(sys, "last_value", None)
        if error is None or error is self._old_error:
            self.close()
        else:
            state = "failed" if isinstance(error, Exception) else "terminated"
            self.close(state, f"{type(error).__name__}: {error}")

    def _on_sigterm(self, number: int, frame: Any) -> None:
        previous = self._old_handler
        if os.getpid() == self._pid:
            try:
                if self.before_exit is not None:
                    self.before_exit()
            except Exception as error:
                self.fault("before exit", error)
            if callable(previous):
                self.event("run/signal", "SIGTERM", step=self.step, severity="warning")
                self._ask("seal", JOIN_SECONDS)
            else:
                self.close("terminated", "SIGTERM")
        if callable(previous):
            previous(number, frame)
        else:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    # -- the writer's thread ---------------------------------------------------------------------

    def _ask(self, what: str, timeout: float) -> bool:
        if self._end is not None or os.getpid() != self._pid:
            return False
        done: Future[bool] = Future()
        self._commands.put((what, done))
        try:
            return done.result(timeout)
        except TimeoutError:
            return False

    def _run(self) -> None:
        what = "flush"
        while what != "close":
            try:
                what, done = self._commands.get(timeout=self._flush_seconds)
            except Empty:
                what, done = "flush", Future()
            written = False
            try:
                written = self._drain()
                self._seal(everything=what != "flush")
                self._beat(leave=what == "close")
            except Exception as error:
                self.fault("writer", error)
            self.cpu_seconds = time.thread_time()
            done.set_result(written)
        self._claim.release()

    def _drain(self) -> bool:
        """All that is queued now, and in parts: a faster producer keeps nothing from the disk."""
        waiting, written = len(self._queue), self._drain_part(_AT_ONCE)
        for _ in range(_AT_ONCE, waiting, _AT_ONCE):
            self._seal(everything=False)
            self._beat(leave=False)
            written = self._drain_part(_AT_ONCE)
        return self._drain_part(len(self._queue)) if self._end is not None else written

    def _drain_part(self, most: int) -> bool:
        """Queue to batches to tails; what a tail does not take is kept for the next time."""
        grouped: dict[str, list[pa.RecordBatch]] = {}
        for _ in range(min(most, len(self._queue))):
            table, now, columns, rows = self._queue.popleft()
            try:
                batch = record_batch(table, columns, rows, self.rank, self.attempt, now)
                grouped.setdefault(table, []).append(batch)
            except Exception as error:
                self._left += rows
                self._lost += rows
                self.fault(f"rows of {table}", error)
        for table, batches in grouped.items():
            self._backlog[table].append(pa.concat_batches(batches))
        for table, backlog in self._backlog.items():
            while backlog and self._append(table, backlog[0]):
                self._left += backlog.popleft().num_rows
        return not any(self._backlog.values())

    def _append(self, table: str, batch: pa.RecordBatch) -> bool:
        try:
            self._forget_removed(table)
            if table not in self._tails:
                self._tails[table] = self._new_tail(table)
            self._tails[table].append(batch)
        except OSError as error:
            self.fault(f"tail of {table}", error)
            return False
        self._next_row[table] += batch.num_rows
        self._status.rows[table] = self._status.rows.get(table, 0) + batch.num_rows
        self._seal_at.setdefault(table, time.monotonic() + self._seal_seconds)
        return True

    def _new_tail(self, table: str) -> Tail:
        facts = {
            "format_version": str(FORMAT_VERSION),
            "run_id": self._manifest["run_id"],
            "rank": str(self.rank),
            "attempt": str(self.attempt),
            "first_row": str(self._next_row[table]),
        }
        path = self._layout.tail(table, self.rank)
        return Tail(path, SCHEMAS[table].with_metadata(facts))

    def _forget_removed(self, table: str) -> None:
        """Where somebody removed the directory, what comes from here on can still be read."""
        if table in self._tails and self._tails[table].is_gone:
            tail = self._tails.pop(table)
            tail.close()
            self.fault(f"tail of {table}", FileNotFoundError(f"{tail.path} was removed"))
        if self.rank == 0 and not self._layout.manifest.exists():
            save_manifest(self._layout, self._manifest)

    def _seal(self, *, everything: bool) -> None:
        now = time.monotonic()
        for table, tail in list(self._tails.items()):
            due = tail.rows >= self._seal_rows or now >= self._seal_at.get(table, now + 1)
            if not (due or everything):
                continue
            try:
                self._forget_removed(table)
                if table not in self._tails:
                    continue
                covered = seal_tail(
                    self._layout,
                    self._manifest["run_id"],
                    table,
                    self.rank,
                    self._covered[table],
                    sync=everything,
                )
                if missing := self._next_row[table] - covered:
                    self._lost += missing
                    self.fault(f"tail of {table}", RuntimeError(f"{missing} rows are damaged"))
                self._covered[table] = self._next_row[table]
                self._replace_tail(table, remove=everything)
                self._seal_at.pop(table, None)
            except (OSError, ValueError, pa.ArrowException) as error:
                self.fault(f"segment of {table}", error)
                self._seal_at[table] = now + self._seal_seconds

    def _replace_tail(self, table: str, *, remove: bool) -> None:
        old = self._tails.pop(table)
        old.close()
        if remove:
            os.unlink(old.path)
        else:
            self._tails[table] = self._new_tail(table)

    def _beat(self, *, leave: bool) -> None:
        status, now = self._status, time.time()
        if not leave and now - status.heartbeat < min(HEARTBEAT_SECONDS, 5 * self._flush_seconds):
            return
        if status.step != self.step:
            status.step, status.step_time = self.step, now
        status.lost_rows, status.faults = self._lost, dict(self._faults)
        status.writer_cpu_seconds = self.cpu_seconds
        if leave and self._end is not None:
            status.state, status.reason = self._end
            status.lost_rows += self._entered - self._left
        try:
            status.save(self._layout, sync=leave)
        except OSError as error:
            self.fault("status", error)
