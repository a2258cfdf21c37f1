"""Rows of a log in files of other kinds, every digit kept."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["WRITERS", "as_json"]

_BATCH_ROWS: Final = 10_000


def as_json(value: Any) -> Any:
    """What JSON can hold: "NaN", "Infinity" and "-Infinity" stand for what is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): as_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(inner) for inner in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _write_csv(rows: "pa.Table", path: Path) -> None:
    import pyarrow as pa
    from pyarrow import csv

    for place, field in enumerate(rows.schema):
        if pa.types.is_list(field.type):
            texts = [None if v is None else json.dumps(as_json(v)) for v in rows[place].to_pylist()]
            rows = rows.set_column(place, field.name, pa.array(texts, pa.string()))
    csv.write_csv(rows, path)


def _write_parquet(rows: "pa.Table", path: Path) -> None:
    import pyarrow.parquet as pq

    pq.write_table(rows, path, compression="zstd")


def _write_json(rows: "pa.Table", path: Path) -> None:
    with open(path, "w", encoding="utf-8") as file:
        before = "["
        for batch in rows.to_batches(max_chunksize=_BATCH_ROWS):
            for row in batch.to_pylist():
                file.write(f"{before}\n{json.dumps(as_json(row), ensure_ascii=False)}")
                before = ","
        file.write("\n]\n" if before == "," else "[]\n")


WRITERS: Final = {"csv": _write_csv, "parquet": _write_parquet, "json": _write_json}
