import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from store.killing import flip_in_page

from entropylens.errors import EntropyLensError
from entropylens.records import FORMAT_VERSION, SCHEMAS
from entropylens.store import reader, segments
from entropylens.store.compact import compact
from entropylens.store.layout import Layout
from entropylens.store.reader import Cursor, Run, list_runs, open_run
from entropylens.store.segments import write_segment
from entropylens.store.status import RankStatus
from entropylens.store.writer import RunWriter


def log_values(writer: RunWriter, first: int, last: int) -> None:
    """One row for each number, which is its step too."""
    numbers = np.arange(first, last + 1)
    writer.write("metrics", {"name": "n", "value": numbers, "step": numbers})


def values(table: pa.Table) -> list[int]:
    return [int(value) for value in table["value"].to_pylist()]


def numbers(first: int, last: int) -> list[int]:
    return list(range(first, last + 1))


@contextmanager
def three_segments_and_a_tail(run_dir: Path) -> Iterator[tuple[RunWriter, Run]]:
    writer = RunWriter(run_dir, flush_seconds=3600, seal_rows=10)
    for first in (1, 11, 21):
        log_values(writer, first, first + 9)
        writer.flush()
    log_values(writer, 31, 35)
    writer.flush()
    assert len(Layout(run_dir).segments("metrics")) == 3
    try:
        yield writer, open_run(run_dir)
    finally:
        writer.close()


# -- filters -------------------------------------------------------------------------------------


@pytest.fixture(params=["tail", "segment"])
def filtered_run(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Run]:
    writer = RunWriter(tmp_path / "run", flush_seconds=3600)
    for step in (1, 2, 3):
        for phase in ("train", "eval"):
            for name, module in (
                ("loss", ""),
                ("entropy/token/mean", ""),
                ("entropy/token/p05", ""),
                ("entropy/head", "layers.0 (a+b)"),
                ("entropy/head", "layers.10"),
                ("entropyXtoken", "größe"),
            ):
                row = {"name": name, "module": module, "value": 1.0, "step": step, "phase": phase}
                writer.write("metrics", row)
    writer.flush()
    if request.param == "segment":
        writer._ask("seal", 60)
    yield open_run(tmp_path / "run")
    writer.close()


@pytest.mark.parametrize(
    ("names", "modules", "expected"),
    [
        (None, None, 6),
        ("loss", None, 1),
        ("nothing", None, 0),
        ([], None, 0),
        ("entropy/token/*", None, 2),
        ("entropy/*", None, 4),
        ("entropy?token", None, 1),
        ("*", None, 6),
        (["loss", "*/p05"], None, 2),
        (["loss", "*/p05", "*/mean"], None, 3),
        ("token", None, 0),
        (None, "", 3),
        (None, "layers.*", 2),
        (None, "layers.?", 0),
        (None, "layers.??", 1),
        (None, "layers?0*", 1),
        (None, "layers.0 (a+b)*", 1),
        (None, "*ö*", 1),
        (None, ["", "größe"], 4),
        ("entropy*", "layers*", 2),
    ],
)
def test_names_and_modules_are_chosen_by_name_or_pattern(
    filtered_run: Run, names: Any, modules: Any, expected: int
) -> None:
    assert filtered_run.metrics(names, modules).table.num_rows == expected * 6


@pytest.mark.parametrize(
    ("phases", "steps", "expected"),
    [
        ("eval", None, [1, 2, 3]),
        (["train", "eval"], None, [1, 1, 2, 2, 3, 3]),
        ("rollout", None, []),
        ("train", (2, None), [2, 3]),
        ("train", (None, 2), [1, 2]),
        ("train", (2, 2), [2]),
        ("train", (None, None), [1, 2, 3]),
        ("train", (4, 9), []),
    ],
)
def test_phases_and_steps_are_chosen_ends_included(
    filtered_run: Run, phases: Any, steps: Any, expected: list[int]
) -> None:
    found = filtered_run.metrics("loss", phases=phases, steps=steps)
    assert sorted(found.table["step"].to_pylist()) == expected


