"""`Bounding`: the `StepGuard` of a run, and what it tells the run's log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from entropylens.control import Action, StepBound, StepGuard
from entropylens.readings import ControlReading
from entropylens.session import Session

__all__ = ["Bounding"]


class Bounding:
    """Bounds the steps of a run's one optimiser, and writes each action as an event.

    Of actions with one cause in steps that follow each other the first, second, fourth, ... are
    written, each with the number of steps so far.

    Args:
        session: Of the run.
        model: What is trained.
        optimizers: There must be one.
        bound: How steps are bounded.
        temperature: At which the loss reads the logits.
        seed: Of the choice of rows to look at.
        state: What `StepGuard.state_dict` gave at a checkpoint.

    Raises:
        ValueError: There is no model, or not exactly one optimiser.
    """

    def __init__(
        self,
        session: Session,
        model: nn.Module | None,
        optimizers: Mapping[str, Optimizer],
        bound: StepBound,
        *,
        temperature: float,
        seed: int,
        state: Mapping[str, Any] | None,
    ) -> None:
        if model is None or len(optimizers) != 1:
            raise ValueError(
                f"Lens: expected a model and one optimiser to bound the steps of (control=), got "
                f"{'no model' if model is None else 'a model'} and {len(optimizers)} optimisers"
            )
        self._session, self._mode = session, bound.mode
        self._number = 0
        self._scale = 1.0
        self._rows: dict[str, tuple[int, int]] = {}
        """Step of the last action by its cause, and how many before it were alike."""
        self.guard = StepGuard(
            model,
            next(iter(optimizers.values())),
            bound,
            temperature=temperature,
            seed=seed,
            state=state,
            report=self._report,
            run=session.aside,
        )

    def begin(self, number: int) -> None:
        """Begin a step of the run."""
        self._number, self._scale = number, 1.0
        self.guard.begin()

    def reading(self) -> ControlReading:
        """What was done in the step in progress, and since the run began."""
        return ControlReading(
            step_scale=self._scale,
            looks=self.guard.looks,
            interventions=self.guard.interventions,
        )

    def _report(self, action: Action | None, message: str) -> None:
        write = self._session.writer.event
        if action is None:
            write("capture", message, step=self._number)
            return
        self._scale *= action.scale
        step, alike = self._rows.get(action.cause, (-1, 0))
        alike = alike + 1 if step == action.step - 1 else 0
        self._rows[action.cause] = action.step, alike
        count = alike + 1
        if count & alike:
            return
        write(
            "control",
            _words(action, count),
            rule="step_bound",
            severity="warning",
            step=self._number,
            evidence={**action.evidence, "suspicions": [*action.suspicions], "in_a_row": count},
            before=1.0,
            after=action.scale,
            mode=action.mode,
        )


_CAUSES = {
    "gradient": "the gradients were far larger than usual",
    "gradient not finite": "a gradient was not finite",
    "batch": "the batch was out of the ordinary in more than one way",
    "update norm": "the update was far larger than usual",
    "radius": "the update left the safe radius of the logits",
    "linearised loss": "the update would have raised the loss of the last ordinary batch",
    "not finite": "entries of the update were not finite",
}


def _words(action: Action, count: int) -> str:
    what = "gradients" if action.cause.startswith("gradient") else "update"
    is_shadow = action.mode == "shadow"
    if action.scale == 0:
        done = "the step would have been left out" if is_shadow else "the step was left out"
    elif action.scale < 1:
        verb = "would have been scaled" if is_shadow else "scaled"
        done = f"{what} {verb} to {action.scale:.3g} of what came"
    else:
        done = "they would have been left out" if is_shadow else "they were left out"
    again = f" ({count} steps in a row)" if count > 1 else ""
    return f"{_CAUSES[action.cause]}: {done}{again}"
