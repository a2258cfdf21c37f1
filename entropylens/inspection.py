"""`Inspection`: hidden states and attention on a probe set, as often as time allows."""

from __future__ import annotations

from time import perf_counter
from typing import Final

import torch
from torch import nn

from entropylens.capture.asking import obstacle
from entropylens.capture.insides import Insides, ProbeSet
from entropylens.capture.probe import Batch
from entropylens.ration import Ration
from entropylens.session import Session
from entropylens.transfer import Stamp

__all__ = ["Inspection"]

SHARE: Final = 1 / 8
"""Of the limit of overhead, that inspections may take."""
_OF_INSIDES: Final = frozenset(("representation", "attention"))


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

    def ask(self, model: nn.Module, number: int, generator: torch.Generator) -> list[str]:
        """Inspect this model, from step ``number`` on, if it is one that can be inspected.

        Returns:
            What can be read of it.

        Raises:
            ValueError: A pattern of layers fits no module, or the inputs hold no tensor.
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
        if not insides.layers:
            event = self._session.writer.event
            event("capture", "no representation/*: no layer stands before the head; name some "
                  "(ProbeSet(layers=...))", step=number)  # fmt: skip
            return ["attention"]
        return ["representation", "attention"]

    @property
    def wants_batch(self) -> bool:
        """Whether a training batch is to be kept."""
        insides = self._insides
        return insides is not None and self._wanted.inputs is None and not insides.is_complete

    def keep(self, batch: Batch | None, number: int, generator: torch.Generator) -> None:
        """Keep rows of a training batch, if any are wanted."""
        if not self.wants_batch or self._insides is None:
            return
        if batch is None:
            self._give_up("what it is given is not shown", number)
        elif not self._insides.keep(batch, generator):
            names = ", ".join(batch.call.kwargs) or "positional ones"
            self._give_up(f"rows cannot be cut out of its inputs ({names})", number)
        elif self._insides.is_complete:
            rows = self._insides.rows
            what = "positions" if self._insides.are_tokens else "rows"
            self._session.writer.event(
                "probe_set",
                f"representations and attention are measured on {rows} {what} of training batches "
                f"up to step {number}; after a resume on others, unless ProbeSet(inputs=...) is "
                f"given",
                step=number,
            )

    def inspect(self, stamp: Stamp) -> None:
        """Run the model on the probe set, at the end of a step, if that is due and paid for."""
        session, insides = self._session, self._insides
        due = _OF_INSIDES & session.due.keys()
        if insides is None or not due or not insides.rows or self.wants_batch:
            return
        if not (self.ration.is_open and session.can_decompose):
            return
        began = perf_counter()
        try:
            seen = insides.look(
                states="representation" in due and bool(insides.layers),
                attention="attention" in due and self._has_attention,
            )
        except Exception as error:
            said = " ".join(str(error).split())[:300]
            self._give_up(f"{type(error).__name__}: {said}", stamp.step)
            return
        if seen.states:
            session.decompose("representation", insides.tensors(seen), insides.reading, stamp)
        attention = seen.attention
        if attention is not None:
            session.measure("attention", lambda: attention)
        elif "attention" in due:
            self._has_attention = False
        self.ration.charge(perf_counter() - began)

    def _give_up(self, reason: str, number: int) -> None:
        """Say once why nothing is told of representations, and have nothing kept any more."""
        self._insides = None
        self._session.writer.event(
            "capture", f"no representation/* and no attention/*: {reason}", step=number
        )
