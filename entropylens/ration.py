"""`Ration`: a share of what watching may cost, for looks that are rare and long."""

from __future__ import annotations

from time import perf_counter
from typing import Final

from entropylens.budget import Budget

__all__ = ["Ration"]

SAVED_SECONDS: Final = 0.05
"""Of looking at most that time without a look is worth: then several short ones may follow."""


class Ration:
    """Lets looks be taken as often as a share of the limit of overhead pays for them.

    The budget would take a long look for a burst and thin everything else. So it is not charged
    with it at once, but over the time that pays for it; until then no other look is taken,
    whatever the schedule says.

    Args:
        budget: Of the run.
        share: Of its limit.
    """

    def __init__(self, budget: Budget, share: float) -> None:
        limit = budget.max_overhead
        self._budget, self._rate = budget, None if limit is None else share * limit
        self._owed, self._paid_at = 0.0, self._now()

    @property
    def is_open(self) -> bool:
        """Whether the last looks are paid for; always where nothing limits the overhead."""
        return self._owed <= 0.0

    def charge(self, seconds: float) -> None:
        """Owe for a look within a hook or an end of a step that is charged with all its time."""
        if self._rate is not None:
            self._budget.spend(-seconds)
            self._owed += seconds

    def owe(self, seconds: float) -> None:
        """Owe for a look that nothing else is charged with: one that another thread took."""
        if self._rate is not None:
            self._owed += seconds

    def pay(self) -> None:
        """Pay for the training time since the last payment, at the end of a step."""
        if self._rate is None:
            return
        now = self._now()
        earned = self._rate * (now - self._paid_at)
        self._budget.repay(max(min(self._owed, earned), 0.0))
        self._owed, self._paid_at = max(self._owed - earned, -SAVED_SECONDS), now

    def _now(self) -> float:
        """A clock that stands still in pauses: the budget does not count what is paid in them."""
        return perf_counter() - self._budget.paused
