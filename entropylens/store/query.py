"""Questions to the log: one SELECT from anybody, and our own aggregations as Ibis expressions.

DuckDB runs both, embedded, without access to files, network or settings: it is handed Arrow
datasets over the segments and the rows of the tails. Its own Parquet reader is not used, because it
neither verifies page checksums nor counts NaN where a file's statistics leave it out.
"""

import re
import tempfile
import warnings
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import duckdb
import pyarrow as pa
import pyarrow.dataset as ds

from entropylens.dictionary import definitions
from entropylens.errors import EntropyLensError, unknown_name
from entropylens.records import SCHEMAS
from entropylens.store.filters import split_patterns
from entropylens.store.reader import Run
from entropylens.store.segments import read_segment

if TYPE_CHECKING:
    import ibis.expr.types as ir
    from duckdb import DuckDBPyConnection

__all__ = ["combine_ranks", "select", "series", "summarise", "summary"]

_LARGEST: Final = 1.7976931348623157e308
_RELISTS: Final = 20
_FROM_FUNCTIONS: Final = frozenset({"range", "generate_series", "unnest"})
_OUTSIDE: Final = re.compile(
    r"(read_|parquet_|sniff_|duckdb_|pragma_|json_execute|load_|st_read|test_|which_secret"
    r"|current_setting|write_log|.*_(scan|attach|query)(_|$)|(glob|getenv|query|query_table)$).*"
)
"""Functions that read files, the environment or other SQL; the engine's lock stands behind this."""
_LOCKED: Final[dict[str, Any]] = {
    "enable_external_access": False,
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    "python_enable_replacements": False,
}
_PARQUET: Final = ds.ParquetFileFormat(
    default_fragment_scan_options=ds.ParquetFragmentScanOptions(page_checksum_verification=True)
)


def select(runs: Run | Sequence[Run], sql: str) -> pa.Table:
    """Answer one SELECT over the tables of the log, each row once, segments and tails.

    Every table opens with a column ``run``, the run's name. As everywhere in DuckDB, NaN is greater
    than every number: leave it out with ``isfinite(value)``.

    Args:
        runs: One run or several; runs of the same name are told apart by their paths.
        sql: One SELECT, WITH or UNION in DuckDB's dialect.

    Returns:
        What it selects.

    Raises:
        ValueError: No run, or one run twice.
        EntropyLensError: Anything else than one SELECT over the log's tables, or one that DuckDB
            does not accept.

    Cost: Streams the tables it names; sorts and groups spill to a temporary folder.
    """
    tables = _checked(sql)

    def ask(connection: "DuckDBPyConnection") -> pa.Table:
        connection.execute("SET lock_configuration = true")
        return connection.execute(sql).to_arrow_table()

    return _asked(runs, tables, ask)


def summarise(runs: Run | Sequence[Run], names: str | Sequence[str] | None = None) -> pa.Table:
    """What each series did: one row by run, name, module and phase.

    Args:
        runs: One run or several.
        names: Metric names, or patterns with ``*`` and ``?``; None is all.

    Returns:
        The columns of `summary`, ordered by name, module, phase and run.
    """
    order = ["name", "module", "phase", "run"]
    return _asked(runs, {"metrics"}, lambda c: _ordered(summary(_combined(c, names)), order))


def series(runs: Run | Sequence[Run], names: str | Sequence[str] | None = None) -> pa.Table:
    """One value a step, combined over ranks as `combine_ranks` says.

    Args:
        runs: One run or several.
        names: Metric names, or patterns with ``*`` and ``?``; None is all.

    Returns:
        The columns of `combine_ranks`, ordered by name, module, phase, run and step.
    """
    order = ["name", "module", "phase", "run", "step"]
    return _asked(runs, {"metrics"}, lambda c: _ordered(_combined(c, names), order))


# -- expressions, for any engine that Ibis knows --------------------------------------------------


