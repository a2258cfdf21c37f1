"""The one place that moves numbers to the host."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from entropylens.registry import Block, Lookup

__all__ = ["Stamp", "Transfer"]


@dataclass(frozen=True)
class Stamp:
    """When and on which pass a block was measured."""

    step: int
    time: float
    phase: str


Deliver = Callable[[str, dict[str, Any]], None]


class Transfer:
    """Collects blocks and brings them to the host in one copy per dtype and flush.

    On an accelerator the copy goes to pinned memory without blocking, and the rows are delivered by
    a later flush that finds it complete; on a CPU they are delivered at once.

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


class _Flight:
    """One batched copy: tensors of equal device and dtype travel as one."""

    def __init__(self, blocks: list[tuple[Block, Stamp]]) -> None:
        self._blocks = blocks
        self._host: dict[int, Tensor] = {}
        self._events: list[torch.Event] = []
        tensors = {id(t): t for block, _ in blocks for t in _tensors(block)}
        kinds = sorted(tensors.values(), key=_kind)
        for _, group in groupby(kinds, key=_kind):
            members = list(group)
            flat = torch.cat([t.detach().reshape(-1) for t in members])
            # numpy has no bfloat16.
            flat = self._copy(flat.float() if flat.dtype == torch.bfloat16 else flat)
            parts = flat.split([t.numel() for t in members])
            self._host.update(zip(map(id, members), parts, strict=True))

    def _copy(self, flat: Tensor) -> Tensor:
        if flat.device.type == "cpu":
            return flat
        host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
        host.copy_(flat, non_blocking=True)
        event = torch.Event(flat.device)
        event.record()
        self._events.append(event)
        return host

    def has_arrived(self) -> bool:
        return all(event.query() for event in self._events)

    def land(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for event in self._events:
            event.synchronize()
        for block, stamp in self._blocks:
            host = {name: self._column(value) for name, value in block.columns.items()}
            columns = _kept(block.table, host)
            if columns is not None:
                stamped = {"step": stamp.step, "time": stamp.time, "phase": stamp.phase}
                yield block.table, {**stamped, **columns}

    def _column(self, value: Any) -> Any:
        if isinstance(value, Lookup):
            index = self._column(value.index)
            return [value.values[i] for i in index]
        if isinstance(value, Tensor):
            host = self._host[id(value)].numpy()
            return host if value.ndim else host[0]
        return value


def _tensors(block: Block) -> Iterator[Tensor]:
    for value in block.columns.values():
        if isinstance(value, Lookup):
            yield value.index
        elif isinstance(value, Tensor):
            yield value


def _kind(tensor: Tensor) -> tuple[str, str]:
    return str(tensor.device), str(tensor.dtype)


def _kept(table: str, columns: dict[str, Any]) -> dict[str, Any] | None:
    """Leave out what was not measured; None if that is everything."""
    present = columns.pop("present", None)
    if table == "metrics" and columns.get("weight") is not None:
        present = np.broadcast_to(np.asarray(columns["weight"]) > 0, len(columns["name"]))
    if present is None or present.all():
        return columns
    if not present.any():
        return None
    return {name: _where(column, present) for name, column in columns.items()}


def _where(column: Any, present: np.ndarray) -> Any:
    if isinstance(column, np.ndarray) and column.ndim:
        return column[present]
    if isinstance(column, list | tuple):
        return [value for value, keep in zip(column, present, strict=True) if keep]
    return column
