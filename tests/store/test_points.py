import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store.killing import flip_in_page, kill

from entropylens.errors import EntropyLensError
from entropylens.records import SCHEMAS
from entropylens.store import columns, reader, segments
from entropylens.store.compact import BUCKETS, compact
from entropylens.store.layout import Layout
from entropylens.store.points import (
    Found,
    Key,
    Points,
    first_look,
    list_series,
    read_points,
    read_sketches,
)
from entropylens.store.query import series, summarise
from entropylens.store.reader import Cursor, Run, open_run
from entropylens.store.segments import write_segment
from entropylens.store.selection import Selection, part_of
from entropylens.store.writer import RunWriter

NAN, INF = math.nan, math.inf
LOSS = Key("loss/mean", "", "train")


def open_writer(path: Path, rank: int = 0, **options: Any) -> RunWriter:
    return RunWriter(path, rank=rank, **{"flush_seconds": 3600.0, **options})


def open_ranks(path: Path, ranks: int, **options: Any) -> list[RunWriter]:
    return [open_writer(path, rank, world_size=ranks, **options) for rank in range(ranks)]


def log(writer: RunWriter, first: int, last: int, **columns: Any) -> None:
    """One value a step, ten times the step, in a second of its own."""
    steps = np.arange(first, last + 1)
    row = {"name": "loss/mean", "value": steps * 10.0, "step": steps, "time": steps * 1.5}
    writer.write("metrics", {**row, **columns})
    writer.flush()


def seal(writer: RunWriter) -> None:
    assert writer._ask("seal", 60)


def span(first: int, last: int) -> list[int]:
    return list(range(first, last + 1))


def steps_of(found: Found, key: Key = LOSS) -> list[int]:
    return found.series[key].steps.tolist() if key in found.series else []


@pytest.fixture
def logged(tmp_path: Path) -> Run:
    """Segments of 10, 10 and 10 steps, and a tail of 5."""
    writer = open_writer(tmp_path / "run", seal_rows=10)
    for first in (1, 11, 21):
        log(writer, first, first + 9)
    log(writer, 31, 35)
    kill(writer)
    return open_run(tmp_path / "run")


# -- what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize("merged", [False, True])
def test_a_series_is_read_whole_in_order_and_each_step_once(logged: Run, merged: bool) -> None:
    if merged:
        compact(logged.path)
    found = read_points(logged, ["loss/mean"])
    assert list(found.series) == [LOSS]
    points = found.series[LOSS]
    assert points.steps.dtype == np.int64
    assert points.times.dtype == points.values.dtype == np.float64
    np.testing.assert_array_equal(points.steps, np.arange(1, 36))
    np.testing.assert_array_equal(points.values, np.arange(1, 36) * 10.0)
    np.testing.assert_allclose(points.times, np.arange(1, 36) * 1.5, atol=1e-6)
    assert (found.restarted, found.warnings) == (False, [])
    assert read_points(logged, ["nothing"]).series == {}
    assert read_points(logged, []).series == {}


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("steps", [(8, 12), (None, 3), (33, None), (30, 31), (36, None), (5, 4)])
def test_steps_are_chosen_ends_included(
    logged: Run, merged: bool, steps: tuple[int | None, int | None]
) -> None:
    if merged:
        compact(logged.path)
    found = read_points(logged, ["loss/mean"], steps=steps)
    first, last = steps
    assert steps_of(found) == span(max(first or 1, 1), min(last or 35, 35))


@pytest.mark.parametrize("kept", ["tail", "segment", "merged"])
def test_names_modules_and_phases_are_exact(tmp_path: Path, kept: str) -> None:
    writer = open_writer(tmp_path / "run")
    keys = [
        Key(name, module, phase)
        for name in ("a", "b", "a*")
        for module in ("", "h.0", "größe")
        for phase in ("train", "eval")
    ]
    for step in (1, 2, 3):
        for number, key in enumerate(keys):
            row = {**key._asdict(), "value": number + step / 10, "step": step}
            writer.write("metrics", row)
    writer.write("metrics", {"name": "b", "module": None, "value": 7.0, "step": 9})
    writer.flush()
    writer.close() if kept != "tail" else kill(writer)
    if kept == "merged":
        compact(tmp_path / "run")
    run = open_run(tmp_path / "run")
    assert set(read_points(run, ["a", "b"]).series) == {
        Key("a", "", "train"),
        Key("b", "", "train"),
    }
    whole = read_points(run, ["a", "b", "a*", "a"], modules=None, phases=None).series
    assert set(whole) == set(keys)
    for number, key in enumerate(keys):
        values = [number + step / 10 for step in (1, 2, 3)]
        assert whole[key].values[:3].tolist() == values
    assert whole[Key("b", "", "train")].steps.tolist() == [1, 2, 3, 9]  # null module
    assert set(read_points(run, ["a"], modules=["h.0", "none"], phases=["eval"]).series) == {
        Key("a", "h.0", "eval")
    }


