"""Logs of a size that nobody trains for, written as merging and sealing would have left them."""

import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from entropylens.figures.panels import PANELS
from entropylens.records import FORMAT_VERSION, SCHEMAS
from entropylens.store.compact import compact
from entropylens.store.layout import Layout, publish, temporary
from entropylens.store.manifest import load_manifest
from entropylens.store.points import Key, list_series, read_points
from entropylens.store.reader import Run
from entropylens.store.segments import _ROWS_A_GROUP, encodings, write_segment
from entropylens.store.writer import RunWriter

SEGMENT_ROWS: Final = 200_000
LAYERS: Final = 12_000
LAYER_STEPS: Final = 50
STEPS_A_SECOND: Final = 20.0
_BEGAN: Final = 1_790_000_000_000_000
"""Microseconds since 1970 at which every run begins."""


@dataclass(frozen=True)
class Size:
    """How much there is of everything."""

    steps: int
    metrics: int
    runs: int

    @property
    def names(self) -> list[str]:
        """What vital signs draw, what the axis of tokens needs, and a user's own."""
        drawn = [s.name for panel in PANELS for s in panel.series if s.phase == "train"]
        names = list(dict.fromkeys([*drawn, "tokens/seen"]))[: self.metrics]
        return names + [f"user/metric_{n:02d}" for n in range(self.metrics - len(names))]


@dataclass(frozen=True)
class Places:
    """Where the logs lie."""

    root: Path

    @property
    def runs(self) -> Path:
        """The folder that is served: merged runs, layers, and the run that is written to."""
        return self.root / "runs"

    @property
    def live(self) -> Path:
        return self.runs / "live"

    @property
    def before_live(self) -> Path:
        """The live run before it was resumed."""
        return self.root / "before" / "live"

    @property
    def unmerged(self) -> Path:
        """A folder of its own: it would hold up the list of the others."""
        return self.root / "unmerged"

    def merged(self, size: Size) -> list[Path]:
        return [self.runs / f"run-{number}" for number in range(size.runs - 1)]


def values(run: int, series: int, steps: int) -> NDArray[np.float64]:
    """A decaying, noisy curve in float32's precision, with spikes and a few NaN."""
    chance = np.random.default_rng([run, series])
    along = np.linspace(0.0, 5.0, steps, dtype=np.float32)
    noise = 0.05 * chance.standard_normal(steps, dtype=np.float32)
    found = (np.float32(1 + series % 7) * (np.float32(1) + np.exp(-along)) + noise).astype("f8")
    found[chance.integers(steps, size=20)] *= 10
    found[chance.integers(steps, size=5)] = math.nan
    return found


def times(steps: int) -> NDArray[np.int64]:
    """Microseconds of each step."""
    chance = np.random.default_rng(0)
    usual = round(1e6 / STEPS_A_SECOND)
    return _BEGAN + np.cumsum(chance.integers(usual - 2000, usual + 2000, size=steps))


# -- runs ------------------------------------------------------------------------------------------


def write_merged(place: Path, number: int, size: Size) -> None:
    """A finished run as `compact` leaves it."""

    def fill(layout: Layout, run_id: str) -> None:
        _write_sorted(layout, run_id, _by_series(number, size), size.steps * size.metrics)

    _build(place, size.steps - 1, fill)


def write_unmerged(place: Path, number: int, size: Size) -> None:
    """A finished run in the segments that its writer sealed."""
    names = size.names

    def fill(layout: Layout, run_id: str) -> None:
        everything = np.stack([values(number, at, size.steps) for at in range(size.metrics)], 1)
        flat, at_time = everything.reshape(-1), times(size.steps)
        for sequence, first in enumerate(range(0, len(flat), SEGMENT_ROWS)):
            place = np.arange(first, min(first + SEGMENT_ROWS, len(flat)))
            step, series = np.divmod(place, size.metrics)
            rows = _rows(_taken(names, series), step, at_time[step], flat[place])
            _write(layout, run_id, sequence, rows, first)

    _build(place, size.steps - 1, fill, merge=False)


def write_layers(place: Path) -> None:
    """A run of many layers, merged by `compact` itself."""
    count = LAYERS * LAYER_STEPS
    modules = [f"model.layers.{at // 8}.part_{at % 8}" for at in range(LAYERS)]

    def fill(layout: Layout, run_id: str) -> None:
        step, module = np.divmod(np.arange(count), LAYERS)
        value = np.exp(np.random.default_rng(7).standard_normal(count, dtype=np.float32))
        name = pa.repeat(pa.scalar("conditioning/kappa"), count)
        rows = _rows(name, step, times(LAYER_STEPS)[step], value, _taken(modules, module))
        _write(layout, run_id, 0, rows, 0)

    _build(place, LAYER_STEPS - 1, fill)