def combine_ranks(metrics: "ir.Table") -> "ir.Table":
    """One row a run, phase, name, module and step: what the ranks measured, together.

    As the metric dictionary says under ``ranks``: counts are added up, extremes are extremes, the
    norms of shards make a norm, and everything else, names of your own included, is the mean
    weighted by ``weight`` (the tokens behind each value), or the plain mean where a rank gave no
    weight. It is exact for means; quantiles are combined by the same mean, which is only near the
    quantile of all ranks' tokens. A rank's NaN makes the step NaN.

    Args:
        metrics: The metrics table, with a column ``run``.

    Returns:
        run, phase, name, module, step, value, weight (the sum, null where unknown), rows.
    """
    import ibis

    value, weight = metrics.value, metrics.weight
    together = {
        "sum": value.sum(),
        "min": value.min(),
        "max": value.max(),
        "root_sum_square": (value * value).sum().sqrt(),
    }
    named: dict[str, list[str]] = {rule: [] for rule in together}
    for name, known in definitions().items():
        named.setdefault(known.ranks, []).append(name)
    weighted = weight.notnull().all() & (weight.sum() > 0)
    combined = ibis.cases(
        (value.isnan().any(), float("nan")),
        *((metrics.name.isin(named[r]).any(), v) for r, v in together.items() if named[r]),
        (value.min() == value.max(), value.max()),
        (weighted, (value * weight).sum() / weight.sum()),
        else_=value.mean(),
    )
    return metrics.group_by("run", "phase", "name", "module", "step").agg(
        value=combined, weight=weight.sum(), rows=metrics.count()
    )


def summary(combined: "ir.Table") -> "ir.Table":
    """First, last and extremes of each series.

    Args:
        combined: What `combine_ranks` gives.

    Returns:
        run, name, module, phase, count (of steps), nonfinite (how many of them are NaN or
        infinite), first, last (both as they are, NaN included), min, max, mean (over finite values,
        null where there is none), last_step.
    """
    value, step = combined.value, combined.step
    # Not isinf(): Ibis compiles it to FALSE for Spark.
    finite = value.abs() <= _LARGEST
    return combined.group_by("run", "name", "module", "phase").agg(
        count=combined.count(),
        nonfinite=(~finite).sum(),
        first=value.argmin(step),
        last=value.argmax(step),
        min=value.min(where=finite),
        max=value.max(where=finite),
        mean=value.mean(where=finite),
        last_step=step.max(),
    )


def _combined(connection: "DuckDBPyConnection", names: str | Sequence[str] | None) -> "ir.Table":
    import ibis

    metrics = ibis.duckdb.from_connection(connection).table("metrics")
    if names is not None:
        plain, patterns = split_patterns(names)
        chosen = metrics.name.isin(plain)
        for pattern in patterns:
            chosen |= metrics.name.re_search(pattern)
        metrics = metrics.filter(chosen)
    return combine_ranks(metrics)


def _ordered(expression: "ir.Table", columns: Sequence[str]) -> pa.Table:
    return expression.order_by(list(columns)).to_pyarrow()


# -- what a SELECT may say ------------------------------------------------------------------------


def _checked(sql: str) -> set[str]:
    """The tables that a SELECT reads; DuckDB's parser and sqlglot's must both agree that it is one.

    Raises:
        EntropyLensError: It is something else, or names what is not of the log.
    """
    import sqlglot
    from sqlglot import exp

    try:
        with duckdb.connect(config=_LOCKED) as connection:
            kinds = [statement.type.name for statement in connection.extract_statements(sql)]
    except duckdb.Error as error:
        raise EntropyLensError(f"query: expected SQL, got {_first_line(error)}") from None
    if kinds != ["SELECT"]:
        _refuse(f"{len(kinds)} statements" if len(kinds) != 1 else kinds[0])
    try:
        tree = sqlglot.parse_one(sql, dialect="duckdb")
    except sqlglot.errors.SqlglotError as error:
        _refuse(f"what cannot be checked: {_first_line(error)}")
    if not isinstance(tree, exp.Select | exp.SetOperation | exp.Subquery):
        _refuse(tree.key.upper())
    forbidden = tree.find(exp.Into, exp.DML, exp.DDL, exp.Command, exp.Copy, exp.Summarize)
    if forbidden is not None and not isinstance(forbidden, exp.Query):
        _refuse(f"{forbidden.key.upper()} in it")
    for function in tree.find_all(exp.Func):
        _check_function(function)
    defined = {cte.alias_or_name.lower() for cte in tree.find_all(exp.CTE)}
    return _tables(tree, defined)


def _check_function(function: Any) -> None:
    from sqlglot import exp

    plain = isinstance(function, exp.Anonymous)
    name = (function.name if plain else function.sql_name()).lower()
    source = isinstance(function.parent, exp.Table | exp.Lateral | exp.From | exp.Join)
    in_from = source and function.arg_key == "this"
    if _OUTSIDE.fullmatch(name) or (in_from and name not in _FROM_FUNCTIONS):
        raise EntropyLensError(
            f"query: expected functions of values, got {name}(), which may read files or "
            f"settings; FROM takes {', '.join(SCHEMAS)} and {', '.join(sorted(_FROM_FUNCTIONS))}"
        )


