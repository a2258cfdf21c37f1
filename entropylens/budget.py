"""What entropylens may cost, what it does cost, and what gives way when that is too much."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, log2
from time import perf_counter
from typing import Final

__all__ = ["MAX_OVERHEAD", "Budget", "Review"]

MAX_OVERHEAD: Final[Mapping[str, float]] = {"fast": 0.01, "balanced": 0.03, "full": 0.03}
"""Share of wall time allowed, by preset."""
SAMPLED_ROWS: Final = 256
"""Tokens a step below which rows are not thinned; intervals are widened instead."""
WIDEST: Final = 1024
WARM_UP_STEPS: Final = 3
"""Steps whose cost is not judged: allocators, lazy imports and first calls fall in them."""
REVIEW_SECONDS: Final = 2.0
REVIEW_STEPS: Final = 10
LARGEST_LEAP: Final = 16
"""Factor by which one review widens at most: the cost it saw may have been another program's."""
CALM_REVIEWS: Final = 5
"""Reviews in a row well below the budget before an interval is narrowed again."""


@dataclass(frozen=True)
class Review:
    """What a look at the cost found and decided."""

    fraction: float
    """Share of wall time since the last review."""
    change: str | None
    """What was thinned or restored, in words; None if nothing was."""


class Budget:
    """Keeps the share of wall time at or below ``max_overhead``.

    Vitals (loss, learning rate, ...) are cheap and wanted in every step, so everything else gives
    way first: the number of measured tokens a step falls towards 256, then intervals are widened,
    each by as much as the excess asks for and by 16 at most. Only where vitals alone take more than
    half of what is allowed, as in a step of a millisecond, are their intervals widened too. When
    the cost has been below 40 % of the budget for five reviews, vitals, then intervals are narrowed
    again by half, then the number of tokens is doubled, up to what was asked for.

    Args:
        max_overhead: Share of wall time allowed; None measures without ever thinning.
        rows: Tokens measured a step at most; None is all of them.

    Raises:
        ValueError: ``max_overhead`` is not in 0..1 or ``rows`` not positive.
    """

    def __init__(self, max_overhead: float | None, rows: int | None) -> None:
        if max_overhead is not None and not 0.0 < max_overhead <= 1.0:
            raise ValueError(
                f"Lens: expected max_overhead in (0, 1] or None for no limit, got {max_overhead}"
            )
        if rows is not None and rows < 1:
            raise ValueError(f"Lens: expected rows >= 1 or None for all, got {rows}")
        self.max_overhead = max_overhead
        self.rows = self._allowed_rows = rows
        self.widening = 1
        """Factor on the intervals of everything but vitals."""
        self.vitals_widening = 1
        self.next_review = 0.0
        """On the clock of `time.perf_counter`: before it, and within ten steps of the last review,
        `end_step` only counts."""
        self.paused = 0.0
        """Seconds in which no training step ran, since the beginning: only grows."""
        self._warm = False
        self._calm = 0
        self._spent = self._light = self._step_began = self._writer_cpu = 0.0
        self._steps = self._vital_steps = self._light_steps = 0
        self._since = self._now()

    def spend(self, seconds: float) -> None:
        """Count time that the training thread (or the device) spent on us."""
        self._spent += seconds

    def repay(self, seconds: float) -> None:
        """Count time that an earlier step took: it is no cost of the one in which it is paid."""
        self._spent += seconds
        self._step_began += seconds

    def pause(self, seconds: float) -> None:
        """Leave out wall time in which no training step ran."""
        self.paused += seconds
        self.next_review += seconds

    def resume(self, rows: int | None, widening: int, vitals_widening: int) -> None:
        """Go on as thinned as an earlier attempt was; never with more rows than are allowed now."""
        if rows is not None and (self._allowed_rows is None or rows < self._allowed_rows):
            self.rows = rows
        self.widening = min(max(widening, 1), WIDEST)
        self.vitals_widening = min(max(vitals_widening, 1), WIDEST)

    def pass_steps(self, count: int) -> None:
        """Count steps in which nothing was due: cheaper than `end_step`."""
        self._steps += count
        self._step_began = self._spent

    def end_step(
        self, writer_cpu: float, tokens: int, *, vitals: bool = False, others: bool = True
    ) -> Review | None:
        """Count a step and, every 2 s and 10 steps, judge the cost.

        Args:
            writer_cpu: CPU seconds of the writer thread since it started.
            tokens: Token slots of the step, known from shapes: where rows start to be sampled.
            vitals: Whether vitals were due in it.
            others: Whether anything else was.

        Returns:
            The review, if one was due.
        """
        self._steps += 1
        self._vital_steps += vitals
        if vitals and not others:
            self._light_steps += 1
            self._light += self._spent - self._step_began
        self._step_began = self._spent
        if not self._warm:
            if self._steps >= WARM_UP_STEPS:
                self._warm = True
                self._restart(writer_cpu)
            return None
        elapsed = self._now() - self._since
        if elapsed < REVIEW_SECONDS or self._steps < REVIEW_STEPS:
            return None
        fraction = (self._spent + writer_cpu - self._writer_cpu) / elapsed
        of_vitals = self._light / max(self._light_steps, 1) * self._vital_steps / elapsed
        self._restart(writer_cpu)
        return Review(fraction, self._judge(fraction, of_vitals, tokens))

    def _restart(self, writer_cpu: float) -> None:
        self._since, self._writer_cpu = self._now(), writer_cpu
        self._spent = self._light = self._step_began = 0.0
        self._steps = self._vital_steps = self._light_steps = 0
        self.next_review = perf_counter() + REVIEW_SECONDS

    def _now(self) -> float:
        return perf_counter() - self.paused

    def _judge(self, fraction: float, of_vitals: float, tokens: int) -> str | None:
        limit = self.max_overhead
        if limit is None:
            return None
        if fraction > limit:
            self._calm = 0
            changes = [self._thin_vitals(2 * of_vitals / limit)]
            if changes == [None] or fraction - of_vitals > limit / 2:
                changes.append(self._thin(max(fraction / limit, 1.01), tokens))
            if not any(changes):
                # Everything else is at its floor already.
                changes.append(self._thin_vitals(max(fraction / limit, 1.01)))
            return "; ".join(change for change in changes if change is not None) or None
        self._calm = self._calm + 1 if fraction < 0.4 * limit else 0
        if self._calm < CALM_REVIEWS:
            return None
        self._calm = 0
        return self._restore(tokens)

    def _thin_vitals(self, excess: float) -> str | None:
        if excess <= 1 or self.vitals_widening >= WIDEST:
            return None
        self.vitals_widening = min(self.vitals_widening * _leap(excess), WIDEST)
        return f"vitals every {self.vitals_widening} steps or so"

    def _thin(self, excess: float, tokens: int) -> str | None:
        rows = tokens if self.rows is None else min(self.rows, tokens)
        if rows > SAMPLED_ROWS:
            self.rows = max(rows // max(_leap(excess), 4), SAMPLED_ROWS)
            return f"at most {self.rows} tokens a step are measured"
        if self.widening < WIDEST:
            self.widening = min(self.widening * _leap(excess), WIDEST)
            return f"intervals widened to {self.widening} times the preset's"
        return None

    def _restore(self, tokens: int) -> str | None:
        if self.vitals_widening > 1:
            self.vitals_widening //= 2
            return f"vitals every {self.vitals_widening} steps again"
        if self.widening > 1:
            self.widening //= 2
            return f"intervals narrowed to {self.widening} times the preset's"
        if self.rows is None or self.rows == self._allowed_rows:
            return None
        enough = tokens if self._allowed_rows is None else self._allowed_rows
        if 2 * self.rows < enough:
            self.rows *= 2
        else:
            self.rows = self._allowed_rows
        many = "all" if self.rows is None else f"at most {self.rows}"
        return f"{many} tokens a step are measured again"


def _leap(excess: float) -> int:
    """The power of two that takes a cost ``excess`` times too high below the limit."""
    return min(2 ** ceil(log2(excess)), LARGEST_LEAP)
