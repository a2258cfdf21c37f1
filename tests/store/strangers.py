"""How tools that know nothing of entropylens read a run: each file of ``metrics/*.parquet``."""

from collections.abc import Callable
from pathlib import Path

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from entropylens.records import SCHEMAS


def segments(run_dir: Path, table: str = "metrics") -> list[Path]:
    """What a glob over ``*.parquet`` finds."""
    return sorted(path for path in (run_dir / table).glob("*.parquet"))


def _with_pyarrow(run_dir: Path, table: str) -> pa.Table:
    return pq.read_table([str(path) for path in segments(run_dir, table)], partitioning=None)


def _with_duckdb(run_dir: Path, table: str) -> pa.Table:
    pattern = f"{run_dir}/{table}/*.parquet"
    with duckdb.connect() as connection:
        return connection.read_parquet(pattern, hive_partitioning=False).to_arrow_table()


def _with_pandas(run_dir: Path, table: str) -> pa.Table:
    frames = [pd.read_parquet(path) for path in segments(run_dir, table)]
    return pa.Table.from_pandas(pd.concat(frames), preserve_index=False)


STRANGERS: dict[str, Callable[[Path, str], pa.Table]] = {
    "pyarrow": _with_pyarrow,
    "duckdb": _with_duckdb,
    "pandas": _with_pandas,
}


def read_by(name: str, run_dir: Path, table: str = "metrics") -> pa.Table:
    """All rows of a table as one of `STRANGERS` reads them; none where there is no file."""
    if not segments(run_dir, table):
        return SCHEMAS[table].empty_table()
    return STRANGERS[name](run_dir, table)
