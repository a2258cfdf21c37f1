"""What pages compute, asked of the functions that do."""

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs_to_show import fill, write

from entropylens.store.compact import compact
from entropylens.store.reader import open_run
from entropylens_dashboard import create_server
from entropylens_dashboard.desk import Desk, events, headlines, marks, verdict
from entropylens_dashboard.library import Library
from entropylens_dashboard.pages import compare, vitals
from entropylens_dashboard.pages.compare import _outcome
from entropylens_dashboard.pages.runs import _cells
from entropylens_dashboard.readings import Readings
from entropylens_dashboard.sheet import View


def desk(folder: Path) -> Desk:
    return Desk(Library(folder, ttl=0), Readings())


def test_runs_that_differ_in_a_seed_are_one_row_with_students_interval(
    folder: Path, make: Any
) -> None:
    finals = [1.0, 2.0, 4.0]
    for seed, value in enumerate(finals):
        writer = make(f"a-{seed}", steps=0, seed=seed, lr=1e-3)
        write(writer, "loss/mean", np.arange(1, 101), np.full(100, value))
        writer.close()
    other = make("b", steps=0, lr=1e-2)
    write(other, "loss/mean", np.arange(1, 101), np.full(100, 9.0))
    other.close()
    runs = [open_run(folder / name) for name in ("a-0", "a-1", "a-2", "b")]
    columns, rows = _outcome(desk(folder), runs, ["loss/mean", "user/none"])
    assert [column["field"] for column in columns] == ["runs", "seeds", "value0"]
    many, one = sorted(rows, key=lambda row: -row["seeds"])
    # t of 0.975 with two degrees of freedom is 4.3027, the standard error 0.8819.
    assert (many["seeds"], many["value0"]) == (3, "2.333  [-1.461, 6.128]")
    assert (one["seeds"], one["value0"]) == (1, "9")


def test_a_table_to_take_along_has_every_value_also_of_a_run_that_is_sketched(
    folder: Path, make: Any
) -> None:
    make("run", steps=20_000).close()
    compact(folder / "run")
    client = create_server(folder).test_client()
    run_id = Library(folder).entries()[0].id
    query = f"page=vitals&runs={run_id}&panel=loss"
    answer = client.get(f"/export/figure.csv?{query}", headers={"Host": "localhost"})
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    logged = open_run(folder / "run").metrics("loss/mean").to_pandas().sort_values("step")
    assert [int(row["step"]) for row in rows] == logged["step"].tolist()
    assert [float(row["value"]) for row in rows] == logged["value"].tolist()


def test_a_sparkline_shows_a_spike_and_where_a_value_was_no_number(folder: Path, make: Any) -> None:
    writer = make("run", steps=0)
    values = np.ones(3000)
    values[1501], values[2500] = 50.0, np.nan
    write(writer, "loss/mean", np.arange(3000), values)
    write(writer, "throughput/tokens_per_second", np.arange(3000), np.arange(3000.0))
    writer.close()
    found = desk(folder)
    cells = _cells(found, found.library.entries()[0])
    assert max(value for value in cells["loss"] if value is not None) == 50.0
    assert None in cells["loss"]
    assert cells["speed"] == 2999
    assert cells["verdict"] == "watch"


def test_what_a_trainer_logs_as_reward_is_judged(folder: Path, make: Any) -> None:
    writer = make("run", steps=0)
    values = np.r_[np.linspace(0.2, 0.8, 300), np.full(100, 0.1)]
    write(writer, "framework/reward", np.arange(400), values)
    writer.flush()
    found = desk(folder)
    entry = found.library.entries()[0]
    assert entry.run is not None
    judged, _ = verdict(entry, headlines(found, entry.run), events(entry.run))
    assert judged.level == "failing"
    assert "reward" in judged.reason


