"""What the command line prints: numbers, sparklines, tables and the summary of a run.

Everything fits 80 columns, and nothing is said by colour alone. Where the output is no terminal a
table is its header and rows, separated by tabs, with every digit.
"""

import math
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from textwrap import fill
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "age",
    "plain",
    "print_facts",
    "print_summary",
    "print_table",
    "short",
    "sparkline",
    "to_console",
]

_BLOCKS: Final = "▁▂▃▄▅▆▇█"
_NONFINITE: Final = "×"
_GAP: Final = 2


def plain(text: str) -> str:
    r"""Text of a log without control characters, which a terminal would obey.

    Example:
        >>> print(plain("red" + chr(27) + "[31m, next" + chr(10) + "line"))
        red\x1b[31m, next\nline
    """
    if text.isprintable():
        return text
    return "".join(
        repr(letter)[1:-1] if unicodedata.category(letter) in ("Cc", "Cf", "Cs") else letter
        for letter in text
    )


def short(value: float | None) -> str:
    """A number in three digits and at most nine characters; NaN, inf and -inf as they are.

    Example:
        >>> [short(x) for x in (None, 3, 2.71828, 123456.7, -1.5e-5, math.inf)]
        ['', '3', '2.72', '123457', '-1.5e-5', 'inf']
    """
    if value is None:
        return ""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "inf" if value > 0 else "-inf"
    text = f"{value:.0f}" if 999.5 <= abs(value) < 1e7 else f"{value:.3g}"
    mantissa, e, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}" if e else text


def age(since: str | float) -> str:
    """How long ago something was, from ISO 8601 or unix seconds: ``4 min``; ? where unknown."""
    try:
        then = datetime.fromisoformat(since).timestamp() if isinstance(since, str) else since
    except ValueError:
        return "?"
    seconds = max(datetime.now(UTC).timestamp() - then, 0.0)
    for limit, unit, name in ((60, 1, "s"), (3600, 60, "min"), (86400, 3600, "h")):
        if seconds < limit:
            return f"{seconds // unit:.0f} {name}"
    return f"{seconds // 86400:.0f} d"


def sparkline(values: Sequence[float], width: int) -> str:
    """A line of blocks, lowest to highest finite value.

    More values than ``width`` are drawn as the smallest and the largest of each part, in the order
    they came, so that a spike of a single step is seen. Where a part holds NaN or an infinity there
    is a ``×``.

    Args:
        values: In order of steps.
        width: Characters at most.

    Example:
        >>> sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8)
        '▁▂▃▄▅▆▇█'
        >>> sparkline([1.0, math.nan, 2.0], 8)
        '▁×█'
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.size > width:
        edges = np.linspace(0, numbers.size, max(width // 2, 1) + 1).astype(int)
        parts = [numbers[a:b] for a, b in pairwise(edges)]
        numbers = np.concatenate([_extremes(part) for part in parts])
    finite = numbers[np.isfinite(numbers)] / 2  # half: a difference of the largest stays finite
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    line = []
    for number in numbers:
        if not math.isfinite(number):
            line.append(_NONFINITE)
        elif high == low:
            line.append(_BLOCKS[3])
        else:
            line.append(_BLOCKS[round((number / 2 - low) / (high - low) * (len(_BLOCKS) - 1))])
    return "".join(line)


def _extremes(part: np.ndarray) -> np.ndarray:
    finite = part[np.isfinite(part)]
    if finite.size < part.size:
        return np.array([math.nan, finite.max() if finite.size else math.nan])
    first, second = sorted((int(part.argmin()), int(part.argmax())))
    return part[[first, second]]


# -- tables ---------------------------------------------------------------------------------------


def to_console() -> "Console":
    """Standard output: colours and boxes on a terminal, plain text elsewhere."""
    from rich.console import Console

    return Console(file=sys.stdout, highlight=False, markup=False, emoji=False, soft_wrap=False)


def print_table(console: "Console", columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table for a person on a terminal, for a program elsewhere.

    Args:
        console: From `to_console`.
        columns: Their names.
        rows: Values; on a terminal numbers are short and aligned right, and a table too wide for
            it is printed row by row.
    """
    if not console.is_terminal:
        lines = ["\t".join(columns), *("\t".join(map(_exact, row)) for row in rows)]
        console.file.write("\n".join(lines) + "\n")
        return
    if sum(len(column) + _GAP for column in columns) <= console.width:
        _print_grid(console, columns, rows)
        return
    for row in rows:
        print_facts(console, dict(zip(columns, map(_brief, row), strict=True)))
        console.print()


def _print_grid(console: "Console", columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for place, column in enumerate(columns):
        numeric = all(_is_number(row[place]) or row[place] is None for row in rows)
        grid.add_column(column, justify="right" if numeric and rows else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(_brief(value)) for value in row))
    console.print(grid)


