"""The one exception users may want to catch, and how an unknown name is answered."""

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["EntropyLensError", "unknown_name"]


class EntropyLensError(Exception):
    """A run directory, a log or a setup that entropylens cannot work with.

    The message says who, what was expected, what came, and the fix. Wrong arguments raise
    `ValueError` or `TypeError` instead. Once training has begun nothing is raised: a fault is
    reported once per cause and counted in the run's status.
    """


def unknown_name(who: str, what: str, got: str, known: Iterable[str]) -> str:
    """The message for a name that is not known, with the nearest one that is.

    Args:
        who: The function or option that was given the name.
        what: What the name should be, as a noun: ``"preset"``, ``"diagnostic"``.
        got: The name that came.
        known: All names that would have been right.

    Returns:
        One line, ``who: expected ..., got ...; did you mean ...?``.

    Example:
        >>> unknown_name("Lens", "preset", "balance", ["fast", "balanced", "full"])
        "Lens: expected a preset (balanced, fast, full), got 'balance'; did you mean 'balanced'?"
    """
    names = sorted(known)
    near = get_close_matches(got, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    shown = ", ".join(names) if len(names) <= 12 else f"{', '.join(names[:12])}, ..."
    return f"{who}: expected a {what} ({shown}), got {got!r}{hint}"
