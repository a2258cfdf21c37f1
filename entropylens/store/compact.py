"""Merging a finished run's segments into one a table and rank, and a pyramid for a first look."""

import ctypes
import os
import shutil
from pathlib import Path
from typing import Final

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from entropylens.records import SCHEMAS
from entropylens.store.layout import Layout, publish, sync_directory, temporary
from entropylens.store.manifest import load_manifest
from entropylens.store.pyramid import pyramid_facts, series_path
from entropylens.store.seal import seal_abandoned
from entropylens.store.segments import (
    Footer,
    encodings,
    read_footer,
    read_segment,
    write_segment,
)
from entropylens.store.status import Claim

__all__ = ["BUCKETS", "compact", "repair"]

BUCKETS: Final = 1000
"""Buckets of a series in the pyramid, at most."""

_ORDER: Final = {"metrics": ["name", "module", "step"]}
_BUCKETS_A_GROUP: Final = 1 << 15
_RENAME_EXCHANGE: Final = 2
_AT_FDCWD: Final = -100

_PYRAMID: Final = """
SELECT rank, phase, name, module, bucket, min(step) AS first_step, max(step) AS last_step,
       count(*) AS count, count(*) FILTER (NOT isfinite(value)) AS nonfinite,
       min(value) FILTER (isfinite(value)) AS min, max(value) FILTER (isfinite(value)) AS max,
       arg_max(value, place) AS last,
       arg_min(time, place) AS first_time, arg_max(time, place) AS last_time,
       arg_min(step, value) FILTER (isfinite(value)) AS min_step,
       arg_max(step, value) FILTER (isfinite(value)) AS max_step
FROM (SELECT *, place * least(total, {buckets}) // total AS bucket
      FROM (SELECT *, row_number() OVER (series ORDER BY step, time) - 1 AS place,
                   count(*) OVER series AS total
            FROM (SELECT rank, coalesce(phase, '') AS phase, coalesce(name, '') AS name,
                         coalesce(module, '') AS module, step, time, value
                  FROM rows WHERE {chosen} AND step IS NOT NULL AND value IS NOT NULL)
            WINDOW series AS (PARTITION BY rank, phase, name, module)))
GROUP BY rank, phase, name, module, bucket
ORDER BY name, module, phase, rank, bucket
"""

_SERIES: Final = """
SELECT rank, phase, name, module, sum(count)::BIGINT AS count, sum(nonfinite)::BIGINT AS nonfinite,
       min(first_step) AS first_step, max(last_step) AS last_step,
       arg_min(first_time, bucket) AS first_time, arg_max(last_time, bucket) AS last_time,
       min(min) AS min, max(max) AS max, arg_max(last, bucket) AS last
FROM pyramid GROUP BY rank, phase, name, module ORDER BY name, module, phase, rank
"""


def compact(path: str | Path) -> dict[str, tuple[int, int]]:
    """Merge the segments of a run that has ended, and write ``pyramid/``.

    Metrics are sorted by (name, module, step), other tables keep the order they were written in. A
    table's folder is replaced in one exchange, so that a reader finds the old files or the new; a
    segment that cannot be read, and a file that is not ours, stay as they are. Cursors start over.

    Args:
        path: The run directory.

    Returns:
        Segments before and after, by table.

    Raises:
        EntropyLensError: There is no run, or it is in use.

    Cost: One table of one rank is held in memory.
    """
    layout = Layout(Path(path))
    manifest = load_manifest(layout.root)
    ranks = sorted({0, *layout.ranks()})
    claims: list[Claim] = []
    try:
        for rank in ranks:
            claims.append(Claim(layout, rank))
        run_id = manifest["run_id"]
        repair(layout, run_id)
        for rank in ranks:
            seal_abandoned(layout, run_id, rank)
        counts = {table: _merge(layout, table, run_id) for table in SCHEMAS}
        _write_pyramid(layout, run_id)
    finally:
        for claim in claims:
            claim.release()
    return {table: count for table, count in counts.items() if count[0]}


def repair(layout: Layout, run_id: str) -> None:
    """End what a merge that was killed had begun: each table's folder is the old or the new."""
    for table in SCHEMAS:
        folder = layout.root / table
        if not folder.exists() and _beside(folder).exists():
            os.replace(_beside(folder), folder)
        for left in (_beside(folder), _aside(folder)):
            if left.exists():
                _discard(layout, left, folder, run_id)


