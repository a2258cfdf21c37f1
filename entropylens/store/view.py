"""What the files of a table hold at one moment, and how far of it was read."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import pyarrow as pa

from entropylens.store.segments import Footer

__all__ = ["Cursor", "View", "ends_of"]


@dataclass(frozen=True)
class Cursor:
    """How far a table was read: text that can be kept and given back."""

    run_id: str
    table: str
    epoch: str
    next_rows: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        """One line of JSON."""
        return json.dumps([self.run_id, self.table, self.epoch, self.next_rows])

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what ``str(cursor)`` gave.

        Raises:
            ValueError: It is something else.
        """
        try:
            run_id, table, epoch, next_rows = json.loads(text)
            rows = tuple((int(rank), int(row)) for rank, row in next_rows)
            if not all(isinstance(part, str) for part in (run_id, table, epoch)):
                raise ValueError(text)
            return cls(run_id, table, epoch, rows)
        except (ValueError, TypeError, RecursionError, OverflowError):
            got = text if len(text) <= 200 else f"{text[:200]}..."
            raise ValueError(f"Cursor: expected the text of a cursor, got {got!r}") from None


@dataclass(frozen=True)
class View:
    """What the files of a table hold at one moment, each row once, and how far it was read."""

    segments: list[tuple[Path, Footer]]
    tails: list[tuple[int, int, pa.Table]]
    """Rank, ordinal of the first row, rows that no segment covers."""
    notes: list[str]
    """Files that were skipped, and why."""
    cursor: Cursor
    """Where the next read goes on."""
    start: dict[int, int] = field(default_factory=dict)
    """The first ordinal of each rank that was not read before."""
    restarted: bool = False
    """The cursor given was of before a resume or merge."""

    def passed(self, rank: int, first_row: int, rows: int, end_row: int | None = None) -> int:
        """How many rows of a file were read before."""
        start = self.start.get(rank, 0)
        if end_row is not None and start >= end_row:
            return rows
        return min(max(start - first_row, 0), rows)


def ends_of(
    segments: Sequence[tuple[Path, Footer]], tails: Sequence[tuple[int, int, pa.Table]] = ()
) -> dict[int, int]:
    """One past the last ordinal of each rank, in segments and tails."""
    ends: dict[int, int] = {}
    for _, footer in segments:
        ends[footer.rank] = max(ends.get(footer.rank, 0), footer.end_row)
    for rank, first, rows in tails:
        ends[rank] = max(ends.get(rank, 0), first + rows.num_rows)
    return ends