def _tables(tree: Any, defined: Collection[str]) -> set[str]:
    from sqlglot import exp

    found = set()
    for table in tree.find_all(exp.Table):
        name = table.name.lower()
        if isinstance(table.this, exp.Func) or (name in defined and not table.db):
            continue
        if name not in SCHEMAS or table.db:
            got = f"{table.db}.{table.name}" if table.db else table.name
            raise EntropyLensError(unknown_name("query", "table", got, SCHEMAS))
        found.add(name)
    return found


def _refuse(got: str) -> NoReturn:
    raise EntropyLensError(
        f"query: expected one SELECT over {', '.join(SCHEMAS)}, got {got}; a log is only read: to "
        f"write its rows elsewhere, use entropylens export"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


# -- the engine -----------------------------------------------------------------------------------


def _asked(
    runs: Run | Sequence[Run],
    tables: Collection[str],
    ask: Callable[["DuckDBPyConnection"], pa.Table],
) -> pa.Table:
    """Ask anew where files were sealed or merged meanwhile; leave out segments that are damaged."""
    labelled = _labelled([runs] if isinstance(runs, Run) else list(runs))
    damaged: set[Path] = set()
    for _ in range(_RELISTS):
        paths: list[tuple[Path, str]] = []
        try:
            with (
                tempfile.TemporaryDirectory(prefix="entropylens-") as scratch,
                duckdb.connect(config={**_LOCKED, "temp_directory": scratch}) as connection,
            ):
                # A progress bar would be drawn into standard output, terminal or not.
                connection.execute("SET enable_progress_bar = false; SET TimeZone = 'UTC'")
                for table in tables:
                    paths += _create_view(connection, labelled, table, damaged)
                return ask(connection)
        except FileNotFoundError:
            continue
        except (duckdb.InvalidInputException, duckdb.IOException) as error:
            if not _left_or_damaged(paths, damaged):
                raise EntropyLensError(f"query: {_first_line(error)}") from None
        except duckdb.Error as error:
            raise EntropyLensError(f"query: {_first_line(error)}") from None
    raise EntropyLensError(f"query: files of {labelled[0][1].path} keep vanishing")


def _labelled(runs: Sequence[Run]) -> list[tuple[str, Run]]:
    places = [run.path.resolve() for run in runs]
    if not runs or len(set(places)) != len(places):
        got = f"{len(places) - len(set(places))} twice" if runs else "none"
        raise ValueError(f"query: expected one run or several, each once, got {got}")
    names = [run.name for run in runs]
    labels = [run.name if names.count(run.name) == 1 else str(run.path) for run in runs]
    return list(zip(labels, runs, strict=True))


def _create_view(
    connection: "DuckDBPyConnection",
    labelled: Sequence[tuple[str, Run]],
    table: str,
    damaged: Collection[Path],
) -> list[tuple[Path, str]]:
    schema, parts, used = SCHEMAS[table], [], []
    # A bare column of floats would have its conditions pushed down to Arrow, where NaN is neither
    # greater nor smaller than a number, while elsewhere in DuckDB it is the greatest.
    columns = ", ".join(
        f'greatest("{field.name}") AS "{field.name}"'
        if pa.types.is_floating(field.type)
        else f'"{field.name}"'
        for field in schema
    )
    for number, (label, run) in enumerate(labelled):
        found, tail = run.snapshot(table)
        paths = [path for path in found if path not in damaged]
        sources = [ds.dataset(tail, schema=schema)]
        if paths:
            files = [str(path) for path in paths]
            sources.append(ds.dataset(files, schema=schema, format=_PARQUET))
        connection.register(f"{table}_of_{number}", ds.dataset(sources))
        quoted = label.replace("'", "''")
        parts.append(f"SELECT '{quoted}' AS run, {columns} FROM {table}_of_{number}")
        used += [(path, table) for path in paths]
    connection.execute(f"CREATE VIEW {table} AS {' UNION ALL '.join(parts)}")
    return used


def _left_or_damaged(paths: Sequence[tuple[Path, str]], damaged: set[Path]) -> bool:
    explained = False
    for path, table in paths:
        try:
            read_segment(path, table)
        except FileNotFoundError:
            explained = True
        except ValueError as error:
            explained = True
            damaged.add(path)
            warnings.warn(f"skipped: {error}", UserWarning, stacklevel=4)
    return explained
