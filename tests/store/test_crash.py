import ctypes
import itertools
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from store.killing import Killed, bury, flush_or_die, kill, killed_at
from store.logging_process import NAMES, ROWS_A_STEP, count, end, process, said, wait_for_sigterm
from store.strangers import STRANGERS, read_by, segments

from entropylens.store.compact import compact
from entropylens.store.reader import open_run
from entropylens.store.tail import read_tail
from entropylens.store.writer import RunWriter

ROWS = 4


def log_steps(writer: RunWriter, first: int, last: int) -> None:
    """`ROWS` rows a step, each with a value of its own."""
    for step in range(first, last + 1):
        values = np.arange(ROWS) + ROWS * step
        names = [f"name/{number}" for number in range(ROWS)]
        writer.write("metrics", {"name": names, "value": values, "step": step})


def values_of(first: int, last: int) -> list[int]:
    return list(range(ROWS * first, ROWS * (last + 1)))


def values(table: pa.Table) -> list[int]:
    return sorted(int(value) for value in table["value"].to_pylist())


def seen(run_dir: Path) -> list[int]:
    """What our reader finds, and it warns of nothing."""
    return values(open_run(run_dir).metrics().table)


# -- kill -9 -------------------------------------------------------------------------------------


def kill_once(folder: Path, moment: float, resume_step: int | None) -> dict[str, int]:
    """Kill a logging process ``moment`` seconds after its first acknowledgement; what is left."""
    run_dir, counter = folder / "run", folder / "handed-over"
    with process(count, run_dir, counter, "" if resume_step is None else resume_step) as logging:
        first = said(logging)
        time.sleep(moment)
        logging.kill()
        output, errors = logging.communicate()
    assert errors == ""
    acknowledged = [first, *output.split("\n")][-2]  # what follows the last line is torn
    return {"acknowledged": int(acknowledged), "handed over": int(counter.read_text())}


def look_at_what_is_left(run_dir: Path) -> dict[str, int]:
    """Every tool reads every segment; with the tail rows are contiguous."""
    run = open_run(run_dir)
    found = seen(run_dir)
    assert found == list(range(len(found)))
    assert run.state() == "crashed"
    for name in STRANGERS:
        sealed = values(read_by(name, run_dir))
        assert sealed == list(range(len(sealed)))
        assert len(sealed) <= len(found)
    return {"found": len(found), "sealed": len(sealed), "segments": len(segments(run_dir))}


def resume_and_count_steps(run_dir: Path, step: int) -> None:
    """Train on from an earlier step: every tool sees each row of each step once."""
    writer = RunWriter(run_dir, resume_step=step)
    start = ROWS_A_STEP * (step + 1)
    more = np.arange(start, start + ROWS_A_STEP)
    writer.write("metrics", {"name": NAMES, "value": more, "step": step + 1})
    writer.close()
    expected = {(at, name): 1 for at in range(step + 2) for name in NAMES}
    tables = {name: read_by(name, run_dir) for name in STRANGERS}
    for table in (*tables.values(), open_run(run_dir).metrics().table):
        pairs = zip(table["step"].to_pylist(), table["name"].to_pylist(), strict=True)
        assert Counter(pairs) == expected
        assert values(table) == list(range(ROWS_A_STEP * (step + 2)))


