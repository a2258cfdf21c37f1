import errno
import json
import logging
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from store.killing import kill
from store.logging_process import fork, hold, process, said, take_part, tell
from store.strangers import STRANGERS, read_by, segments

from entropylens.errors import EntropyLensError
from entropylens.records import FORMAT_VERSION, SCHEMAS
from entropylens.store import opening
from entropylens.store import writer as writer_module
from entropylens.store.batches import record_batch
from entropylens.store.layout import Layout
from entropylens.store.reader import open_run
from entropylens.store.status import RankStatus
from entropylens.store.writer import RunWriter

NAN, INF = float("nan"), float("inf")


def open_writer(run_dir: Path, **options: Any) -> RunWriter:
    """A writer whose thread does nothing of its own accord."""
    return RunWriter(run_dir, **{"flush_seconds": 3600, **options})


def log_value(writer: RunWriter, *values: float, step: int = 1) -> None:
    writer.write("metrics", {"name": "loss", "value": list(values), "step": step})


def found_values(run_dir: Path) -> list[float]:
    return open_run(run_dir).metrics().table["value"].to_pylist()


# -- rows as they are ----------------------------------------------------------------------------


@pytest.mark.parametrize("sealed", [False, True])
def test_values_come_back_as_they_were_written(tmp_path: Path, sealed: bool) -> None:
    writer = open_writer(tmp_path / "run")
    values = [NAN, INF, -INF, -0.0, 1e-320, 0.1]
    weights = np.array([1.0, NAN, 2.0, 3.0, 4.0, 5.0])
    writer.write(
        "metrics",
        {
            "name": ["a/b"] * 6,
            "module": ["", "h.0", "größe", "層", "🌍", "lone \ud800 half"],
            "value": values,
            "weight": weights,
            "step": np.arange(6),
            "phase": "eval",
            "time": 1_700_000_000.123456,
        },
    )
    assert writer.flush()
    if sealed:
        writer.close()
        assert len(segments(tmp_path / "run")) == 1
    table = open_run(tmp_path / "run").metrics().table
    writer.close()
    assert table.schema == SCHEMAS["metrics"]
    np.testing.assert_array_equal(table["value"].to_numpy(), values)
    assert np.signbit(table["value"].to_numpy()).tolist() == [False] * 2 + [True] * 2 + [False] * 2
    np.testing.assert_array_equal(table["weight"].to_numpy(), weights)
    modules = ["", "h.0", "größe", "層", "🌍", "lone ? half"]
    assert table["module"].to_pylist() == modules
    assert table["step"].to_pylist() == list(range(6))
    assert set(table["phase"].to_pylist()) == {"eval"}
    assert set(table["rank"].to_pylist() + table["attempt"].to_pylist()) == {0}
    assert set(table["time"].cast(pa.int64()).to_pylist()) == {1_700_000_000_123_456}


def test_what_is_missing_is_null_and_what_is_one_value_holds_for_all_rows(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "run")
    writer.step = 3
    before = time.time()
    writer.write("metrics", {"name": "x", "value": np.float32(0.5), "weight": np.array(2)})
    writer.write("metrics", {"name": ("x", "y"), "value": [None, 1], "step": None})
    writer.write("metrics", {"name": ["q \ud800", None], "value": 7})
    writer.close()
    rows = open_run(tmp_path / "run").metrics().table.to_pylist()
    assert [row["name"] for row in rows] == ["x", "x", "y", "q ?", None]
    assert [row["value"] for row in rows] == [0.5, None, 1.0, 7.0, 7.0]
    assert [row["weight"] for row in rows] == [2.0, None, None, None, None]
    assert [row["step"] for row in rows] == [3, None, None, 3, 3]
    assert {row["module"] for row in rows} == {""}
    assert {row["phase"] for row in rows} == {"train"}
    assert all(before <= row["time"].timestamp() <= time.time() for row in rows)


