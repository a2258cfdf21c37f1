"""Series of the library's runs, kept in memory as long as they are looked at."""

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from entropylens.errors import EntropyLensError
from entropylens.figures.thinning import kept as thinned
from entropylens.store.points import (
    Found,
    Key,
    Points,
    SeriesFacts,
    Sketch,
    first_look,
    list_series,
    read_points,
)
from entropylens.store.reader import Cursor, Run

__all__ = ["PHASES", "Readings", "Stretch"]

PHASES: Final = ("train", "rollout")
"""Where a metric that is asked for by its name alone may be, the first that has it is taken."""

QUERY_SECONDS: Final = 20.0
"""How long one request may read."""
MOST_SERIES: Final = 200
"""Series that one request may ask of a run."""
MEMORY_BYTES: Final = 256 * 2**20
"""What one process keeps."""
LONG: Final = 50_000
"""Values of a series beyond which only extremes of stretches are kept, unless all are asked for."""
_SKETCH: Final = 4000
"""Points that are then kept."""

_LIST_SECONDS: Final = 20.0
_QUIET: Final = 1000
_LISTS: Final = 20
"""Runs whose lists of series are remembered."""


@dataclass(frozen=True)
class Stretch:
    """A series, or a first look at it."""

    steps: NDArray[np.int64]
    times: NDArray[np.float64]
    values: NDArray[np.float64]
    total: int
    """Values that stand behind it."""
    is_whole: bool = True
    """False for a first look: minimum and maximum of each of 1,000 buckets."""

    @property
    def nbytes(self) -> int:
        """What it takes of memory."""
        return int(self.steps.nbytes + self.times.nbytes + self.values.nbytes)

    def followed_by(self, rest: Points) -> "Stretch":
        """This, then what came later."""
        if not len(rest.steps):
            return self
        return replace(
            self,
            steps=np.concatenate([self.steps, rest.steps]),
            times=np.concatenate([self.times, rest.times]),
            values=np.concatenate([self.values, rest.values]),
            total=self.total + len(rest.steps),
        )


@dataclass
class _Kept:
    """What is remembered of one series; ``stretch`` is None where the run has none of it."""

    stretch: Stretch | None
    cursor: Cursor


