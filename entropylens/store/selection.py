"""Rows of chosen series out of Arrow columns, as numpy columns sorted by series."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from entropylens.store.ranks import Integers, Key

__all__ = ["TEXTS", "Part", "Selection", "Span", "part_of"]

TEXTS: Final = ("name", "module", "phase")
"""The columns that name a series."""
_BITS: Final = 21
"""Of a key, for each of the three texts."""
_MISSING: Final = np.iinfo(np.int64).min


@dataclass(frozen=True)
class Span:
    """What a column ranges over in a row group."""

    low: Any
    """None where every value is null."""
    high: Any
    nulls: bool

    @property
    def is_one(self) -> bool:
        """Whether all its values are the same."""
        return self.low == self.high and (self.low is None or not self.nulls)


class _Texts:
    """The texts of one column as small integers; -1 is not wanted, null is the empty text."""

    def __init__(self, wanted: Sequence[str] | None) -> None:
        self.known: list[str] = list(dict.fromkeys(wanted or ()))
        self._codes = {text: code for code, text in enumerate(self.known)}
        self._open = wanted is None
        self._lock = threading.Lock()

    def code(self, text: str | None) -> int:
        text = text or ""
        found = self._codes.get(text, -1)
        if found >= 0 or not self._open:
            return found
        with self._lock:
            if text not in self._codes:
                self.known.append(text)
                self._codes[text] = len(self.known) - 1
            return self._codes[text]

    def may_lie_in(self, span: Span | None) -> bool:
        if self._open or span is None:
            return True
        if span.nulls and "" in self._codes:
            return True
        return span.low is not None and any(span.low <= t <= span.high for t in self._codes)

    def codes(self, column: pa.ChunkedArray) -> NDArray[np.int32]:
        if not pa.types.is_dictionary(column.type):
            column = column.cast(pa.string()).dictionary_encode()
        found = [np.empty(0, np.int32)]
        for chunk in column.chunks:
            texts = [*chunk.dictionary.cast(pa.string()).to_pylist(), None]
            codes = np.array([self.code(text) for text in texts], np.int32)
            places = chunk.indices
            if places.null_count:
                places = pc.fill_null(places, pa.scalar(len(texts) - 1, places.type))
            found.append(codes[places.to_numpy()])
        return np.concatenate(found)


class Selection:
    """Which series and steps are wanted.

    Args:
        names: Exact names; None is all, as for the others.
        modules: Exact names; "" is the whole run.
        phases: Exact names.
        steps: First and last, both included; None on either side is open.
    """

    def __init__(
        self,
        names: Sequence[str] | None,
        modules: Sequence[str] | None,
        phases: Sequence[str] | None,
        steps: tuple[int | None, int | None] | None = None,
    ) -> None:
        self.texts = {
            "name": _Texts(names),
            "module": _Texts(modules),
            "phase": _Texts(phases),
        }
        self.steps = steps or (None, None)
        self._only: Integers | None = None

    def key(self, number: int) -> Key:
        """The series that a number in `Part.keys` stands for."""
        low = (1 << _BITS) - 1
        codes = number >> 2 * _BITS, number >> _BITS & low, number & low
        known = zip(TEXTS, codes, strict=True)
        return Key(*(self.texts[column].known[code] for column, code in known))

    def from_step(self, step: int) -> "Selection":
        """The same series, from a step on at least."""
        first, last = self.steps
        later = Selection([], [], [], (step if first is None else max(first, step), last))
        later.texts, later._only = self.texts, self._only
        return later

    def at_steps(self, steps: Integers) -> "Selection":
        """The same series, at single steps only, given in order."""
        single = Selection([], [], [], (int(steps[0]), int(steps[-1])))
        single.texts, single._only = self.texts, steps
        return single

    def may_hold(self, spans: Mapping[str, Span]) -> bool:
        """Whether a row group may hold rows that are wanted."""
        if not all(self.texts[column].may_lie_in(spans.get(column)) for column in TEXTS):
            return False
        span, (first, last) = spans.get("step"), self.steps
        if span is None or span.low is None:
            return True
        if self._only is not None:
            place = int(np.searchsorted(self._only, span.low))
            return place < len(self._only) and bool(self._only[place] <= span.high)
        return (first is None or span.high >= first) and (last is None or span.low <= last)

    def limits(self, steps: Integers) -> NDArray[np.bool_] | None:
        """Which of the steps are wanted; None is all."""
        first, last = self.steps
        inside = np.ones(len(steps), np.bool_)
        if first is not None:
            inside &= steps >= first
        if last is not None:
            inside &= steps <= last
        if self._only is not None:
            inside &= np.isin(steps, self._only)
        return None if inside.all() else inside


@dataclass(frozen=True)
class Part:
    """Rows that are wanted of one row group or tail, series by series."""

    keys: Integers
    """One a series; see `Selection.key`."""
    starts: Integers
    """The first row of each series, and the end."""
    columns: dict[str, NDArray[Any]]

    def series(self) -> Iterator[tuple[int, dict[str, NDArray[Any]]]]:
        """The rows of each series."""
        for number, key in enumerate(self.keys.tolist()):
            rows = slice(self.starts[number], self.starts[number + 1])
            yield key, {name: column[rows] for name, column in self.columns.items()}


def part_of(
    columns: dict[str, Any],
    rows: int,
    selection: Selection,
    kinds: dict[str, pa.DataType],
    needed: Sequence[str] = (),
) -> Part | None:
    """Choose rows and sort them by series, each series in the order the rows came in.

    Args:
        columns: Arrow columns by name; a text column may be one text for all rows.
        rows: How many there are.
        selection: What is wanted.
        kinds: The numeric columns to take, and their types; one that is missing is null.
        needed: Columns without whose value a row says nothing.

    Returns:
        The rows; None where there is none.

    Raises:
        pyarrow.ArrowException: A column is of a type that does not become ours.
    """
    keep, codes = np.ones(rows, np.bool_), []
    for name, texts in selection.texts.items():
        column = columns.get(name)
        if isinstance(column, pa.ChunkedArray):
            codes.append(texts.codes(column))
            keep &= codes[-1] >= 0
            continue
        codes.append(np.full(1, texts.code(column), np.int32))
        if codes[-1][0] < 0:
            return None
    numbers = {}
    for name, kind in kinds.items():
        numbers[name], valid = _numbers(columns.get(name), kind, rows)
        if name in needed and valid is not None:
            keep &= valid
        if name == "step" and (inside := selection.limits(numbers[name])) is not None:
            keep &= inside
    if not keep.all():
        where = np.flatnonzero(keep)
        rows = len(where)
        codes = [code if len(code) == 1 else code[where] for code in codes]
        numbers = {name: column[where] for name, column in numbers.items()}
    return _by_series(codes, rows, selection, numbers) if rows else None


def _numbers(
    column: pa.ChunkedArray | None, kind: pa.DataType, rows: int
) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
    """Values, and which are there; None is all. What is not there is NaN, or the least integer."""
    array = pa.nulls(rows, kind) if column is None else column.cast(kind).combine_chunks()
    if pa.types.is_timestamp(kind):
        array = array.cast(pa.int64())
    valid = None
    if array.null_count:
        valid = array.is_valid().to_numpy(zero_copy_only=False)
        missing = _MISSING if pa.types.is_integer(array.type) else float("nan")
        array = pc.fill_null(array, pa.scalar(missing, array.type))
    values = array.to_numpy(zero_copy_only=False)
    if pa.types.is_timestamp(kind):
        seconds = values / 1e6
        values = seconds if valid is None else np.where(valid, seconds, np.nan)
    return values, valid


def _by_series(
    codes: list[NDArray[np.int32]], rows: int, selection: Selection, columns: dict[str, Any]
) -> Part:
    sizes = [len(texts.known) for texts in selection.texts.values()]
    flat: Integers = codes[0].astype(np.int64)
    for code, size in zip(codes[1:], sizes[1:], strict=True):
        flat = flat * size + code
    used, counts, local = _compacted(np.broadcast_to(flat, rows), sizes)
    if local is not None:
        order = np.argsort(local, kind="stable")
        columns = {name: column[order] for name, column in columns.items()}
    name, rest = np.divmod(used, sizes[1] * sizes[2])
    module, phase = np.divmod(rest, sizes[2])
    keys = name << 2 * _BITS | module << _BITS | phase
    return Part(keys, np.concatenate([[0], np.cumsum(counts)]), columns)


def _compacted(
    flat: Integers, sizes: Sequence[int]
) -> tuple[Integers, Integers, NDArray[Any] | None]:
    """Which codes there are, how often, and each row's as a small integer; None if in order."""
    if flat.strides == (0,) or (flat[0] == flat[-1] and not (flat != flat[0]).any()):
        return flat[:1].astype(np.int64), np.array([len(flat)]), None
    if (flat[1:] >= flat[:-1]).all():
        starts = np.flatnonzero(np.concatenate([[True], flat[1:] > flat[:-1]]))
        return flat[starts], np.diff(starts, append=len(flat)), None
    span = sizes[0] * sizes[1] * sizes[2]
    if span > 8 * len(flat) + 4096:
        used, local, counts = np.unique(flat, return_inverse=True, return_counts=True)
    else:
        all_counts = np.bincount(flat, minlength=span)
        used = np.flatnonzero(all_counts)
        counts, places = all_counts[used], np.empty(span, np.int64)
        places[used] = np.arange(len(used))
        local = places[flat]
    # numpy sorts integers of 16 bits by counting them.
    return used, counts, local.astype(np.uint16) if len(used) <= 1 << 16 else local