def kill_often(folder: Path, kills: int, seed: int) -> dict[str, int]:
    """Kill runs, then their resumes; the sums over all kills of what was there at each."""
    moments = random.Random(seed)
    totals: Counter[str] = Counter()
    for number in range(kills // 2):
        place, step = folder / str(number), None
        place.mkdir()
        for longest in (0.5, 0.3):
            figures = kill_once(place, moments.uniform(0, longest), step)
            figures |= look_at_what_is_left(place / "run")
            assert figures["acknowledged"] <= figures["found"] <= figures["handed over"]
            totals.update(figures)
            step = int(moments.uniform(0, figures["found"] / ROWS_A_STEP - 1))
        resume_and_count_steps(place / "run", step or 0)
    return dict(totals)


@pytest.mark.parametrize("half", [0, 1])
def test_kill_9_loses_at_most_what_came_after_the_last_flush(tmp_path: Path, half: int) -> None:
    totals = kill_often(tmp_path, kills=4, seed=half)
    assert totals["segments"] > 0


@pytest.mark.soak
def test_kill_9_fifty_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    totals = kill_often(tmp_path, kills=50, seed=2)
    with capsys.disabled():
        print(f"\n50 kills, 25 of them of a resumed run; rows, summed over the kills: {totals}")


# -- a torn tail ---------------------------------------------------------------------------------


def test_a_tail_torn_at_any_byte_of_its_last_batch_gives_all_earlier_batches(
    tmp_path: Path,
) -> None:
    writer = RunWriter(tmp_path / "run", flush_seconds=3600)
    lengths = []
    for step in range(1, 4):
        log_steps(writer, step, step)
        writer.flush()
        lengths.append((tmp_path / "run/metrics/000.tail.arrows").stat().st_size)
    kill(writer)
    whole = (tmp_path / "run/metrics/000.tail.arrows").read_bytes()
    torn = tmp_path / "torn.tail.arrows"
    for length in range(lengths[1], lengths[2]):
        torn.write_bytes(whole[:length])
        found = read_tail(torn, "metrics")
        assert values(found.rows) == values_of(1, 2)
        assert found.damage is None
    (tmp_path / "run/metrics/000.tail.arrows").write_bytes(whole[: lengths[2] - 1])
    assert seen(tmp_path / "run") == values_of(1, 2)
    RunWriter(tmp_path / "run", resume_step=9).close()
    assert values(read_by("duckdb", tmp_path / "run")) == values_of(1, 2)


@pytest.mark.parametrize("at", [0, 5, 16])
def test_a_tail_damaged_in_its_middle_is_named_and_kept(tmp_path: Path, at: int) -> None:
    run_dir = tmp_path / "run"
    writer = RunWriter(run_dir, flush_seconds=3600)
    log_steps(writer, 1, 1)
    writer.flush()
    tail = run_dir / "metrics/000.tail.arrows"
    length = tail.stat().st_size
    for step in (2, 3):
        log_steps(writer, step, step)
        writer.flush()
    kill(writer)
    content = bytearray(tail.read_bytes())
    content[length + at] ^= 0x40
    tail.write_bytes(content)
    with pytest.warns(UserWarning, match=r"read in part: .*000\.tail\.arrows"):
        assert seen(run_dir) == values_of(1, 1)
    RunWriter(run_dir, resume_step=9).close()
    assert seen(run_dir) == values_of(1, 1)
    kept = list((run_dir / "superseded/metrics").glob("000.tail.arrows.damaged-*"))
    assert [path.read_bytes() for path in kept] == [bytes(content)]


def test_a_tail_that_is_none_is_named_and_kept(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    writer = RunWriter(run_dir, flush_seconds=3600)
    log_steps(writer, 1, 1)
    writer.close()
    (run_dir / "metrics/000.tail.arrows").write_bytes(b"something else")
    with pytest.warns(UserWarning, match=r"skipped: .*000\.tail\.arrows is no tail of a run"):
        assert seen(run_dir) == values_of(1, 1)
    RunWriter(run_dir, resume_step=9).close()
    assert seen(run_dir) == values_of(1, 1)
    kept = list((run_dir / "superseded/metrics").iterdir())
    assert [path.read_bytes() for path in kept] == [b"something else"]


def test_a_tail_damaged_under_the_writer_is_counted_as_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = tmp_path / "run"
    writer = RunWriter(run_dir, flush_seconds=3600)
    log_steps(writer, 1, 2)
    writer.flush()
    tail = run_dir / "metrics/000.tail.arrows"
    with open(tail, "rb+") as file:
        file.truncate(tail.stat().st_size - 1)
    writer.close()
    (status,) = open_run(run_dir).status()
    assert status.lost_rows == 2 * ROWS
    assert status.faults == {"tail of metrics: RuntimeError": 1}
    assert "8 rows are damaged" in caplog.text


# -- a kill at each change of a file -------------------------------------------------------------


def expect_all_once(run_dir: Path, last: int) -> None:
    """A reader of the dead sees each row, a stranger each at most once; the next open seals."""
    assert seen(run_dir) == values_of(1, last)
    assert not {v: n for v, n in Counter(values(read_by("pyarrow", run_dir))).items() if n > 1}
    RunWriter(run_dir, resume_step=last).close()
    assert seen(run_dir) == values_of(1, last)
    assert values(read_by("duckdb", run_dir)) == values_of(1, last)
    assert not list((run_dir / "metrics").glob("*.arrows"))


def test_a_kill_at_any_change_of_a_periodic_seal_neither_loses_nor_doubles(tmp_path: Path) -> None:
    for nth in itertools.count():
        writer = RunWriter(tmp_path / str(nth), flush_seconds=3600, seal_rows=2)
        log_steps(writer, 1, 3)
        writer.flush()
        log_steps(writer, 4, 6)
        with killed_at(nth) as changes:
            flush_or_die(writer)
        if len(changes) <= nth:
            break
        bury(writer)
        expect_all_once(tmp_path / str(nth), 6)
    writer.close()
    assert nth > 3
    assert changes.count("write_table") == 1


def test_a_kill_at_any_change_of_closing_neither_loses_nor_doubles(tmp_path: Path) -> None:
    for nth in itertools.count():
        writer = RunWriter(tmp_path / str(nth), flush_seconds=3600)
        log_steps(writer, 1, 6)
        writer.flush()
        with killed_at(nth) as changes:
            writer.close()
        if len(changes) <= nth:
            break
        bury(writer)
        expect_all_once(tmp_path / str(nth), 6)
    assert changes.count("unlink") == 2


@pytest.fixture(scope="module")
def crashed_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two merged attempts, a segment and a tail: steps 1 to 12."""
    run_dir = tmp_path_factory.mktemp("crashed") / "run"
    writer = RunWriter(run_dir)
    log_steps(writer, 1, 6)
    writer.close()
    compact(run_dir)
    (run_dir / "metrics" / "notes.txt").write_text("mine")
    writer = RunWriter(run_dir, resume_step=6, flush_seconds=3600, seal_rows=2)
    log_steps(writer, 7, 9)
    writer.flush()
    log_steps(writer, 10, 10)
    writer.flush()
    writer._seal_rows = 1000
    log_steps(writer, 11, 12)
    writer.flush()
    kill(writer)
    return run_dir


def copies(run_dir: Path, tmp_path: Path) -> Iterator[tuple[int, Path]]:
    for nth in itertools.count():
        yield nth, Path(shutil.copytree(run_dir, tmp_path / str(nth)))


@pytest.mark.filterwarnings("ignore:skipped:UserWarning")
def test_a_kill_at_any_change_of_a_resume_neither_loses_nor_doubles(
    crashed_run: Path, tmp_path: Path
) -> None:
    for nth, run_dir in copies(crashed_run, tmp_path):
        writer = None
        with killed_at(nth) as changes, suppress(Killed):
            writer = RunWriter(run_dir, resume_step=4, flush_seconds=3600)
        if writer is not None:
            writer.close()
            break
        now = seen(run_dir)
        assert len(set(now)) == len(now)
        assert set(values_of(1, 4)) <= set(now)
        away = run_dir / "superseded" / "metrics"
        kept = [values(pq.read_table(path)) for path in away.glob("*.parquet")]
        assert set(now).union(*kept) == set(values_of(1, 12))
        RunWriter(run_dir, resume_step=4).close()
        assert seen(run_dir) == values_of(1, 4)
        assert values(read_by("duckdb", run_dir)) == values_of(1, 4)
        kept = [values(pq.read_table(path)) for path in away.glob("*.parquet")]
        assert set().union(*kept) == set(values_of(5, 12))
    assert changes.count("write_table") >= 7


@pytest.mark.filterwarnings("ignore:skipped:UserWarning")
@pytest.mark.parametrize("exchange", ["one step", "two steps"])
def test_a_kill_at_any_change_of_a_merge_neither_loses_nor_doubles(
    crashed_run: Path, tmp_path: Path, exchange: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if exchange == "two steps":
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
    for nth, run_dir in copies(crashed_run, tmp_path):
        ended = False
        with killed_at(nth) as changes, suppress(Killed):
            compact(run_dir)
            ended = True
        if ended:
            break
        if exchange == "one step":
            assert seen(run_dir) == values_of(1, 12)
        if nth % 2:
            RunWriter(run_dir, resume_step=12).close()
        compact(run_dir)
        assert seen(run_dir) == values_of(1, 12)
        assert values(read_by("duckdb", run_dir)) == values_of(1, 12)
        assert (run_dir / "metrics" / "notes.txt").read_text() == "mine"
        assert not [path.name for path in run_dir.iterdir() if path.name.startswith(".")]
    assert changes.count("_exchange") == 2
    assert exchange == "one step" or changes.count("replace") >= 10


@pytest.mark.parametrize("seed", range(4))
def test_no_history_of_flushes_seals_kills_resumes_and_merges_loses_a_row(
    tmp_path: Path, seed: int
) -> None:
    chance, run_dir = random.Random(seed), tmp_path / "run"
    step, flushed = 0, 0
    writer = RunWriter(run_dir, flush_seconds=3600)
    cursor, followed = None, list[int]()
    for _ in range(30):
        what = chance.choice(["log", "log", "flush", "seal", "kill", "resume", "compact", "read"])
        if what == "log":
            log_steps(writer, step + 1, step + chance.randint(1, 5))
            step += (writer._entered - writer._left) // ROWS - (step - flushed)
        elif what == "flush":
            assert writer.flush()
            flushed = step
        elif what == "seal":
            assert writer._ask("seal", 60)
            flushed = step
        elif what == "read":
            rows = open_run(run_dir).metrics(since=cursor)
            followed = values(rows.table) + ([] if rows.restarted else followed)
            cursor = rows.cursor
            assert sorted(followed) == values_of(1, flushed)
        else:
            if what == "kill":
                kill(writer)
            else:
                writer.close()
                flushed = step
            if what == "compact":
                compact(run_dir)
            step = flushed = chance.randint(0, flushed)
            writer = RunWriter(run_dir, resume_step=step, flush_seconds=3600)
        assert seen(run_dir) == values_of(1, flushed)
        sealed = values(read_by("pyarrow", run_dir))
        assert len(set(sealed)) == len(sealed)
    writer.close()
    for name in STRANGERS:
        assert values(read_by(name, run_dir)) == values_of(1, step)


# -- signals, exceptions, ends -------------------------------------------------------------------


def metrics_of(run_dir: Path) -> dict[str, Any]:
    table = read_by("pyarrow", run_dir)
    return dict(zip(table["name"].to_pylist(), table["value"].to_pylist(), strict=True))


def test_sigterm_seals_the_log_and_ends_the_process_by_the_signal(tmp_path: Path) -> None:
    with process(wait_for_sigterm, tmp_path / "run", "default") as logging:
        assert said(logging) == "ready"
        logging.terminate()
        assert logging.wait(30) == -15
    run = open_run(tmp_path / "run")
    assert run.state() == "terminated"
    assert [status.reason for status in run.status()] == ["SIGTERM"]
    assert metrics_of(tmp_path / "run") == {"loss": 1.0, "last": 2.0}
    assert run.events().table["kind"].to_pylist() == ["run/start", "run/terminated"]


def test_sigterm_calls_the_handler_that_was_there_and_the_log_goes_on(tmp_path: Path) -> None:
    with process(wait_for_sigterm, tmp_path / "run", "handler") as logging:
        assert said(logging) == "ready"
        logging.terminate()
        assert said(logging) == "handled with 000-000000.parquet"
        assert logging.wait(30) == 0
    run = open_run(tmp_path / "run")
    assert run.state() == "finished"
    assert metrics_of(tmp_path / "run") == {"loss": 1.0, "last": 2.0, "after": 3.0}
    assert run.events().table["kind"].to_pylist() == ["run/start", "run/signal", "run/end"]


@pytest.mark.parametrize(
    ("how", "status", "state", "reason"),
    [
        ("exception", 1, "failed", "ArithmeticError: the loss is gone"),
        ("interrupt", -2, "terminated", "KeyboardInterrupt: "),
        ("exit", 3, "finished", ""),
        ("last line", 0, "finished", ""),
    ],
)
def test_a_process_that_ends_seals_its_log_and_says_how_it_ended(
    tmp_path: Path, how: str, status: int, state: str, reason: str
) -> None:
    with process(end, tmp_path / "run", how) as logging:
        assert logging.wait(30) == status
    run = open_run(tmp_path / "run")
    assert run.state() == state
    assert [found.reason for found in run.status()] == [reason]
    assert metrics_of(tmp_path / "run") == {"loss": 1.0}
    assert not list((tmp_path / "run").glob("*/*.arrows"))


def test_sigterm_is_heeded_until_the_last_row_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, handlers, real = RunWriter(tmp_path / "run"), list[Any](), pq.write_table

    def write_table(*arguments: Any, **options: Any) -> None:
        handlers.append(signal.getsignal(signal.SIGTERM))
        real(*arguments, **options)

    monkeypatch.setattr(pq, "write_table", write_table)
    log_steps(writer, 1, 1)
    writer.close()
    assert handlers == [writer._on_sigterm] * 2
    assert signal.getsignal(signal.SIGTERM) == writer._old_handler


def test_an_exception_in_what_runs_before_the_exit_does_not_stop_it(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run")

    def fail() -> None:
        raise ValueError("too late")

    writer.before_exit = fail
    called: list[int] = []
    writer._old_handler, old = lambda number, _: called.append(number), writer._old_handler
    writer._on_sigterm(15, None)
    writer._old_handler = old
    writer.close()
    assert called == [15]
    assert open_run(tmp_path / "run").status()[0].faults == {"before exit: ValueError": 1}
