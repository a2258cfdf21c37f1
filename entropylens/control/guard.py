"""`StepGuard`: keeps the steps of one optimiser within a `StepBound`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import isfinite, isnan, nan
from operator import is_
from typing import Any, Final, NoReturn
from warnings import warn

import torch
from torch import Tensor, nn

from entropylens.capture.asking import obstacle, wide
from entropylens.capture.call import Call
from entropylens.capture.inputs import InputsTap
from entropylens.capture.optimizer import unwrap_optimizer, with_closure
from entropylens.capture.probe import Batch
from entropylens.capture.tokens import Grid
from entropylens.control.batch_norm import RunningStatistics
from entropylens.control.looking import Look, Looker, agree
from entropylens.control.memory import OF_BATCHES, Memory
from entropylens.control.norms import (
    as_number,
    norm_of,
    parts_of,
    read,
    stored,
    sum_of_squares,
    values_of,
)
from entropylens.control.policies import POLICIES
from entropylens.control.ranks import is_sharded, joint_norm, local, ranks
from entropylens.control.ring import Ring
from entropylens.control.signals import Admission, GradientSignals, UpdateSignals
from entropylens.control.step_bound import StepBound, admit, decide

__all__ = ["Action", "StepGuard"]

_NOT_SETTINGS: Final = frozenset(("params", "lr", "initial_lr", "param_names"))


@dataclass(frozen=True, kw_only=True)
class Action:
    """What was done to a step, or in shadow mode would have been."""

    step: int
    mode: str
    cause: str
    """What bound it: as in `Admission` or `Decision`."""
    scale: float
    """Factor of the gradients where they were the cause, else of the update; 0 is no step."""
    suspicions: tuple[str, ...]
    evidence: Mapping[str, Any] = field(default_factory=dict)


class StepGuard:
    """Bounds the steps of an optimiser while a model trains, in any loop.

    Everything happens within ``optimizer.step()``. Before it the gradients' norm is judged (that is
    the one thing read from the device in a step): gradients that are suspiciously large are brought
    to their usual size before moments see them, those that are not finite are dropped. After a step
    that was suspicious for any reason the model is asked what the update does to its logits on rows
    of the last ordinary batch, and the whole update is scaled back as far as the policy says;
    moments stay as they are, for their gradients were ordinary. Batch-norm statistics of a batch
    with suspicious gradients are put back.

    A plain loop without a log::

        guard = StepGuard(model, optimizer, StepBound(mode="enforce"))
        loss = cross_entropy(model(x), y)
        loss.backward()
        guard.observe(targets=y, loss=loss)
        optimizer.step()

    With a log pass the bound to `entropylens.Lens` as ``control``.

    Args:
        model: What the optimiser trains; its forwards with gradients are seen by a hook.
        optimizer: A torch optimiser, or a wrapper of one.
        bound: How.
        temperature: At which the loss reads the logits.
        seed: Of the choice of rows to look at; the training's own generators are never touched.
        state: What `state_dict` gave.
        report: Told each `Action`, and with ``(None, message)`` what cannot be done.
        run: Runs our work so that neither its errors nor its time escape unseen; by default errors
            become warnings.

    Raises:
        TypeError: ``optimizer`` is none.
        ValueError: It is one that searches along a line by itself (LBFGS).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        bound: StepBound,
        *,
        temperature: float = 1.0,
        seed: int = 0,
        state: Mapping[str, Any] | None = None,
        report: Callable[[Action | None, str], None] | None = None,
        run: Callable[[str, Callable[[], None]], None] | None = None,
    ) -> None:
        self.bound = bound
        self.looks = self.interventions = self.updates = 0
        """Steps that were looked at, bounded, made (a dropped one is not)."""
        self._optimizer = unwrap_optimizer(optimizer)
        if isinstance(self._optimizer, torch.optim.LBFGS):
            raise ValueError(
                "StepGuard: expected an optimiser that makes one update a step, got LBFGS, which "
                "searches along a line by itself"
            )
        self._report = report or (lambda action, message: None)
        self._run = run or _quietly
        known = {} if state is None else state
        self._memory = Memory(bound.window, bound.settle, bound.patience, known.get("memory"))
        self._step = int(known.get("step", self._memory.steps))
        self._looker: Looker | None = None
        self._held: _Held | None = None
        self._is_judged = False
        """Whether the step in progress is to be judged, by all ranks if by any."""
        self._set_aside: list[tuple[Tensor, Tensor]] = []
        """Parameters and gradients that the optimiser is not to see in the step in progress."""
        self._call: Call | None = None
        self._logits: tuple[torch.Size, torch.device] | None = None
        """Their shape and device, not what they hold."""
        self._batch: Callable[[], Batch] | None = None
        """Made when it is looked at, which is rare."""
        self._unshown: tuple[Call, int] | None = None
        """Call and classes of an ordinary step whose targets have not been shown."""
        self._last_ordinary: Callable[[], Batch] | None = None
        self._is_bad_batch = False
        self._shown: dict[str, Any] = {}
        self._settings_known: tuple[list[Any], tuple[float, ...]] = [], ()
        """Values in the parameter groups, and the numbers among them."""
        self._statistics = RunningStatistics(model)
        self._is_flat = any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules())
        """Whether parameters are sharded without a sign of it."""
        self._alarm: tuple[int | None, int] = None, 0
        """First and last step of the last row of steps that were bounded."""
        self._ring = Ring(model, self._optimizer, bound.ring) if bound.ring else None
        self._handles: list[Any] = []
        self._tap: InputsTap | None = None
        if bound.mode == "off":
            return
        self._prepare(model, temperature, seed)
        self._statistics.keep()
        self._tap = InputsTap(model, self, self._run)
        self._handles = [
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
        ]

    def _prepare(self, model: nn.Module, temperature: float, seed: int) -> None:
        reason = obstacle(model)
        if reason is None:
            self._looker = Looker(model, temperature, seed)
        else:
            self._report(None, f"steps are bounded without looking at logits: {reason}")

    def close(self) -> None:
        """Take all hooks out and free what is held."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._tap is not None:
            self._tap.remove()
        self._tap = None
        self.begin()
        self._held = self._last_ordinary = self._unshown = None
        self._statistics.forget()
        self._ring = None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs so that a resumed training decides as an uninterrupted one."""
        return {"memory": self._memory.state_dict(), "step": self._step}

    def accept(self) -> None:
        """Take the learning rate and the settings as they are now for ordinary ones."""
        self._memory.accept(float(self._rate()), self._settings())

    def rewind(self) -> int:
        """Take model and optimiser back to the newest copy from before the last alarm.

        Learning-rate schedulers, data order and random state stay where they are.

        Returns:
            The step after which the copy was taken.

        Raises:
            ValueError: No copies are kept (``StepBound(ring=...)``), or none is that old.
        """
        if self._ring is None:
            raise ValueError(
                "StepGuard.rewind: expected copies to be kept, got none; use StepBound(ring=3)"
            )
        began, _ = self._alarm
        return self._ring.rewind(self._step + 1 if began is None else began)

    # -- what a loop shows -------------------------------------------------------------------

    def begin(self) -> None:
        """Begin a step: what was shown since the last one was of that, or of one not made."""
        self._batch = self._call = self._logits = None
        self._shown = {}

    def observe(
        self,
        *,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
        loss: Tensor | float | None = None,
        loss_is_sum: bool = False,
        gradient_norm: Tensor | float | None = None,
        sample_id: Sequence[Any] | None = None,
    ) -> None:
        """Show what is known of the coming step.

        Args:
            targets: ``[B]`` or ``[B, ...]``, the classes of the micro-batch that the model was last
                given; below 0 is masked. Without them the linearised loss is not known.
            mask: As ``targets``, true where one is scored.
            loss: ``[]``, this micro-batch's; the step's is their mean.
            loss_is_sum: The loss is this micro-batch's share of the step's, to be added up.
            gradient_norm: Before clipping; by default the norm that the optimiser sees.
            sample_id: Names of the samples, for the log.
        """
        if self._tap is None:
            return
        if targets is not None and self._batch is None:
            self._take_batch(_scored(targets, mask))
        if loss is not None:
            # A copy: trainers go on to scale it in place.
            kept = wide(loss.detach().clone()) if isinstance(loss, Tensor) else loss
            self._shown.setdefault("losses", []).append(kept)
            self._shown["loss_is_sum"] = loss_is_sum
        if gradient_norm is not None:
            self._shown["norm"] = gradient_norm
        if sample_id is not None:
            self._shown.setdefault("samples", []).extend(str(one) for one in sample_id)

    def take_gradients(self) -> None:
        """Take the gradients' norm as it is now, because they are to be clipped."""
        gradients = [p.grad for p in self._parameters() if p.grad is not None]
        if gradients and self._tap is not None:
            self._shown["squares"] = sum_of_squares(gradients)

    @property
    def wants_calls(self) -> bool:
        """Whether the model's calls are to be told: of the first micro-batch of a step."""
        return True

    def take_call(self, call: Call, logits: Tensor | None) -> None:
        """A training forward has ended."""
        self._call, self._unshown = call, None
        self._logits = None if logits is None else (logits.shape, logits.device)

    def show_batch(self, grid: Grid, call: Call | None = None, *, has_targets: bool = True) -> None:
        """Show the classes that a call is scored on; of several micro-batches the first counts.

        Shown only when the step has been made, they serve for the steps to come.

        Args:
            grid: The classes.
            call: By default the last that a hook saw.
            has_targets: Whether it is their likelihood that the loss raises.
        """
        self._take_batch(lambda: grid, call, has_targets)

    def _take_batch(
        self, grid: Callable[[], Grid], call: Call | None = None, has_targets: bool = True
    ) -> None:
        if call is None and self._unshown is not None:
            call, classes = self._unshown
            self._last_ordinary = partial(_batch, call, grid, has_targets, classes)
            self._unshown = None
            return
        call = call or self._call
        if call is not None and self._batch is None:
            self._batch = partial(_batch, call, grid, has_targets, self._classes())

    def _classes(self) -> int:
        return 0 if self._logits is None else self._logits[0][-1]

    # -- hooks -------------------------------------------------------------------------------

    def _before_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            return None
        self._held, self._is_judged, self._set_aside = None, False, []
        ready = partial(self._run, "step bound", self._admit)
        try:
            watched = with_closure(args, kwargs, ready)
        except Exception as error:
            self._run("step bound", partial(_raise, error))
            return None
        if watched is None:
            ready()
        return watched

    def _after_step(self, *_: Any) -> None:
        held, self._held = self._held, None
        for parameter, gradient in self._set_aside:
            parameter.grad = gradient
        self._set_aside = []
        if self._is_judged:
            self._run("step bound", partial(self._judge, held))
        self._end()

    def _end(self) -> None:
        self._unshown = None
        if not self._is_bad_batch:
            if self._batch is not None:
                self._last_ordinary = self._batch
            elif self._call is not None:
                self._unshown = self._call, self._classes()
        self._batch = self._call = self._logits = None
        self._shown = {}
        self._statistics.keep()
        is_due = self._step % self.bound.ring_every == 0 and not self._is_bad_batch
        if self._ring is not None and is_due:
            self._run("checkpoint ring", partial(self._ring.take, self._step))

    # -- before the optimiser ----------------------------------------------------------------

    def _admit(self) -> None:
        self._step += 1
        self._is_bad_batch = False
        parameters = [p for p in self._parameters() if p.grad is not None]
        if not parameters and ranks() == 1:
            return
        with torch.no_grad():
            seen = self._gradient_signals([p.grad for p in parameters if p.grad is not None])
            if seen is None:
                # A gradient scaler has found an overflow, and the optimiser leaves the step out
                # itself; or some rank has nothing to tell.
                return
            admission = admit(self.bound, self._memory, seen)
            self._is_bad_batch = bool(OF_BATCHES & {*admission.suspicions})
            enforces, scale = self.bound.mode == "enforce", admission.gradient_scale
            if 0 < scale < 1:
                # They may have been clipped since their norm was taken.
                scale = min(scale * seen.norm / self._norm(parameters), 1.0)
            # What the optimiser would have made of other gradients is not known in shadow.
            keeps = admission.keep and (enforces or scale == 1)
            self._is_judged = keeps
            typical = self._memory.gradients.median()
            self._memory.take_gradients(seen, admission)
            self.looks += keeps and admission.look
            self.updates += not (enforces and scale == 0)
            # Whatever fails further on, bad gradients do not get by.
            if enforces and scale == 0:
                self._set_aside = [(p, p.grad) for p in parameters if p.grad is not None]
                for parameter in parameters:
                    parameter.grad = None
            elif enforces and scale < 1:
                torch._foreach_mul_([stored(p.grad) for p in parameters], scale)
            if self._is_bad_batch and enforces:
                self._statistics.put_back()
            if keeps:
                before = [p.clone() for p in parts_of(parameters)]
                self._held = _Held(parameters, before, admission, seen.rate)
            if scale < 1:
                self._note(
                    admission.cause,
                    scale,
                    admission.suspicions,
                    {"gradient_norm": seen.norm, "typical": typical, "loss": seen.loss},
                )

    def _gradient_signals(self, gradients: list[Tensor]) -> GradientSignals | None:
        told = self._shown.get("norm")
        # Without one rank's numbers, for which the others wait, nobody acts.
        known: list[Any] = [0.0, nan, nan, 0.0, 1.0]
        try:
            if gradients:
                size = self._squares(gradients) if told is None else told
                overflows = getattr(self._optimizer, "found_inf", None)
                leaves_out = 0.0 if overflows is None else overflows
                known = [size, self._loss(), self._statistics.moved(), self._rate(), leaves_out]
        except Exception as error:
            if ranks() == 1:
                raise
            self._run("step bound", partial(_raise, error))
        if ranks() > 1:
            # Of sharded gradients every rank has a part; else all have the same.
            are_parts = told is None and self._are_parts()
            like = torch.zeros((), device=self._device())
            joined = torch.stack([as_number(one, like) for one in known])
            if told is not None:
                joined[0].square_()
            joined[int(are_parts) :] /= ranks()
            torch.distributed.all_reduce(joined)
            known = [*joined]
        found_size, loss, moved, rate, left_out = read(known)
        if left_out > 0:
            return None
        return GradientSignals(
            norm=found_size**0.5 if told is None or ranks() > 1 else found_size,
            loss=None if isnan(loss) else loss,
            statistics=None if isnan(moved) else moved,
            rate=rate,
            settings=self._settings(),
        )

    def _squares(self, gradients: list[Tensor]) -> Tensor:
        squares: Tensor | None = self._shown.get("squares")
        if squares is not None:
            return squares
        return sum_of_squares(gradients, getattr(self._optimizer, "grad_scale", None))

    def _norm(self, parameters: list[Tensor]) -> float:
        """Of the gradients as the optimiser is about to use them."""
        own = norm_of(values_of([p.grad for p in parameters if p.grad is not None]))
        norm = joint_norm(own, self._are_parts(), self._device())
        assert norm is not None
        scale = getattr(self._optimizer, "grad_scale", None)
        return norm / (1.0 if scale is None else scale.item())

    def _loss(self) -> Tensor | float:
        """The step's; NaN where none was shown."""
        losses = self._shown.get("losses", [nan])
        total = sum(losses[1:], losses[0])
        return total / len(losses) if len(losses) > 1 and not self._shown["loss_is_sum"] else total

    # -- after the optimiser -----------------------------------------------------------------

    def _judge(self, held: _Held | None) -> None:
        with torch.no_grad():
            update, own = self._proposed(held)
            norm = joint_norm(own, self._are_parts(), self._device())
            if held is None or norm is None:
                # Where one rank cannot act none does: their weights would part.
                return
            is_finite = isfinite(norm)
            if not is_finite:
                for one in update:
                    one.nan_to_num_(0.0, 0.0, 0.0)
                norm = joint_norm(norm_of(update), self._are_parts(), self._device())
                assert norm is not None
            look = self._look(held, update) if held.admission.look else Look(None, None)
            signals = UpdateSignals(
                norm=norm,
                rate=held.rate,
                is_finite=is_finite,
                ratio=look.ratio,
                losses=look.losses,
                suspicions=held.admission.suspicions,
            )
            decision = decide(self.bound, self._memory, signals)
            if decision.cause and self.bound.mode == "enforce":
                current = parts_of(held.parameters)
                torch._foreach_copy_(current, held.before)
                if decision.scale > 0:
                    torch._foreach_add_(current, update, alpha=decision.scale)
            evidence = self._evidence(signals)
            policy = POLICIES[self.bound.policy]
            always = policy.measures_always or policy.looks_always
            self._memory.take_update(signals, decision, always=always)
            if decision.cause:
                self._note(decision.cause, decision.scale, signals.suspicions, evidence)

    def _proposed(self, held: _Held | None) -> tuple[list[Tensor], float | None]:
        """An update and its norm; None where this rank does not know it."""
        if held is None:
            return [], None
        try:
            update = list(torch._foreach_sub(parts_of(held.parameters), held.before))
            return update, norm_of(update)
        except Exception as error:
            # The other ranks wait for this one's norm.
            self._run("step bound", partial(_raise, error))
            return [], None

    def _look(self, held: _Held, update: list[Tensor]) -> Look:
        shown = self._last_ordinary if self.bound.policy == "combined" else None
        shown = shown or self._batch
        if shown is None and self._call is not None and self._logits is not None:
            shown = partial(_unscored, self._call, *self._logits)
        found = None
        try:
            if self._looker is not None and shown is not None:
                batch = shown()
                found = self._looker.look(held.parameters, held.before, update, batch, self._step)
        except Exception as error:
            # The other ranks wait for this one's answer all the same.
            self._looker = None
            self._run("step bound: look", partial(_raise, error))
        return agree(found, update[0].device)

    # -- within ------------------------------------------------------------------------------

    def _parameters(self) -> list[Tensor]:
        groups = self._optimizer.param_groups
        return [p for group in groups for p in group["params"] if p.requires_grad]

    def _are_parts(self) -> bool:
        """Whether this rank has but parts of parameters and gradients."""
        return ranks() > 1 and (self._is_flat or is_sharded(self._parameters()))

    def _device(self) -> torch.device:
        device: torch.device = local(self._optimizer.param_groups[0]["params"][0]).device
        return device

    def _rate(self) -> Tensor | float:
        """The largest of any group; 1 of an optimiser that finds its own."""
        given = [group.get("lr") for group in self._optimizer.param_groups]
        rates = [1.0 if rate is None else rate for rate in given]
        like = next((rate for rate in rates if isinstance(rate, Tensor)), None)
        if like is None:
            return max(map(float, rates))
        return torch.stack([as_number(rate, like) for rate in rates]).amax()

    def _settings(self) -> tuple[float, ...]:
        values = [
            value
            for group in self._optimizer.param_groups
            for name, value in group.items()
            if name not in _NOT_SETTINGS
        ]
        known, numbers = self._settings_known
        if len(known) == len(values) and all(map(is_, known, values)):
            return numbers
        found: list[float] = []
        for value in values:
            parts = value if isinstance(value, tuple | list) else (value,)
            found += [float(p) for p in parts if isinstance(p, int | float)]
        numbers = tuple(found)
        # A list may be changed and stay the same object.
        is_fixed = not any(isinstance(value, list) for value in values)
        self._settings_known = (values, numbers) if is_fixed else ([], ())
        return numbers

    def _evidence(self, signals: UpdateSignals) -> dict[str, Any]:
        evidence = {
            "update_norm": signals.norm,
            "typical": self._memory.typical_update(signals.rate),
            "rate": signals.rate,
            "highest_rate": self._memory.highest_rate,
        }
        if signals.ratio is not None:
            evidence["ratio"] = signals.ratio
        if signals.losses is not None:
            evidence |= {"loss_without": signals.losses[-1], "loss_with": signals.losses[0]}
        return evidence

    def _note(
        self, cause: str, scale: float, suspicions: tuple[str, ...], evidence: dict[str, Any]
    ) -> None:
        began, last = self._alarm
        self.interventions += began is None or self._step > last
        goes_on = began is not None and self._step <= last + self.bound.settle
        self._alarm = began if goes_on else self._step, self._step
        if samples := self._shown.get("samples"):
            evidence["samples"] = samples[:32]
        action = Action(
            step=self._step,
            mode=self.bound.mode,
            cause=cause,
            scale=scale,
            suspicions=suspicions,
            evidence=evidence,
        )
        self._report(action, "")


