"""Segments: immutable Parquet files, each stating which rows of its rank it covers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from entropylens.records import FORMAT_VERSION, SCHEMAS
from entropylens.store.layout import publish, temporary

__all__ = ["Footer", "conform", "encodings", "read_footer", "read_segment", "write_segment"]

_PREFIX = "entropylens."
_ROWS_A_GROUP = 1 << 15
"""Of merged metrics, which are sorted by name: what is read to see a part of one series."""


@dataclass(frozen=True)
class Footer:
    """What a segment says of itself."""

    run_id: str
    table: str
    rank: int
    first_row: int
    end_row: int
    generation: int
    rows: int

    def is_of(self, run_id: str, table: str) -> bool:
        """Whether the segment belongs to this table of this run."""
        return (self.run_id, self.table) == (run_id, table)


def write_segment(
    path: Path,
    rows: pa.Table,
    *,
    run_id: str,
    table: str,
    rank: int,
    first_row: int,
    end_row: int,
    generation: int = 0,
    sync: bool = False,
) -> None:
    """Write a segment under a temporary name and move it into place.

    Args:
        path: Its final name.
        rows: With the table's schema.
        run_id: Of the run.
        table: Of the log.
        rank: That wrote the rows.
        first_row: Ordinal of the first row covered.
        end_row: One past the last ordinal covered; more rows than the segment holds where a resume
            took some out.
        generation: Raised by merging, which gives up the order of ordinals.
        sync: Wait for the disk.
    """
    facts = {
        "format_version": FORMAT_VERSION,
        "run_id": run_id,
        "table": table,
        "rank": rank,
        "first_row": first_row,
        "end_row": end_row,
        "generation": generation,
    }
    metadata = {f"{_PREFIX}{name}": str(value) for name, value in facts.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        rows.replace_schema_metadata(metadata),
        temporary(path),
        compression="zstd",
        **encodings(rows.schema),
        write_page_checksum=True,
        row_group_size=_ROWS_A_GROUP if table == "metrics" and generation else None,
    )
    publish(path, sync=sync)


def encodings(schema: pa.Schema) -> dict[str, Any]:
    """How columns are laid out so that they are small: options of `pyarrow.parquet.write_table`."""
    kinds = {field.name: field.type for field in schema}
    return {
        "use_dictionary": [name for name, kind in kinds.items() if pa.types.is_string(kind)],
        "use_byte_stream_split": [n for n, kind in kinds.items() if pa.types.is_floating(kind)],
        "column_encoding": {
            name: "DELTA_BINARY_PACKED"
            for name, kind in kinds.items()
            if pa.types.is_int64(kind) or pa.types.is_timestamp(kind)
        },
    }


def read_footer(path: Path) -> Footer:
    """Read what a segment says of itself.

    Raises:
        FileNotFoundError: It is gone.
        ValueError: It is damaged or no segment of ours.
    """
    try:
        found = pq.read_metadata(path)
        raw = found.metadata or {}
        facts: dict[str, Any] = {
            k.decode().removeprefix(_PREFIX): v.decode()
            for k, v in raw.items()
            if k.decode().startswith(_PREFIX)
        }
        if int(facts["format_version"]) > FORMAT_VERSION:
            raise ValueError(f"format version {facts['format_version']} is newer than ours")
        return Footer(
            run_id=facts["run_id"],
            table=facts["table"],
            rank=int(facts["rank"]),
            first_row=int(facts["first_row"]),
            end_row=int(facts["end_row"]),
            generation=int(facts["generation"]),
            rows=found.num_rows,
        )
    except FileNotFoundError:
        raise
    except KeyError as error:
        raise ValueError(f"{path} is no segment of a run: no {error}") from None
    except (pa.ArrowException, OSError, ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def read_segment(path: Path, table: str, condition: Any = None) -> pa.Table:
    """Read a segment's rows with the table's present schema.

    Args:
        path: Of the segment.
        table: Of the log.
        condition: A `pyarrow.compute` expression; None is all rows.

    Raises:
        FileNotFoundError: It is gone.
        ValueError: It is damaged.
    """
    try:
        rows = pq.read_table(
            path, filters=condition, partitioning=None, page_checksum_verification=True
        )
        return conform(rows, table)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def conform(rows: pa.Table, table: str) -> pa.Table:
    """The columns we know, by name, in our order; those it lacks are null.

    Raises:
        ValueError: A column is there twice, or of a type that does not become ours.
    """
    columns = []
    try:
        for field in SCHEMAS[table]:
            if field.name in rows.column_names:
                columns.append(rows[field.name].cast(field.type))
            else:
                columns.append(pa.nulls(rows.num_rows, field.type))
        return pa.table(columns, schema=SCHEMAS[table])
    except (pa.ArrowException, KeyError) as error:
        raise ValueError(f"columns of {table}: {error}") from None