class Readings:
    """Series by name, read as far as they were not read before.

    Nothing depends on what it remembers but time: several processes, each with its own, give the
    same answers.

    Args:
        memory_bytes: What is kept at most, the oldest is dropped.
        common: Series that pages ask for one after the other: where a run can only be read from its
            rows, all of them are read with the first.
    """

    def __init__(self, memory_bytes: int = MEMORY_BYTES, common: Iterable[Key] = ()) -> None:
        self._memory_bytes, self._common = memory_bytes, tuple(common)
        self._readers: dict[tuple[str, str], threading.Lock] = {}
        self._kept: OrderedDict[tuple[Any, ...], _Kept] = OrderedDict()
        self._bytes = 0
        self._quiet: dict[tuple[str, str], tuple[str, str]] = {}
        self._lists: dict[tuple[str, str], tuple[int, float, list[SeriesFacts]]] = {}
        self._lock = threading.RLock()

    def look(
        self, run: Run, keys: Iterable[Key], *, is_whole: bool = False
    ) -> tuple[dict[Key, Stretch], str]:
        """Series as they stand now.

        Args:
            run: The run.
            keys: Which series; those it lacks are left out.
            is_whole: Every value, where a first look would do otherwise.

        Returns:
            The series, and the text of a cursor after which nothing has been read.

        Raises:
            EntropyLensError: It took too long, or too many series were asked for.
        """
        wanted = list(dict.fromkeys(keys))
        _check_count(wanted)
        series: dict[Key, Stretch] = {}
        cursors: list[Cursor] = []
        # Pages ask for the same series at once: the second finds what the first has read.
        with self._reader(run):
            for cursor, group in self._by_cursor(run, wanted, is_whole).items():
                read, reached = self._go_on(run, group, cursor, is_whole)
                for key in {*group, *read}:
                    self._keep(run, key, read.get(key), reached)
                series |= {key: read[key] for key in group if key in read}
                cursors.append(reached)
        return series, str(_earliest(cursors)) if cursors else ""

    def within(self, run: Run, keys: Iterable[Key], first: int, last: int) -> dict[Key, Stretch]:
        """Every value of some steps, read from the files unless the series is remembered whole.

        Args:
            run: The run.
            keys: Which series.
            first: First step.
            last: Last step.

        Returns:
            The series; those without a value there are left out.

        Raises:
            EntropyLensError: It took too long, or too many series were asked for.
        """
        wanted = list(dict.fromkeys(keys))
        _check_count(wanted)
        cut: dict[Key, Stretch] = {}
        missing: list[Key] = []
        for key in wanted:
            kept = self._recall(run, key)
            if kept is None or (kept.stretch is not None and not kept.stretch.is_whole):
                missing.append(key)
            elif kept.stretch is not None:
                cut[key] = _cut(kept.stretch, first, last)
        if missing:
            found = _read(run, missing, steps=(first, last))
            cut |= {key: _whole(points) for key, points in found.series.items() if key in missing}
        return {key: stretch for key, stretch in cut.items() if len(stretch.steps)}

    def since(self, run: Run, keys: Iterable[Key], cursor: str) -> Found:
        """What came after a cursor; files that did not change since are not read again."""
        wanted = list(dict.fromkeys(keys))
        _check_count(wanted)
        place, now = (str(run.path), run.run_id), _files(run)
        if self._quiet.get(place) == (cursor, now):
            return Found({}, Cursor.parse(cursor), False, [])
        found = _read(run, wanted, since=cursor)
        if not found.restarted and str(found.cursor) == cursor:
            with self._lock:
                while len(self._quiet) >= _QUIET:
                    self._quiet.pop(next(iter(self._quiet)))
                self._quiet[place] = cursor, now
        return found

    def series(self, run: Run) -> list[SeriesFacts]:
        """All series of a run; looked at again at most every 20 s while it is written."""
        place, rows = (str(run.path), run.run_id), sum(sum(s.rows.values()) for s in run.status())
        before = self._lists.get(place)
        now = time.monotonic()
        if before is not None and (before[0] == rows or now - before[1] < _LIST_SECONDS):
            return before[2]
        found = list_series(run)
        with self._lock:
            while len(self._lists) >= _LISTS:
                self._lists.pop(next(iter(self._lists)))
            self._lists[place] = rows, now, found
        return found

    def names(self, run: Run) -> list[str]:
        """Names of the series of the whole run, those of training and of rollouts."""
        keys = [facts.key for facts in self.series(run)]
        return sorted({key.name for key in keys if not key.module and key.phase in PHASES})

    # -- memory ----------------------------------------------------------------------------------

    def _reader(self, run: Run) -> threading.Lock:
        with self._lock:
            return self._readers.setdefault((str(run.path), run.run_id), threading.Lock())

    def _by_cursor(
        self, run: Run, keys: Sequence[Key], is_whole: bool
    ) -> dict[Cursor | None, list[Key]]:
        groups: dict[Cursor | None, list[Key]] = {}
        for key in keys:
            kept = self._recall(run, key)
            poor = kept is not None and kept.stretch is not None and not kept.stretch.is_whole
            cursor = None if kept is None or (poor and is_whole) else kept.cursor
            groups.setdefault(cursor, []).append(key)
        return groups

    def _go_on(
        self, run: Run, keys: Sequence[Key], cursor: Cursor | None, is_whole: bool
    ) -> tuple[dict[Key, Stretch], Cursor]:
        """Read what is new of series that were all read up to one cursor."""
        if cursor is None and not is_whole:
            looked = _look_first(run, keys)
            if looked is not None:
                return looked
            keys = [*keys, *(key for key in self._common if self._recall(run, key) is None)]
        if cursor is None:
            found = _read(run, list(dict.fromkeys(keys)))
        else:
            found = self.since(run, keys, str(cursor))
        fresh = {key: points for key, points in found.series.items() if key in keys}
        if cursor is None or found.restarted:
            series = {key: _whole(points) for key, points in fresh.items()}
            if not is_whole:
                series = {key: _shortened(stretch) for key, stretch in series.items()}
            return series, found.cursor
        series = {}
        for key in keys:
            kept = self._recall(run, key)
            if kept is None:
                return self._go_on(run, keys, None, is_whole)
            stretch = _followed(run, key, kept.stretch, fresh.get(key))
            if stretch is not None:
                series[key] = stretch if stretch.is_whole else _shortened(stretch)
        return series, found.cursor

    def _recall(self, run: Run, key: Key) -> _Kept | None:
        with self._lock:
            place = _place(run, key)
            if place in self._kept:
                self._kept.move_to_end(place)
            return self._kept.get(place)

    def _keep(self, run: Run, key: Key, stretch: Stretch | None, cursor: Cursor) -> None:
        with self._lock:
            self._forget(_place(run, key))
            self._kept[_place(run, key)] = _Kept(stretch, cursor)
            self._bytes += _size(stretch)
            while self._bytes > self._memory_bytes and len(self._kept) > 1:
                self._forget(next(iter(self._kept)))

    def _forget(self, place: tuple[Any, ...]) -> None:
        gone = self._kept.pop(place, None)
        if gone is not None:
            self._bytes -= _size(gone.stretch)


def _place(run: Run, key: Key) -> tuple[Any, ...]:
    return str(run.path), run.run_id, key


def _size(stretch: Stretch | None) -> int:
    return 512 + (0 if stretch is None else stretch.nbytes)


