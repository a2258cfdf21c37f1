from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from store.killing import flip_in_page, kill
from store.logging_process import hold, process, said
from store.strangers import STRANGERS, read_by, segments

from entropylens.errors import EntropyLensError
from entropylens.records import SCHEMAS
from entropylens.store import segments as segments_module
from entropylens.store.compact import BUCKETS, compact
from entropylens.store.layout import Layout
from entropylens.store.reader import open_run
from entropylens.store.writer import RunWriter

NAN, INF = float("nan"), float("inf")
BYTES_A_ROW = 5.0
"""Bound on a realistic metrics table; measured 4.5 sealed and 4.2 merged."""


def sorted_rows(table: pa.Table) -> list[str]:
    return sorted(map(repr, table.to_pylist()))


def contents(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def write_run(run_dir: Path, *, end: str = "close") -> None:
    """Three segments, perhaps a tail, odd values, text tables."""
    writer = RunWriter(run_dir, flush_seconds=3600, seal_rows=40)
    for start in (0, 10, 20, 30):
        for step in range(start, start + 10):
            values = [step, -step, NAN if step % 3 else INF, 0.5, None]
            names = ["z/last", "a/first", "odd", "m", "m"]
            row = {"name": names, "module": ["", "", "", "h.1", "h.0"], "value": values}
            writer.write("metrics", {**row, "step": step, "weight": 2.0})
            writer.write("tokens", {"step": step, "text": ["b", None], "token_id": [step, 7]})
        writer.flush()
    log_last = {"name": "z/last", "value": 99.0, "step": 99}
    writer.write("metrics", log_last)
    writer.flush()
    if end == "close":
        writer.close()
    else:
        kill(writer)


@pytest.mark.parametrize("end", ["close", "kill"])
def test_merging_keeps_every_row_for_us_and_for_strangers(tmp_path: Path, end: str) -> None:
    run_dir = tmp_path / "run"
    write_run(run_dir, end=end)
    run = open_run(run_dir)
    before = {table: sorted_rows(run.rows(table).table) for table in SCHEMAS}
    if end == "close":
        for name in ("pyarrow", "duckdb"):
            seen = read_by(name, run_dir).cast(SCHEMAS["metrics"])
            assert sorted_rows(seen) == before["metrics"]
    counts = compact(run_dir)
    assert counts == {"metrics": (5, 1), "tokens": (2, 1), "events": (1, 1)}
    for table in SCHEMAS:
        assert sorted_rows(run.rows(table).table) == before[table]
        assert len(segments(run_dir, table)) == (1 if before[table] else 0)
    for name in ("pyarrow", "duckdb"):
        seen = read_by(name, run_dir).cast(SCHEMAS["metrics"])
        assert sorted_rows(seen) == before["metrics"]
    assert not list(run_dir.glob("*/*.arrows"))


def test_metrics_are_sorted_by_name_module_and_step_and_other_tables_are_not(
    tmp_path: Path,
) -> None:
    write_run(tmp_path / "run")
    tokens = open_run(tmp_path / "run").tokens().table
    compact(tmp_path / "run")
    rows = open_run(tmp_path / "run").metrics().table.select(["name", "module", "step"]).to_pylist()
    keys = [tuple(row.values()) for row in rows]
    assert keys == sorted(keys)
    assert open_run(tmp_path / "run").tokens().table.equals(tokens)


def test_a_single_segment_is_sorted_too(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run")
    writer.write("metrics", {"name": ["b", "a"], "value": [1.0, 2.0]})
    writer.close()
    assert compact(tmp_path / "run")["metrics"] == (1, 1)
    assert open_run(tmp_path / "run").metrics().table["name"].to_pylist() == ["a", "b"]


def test_merging_again_changes_nothing(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    compact(tmp_path / "run")
    before = contents(tmp_path / "run")
    cursor = open_run(tmp_path / "run").metrics().cursor
    counts = compact(tmp_path / "run")
    assert counts == {"metrics": (1, 1), "tokens": (1, 1), "events": (1, 1)}
    assert contents(tmp_path / "run") == before
    assert not open_run(tmp_path / "run").metrics(since=cursor).restarted


def test_a_merged_run_may_be_resumed_and_merged_again(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    write_run(run_dir)
    compact(run_dir)
    cursor = open_run(run_dir).metrics().cursor
    writer = RunWriter(run_dir, resume_step=20)
    writer.write("metrics", {"name": "z/last", "value": 21.5, "step": 21})
    writer.close()
    assert len(segments(run_dir)) == 2
    before = sorted_rows(open_run(run_dir).metrics().table)
    resumed = open_run(run_dir).metrics(since=cursor)
    assert compact(run_dir)["metrics"] == (2, 1)
    assert sorted_rows(open_run(run_dir).metrics().table) == before
    assert resumed.restarted
    assert open_run(run_dir).metrics(since=resumed.cursor).restarted
    assert open_run(run_dir).metrics("z/last").table["value"].to_pylist()[-1] == 21.5
    pyramid = pq.read_table(Layout(run_dir).pyramid)
    assert max(pyramid["last_step"].to_pylist()) == 21


def test_ranks_are_merged_each_for_itself(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    writers = [RunWriter(run_dir, rank=rank, world_size=2) for rank in (0, 1)]
    for number in range(2):
        for writer in writers:
            writer.write("metrics", {"name": "loss", "value": writer.rank + number / 10, "step": 1})
            writer._ask("seal", 60)
    for writer in writers:
        writer.close()
    (run_dir / "status" / "rank-001.json").unlink()
    assert compact(run_dir)["metrics"] == (4, 2)
    assert [path.name for path in segments(run_dir)] == ["000-000002.parquet", "001-000002.parquet"]
    assert open_run(run_dir).metrics().table["value"].to_pylist() == [0, 0.1, 1, 1.1]


def test_the_tail_of_a_rank_without_a_status_is_merged_too(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    writers = [RunWriter(run_dir, rank=rank, world_size=2) for rank in (0, 1)]
    for writer in writers:
        writer.write("metrics", {"name": "loss", "value": writer.rank, "step": 1})
        writer.flush()
        kill(writer)
    (run_dir / "status" / "rank-001.json").unlink()
    compact(run_dir)
    assert read_by("duckdb", run_dir)["value"].to_pylist() == [0, 1]


# -- the pyramid ---------------------------------------------------------------------------------


def test_the_pyramid_agrees_with_numpy(tmp_path: Path) -> None:
    run_dir, random = tmp_path / "run", np.random.default_rng(0)
    writer = RunWriter(run_dir, flush_seconds=3600)
    lengths = {"long": 2570, "exact": BUCKETS, "one": 1, "some": 37, "nothing": 5}
    for name, length in lengths.items():
        for module in ("", "h.0"):
            values = random.normal(size=length)
            values[random.random(length) < 0.1] = NAN
            values[random.random(length) < 0.1] = random.choice([INF, -INF])
            if name == "nothing":
                values[:] = NAN
            order = random.permutation(length)
            columns = {"name": name, "module": module, "value": values[order], "step": order}
            writer.write("metrics", columns)
            writer._ask("seal", 60)
    writer.write("metrics", {"name": "one", "value": 5.0, "step": 9, "phase": "eval"})
    writer.close()
    frame = open_run(run_dir).metrics().to_pandas()
    compact(run_dir)
    found = pq.read_table(Layout(run_dir).pyramid).to_pandas()
    keys = ["rank", "phase", "name", "module"]
    series = dict(list(frame.groupby(keys)))
    assert len(found.groupby(keys)) == len(series) == 11
    for key, buckets in found.groupby(keys):
        rows = series[key].sort_values("step", kind="stable")
        assert len(buckets) == min(len(rows), BUCKETS)
        parts = np.arange(len(rows)) * len(buckets) // len(rows)
        assert buckets["count"].sum() == len(rows)
        for (_, bucket), (_, part) in zip(
            buckets.sort_values("bucket").iterrows(), rows.groupby(parts), strict=True
        ):
            value = part["value"].to_numpy()
            finite = value[np.isfinite(value)]
            assert (bucket["first_step"], bucket["last_step"]) == (
                part["step"].min(),
                part["step"].max(),
            )
            assert bucket["count"] == len(value)
            assert bucket["nonfinite"] == len(value) - len(finite)
            np.testing.assert_equal(bucket["last"], value[-1])
            if len(finite):
                assert (bucket["min"], bucket["max"]) == (finite.min(), finite.max())
            else:
                assert pd.isna(bucket["min"])
                assert pd.isna(bucket["max"])


def test_the_pyramid_says_where_extremes_lie_and_which_rows_it_shows(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    writer = RunWriter(run_dir)
    values = [2.0, NAN, -1.0, INF, -1.0, 5.0]
    steps = np.arange(11, 17)
    row: dict[str, Any] = {"name": ["a"] * 6, "value": values, "step": steps, "time": steps * 0.5}
    writer.write("metrics", row)
    writer.write("metrics", {"name": "odd", "value": INF, "step": 1, "time": 2.0})
    writer.close()
    run_id = open_run(run_dir).run_id
    compact(run_dir)
    layout = Layout(run_dir)
    for path in (layout.pyramid, layout.pyramid.with_name("series.parquet")):
        metadata = pq.read_metadata(path).metadata
        assert {k.decode(): v.decode() for k, v in metadata.items() if b"entropylens" in k} == {
            "entropylens.run_id": run_id,
            "entropylens.generation": "1",
            "entropylens.end_rows": '{"0": 7}',
            "entropylens.rows": '{"0": 7}',
        }
    buckets = pq.read_table(layout.pyramid).to_pylist()
    assert [bucket["min_step"] for bucket in buckets] == [11, None, 13, None, 15, 16, None]
    assert all(bucket["min_step"] == bucket["max_step"] for bucket in buckets)
    assert [bucket["last_time"].timestamp() for bucket in buckets] == [*(steps * 0.5), 2.0]
    assert all(bucket["last_time"] == bucket["first_time"] for bucket in buckets)
    (one, odd) = pq.read_table(layout.pyramid.with_name("series.parquet")).to_pylist()
    assert one.pop("first_time").timestamp() == 5.5
    assert one.pop("last_time").timestamp() == 8.0
    assert one == {
        **{"rank": 0, "phase": "train", "name": "a", "module": "", "count": 6, "nonfinite": 2},
        **{"first_step": 11, "last_step": 16, "min": -1.0, "max": 5.0, "last": 5.0},
    }
    assert (odd["min"], odd["max"], odd["last"]) == (None, None, INF)


def test_merged_metrics_lie_in_small_row_groups_and_take_hardly_more_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {}
    for size in (1 << 15, 1 << 20):
        monkeypatch.setattr(segments_module, "_ROWS_A_GROUP", size)
        run_dir = tmp_path / str(size)
        random, writer = np.random.default_rng(0), RunWriter(run_dir)
        for name in ("a", "b"):
            steps = np.arange(200_000)
            row = {"name": name, "value": random.normal(size=len(steps)), "step": steps}
            writer.write("metrics", {**row, "time": 1.7e9 + steps * 0.3})
            writer._ask("seal", 60)
        writer.close()
        compact(run_dir)
        (path,) = segments(run_dir)
        metadata = pq.read_metadata(path)
        assert metadata.num_row_groups == -(-400_000 // size)
        sizes[size] = path.stat().st_size
    assert sizes[1 << 15] < 1.05 * sizes[1 << 20]


def test_a_table_without_rows_has_an_empty_pyramid(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    writer = RunWriter(run_dir)
    writer.write("metrics", {"name": "a", "value": 1.0, "step": 5})
    writer.close()
    RunWriter(run_dir, resume_step=1).close()
    compact(run_dir)
    assert pq.read_metadata(Layout(run_dir).pyramid).num_rows == 0


# -- what is not merged --------------------------------------------------------------------------


def test_a_run_in_use_is_not_merged(tmp_path: Path) -> None:
    with process(hold, tmp_path / "run") as holder:
        assert said(holder) == "ready"
        with pytest.raises(EntropyLensError, match=f"in use by process {holder.pid}"):
            compact(tmp_path / "run")
    first = RunWriter(tmp_path / "two", world_size=2)
    second = RunWriter(tmp_path / "two", rank=1, world_size=2)
    first.close()
    for _ in range(2):  # rank 0 is given back each time
        with pytest.raises(EntropyLensError, match="free for rank 1, but it is in use"):
            compact(tmp_path / "two")
    second.close()
    assert compact(tmp_path / "two") == {"events": (2, 2)}


def test_where_there_is_no_run_nothing_is_made(tmp_path: Path) -> None:
    with pytest.raises(EntropyLensError, match=r"expected a run directory with run\.json"):
        compact(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_strangers_and_damaged_segments_stay_where_they_are(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    write_run(run_dir)
    run = open_run(run_dir)
    rows = run.metrics().table.num_rows
    (copied, damaged, *_) = segments(run_dir)
    lost = pq.read_metadata(damaged).num_rows
    flip_in_page(damaged)
    strange: dict[str, bytes] = {
        "000-000001.parquet": damaged.read_bytes(),
        "my copy.parquet": copied.read_bytes(),
        "notes.txt": b"mine",
        ".hidden": b"mine too",
        "folder/file": b"below",
    }
    (run_dir / "metrics" / "folder").mkdir()
    for name, content in strange.items():
        (run_dir / "metrics" / name).write_bytes(content)
    (run_dir / "metrics" / ".000-000009.parquet.tmp").write_bytes(b"unfinished")
    assert compact(run_dir)["metrics"] == (4, 1)
    found = contents(run_dir / "metrics")
    assert found.keys() == {*strange, "000-000005.parquet"}
    assert {name: found[name] for name in strange} == strange
    with pytest.warns(UserWarning, match="skipped: "):
        after = open_run(run_dir).metrics()
    assert after.table.num_rows == rows - lost
    named = {"000-000001.parquet", "my copy.parquet", "notes.txt", "folder"}
    assert sum(any(name in note for name in named) for note in after.warnings) == len(named)
    assert len(after.warnings) == len(named)


def test_a_run_without_metrics_has_no_pyramid(tmp_path: Path) -> None:
    RunWriter(tmp_path / "run").close()
    assert compact(tmp_path / "run") == {"events": (1, 1)}
    assert not Layout(tmp_path / "run").pyramid.exists()


# -- size ----------------------------------------------------------------------------------------


def realistic_run(run_dir: Path, steps: int) -> None:
    """What the demo logs: some vitals of the run and two series for each of 24 modules, float32."""
    random, writer = np.random.default_rng(0), RunWriter(run_dir, flush_seconds=3600)
    vitals = [f"vital/{number}/mean" for number in range(30)]
    layers = [f"model.layers.{number}.mlp" for number in range(24)]
    walk = np.zeros(len(vitals) + 2 * len(layers), dtype=np.float32)
    names = [*vitals, *["gradient/norm"] * len(layers), *["update/ratio"] * len(layers)]
    modules = [""] * len(vitals) + layers * 2
    clock = 1_700_000_000.0
    for step in range(1, steps + 1):
        walk += random.normal(size=len(walk)).astype(np.float32)
        clock += 0.3 + 0.01 * random.normal()
        weights = np.where(np.arange(len(walk)) < len(vitals), random.integers(3000, 4097), 1)
        row: dict[str, Any] = {"name": names, "module": modules, "value": walk.copy()}
        writer.write("metrics", {**row, "weight": weights, "step": step, "time": clock})
        if step % 100 == 0:
            writer._ask("seal", 60)
    writer.close()


def test_a_merged_metrics_table_takes_few_bytes_a_row(tmp_path: Path) -> None:
    run_dir, steps = tmp_path / "run", 1000
    realistic_run(run_dir, steps)
    sealed = sum(path.stat().st_size for path in segments(run_dir))
    rows = read_by("pyarrow", run_dir).num_rows
    compact(run_dir)
    merged = sum(path.stat().st_size for path in segments(run_dir))
    assert rows == 78 * steps
    print(f"bytes a row: {sealed / rows:.2f} sealed, {merged / rows:.2f} merged")
    assert merged < sealed < BYTES_A_ROW * rows
    for name in STRANGERS:
        table = read_by(name, run_dir)
        kept = table["value"].to_numpy()
        np.testing.assert_array_equal(kept, kept.astype(np.float32))
