"""Which rows are wanted: names with ``*`` and ``?``, phases, steps, as pyarrow expressions."""

import re
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

__all__ = ["all_of", "filtered", "matching", "split_patterns", "within"]


def split_patterns(wanted: str | Sequence[str]) -> tuple[list[str], list[str]]:
    """Plain names, and patterns as regular expressions that every engine here reads alike.

    Example:
        >>> split_patterns(["loss/mean", "entropy/*"])
        (['loss/mean'], ['^entropy/.*$'])
    """
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    plain = [name for name in names if not set("*?") & set(name)]
    letters = {"*": ".*", "?": "."}
    patterns = [
        "^" + "".join(letters.get(letter, re.escape(letter)) for letter in name) + "$"
        for name in names
        if name not in plain
    ]
    return plain, patterns


def matching(column: str, wanted: str | Sequence[str] | None) -> pc.Expression | None:
    """Rows whose column is one of the names or matches a pattern; None wants all."""
    if wanted is None:
        return None
    plain, patterns = split_patterns(wanted)
    found = [pc.field(column).isin(pa.array(plain, pa.string()))]
    if patterns:
        found.append(pc.match_substring_regex(pc.field(column), "|".join(patterns)))
    return found[0] if len(found) == 1 else found[0] | found[1]


def within(steps: tuple[int | None, int | None] | None) -> list[pc.Expression | None]:
    """Rows from the first step to the last, both included; None on either side is open."""
    first, last = steps or (None, None)
    return [
        None if first is None else pc.field("step") >= first,
        None if last is None else pc.field("step") <= last,
    ]


def all_of(conditions: Sequence[pc.Expression | None]) -> pc.Expression | None:
    """All of the conditions that are not None."""
    joined = None
    for condition in conditions:
        if condition is not None:
            joined = condition if joined is None else joined & condition
    return joined


def filtered(rows: pa.Table, condition: pc.Expression | None) -> pa.Table:
    """The rows for which a condition holds."""
    return rows if condition is None else rows.filter(condition)
