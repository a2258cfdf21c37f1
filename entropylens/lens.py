"""`Lens`: joins capture, schedules, diagnostics, transfer, the budget and the writer of one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, Final, Self

import torch
from torch import Tensor, nn

from entropylens.bounding import Bounding
from entropylens.budget import MAX_OVERHEAD, Budget
from entropylens.capture.call import Call
from entropylens.capture.insides import ProbeSet
from entropylens.capture.optimizer import named_optimizers
from entropylens.capture.policy import PolicyBatch, shown_tokens
from entropylens.control import StepBound
from entropylens.control.ranks import ranks
from entropylens.joining import open_writer, place_of, tokens_seen
from entropylens.records import Phase, check_metric_name
from entropylens.registry import (
    Block,
    RolloutReading,
    Scalars,
    all_diagnostics,
    resolve_schedules,
)
from entropylens.schedule import Schedule, check_preset
from entropylens.session import Session
from entropylens.store.writer import RunWriter
from entropylens.transfer import Stamp
from entropylens.watch import Watch

__all__ = ["ROWS", "Lens"]

ROWS: Final[Mapping[str, int | None]] = {"fast": 256, "balanced": 1024, "full": None}
"""Tokens measured a step at most, by preset; None is all of them."""


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
        optimizer: For learning rates, gradients and updates: one, a sequence, or a mapping from the
            names they shall have in the log (column ``module``). None leaves them out.
        run_dir: Where the log goes. A directory that holds an ended run is left alone and
            ``NAME-2`` is taken, unless ``resume_step`` or ``state`` is given. Under
            torch.distributed every rank opens its own Lens and writes where rank 0 does.
        preset: ``fast``, ``balanced`` or ``full``: how often diagnostics run and on how many rows.
        diagnostics: Schedules that differ from the preset's, by diagnostic: a `Schedule`, an
            interval in steps, or False (off).
        max_overhead: Share of wall time we may take; rows, then intervals, give way when it is
            exceeded. By default the preset's: 1 % for ``fast``, else 3 %. None never thins.
        rows: Tokens measured a step at most; by default the preset's; None is all. Of several
            micro-batches each gives its share, at least 16, from the second measured step on; in
            the first their number is not known, and each gives so many. Where a fused head gives
            entropy and log-probability, they are taken of every token, and this limits only those
            whose whole distribution is looked at.
        resume_step: Continue an existing run after this optimiser step: what it logged beyond is
            moved to ``superseded/``.
        state: What `state_dict` gave at a checkpoint, instead of ``resume_step``: continue after
            its step the run that it belongs to, if that is in ``run_dir`` or in the ``NAME-2`` that
            was taken for it. With another ``run_dir`` a new run begins at that step, and the
            first one stays as it is.
        name: Shown for the run; by default the directory's name.
        config: The run's own settings, kept in the manifest.
        decode: Token id to text for the tokens table; called on the training thread, once per id.
        temperature: The temperature at which the loss reads the logits.
        seed: Of the choice of rows; the training's own generators are never touched.
        reads: Modules whose training forwards are read, by default the model: language models and
            classifiers as above, or `torch.nn.CrossEntropyLoss`. Tokens are taken of the first that
            shows any. Of a compiled model give what `torch.compile` returned.
        rank: Of this process; by default torch.distributed's. Given, ranks do not meet: each needs
            the same new ``run_dir``.
        world_size: Number of processes; by default torch.distributed's.
        control: Bounds the steps of the model's one optimiser, or in shadow mode says what it would
            have done; None leaves them alone.
        probe_set: What representations and attention are measured on all run long, and in which
            layers; None takes the first training batches.

    Raises:
        ValueError: An unknown preset or diagnostic (with the nearest name), a bad number,
            ``control`` without a model and one optimiser or on one of several ranks alone, or a
            ``probe_set`` without a model or with layers that it does not have.
        TypeError: ``optimizer`` is not one.
        EntropyLensError: The run directory cannot be used (a file, not writable, in use, newer), or
            rank 0 has not opened it.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        optimizer: Any = None,
        *,
        run_dir: str | Path,
        preset: str = "balanced",
        diagnostics: Mapping[str, Schedule | int | bool] | None = None,
        max_overhead: float | str | None = "preset",
        rows: int | str | None = "preset",
        resume_step: int | None = None,
        state: Mapping[str, Any] | None = None,
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
        decode: Callable[[int], str] | None = None,
        temperature: float = 1.0,
        seed: int = 0,
        reads: Sequence[nn.Module] | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        control: StepBound | None = None,
        probe_set: ProbeSet | None = None,
    ) -> None:
        chosen = check_preset("Lens", preset)
        if isinstance(rows, str):
            rows = ROWS[check_preset("Lens: rows", chosen if rows == "preset" else rows)]
        if isinstance(max_overhead, str):
            like = chosen if max_overhead == "preset" else max_overhead
            max_overhead = MAX_OVERHEAD[check_preset("Lens: max_overhead", like)]
        if not temperature > 0:
            raise ValueError(f"Lens: expected a temperature > 0, got {temperature}")
        schedules = resolve_schedules(chosen, diagnostics or {})
        budget = Budget(max_overhead, rows)
        optimizers = named_optimizers(optimizer)
        known = all_diagnostics()
        settings = {
            "preset": chosen,
            "schedules": {n: {"every": s.every, "floor": s.floor} for n, s in schedules.items()},
            "rows": rows,
            "max_overhead": max_overhead,
            "temperature": temperature,
            "seed": seed,
            "control": None if control is None else asdict(control),
            "model": None if model is None else type(model).__name__,
            "parameters": None if model is None else sum(p.numel() for p in model.parameters()),
            "optimizer": ", ".join(type(one).__name__ for one in optimizers.values()) or None,
            "user": dict(config or {}),
        }
        asked, start = Path(run_dir), 0
        if state is not None:
            start, place = int(state["step"]), place_of(state, asked)
            run_dir, resume_step = (asked, None) if place is None else (place, start)
        writer = open_writer(
            run_dir,
            rank,
            world_size,
            resume_step=resume_step,
            start_step=start,
            name=name,
            config=settings,
        )
        self._asked, self._model = asked.absolute(), model
        device = _device_of(model)
        self._session = Session(writer, schedules, budget, device, decode)
        self.watch = Watch(
            self._session, device, temperature=temperature, seed=seed + 1_000_003 * writer.rank
        )
        """For adapters: what trainers tell that a loop has no words for."""
        self._step = start if resume_step is None else resume_step
        with ExitStack() as undo:
            undo.callback(self.close, "failed", "Lens could not be attached")
            self._restore(writer, state)
            for module in ([model] if model is not None else []) if reads is None else reads:
                self.watch.tap(module)
            if control is not None and control.mode != "off":
                if world_size == 1 and ranks() > 1:
                    raise ValueError(
                        f"Lens: expected control= on all {ranks()} ranks, which bound a step "
                        f"together, got a Lens that stands alone (world_size=1)"
                    )
                # Before the taps: what they see of an update is what is kept of it.
                bounding = Bounding(
                    self._session,
                    model,
                    optimizers,
                    control,
                    temperature=temperature,
                    seed=seed,
                    state=None if state is None else state.get("control"),
                )
                self.watch.bound(bounding)
            names = {id(p): n for n, p in model.named_parameters()} if model is not None else {}
            self.watch.tap_optimizers(optimizers, names)
            self._look_inside(model, {known[name].reads for name in schedules}, probe_set)
            undo.pop_all()
        self._unlooked = 0
        """Coming steps in which nothing is due and that need no look at the clock."""
        self._mark = perf_counter()
        self.watch.begin(self._step + 1)

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
        optimizer: str = "",
        gradient_norm: Tensor | float | None = None,
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
            optimizer: Name of the optimiser that follows this loss, where each of several has one.
            gradient_norm: Before clipping, where ``control`` is to know it before the optimiser
                steps.

        Raises:
            ValueError: In the first step only: shapes do not fit. Later it is a counted fault.
        """
        if not self._session.due:
            return
        if gradient_norm is not None:
            self.watch.take_gradient_norm(gradient_norm, optimizer)
        self._session.aside(
            "observe",
            lambda: self.watch.observe(
                logits, targets, mask, loss, sample_id, shift, loss_is_sum, optimizer
            ),
            raises=True,
        )

    def observe_policy(
        self,
        *,
        advantage: Tensor,
        logprob: Tensor | None = None,
        entropy: Tensor | None = None,
        logits: Tensor | None = None,
        token_ids: Tensor | None = None,
        mask: Tensor | None = None,
        inputs: Mapping[str, Any] | None = None,
        loss: Tensor | None = None,
        sample_id: Sequence[Any] | Tensor | None = None,
        **known: Any,
    ) -> None:
        """Show one micro-batch of a policy's loss, from any loop; call it once for each.

        The tokens' distributions come as ``logits`` with ``token_ids``, which is all that every
        diagnostic needs, or as ``logprob`` with ``entropy``, at the loss's temperature.

        Args:
            advantage: ``[B, C]``, or ``[B]`` for all tokens of a sequence.
            logprob: ``[B, C]`` log-probability of each sampled token, nats.
            entropy: ``[B, C]`` Shannon entropy of each token's distribution, nats.
            logits: ``[B, C, V]`` before the temperature.
            token_ids: ``[B, C]`` what was sampled.
            mask: ``[B, C]``, true where the loss counts a token.
            inputs: The model's arguments of this forward by name (``input_ids`` ``[B, L]`` and the
                rest), whose last C tokens those are: needed for ``entropy/change/*`` alone.
            loss: ``[]``, this micro-batch's loss, as in `observe`.
            sample_id: One identifier for each sequence.
            **known: What else is known, by the names of
                `entropylens.capture.policy.PolicyBatch`: ``old_logprob``, ``sampler_logprob``,
                ``reference_logprob``, ``clip=(low, high)``, ``ratio_level``, ``reward``,
                ``correct``, ``pass_rate``, ``group``, ``thoughts``, ``answers``,
                ``is_own_sample``, ...

        Raises:
            TypeError: In the first step only: a name that `PolicyBatch` does not have.
            ValueError: In the first step only: shapes do not fit. Later it is a counted fault.
        """
        self.watch.expect("policy", "sampled")
        if not self._session.due:
            return

        def show() -> None:
            source = shown_tokens(logprob, entropy, logits, token_ids, mask)
            policy = PolicyBatch(advantage=advantage, **known)
            model = self._model
            call = Call(module=model, kwargs=inputs) if inputs and model is not None else None
            self.watch.observe_policy(source, policy, sample_id, call)

        self._session.aside("observe_policy", show, raises=True)
        if loss is not None:
            self.observe(loss=loss)

    def observe_rollout(self, **known: Any) -> None:
        """Show the completions of one generation before anything shuffles them.

        Args:
            **known: Fields of `entropylens.readings.RolloutReading`: ``reward`` and ``group_size``
                for what is told of groups, ``rewards`` by component, ``correct``, ``answer``,
                ``token_id`` and ``mask`` for lengths and repetition, ``truncated``, ``seconds``.

        Raises:
            TypeError: In the first step only: a field that `RolloutReading` does not have.
        """
        self.watch.expect("rollout")
        if "rollout" in self._session.due:
            work = partial(self._show_rollout, known)
            self._session.aside("observe_rollout", work, raises=True)

    def _show_rollout(self, known: Mapping[str, Any]) -> None:
        reading = RolloutReading(**known)
        self.watch.take_rollout(reading)

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
        number = self._step + 1 if step is None else step
        if self._unlooked and number == self._step + 1:
            self._unlooked -= 1
            self._step = number
            return
        began, session = perf_counter(), self._session
        if not session.due and began < session.wakes_at:
            self._unlooked = session.pass_step(number, began, began - self._mark)
            self._step, self._mark = number, began
            self.watch.pass_step(number)
            return
        if micro_batch:
            self.observe(**micro_batch)
        self._unlooked = 0
        session.aside("step", lambda: self._end(number, loss, gradient_norm), raises=True)

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Mark an evaluation: its time is no step's time, and what is logged has phase eval."""
        self.watch.phase = Phase.EVAL
        try:
            yield
        finally:
            self.watch.phase = Phase.TRAIN
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
        stamp = self.watch.stamp(self._step if step is None else step, phase)
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

    def aside(self, where: str, work: Callable[[], Any], *, raises: bool = False) -> None:
        """Run an adapter's own work so that neither its errors nor its time escape unseen.

        Args:
            where: Names the fault's cause.
            work: Runs without gradients.
            raises: Let `TypeError` and `ValueError` out in the first step: setup errors.
        """
        self._session.aside(where, work, raises=raises)

    def forward(self, *patterns: str) -> None:
        """Keep the newest values of these metrics for `take_latest`; ``*`` stands for any text."""
        self._session.forward(patterns)

    def follow(self, *, framework_entropy: bool) -> None:
        """Say whether the entropy that a trainer logs is to be compared with ours, step by step.

        Args:
            framework_entropy: True only where each ``framework/entropy`` is the mean of one step,
                logged at that step, and one process trains: an average over a logging interval or
                over ranks is another number.
        """
        if self._session.followers is not None:
            self._session.followers.checks_framework_entropy = framework_entropy

    def take_latest(self) -> dict[str, float]:
        """What `forward` asked for and has come since the last call, for another logger.

        Does not wait for the device: what is still on its way comes with a later call.
        """
        taken: dict[str, float] = {}
        self._session.aside("forward", lambda: taken.update(self._session.take_latest()))
        return taken

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs so that a resumed training goes on with this run.

        Everything measured so far is in files when it returns: it waits for device and disk.

        Returns:
            Numbers, text and tensors, as `torch.save` takes and ``torch.load(weights_only=True)``
            gives back; pass it as ``state`` to the next Lens.
        """
        self._session.flush()
        seen = self.watch.tokens_seen
        return {
            "step": self._step,
            "asked": str(self._asked),
            "run_dir": str(self.run_dir.absolute()),
            "run_id": self._session.writer.run_id,
            "tokens_seen": None if seen is None else int(seen),
            "control": None if self.watch.guard is None else self.watch.guard.state_dict(),
            **self._session.state_dict(),
        }

    def close(self, state: str = "finished", reason: str = "") -> None:
        """Take all hooks out, write everything and seal the log; a second call does nothing."""
        self.watch.remove()
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

    # -- within ------------------------------------------------------------------------------

    def _look_inside(
        self, model: nn.Module | None, reads: set[str], probe_set: ProbeSet | None
    ) -> None:
        if model is None:
            if probe_set is not None:
                raise ValueError("Lens: expected a model beside probe_set, got None")
            return
        if "probe" in reads:
            self.watch.probe(model)
        if reads & {"weight", "matrices"}:
            self.watch.visit(model)
        if reads & {"representation", "attention"}:
            self.watch.inspect(model, probe_set or ProbeSet())

    def _end(self, number: int, loss: Tensor | float | None, norm: Tensor | float | None) -> None:
        now = perf_counter()
        seconds, self._step, self._mark = now - self._mark, number, now
        try:
            self.watch.end(self.watch.stamp(number, Phase.TRAIN), loss, norm, seconds)
        finally:
            self.watch.begin(number + 1)

    def _log(self, name: str, value: Tensor | float, stamp: Stamp) -> None:
        check_metric_name("Lens.log", name)
        known = value.detach().clone().reshape(1) if isinstance(value, Tensor) else float(value)
        self._session.add(Block.metrics([name], Scalars([known])), stamp)

    def _restore(self, writer: RunWriter, state: Mapping[str, Any] | None) -> None:
        if state is not None:
            self._session.load_state_dict(state)
        if self._step:
            seen = tokens_seen(writer, self._step)
            if seen is None and state is not None:
                seen = state.get("tokens_seen")
            self.watch.tokens_seen = None if seen is None else torch.tensor(seen)


def _device_of(model: nn.Module | None) -> torch.device:
    parameter = next(model.parameters(), None) if model is not None else None
    return torch.device("cpu") if parameter is None else parameter.device