def test_every_table_is_read_with_filters_and_conditions(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", flush_seconds=3600)
    for table in SCHEMAS:
        for step in (1, 2):
            writer.write(table, {"step": step, "phase": "eval"})
    writer.flush()
    run = open_run(tmp_path / "run")
    methods: dict[str, Callable[..., Any]] = {
        "tokens": run.tokens,
        "samples": run.samples,
        "completions": run.completions,
        "spectra": run.spectra,
        "events": run.events,
        "metrics": run.metrics,
    }
    assert methods.keys() == SCHEMAS.keys()
    for table, method in methods.items():
        rows = method(steps=(2, None), phases="eval")
        assert rows.table.schema == SCHEMAS[table]
        assert rows.to_arrow()["step"].to_pylist() == [2]
        assert isinstance(rows.to_pandas(), pd.DataFrame)
        assert run.rows(table, where=[pc.field("step") < 2]).table["step"].to_pylist()[-1] == 1
    writer.close()


def test_filters_and_cursors_go_together(tmp_path: Path) -> None:
    with three_segments_and_a_tail(tmp_path / "run") as (writer, run):
        first = run.metrics(steps=(None, 3))
        assert values(first.table) == [1, 2, 3]
        log_values(writer, 36, 50)
        writer.flush()
        later = run.metrics(steps=(40, 42), since=first.cursor)
        assert values(later.table) == [40, 41, 42]


# -- cursors -------------------------------------------------------------------------------------


def test_a_cursor_gives_each_row_once_wherever_it_stands(tmp_path: Path) -> None:
    with three_segments_and_a_tail(tmp_path / "run") as (writer, run):
        whole = run.metrics()
        assert values(whole.table) == numbers(1, 35)
        assert not whole.restarted
        cursor = whole.cursor
        for position in range(36):
            at = Cursor(cursor.run_id, "metrics", cursor.epoch, ((0, position),))
            found = run.metrics(since=at)
            assert values(found.table) == numbers(position + 1, 35)
            assert (found.cursor, found.restarted) == (cursor, False)
        log_values(writer, 36, 37)
        writer.flush()
        assert values(run.metrics(since=cursor).table) == [36, 37]
        writer._ask("seal", 60)
        assert values(run.metrics(since=cursor).table) == [36, 37]


def test_a_cursor_may_be_kept_as_text(tmp_path: Path) -> None:
    with three_segments_and_a_tail(tmp_path / "run") as (writer, run):
        text = str(run.metrics().cursor)
        assert Cursor.parse(text) == run.metrics().cursor
        log_values(writer, 36, 36)
        writer.flush()
        rows = open_run(tmp_path / "run").metrics(since=text)
        assert values(rows.table) == [36]


@pytest.mark.parametrize("text", ["", "3", "[]", '["a", "b", "c", [1]]', '"abcd"', "{}"])
def test_other_text_is_no_cursor(tmp_path: Path, text: str) -> None:
    RunWriter(tmp_path / "run").close()
    with pytest.raises(ValueError, match="Cursor: expected the text of a cursor, got"):
        open_run(tmp_path / "run").metrics(since=text)


def test_a_cursor_of_another_run_or_table_is_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        RunWriter(tmp_path / name).close()
    one, two = open_run(tmp_path / "one"), open_run(tmp_path / "two")
    with pytest.raises(ValueError, match=r"Run.metrics: expected a cursor of this run's metrics"):
        one.metrics(since=two.metrics().cursor)
    with pytest.raises(ValueError, match=f"got one of events of run {one.run_id[:8]}"):
        one.metrics(since=str(one.events().cursor))


def test_a_cursor_of_before_a_resume_or_a_merge_gives_all_rows_again(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with three_segments_and_a_tail(run_dir):
        pass
    run = open_run(run_dir)
    cursor = run.metrics().cursor
    assert not run.metrics(since=cursor).restarted
    writer = RunWriter(run_dir, resume_step=20, flush_seconds=3600)
    resumed = run.metrics(since=cursor)
    assert resumed.restarted
    assert values(resumed.table) == numbers(1, 20)
    log_values(writer, 21, 22)
    writer.flush()
    later = run.metrics(since=resumed.cursor)
    assert (values(later.table), later.restarted) == ([21, 22], False)
    writer.close()
    compact(run_dir)
    merged = run.metrics(since=later.cursor)
    assert merged.restarted
    assert values(merged.table) == numbers(1, 22)
    assert not run.metrics(since=merged.cursor).restarted


def test_a_cursor_does_not_go_back_when_rows_vanish(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with three_segments_and_a_tail(run_dir) as (_, run):
        cursor = run.metrics().cursor
    os.unlink(Layout(run_dir).segments("metrics")[-1])
    rows = run.metrics(since=cursor)
    assert (values(rows.table), rows.cursor) == ([], cursor)


def test_a_run_is_followed_while_it_is_written(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", flush_seconds=0.001, seal_seconds=0.02)
    run, chance = open_run(tmp_path / "run"), random.Random(0)
    followed: list[int] = []
    cursor: Cursor | str | None = None
    last, reads, sealed = 0, 0, 0
    while sealed < 12 or len(followed) < last:
        sealed = len(Layout(tmp_path / "run").segments("metrics"))
        if sealed < 12:
            more = chance.randint(1, 40)
            log_values(writer, last + 1, last + more)
            last += more
        rows = run.metrics(since=cursor)
        assert not rows.restarted
        followed += values(rows.table)
        cursor = rows.cursor if chance.random() < 0.5 else str(rows.cursor)
        assert followed == numbers(1, len(followed))
        if reads % 7 == 0:
            whole = values(run.metrics().table)
            assert whole == numbers(1, len(whole))
            assert len(followed) <= len(whole) <= last
        reads += 1
    assert reads > 4
    writer.close()
    assert values(run.metrics(since=cursor).table) == []
    assert values(run.metrics().table) == numbers(1, last)


def test_a_read_starts_again_when_files_vanish_under_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with three_segments_and_a_tail(tmp_path / "run") as (writer, run):
        real, reads = segments.read_segment, [0]

        def merged_meanwhile(path: Path, *arguments: Any) -> pa.Table:
            reads[0] += 1
            if reads[0] == 2:
                writer.close()
                compact(tmp_path / "run")
            return real(path, *arguments)

        monkeypatch.setattr(reader, "read_segment", merged_meanwhile)
        assert sorted(values(run.metrics().table)) == numbers(1, 35)
        assert reads[0] == 3
        monkeypatch.setattr(reader, "read_segment", lambda *_: real(tmp_path / "gone", "metrics"))
        with pytest.raises(
            EntropyLensError, match=r"metrics to hold still for one read, but files"
        ):
            run.metrics()


def test_a_snapshot_is_segments_and_the_rows_that_none_covers(tmp_path: Path) -> None:
    with three_segments_and_a_tail(tmp_path / "run") as (_, run):
        paths, rows = run.snapshot("metrics")
        assert paths == Layout(tmp_path / "run").segments("metrics")
        assert values(rows) == numbers(31, 35)
        assert run.snapshot("tokens") == ([], SCHEMAS["tokens"].empty_table())


# -- damage --------------------------------------------------------------------------------------


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def write_other_rows(path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), path)


def write_text(path: Path) -> None:
    path.write_text("hello")


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def of_another_run(path: Path) -> None:
    facts = {"run_id": "other", "table": "metrics", "rank": 0, "first_row": 10, "end_row": 20}
    write_segment(path, SCHEMAS["metrics"].empty_table(), **facts)  # type: ignore[arg-type]


def of_another_table(path: Path) -> None:
    facts = {"table": "events", "rank": 0, "first_row": 10, "end_row": 20}
    run_id = open_run(path.parents[1]).run_id
    rows = SCHEMAS["events"].empty_table()
    write_segment(path, rows, run_id=run_id, **facts)  # type: ignore[arg-type]


def of_newer_format(path: Path) -> None:
    rows = pq.read_table(path)
    metadata = {**(rows.schema.metadata or {}), b"entropylens.format_version": b"2"}
    pq.write_table(rows.replace_schema_metadata(metadata), path)


def of_other_types(path: Path) -> None:
    rows = pq.read_table(path)
    metadata = rows.schema.metadata
    rows = rows.set_column(7, "value", pa.array([["x"]] * rows.num_rows))
    pq.write_table(rows.replace_schema_metadata(metadata), path)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (flip_in_page, "cannot be read: .*CRC"),
        (cut_off, "cannot be read: .*magic"),
        (empty, "cannot be read: .*0 bytes"),
        (write_other_rows, "is no segment of a run: no 'format_version'"),
        (write_text, "cannot be read: .*5 bytes"),
        (make_folder, "cannot be read: .*"),
        (of_another_run, "belongs to another run or table"),
        (of_another_table, "belongs to another run or table"),
        (of_newer_format, "cannot be read: format version 2 is newer than ours"),
        (of_other_types, "cannot be read: columns of metrics"),
    ],
)
def test_a_segment_that_cannot_be_read_is_named_and_the_rest_is_read(
    tmp_path: Path, harm: Callable[[Path], None], reason: str
) -> None:
    run_dir = tmp_path / "run"
    with three_segments_and_a_tail(run_dir):
        pass
    expected = numbers(1, 10) + numbers(21, 35)
    harm(run_dir / "metrics" / "000-000001.parquet")
    run = open_run(run_dir)
    with pytest.warns(UserWarning, match=f"skipped: .*000-000001.parquet {reason}") as caught:
        rows = run.metrics()
    assert values(rows.table) == expected
    assert caught[0].filename == __file__
    assert rows.warnings == [str(caught[0].message)]
    assert len(caught) == 1
    again = run.metrics(since=rows.cursor)  # warned of once, and the cursor is beyond it
    assert values(again.table) == []
    writer = RunWriter(run_dir, resume_step=40)
    log_values(writer, 36, 40)
    writer.close()
    assert values(run.metrics().table) == expected + numbers(36, 40)


@pytest.mark.parametrize("name", ["notes.txt", "000-1.parquet", "copy of 000-000000.parquet"])
def test_a_file_that_is_none_of_ours_is_named(tmp_path: Path, name: str) -> None:
    with three_segments_and_a_tail(tmp_path / "run") as (_, run):
        shutil.copy(Layout(run.path).segments("metrics")[0], run.path / "metrics" / name)
        (run.path / "metrics" / ".hidden").write_text("")
        with pytest.warns(UserWarning, match=f"skipped: .*{name} is no segment of a run") as caught:
            assert values(run.metrics().table) == numbers(1, 35)
        assert len(caught) == 1


def test_a_run_without_rows_is_empty_and_without_a_status_unknown(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", flush_seconds=3600)
    run = open_run(tmp_path / "run")
    assert run.metrics().table.equals(SCHEMAS["metrics"].empty_table())
    assert run.state() == "running"
    writer.close()
    (tmp_path / "run/status/rank-000.json").write_text("{")
    (tmp_path / "run/status/rank-old.json").write_text("{}")
    assert (run.status(), run.state()) == ([], "unknown")
    shutil.rmtree(tmp_path / "run" / "status")
    assert run.state() == "unknown"


# -- what a run says of itself -------------------------------------------------------------------


def test_the_state_is_that_of_the_worst_rank_of_the_newest_attempt(tmp_path: Path) -> None:
    RunWriter(tmp_path / "run").close()
    run, layout = open_run(tmp_path / "run"), Layout(tmp_path / "run")
    order = ["finished", "running", "stalled", "terminated", "crashed", "failed"]
    for rank, state in enumerate(order):
        status = RankStatus(run.run_id, rank, 1, state=state)
        if state == "stalled":
            status.state, status.step_time = "running", status.step_time - 601
        if state == "crashed":
            status.state, status.pid = "running", 2**22 + 1
        status.save(layout)
        assert run.state() == state
    RankStatus(run.run_id, 0, 2).save(layout)
    assert run.state() == "running"
    assert repr(run) == f"Run('run', '{tmp_path}/run', running)"


def test_a_process_without_a_heartbeat_has_crashed(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", flush_seconds=0.01)
    path = tmp_path / "run/status/rank-000.json"
    assert open_run(tmp_path / "run").state() == "running"
    first = json.loads(path.read_text())["heartbeat"]
    while json.loads(path.read_text())["heartbeat"] == first:
        assert open_run(tmp_path / "run").state() == "running"
    writer.close()
    status = json.loads(path.read_text())
    silent = {**status, "state": "running", "heartbeat": status["heartbeat"] - 61, "new": 1}
    path.write_text(json.dumps(silent))
    assert open_run(tmp_path / "run").state() == "crashed"


def test_a_resume_shows_after_a_refresh(tmp_path: Path) -> None:
    RunWriter(tmp_path / "run").close()
    run = open_run(tmp_path / "run")
    RunWriter(tmp_path / "run", resume_step=0, config={"a": 1}).close()
    assert (len(run.attempts), run.config) == (1, {})
    assert len(run.refresh().attempts) == 2
    assert run.config == {"a": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected a run directory with run.json, found none in"),
        ("{", r"expected a manifest in .*run.json, got a damaged one .*pyarrow, pandas or DuckDB"),
        ("[1]", "got a damaged one"),
        ("\udcff", "got a damaged one"),
        ('{"format_version": 1}', "got a damaged one"),
        ('{"format_version": 1, "run_id": "a", "attempts": 3}', "got a damaged one"),
        ('{"format_version": "x", "run_id": "a", "attempts": []}', "got a damaged one"),
        (
            '{"format_version": 2, "run_id": "a", "attempts": []}',
            "expected format version 1 or older, got 2 in .*; upgrade entropylens",
        ),
    ],
)
def test_a_manifest_that_is_missing_damaged_or_newer_is_refused(
    tmp_path: Path, content: str | None, message: str
) -> None:
    assert FORMAT_VERSION == 1
    with three_segments_and_a_tail(tmp_path / "run") as (_, run):
        pass
    path = tmp_path / "run" / "run.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
    for read in (lambda: open_run(tmp_path / "run"), run.refresh, lambda: compact(run.path)):
        with pytest.raises(EntropyLensError, match=message):
            read()


def test_what_is_no_folder_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("file", "nothing"):
        with pytest.raises(EntropyLensError, match=r"expected a run directory with run\.json"):
            open_run(tmp_path / name)
        with pytest.raises(EntropyLensError, match=f"expected a folder, found none at .*{name}"):
            list_runs(tmp_path / name)


def test_runs_are_listed_newest_first_and_a_broken_one_is_named(tmp_path: Path) -> None:
    for name in ("a", "deep/below/b", "c", "broken", ".hidden"):
        RunWriter(tmp_path / name).close()
    for name, day in (("a", 2), ("deep/below/b", 3), ("c", 1)):
        path = tmp_path / name / "run.json"
        manifest = {**json.loads(path.read_text()), "created": f"2026-01-0{day}T00:00:00+00:00"}
        path.write_text(json.dumps(manifest))
    (tmp_path / "broken" / "run.json").write_text("{")
    (tmp_path / "empty").mkdir()
    with pytest.warns(UserWarning, match=r"left out: .*broken/run.json") as caught:
        runs = list_runs(tmp_path)
    assert len(caught) == 1
    assert [run.name for run in runs] == ["b", "a", "c"]
    assert [run.name for run in list_runs(tmp_path / "a")] == ["a"]
    assert list_runs(tmp_path / "empty") == []


def test_runs_started_within_a_second_are_listed_newest_first(tmp_path: Path) -> None:
    for name in ("b", "c", "a"):
        RunWriter(tmp_path / name).close()
    assert [run.name for run in list_runs(tmp_path)] == ["a", "c", "b"]
