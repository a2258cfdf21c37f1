"""Rows leave the tail for a segment: by the writer every minute, and after a crash by the next."""

import os
from pathlib import Path

from entropylens.records import SCHEMAS
from entropylens.store.layout import Layout, write_atomically
from entropylens.store.segments import read_footer, write_segment
from entropylens.store.tail import read_tail

__all__ = ["covered_rows", "seal_abandoned", "seal_tail"]


def covered_rows(layout: Layout, run_id: str, table: str, rank: int) -> int:
    """One past the last ordinal that a rank's segments cover; damaged ones are passed over."""
    end = 0
    for path in layout.segments(table, rank):
        try:
            footer = read_footer(path)
        except (FileNotFoundError, ValueError):
            continue
        if footer.is_of(run_id, table):
            end = max(end, footer.end_row)
    return end


def seal_tail(
    layout: Layout, run_id: str, table: str, rank: int, covered: int, *, sync: bool = False
) -> int:
    """Write the tail's rows that no segment covers as the next segment; the tail itself stays.

    Until it is replaced or removed, its rows are on disk twice; the segment states which. What
    cannot be read of a damaged tail is kept in ``superseded/``.

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
    tail = layout.tail(table, rank)
    found = read_tail(tail, table)
    if found.metadata.get("run_id") != run_id:
        raise ValueError(f"{tail} belongs to another run")
    if found.damage is not None:
        _keep(layout, table, tail)
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

    A tail that cannot be read, or is of another run, is kept in ``superseded/``.
    """
    for table in SCHEMAS:
        tail = layout.tail(table, rank)
        try:
            covered = covered_rows(layout, run_id, table, rank)
            seal_tail(layout, run_id, table, rank, covered, sync=True)
        except FileNotFoundError:
            continue
        except ValueError:
            _keep(layout, table, tail)
        os.unlink(tail)


def _keep(layout: Layout, table: str, tail: Path) -> None:
    kept = layout.superseded(table) / f"{tail.name}.damaged-{os.stat(tail).st_mtime_ns}"
    write_atomically(kept, tail.read_bytes(), sync=True)
