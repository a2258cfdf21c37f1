"""`Updates`: what updates of the weights do to a model's distributions, as often as time allows."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Final

import torch
from torch import nn

from entropylens.capture.asking import obstacle
from entropylens.capture.policy import PolicyBatch
from entropylens.capture.probe import Batch, UpdateProbe
from entropylens.capture.tokens import TokenSource
from entropylens.ration import Ration
from entropylens.registry import UpdateReading
from entropylens.session import Session

__all__ = ["Updates"]

SHARE: Final = 1 / 6
"""Of the limit of overhead, that looking at updates may take."""
_CANNOT: Final = (
    "no entropy/change and no ghost/*: the model cannot be asked what updates do to it: {}"
)

_METHODS: Final = {
    True: "derivatives along updates are differentiated (forward mode)",
    False: "derivatives along updates are central finite differences: an operation has no forward "
    "derivative",
}


class Updates:
    """Keeps states of a step's batch and asks the model about them when the step has updated it.

    Looks are taken as often as `Ration` pays for them. A model that raises is not asked again, and
    an event says why.

    Args:
        session: Of the run.
        temperature: At which the loss reads the logits.
    """

    def __init__(self, session: Session, temperature: float) -> None:
        self.ration = Ration(session.budget, SHARE)
        self._session, self._temperature = session, temperature
        self._probe: UpdateProbe | None = None
        self._is_exact: bool | None = None
        self._number = 0

    def ask(self, model: nn.Module, optimizers: int, number: int) -> bool:
        """Ask this model, from step ``number`` on, if it is one that can be asked.

        Args:
            model: As the trainer holds it.
            optimizers: How many train it: of several updates none is the step's.
            number: Of the step in progress.

        Returns:
            Whether it is.
        """
        if not optimizers:
            return False
        reason = obstacle(model)
        if reason is None and optimizers != 1:
            reason = f"{optimizers} optimisers train it"
        if reason is None:
            self._probe = UpdateProbe(model)
        else:
            self._session.writer.event("capture", _CANNOT.format(reason), step=number)
        return reason is None

    def begin(self, number: int) -> None:
        """Begin a step: forget the last one's states."""
        self._number = number
        if self._probe is not None:
            self._probe.clear()

    @property
    def has_states(self) -> bool:
        """Whether states were kept in the step in progress."""
        return self._probe is not None and not self._probe.is_empty

    @property
    def wants_states(self) -> bool:
        """Whether states are to be kept in the step in progress, and none are yet."""
        is_due = "probe" in self._session.due and self.ration.is_open
        return is_due and self._probe is not None and self._probe.is_empty

    def keep(
        self,
        batch: Batch | None,
        source: TokenSource | None,
        policy: PolicyBatch | None,
        sample_ids: Sequence[str] | None,
        generator: torch.Generator,
    ) -> None:
        """Keep states of a training forward, the first of a step in which they are wanted."""
        probe = self._probe
        if not self.wants_states or probe is None:
            return
        if batch is None:
            self._give_up("its inputs are not shown (inputs= of observe_policy)")
        elif not probe.keep(batch, source, policy, sample_ids, generator):
            names = ", ".join(batch.call.kwargs) or "positional ones"
            self._give_up(f"a few sequences cannot be cut out of its inputs ({names})")

    def _give_up(self, reason: str) -> None:
        """Say once why nothing is told of updates, and have nothing kept for them any more."""
        self._probe = None
        event = self._session.writer.event
        event("capture", _CANNOT.format(reason), step=self._number)

    def take(self, update: UpdateReading) -> None:
        """Ask what an update did at the states that were kept; there must be some."""
        probe, began = self._probe, perf_counter()
        assert probe is not None
        try:
            found = probe.reading(update.before, update.after, self._temperature)
        except Exception as error:
            said = " ".join(str(error).split())[:300]
            self._give_up(f"{type(error).__name__}: {said}")
            return
        self._tell(found.is_exact)
        self._session.measure("probe", lambda: found)
        self.ration.charge(perf_counter() - began)

    def _tell(self, is_exact: bool) -> None:
        """Write how derivatives are taken, when that is known first and when it changes."""
        if self._is_exact is not is_exact:
            self._is_exact = is_exact
            self._session.writer.event("derivative", _METHODS[is_exact], step=self._number)