def _check_count(keys: Sequence[Key]) -> None:
    if len(keys) > MOST_SERIES:
        raise EntropyLensError(
            f"dashboard: expected at most {MOST_SERIES} series at once, got {len(keys)}; pick fewer"
        )


def _read(run: Run, keys: Sequence[Key], **limits: Any) -> Found:
    found = read_points(
        run,
        list(dict.fromkeys(key.name for key in keys)),
        modules=list(dict.fromkeys(key.module for key in keys)),
        phases=list(dict.fromkeys(key.phase for key in keys)),
        deadline=time.monotonic() + QUERY_SECONDS,
        **limits,
    )
    return found


def _look_first(run: Run, keys: Sequence[Key]) -> tuple[dict[Key, Stretch], Cursor] | None:
    names = list(dict.fromkeys(key.name for key in keys))
    modules = list(dict.fromkeys(key.module for key in keys))
    phases = list(dict.fromkeys(key.phase for key in keys))
    look = first_look(run, names, modules=modules, phases=phases)
    if look is None:
        return None
    series = {key: _sketched(sketch) for key, sketch in look.sketches.items()}
    for key, rest in look.rest.items():
        before = series.get(key)
        series[key] = _whole(rest) if before is None else before.followed_by(rest)
    return series, look.cursor


def _sketched(sketch: Sketch) -> Stretch:
    """The extremes of each bucket at their steps, its last value, NaN where one was."""
    finite = sketch.min_steps >= 0
    wild = sketch.nonfinite > 0
    steps = [sketch.min_steps[finite], sketch.max_steps[finite], sketch.last_steps]
    values = [sketch.minima[finite], sketch.maxima[finite], sketch.lasts]
    # Where in its bucket a value was no number is not known; its last step is within the bucket.
    steps.append(sketch.last_steps[wild])
    values.append(np.full(int(wild.sum()), np.nan))
    joined, placed = np.concatenate(steps), np.concatenate(values)
    order = np.argsort(joined, kind="stable")
    joined, placed = joined[order], placed[order]
    last_of_step = np.r_[joined[1:] != joined[:-1], True]
    joined, placed = joined[last_of_step], placed[last_of_step]
    known = np.r_[sketch.first_steps, sketch.last_steps]
    times = np.r_[sketch.first_times, sketch.last_times]
    order = np.argsort(known, kind="stable")
    return Stretch(
        joined,
        np.interp(joined, known[order], times[order]),
        placed,
        int(sketch.counts.sum()),
        is_whole=bool((sketch.counts <= 1).all()),
    )


def _whole(points: Points) -> Stretch:
    return Stretch(points.steps, points.times, points.values, len(points.steps))


def _shortened(stretch: Stretch) -> Stretch:
    """The extremes of stretches of a long series, and a NaN of each that has one."""
    if len(stretch.steps) <= (LONG if stretch.is_whole else 2 * _SKETCH):
        return stretch
    chosen = thinned(stretch.steps, stretch.values, _SKETCH)
    parts = stretch.steps[chosen], stretch.times[chosen], stretch.values[chosen]
    return Stretch(*parts, stretch.total, is_whole=False)


def _cut(stretch: Stretch, first: int, last: int) -> Stretch:
    low = int(np.searchsorted(stretch.steps, first, side="left"))
    high = int(np.searchsorted(stretch.steps, last, side="right"))
    parts = stretch.steps[low:high], stretch.times[low:high], stretch.values[low:high]
    return Stretch(*parts, high - low)


def _followed(run: Run, key: Key, before: Stretch | None, after: Points | None) -> Stretch | None:
    if before is None or after is None or not len(after.steps):
        return before if after is None else _whole(after)
    first = int(after.steps[0])
    if first > before.steps[-1]:
        return before.followed_by(after)
    # Another rank has told of steps that were here already: they are combined anew.
    again = _read(run, [key], steps=(first, None)).series[key]
    earlier = _cut(before, int(before.steps[0]), first - 1)
    new = int((again.steps > before.steps[-1]).sum())
    joined = replace(earlier, is_whole=before.is_whole).followed_by(again)
    return replace(joined, total=before.total + new)


def _files(run: Run) -> str:
    """What changes when rows of the metrics table, or an attempt, are added."""
    facts = []
    for place in ("run.json", "status", "metrics"):
        with suppress(OSError):
            facts.append(os.stat(run.path / place).st_mtime_ns)
    with suppress(OSError):
        for entry in os.scandir(run.path / "metrics"):
            if entry.name.endswith(".arrows"):
                facts.append(entry.stat().st_size)
    return str(facts)


def _earliest(cursors: Sequence[Cursor]) -> Cursor:
    """Of cursors of one run, the one after which least has been read."""
    return min(cursors, key=lambda cursor: cursor.next_rows)
