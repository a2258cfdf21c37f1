"""`Lens`: joins capture, schedules, diagnostics, transfer, the budget and the writer of one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter, time
from types import TracebackType
from typing import Any, Final, Self

import torch
from torch import Tensor, nn

from entropylens.budget import Budget
from entropylens.capture.device import allocated_bytes, resident_bytes
from entropylens.capture.forward import Forward, tap_forward
from entropylens.capture.micro_batches import MicroBatches, identifiers
from entropylens.capture.optimizer import OptimizerTap, unwrap_optimizer
from entropylens.records import Phase, check_metric_name
from entropylens.registry import Block, StepReading, resolve_schedules
from entropylens.schedule import Schedule, check_preset
from entropylens.session import Session
from entropylens.store.reader import open_run
from entropylens.store.writer import RunWriter
from entropylens.transfer import Stamp

__all__ = ["ROWS", "Lens"]

ROWS: Final[Mapping[str, int | None]] = {"fast": 256, "balanced": 1024, "full": None}
"""Tokens measured a step at most, by preset; None is all of them."""

_LEAST_ROWS: Final = 16


class Lens:
    """Watches one training run and writes what it sees to a crash-safe log.

    In a plain loop, around it::

        with el.Lens(model, optimizer, run_dir="runs/mine") as lens:
            for batch in loader:
                loss = model(**batch).loss
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                lens.step(loss=loss, gradient_norm=norm)

    A model that returns ``logits`` and takes ``labels``, as transformers' do, is read by a hook;
    any other is shown to `observe` or `step` as ``logits`` and ``targets``. Nothing waits for the
    device, no global random state is used, and once the first step is over no exception leaves:
    faults are logged once per cause and counted in the run's status.

    Args:
        model: Its parameters name gradients and updates; its outputs are read if they carry logits.
            None where everything is passed to `observe`.
        optimizer: For learning rates, gradients and updates; None leaves them out.
        run_dir: Where the log goes. A directory that holds an ended run is left alone and
            ``NAME-2`` is taken, unless ``resume_step`` is given.
        preset: ``fast``, ``balanced`` or ``full``: how often diagnostics run and on how many rows.
        diagnostics: Schedules that differ from the preset's, by diagnostic: a `Schedule`, an
            interval in steps, or False (off).
        max_overhead: Share of wall time we may take; rows, then intervals, give way when it is
            exceeded. None never thins.
        rows: Tokens measured a step at most; by default the preset's; None is all. Of several
            micro-batches each gives its share, at least 16, from the second measured step on; in
            the first their number is not known, and each gives so many.
        resume_step: Continue an existing run after this optimiser step: what it logged beyond is
            moved to ``superseded/``.
        name: Shown for the run; by default the directory's name.
        config: The run's own settings, kept in the manifest.
        decode: Token id to text for the tokens table; called on the training thread, once per id.
        temperature: The temperature at which the loss reads the logits.
        seed: Of the generators that choose rows; the training's own are never touched.
        rank: Of this process; by default torch.distributed's.
        world_size: Number of processes; by default torch.distributed's.

    Raises:
        ValueError: An unknown preset or diagnostic (with the nearest name), or a bad number.
        TypeError: ``optimizer`` is not one.
        EntropyLensError: The run directory cannot be used (a file, not writable, in use, newer).
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        optimizer: Any = None,
        *,
        run_dir: str | Path,
        preset: str = "balanced",
        diagnostics: Mapping[str, Schedule | int | bool] | None = None,
        max_overhead: float | None = 0.03,
        rows: int | str | None = "preset",
        resume_step: int | None = None,
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
        decode: Callable[[int], str] | None = None,
        temperature: float = 1.0,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        chosen = check_preset("Lens", preset)
        if isinstance(rows, str):
            rows = ROWS[check_preset("Lens: rows", chosen if rows == "preset" else rows)]
        if not temperature > 0:
            raise ValueError(f"Lens: expected a temperature > 0, got {temperature}")
        schedules = resolve_schedules(chosen, diagnostics or {})
        budget = Budget(max_overhead, rows)
        taps = None if optimizer is None else unwrap_optimizer(optimizer)
        settings = {
            "preset": chosen,
            "schedules": {n: {"every": s.every, "floor": s.floor} for n, s in schedules.items()},
            "rows": rows,
            "max_overhead": max_overhead,
            "temperature": temperature,
            "seed": seed,
            "model": None if model is None else type(model).__name__,
            "parameters": None if model is None else sum(p.numel() for p in model.parameters()),
            "optimizer": None if taps is None else type(taps).__name__,
            "user": dict(config or {}),
        }
        found_rank, found_world = _ranks()
        writer = RunWriter(
            Path(run_dir),
            rank=found_rank if rank is None else rank,
            world_size=found_world if world_size is None else world_size,
            resume_step=resume_step,
            name=name,
            config=settings,
        )
        self._device = _device_of(model)
        self._session = Session(writer, schedules, budget, self._device, decode)
        self._handles: list[Any] = []
        self._temperature, self._seed = temperature, seed + 1_000_003 * writer.rank
        self._generators: dict[torch.device, torch.Generator] = {}
        self._step = resume_step or 0
        self._shown = False
        self._phase = Phase.TRAIN
        self._micro_batches = 1
        self._mark = perf_counter()
        self.reads_loss = True
        self._begin()
        with ExitStack() as undo:
            undo.callback(self.close, "failed", "Lens could not be attached")
            self._tokens_seen = torch.tensor(self._restore_tokens(writer) if resume_step else 0)
            self._attach(model, taps)
            undo.pop_all()

    def _attach(self, model: nn.Module | None, optimizer: Any) -> None:
        aside = self._session.aside
        if model is not None:
            self._handles.append(
                tap_forward(model, self._on_forward, aside, lambda: self.next_labels)
            )
        if optimizer is not None:
            names = {id(p): n for n, p in model.named_parameters()} if model is not None else {}
            self._handles.append(OptimizerTap(optimizer, self, names, aside))

    # -- what a loop calls -------------------------------------------------------------------

    @property
    def run_dir(self) -> Path:
        """The directory really written to."""
        return self._session.run_dir

    @property
    def last_step(self) -> int:
        """Number of the last finished optimiser step."""
        return self._step

    def observe(
        self,
        *,
        logits: Tensor | None = None,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
        loss: Tensor | None = None,
        sample_id: Sequence[Any] | Tensor | None = None,
        shift: bool = False,
        loss_is_sum: bool = False,
    ) -> None:
        """Show one micro-batch; call it once for each before `step`.

        From the first logits passed here on, the model's own outputs are no longer read by a hook;
        from the first loss on, neither are its losses.

        Args:
            logits: ``[..., V]``, any floating dtype, before the loss's temperature.
            targets: ``[...]`` integers; one that is negative or not below V is masked.
            mask: ``[...]``, true where a target is scored.
            loss: ``[]``, this micro-batch's loss; the step's is their mean.
            sample_id: One identifier for each entry of the first axis; without logits, of the
                micro-batch that the hook read last.
            shift: Score position t of the logits ``[B, T, V]`` on target t + 1.
            loss_is_sum: The loss is this micro-batch's share of the step's, to be added up, not a
                mean of its own.

        Raises:
            ValueError: In the first step only: shapes do not fit. Later it is a counted fault.
        """
        self._session.aside(
            "observe",
            lambda: self._observe(logits, targets, mask, loss, sample_id, shift, loss_is_sum),
            raises=True,
        )

    def step(
        self,
        loss: Tensor | float | None = None,
        *,
        gradient_norm: Tensor | float | None = None,
        step: int | None = None,
        **micro_batch: Any,
    ) -> None:
        """End an optimiser step: measure what is due and hand it to the writer.

        Args:
            loss: ``[]``, the step's loss; by default that of the observed micro-batches.
            gradient_norm: The norm before clipping, as `clip_grad_norm_` returned it.
            step: Number of the step; by default one more than the last.
            **micro_batch: Arguments of `observe`, for a loop of one micro-batch a step.

        Raises:
            TypeError: An argument that `observe` does not have.
            ValueError: In the first step only, as `observe`.
        """
        if micro_batch:
            self.observe(**micro_batch)
        self._session.aside("step", lambda: self._end(loss, gradient_norm, step), raises=True)
        self._session.count_step()

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Mark an evaluation: its time is no step's time, and what is logged has phase eval."""
        self._phase = Phase.EVAL
        try:
            yield
        finally:
            self._phase = Phase.TRAIN
            self.restart_clock()

    def log(
        self,
        values: Mapping[str, Tensor | float],
        *,
        phase: str | None = None,
        step: int | None = None,
        source: str = "user",
    ) -> None:
        """Write values of your own as ``user/NAME``.

        Args:
            values: Name in lower snake case with slashes, to a number or a tensor of one element.
            phase: train, eval or rollout; by default eval within `evaluation`, else train.
            step: Optimiser step; by default the last finished one.
            source: First part of the name.

        Raises:
            ValueError: In the first step only: a name of another form. Later it is a counted fault.
        """
        stamp = Stamp(self._step if step is None else step, time(), phase or self._phase)
        for name, value in values.items():
            work = partial(self._log, f"{source}/{name}", value, stamp)
            self._session.aside("log", work, raises=True)

    def event(self, kind: str, message: str, **fields: Any) -> None:
        """Write a row to the events table; ``fields`` as in the log format."""
        row = {"step": self._step, **fields}
        write = partial(self._session.writer.event, kind, message, **row)
        self._session.aside("event", write, raises=True)

    def restart_clock(self) -> None:
        """Leave the time since the last step out of the next one: evaluation, a checkpoint."""
        now = perf_counter()
        self._session.budget.pause(now - self._mark)
        self._mark = now

    def close(self, state: str = "finished", reason: str = "") -> None:
        """Take all hooks out, write everything and seal the log; a second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._session.close(state, reason)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            failed = issubclass(kind, Exception)
            self.close("failed" if failed else "terminated", f"{kind.__name__}: {error}")

    # -- what the taps call ------------------------------------------------------------------

    def wants(self, reads: str) -> bool:
        """Whether a diagnostic that reads this is due in the step in progress."""
        return self._session.wants(reads)

    def take(self, reads: str, reading: Any) -> None:
        """Measure a reading of the step in progress."""
        self._session.measure(reads, lambda: reading)

    def take_learning_rates(self, rates: list[Tensor | float]) -> None:
        """Remember the rates of the step in progress."""
        self._open.learning_rates = rates

    def take_gradient_norm(self, norm: Tensor | float | None) -> None:
        """Remember the norm before clipping of the step in progress."""
        self._open.gradient_norm = norm.detach() if isinstance(norm, Tensor) else norm

    def _on_forward(self, forward: Forward) -> None:
        if not self._shown and self._phase is Phase.TRAIN:
            self._take_forward(forward)

    # -- within a step -----------------------------------------------------------------------

    def _begin(self) -> None:
        self._session.begin_step(self._step + 1)
        self._open = MicroBatches()
        self.next_sample_ids: Sequence[Any] | None = None
        self.next_labels: Tensor | None = None

    def _observe(
        self,
        logits: Tensor | None,
        targets: Tensor | None,
        mask: Tensor | None,
        loss: Tensor | None,
        sample_id: Sequence[Any] | Tensor | None,
        shift: bool,
        loss_is_sum: bool,
    ) -> None:
        if (logits is None) != (targets is None):
            given, missing = ("logits", "targets") if targets is None else ("targets", "logits")
            raise ValueError(f"Lens.observe: expected logits and targets together, got {given} "
                             f"without {missing}")  # fmt: skip
        if loss is not None:
            self._show_loss(loss, loss_is_sum)
        if logits is None or targets is None:
            self._open.name_last(identifiers(sample_id))
            return
        if not self._shown:
            self._shown = True
            self._open.drop_tokens()
        if shift:
            if logits.ndim != 3 or targets.ndim != 2:
                raise ValueError(
                    f"Lens.observe: expected logits [B, T, V] and targets [B, T] to shift, got "
                    f"shapes {tuple(logits.shape)} and {tuple(targets.shape)}"
                )
            logits, targets = logits[:, :-1], targets[:, 1:]
            mask = None if mask is None else mask[:, 1:]
        self._take_tokens(logits, targets, mask, sample_id)

    def _show_loss(self, loss: Tensor, is_sum: bool) -> None:
        if self.reads_loss:
            self.reads_loss = False
            self._open.losses.clear()
        if self._session.wants("step"):
            self._open.add_loss(loss, is_sum=is_sum)

    def _take_forward(self, forward: Forward) -> None:
        if self.reads_loss and forward.loss is not None and self._session.wants("step"):
            self._open.add_loss(forward.loss, is_sum=forward.loss_is_sum)
        if forward.logits is not None and forward.targets is not None:
            ids, self.next_sample_ids, self.next_labels = self.next_sample_ids, None, None
            self._take_tokens(forward.logits, forward.targets, None, ids)

    def _take_tokens(
        self,
        logits: Tensor,
        targets: Tensor,
        mask: Tensor | None,
        sample_id: Sequence[Any] | Tensor | None,
    ) -> None:
        rows = self._session.budget.rows
        if rows is not None:
            rows = max(rows // self._micro_batches, _LEAST_ROWS)
        self._session.clock.start()
        self._open.add_tokens(
            logits,
            targets,
            mask,
            identifiers(sample_id),
            measure=self._session.wants("tokens"),
            rows=rows,
            generator=self._generator(logits.device),
            temperature=self._temperature,
        )
        self._session.clock.stop()

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]

    # -- the end of a step -------------------------------------------------------------------

    def _end(
        self, loss: Tensor | float | None, norm: Tensor | float | None, step: int | None
    ) -> None:
        now = perf_counter()
        opened, session = self._open, self._session
        number = self._step + 1 if step is None else step
        stamp = Stamp(number, time(), Phase.TRAIN)
        try:
            if opened.tokens is not None:
                self._tokens_seen = self._tokens_seen + opened.tokens
            if opened.measured:
                self._micro_batches = opened.measured
                session.measure("tokens", opened.reading)
            if session.wants("step"):
                norm = opened.gradient_norm if norm is None else norm
                seconds = now - self._mark
                session.measure("step", lambda: self._step_reading(loss, norm, seconds))
        finally:
            self._step, self._mark = number, now
            session.end_step(stamp, opened.slots)
            self._begin()

    def _step_reading(
        self, loss: Tensor | float | None, norm: Tensor | float | None, seconds: float
    ) -> StepReading:
        opened, session = self._open, self._session
        if isinstance(loss, Tensor):
            loss = loss.detach().clone()
        elif loss is not None:
            loss = torch.tensor(float(loss))
        else:
            loss = opened.loss()
        overhead, session.overhead = session.overhead, None
        reviewed = overhead is not None
        return StepReading(
            loss=loss,
            gradient_norm_before_clip=norm.clone() if isinstance(norm, Tensor) else norm,
            learning_rates=opened.learning_rates,
            tokens=opened.tokens,
            tokens_seen=None if opened.tokens is None else self._tokens_seen,
            seconds=seconds,
            device_memory=allocated_bytes(self._device) if reviewed else None,
            resident_memory=resident_bytes() if reviewed else None,
            overhead=overhead,
            rows=session.budget.rows if reviewed else None,
            widening=session.budget.widening if reviewed else None,
        )

    def _log(self, name: str, value: Tensor | float, stamp: Stamp) -> None:
        check_metric_name("Lens.log", name)
        if isinstance(value, Tensor):
            block = Block.metrics([name], value.detach().clone().reshape(1))
        else:
            block = Block("metrics", {"name": [name], "value": [float(value)]})
        self._session.add(block, stamp)

    def _restore_tokens(self, writer: RunWriter) -> int:
        """Tokens that this rank had seen by the step it resumes from, as its log says."""
        rows = open_run(writer.run_dir).metrics("tokens/seen").to_arrow().to_pylist()
        return int(max((row["value"] for row in rows if row["rank"] == writer.rank), default=0))


def _device_of(model: nn.Module | None) -> torch.device:
    parameter = next(model.parameters(), None) if model is not None else None
    return torch.device("cpu") if parameter is None else parameter.device


def _ranks() -> tuple[int, int]:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1
