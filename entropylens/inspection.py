"""`Inspection`: hidden states and attention on a probe set, as often as time allows."""

from __future__ import annotations

from time import perf_counter
from typing import Final

import torch
from torch import nn

from entropylens.capture.asking import obstacle
from entropylens.capture.insides import Insides, ProbeSet, Seen
from entropylens.capture.probe import Batch
from entropylens.ration import Ration
from entropylens.session import Session
from entropylens.transfer import Stamp

__all__ = ["Inspection"]

SHARE: Final = 1 / 12
"""Of the limit of overhead, that inspections may take."""
_NO_LAYER: Final = (
    "no representation/*: no layer stands before the head; name some (ProbeSet(layers=...))"
)
_LONE: Final = (
    "no representation/dsmi_labels: {} classes have one row in the probe set, whose spread cannot "
    "be compared with others', as with labels that are tokens"
)
_MOST_FAILURES: Final = 3
"""Times that memory may not have been enough."""


class Inspection:
    """Gathers a probe set from the first training batches and runs the model on it now and then.

    A model that raises is not inspected again, and an event says why; so it is where rows cannot be
    cut out of what it is given.

    Args:
        session: Of the run.
        wanted: Probe set, layers and number of rows.
    """

    def __init__(self, session: Session, wanted: ProbeSet) -> None:
        self.ration = Ration(session.budget, SHARE)
        self._session, self._wanted = session, wanted
        self._insides: Insides | None = None
        self._has_attention = True
        self._failures = 0
        self._has_told_of_classes = False

    def ask(self, model: nn.Module, number: int, generator: torch.Generator) -> list[str]:
        """Inspect this model, from step ``number`` on, if it is one that can be inspected.

        Returns:
            What can be read of it.

        Raises:
            ValueError: A pattern of layers fits no module, or the inputs are none.
        """
        reason = obstacle(model)
        if reason is not None:
            self._give_up(reason, number)
            return []
        insides = Insides(model, self._wanted)
        if self._wanted.inputs is not None and not insides.keep(
            self._wanted.batch(model), generator
        ):
            self._give_up("rows cannot be cut out of the probe set's inputs", number)
            return []
        self._insides = insides
        if insides.rows and not insides.layers:
            self._say(_NO_LAYER, number)
        return ["representation", "attention"]

    @property
    def wants_batch(self) -> bool:
        """Whether a training batch is to be kept."""
        insides = self._insides
        return insides is not None and self._wanted.inputs is None and not insides.is_complete

    def keep(self, batch: Batch | None, number: int, generator: torch.Generator) -> None:
        """Keep rows of a training batch, if any are wanted."""
        insides = self._insides
        if not self.wants_batch or insides is None:
            return
        if batch is None:
            self._give_up("what it is given is not shown", number)
            return
        names, is_first = ", ".join(batch.call.kwargs) or "positional ones", not insides.rows
        try:
            is_kept = insides.keep(batch, generator)
        except Exception as error:
            self._give_up(f"rows of its inputs ({names}) cannot be kept: {_brief(error)}", number)
            return
        if is_kept and is_first and not insides.layers:
            self._say(_NO_LAYER, number)
        if not is_kept:
            self._give_up(f"rows cannot be cut out of its inputs ({names})", number)
        elif insides.is_complete:
            what = "positions" if insides.are_tokens else "rows"
            message = (
                f"representations and attention are measured on {insides.rows} {what} of training "
                f"batches up to step {number}; after a resume on others, unless "
                f"ProbeSet(inputs=...) is given"
            )
            self._session.writer.event("probe_set", message, step=number)

    def inspect(self, stamp: Stamp) -> None:
        """Run the model on the probe set, at the end of a step, if that is due and paid for."""
        session, insides = self._session, self._insides
        if insides is None or not insides.rows or self.wants_batch:
            return
        states = "representation" in session.due and bool(insides.layers)
        attention = "attention" in session.due and self._has_attention
        if not (states or attention) or not (self.ration.is_open and session.can_decompose):
            return
        began = perf_counter()
        session.clock.start()
        try:
            seen = self._seen(insides, stamp.step, states=states, attention=attention)
        finally:
            session.clock.stop()
            self.ration.charge(perf_counter() - began)
        if seen is not None:
            began = perf_counter()
            self._measure(insides, seen, stamp)
            self.ration.charge(perf_counter() - began)

    def _seen(self, insides: Insides, number: int, *, states: bool, attention: bool) -> Seen | None:
        """What a look sees; None where it cannot look, of which the second time is the last."""
        try:
            seen = insides.look(states=states, attention=attention)
        except Exception as error:
            if states and attention and self._can_do_without_attention(insides, number, error):
                return None
            self._failures += 1
            if self._failures >= _MOST_FAILURES or not isinstance(error, torch.OutOfMemoryError):
                self._give_up(_brief(error), number)
            return None
        if attention and seen.attention is None:
            self._has_attention = False
        if states and not seen.states:
            insides.layers = []
            self._say("no representation/*: no layer gave states of each row", number)
        return seen

    def _can_do_without_attention(self, insides: Insides, number: int, error: Exception) -> bool:
        """Some kernels cannot be looked at while they run."""
        try:
            insides.look(states=True, attention=False)
        except Exception:
            return False
        self._has_attention = False
        self._say(f"no attention/*: {_brief(error)}", number)
        return True

    def _measure(self, insides: Insides, seen: Seen, stamp: Stamp) -> None:
        session, attention = self._session, seen.attention
        if seen.states:
            tensors = insides.tensors(seen)
            session.decompose("representation", tensors, insides.reading, stamp, self.ration.owe)
            if insides.lone_classes and not self._has_told_of_classes:
                self._has_told_of_classes = True
                self._say(_LONE.format(insides.lone_classes), stamp.step)
        if attention is not None:
            session.measure("attention", lambda: attention)

    def _give_up(self, reason: str, number: int) -> None:
        """Say once why nothing is told of representations, and have nothing kept any more."""
        self._insides = None
        self._say(f"no representation/* and no attention/*: {reason}", number)

    def _say(self, message: str, number: int) -> None:
        self._session.writer.event("capture", message, step=number)


def _brief(error: Exception) -> str:
    said = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {said}"
