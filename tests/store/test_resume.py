from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from store.killing import kill
from store.logging_process import process, said, take_part
from store.strangers import STRANGERS, read_by

from entropylens.records import SCHEMAS
from entropylens.store.compact import compact
from entropylens.store.layout import Layout
from entropylens.store.reader import open_run
from entropylens.store.writer import RunWriter


def open_writer(run_dir: Path, **options: Any) -> RunWriter:
    return RunWriter(run_dir, **{"flush_seconds": 3600, **options})


def log_steps(writer: RunWriter, first: int, last: int) -> None:
    """Three rows a step, whose values say the attempt."""
    for step in range(first, last + 1):
        row = {"name": ["a", "b", "c"], "value": step + writer.attempt / 10, "step": step}
        writer.write("metrics", row)
        writer.step = step


def steps(table: pa.Table) -> list[float]:
    """The values of one of the names."""
    table = table.filter(pa.compute.equal(table["name"], "b"))
    return sorted(table["value"].to_pylist())


def superseded(run_dir: Path, table: str = "metrics") -> pa.Table:
    folder = run_dir / "superseded" / table
    parts = [pq.read_table(path) for path in sorted(folder.glob("*.parquet"))]
    return pa.concat_tables([SCHEMAS[table].empty_table(), *parts])


@pytest.mark.parametrize("how_it_ended", ["closed", "killed", "merged"])
def test_a_resume_from_an_earlier_step_shows_each_step_once_to_every_tool(
    tmp_path: Path, how_it_ended: str
) -> None:
    run_dir = tmp_path / "run"
    writer = open_writer(run_dir, seal_rows=12)
    for first in (1, 5, 9):
        log_steps(writer, first, first + 3)
        writer.flush()
    log_steps(writer, 13, 14)
    writer.flush()
    kill(writer) if how_it_ended == "killed" else writer.close()
    if how_it_ended == "merged":
        compact(run_dir)
    writer = open_writer(run_dir, resume_step=6)
    assert writer.step == 6
    log_steps(writer, 7, 9)
    writer.flush()
    expected = [*range(1, 7), 7.1, 8.1, 9.1]
    assert steps(open_run(run_dir).metrics().table) == expected
    writer.close()
    for name in STRANGERS:
        table = read_by(name, run_dir)
        assert steps(table) == expected
        assert table.num_rows == 3 * len(expected)
    assert steps(open_run(run_dir).metrics().table) == expected
    assert steps(superseded(run_dir)) == list(range(7, 15))


