"""Columns as they are measured to Arrow record batches."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from entropylens.records import SCHEMAS

__all__ = ["record_batch", "row_count"]


def row_count(columns: Mapping[str, Any]) -> int:
    """Rows that columns and scalars together make."""
    return next((len(column) for column in columns.values() if _is_column(column)), 1)


def record_batch(
    table: str, columns: Mapping[str, Any], rows: int, rank: int, attempt: int, time: float
) -> pa.RecordBatch:
    """Rows of one table.

    Args:
        table: Of the log.
        columns: By name, an array or list of ``rows`` values, or a scalar for all of them.
        rows: How many.
        rank: Of the process.
        attempt: Of the run.
        time: Unix seconds, for columns that have none.

    Raises:
        KeyError: A table or column is not known.
        ValueError: Columns differ in length, or a value does not fit its type.
    """
    schema = SCHEMAS[table]
    known = {"phase": "train", "time": time, **columns, "rank": rank, "attempt": attempt}
    if table == "metrics":
        known.setdefault("module", "")
    if strange := known.keys() - set(schema.names):
        raise KeyError(f"{table} has no column {', '.join(sorted(strange))}")
    arrays = [_array(known.get(field.name), rows, field) for field in schema]
    return pa.record_batch(arrays, schema=schema)


def _is_column(value: Any) -> bool:
    return isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim > 0)


def _array(value: Any, rows: int, field: pa.Field) -> pa.Array:
    if value is None:
        return pa.nulls(rows, field.type)
    if not _is_column(value):
        value = [value.item() if isinstance(value, np.generic | np.ndarray) else value] * rows
    if len(value) != rows:
        raise ValueError(f"column {field.name} has {len(value)} values for {rows} rows")
    if field.name == "time":
        seconds = np.asarray(value, dtype=np.float64)
        return pa.array(np.round(seconds * 1e6).astype("int64")).cast(field.type)
    try:
        return pa.array(value, type=field.type)
    except UnicodeEncodeError:
        return pa.array([_encodable(item) for item in value], type=field.type)


def _encodable(value: Any) -> Any:
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