@dataclass(frozen=True)
class _Held:
    """Parameters from before a step, and what was said of it then."""

    parameters: list[Tensor]
    before: list[Tensor]
    admission: Admission
    rate: float


def _batch(call: Call, grid: Callable[[], Grid], has_targets: bool, classes: int) -> Batch:
    return Batch(call=call, grid=grid(), has_targets=has_targets, classes=classes)


def _unscored(call: Call, shape: torch.Size, device: torch.device) -> Batch:
    return Batch.unscored(call, torch.empty((), device=device).expand(shape))


def _scored(targets: Tensor, mask: Tensor | None) -> Callable[[], Grid]:
    """Which classes are scored; what does not fit is refused at once."""
    rows = targets.shape[0]
    if mask is None:
        return partial(_grid, targets, rows)
    flat = targets.detach().reshape(rows, -1)
    grid = Grid(targets=flat, present=(flat >= 0) & mask.reshape(rows, -1).bool())
    return lambda: grid


def _grid(targets: Tensor, rows: int) -> Grid:
    flat = targets.detach().reshape(rows, -1)
    return Grid(targets=flat, present=flat >= 0)


def _quietly(where: str, work: Callable[[], None]) -> None:
    try:
        work()
    except Exception as error:
        warn(f"entropylens: {where}: {type(error).__name__}: {error}", RuntimeWarning, 2)


def _raise(error: Exception) -> NoReturn:
    raise error