def test_a_reward_of_rollouts_is_judged_listed_and_compared(folder: Path, make: Any) -> None:
    writer = make("run", steps=0)
    values = np.r_[np.linspace(0.2, 0.8, 300), np.full(100, 0.1)]
    write(writer, "reward/mean", np.arange(400), values, phase="rollout")
    write(writer, "framework/reward", np.arange(400), np.full(400, 0.5))
    write(writer, "loss/mean", np.arange(400), np.zeros(400))
    writer.flush()
    found = desk(folder)
    entry = found.library.entries()[0]
    assert entry.run is not None
    series = headlines(found, entry.run)
    assert series["reward/mean"].values.tolist() == values.tolist()
    judged, _ = verdict(entry, series, events(entry.run))
    assert judged.level == "failing"
    assert judged.reason.startswith("the reward left its range")
    assert (min(_cells(found, entry)["loss"]), max(_cells(found, entry)["loss"])) == (0.1, 0.8)
    _, (row,) = _outcome(found, [entry.run], ["reward/mean", "loss/mean"])
    assert (row["value0"], row["value1"]) == ("0.1", "0")
    assert {"reward/mean", "loss/mean"} <= set(found.readings.names(entry.run))


def test_training_comes_before_rollouts_where_both_have_a_name(folder: Path, make: Any) -> None:
    writer = make("run", steps=0)
    write(writer, "reward/mean", [1, 2], [1.0, 1.0])
    write(writer, "reward/mean", [1, 2, 3], [2.0, 2.0, 2.0], phase="rollout")
    writer.flush()
    found = desk(folder)
    run = found.library.entries()[0].run
    assert run is not None
    assert headlines(found, run)["reward/mean"].values.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("page", ["vitals", "compare"])
def test_pages_draw_series_of_rollouts(folder: Path, make: Any, page: str) -> None:
    writer = make("run", steps=0)
    for name in ("reward/mean", "group/no_spread/share", "user/mine"):
        write(writer, name, [1, 2], [0.5, 0.25], phase="rollout")
    writer.flush()
    found = desk(folder)
    made = {"vitals": vitals.sheet, "compare": compare.sheet}[page]
    names = {"more": ["user/mine"], "names": ["reward/mean", "user/mine"]}
    sheet = made(found, {"runs": [found.library.entries()[0].id]}, View(), names)
    sheet.read(found.readings)
    drawn = {one.panel.key: one.figure["data"] for one in sheet.pictures()}
    expected = {
        "vitals": ["reward", "groups", "user/mine"],
        "compare": ["reward/mean", "user/mine"],
    }
    assert list(drawn) == expected[page]
    for traces in drawn.values():
        assert [t["y"].tolist() for t in traces if t["meta"][1] == "line"] == [[0.5, 0.25]]


def test_the_newest_events_are_kept_and_stand_where_they_happened(
    folder: Path, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = make("run", steps=100)
    for step in range(1, 41):
        writer.event("note", f"at {step}", step=step)
    writer.close()
    monkeypatch.setattr("entropylens_dashboard.desk._EVENTS", 10)
    seen = events(open_run(folder / "run"))
    assert len(seen) == 10
    assert seen[-1]["kind"] == "run/end"
    tokens = headlines(desk(folder), open_run(folder / "run"))["tokens/seen"]
    placed = {mark.message: mark.x for mark in marks(seen, "tokens", tokens)}
    assert placed["at 40"] == 64.0 * 40
    times = {mark.message: mark.x for mark in marks(seen, "time")}
    assert times["at 40"] == pytest.approx(seen[-2]["time"].timestamp())


def test_colours_do_not_change_as_runs_are_added(folder: Path, make: Any) -> None:
    make("first").close()
    found = desk(folder)
    run_id = found.library.entries()[0].id
    before = found.colour(run_id)
    writer = make("second")
    fill(writer, 301, 302)
    writer.close()
    assert found.colour(run_id) == before
    others = {found.colour(entry.id) for entry in found.library.entries()}
    assert len(others) == 2