def test_what_has_no_step_or_no_value_is_no_point(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "run")
    row = {"name": "loss/mean", "step": [1, None, 3, 4], "value": [1.0, 2.0, None, NAN]}
    writer.write("metrics", {**row, "time": 5.0})
    writer.close()
    run = open_run(tmp_path / "run")
    for merge in (False, True):
        if merge:
            compact(run.path)
        points = read_points(run, ["loss/mean"]).series[LOSS]
        assert points.steps.tolist() == [1, 4]
        np.testing.assert_array_equal(points.values, [1.0, NAN])
        np.testing.assert_array_equal(points.times, [5.0, 5.0])
        (facts,) = list_series(run)
        assert (facts.count, facts.first_step, facts.last_step) == (2, 1, 4)
        assert math.isnan(facts.last)
    sketches = read_sketches(run, ["loss/mean"])
    assert sketches is not None
    assert sketches[LOSS].counts.sum() == 2


def test_nan_and_the_infinities_are_kept(tmp_path: Path) -> None:
    values = [1.0, NAN, INF, -INF, -0.0, 1e-320, 1.5e308]
    writer = open_writer(tmp_path / "run")
    log(writer, 1, 7, value=values)
    writer.close()
    points = read_points(open_run(tmp_path / "run"), ["loss/mean"]).series[LOSS]
    assert points.values.tobytes() == np.array(values).tobytes()


def test_row_groups_of_other_series_and_steps_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_writer(tmp_path / "run").close()
    run = open_run(tmp_path / "run")
    rows = 40
    table = pa.table(
        {
            "name": ["a"] * 20 + ["b"] * 20,
            "step": [*range(20), *range(20)],
            "value": np.arange(40.0),
            "phase": ["train"] * rows,
        }
    )
    path = Layout(run.path).segment("metrics", 0, 0)
    facts: dict[str, Any] = {"run_id": run.run_id, "table": "metrics", "rank": 0, "first_row": 0}
    monkeypatch.setattr(segments, "_ROWS_A_GROUP", 5)
    write_segment(path, table, end_row=rows, generation=1, **facts)
    assert pq.read_metadata(path).num_row_groups == 8
    read: list[int] = []
    real = columns._Reading.one

    def seen(self: Any, job: Any) -> Any:
        read.append(job[1])
        return real(self, job)

    monkeypatch.setattr(columns._Reading, "one", seen)
    points = read_points(run, ["b"], steps=(7, 12)).series[Key("b", "", "train")]
    assert points.values.tolist() == [27, 28, 29, 30, 31, 32]
    assert sorted(read) == [5, 6]
    assert np.isnan(points.times).all()


# -- ranks ---------------------------------------------------------------------------------------

NAMES = {
    "tokens/step": "sum",
    "overhead/rows": "min",
    "memory/device/allocated": "max",
    "parameter/shard_norm": "root_sum_square",
    "loss/mean": "mean",
    "user/reward": "mean",
}


def test_each_rule_in_closed_form(tmp_path: Path) -> None:
    writers = open_ranks(tmp_path / "run", 2)
    for writer, value, weight in zip(writers, (3.0, 4.0), (1.0, 3.0), strict=True):
        names = list(NAMES)
        weights = [weight if name != "user/reward" else None for name in names]
        row = {"name": names, "value": value, "weight": weights, "step": 1, "time": 2.0 + value}
        writer.write("metrics", row)
    for writer in writers:
        writer.close()
    found = read_points(open_run(tmp_path / "run"), list(NAMES)).series
    values = {key.name: points.values.tolist() for key, points in found.items()}
    expected = dict(zip(NAMES, [[7.0], [3.0], [4.0], [5.0], [3.75], [3.5]], strict=True))
    assert values == expected
    assert all(points.times.tolist() == [6.0] for points in found.values())


