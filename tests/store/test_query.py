import math
import re
import shutil
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pyarrow as pa
import pytest
from ibis.config import Config

from entropylens.errors import EntropyLensError
from entropylens.records import SCHEMAS
from entropylens.store.query import combine_ranks, select, series, summarise, summary
from entropylens.store.reader import Run, open_run
from entropylens.store.segments import write_segment
from entropylens.store.writer import RunWriter

NAN, INF = math.nan, math.inf


def log(writer: RunWriter, values: list[float], first: int = 1, **columns: Any) -> None:
    steps = list(range(first, first + len(values)))
    row = {"name": "loss/mean", "module": "", "phase": "train", "weight": None, **columns}
    writer.write("metrics", {"step": steps, "value": values, **row})


def finished(path: Path, values: list[float], **columns: Any) -> Run:
    writer = RunWriter(path, flush_seconds=0.01)
    log(writer, values, **columns)
    writer.close()
    return open_run(path)


def two_ranks(path: Path, values: list[list[float]], weights: list[float | None]) -> Run:
    writers = [RunWriter(path, rank=r, world_size=2, flush_seconds=0.01) for r in range(2)]
    for writer, mine, weight in zip(writers, values, weights, strict=True):
        log(writer, mine, weight=weight)
    for writer in writers:
        writer.close()
    return open_run(path)


def rows(run: Run | list[Run], sql: str) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for row in select(run, sql).to_pylist()]


def test_rows_of_segments_and_of_the_tail_are_each_there_once(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", flush_seconds=0.01, seal_rows=5)
    log(writer, [1.0] * 5)
    writer.flush()
    log(writer, [2.0] * 3, first=6)
    writer.flush()
    sql = "SELECT step, value FROM metrics ORDER BY step"
    expected = [(step, 1.0 if step < 6 else 2.0) for step in range(1, 9)]
    assert len(list((tmp_path / "run" / "metrics").glob("*.parquet"))) == 1
    assert rows(open_run(tmp_path / "run"), sql) == expected
    tail = tmp_path / "run" / "metrics" / "000.tail.arrows"
    shutil.copy(tail, tmp_path / "kept")
    writer.close()
    shutil.copy(tmp_path / "kept", tail)
    assert rows(open_run(tmp_path / "run"), sql) == expected


@pytest.mark.parametrize("sealed", [True, False])
def test_nan_is_the_greatest_number_in_every_clause(tmp_path: Path, sealed: bool) -> None:
    writer = RunWriter(tmp_path / "run", flush_seconds=0.01)
    log(writer, [1.0, NAN, 3.0, -0.0])
    writer.close() if sealed else writer.flush()
    run = open_run(tmp_path / "run")
    for condition, count in {"value > 5": 1, "value < 5": 3, "value = 'nan'": 1}.items():
        where = rows(run, f"SELECT count(*) FROM metrics WHERE {condition}")
        assert where == rows(run, f"SELECT count(*) FILTER ({condition}) FROM metrics")
        assert where == [(count,)], condition
    assert rows(run, "SELECT count(*) FROM metrics WHERE 1 / value < 0") == [(1,)]
    writer.close()


def test_every_table_can_be_asked_and_opens_with_the_name_of_the_run(tmp_path: Path) -> None:
    run = finished(tmp_path / "it's", [1.0])
    for table, schema in SCHEMAS.items():
        found = select(run, f"SELECT * FROM {table}")
        assert found.column_names == ["run", *schema.names]
        assert found.drop_columns("run").schema.types == schema.types
    assert rows(run, "SELECT DISTINCT run FROM metrics") == [("it's",)]


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("FROM METRICS SELECT step", [(1,), (2,)]),
        ("WITH metrics AS (SELECT 7 AS x) SELECT x FROM metrics;", [(7,)]),
        ("(SELECT 1) UNION ALL SELECT 2", [(1,), (2,)]),
        ("SELECT range FROM range(2)", [(0,), (1,)]),
        ("SELECT x FROM (VALUES (1)) AS t(x), unnest([5]) AS u(y)", [(1,)]),
        ("SELECT m.step FROM metrics m JOIN events e ON e.step = m.step AND abs(m.value) > 0", []),
        (
            "SELECT e.step FROM metrics m "
            "ASOF JOIN metrics e ON e.name = m.name AND m.step >= e.step",
            [(1,), (2,)],
        ),
        ("SELECT step FROM metrics m, LATERAL (SELECT m.step + 1 AS s) WHERE s = 2", [(1,)]),
        ("SELECT step FROM metrics, LATERAL unnest([value]) AS u(x) WHERE x > 1", [(2,)]),
        ("SELECT sum(value) OVER w FROM metrics WINDOW w AS (ORDER BY step)", [(1.0,), (3.0,)]),
        ("SELECT step FROM metrics QUALIFY row_number() OVER (ORDER BY step DESC) = 1", [(2,)]),
        ("SELECT quantile_cont(value, 0.5), arg_max(step, value) FROM metrics", [(1.5, 2)]),
        ("SELECT count(*) FROM (PIVOT metrics ON name IN ('loss/mean') USING max(value))", [(2,)]),
        (
            "WITH RECURSIVE t AS (SELECT 1 AS x UNION ALL SELECT x + 1 FROM t WHERE x < 2) FROM t",
            [(1,), (2,)],
        ),
        ("SELECT [x * 2 FOR x IN list(value)] FROM metrics", [([2.0, 4.0],)]),
        (
            "SELECT CASE WHEN regexp_matches(name, 'l.ss') AND step > 0 THEN step END FROM metrics",
            [(1,), (2,)],
        ),
        ("SELECT name GLOB 'loss*' FROM metrics LIMIT 1", [(True,)]),
        ("SELECT json_extract('{\"a\": 1}', '$.a')", [("1",)]),
        ("SELECT date_trunc('year', time) > '2020-01-01' FROM metrics LIMIT 1", [(True,)]),
    ],
)
def test_what_a_select_may_say(tmp_path: Path, sql: str, expected: list[tuple[Any, ...]]) -> None:
    assert sorted(rows(finished(tmp_path / "run", [1.0, 2.0]), sql)) == expected


