"""When a diagnostic is due."""

from dataclasses import dataclass
from typing import Final, Literal, get_args

from entropylens.errors import unknown_name

__all__ = ["PRESETS", "Preset", "Schedule", "check_preset"]

Preset = Literal["fast", "balanced", "full"]
PRESETS: Final[tuple[str, ...]] = get_args(Preset)


@dataclass(frozen=True)
class Schedule:
    """Steps at which a diagnostic is measured: the first one, then every ``every``-th.

    Steps count optimiser steps from 1. The overhead budget may widen the interval, by doubling,
    up to ``floor`` and never beyond it.

    Args:
        every: Interval in optimiser steps; 0 switches the diagnostic off.
        floor: The widest interval to which the budget may thin this diagnostic, in steps.

    Raises:
        ValueError: ``every`` is negative or ``floor`` is smaller than ``every``.

    Example:
        >>> [step for step in range(1, 11) if Schedule(every=4).is_due(step)]
        [1, 4, 8]
        >>> [step for step in range(1, 21) if Schedule(every=4, floor=10).is_due(step, widening=8)]
        [1, 10, 20]
    """

    every: int
    floor: int = 1000

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"Schedule: expected every >= 0 (0 is off), got {self.every}")
        if self.floor < self.every:
            raise ValueError(
                f"Schedule: expected floor >= every, got floor {self.floor} and every {self.every}"
            )

    def interval(self, widening: int = 1) -> int:
        """Steps between two measurements once the budget widened intervals ``widening`` times."""
        return min(self.every * widening, self.floor)

    def is_due(self, step: int, widening: int = 1) -> bool:
        """Whether optimiser step ``step`` (counted from 1) is measured."""
        if self.every == 0:
            return False
        return step == 1 or step % self.interval(widening) == 0

    def next_due(self, after: int, widening: int = 1) -> int | None:
        """The first measured step beyond step ``after``; None if there is none.

        Example:
            >>> fourth = Schedule(every=4)
            >>> fourth.next_due(0), fourth.next_due(4), Schedule(0).next_due(4)
            (1, 8, None)
        """
        if self.every == 0:
            return None
        interval = self.interval(widening)
        following = (after // interval + 1) * interval
        return min(following, 1) if after < 1 else following


def check_preset(who: str, preset: str) -> Preset:
    """Return ``preset`` if there is one of that name.

    Raises:
        ValueError: There is none; the message names the nearest.
    """
    for known in get_args(Preset):
        if preset == known:
            return known
    raise ValueError(unknown_name(who, "preset", preset, PRESETS))