def same_as_query(run: Run) -> None:
    expected = series(run).to_pandas()
    found = read_points(run, sorted(NAMES), modules=None, phases=None).series
    groups = dict(list(expected.groupby(["name", "module", "phase"])))
    assert {tuple(key) for key in found} == set(groups)
    for key, points in found.items():
        group = groups[tuple(key)]
        np.testing.assert_array_equal(points.steps, group["step"])
        np.testing.assert_allclose(points.values, group["value"], rtol=1e-14, atol=0)
        assert (np.diff(points.steps) > 0).all()


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**32), ranks=st.integers(1, 3), merge=st.booleans())
def test_random_ranks_agree_with_the_query(
    tmp_path: Path, seed: int, ranks: int, merge: bool
) -> None:
    path, random = tmp_path / f"{seed}-{ranks}-{merge}", np.random.default_rng(seed)
    shutil.rmtree(path, ignore_errors=True)
    odd = [NAN, INF, -INF, 0.0, 1.0, 1.0, 1.0, -2.5]
    writers = open_ranks(path, ranks, seal_rows=20)
    for writer in writers:
        for _ in range(3):
            rows = int(random.integers(0, 40))
            row = {
                "name": random.choice(list(NAMES), rows).tolist(),
                "module": random.choice(["", "h.0"], rows).tolist(),
                "phase": random.choice(["train", "eval"], rows).tolist(),
                "value": np.where(
                    random.random(rows) < 0.5, random.choice(odd, rows), random.normal(size=rows)
                ),
                "weight": [
                    None if chance < 0.2 else float(weight)
                    for chance, weight in zip(
                        random.random(rows), random.integers(0, 4, rows), strict=True
                    )
                ],
                "step": random.integers(0, 6, rows),
            }
            if rows:
                writer.write("metrics", row)
                writer.flush()
    for rank, writer in enumerate(writers):
        kill(writer) if rank == 1 and not merge else writer.close()
    if merge:
        compact(path)
    same_as_query(open_run(path))


def test_equal_values_stay_as_they_are_to_the_bit(tmp_path: Path) -> None:
    writers = open_ranks(tmp_path / "run", 3)
    for writer in writers:
        log(writer, 1, 1, value=[0.1], weight=1.0)
    for writer in writers:
        writer.close()
    found = read_points(open_run(tmp_path / "run"), ["loss/mean"]).series[LOSS]
    assert found.values.tolist() == [0.1]


def test_a_step_that_one_rank_wrote_twice_is_combined_too(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "run")
    writer.write("metrics", {"name": "loss/mean", "value": [1.0, 4.0], "weight": [1, 2], "step": 1})
    writer.close()
    found = read_points(open_run(tmp_path / "run"), ["loss/mean"]).series[LOSS]
    assert (found.steps.tolist(), found.values.tolist()) == ([1], [3.0])


def test_what_one_rank_adds_to_a_step_gives_the_whole_step_again(tmp_path: Path) -> None:
    writer, run = open_writer(tmp_path / "run"), open_run(tmp_path / "run")
    log(writer, 1, 3, value=np.array([1.0, 1.0, 1.0]), weight=1.0)
    seal(writer)
    before = read_points(run, ["loss/mean"]).cursor
    log(writer, 3, 4, value=np.array([5.0, 7.0]), weight=3.0)
    again = read_points(run, ["loss/mean"], since=before).series[LOSS]
    assert (again.steps.tolist(), again.values.tolist()) == ([3, 4], [4.0, 7.0])
    whole = read_points(run, ["loss/mean"]).series[LOSS]
    assert whole.values.tolist() == [1.0, 1.0, 4.0, 7.0]
    kill(writer)


def test_steps_of_several_series_are_completed_from_the_earliest_on(tmp_path: Path) -> None:
    writers, run = open_ranks(tmp_path / "run", 2), open_run(tmp_path / "run")
    for name in ("a", "b"):
        log(writers[0], 1, 10, name=name)
    before = read_points(run, ["a", "b"]).cursor
    log(writers[1], 9, 9, name="b", value=np.array([0.0]))
    log(writers[1], 2, 2, name="a", value=np.array([0.0]))
    found = read_points(run, ["a", "b"], since=before).series
    values = {key.name: (p.steps.tolist(), p.values.tolist()) for key, p in found.items()}
    assert values == {"a": ([2], [10.0]), "b": ([9], [45.0])}
    for writer in writers:
        kill(writer)


