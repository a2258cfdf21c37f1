"""Clocks and memory of the machine that trains."""

import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

__all__ = ["DeviceClock", "allocated_bytes", "resident_bytes"]

_STATM: Final = Path("/proc/self/statm")
_PAGE: Final = mmap.PAGESIZE


class DeviceClock:
    """Time that an accelerator spends on us, by events that are read when they have passed.

    On a CPU it does nothing: there the host's clock already covers the work.

    Args:
        device: Where the model lives.
        new_event: Makes a timing event; by default the accelerator's own.
    """

    def __init__(self, device: torch.device, new_event: Callable[[], Any] | None = None) -> None:
        self._new_event = new_event
        if new_event is None and device.type == "cuda":
            self._new_event = lambda: torch.cuda.Event(enable_timing=True)
        self._open: Any = None
        self._pairs: list[tuple[Any, Any]] = []

    def start(self) -> None:
        """Mark the beginning of our work on the device's stream."""
        if self._new_event is not None:
            self._open = self._new_event()
            self._open.record()

    def stop(self) -> None:
        """Mark its end."""
        if self._open is not None and self._new_event is not None:
            end = self._new_event()
            end.record()
            self._pairs.append((self._open, end))
            self._open = None

    def collect(self) -> float:
        """Seconds of the intervals that have passed on the device since the last call."""
        seconds = 0.0
        while self._pairs and self._pairs[0][1].query():
            begin, end = self._pairs.pop(0)
            seconds += begin.elapsed_time(end) / 1000.0
        return seconds


def allocated_bytes(device: torch.device) -> int | None:
    """Bytes of tensors on an accelerator; None on a CPU. Reads a host-side counter."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def resident_bytes() -> int | None:
    """Bytes of this process in host memory; None where the system does not say."""
    try:
        return int(_STATM.read_bytes().split()[1]) * _PAGE
    except (OSError, ValueError, IndexError):
        return None