def check(path: Path, number: int, size: Size) -> None:
    """Whether the reader finds in a run what was written."""
    for at in sorted({0, size.metrics // 2, size.metrics - 1}):
        name = size.names[at]
        points = read_points(Run(path), [name]).series[Key(name, "", "train")]
        np.testing.assert_array_equal(points.values, values(number, at, size.steps))
        np.testing.assert_array_equal(points.steps, np.arange(size.steps))


def names_of(path: Path) -> list[str]:
    """The metrics that a run has: vital signs may draw others today than when it was written."""
    return sorted({facts.key.name for facts in list_series(Run(path))})


def id_of(path: Path) -> str:
    """The run's address in the dashboard."""
    return str(load_manifest(path)["run_id"])[:12]


def _build(place: Path, last_step: int, fill: Any, *, merge: bool = True) -> None:
    """A run beside its place, which it takes when it is whole."""
    if place.exists():
        return
    beside = place.with_name(f".{place.name}.unfinished")
    shutil.rmtree(beside, ignore_errors=True)
    writer = RunWriter(beside, name=place.name, config={"model": "none", "user": {"tags": "made"}})
    writer.step = last_step
    writer.close()
    fill(Layout(beside), writer.run_id)
    if merge:
        compact(beside)
    os.replace(beside, place)


def _by_series(number: int, size: Size) -> Iterator[pa.Table]:
    steps, at_time = np.arange(size.steps), times(size.steps)
    for at, name in sorted(enumerate(size.names), key=lambda one: one[1]):
        names = pa.repeat(pa.scalar(name), size.steps)
        yield _rows(names, steps, at_time, values(number, at, size.steps))


def _rows(name: Any, step: Any, time: Any, value: Any, module: Any = None) -> pa.Table:
    count, schema = len(step), SCHEMAS["metrics"]
    columns = {
        "rank": pa.array(np.zeros(count, "i4")),
        "attempt": pa.array(np.zeros(count, "i4")),
        "phase": pa.repeat(pa.scalar("train"), count),
        "step": pa.array(step),
        "time": pa.array(time).cast(schema.field("time").type),
        "name": name,
        "module": pa.nulls(count, pa.string()) if module is None else module,
        "value": pa.array(np.asarray(value, "f8")),
        "weight": pa.nulls(count, pa.float64()),
    }
    return pa.table(columns, schema=schema)


def _taken(words: list[str], places: NDArray[np.int64]) -> Any:
    return pa.array(words).take(pa.array(places))


def _write(layout: Layout, run_id: str, sequence: int, rows: pa.Table, first: int) -> None:
    write_segment(
        layout.segment("metrics", 0, sequence),
        rows,
        run_id=run_id,
        table="metrics",
        rank=0,
        first_row=first,
        end_row=first + rows.num_rows,
    )


def _write_sorted(layout: Layout, run_id: str, parts: Iterator[pa.Table], count: int) -> None:
    """What `write_segment` writes of all parts together, a few of them in memory."""
    path, size = layout.segment("metrics", 0, 1), _ROWS_A_GROUP
    facts = {
        "format_version": FORMAT_VERSION,
        "run_id": run_id,
        "table": "metrics",
        "rank": 0,
        "first_row": 0,
        "end_row": count,
        "generation": 1,
    }
    schema = SCHEMAS["metrics"].with_metadata(
        {f"entropylens.{name}": str(value) for name, value in facts.items()}
    )
    path.parent.mkdir(exist_ok=True)
    options = {"compression": "zstd", "write_page_checksum": True, **encodings(schema)}
    with pq.ParquetWriter(temporary(path), schema, **options) as file:
        held = schema.empty_table()
        for part in parts:
            held = pa.concat_tables([held, part.replace_schema_metadata(schema.metadata)])
            whole = held.num_rows - held.num_rows % size
            if whole:
                file.write_table(held.slice(0, whole).combine_chunks(), row_group_size=size)
                held = held.slice(whole)
        if held.num_rows:
            file.write_table(held.combine_chunks(), row_group_size=size)
    publish(path)


# -- a run that is being written -------------------------------------------------------------------


def renew_live(places: Places) -> None:
    """The live run as it was before anything was added; segments, which nobody changes, linked."""

    def copy(source: str, target: str) -> None:
        (os.link if source.endswith(".parquet") else shutil.copy2)(source, target)

    shutil.rmtree(places.live, ignore_errors=True)
    shutil.copytree(places.before_live, places.live, copy_function=copy)


def go_on(path: Path, size: Size) -> None:
    """Resume a run and add steps until told to end."""
    began = time.perf_counter()
    writer = RunWriter(path, resume_step=size.steps - 1, name=path.name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print(f"{time.perf_counter() - began:.3f}", flush=True)
    names, chance = names_of(path), np.random.default_rng(1)
    due = time.monotonic()
    while True:
        writer.step += 1
        level = 1 + np.arange(size.metrics) % 7
        writer.write("metrics", {
            "phase": "train",
            "name": names,
            "value": (level + 0.05 * chance.standard_normal(size.metrics)).tolist(),
        })  # fmt: skip
        due += 1 / STEPS_A_SECOND
        time.sleep(max(due - time.monotonic(), 0.0))


if __name__ == "__main__":
    go_on(Path(sys.argv[1]), Size(*map(int, sys.argv[2:5])))