def test_the_latest_known_time_of_the_ranks_is_the_points(tmp_path: Path) -> None:
    writers = open_ranks(tmp_path / "run", 2)
    log(writers[0], 1, 2, time=np.array([30.0, 40.0]))
    log(writers[1], 1, 2, time=np.array([35.0, 36.0]))
    for writer in writers:
        writer.close()
    run = open_run(tmp_path / "run")
    assert read_points(run, ["loss/mean"]).series[LOSS].times.tolist() == [35.0, 40.0]
    path, *_ = Layout(run.path).segments("metrics", 1)
    rows = segments.read_segment(path, "metrics")
    unknown = pa.array([None, 36_000_000], pa.timestamp("us", tz="UTC"))
    rows = rows.set_column(rows.schema.get_field_index("time"), "time", unknown)
    footer = segments.read_footer(path)
    write_segment(
        path, rows, run_id=run.run_id, table="metrics", rank=1, first_row=0, end_row=footer.end_row
    )
    assert read_points(run, ["loss/mean"]).series[LOSS].times.tolist() == [30.0, 40.0]


def test_a_text_that_is_null_is_the_empty_one_whatever_else_the_group_holds(
    tmp_path: Path,
) -> None:
    writer = open_writer(tmp_path / "run")
    log(writer, 1, 2, module=["h.0", None])
    log(writer, 3, 4, module=["h.0", None])
    writer.close()
    run = open_run(tmp_path / "run")
    for _ in range(2):
        assert steps_of(read_points(run, ["loss/mean"])) == [2, 4]
        assert steps_of(read_points(run, ["loss/mean"], modules=["h.0"]), LOSS) == []
        found = read_points(run, ["loss/mean"], modules=None)
        assert steps_of(found, Key("loss/mean", "h.0", "train")) == [1, 3]
        assert steps_of(found) == [2, 4]
        compact(run.path)


def test_what_a_slower_rank_adds_gives_the_whole_step_again(tmp_path: Path) -> None:
    fast, slow = open_ranks(tmp_path / "run", 2)
    log(fast, 1, 6, weight=1.0)
    log(slow, 1, 4, value=np.zeros(4), weight=1.0)
    run = open_run(tmp_path / "run")
    found = read_points(run, ["loss/mean"])
    assert found.series[LOSS].values.tolist() == [5, 10, 15, 20, 50, 60]
    log(slow, 5, 5, value=[0.0], weight=1.0)
    for sealed in (False, True):
        if sealed:
            seal(fast)
        later = read_points(run, ["loss/mean"], since=found.cursor)
        points = later.series[LOSS]
        assert (points.steps.tolist(), points.values.tolist()) == ([5], [25])
    log(fast, 7, 7, weight=1.0)
    last = read_points(run, ["loss/mean"], since=later.cursor)
    assert (last.series[LOSS].steps.tolist(), last.series[LOSS].values.tolist()) == ([7], [70])
    fast.close()
    slow.close()


# -- cursors -------------------------------------------------------------------------------------


def test_a_cursor_gives_each_step_once_wherever_it_stands(logged: Run) -> None:
    cursor = read_points(logged, ["loss/mean"]).cursor
    assert cursor == logged.metrics().cursor
    for position in range(36):
        at = Cursor(cursor.run_id, "metrics", cursor.epoch, ((0, position),))
        found = read_points(logged, ["loss/mean"], since=str(at))
        assert steps_of(found) == span(position + 1, 35)
        assert (found.cursor, found.restarted) == (cursor, False)


