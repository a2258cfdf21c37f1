"""Resuming from an earlier step: what was logged beyond it makes way."""

from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from entropylens.records import SCHEMAS
from entropylens.store.layout import Layout
from entropylens.store.seal import seal_abandoned
from entropylens.store.segments import read_footer, read_segment, write_segment

__all__ = ["rewind"]


def rewind(layout: Layout, run_id: str, rank: int, step: int) -> None:
    """Move a rank's rows after ``step`` to ``superseded/``, so that all readers see a step once.

    Of each segment the copy in ``superseded/`` is complete before the segment is replaced, so that
    a kill in between loses nothing and doing it again ends the same. A segment of which nothing
    stays is replaced by an empty one: ordinals of rows are never used twice. Rows without a step
    stay; a pyramid that would show what has gone does not.

    Args:
        layout: Of the run.
        run_id: Of the run.
        rank: Whose rows.
        step: The last optimiser step that stays.
    """
    seal_abandoned(layout, run_id, rank)
    for table in SCHEMAS:
        for path in layout.segments(table, rank):
            try:
                footer = read_footer(path)
                if not footer.is_of(run_id, table) or _ends_by(path, step):
                    continue
                rows = read_segment(path, table)
            except ValueError:
                continue
            late = pc.fill_null(pc.greater(rows["step"], step), False)
            gone = rows.filter(late)
            if gone.num_rows == 0:
                continue
            facts: dict[str, Any] = {
                "run_id": run_id,
                "table": table,
                "rank": rank,
                "first_row": footer.first_row,
                "end_row": footer.end_row,
                "generation": footer.generation,
            }
            if table == "metrics":
                layout.pyramid.unlink(missing_ok=True)
            copy = layout.superseded(table) / f"{path.stem}.after-{step}.parquet"
            write_segment(copy, gone, **facts, sync=True)
            write_segment(path, rows.filter(pc.invert(late)), **facts, sync=True)


def _ends_by(path: Path, step: int) -> bool:
    """Whether the statistics of a segment say that it holds no later step."""
    metadata = pq.read_metadata(path)
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        columns = {group.column(at).path_in_schema: at for at in range(group.num_columns)}
        found = group.column(columns["step"]).statistics if "step" in columns else None
        if found is None or not found.has_min_max or found.max > step:
            return False
    return True
