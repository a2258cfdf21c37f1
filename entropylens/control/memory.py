"""What a run's steps so far have shown, for judging the next one."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any, Final

from entropylens.control.history import History
from entropylens.control.signals import Admission, Decision, GradientSignals, UpdateSignals

__all__ = ["LEAST", "OF_BATCHES", "Memory"]

LEAST: Final = 8
"""Updates or ratios below which what is typical of them is not known."""
OF_BATCHES: Final = frozenset(("gradient", "loss", "statistics"))
"""Suspicions that a bad batch gives rise to."""


class Memory:
    """What a run's steps so far have shown.

    What is suspicious is not remembered as ordinary, and neither are updates while they are
    measured because of something suspicious; what stays suspicious for ``patience`` steps in a row
    becomes the new normal, but for rates and settings, which somebody set.

    Args:
        window: Gradients and losses that are remembered.
        settle: Steps that are measured after a change.
        patience: Suspicious steps in a row that make a new normal.
        state: What `state_dict` gave.
    """

    def __init__(
        self, window: int, settle: int, patience: int, state: Mapping[str, Any] | None = None
    ) -> None:
        found = {} if state is None else state
        self._window, self._settle, self._patience = window, settle, patience
        self.steps = int(found.get("steps", 0))
        self.highest_rate = float(found.get("highest_rate", 0.0))
        """Of those that were not suspicious, or that turned out to be harmless."""
        known = found.get("settings")
        self.settings: tuple[float, ...] | None = None if known is None else tuple(known)
        self.settling = int(found.get("settling", 0))
        """Steps that are still to be measured."""
        self.has_changed = bool(found.get("has_changed", False))
        """Whether they are to be because settings were changed."""
        self.batches_in_a_row = int(found.get("batches_in_a_row", 0))
        """Steps in a row with a suspicious batch."""
        self.updates_in_a_row = int(found.get("updates_in_a_row", 0))
        """Steps in a row whose update was too large though nobody had set anything."""
        self.gradients = History(window, found.get("gradients", ()))
        self.losses = History(window, found.get("losses", ()))
        self.updates = History(max(window // 4, LEAST), found.get("updates", ()))
        """Norm of the update per unit of the learning rate."""
        self.statistics = History(window, found.get("statistics", ()))
        self.ratios = History(window, found.get("ratios", ()))

    def state_dict(self) -> dict[str, Any]:
        """Numbers and lists, to go on from."""
        return {
            "steps": self.steps,
            "highest_rate": self.highest_rate,
            "settings": None if self.settings is None else list(self.settings),
            "settling": self.settling,
            "has_changed": self.has_changed,
            "batches_in_a_row": self.batches_in_a_row,
            "updates_in_a_row": self.updates_in_a_row,
            "gradients": self.gradients.values,
            "losses": self.losses.values,
            "updates": self.updates.values,
            "statistics": self.statistics.values,
            "ratios": self.ratios.values,
        }

    def typical_update(self, rate: float) -> float | None:
        """Norm of an ordinary update at this learning rate, or at the highest ordinary one."""
        relative = self.updates.median()
        if relative is None or len(self.updates) < LEAST:
            return None
        return relative * min(rate, self.highest_rate or rate)

    def accept(self, rate: float, settings: tuple[float, ...]) -> None:
        """Take a learning rate and settings for ordinary ones."""
        self.highest_rate = max(self.highest_rate, rate)
        self.settings = settings
        self.settling, self.has_changed = 0, False

    def take_gradients(self, seen: GradientSignals, admission: Admission) -> None:
        """Remember a step before it is made."""
        self.steps += 1
        suspicions = {*admission.suspicions}
        self.batches_in_a_row = self.batches_in_a_row + 1 if suspicions & OF_BATCHES else 0
        if self.batches_in_a_row >= self._patience and isfinite(seen.norm):
            self.gradients, self.losses = History(self._window), History(self._window)
            self.statistics = History(self._window)
            self.batches_in_a_row, suspicions = 0, suspicions - OF_BATCHES
        if not suspicions & OF_BATCHES:
            self.gradients.add(seen.norm)
            if seen.loss is not None:
                self.losses.add(seen.loss)
            if seen.statistics is not None:
                self.statistics.add(seen.statistics)
        if "settings" in suspicions:
            self.settling, self.has_changed = self._settle, True
        self.settings = seen.settings
        if "rate" not in suspicions:
            self.highest_rate = max(self.highest_rate, seen.rate)

    def take_update(self, update: UpdateSignals, decision: Decision, *, always: bool) -> None:
        """Remember an update as it was applied.

        Args:
            update: As it was proposed.
            decision: What was made of it.
            always: Whether updates are measured in every step, suspicious or not.
        """
        if update.rate > 0 and update.is_finite and (always or not update.suspicions):
            applied = min(update.rate, self.highest_rate or update.rate)
            self.updates.add(update.norm * decision.scale / applied)
        if update.ratio is not None:
            self.ratios.add(update.ratio * decision.scale)
        is_large, has_rate = decision.cause == "update norm", "rate" in update.suspicions
        by_itself = is_large and not has_rate and not self.has_changed
        self.updates_in_a_row = self.updates_in_a_row + 1 if by_itself else 0
        if self.updates_in_a_row >= self._patience:
            self.updates = History(max(self._window // 4, LEAST))
            self.settling = self.updates_in_a_row = 0
        elif is_large and not has_rate:
            self.settling = self._settle
        elif self.settling:
            self.settling -= 1
            self.has_changed = self.has_changed and self.settling > 0
        if has_rate and decision.scale == 1 and len(self.updates) >= LEAST:
            self.highest_rate = update.rate
