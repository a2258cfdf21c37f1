"""Rows leave the tail for a segment: by the writer every minute, and after a crash by the next."""

import os

from entropylens.records import SCHEMAS
from entropylens.store.layout import Layout
from entropylens.store.segments import read_footer, write_segment
from entropylens.store.tail import read_tail

__all__ = ["covered_rows", "seal_abandoned", "seal_tail"]


def covered_rows(layout: Layout, table: str, rank: int) -> int:
    """One past the last ordinal that a rank's segments cover; damaged ones are passed over."""
    end = 0
    for path in layout.segments(table, rank):
        try:
            end = max(end, read_footer(path).end_row)
        except (FileNotFoundError, ValueError):
            continue
    return end


def seal_tail(
    layout: Layout, run_id: str, table: str, rank: int, covered: int, *, sync: bool = False
) -> int:
    """Write the tail's rows that no segment covers as the next segment; the tail itself stays.

    Until it is replaced or removed, its rows are on disk twice; the segment states which.

    Args:
        layout: Of the run.
        run_id: Of the run.
        table: Of the log.
        rank: Whose tail.
        covered: One past the last ordinal that the rank's segments cover.
        sync: Wait for the disk.

    Returns:
        The new ``covered``.

    Raises:
        FileNotFoundError: There is no tail.
        ValueError: It is no tail of ours.
        OSError: The segment cannot be written.
    """
    found = read_tail(layout.tail(table, rank))
    rows = found.rows.slice(min(max(covered - found.first_row, 0), found.rows.num_rows))
    if rows.num_rows == 0:
        return covered
    first = max(covered, found.first_row)
    write_segment(
        layout.segment(table, rank, layout.next_sequence(table, rank)),
        rows,
        run_id=run_id,
        table=table,
        rank=rank,
        first_row=first,
        end_row=first + rows.num_rows,
        sync=sync,
    )
    return first + rows.num_rows


def seal_abandoned(layout: Layout, run_id: str, rank: int) -> None:
    """Seal what a process that is gone left in its tails, and remove them.

    A tail that cannot be read is kept in ``superseded/``.
    """
    for table in SCHEMAS:
        tail = layout.tail(table, rank)
        try:
            seal_tail(layout, run_id, table, rank, covered_rows(layout, table, rank), sync=True)
            os.unlink(tail)
        except FileNotFoundError:
            continue
        except ValueError:
            kept = layout.superseded(table)
            kept.mkdir(parents=True, exist_ok=True)
            os.replace(tail, kept / f"{tail.name}.damaged-{os.stat(tail).st_mtime_ns}")