@pytest.mark.parametrize(
    ("sql", "got"),
    [
        ("COPY (SELECT 1) TO 'x.csv'", "COPY"),
        ("ATTACH 'x.db'", "ATTACH"),
        ("PRAGMA version", "PRAGMA"),
        ("INSTALL httpfs", "LOAD"),
        ("SET threads = 1", "SET"),
        ("INSERT INTO metrics SELECT * FROM metrics", "INSERT"),
        ("CREATE TABLE x AS SELECT 1", "CREATE"),
        ("EXPORT DATABASE 'x'", "EXPORT"),
        ("CALL pragma_version()", "CALL"),
        ("EXPLAIN SELECT 1", "EXPLAIN"),
        ("SELECT 1; SELECT 2", "2 statements"),
        ("SELECT 1; COPY (SELECT 1) TO 'x.csv'", "2 statements"),
        ("", "0 statements"),
        ("SHOW TABLES", "SHOW"),
        ("SUMMARIZE metrics", "SUMMARIZE"),
        ("VALUES (1)", "VALUES"),
        ("SELECT 1 INTO x", "SELECT INTO"),
        ("SELCT 1", 'syntax error at or near "SELCT"'),
        ("SELECT * FROM read_csv('/etc/passwd')", r"read_csv\(\)"),
        ("SELECT * FROM metrics, read_text('/etc/passwd')", r"read_text\(\)"),
        ("WITH x AS (SELECT * FROM read_blob('/x')) SELECT 1", r"read_blob\(\)"),
        ("SELECT 1 WHERE 'x' IN (SELECT file FROM glob('/*'))", r"glob\(\)"),
        ("SELECT * FROM parquet_metadata('x')", r"parquet_metadata\(\)"),
        ("SELECT * FROM parquet_scan('x')", r"parquet_scan\(\)"),
        ("SELECT * FROM query('SELECT 1')", r"query\(\)"),
        ("SELECT * FROM duckdb_settings()", r"duckdb_settings\(\)"),
        ("SELECT * FROM repeat(1, 2)", r"repeat\(\)"),
        ("SELECT getenv('HOME')", r"getenv\(\)"),
        ("SELECT list_transform([1], x -> getenv('HOME'))", r"getenv\(\)"),
        ("SELECT current_setting('temp_directory')", r"current_setting\(\)"),
        ("SELECT * FROM '/etc/passwd'", "got '/etc/passwd'"),
        ('SELECT * FROM "x.parquet"', "got 'x.parquet'"),
        ("SELECT * FROM information_schema.tables", r"got 'information_schema\.tables'"),
        ("SELECT * FROM metrics_of_0", "did you mean 'metrics'"),
        ("SELECT * FROM metric", "did you mean 'metrics'"),
        ("SELECT nothing FROM metrics", 'column "nothing" not found'),
        ("SELECT 'a'::INTEGER FROM metrics", "Could not convert"),
    ],
)
def test_what_a_select_may_not_say(run: Run, sql: str, got: str) -> None:
    with pytest.raises(EntropyLensError, match=f"^query: .*{got}"):
        select(run, sql)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finished(tmp_path_factory.mktemp("query") / "run", [1.0])


