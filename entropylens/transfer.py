"""The one place that moves numbers to the host."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from entropylens.registry import Block, Lists, Lookup, Scalars

__all__ = ["Stamp", "Transfer", "to_host"]


@dataclass(frozen=True, slots=True)
class Stamp:
    """When and on which pass a block was measured."""

    step: int
    time: float
    phase: str


Deliver = Callable[[str, dict[str, Any]], None]


class Transfer:
    """Collects blocks and brings them to the host in one copy per dtype and flush.

    On an accelerator the copy goes to pinned memory without blocking, and the rows are delivered by
    a later flush that finds it complete; on a CPU they are delivered at once. Blocks of one table
    that have the same columns are delivered as one.

    Args:
        deliver: Called with a table's name and its host columns, on the flushing thread.
    """

    def __init__(self, deliver: Deliver) -> None:
        self._deliver = deliver
        self._pending: list[tuple[Block, Stamp]] = []
        self._in_flight: list[_Flight] = []

    def __len__(self) -> int:
        """Blocks that no flush has taken yet."""
        return len(self._pending)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is queued and nothing under way."""
        return not self._pending and not self._in_flight

    def add(self, block: Block, stamp: Stamp) -> None:
        """Queue a block; its tensors must not be changed in place afterwards.

        Raises:
            TypeError: A sharded tensor, which only all ranks together could read.
        """
        for tensor in _tensors(block):
            if hasattr(tensor, "full_tensor"):
                raise TypeError(
                    f"Transfer: expected plain tensors, got a {type(tensor).__name__} in table "
                    f"{block.table}; reduce it on all ranks first"
                )
        self._pending.append((block, stamp))

    def flush(self, *, wait: bool = False) -> None:
        """Start the copy of what is queued and deliver what has arrived.

        Args:
            wait: Block until everything has arrived: at the end of a run, never during a step.
        """
        if self._pending:
            pending, self._pending = self._pending, []
            self._in_flight.append(_Flight(pending))
        while self._in_flight and (wait or self._in_flight[0].has_arrived()):
            for table, columns in self._in_flight.pop(0).land():
                self._deliver(table, columns)


def to_host(tensor: Tensor) -> tuple[Tensor, torch.Event | None]:
    """Start a copy to the host, without waiting for it.

    Returns:
        The copy, and the event after which it is complete; of a tensor of the host itself that
        tensor, and None.
    """
    if tensor.device.type == "cpu":
        return tensor, None
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    event = torch.Event(tensor.device)
    event.record()
    return host, event


class _Flight:
    """One batched copy: tensors of equal device and dtype travel as one."""

    def __init__(self, blocks: list[tuple[Block, Stamp]]) -> None:
        self._blocks = blocks
        self._host: dict[int, np.ndarray] = {}
        self._events: list[torch.Event] = []
        self._arriving: list[tuple[list[Tensor], Tensor]] = []
        tensors = {id(t): t for block, _ in blocks for t in _tensors(block)}
        kinds = sorted(tensors.values(), key=_kind)
        for _, group in groupby(kinds, key=_kind):
            members = list(group)
            flat = torch.cat([t.detach().reshape(-1) for t in members])
            # numpy has no bfloat16.
            flat = self._copy(flat.float() if flat.dtype == torch.bfloat16 else flat)
            self._arriving.append((members, flat))

    def _copy(self, flat: Tensor) -> Tensor:
        host, event = to_host(flat)
        if event is not None:
            self._events.append(event)
        return host

    def has_arrived(self) -> bool:
        return all(event.query() for event in self._events)

    def land(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for event in self._events:
            event.synchronize()
        for members, flat in self._arriving:
            host, start = flat.numpy(), 0
            for tensor in members:
                end = start + tensor.numel()
                self._host[id(tensor)] = host[start:end]
                start = end
        alike: dict[tuple[str, ...], list[_Rows]] = {}
        for block, stamp in self._blocks:
            rows = self._rows(block, stamp)
            if rows is not None:
                alike.setdefault((block.table, *sorted(rows.columns)), []).append(rows)
        for (table, *names), parts in alike.items():
            yield table, {name: _joined(parts, name) for name in names}

    def _rows(self, block: Block, stamp: Stamp) -> "_Rows | None":
        columns = {name: self._column(value) for name, value in block.columns.items()}
        count = next((len(c) for c in columns.values() if _is_column(c)), 1)
        columns.update(step=stamp.step, time=stamp.time, phase=stamp.phase)
        return _kept(block.table, columns, count)

    def _column(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            host = self._host[id(value)]
            return host if value.ndim else host[0]
        if isinstance(value, Scalars):
            return [self._host[id(v)][0] if isinstance(v, Tensor) else v for v in value.values]
        if isinstance(value, Lookup):
            return [value.values[i] for i in self._host[id(value.index)]]
        if isinstance(value, Lists):
            shape = value.values.shape
            rows, kept = (self._host[id(t)].reshape(shape) for t in (value.values, value.present))
            return [row[keep] for row, keep in zip(rows, kept, strict=True)]
        return value


@dataclass(slots=True)
class _Rows:
    columns: dict[str, Any]
    count: int


def _tensors(block: Block) -> Iterator[Tensor]:
    for value in block.columns.values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Scalars):
            yield from (v for v in value.values if isinstance(v, Tensor))
        elif isinstance(value, Lookup):
            yield value.index
        elif isinstance(value, Lists):
            yield from (value.values, value.present)


def _kind(tensor: Tensor) -> tuple[str, str]:
    return str(tensor.device), str(tensor.dtype)


def _is_column(value: Any) -> bool:
    return isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim > 0)


def _kept(table: str, columns: dict[str, Any], count: int) -> _Rows | None:
    """Leave out what was not measured; None if that is everything."""
    present = columns.pop("present", None)
    weight = columns.get("weight")
    if table == "metrics" and weight is not None:
        present = np.broadcast_to(np.asarray(weight) > 0, count)
    if present is None or present.all():
        return _Rows(columns, count)
    if not present.any():
        return None
    kept = {name: _where(column, present) for name, column in columns.items()}
    return _Rows(kept, int(present.sum()))


def _where(column: Any, present: np.ndarray) -> Any:
    if isinstance(column, np.ndarray) and column.ndim:
        return column[present]
    if isinstance(column, list | tuple):
        return [value for value, keep in zip(column, present, strict=True) if keep]
    return column


def _joined(parts: Iterable[_Rows], name: str) -> Any:
    """One column of several blocks; what is the same for all rows stays one value."""
    pairs = [(part.columns[name], part.count) for part in parts]
    first = pairs[0][0]
    if not _is_column(first) and all(value is first or _same(value, first) for value, _ in pairs):
        return first
    if all(isinstance(value, np.ndarray) and value.ndim for value, _ in pairs):
        return np.concatenate([value for value, _ in pairs])
    return [item for value, count in pairs for item in _repeated(value, count)]


def _same(one: Any, other: Any) -> bool:
    return not _is_column(one) and bool(one == other)


def _repeated(value: Any, count: int) -> Iterable[Any]:
    return value if _is_column(value) else [value] * count