def test_a_run_may_be_resumed_again_and_again(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    for attempt, (first, last) in enumerate([(0, 10), (6, 8), (8, 12), (2, 4)]):
        writer = open_writer(run_dir, resume_step=first)
        assert writer.attempt == attempt
        log_steps(writer, first + 1, last)
        writer.close()
    expected = [1, 2, 3.3, 4.3]
    assert steps(open_run(run_dir).metrics().table) == expected
    for name in STRANGERS:
        assert steps(read_by(name, run_dir)) == expected
    run = open_run(run_dir)
    assert [attempt["start_step"] for attempt in run.attempts] == [0, 6, 8, 2]
    assert run.status()[0].attempt == 3
    gone = [*range(3, 11), 7.1, 8.1, 9.2, 10.2, 11.2, 12.2]
    assert steps(superseded(run_dir)) == sorted(gone)
    kinds = run.events().table["kind"].to_pylist()
    assert kinds == ["run/start", "run/resume", "run/end"]  # the others came after step 2


def test_ordinals_are_never_used_twice(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    writer = open_writer(run_dir)
    log_steps(writer, 1, 4)
    writer.close()
    (before,) = Layout(run_dir).segments("metrics")
    open_writer(run_dir, resume_step=0).close()
    (empty,) = Layout(run_dir).segments("metrics")
    assert empty == before
    assert pq.read_metadata(empty).num_rows == 0
    writer = open_writer(run_dir, resume_step=0)
    log_steps(writer, 1, 1)
    writer.close()
    last = Layout(run_dir).segments("metrics")[-1]
    assert pq.read_metadata(last).metadata[b"entropylens.first_row"] == b"12"
    assert last.name == "000-000001.parquet"


def test_rows_without_a_step_stay(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    writer = open_writer(run_dir)
    writer.write("metrics", {"name": "b", "value": [1.0, 2.0, 9.0], "step": [None, 2, 9]})
    writer.close()
    open_writer(run_dir, resume_step=5).close()
    assert steps(open_run(run_dir).metrics().table) == [1.0, 2.0]
    assert steps(superseded(run_dir)) == [9.0]


def test_every_table_is_rewound(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    writer = open_writer(run_dir)
    for table in SCHEMAS:
        writer.write(table, {"step": np.arange(10)})
    writer.close()
    open_writer(run_dir, resume_step=5).close()
    run = open_run(run_dir)
    for table in SCHEMAS:
        kept = run.rows(table, steps=(1, None)).table["step"].to_pylist()
        assert [step for step in kept if step != 5] == [1, 2, 3, 4]
        assert max(kept) == 5
        assert superseded(run_dir, table)["step"].to_pylist()[:4] == [6, 7, 8, 9]


def test_where_there_is_no_run_a_resume_starts_one(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "run", resume_step=7)
    log_steps(writer, 8, 8)
    writer.close()
    run = open_run(tmp_path / "run")
    assert steps(run.metrics().table) == [8]
    assert [attempt["start_step"] for attempt in run.attempts] == [7]


def test_a_segment_of_another_run_is_left_alone_and_covers_nothing(tmp_path: Path) -> None:
    other = open_writer(tmp_path / "other")
    for _ in range(50):
        log_steps(other, 1, 10)
    other.close()
    run_dir = tmp_path / "run"
    writer = open_writer(run_dir)
    log_steps(writer, 1, 3)
    writer.flush()
    kill(writer)
    (foreign,) = Layout(tmp_path / "other").segments("metrics")
    content = foreign.read_bytes()
    (run_dir / "metrics" / "000-000007.parquet").write_bytes(content)
    writer = open_writer(run_dir, resume_step=2)
    log_steps(writer, 3, 4)
    writer.close()
    with pytest.warns(UserWarning, match=r"000-000007\.parquet belongs to another run"):
        assert steps(open_run(run_dir).metrics().table) == [1, 2, 3.1, 4.1]
    assert (run_dir / "metrics" / "000-000007.parquet").read_bytes() == content


def test_a_tail_of_another_run_is_kept_aside(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    writer = open_writer(run_dir)
    log_steps(writer, 1, 3)
    writer.flush()
    kill(writer)
    tail = (run_dir / "metrics/000.tail.arrows").read_bytes()
    (run_dir / "run.json").unlink()
    open_writer(run_dir).close()
    assert open_run(run_dir).metrics().table.num_rows == 0
    kept = list((run_dir / "superseded" / "metrics").glob("*.damaged-*"))
    assert [path.read_bytes() for path in kept] == [tail]


def test_a_pyramid_does_not_outlive_the_rows_it_shows(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "run")
    log_steps(writer, 1, 3)
    writer.close()
    compact(tmp_path / "run")
    assert Layout(tmp_path / "run").pyramid.exists()
    open_writer(tmp_path / "run", resume_step=3).close()  # nothing is taken back
    assert Layout(tmp_path / "run").pyramid.exists()
    open_writer(tmp_path / "run", resume_step=1).close()
    assert not Layout(tmp_path / "run").pyramid.exists()


def test_two_ranks_resume_each_its_own_rows(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    for arguments in ((4,), (3, 2)):
        with process(take_part, run_dir, 1, 2, *arguments) as second:
            assert said(second) == "opening"
            with process(take_part, run_dir, 0, 2, *arguments) as first:
                assert (first.wait(30), second.wait(30)) == (0, 0)
    expected = [1, 2, 3, 101, 102, 103]
    run = open_run(run_dir)
    assert sorted(run.metrics().table["value"].to_pylist()) == expected
    attempts = run.metrics(steps=(3, 3)).table["attempt"].to_pylist()
    assert attempts == [1, 1]
    for name in STRANGERS:
        assert sorted(read_by(name, run_dir)["value"].to_pylist()) == expected
    assert sorted(superseded(run_dir)["value"].to_pylist()) == [3, 4, 103, 104]


def test_a_resume_with_fewer_ranks_rewinds_those_that_are_gone(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    first = open_writer(run_dir, world_size=2)
    second = open_writer(run_dir, rank=1, world_size=2)
    for writer in (first, second):
        log_steps(writer, 1, 4)
        writer.flush()
        kill(writer)
    writer = open_writer(run_dir, resume_step=2)
    log_steps(writer, 3, 3)
    writer.close()
    run = open_run(run_dir)
    assert steps(run.metrics().table) == [1, 1, 2, 2, 3.1]
    assert steps(read_by("duckdb", run_dir)) == [1, 1, 2, 2, 3.1]
    assert run.state() == "finished"