def test_cursors_go_on_through_sealing_and_start_again_after_a_merge_or_a_rewind(
    tmp_path: Path,
) -> None:
    writer = open_writer(tmp_path / "run")
    run = open_run(tmp_path / "run")
    log(writer, 1, 3)
    first = read_points(run, ["loss/mean"])
    seal(writer)
    log(writer, 4, 5)
    second = read_points(run, ["loss/mean"], since=first.cursor)
    assert (steps_of(first), steps_of(second)) == ([1, 2, 3], [4, 5])
    writer.close()
    assert read_points(run, ["loss/mean"], since=second.cursor).series == {}
    compact(run.path)
    merged = read_points(run, ["loss/mean"], since=second.cursor)
    assert (steps_of(merged), merged.restarted) == (span(1, 5), True)
    writer = open_writer(tmp_path / "run", resume_step=2)
    resumed = read_points(run, ["loss/mean"], since=merged.cursor)
    assert (steps_of(resumed), resumed.restarted) == ([1, 2], True)
    log(writer, 3, 4)
    last = read_points(run, ["loss/mean"], since=resumed.cursor)
    assert (steps_of(last), last.restarted) == ([3, 4], False)
    writer.close()


def test_a_cursor_of_another_run_or_table_is_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        open_writer(tmp_path / name).close()
    one, two = open_run(tmp_path / "one"), open_run(tmp_path / "two")
    for cursor in (two.metrics().cursor, one.events().cursor):
        with pytest.raises(ValueError, match=r"Run.metrics: expected a cursor of this run's"):
            read_points(one, ["loss/mean"], since=cursor)


def test_a_run_is_followed_while_it_is_written(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "run", flush_seconds=0.005, seal_seconds=0.02)
    run, random = open_run(tmp_path / "run"), np.random.default_rng(0)
    followed: list[int] = []
    cursor: Cursor | None = None
    last = sealed = 0
    while sealed < 5 or len(followed) < last:
        sealed = len(Layout(run.path).segments("metrics"))
        if sealed < 5:
            more = int(random.integers(1, 40))
            steps = np.arange(last + 1, last + more + 1)
            writer.write("metrics", {"name": "loss/mean", "value": steps, "step": steps})
            last += more
        found = read_points(run, ["loss/mean"], since=cursor)
        assert not found.restarted
        followed += steps_of(found)
        cursor = found.cursor
        assert followed == span(1, len(followed))
        whole = steps_of(read_points(run, ["loss/mean"]))
        assert whole == span(1, len(whole))
        assert len(followed) <= len(whole) <= last
    writer.close()
    assert steps_of(read_points(run, ["loss/mean"])) == span(1, last)


