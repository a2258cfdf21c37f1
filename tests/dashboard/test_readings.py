from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs_to_show import fill, write

from entropylens.errors import EntropyLensError
from entropylens.store.compact import compact
from entropylens.store.points import Key, read_points
from entropylens.store.reader import open_run
from entropylens_dashboard import readings as module
from entropylens_dashboard.readings import Readings

LOSS = Key("loss/mean", "", "train")
ENTROPY = Key("entropy/token/mean", "", "train")


def logged(folder: Path, name: str = "run") -> tuple[np.ndarray, np.ndarray]:
    rows = open_run(folder / name).metrics("loss/mean").to_pandas().sort_values("step")
    return rows["step"].to_numpy(), rows["value"].to_numpy()


def test_a_series_is_what_the_log_holds_and_grows_with_it(folder: Path, make: Any) -> None:
    writer, readings = make("run"), Readings()
    run = open_run(folder / "run")
    for first, last in ((1, 300), (301, 450), (451, 451)):
        if first > 1:
            fill(writer, first, last)
            writer.flush()
        series, _ = readings.look(run, [LOSS, ENTROPY])
        steps, values = logged(folder)
        assert series[LOSS].steps.tolist() == steps.tolist() == list(range(1, last + 1))
        assert series[LOSS].values.tolist() == values.tolist()
        assert series[LOSS].total == last


def test_only_what_is_new_is_read_again(
    folder: Path, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, readings = make("run"), Readings()
    run = open_run(folder / "run")
    readings.look(run, [LOSS])
    fill(writer, 301, 310)
    writer.flush()
    read: list[int] = []

    def counting(*args: Any, **kwargs: Any) -> Any:
        found = read_points(*args, **kwargs)
        read.append(sum(len(points.steps) for points in found.series.values()))
        return found

    monkeypatch.setattr(module, "read_points", counting)
    series, _ = readings.look(run, [LOSS])
    assert len(series[LOSS].steps) == 310
    assert read == [10]


def test_a_merged_run_is_first_sketched_and_whole_when_asked(folder: Path, make: Any) -> None:
    make("run", steps=20_000).close()
    compact(folder / "run")
    run, readings = open_run(folder / "run"), Readings()
    steps, values = logged(folder)
    sketch = readings.look(run, [LOSS])[0][LOSS]
    assert not sketch.is_whole
    assert sketch.total == 20_000
    assert len(sketch.steps) <= 3000
    assert (sketch.values.min(), sketch.values.max()) == (values.min(), values.max())
    at = dict(zip(steps.tolist(), values.tolist(), strict=True))
    for step, value in zip(sketch.steps.tolist(), sketch.values.tolist(), strict=True):
        assert at[step] == value
    whole = readings.look(run, [LOSS], is_whole=True)[0][LOSS]
    assert whole.values.tolist() == values.tolist()
    assert readings.look(run, [LOSS])[0][LOSS].is_whole  # what is known better stays known


def test_a_nan_in_a_sketch_is_marked_within_its_bucket(folder: Path, make: Any) -> None:
    writer = make("run", steps=0)
    values = np.ones(5000)
    values[1234] = np.nan
    write(writer, "loss/mean", np.arange(5000), values)
    writer.close()
    compact(folder / "run")
    sketch = Readings().look(open_run(folder / "run"), [LOSS])[0][LOSS]
    wild = sketch.steps[np.isnan(sketch.values)]
    assert len(wild) == 1
    assert abs(int(wild[0]) - 1234) <= 5


def test_steps_are_read_from_the_files_unless_they_are_known(folder: Path, make: Any) -> None:
    make("run", steps=5000).close()
    compact(folder / "run")
    run, readings = open_run(folder / "run"), Readings()
    steps, values = logged(folder)
    for _ in ("from the files", "from memory"):
        cut = readings.within(run, [LOSS], 1000, 1010)[LOSS]
        assert cut.steps.tolist() == list(range(1000, 1011))
        assert cut.values.tolist() == values[(steps >= 1000) & (steps <= 1010)].tolist()
        readings.look(run, [LOSS], is_whole=True)
    assert readings.within(run, [LOSS], 9000, 9010) == {}


def test_a_resume_from_an_earlier_step_starts_over(folder: Path, make: Any) -> None:
    from entropylens.store.writer import RunWriter

    make("run").close()
    run, readings = open_run(folder / "run"), Readings()
    readings.look(run, [LOSS])
    again = RunWriter(folder / "run", resume_step=100)
    fill(again, 101, 120, seed=9)
    again.close()
    series, _ = readings.look(run.refresh(), [LOSS])
    assert series[LOSS].steps.tolist() == list(range(1, 121))
    assert series[LOSS].values.tolist() == logged(folder)[1].tolist()


def test_what_is_kept_stays_within_its_bound(folder: Path, make: Any) -> None:
    make("run", steps=2000).close()
    run = open_run(folder / "run")
    small = Readings(memory_bytes=100_000)
    keys = [Key(f"entropy/token/{q}", "", "train") for q in ("p05", "p25", "p50", "p75", "p95")]
    series, _ = small.look(run, keys)
    assert len(series) == 5  # an answer is whole even where it is not kept whole
    assert small._bytes <= 100_000
    assert small.look(run, [LOSS])[0][LOSS].total == 2000


def test_a_rank_that_is_late_changes_steps_that_were_read(folder: Path, make: Any) -> None:
    from entropylens.store.writer import RunWriter

    first = make("run", steps=0)
    second = RunWriter(folder / "run", rank=1, world_size=2, flush_seconds=0.05)
    write(first, "loss/mean", np.arange(1, 11), np.full(10, 1.0))
    first.flush()
    run, readings = open_run(folder / "run"), Readings()
    assert readings.look(run, [LOSS])[0][LOSS].values.tolist() == [1.0] * 10
    write(second, "loss/mean", np.arange(6, 11), np.full(5, 3.0))
    write(first, "loss/mean", [11], [1.0])
    first.flush()
    second.close()
    series, _ = readings.look(run, [LOSS])
    assert series[LOSS].values.tolist() == [1.0] * 5 + [2.0] * 5 + [1.0]


def test_too_many_series_at_once_are_refused(folder: Path, make: Any) -> None:
    make("run")
    keys = [Key(f"user/{i}", "", "train") for i in range(201)]
    with pytest.raises(EntropyLensError, match="at most 200 series at once, got 201; pick fewer"):
        Readings().look(open_run(folder / "run"), keys)


def test_a_list_of_series_is_read_again_once_it_has_grown(
    folder: Path, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LIST_SECONDS", 0.0)
    writer, readings = make("run", steps=10), Readings()
    run = open_run(folder / "run")
    assert "loss/mean" in readings.names(run)
    write(writer, "user/new", [11], [1.0])
    writer.close()
    assert "user/new" in readings.names(run)


def test_files_that_did_not_change_are_not_read_again(
    folder: Path, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, readings = make("run"), Readings()
    run = open_run(folder / "run")
    _, cursor = readings.look(run, [LOSS])
    assert readings.since(run, [LOSS], cursor).series == {}
    monkeypatch.setattr(module, "read_points", None)
    assert readings.since(run, [LOSS], cursor).series == {}
    monkeypatch.setattr(module, "read_points", read_points)
    fill(writer, 301, 302)
    writer.flush()
    assert readings.since(run, [LOSS], cursor).series[LOSS].steps.tolist() == [301, 302]
    writer.close()
    shown = readings.since(run, [LOSS], cursor)
    assert shown.series[LOSS].steps.tolist() == [301, 302]
    assert readings.since(run, [LOSS], str(shown.cursor)).series == {}