def print_facts(console: "Console", facts: Mapping[str, str]) -> None:
    """Labelled texts, wrapped beside their labels."""
    from textwrap import fill

    indent = " " * (max(map(len, facts)) + _GAP)
    for label, text in facts.items():
        first = f"{label:<{len(indent)}}"
        wrapped = fill(plain(text), console.width, initial_indent=first, subsequent_indent=indent)
        console.print(wrapped, soft_wrap=True)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _exact(value: Any) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    return "" if value is None else plain(str(value))


def _brief(value: Any) -> str:
    if isinstance(value, datetime):
        return value.isoformat(sep=" ", timespec="seconds").removesuffix("+00:00")
    if isinstance(value, list):
        return "[" + ", ".join(map(_brief, value)) + "]"
    return short(value) if isinstance(value, float) else _exact(value)


# -- the summary of one run -----------------------------------------------------------------------


def print_summary(console: "Console", found: Mapping[str, Any]) -> None:
    """Print what ``entropylens show --json`` gives, and the sparklines of its series."""
    from rich.text import Text

    console.print(Text(f"{plain(found['name'])}: {found['state']}", style="bold"))
    for label, text in _facts(found):
        console.print(Text(f"  {label:<10}{text}"), overflow="fold")
    console.print()
    for sentence in found["happened"]:
        width = min(console.width, 100)
        console.print(Text(fill(f"- {plain(sentence)}", width, subsequent_indent="  ")))
    if found["series"]:
        console.print()
        _print_series(console, found["series"])
    if found["more_series"]:
        console.print(Text(f"{found['more_series']} more series: entropylens get {found['path']}"))
    if found["samples"]:
        console.print()
        console.print(Text("Samples with the highest loss while it was out of range, or lately"))
        columns = ["sample_id", "step", "loss", "entropy", "measured_tokens"]
        rows = [[sample[column] for column in columns] for sample in found["samples"]]
        _print_grid(console, columns, rows)
    if found["events"]:
        console.print()
        console.print(Text(f"Last {len(found['events'])} of {found['event_count']} events"))
        rows = [[e["step"], e["severity"], e["kind"], e["message"]] for e in found["events"]]
        _print_grid(console, ["step", "severity", "kind", "message"], rows)


def _facts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    faults = [f"{plain(cause)} (x{count})" for cause, count in found["faults"].items()]
    attempts = f"{len(found['attempts'])}"
    resumed = [f"after step {a['start_step']}" for a in found["attempts"][1:]]
    facts = [
        ("path", plain(str(found["path"]))),
        ("started", f"{found['created']} ({age(found['created'])} ago)"),
        ("steps", str(found["steps"])),
        ("attempts", f"{attempts} (resumed {', '.join(resumed)})" if resumed else attempts),
        ("ranks", _ranks(found["ranks"])),
    ]
    facts += [("reason", plain(found["reason"]))] if found["reason"] else []
    lost = found["lost_rows"]
    facts.append(("faults", "! " + "; ".join(faults) if faults else "none"))
    facts.append(("lost rows", f"! {lost}" if lost else "0"))
    return facts


def _ranks(ranks: Sequence[Mapping[str, Any]]) -> str:
    by_state: dict[str, list[str]] = {}
    for rank in ranks:
        by_state.setdefault(rank["state"], []).append(str(rank["rank"]))
    few = [
        f"{len(who)} {state}" + (f" ({', '.join(who[:8])})" if len(by_state) > 1 else "")
        for state, who in by_state.items()
    ]
    return ", ".join(few) or "none has left a status"


def _print_series(console: "Console", series: Sequence[Mapping[str, Any]]) -> None:
    """One line a series, the sparkline as wide as the rest leaves it."""
    names = ["series", *map(_series_name, series)]
    keys = ["first", "last", "min", "max"]
    cells = [[*keys, _NONFINITE]]
    cells += [[*(short(one[key]) for key in keys), str(one["nonfinite"] or "")] for one in series]
    if not any(row[-1] for row in cells[1:]):
        cells = [row[:-1] for row in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    first = max(map(len, names))
    room = min(max(console.width - first - sum(widths) - len(widths) - 1, 8), 60)
    lines = ["", *(sparkline(one["values"], room) for one in series)]
    for name, line, row in zip(names, lines, cells, strict=True):
        numbers = " ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        style = "bold" if name == "series" else None
        console.print(
            f"{name:<{first}} {line:<{room}} {numbers}".rstrip(), style=style, soft_wrap=True
        )
    if len(widths) > len(keys):
        console.print(f"{_NONFINITE}: steps whose value is NaN or infinite")


def _series_name(one: Mapping[str, Any]) -> str:
    name = one["name"] + (f" [{one['module']}]" if one["module"] else "")
    return plain(name if one["phase"] == "train" else f"{name} ({one['phase']})")