def test_every_table_takes_its_columns_lists_among_them(tmp_path: Path) -> None:
    examples: dict[pa.DataType, Any] = {
        pa.string(): "ä",
        pa.int32(): 1,
        pa.int64(): 2**40,
        pa.float32(): 0.5,
        pa.float64(): 0.1,
        pa.list_(pa.float32()): [0.5, NAN],
    }
    writer = open_writer(tmp_path / "run")
    for table, schema in SCHEMAS.items():
        columns = {field.name: [examples[field.type], None] for field in list(schema)[5:]}
        writer.write(table, columns)
    writer.write("spectra", {"module": "h", "values": [np.arange(3, dtype=np.float32), []]})
    writer.close()
    run = open_run(tmp_path / "run")
    assert run.status()[0].faults == {}
    for table, schema in SCHEMAS.items():
        rows = run.rows(table).table
        assert rows.schema == schema
        if table != "events":
            for field in list(schema)[5:]:
                column = rows[field.name].slice(0, 2)
                assert column.equals(
                    pa.chunked_array([[examples[field.type], None]], field.type)
                ) or (str(column.to_pylist()) == str([examples[field.type], None]))
    assert run.spectra().table["values"].to_pylist()[2:] == [[0.0, 1.0, 2.0], []]


def test_rows_that_do_not_fit_are_counted_and_take_no_others_with_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = open_writer(tmp_path / "run")
    log_value(writer, 1.0)
    writer.write("metrics", {"name": ["a", "b"], "value": [1.0, 2.0, 3.0]})
    writer.write("metrics", {"name": "a", "value": "much"})
    writer.write("metrics", {"name": "a", "value": "more"})
    writer.write("metrics", {"name": ["\ud800", 5], "value": 1.0})
    writer.write("metrics", {"name": "a", "value": 1.0, "time": NAN})
    writer.write("metrics", {"name": "a", "valu": 1.0})
    writer.write("metric", {"name": "a", "value": 1.0})
    log_value(writer, 2.0)
    writer.close()
    run = open_run(tmp_path / "run")
    assert found_values(tmp_path / "run") == [1.0, 2.0]
    (status,) = run.status()
    assert status.lost_rows == 9
    assert sum(status.faults.values()) == 7
    assert status.faults["rows of metrics: KeyError"] == 1
    assert status.faults["rows of metric: KeyError"] == 1
    logged = [record.getMessage() for record in caplog.records]
    assert len(logged) == len(status.faults)
    assert "metrics has no column valu" in caplog.text
    assert "column value has 3 values for 2 rows" in caplog.text


def test_evidence_that_json_cannot_hold_raises_nothing(tmp_path: Path) -> None:
    class Odd:
        def __repr__(self) -> str:
            raise RuntimeError("no name")

    writer = open_writer(tmp_path / "run")
    circle: dict[str, Any] = {"value": 1}
    circle["self"] = circle
    odd: dict[Any, Any] = {("a", 1): NAN, "array": np.float32(0.5), 3: {1}}
    writer.event("a", "m", evidence=odd)
    writer.event("b", "m", evidence=circle)
    writer.event("c", "m", evidence={"odd": Odd()})
    writer.close()
    rows = open_run(tmp_path / "run").events().table.to_pylist()[1:4]
    first = json.loads(rows[0]["evidence"], parse_constant=pytest.fail)
    assert first == {"('a', 1)": "nan", "array": 0.5, "3": [1]}
    assert json.loads(rows[1]["evidence"])["value"] == 1
    assert [row["kind"] for row in rows] == ["a", "b", "c"]
    assert rows[2]["evidence"] is None
    assert open_run(tmp_path / "run").status()[0].faults == {"evidence of c: RuntimeError": 1}


