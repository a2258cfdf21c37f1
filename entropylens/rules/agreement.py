"""Is the entropy that the framework logs the one that we measure?"""

from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Any, Final

__all__ = ["Agreement", "allowed_difference"]

ERRORS: Final = 4.0
"""Standard errors of a sampled mean that are allowed."""
ABSOLUTE: Final = 1e-3
"""Nats allowed besides."""
RELATIVE: Final = 1e-2
"""Share of the framework's value allowed besides."""
_CAUSES: Final = (
    "usual causes: one of the two at another temperature; padding in the mean; entropy computed in "
    "bfloat16, which is off by 0.1 nats at low entropy; a mean of micro-batch means; a sum over "
    "sequences"
)


@dataclass(slots=True)
class Agreement:
    """Compares step by step, and speaks up once, and again each time the gap has doubled.

    A value that is no number is told once on its own, and silences nothing.
    """

    reported: float = 0.0
    """Largest gap told so far, in allowed differences."""
    told_no_number: bool = False
    first: int | None = None
    """First step that did not agree."""
    steps: int = 0
    """How many did not."""

    def compare(
        self,
        step: int,
        ours_mean: float,
        ours_std: float,
        ours_tokens: float,
        is_complete: bool,
        theirs: float,
    ) -> dict[str, Any] | None:
        """Do the two agree at this step?

        Args:
            step: At which both were measured.
            ours_mean: Our mean token entropy, nats.
            ours_std: Standard deviation of the measured tokens, nats.
            ours_tokens: How many were measured.
            is_complete: Whether these are all of the step's tokens.
            theirs: The framework's value for the same step.

        Returns:
            The fields of an event, or None where they agree or it was told before.
        """
        if not isfinite(ours_mean) and not isfinite(theirs):
            return None
        allowed = allowed_difference(ours_std, ours_tokens, is_complete, theirs)
        difference = abs(ours_mean - theirs)
        gap = difference / allowed
        if gap <= 1:
            return None
        self.first = step if self.first is None else self.first
        self.steps += 1
        if isfinite(gap):
            if gap < 2 * self.reported:
                return None
            self.reported = gap
        elif self.told_no_number:
            return None
        else:
            self.told_no_number = True
        error = 0.0 if is_complete else ours_std / sqrt(max(ours_tokens, 1.0))
        return {
            "kind": "agreement",
            "severity": "warning",
            "step": step,
            "message": (
                f"the framework logs an entropy of {theirs:.4g} nats, we measure {ours_mean:.4g} "
                f"(standard error {error:.2g}, allowed difference {allowed:.2g}) at step {step:,}; "
                f"{self.steps:,} steps since step {self.first:,} disagree; {_CAUSES}"
            ),
            "evidence": {
                "ours": ours_mean,
                "theirs": theirs,
                "standard_error": error,
                "allowed": allowed,
                "first_step": self.first,
                "steps": self.steps,
            },
        }


def allowed_difference(std: float, tokens: float, is_complete: bool, theirs: float) -> float:
    """How far apart may two measurements of one entropy be?

    ``4 std / sqrt(tokens) + 0.001 + 0.01 |theirs|`` nats, the first term only where the tokens are
    a sample.

    Args:
        std: Standard deviation of the measured tokens' entropies, nats.
        tokens: How many were measured.
        is_complete: Whether these are all of them.
        theirs: The other measurement, nats.

    Returns:
        Nats.

    Example:
        >>> round(allowed_difference(0.5, 100.0, False, 1.0), 6)
        0.211
    """
    error = 0.0 if is_complete else std / sqrt(max(tokens, 1.0))
    return ERRORS * error + ABSOLUTE + RELATIVE * abs(theirs)