def test_a_read_starts_again_when_files_are_merged_or_replaced_under_it(
    logged: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, reads = columns._Reading._part, [0]

    def merged_meanwhile(self: Any, *arguments: Any) -> Any:
        reads[0] += 1
        if reads[0] == 2:
            compact(logged.path)
        return real(self, *arguments)

    monkeypatch.setattr(columns, "_THREADS", 1)
    monkeypatch.setattr(columns._Reading, "_part", merged_meanwhile)
    assert steps_of(read_points(logged, ["loss/mean"])) == span(1, 35)

    def always_gone(*_: Any) -> Any:
        raise FileNotFoundError

    monkeypatch.setattr(columns._Reading, "_part", always_gone)
    with pytest.raises(EntropyLensError, match="to hold still for one read, but files"):
        read_points(logged, ["loss/mean"])


def test_a_file_that_was_replaced_is_not_read_by_its_old_metadata(logged: Run) -> None:
    path = Layout(logged.path).segments("metrics")[0]
    groups = columns.Groups.of(path)
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    kinds = {"step": SCHEMAS["metrics"].field("step").type}
    selection = Selection(["loss/mean"], None, None)
    with pytest.raises(FileNotFoundError, match="was replaced"):
        columns.parts_of([columns.Source(path, groups)], selection, kinds)


# -- damage and time -----------------------------------------------------------------------------


def of_other_types(path: Path) -> None:
    rows = pq.read_table(path)
    metadata = rows.schema.metadata
    rows = rows.set_column(7, "value", pa.array([["x"]] * rows.num_rows))
    pq.write_table(rows.replace_schema_metadata(metadata), path)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("harm", [flip_in_page, of_other_types, cut_off])
def test_a_damaged_segment_is_named_once_and_the_rest_is_read(
    logged: Run, harm: Callable[[Path], None]
) -> None:
    path = Layout(logged.path).segments("metrics")[1]
    harm(path)
    with pytest.warns(UserWarning, match=f"skipped: .*{path.name} cannot be read") as caught:
        found = read_points(logged, ["loss/mean"])
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert found.warnings == [str(caught[0].message)]
    assert steps_of(found) == span(1, 10) + span(21, 35)
    assert steps_of(read_points(logged, ["loss/mean"])) == steps_of(found)


def test_a_torn_tail_is_read_up_to_the_tear(logged: Run) -> None:
    (tail,) = Layout(logged.path).tails("metrics").values()
    content = tail.read_bytes()
    tail.write_bytes(content[:-1])
    torn = read_points(logged, ["loss/mean"])
    assert steps_of(torn) == span(1, 30)
    tail.write_bytes(content)
    assert steps_of(read_points(logged, ["loss/mean"], since=torn.cursor)) == span(31, 35)


def test_a_deadline_says_how_far_reading_got(logged: Run) -> None:
    message = (
        "^read_points: expected to read 2 series within the time allowed, got through 0 of 3 row "
        "groups; ask for fewer steps or merge the run with entropylens compact$"
    )
    with pytest.raises(EntropyLensError, match=message):
        read_points(logged, ["loss/mean", "b"], deadline=time.monotonic() - 1)
    found = read_points(logged, ["loss/mean"], deadline=time.monotonic() + 600)
    assert steps_of(found) == span(1, 35)


# -- first look ----------------------------------------------------------------------------------


def log_odd(path: Path, length: int = 2570) -> Points:
    random = np.random.default_rng(0)
    values = random.normal(size=length)
    values[random.random(length) < 0.1] = NAN
    values[random.random(length) < 0.1] = INF
    values[3:9] = NAN
    writer = open_writer(path)
    log(writer, 1, length, value=values)
    writer.close()
    return read_points(open_run(path), ["loss/mean"]).series[LOSS]


def test_a_sketch_says_what_lies_in_each_bucket_and_where(tmp_path: Path) -> None:
    points = log_odd(tmp_path / "run")
    compact(tmp_path / "run")
    sketches = read_sketches(open_run(tmp_path / "run"), ["loss/mean", "nothing"])
    assert sketches is not None
    assert set(sketches) == {LOSS}
    sketch = sketches[LOSS]
    length = len(points.steps)
    buckets = np.arange(length) * BUCKETS // length
    assert len(sketch.counts) == BUCKETS
    for number in range(BUCKETS):
        mine = np.flatnonzero(buckets == number)
        values, steps = points.values[mine], points.steps[mine]
        assert (sketch.first_steps[number], sketch.last_steps[number]) == (steps[0], steps[-1])
        assert sketch.first_times[number] == points.times[mine[0]]
        assert sketch.last_times[number] == points.times[mine[-1]]
        np.testing.assert_array_equal(sketch.lasts[number], values[-1])
        finite = np.isfinite(values)
        assert sketch.counts[number] == len(mine)
        assert sketch.nonfinite[number] == (~finite).sum()
        if finite.any():
            assert sketch.minima[number] == values[finite].min()
            assert sketch.maxima[number] == values[finite].max()
            at = np.searchsorted(points.steps, [sketch.min_steps[number]])
            assert points.values[at] == sketch.minima[number]
            at = np.searchsorted(points.steps, [sketch.max_steps[number]])
            assert points.values[at] == sketch.maxima[number]
        else:
            assert math.isnan(sketch.minima[number])
            assert math.isnan(sketch.maxima[number])
            assert sketch.min_steps[number] == sketch.max_steps[number] == -1
    assert (sketch.counts == sketch.nonfinite).any()


def resume_keeping_the_pyramid(run: Run, step: int) -> RunWriter:
    """As where a resume took nothing that the pyramid shows."""
    path = Layout(run.path).pyramid
    shutil.copytree(path.parent, run.path.parent / "kept", dirs_exist_ok=True)
    writer = open_writer(run.path, resume_step=step)
    shutil.copytree(run.path.parent / "kept", path.parent, dirs_exist_ok=True)
    return writer


def test_what_came_after_merging_is_there_as_points(logged: Run) -> None:
    compact(logged.path)
    writer = resume_keeping_the_pyramid(logged, 35)
    look = first_look(logged, ["loss/mean"])
    assert look is not None
    assert look.rest == {}
    assert read_sketches(logged, ["loss/mean"]) is not None
    log(writer, 36, 37)
    seal(writer)
    log(writer, 38, 39)
    look = first_look(logged, ["loss/mean"])
    assert look is not None
    assert look.sketches[LOSS].last_steps[-1] == 35
    assert look.rest[LOSS].steps.tolist() == [36, 37, 38, 39]
    assert read_sketches(logged, ["loss/mean"]) is None
    log(writer, 40, 40)
    later = read_points(logged, ["loss/mean"], since=look.cursor)
    assert (steps_of(later), later.restarted) == ([40], False)
    (facts,) = list_series(logged)
    assert (facts.count, facts.first_step, facts.last_step, facts.last) == (40, 1, 40, 400.0)
    writer.close()
    assert first_look(logged, ["loss/mean"]) is not None


def no_pyramid(run: Run) -> None:
    Layout(run.path).pyramid.unlink()


def rewound(run: Run) -> None:
    writer = resume_keeping_the_pyramid(run, 20)
    log(writer, 21, 40)
    writer.close()


def merged_again(run: Run) -> None:
    writer = resume_keeping_the_pyramid(run, 35)
    kept = (run.path.parent / "kept" / "metrics.parquet").read_bytes()
    log(writer, 36, 37)
    writer.close()
    compact(run.path)
    Layout(run.path).pyramid.write_bytes(kept)


def of_another_run(run: Run) -> None:
    writer = open_writer(run.path.parent / "other")
    path = run.path.parent / "other"
    log(writer, 1, 35)
    writer.close()
    compact(path)
    shutil.copy(Layout(path).pyramid, Layout(run.path).pyramid)


def of_an_older_kind(run: Run) -> None:
    path = Layout(run.path).pyramid
    pq.write_table(pq.read_table(path).replace_schema_metadata({}), path)


def damaged(run: Run) -> None:
    Layout(run.path).pyramid.write_bytes(b"PAR1")


def earlier_steps_later(run: Run) -> None:
    writer = resume_keeping_the_pyramid(run, 35)
    log(writer, 12, 12)
    writer.close()


def the_last_step_again(run: Run) -> None:
    writer = resume_keeping_the_pyramid(run, 35)
    log(writer, 35, 35)
    writer.close()


@pytest.mark.parametrize(
    "harm",
    [
        no_pyramid,
        rewound,
        merged_again,
        of_another_run,
        of_an_older_kind,
        damaged,
        earlier_steps_later,
        the_last_step_again,
    ],
)
def test_a_pyramid_that_shows_something_else_is_of_no_use(
    logged: Run, harm: Callable[[Run], None]
) -> None:
    compact(logged.path)
    assert first_look(logged, ["loss/mean"]) is not None
    harm(logged)
    assert first_look(logged, ["loss/mean"]) is None
    assert read_sketches(logged, ["loss/mean"]) is None
    points = read_points(logged, ["loss/mean"]).series[LOSS]
    (facts,) = list_series(logged)
    assert facts.last_step == points.steps[-1]
    assert facts.last == points.values[-1]


def test_a_series_of_several_ranks_has_no_sketch_but_those_of_one_have(tmp_path: Path) -> None:
    writers = open_ranks(tmp_path / "run", 2)
    for writer in writers:
        log(writer, 1, 3)
        log(writer, 1, 3, name=f"only/{writer.rank}")
    for writer in writers:
        writer.close()
    compact(tmp_path / "run")
    run = open_run(tmp_path / "run")
    assert read_sketches(run, ["loss/mean"]) is None
    sketches = read_sketches(run, ["only/0", "only/1"])
    assert sketches is not None
    assert {key.name for key in sketches} == {"only/0", "only/1"}


# -- the list ------------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", [False, True])
def test_series_are_listed_as_the_query_summarises_them(tmp_path: Path, merge: bool) -> None:
    random = np.random.default_rng(0)
    writers = open_ranks(tmp_path / "run", 2)
    for rank, writer in enumerate(writers):
        for part in range(3):
            for name in NAMES:
                for module in ("", "h.0"):
                    last = 10 * part + 9 + 3 * rank * (module == "")
                    steps = np.arange(10 * part + 1, last)
                    row = {"name": name, "module": module, "value": random.normal(size=len(steps))}
                    writer.write("metrics", {**row, "step": steps, "weight": 1.0 + rank})
            if rank == 0:
                odd: dict[str, Any] = {
                    "name": "only/odd",
                    "value": [NAN, INF, NAN],
                    "step": [3, 2, 1 + 50 * part],
                }
                writer.write("metrics", {**odd, "phase": "eval"})
            seal(writer)
    for writer in writers:
        writer.close()
    if merge:
        compact(tmp_path / "run")
    run = open_run(tmp_path / "run")
    listed = list_series(run)
    expected = summarise(run).to_pylist()
    counts = run.metrics().to_pandas().groupby(["name", "module", "phase"]).size()
    assert [tuple(facts.key) for facts in listed] == [
        (row["name"], row["module"], row["phase"]) for row in expected
    ]
    for facts, row in zip(listed, expected, strict=True):
        assert facts.last_step == row["last_step"]
        np.testing.assert_allclose(facts.last, row["last"], rtol=1e-14)
        assert facts.count == counts[tuple(facts.key)]
        assert facts.first_step == 1


def test_a_run_without_rows_has_no_series(tmp_path: Path) -> None:
    open_writer(tmp_path / "run").close()
    run = open_run(tmp_path / "run")
    assert list_series(run) == []
    assert read_points(run, ["loss/mean"]).series == {}
    assert first_look(run, ["loss/mean"]) is None


def test_a_pyramid_lists_the_series_without_their_rows(
    logged: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    compact(logged.path)
    listed = list_series(logged)
    flip_in_page(Layout(logged.path).segments("metrics")[0])
    assert list_series(open_run(logged.path)) == listed


def test_a_list_holds_no_rows_and_reads_last_steps_only_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writers = open_ranks(tmp_path / "run", 2)
    for rank, writer in enumerate(writers):
        log(writer, 0, 0, name="once", value=np.array([rank]))
        for first in range(1, 101, 10):
            log(writer, first, first + 9, value=np.arange(first, first + 10.0) + rank)
            seal(writer)
        writer.close()
    taken: list[int] = []

    def counted(*arguments: Any) -> Any:
        part = part_of(*arguments)
        taken.append(0 if part is None else len(part.columns["step"]))
        return part

    monkeypatch.setattr(columns, "part_of", counted)
    facts = {one.key.name: one for one in list_series(open_run(tmp_path / "run"))}
    assert {name: one.last for name, one in facts.items()} == {"once": 0.5, "loss/mean": 100.5}
    assert sum(taken) == 202 + 4
    assert len(taken) == 22 + 4 - 2


def test_a_list_says_what_the_pyramid_does_of_segments_that_were_damaged_later(
    tmp_path: Path,
) -> None:
    writers = open_ranks(tmp_path / "run", 2)
    for writer in writers:
        log(writer, 1, 3)
        writer.close()
    compact(tmp_path / "run")
    for path in Layout(tmp_path / "run").segments("metrics"):
        flip_in_page(path)
    with pytest.warns(UserWarning, match="cannot be read"):
        facts = {one.key: one for one in list_series(open_run(tmp_path / "run"))}
    assert (facts[LOSS].count, facts[LOSS].last) == (6, 30.0)


def test_files_that_are_gone_are_forgotten(logged: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_ROOM", 8)
    logged._room = 8
    path, *_ = Layout(logged.path).segments("metrics")
    for number in range(100, 130):
        path = path.rename(path.with_name(f"000-{number:06d}.parquet"))
        assert steps_of(read_points(logged, ["loss/mean"])) == span(1, 35)
        os.utime(path, ns=(number, number))  # as if a rewind had replaced it
        assert steps_of(read_points(logged, ["loss/mean"])) == span(1, 35)
        assert len(logged._remembered) <= 2 * 6 + 1


def test_a_bucket_with_more_rows_than_steps_is_no_sketch(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "run")
    steps = np.repeat(np.arange(1, BUCKETS + 1), 2)
    writer.write("metrics", {"name": "loss/mean", "value": steps * 1.0, "step": steps})
    writer.close()
    compact(tmp_path / "run")
    assert read_sketches(open_run(tmp_path / "run"), ["loss/mean"]) is None


def test_of_a_segment_of_one_group_the_metadata_is_not_remembered(logged: Run) -> None:
    path, *_ = Layout(logged.path).segments("metrics")
    assert columns.Groups.of(path).metadata is None
    pq.write_table(pq.read_table(path), path, row_group_size=4)
    metadata = columns.Groups.of(path).metadata
    assert metadata is not None
    assert metadata.num_row_groups == 3