# -- when rows are where -------------------------------------------------------------------------


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_rows_reach_a_file_and_then_a_segment_by_themselves(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", flush_seconds=0.01, seal_seconds=0.2)
    log_value(writer, 1.0)
    wait_until(lambda: found_values(tmp_path / "run") == [1.0])
    wait_until(lambda: segments(tmp_path / "run"))
    assert found_values(tmp_path / "run") == [1.0]
    writer.close()
    assert len(segments(tmp_path / "run")) == 1


def test_a_tail_is_sealed_when_it_has_enough_rows(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "run", seal_rows=4)
    log_value(writer, 1.0, 2.0, 3.0)
    writer.flush()
    assert not segments(tmp_path / "run")
    log_value(writer, 4.0)
    writer.flush()
    wait_until(lambda: segments(tmp_path / "run"))
    log_value(writer, 5.0)
    writer.flush()
    assert found_values(tmp_path / "run") == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert pq.read_metadata(segments(tmp_path / "run")[0]).num_rows == 4
    writer.close()


def test_closing_leaves_segments_only_waits_for_the_disk_and_is_done_once(
    tmp_path: Path, no_power_is_lost: list[int]
) -> None:
    writer = open_writer(tmp_path / "run")
    log_value(writer, 1.0, step=4)
    writer.step = 4
    no_power_is_lost.clear()
    writer.close()
    assert len(no_power_is_lost) >= 6  # two segments, a status, and the folders of each
    writer.close("failed")
    log_value(writer, 2.0)
    assert writer.flush() is False
    run = open_run(tmp_path / "run")
    assert run.state() == "finished"
    assert found_values(tmp_path / "run") == [1.0]
    assert not list((tmp_path / "run").glob("*/*.arrows"))
    assert run.events().table["message"].to_pylist()[-1] == "the run finished at step 4"
    (status,) = run.status()
    assert (status.step, status.rows, status.lost_rows) == (4, {"events": 2, "metrics": 1}, 0)


def test_a_segment_and_a_tail_state_what_they_hold(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "run")
    log_value(writer, 1.0, 2.0)
    writer._ask("seal", 60)
    log_value(writer, 3.0)
    writer.flush()
    run_id = open_run(tmp_path / "run").run_id
    (segment,) = segments(tmp_path / "run")
    metadata = pq.read_metadata(segment)
    assert {k: v for k, v in metadata.metadata.items() if k.startswith(b"entropylens.")} == {
        b"entropylens.format_version": str(FORMAT_VERSION).encode(),
        b"entropylens.run_id": run_id.encode(),
        b"entropylens.table": b"metrics",
        b"entropylens.rank": b"0",
        b"entropylens.first_row": b"0",
        b"entropylens.end_row": b"2",
        b"entropylens.generation": b"0",
    }
    with pa.ipc.open_stream(tmp_path / "run/metrics/000.tail.arrows") as stream:
        assert stream.schema.metadata == {
            b"format_version": b"1",
            b"run_id": run_id.encode(),
            b"rank": b"0",
            b"attempt": b"0",
            b"first_row": b"2",
        }
    writer.close()


# -- where a run goes ----------------------------------------------------------------------------


def test_a_run_that_has_ended_is_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(3):
        writer = open_writer(tmp_path / "run")
        log_value(writer, number)
        writer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run-2", "run-3"]
    for number, name in enumerate(["run", "run-2", "run-3"]):
        assert found_values(tmp_path / name) == [number]
    assert f"{tmp_path}/run holds a run that has ended; writing to {tmp_path}/run-3" in caplog.text
    assert len({open_run(path).run_id for path in tmp_path.iterdir()}) == 3


def test_a_file_is_no_run_dir(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(EntropyLensError, match=r"expected run_dir to be a directory, got the file"):
        RunWriter(tmp_path / "run")
    with pytest.raises(
        EntropyLensError, match=r"expected to write into .*run/below, got .*Not a d"
    ):
        RunWriter(tmp_path / "run" / "below")


@pytest.mark.parametrize("store", ["s3://bucket/run", "gs://bucket/run", Path("s3://bucket/run")])
def test_an_object_store_is_no_run_dir(store: str | Path) -> None:
    with pytest.raises(EntropyLensError, match=r"expected a local run_dir, got 's3:|got 'gs:"):
        RunWriter(store)


def test_a_folder_that_takes_no_files_is_no_run_dir(tmp_path: Path) -> None:
    with pytest.raises(
        EntropyLensError, match=r"expected to write into /proc/run, got .*choose an"
    ):
        RunWriter("/proc/run")
    if os.access("/", os.W_OK):
        return  # root writes everywhere
    tmp_path.chmod(0o500)
    with pytest.raises(EntropyLensError, match=r"expected to write into .*Permission denied"):
        RunWriter(tmp_path / "run")


def test_two_writers_of_one_process_do_not_share_a_run(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "run")
    for resume_step in (None, 0):
        with pytest.raises(EntropyLensError, match=r"free for rank 0, but it is in use by process"):
            RunWriter(tmp_path / "run", resume_step=resume_step)
    writer.close()
    RunWriter(tmp_path / "run", resume_step=0).close()


def test_two_processes_do_not_share_a_run(tmp_path: Path) -> None:
    with process(hold, tmp_path / "run") as holder:
        assert said(holder) == "ready"
        for resume_step in (None, 0):
            with pytest.raises(EntropyLensError, match=f"in use by process {holder.pid} on"):
                RunWriter(tmp_path / "run", resume_step=resume_step)
        assert open_run(tmp_path / "run").state() == "running"
        holder.kill()
        holder.wait()
        assert open_run(tmp_path / "run").state() == "crashed"
    writer = open_writer(tmp_path / "run", resume_step=1)
    writer.close()
    assert found_values(tmp_path / "run") == [1.0]


def test_a_run_with_a_fresh_heartbeat_from_another_host_is_in_use(tmp_path: Path) -> None:
    open_writer(tmp_path / "run").close()
    run = open_run(tmp_path / "run")
    there = RankStatus(run.run_id, 0, 0, host="elsewhere", pid=1)
    there.save(Layout(tmp_path / "run"))
    with pytest.raises(EntropyLensError, match="in use by process 1 on elsewhere"):
        RunWriter(tmp_path / "run", resume_step=0)
    assert run.state() == "running"
    path = tmp_path / "run/status/rank-000.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "heartbeat": time.time() - 61}))
    assert run.state() == "crashed"
    RunWriter(tmp_path / "run", resume_step=0).close()


def test_a_run_of_a_newer_format_is_not_written_to(tmp_path: Path) -> None:
    open_writer(tmp_path / "run").close()
    path = tmp_path / "run" / "run.json"
    newer = {**json.loads(path.read_text()), "format_version": FORMAT_VERSION + 1}
    path.write_text(json.dumps(newer))
    for _ in range(2):
        for resume_step in (None, 3):
            with pytest.raises(EntropyLensError, match=r"expected format version 1 .* got 2 in"):
                RunWriter(tmp_path / "run", resume_step=resume_step)
    assert json.loads(path.read_text()) == newer


@pytest.mark.parametrize(
    "name", ["rank=8", "lr=0.1", "a b", "run[1]", "r*n", "größe", "it's", "100%", "run:1", "{x}"]
)
def test_a_run_dir_may_have_an_odd_name(tmp_path: Path, name: str) -> None:
    writer = open_writer(tmp_path / name, seal_rows=2)
    log_value(writer, 1.0, 2.0)
    writer.flush()
    log_value(writer, 3.0)
    writer.flush()
    assert found_values(tmp_path / name) == [1.0, 2.0, 3.0]
    writer.close()
    assert open_run(tmp_path / name).metrics().table["rank"].to_pylist() == [0, 0, 0]


def test_a_config_that_json_cannot_hold_is_kept_as_text(tmp_path: Path) -> None:
    circle: list[Any] = [1]
    circle.append(circle)
    config = {
        "path": tmp_path,
        ("a", 1): {2},
        "nan": NAN,
        "number": np.int64(3),
        "half": "\ud800",
        "circle": circle,
        "none": None,
    }
    open_writer(tmp_path / "run", config=config).close()
    text = (tmp_path / "run" / "run.json").read_text(encoding="utf-8")
    json.loads(text, parse_constant=pytest.fail)
    assert open_run(tmp_path / "run").config == {
        "path": repr(tmp_path),
        "('a', 1)": [2],
        "nan": "nan",
        "number": 3,
        "half": "?",
        "circle": [1, "[1, [...]]"],
        "none": None,
    }


def test_the_manifest_says_what_ran(tmp_path: Path) -> None:
    open_writer(tmp_path / "run", name="mine", world_size=1).close()
    run = open_run(tmp_path / "run")
    assert run.name == "mine"
    assert run.manifest["format_version"] == FORMAT_VERSION
    assert run.manifest["versions"].keys() >= {"python", "entropylens", "numpy", "pyarrow"}
    (attempt,) = run.attempts
    assert attempt["started"] >= run.created
    assert (attempt["attempt"], attempt["start_step"], attempt["world_size"]) == (0, 0, 1)
    assert attempt["host"] == run.manifest["host"]


# -- a disk that fails ---------------------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """Whether tails find the disk full, and whether it takes half of a batch before it says so."""
    state, real = {"is full": False, "takes half": False}, os.write

    def write(descriptor: int, data: Any) -> int:
        if not (state["is full"] and isinstance(data, pa.Buffer)):
            return real(descriptor, data)
        if state["takes half"]:
            return real(descriptor, memoryview(data)[: data.size // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", write)
    return state


@pytest.mark.parametrize("takes_half", [False, True])
def test_a_full_disk_delays_rows_and_is_reported_once(
    tmp_path: Path,
    full_disk: dict[str, bool],
    caplog: pytest.LogCaptureFixture,
    takes_half: bool,
) -> None:
    full_disk["takes half"] = takes_half
    writer = open_writer(tmp_path / "run")
    log_value(writer, 1.0)
    assert writer.flush() is True
    full_disk["is full"] = True
    for value in (2.0, 3.0):
        log_value(writer, value)
        assert writer.flush() is False
    assert found_values(tmp_path / "run") == [1.0]
    full_disk["is full"] = False
    log_value(writer, 4.0)
    assert writer.flush() is True
    assert found_values(tmp_path / "run") == [1.0, 2.0, 3.0, 4.0]
    writer.close()
    assert found_values(tmp_path / "run") == [1.0, 2.0, 3.0, 4.0]
    (status,) = open_run(tmp_path / "run").status()
    assert status.faults == {"tail of metrics: OSError": 2}
    assert status.lost_rows == 0
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "tail of metrics failed with OSError" in caplog.text


def test_rows_that_a_full_disk_never_took_are_counted_as_lost(
    tmp_path: Path, full_disk: dict[str, bool]
) -> None:
    writer = open_writer(tmp_path / "run")
    log_value(writer, 1.0)
    writer.flush()
    full_disk["is full"] = True
    log_value(writer, 2.0, 3.0)
    writer.close()
    (status,) = open_run(tmp_path / "run").status()
    assert status.lost_rows == 3  # with the event that says how the run ended
    assert status.state == "finished"
    assert found_values(tmp_path / "run") == [1.0]


def test_a_segment_that_cannot_be_written_leaves_its_rows_in_the_tail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = open_writer(tmp_path / "run", seal_rows=2)
    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", fail)
        log_value(writer, 1.0, 2.0)
        writer.flush()
        log_value(writer, 3.0)
        writer.flush()
        assert writer._ask("seal", 60)
        assert found_values(tmp_path / "run") == [1.0, 2.0, 3.0]
        assert not segments(tmp_path / "run")
    writer.close()
    assert found_values(tmp_path / "run") == [1.0, 2.0, 3.0]
    assert len(segments(tmp_path / "run")) == 1
    (status,) = open_run(tmp_path / "run").status()
    assert status.faults["segment of metrics: OSError"] >= 2
    assert status.lost_rows == 0
    assert caplog.text.count("segment of metrics failed") == 1


def test_more_rows_than_may_wait_are_counted_as_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = open_writer(tmp_path / "run", queue_rows=10)
    for value in range(4):
        log_value(writer, *[value] * 4)
    writer.flush()
    log_value(writer, *[9] * 4)
    writer.close()
    assert found_values(tmp_path / "run") == [0.0] * 4 + [1.0] * 4 + [9.0] * 4
    (status,) = open_run(tmp_path / "run").status()
    assert status.lost_rows == 8
    assert status.faults == {"queue: RuntimeError": 2}
    assert caplog.text.count("more than 10 rows wait for disk") == 1


@pytest.mark.parametrize("flushed", [False, True])
def test_a_run_dir_removed_while_it_is_written_takes_what_comes_later(
    tmp_path: Path, flushed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    writer = open_writer(tmp_path / "run")
    log_value(writer, 1.0)
    writer._ask("seal", 60)
    log_value(writer, 2.0)
    writer.flush()
    shutil.rmtree(tmp_path / "run")
    log_value(writer, 3.0)
    if flushed:
        assert writer.flush()
        assert found_values(tmp_path / "run") == [3.0]
    log_value(writer, 4.0)
    writer.close()
    assert found_values(tmp_path / "run") == [3.0, 4.0]
    run = open_run(tmp_path / "run")
    assert run.state() == "finished"
    assert run.status()[0].lost_rows == 0
    assert caplog.text.count("tail of metrics failed with FileNotFoundError") == 1


def test_a_run_dir_removed_before_the_first_row_of_a_table_is_still_a_run(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    log_value(writer, 1.0)
    writer.flush()
    assert found_values(tmp_path / "run") == [1.0]
    writer.close()


def test_a_run_dir_moved_while_it_is_written_keeps_what_it_had(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "run")
    log_value(writer, 1.0)
    writer.flush()
    (tmp_path / "run").rename(tmp_path / "moved")
    log_value(writer, 2.0)
    writer.close()
    assert found_values(tmp_path / "moved") == [1.0]
    assert found_values(tmp_path / "run") == [2.0]


# -- several threads and processes ---------------------------------------------------------------


def test_threads_may_write_at_once(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", flush_seconds=0.001, seal_rows=200)

    def work(number: int) -> None:
        for value in range(200):
            log_value(writer, 1000 * number + value)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.close()
    expected = [1000 * number + value for number in range(4) for value in range(200)]
    assert sorted(found_values(tmp_path / "run")) == expected


def test_two_ranks_write_one_run_from_two_processes(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with process(take_part, run_dir, 1, 2, 3) as second:
        assert said(second) == "opening"
        time.sleep(0.2)
        assert not (run_dir / "run.json").exists()
        with process(take_part, run_dir, 0, 2, 3) as first:
            assert (first.wait(30), second.wait(30)) == (0, 0)
    run = open_run(run_dir)
    assert run.state() == "finished"
    assert run.manifest["world_size"] == 2
    assert [status.rank for status in run.status()] == [0, 1]
    expected = [(0, 1), (0, 2), (0, 3), (1, 101), (1, 102), (1, 103)]
    for table in (run.metrics().table, *(read_by(name, run_dir) for name in STRANGERS)):
        pairs = zip(table["rank"].to_pylist(), table["value"].to_pylist(), strict=True)
        assert sorted(pairs) == expected


@pytest.mark.parametrize("resume_step", [None, 2])
def test_a_rank_joins_a_run_that_rank_0_has_meanwhile_opened_and_ended(
    tmp_path: Path, resume_step: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if resume_step is not None:
        open_writer(tmp_path / "run", world_size=2).close()

    def open_and_end(seconds: float) -> None:
        monkeypatch.undo()
        open_writer(tmp_path / "run", world_size=2, resume_step=resume_step).close()

    monkeypatch.setattr(opening, "WAIT_SECONDS", 1.0)
    monkeypatch.setattr(time, "sleep", open_and_end)
    writer = open_writer(tmp_path / "run", rank=1, world_size=2, resume_step=resume_step)
    writer.close()
    assert [status.attempt for status in open_run(tmp_path / "run").status()] == [
        int(resume_step is not None)
    ] * 2


def test_a_rank_that_waits_in_vain_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "WAIT_SECONDS", 0.1)
    for _ in range(2):
        with pytest.raises(EntropyLensError, match=r"expected rank 0 to open .*run within 0 s"):
            RunWriter(tmp_path / "run", rank=1, world_size=2)


def test_a_rank_that_starts_again_alone_keeps_what_it_had_written(tmp_path: Path) -> None:
    first = open_writer(tmp_path / "run", world_size=2)
    for value in (1.0, 2.0):
        second = open_writer(tmp_path / "run", rank=1, world_size=2)
        log_value(second, value)
        second.flush()
        kill(second)
    assert found_values(tmp_path / "run") == [1.0, 2.0]
    first.close()


def test_forked_workers_change_nothing(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with process(fork, run_dir) as logging:
        assert said(logging) == "worker exited 0"
        assert said(logging) == "sleeper exited -15"
        with pytest.raises(EntropyLensError, match=f"in use by process {logging.pid} on"):
            RunWriter(run_dir, resume_step=0)
        tell(logging)
        assert logging.wait(30) == 0
    run = open_run(run_dir)
    assert run.state() == "finished"
    assert run.metrics().table["name"].to_pylist() == ["before", "after"]
    assert run.events().table["kind"].to_pylist() == ["run/start", "run/end"]


def test_a_producer_that_is_always_faster_keeps_no_row_from_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row that is turned into a batch is followed by another before the next is taken."""
    made, fast = 0, True

    def one_more() -> None:
        nonlocal made
        made += 1
        writer.write("metrics", {"name": "loss/mean", "value": float(made), "step": made})

    def outpaced(table: str, *rest: Any) -> Any:
        if fast and table == "metrics":
            one_more()
        return record_batch(table, *rest)

    writer = RunWriter(tmp_path / "run", flush_seconds=0.01, seal_seconds=0.05)
    monkeypatch.setattr(writer_module, "record_batch", outpaced)
    one_more()
    run, deadline = open_run(tmp_path / "run"), time.monotonic() + 20
    sealed: list[Path] = []
    while not sealed and time.monotonic() < deadline:
        time.sleep(0.01)
        sealed = list((tmp_path / "run" / "metrics").glob("*.parquet"))
    fast = False
    writer.close()
    assert sealed
    steps = run.metrics("loss/mean").to_pandas()["step"].tolist()
    assert sorted(steps) == list(range(1, made + 1))