def test_the_engine_itself_opens_no_file_and_sees_no_variable_of_ours(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = pa.table({"x": [1]})
    monkeypatch.setattr("entropylens.store.query.secret", secret, raising=False)
    scoped = 'SELECT * FROM (WITH "{0}" AS (SELECT 1) FROM "{0}"), "{0}"'
    for name in ("/etc/passwd", "secret"):
        with pytest.raises(EntropyLensError, match="query: Catalog Error: Table with name"):
            select(run, scoped.format(name))


def test_the_engine_is_locked_for_statements_that_would_pass(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("entropylens.store.query._checked", lambda sql: {"metrics"})
    for sql in (
        "FROM read_text('/etc/passwd')",
        f"COPY (SELECT 1) TO '{run.path / 'x.csv'}'",
        "SET enable_external_access = true",
        f"ATTACH '{run.path / 'x.db'}'",
        f"FROM read_parquet('{run.path}/metrics/*.parquet')",
    ):
        with pytest.raises(
            EntropyLensError, match=r"disabled by configuration|cannot be changed|Cannot change"
        ):
            select(run, sql)


def test_nothing_is_drawn_into_the_output_while_a_query_runs(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("entropylens.store.query._checked", lambda sql: set())
    assert rows(run, "SELECT current_setting('enable_progress_bar')") == [(False,)]


def test_several_runs_are_told_apart_by_name_and_namesakes_by_path(tmp_path: Path) -> None:
    one = finished(tmp_path / "one", [1.0])
    two = finished(tmp_path / "two", [2.0])
    namesake = finished(tmp_path / "deeper" / "two", [3.0])
    sql = "SELECT run, value FROM metrics ORDER BY value"
    assert rows([one, two], sql) == [("one", 1.0), ("two", 2.0)]
    paths = [("one", 1.0), (str(two.path), 2.0), (str(namesake.path), 3.0)]
    assert rows([one, two, namesake], sql) == paths
    assert summarise([one, two])["run"].to_pylist() == ["one", "two"]
    with pytest.raises(ValueError, match="query: expected one run or several, each once, got 1 tw"):
        select([one, open_run(one.path)], "SELECT 1")
    with pytest.raises(ValueError, match="each once, got none"):
        select([], "SELECT 1")


def test_a_segment_without_a_newer_column_has_nulls_there(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", [1.0])
    old = run.rows("metrics").table.drop_columns(["weight"])
    write_segment(
        run.path / "metrics" / "000-000007.parquet",
        old,
        run_id=run.run_id,
        table="metrics",
        rank=0,
        first_row=1,
        end_row=2,
    )
    assert rows(run, "SELECT value, weight FROM metrics") == [(1.0, None), (1.0, None)]


def test_a_damaged_segment_is_left_out_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "run"
    writer = RunWriter(path, flush_seconds=0.01, seal_rows=1000)
    for first in (1, 1001):
        log(writer, list(np.random.default_rng(first).normal(size=1000)), first=first)
        writer.flush()
    writer.close()
    damaged = path / "metrics" / "000-000000.parquet"
    content = bytearray(damaged.read_bytes())
    for place in range(len(content) // 3, len(content) // 3 + 40):
        content[place] ^= 0xFF
    damaged.write_bytes(content)
    with pytest.warns(UserWarning, match=r"skipped: .*000-000000.parquet cannot be read"):
        found = rows(open_run(path), "SELECT count(*), min(step), sum(value) IS NULL FROM metrics")
    assert found == [(1000, 1001, False)]


def test_files_that_vanish_under_a_query_make_it_start_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, snapshot = finished(tmp_path / "run", [1.0]), Run.snapshot
    looks = []

    def merged_meanwhile(self: Run, table: str) -> tuple[list[Path], pa.Table]:
        paths, tail = snapshot(self, table)
        looks.append(table)
        return ([*paths, tmp_path / "gone.parquet"] if len(looks) < 3 else paths), tail

    monkeypatch.setattr(Run, "snapshot", merged_meanwhile)
    assert rows(run, "SELECT value FROM metrics") == [(1.0,)]
    assert len(looks) == 3
    looks.clear()
    monkeypatch.setattr("entropylens.store.query._RELISTS", 2)
    with pytest.raises(EntropyLensError, match=r"query: files of .* keep vanishing"):
        select(run, "SELECT value FROM metrics")


def test_a_series_is_weighted_over_ranks(tmp_path: Path) -> None:
    run = two_ranks(tmp_path / "run", [[1.0, 2.0], [4.0, NAN]], [300.0, 100.0])
    first, second = series(run, "loss/mean").to_pylist()
    assert (first["step"], first["value"], first["weight"], first["rows"]) == (1, 1.75, 400.0, 2)
    assert second["step"] == 2
    assert math.isnan(second["value"])


def test_where_a_rank_gave_no_weight_the_mean_is_plain(tmp_path: Path) -> None:
    run = two_ranks(tmp_path / "run", [[1.0], [4.0]], [300.0, None])
    assert series(run, "loss/mean")["value"].to_pylist() == [2.5]


def test_one_rank_keeps_every_bit(tmp_path: Path) -> None:
    values = [0.1, 1e308, -5e-324, INF, -INF, 1 / 3]
    run = finished(tmp_path / "run", values, weight=3.0)
    assert series(run)["value"].to_pylist() == values


def test_names_may_be_patterns_and_letters_of_sql_are_only_letters(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", flush_seconds=0.01)
    for name in ("a_b/mean", "axb/mean", "c/p05", "c/p50"):
        log(writer, [1.0], name=name)
    writer.close()
    run = open_run(tmp_path / "run")

    def found(names: Any) -> list[str]:
        return summarise(run, names)["name"].to_pylist()

    assert found("a_b/mean") == found(["a_b*"]) == ["a_b/mean"]
    assert found(["a?b/*", "c/p05"]) == ["a_b/mean", "axb/mean", "c/p05"]
    assert found(["a%", "x' OR 1=1 --"]) == found([]) == []
    assert len(found(None)) == 4


def test_a_summary_agrees_with_an_independent_reference(tmp_path: Path) -> None:
    values = np.random.default_rng(3).normal(size=200)
    values[[7, 11, 199]] = [INF, NAN, NAN]
    order = np.random.default_rng(4).permutation(200)
    writer = RunWriter(tmp_path / "run", flush_seconds=0.01)
    row = {"name": "loss/mean", "module": "", "phase": "train", "weight": 1.0}
    writer.write("metrics", {**row, "step": order + 1, "value": values[order]})
    log(writer, [NAN, NAN], name="b")
    writer.close()
    empty, found = summarise(open_run(tmp_path / "run")).to_pylist()
    finite = values[np.isfinite(values)]
    assert (found["count"], found["nonfinite"], found["last_step"]) == (200, 3, 200)
    assert (found["first"], found["min"], found["max"]) == (values[0], finite.min(), finite.max())
    assert math.isnan(found["last"])
    assert found["mean"] == pytest.approx(finite.mean(), rel=1e-12)
    assert (empty["count"], empty["nonfinite"]) == (2, 2)
    assert empty["min"] is empty["max"] is empty["mean"] is None


def test_both_expressions_compile_for_spark_with_nothing_folded_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class SparkOptions(Config):  # type: ignore[misc]
        treat_nan_as_null: bool = False

    monkeypatch.setattr(ibis.options, "pyspark", SparkOptions())
    columns = {"run": "string", **{field.name: str(field.type) for field in SCHEMAS["metrics"]}}
    types = {"double": "float64", "timestamp[us, tz=UTC]": "timestamp('UTC')"}
    schema = {name: types.get(kind, kind) for name, kind in columns.items()}
    combined = combine_ranks(ibis.table(schema, name="metrics"))
    for expression in (combined, summary(combined)):
        sql = ibis.to_sql(expression, dialect="pyspark")
        assert re.search(r"\bSUM\(`\w+`\.`value` \* `\w+`\.`weight`\)", sql)
        assert not re.search(r"\b(TRUE|FALSE)\b", sql)
    assert "MAX_BY" in sql
    assert "1.7976931348623157E+308" in sql.upper()


@pytest.mark.parametrize(
    ("name", "values", "weights", "expected"),
    [
        ("tokens/step", [30.0, 30.0], [None, None], 60.0),
        ("entropy/token/count", [3.0, 5.0], [3.0, 5.0], 8.0),
        ("entropy/token/min", [0.5, 0.25], [3.0, 5.0], 0.25),
        ("entropy/token/max", [0.5, 0.25], [3.0, 5.0], 0.5),
        ("step/seconds", [1.0, 2.0], [None, None], 2.0),
        ("gradient/shard_norm/after_clip", [3.0, 4.0], [None, None], 5.0),
        ("gradient/norm/after_clip", [3.0, 3.0], [None, None], 3.0),
        ("entropy/token/mean", [1.0, 2.0], [1.0, 3.0], 1.75),
        ("tokens/step", [30.0, float("nan")], [None, None], float("nan")),
        ("entropy/token/min", [0.5, float("nan")], [3.0, 5.0], float("nan")),
        ("user/mine", [1.0, 2.0], [None, None], 1.5),
    ],
)
def test_ranks_are_combined_as_the_dictionary_says(
    tmp_path: Path,
    name: str,
    values: list[float],
    weights: list[float | None],
    expected: float,
) -> None:
    writers = [RunWriter(tmp_path / "run", rank=rank, world_size=2) for rank in range(2)]
    for writer, value, weight in zip(writers, values, weights, strict=True):
        log(writer, [value], name=[name], weight=weight)
        writer.close()
    found = series(open_run(tmp_path / "run"), name)["value"].to_pylist()
    assert found == pytest.approx([expected], nan_ok=True)