def _beside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.merge")


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _readable(path: Path, table: str, run_id: str) -> Footer | None:
    try:
        read_segment(path, table)
        footer = read_footer(path)
    except (ValueError, OSError):
        return None
    return footer if footer.is_of(run_id, table) else None


def _merge(layout: Layout, table: str, run_id: str) -> tuple[int, int]:
    readable: dict[int, list[tuple[Path, Footer]]] = {}
    for path in layout.segments(table):
        footer = _readable(path, table, run_id)
        if footer is not None:
            readable.setdefault(footer.rank, []).append((path, footer))
    before = sum(map(len, readable.values()))
    if before == 0 or (before == len(readable) and _all_merged(readable)):
        return before, before
    folder = layout.root / table
    beside = _beside(folder)
    beside.mkdir()
    for rank, found in readable.items():
        rows = pa.concat_tables([read_segment(path, table) for path, _ in found])
        if table in _ORDER:
            rows = rows.sort_by([(column, "ascending") for column in _ORDER[table]])
        footers = [footer for _, footer in found]
        write_segment(
            beside / layout.segment(table, rank, layout.next_sequence(table, rank)).name,
            rows,
            run_id=run_id,
            table=table,
            rank=rank,
            first_row=min(footer.first_row for footer in footers),
            end_row=max(footer.end_row for footer in footers),
            generation=1 + max(footer.generation for footer in footers),
            sync=True,
        )
    _exchange(beside, folder)
    _discard(layout, beside, folder, run_id)
    sync_directory(layout.root)
    return before, len(readable)


def _all_merged(readable: dict[int, list[tuple[Path, Footer]]]) -> bool:
    return all(footer.generation > 0 for found in readable.values() for _, footer in found)


def _discard(layout: Layout, old: Path, new: Path, run_id: str) -> None:
    """Remove a folder whose rows are in ``new``; what is not ours moves there."""
    merged = {p for p in layout.segments(old.name) if _readable(p, new.name, run_id) is not None}
    for path in old.iterdir():
        unfinished = path.name.startswith(".") and path.name.endswith(".tmp")
        if not unfinished and path not in merged:
            os.replace(path, new / path.name)
    shutil.rmtree(old)


def _exchange(one: Path, other: Path) -> None:
    """Swap two folders: in one step on Linux, in two elsewhere."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    names = os.fsencode(one), os.fsencode(other)
    if renameat2 is not None and (
        renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0
    ):
        return
    os.replace(other, _aside(other))
    os.replace(one, other)
    os.replace(_aside(other), one)


def _write_pyramid(layout: Layout, run_id: str) -> None:
    found = {path: _readable(path, "metrics", run_id) for path in layout.segments("metrics")}
    footers = {str(path): footer for path, footer in found.items() if footer is not None}
    if not footers:
        return
    facts = pyramid_facts(run_id, list(footers.values()))
    pyramid = _buckets(list(footers))
    layout.pyramid.parent.mkdir(exist_ok=True)
    for path, rows in (
        (series_path(layout), _one_row_a_series(pyramid)),
        (layout.pyramid, pyramid),
    ):
        pq.write_table(
            rows.replace_schema_metadata(facts),
            temporary(path),
            compression="zstd",
            row_group_size=_BUCKETS_A_GROUP,
            **encodings(rows.schema),
            write_page_checksum=True,
        )
        publish(path, sync=True)


def _buckets(paths: list[str]) -> pa.Table:
    """One name after the other: a window over all rows would hold all of them."""
    with duckdb.connect() as connection:
        # A progress bar would be drawn into our output.
        connection.execute("SET enable_progress_bar = false; SET TimeZone = 'UTC'")
        connection.read_parquet(paths).create_view("rows")
        names = connection.execute("SELECT DISTINCT name FROM rows ORDER BY name NULLS FIRST")
        parts = []
        for (name,) in names.fetchall() or [(None,)]:
            chosen = "name IS NULL" if name is None else "name = ?"
            sql = _PYRAMID.format(buckets=BUCKETS, chosen=chosen)
            found = connection.execute(sql, [] if name is None else [name])
            parts.append(found.to_arrow_table())
    return pa.concat_tables(parts)


def _one_row_a_series(pyramid: pa.Table) -> pa.Table:
    with duckdb.connect() as connection:
        connection.execute("SET enable_progress_bar = false; SET TimeZone = 'UTC'")
        connection.register("pyramid", pyramid)
        return connection.execute(_SERIES).to_arrow_table()
