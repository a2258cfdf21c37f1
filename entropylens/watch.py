"""`Watch`: what a model and its optimisers show from one optimiser step to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from time import time
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from entropylens.bounding import Bounding
from entropylens.capture.call import Call
from entropylens.capture.criterion import CriterionTap
from entropylens.capture.device import allocated_bytes, resident_bytes
from entropylens.capture.forward import Forward, ModelTap
from entropylens.capture.inputs import InputsTap
from entropylens.capture.insides import ProbeSet
from entropylens.capture.micro_batches import MicroBatches, identifiers
from entropylens.capture.optimizer import OptimizerTap
from entropylens.capture.policy import PolicyBatch
from entropylens.capture.probe import Batch
from entropylens.capture.router import RouterTap
from entropylens.capture.tokens import LogitTokens, TokenSource
from entropylens.control import StepGuard
from entropylens.diagnostics.gradient_norm import is_sharded, total_norm
from entropylens.inspection import Inspection
from entropylens.records import Phase
from entropylens.registry import (
    Block,
    GradientReading,
    OptimizerReading,
    PreferenceReading,
    RolloutReading,
    RouterReading,
    StepReading,
    UpdateReading,
)
from entropylens.session import Session
from entropylens.transfer import Stamp
from entropylens.updates import Updates
from entropylens.visits import Visits

__all__ = ["Watch"]

_LEAST_ROWS: Final = 16
_SAMPLED_ROWS: Final = 256
"""Tokens a step whose whole distributions are asked how surprising they should be."""
_OF_TOKENS: Final = frozenset(("tokens", "policy"))
"""Readings that need the tokens measured."""
_NOT_LIKELIHOOD: Final = frozenset(("policy", "preference"))
"""Readings of trainings whose losses lower the likelihood of some tokens."""
_MOST_UNSEEN: Final = 1000
"""Steps without a call of the optimiser, before its first, that are remembered as skipped."""


_SILENT_STEPS: Final = 2
"""Of token statistics due without a token; a model without logits shows some in the second."""
_NOTHING_SEEN: Final = (
    "no token statistics: nothing that was read showed logits and the classes they are scored on; "
    "pass logits and targets by hand (in Lightning: return them from training_step), name the "
    "module that has them, and of a compiled model give what torch.compile returned"
)


class Watch:
    """Gathers what taps and the loop show of a step, and has it measured when the step ends.

    Args:
        session: Of the run.
        device: Where the model lives.
        temperature: At which the loss reads the logits.
        seed: Of the choice of rows; in each step it is drawn anew from seed and step, so that a
            resumed run chooses as an uninterrupted one.
    """

    def __init__(
        self, session: Session, device: torch.device, *, temperature: float, seed: int
    ) -> None:
        self.reads_loss = True
        """Whether losses in the model's output are taken: until one is shown by hand."""
        self.next_sample_ids: Sequence[Any] | None = None
        self.next_labels: Tensor | None = None
        self.next_policy: PolicyBatch | None = None
        """What the trainer knows of the coming forward's tokens, where it trains a policy."""
        self.phase = Phase.TRAIN
        self.tokens_seen: Tensor | None = torch.tensor(0)
        """Scored tokens since the run began; None once a step was not counted."""
        self._session, self._device = session, device
        self._temperature, self._seed = temperature, seed
        self._taps: list[ModelTap | CriterionTap] = []
        self._inputs: InputsTap | None = None
        self._bounding: Bounding | None = None
        self._visits: Visits | None = None
        self._inspection: Inspection | None = None
        self._routers: list[RouterTap] = []
        self._optimizers: dict[str, OptimizerTap] = {}
        self._generators: dict[torch.device, torch.Generator] = {}
        self._seeded: set[torch.device] = set()
        self._unseen: dict[str, list[Stamp]] = {}
        self._raises_likelihood = True
        """Whether what the loss wants of a token is its likelihood."""
        self._micro_batches = 1
        self._gradient_norms: dict[str, Tensor | float] = {}
        self._clipped_norms: dict[str, Tensor] = {}
        self._updates = Updates(session, temperature)
        self._reader: object = None
        """The tap whose tokens are taken: the first that showed any."""
        self._silent_steps = 0
        self._is_shown = False
        self._number = 0
        self._open = MicroBatches()
        self._call: tuple[Call, Tensor | None] | None = None
        """What the model was given last in the step in progress, and what it made of it."""
        self._calls: dict[int, Call] = {}
        """What it was given since targets were last shown, by where its logits are in memory."""

    # -- taps --------------------------------------------------------------------------------

    def tap(self, module: nn.Module) -> None:
        """Read a module's training forwards: a model, or a `torch.nn.CrossEntropyLoss`."""
        if isinstance(module, nn.CrossEntropyLoss):
            self._taps.append(CriterionTap(module, self, self._session.aside))
        else:
            self._taps.append(ModelTap(module, self, self._session.aside))
            if RouterTap.suits(module):
                self._routers.append(RouterTap(module, self, self._session.aside))
                self.expect("router")

    def probe(self, model: nn.Module) -> None:
        """Ask a model what updates do to its distributions, if it is one that can be asked."""
        if self._updates.ask(model, len(self._optimizers), self._number):
            self._watch_inputs(model)
            self.expect("probe")

    def visit(self, model: nn.Module) -> None:
        """Have a model's weights looked at in turn."""
        visits = Visits(self._session)
        if visits.ask(model, self._number):
            self._visits = visits
            self.expect("weight", "matrices")

    def inspect(self, model: nn.Module, wanted: ProbeSet) -> None:
        """Run a model on a probe set now and then, if it is one that can be inspected."""
        inspection = Inspection(self._session, wanted)
        if wanted.inputs is None:
            # Other rows than before a resume: no drift can be told from what was seen on those.
            self._session.forget("attention")
        readable = inspection.ask(model, self._number, self._generator(self._device))
        if readable:
            self._inspection = inspection
            self._watch_inputs(model)
            self.expect(*readable)

    def _watch_inputs(self, model: nn.Module) -> None:
        if self._inputs is None:
            self._inputs = InputsTap(model, self, self._session.aside)

    def bound(self, bounding: Bounding) -> None:
        """Have every step seen by what bounds it."""
        self._bounding = bounding
        self._session.looks_at_every_step = True
        self.expect("control")

    @property
    def guard(self) -> StepGuard | None:
        """What bounds the steps, if anything does."""
        return None if self._bounding is None else self._bounding.guard

    def expect(self, *reads: str) -> None:
        """Have diagnostics of these readings be due: of a policy, of its rollouts, of routers."""
        if not _NOT_LIKELIHOOD.isdisjoint(reads):
            self._raises_likelihood = False
        self._session.expect(self._number, *reads)

    def tap_optimizers(
        self, optimizers: Mapping[str, Optimizer], parameter_names: dict[int, str]
    ) -> None:
        """Read optimisers' steps, by their names in the log."""
        for name, optimizer in optimizers.items():
            tap = OptimizerTap(optimizer, self, parameter_names, self._session.aside, name)
            self._optimizers[name] = tap

    def remove(self) -> None:
        """Take all hooks out."""
        self._remove_taps()
        if self.guard is not None:
            self.guard.close()
        if self._inputs is not None:
            self._inputs.remove()
        for router in self._routers:
            router.remove()
        self._routers.clear()
        for tap in self._optimizers.values():
            tap.remove()
        self._optimizers.clear()

    def _remove_taps(self) -> None:
        for tap in self._taps:
            tap.remove()
        self._taps.clear()

    # -- what taps and trainers tell ---------------------------------------------------------

    @property
    def due(self) -> Mapping[str, Any]:
        """What diagnostics that are due in the step in progress read; empty if none is."""
        return self._session.due

    def take(self, reads: str, reading: Any) -> None:
        """Measure a reading of the step in progress."""
        self._session.measure(reads, lambda: reading)
        if isinstance(reading, GradientReading):
            self._remember_clipped(reading)
        if isinstance(reading, UpdateReading) and self._updates.has_states:
            self._updates.take(reading)

    def _remember_clipped(self, reading: GradientReading) -> None:
        if reading.clipped and not is_sharded(reading.gradients):
            self._clipped_norms[reading.optimizer] = reading.norm

    def wants_update(self) -> bool:
        """Whether parameters are to be kept from before the step in progress; asked once in it."""
        if self._updates.wants_states and self._call is not None:
            # Its classes were not shown before the step is made.
            call, logits = self._call
            if logits is not None:
                generator = self._generator(logits.device)
                self._updates.keep(Batch.unscored(call, logits), None, None, None, generator)
        return "update" in self.due or self._updates.has_states

    @property
    def wants_calls(self) -> bool:
        """Whether a model's calls are to be told, of the first micro-batch of the step."""
        is_wanted = self._updates.wants_states or self._wants_batch
        return is_wanted and self.phase is Phase.TRAIN

    @property
    def _wants_batch(self) -> bool:
        return self._inspection is not None and self._inspection.wants_batch

    def take_call(self, call: Call, logits: Tensor | None) -> None:
        """Remember what the model was given."""
        if logits is not None:
            self._calls[logits.untyped_storage().data_ptr()] = call
        # Of the logits their shape: they would fill memory until the step ends.
        self._call = call, None if logits is None else logits.new_zeros(()).expand(logits.shape)

    def take_rollout(self, reading: RolloutReading) -> None:
        """Take completions generated for the step in progress; they are measured when it ends."""
        if "rollout" in self.due:
            self._open.rollouts.append(reading)

    def take_preference(self, reading: PreferenceReading) -> None:
        """Take the preferences of one micro-batch; they are measured when the step ends."""
        if "preference" in self.due:
            self._open.preferences.append(reading)

    @property
    def wants_routers(self) -> bool:
        """Whether routers' decisions are due, and none were taken in the step in progress."""
        return "router" in self.due and not self._open.is_routed and self.phase is Phase.TRAIN

    def take_routers(self, reading: RouterReading) -> None:
        """Measure what the routers decided in one training forward: the first of a step."""
        self._open.is_routed = True
        self.take("router", reading)

    def take_forward(self, forward: Forward) -> None:
        """Take a training forward that a tap saw, unless the loop shows its own logits."""
        if self._is_shown or self.phase is not Phase.TRAIN:
            return
        if self.reads_loss and forward.loss is not None:
            self._take_loss(forward.loss, forward.loss_is_sum)
        if forward.tokens is not None and self._reader in (None, forward.tap):
            self._reader = forward.tap
            ids, policy = self.next_sample_ids, self.next_policy
            self.next_sample_ids = self.next_labels = self.next_policy = None
            if policy is not None:
                try:
                    policy.check(forward.tokens.grid.shape)
                except ValueError as error:
                    # What the forward shows by itself is measured all the same.
                    self._session.writer.fault("policy", error)
                    policy = None
            self._take_tokens(forward.tokens, ids, policy, forward.call)

    def take_gradient_norm(self, norm: Tensor | float | None, optimizer: str = "") -> None:
        """Remember an optimiser's norm before clipping, before the optimiser steps."""
        if norm is not None and self.guard is not None:
            self.guard.observe(gradient_norm=norm)
        self._remember_norm(norm, optimizer)

    def _remember_norm(self, norm: Tensor | float | None, optimizer: str = "") -> None:
        if norm is not None and "step" in self.due:
            self._gradient_norms[optimizer] = norm

    def take_gradients(self, optimizer: str = "") -> None:
        """Measure an optimiser's gradients as they are now, before clipping."""
        tap = self._optimizers.get(optimizer)
        if tap is None or "gradients" not in self.due:
            return
        gradients = tap.gradients()
        if gradients:
            norm = total_norm(gradients.values())
            reading = GradientReading(
                gradients=gradients, norm=norm, optimizer=optimizer, clipped=False
            )
            self.take("gradients", reading)

    def expect_step(self, optimizer: str = "") -> None:
        """The trainer is about to have an optimiser step; a gradient scaler may prevent it."""
        tap = self._optimizers.get(optimizer)
        if tap is not None:
            tap.is_expected = True

    @property
    def has_stepped(self) -> bool:
        """Whether an optimiser was called, or expected to be, in the step in progress."""
        return any(tap.calls or tap.is_expected for tap in self._optimizers.values())

    # -- what the loop shows -----------------------------------------------------------------

    def observe(
        self,
        logits: Tensor | None,
        targets: Tensor | None,
        mask: Tensor | None,
        loss: Tensor | None,
        sample_id: Sequence[Any] | Tensor | None,
        shift: bool,
        loss_is_sum: bool,
        optimizer: str,
    ) -> None:
        """Take one micro-batch shown by hand; arguments as of `Lens.observe`."""
        if (logits is None) != (targets is None):
            given, missing = ("logits", "targets") if targets is None else ("targets", "logits")
            raise ValueError(f"Lens.observe: expected logits and targets together, got {given} "
                             f"without {missing}")  # fmt: skip
        if loss is not None:
            self._show_loss(loss, loss_is_sum, optimizer)
        if logits is None or targets is None:
            self._open.name_last(identifiers(sample_id))
            return
        if not self._is_shown:
            self._is_shown = True
            self._open.drop_tokens()
        if shift:
            if logits.ndim != 3 or targets.ndim != 2:
                raise ValueError(
                    f"Lens.observe: expected logits [B, T, V] and targets [B, T] to shift, got "
                    f"shapes {tuple(logits.shape)} and {tuple(targets.shape)}"
                )
            logits, targets = logits[:, :-1], targets[:, 1:]
            mask = None if mask is None else mask[:, 1:]
        self._take_tokens(LogitTokens.of(logits.detach(), targets.detach(), mask), sample_id)

    def observe_policy(
        self,
        source: TokenSource,
        policy: PolicyBatch,
        sample_id: Sequence[Any] | Tensor | None,
        call: Call | None,
    ) -> None:
        """Take one micro-batch of a policy shown by hand, instead of what the model shows."""
        if not self._is_shown:
            self._is_shown = True
            self._open.drop_tokens()
        policy.check(source.grid.shape)
        self._take_tokens(source, sample_id, policy, call)

    def _show_loss(self, loss: Tensor, is_sum: bool, optimizer: str) -> None:
        if self.reads_loss:
            self.reads_loss = False
            self._open.losses.clear()
        self._take_loss(loss, is_sum, optimizer)

    def _take_loss(self, loss: Tensor, is_sum: bool, optimizer: str = "") -> None:
        if self.guard is not None:
            self.guard.observe(loss=loss, loss_is_sum=is_sum)
        if "step" in self.due:
            self._open.add_loss(loss, is_sum=is_sum, optimizer=optimizer)

    def _take_tokens(
        self,
        source: TokenSource,
        sample_id: Sequence[Any] | Tensor | None,
        policy: PolicyBatch | None = None,
        call: Call | None = None,
    ) -> None:
        ids, due = identifiers(sample_id), self.due.keys()
        self._session.clock.start()
        if policy is not None:
            source = policy.narrow(source)
        if self.guard is not None:
            self.guard.show_batch(source.grid, call, has_targets=self._raises_likelihood)
            self.guard.observe(sample_id=ids)
        self._open.count(source)
        generator = self._generator(source.grid.present.device)
        temperature = self._temperature
        if due & _OF_TOKENS:
            rows = self._session.budget.rows
            if rows is not None:
                rows = max(rows // self._micro_batches, _LEAST_ROWS)
            if policy is not None and policy.ratio_level != "token":
                # A sequence's ratio needs all of its tokens.
                rows = None
            self._open.measure(
                source,
                ids,
                rows=rows,
                generator=generator,
                temperature=temperature,
                policy=policy,
            )
        if "sampled" in due and policy is not None and policy.is_own_sample:
            most = max(_SAMPLED_ROWS // self._micro_batches, _LEAST_ROWS)
            self._open.sample(source, rows=most, generator=generator, temperature=temperature)
        batch = self._batch(source, call)
        self._updates.keep(batch, source, policy, ids, generator)
        if self._inspection is not None:
            self._inspection.keep(batch, self._number, generator)
        self._session.clock.stop()

    def _batch(self, source: TokenSource, call: Call | None) -> Batch | None:
        """What is known of a training forward: its call, and the classes it is scored on."""
        logits = source.logits if isinstance(source, LogitTokens) else None
        calls, self._calls = self._calls, {}
        if call is None and logits is not None:
            # Of several forwards the one whose logits these are.
            call = calls.get(logits.untyped_storage().data_ptr())
        if call is None and self._call is not None:
            call, _ = self._call
        if call is None:
            return None
        classes = 0 if logits is None else logits.shape[-1]
        return Batch(call=call, grid=source.grid, classes=classes)

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
        if device not in self._seeded:
            self._seeded.add(device)
            self._generators[device].manual_seed((self._seed + self._number) % (1 << 63))
        return self._generators[device]

    # -- the end of a step -------------------------------------------------------------------

    def begin(self, number: int) -> None:
        """Begin an optimiser step."""
        self._session.begin_step(number)
        self._open = MicroBatches()
        self.next_sample_ids = self.next_labels = self.next_policy = None
        self._updates.begin(number)
        if self._bounding is not None:
            self._bounding.begin(number)
        self._call, self._calls = None, {}
        self._restart(number)

    def pass_step(self, number: int) -> None:
        """End a step in which nothing was due: nothing was gathered."""
        self.tokens_seen = None
        self._restart(number + 1)

    def forget_calls(self) -> None:
        """Have `has_stepped` ask for new calls: a step that is not looked at leaves it as it is."""
        for tap in self._optimizers.values():
            tap.forget_calls()

    def _restart(self, number: int) -> None:
        self._number = number
        self._seeded.clear()
        self._gradient_norms.clear()
        self._clipped_norms.clear()
        for tap in self._optimizers.values():
            tap.begin_step()

    def end(
        self,
        stamp: Stamp,
        loss: Tensor | float | None,
        gradient_norm: Tensor | float | None,
        seconds: float,
    ) -> None:
        """Measure what the step in progress gathered."""
        opened, session = self._open, self._session
        self._updates.ration.pay()
        self._look_inside(stamp)
        try:
            self._drop_taps(is_loss_shown=loss is not None)
            self._note_skipped(stamp)
            if not session.due:
                self.tokens_seen = None
            elif opened.tokens is not None and self.tokens_seen is not None:
                self.tokens_seen = self.tokens_seen + opened.tokens
            if opened.measured:
                self._micro_batches = opened.measured
                session.measure("tokens", opened.reading)
                if opened.is_policy:
                    session.measure("policy", opened.policy_reading)
            elif "tokens" in session.due:
                self._note_silence(stamp)
            if opened.rollouts:
                session.measure("rollout", opened.rollout_reading, Phase.ROLLOUT)
            if opened.has_samples:
                session.measure("sampled", opened.sampled_reading)
            if opened.preferences:
                session.measure("preference", opened.preference_reading)
            self._remember_norm(gradient_norm)
            session.measure("step", lambda: self._step_reading(loss, seconds))
            if self._bounding is not None:
                session.measure("control", self._bounding.reading)
        finally:
            session.end_step(stamp, opened.slots)

    def _look_inside(self, stamp: Stamp) -> None:
        """Look at weights, and at what the model makes of its probe set, as far as that is due."""
        visits, inspection = self._visits, self._inspection
        if visits is not None:
            visits.ration.pay()
            self._session.aside("weights", lambda: visits.visit(stamp))
        if inspection is not None:
            inspection.ration.pay()
            if self._call is not None and self._open.tokens is None:
                self._session.aside("probe set", partial(self._keep_unscored, inspection))
            self._session.aside("probe set", lambda: inspection.inspect(stamp))

    def _keep_unscored(self, inspection: Inspection) -> None:
        assert self._call is not None
        call, logits = self._call
        batch = Batch.of_rows(call) if logits is None else Batch.unscored(call, logits)
        inspection.keep(batch, self._number, self._generator(self._device))

    def _drop_taps(self, *, is_loss_shown: bool) -> None:
        """Once logits and loss are shown by hand nothing is read from the model any more."""
        if is_loss_shown:
            self.reads_loss = False
        if self._is_shown and not self.reads_loss:
            self._remove_taps()

    def _note_silence(self, stamp: Stamp) -> None:
        """Say once that nothing has been seen of any token, in case somebody waits for it."""
        has_seen = self._reader is not None or self._is_shown
        self._silent_steps += 1
        if self._silent_steps == _SILENT_STEPS and not has_seen:
            self._session.writer.event("capture", _NOTHING_SEEN, step=stamp.step)

    def _note_skipped(self, stamp: Stamp) -> None:
        """Steps before an optimiser's first call were skipped, if that call comes at all."""
        taps = self._optimizers
        if len(taps) == 1:
            next(iter(taps.values())).is_expected = True
        for name, tap in taps.items():
            unseen = self._unseen.setdefault(name, [])
            if tap.was_called:
                for earlier in unseen:
                    rows = {"name": ["optimizer/skipped"], "module": name, "value": [1.0]}
                    self._session.add(Block("metrics", rows), earlier)
                unseen.clear()
            elif tap.is_expected and len(unseen) < _MOST_UNSEEN:
                unseen.append(stamp)

    def _step_reading(self, loss: Tensor | float | None, seconds: float) -> StepReading:
        opened, session = self._open, self._session
        if loss is None:
            loss = opened.loss()
        overhead, session.overhead = session.overhead, None
        reviewed = overhead is not None
        names = dict.fromkeys([*self._optimizers, *opened.losses, *self._gradient_norms])
        return StepReading(
            loss=self._whole("loss", loss),
            optimizers=[self._optimizer_reading(name) for name in names],
            tokens=opened.tokens,
            tokens_seen=None if opened.tokens is None else self.tokens_seen,
            seconds=seconds,
            device_memory=allocated_bytes(self._device) if reviewed else None,
            resident_memory=resident_bytes() if reviewed else None,
            overhead=overhead,
            rows=session.budget.rows if reviewed else None,
            widening=session.budget.widening if reviewed else None,
        )

    def _optimizer_reading(self, name: str) -> OptimizerReading:
        tap = self._optimizers.get(name)
        return OptimizerReading(
            name=name,
            loss=self._whole("loss", self._open.loss(name)) if name else None,
            learning_rates=() if tap is None else tap.rates,
            gradient_norm_before_clip=self._whole("gradient norm", self._gradient_norms.get(name)),
            gradient_norm_after_clip=self._clipped_norms.get(name),
            skipped=None if tap is None else tap.skipped(),
        )

    def _whole(self, what: str, value: Tensor | float | None) -> Tensor | float | None:
        """A copy of a number; a distributed one only where every rank has the whole of it."""
        if not isinstance(value, Tensor):
            return value
        if not hasattr(value, "full_tensor"):
            return value.detach().clone()
        placements, local = getattr(value, "placements", ()), getattr(value, "to_local", None)
        if local is not None and all(placement.is_replicate() for placement in placements):
            return local().detach().clone()
        error = TypeError(
            f"expected one that this rank knows, got a {type(value).__name__} {placements}; pass "
            f"its full_tensor(), on every rank"
        )
        self._session.writer.fault(what, error)
        return None

    def stamp(self, step: int, phase: str | None = None) -> Stamp:
        """A stamp of this moment."""
        return Stamp(step, time(), phase or self.phase)
