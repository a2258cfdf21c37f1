"""Chosen series out of Parquet files, row group by row group, in several threads.

Texts stay dictionary codes; statistics say which row groups and which text columns need no reading.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from entropylens.store.selection import TEXTS, Part, Selection, Span, part_of

__all__ = ["Groups", "Late", "Source", "parts_of", "whole"]

_THREADS: Final = min(4, os.cpu_count() or 1)


class Late(Exception):
    """The time allowed is over."""


@dataclass(frozen=True)
class Groups:
    """The row groups of a Parquet file: where they lie and what they range over."""

    metadata: pq.FileMetaData | None
    """None of a file of one group: of ten thousand segments it would fill memory."""
    facts: dict[bytes, bytes]
    """The file's key-value metadata."""
    columns: frozenset[str]
    starts: list[int]
    """First row of each group, and the end."""
    spans: list[dict[str, Span]]
    identity: tuple[int, int]

    @classmethod
    def of(cls, path: Path) -> "Groups":
        """Read them.

        Raises:
            FileNotFoundError: The file is gone.
            OSError, pyarrow.ArrowException: It is damaged.
        """
        identity = _identity(path)
        metadata = pq.read_metadata(path)
        places = {metadata.schema.column(i).path: i for i in range(metadata.num_columns)}
        starts, spans = [0], []
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            starts.append(starts[-1] + group.num_rows)
            chosen = {name: places[name] for name in (*TEXTS, "step") if name in places}
            found = {name: _span(group, place) for name, place in chosen.items()}
            spans.append({name: span for name, span in found.items() if span is not None})
        columns = frozenset(place.partition(".")[0] for place in places)
        facts = dict(metadata.metadata or {})
        kept = metadata if metadata.num_row_groups > 1 else None
        return cls(kept, facts, columns, starts, spans, identity)


def _identity(path: Path) -> tuple[int, int]:
    facts = os.stat(path)
    return facts.st_mtime_ns, facts.st_ino


def _span(group: Any, place: int) -> Span | None:
    facts = group.column(place).statistics
    if facts is None or not facts.has_null_count:
        return None
    if facts.has_min_max:
        return Span(facts.min, facts.max, facts.null_count > 0)
    return Span(None, None, True) if facts.null_count == group.num_rows else None


@dataclass(frozen=True)
class Source:
    """A file to read, from one of its rows on or up to one."""

    path: Path
    groups: Groups
    first: int = 0
    end: int | None = None

    def jobs(self, selection: Selection) -> list[int]:
        """Row groups that may hold what is wanted."""
        starts, end = self.groups.starts, self.groups.starts[-1] if self.end is None else self.end
        return [
            number
            for number, spans in enumerate(self.groups.spans)
            if starts[number] < end
            and starts[number + 1] > self.first
            and selection.may_hold(spans)
        ]


@dataclass
class _Reading:
    selection: Selection
    kinds: dict[str, pa.DataType]
    needed: Sequence[str]
    deadline: float | None
    made: Callable[[Part], Any]
    done: int = 0
    damaged: dict[Path, str] = field(default_factory=dict)

    def one(self, job: tuple[Source, int]) -> Any:
        source, number = job
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise Late
        if source.path in self.damaged:
            return None
        try:
            part = self._part(source, number)
        except FileNotFoundError:
            raise
        except (pa.ArrowException, OSError, ValueError) as error:
            self.damaged[source.path] = f"skipped: {source.path} cannot be read: {error}"
            return None
        self.done += 1
        return None if part is None else self.made(part)

    def _part(self, source: Source, number: int) -> Part | None:
        groups = source.groups
        spans = groups.spans[number]
        columns: dict[str, Any] = {n: spans[n].low for n in TEXTS if n in spans and spans[n].is_one}
        wanted = [n for n in (*TEXTS, *self.kinds) if n in groups.columns and n not in columns]
        with pq.ParquetFile(
            source.path,
            metadata=groups.metadata,
            read_dictionary=[n for n in TEXTS if n in wanted],
            page_checksum_verification=True,
        ) as file:
            if _identity(source.path) != groups.identity:
                raise FileNotFoundError(f"{source.path} was replaced")
            table = file.read_row_group(number, columns=wanted, use_threads=False)
        start, end = groups.starts[number], groups.starts[number + 1]
        first = max(source.first - start, 0)
        rows = (end if source.end is None else min(end, source.end)) - start - first
        if rows < end - start:
            table = table.slice(first, rows)
        columns |= {name: _only(table, name) for name in wanted}
        return part_of(columns, rows, self.selection, self.kinds, self.needed)


def _only(table: pa.Table, name: str) -> pa.ChunkedArray:
    if table.column_names.count(name) != 1:
        raise ValueError(f"column {name} is there {table.column_names.count(name)} times")
    return table[name]


def whole(part: Part) -> Part:
    """The part itself."""
    return part


def parts_of(
    sources: Sequence[Source],
    selection: Selection,
    kinds: dict[str, pa.DataType],
    needed: Sequence[str] = (),
    deadline: float | None = None,
    *,
    made: Callable[[Part], Any] = whole,
) -> tuple[list[Any], list[str]]:
    """Read what is wanted of several files, in their order, two row groups at a time or more.

    Args:
        sources: The files.
        selection: What is wanted.
        kinds: The numeric columns to take, and their types.
        needed: Columns without whose value a row says nothing.
        deadline: Of `time.monotonic`.
        made: What is returned of each part; of what it leaves out the memory is freed.

    Returns:
        What was made of the parts, and a note on each file that is damaged, of which nothing is
        taken.

    Raises:
        FileNotFoundError: A file is gone or was replaced.
        Late: The deadline has passed; it carries how many row groups were read, and of how many.
    """
    jobs = [(source, number) for source in sources for number in source.jobs(selection)]
    reading = _Reading(selection, kinds, needed, deadline, made)
    if len(jobs) < 2:
        found = [_timely(reading, jobs, map(reading.one, jobs))]
    else:
        with ThreadPoolExecutor(min(_THREADS, len(jobs))) as pool:
            try:
                found = [_timely(reading, jobs, pool.map(reading.one, jobs))]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    parts = [
        part
        for (source, _), part in zip(jobs, found[0], strict=True)
        if part is not None and source.path not in reading.damaged
    ]
    return parts, list(reading.damaged.values())


def _timely(
    reading: _Reading, jobs: Sequence[tuple[Source, int]], parts: Iterator[Any]
) -> list[Any]:
    try:
        return list(parts)
    except Late:
        raise Late(reading.done, len(jobs)) from None
