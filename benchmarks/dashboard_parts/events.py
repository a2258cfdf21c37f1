"""The same values as TensorBoard's event files, and how long TensorBoard takes to show them.

The records are byte for byte those of TensorBoard's own writer, one event a value as PyTorch's
``SummaryWriter`` makes them, but whole columns at a time: its writer takes hours.
"""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Final
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import numpy as np
from numpy.typing import NDArray
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from benchmarks.dashboard_parts.logs import Size, times, values

_CHUNK: Final = 50_000
_POLYNOMIAL: Final = 0x82F63B78
Bytes = NDArray[np.uint8]


def write_events(place: Path, number: int, size: Size) -> None:
    """An event file of one run."""
    if place.exists():
        return
    beside = place.with_name(f".{place.name}.unfinished")
    beside.mkdir(parents=True, exist_ok=True)
    with open(beside / "events.out.tfevents.1790000000.host.1.0", "wb") as file:
        begin = event_pb2.Event(wall_time=1.79e9, file_version="brain.Event:2")
        RecordWriter(file).write(begin.SerializeToString())
        for chunk in records(number, size):
            file.write(chunk.tobytes())
    beside.rename(place)


def records(number: int, size: Size) -> Iterator[Bytes]:
    """Records of all values, step by step, as ``[steps, bytes of a step]``."""
    everything = [values(number, at, size.steps).astype("<f4") for at in range(size.metrics)]
    walls = (times(size.steps) / 1e6).astype("<f8")
    # Step 0 is left out of its message; then records are of one length as long as its varint is.
    edges = [0, 1, 1 << 7, 1 << 14, 1 << 21, *range(0, size.steps, _CHUNK), size.steps]
    edges = sorted({edge for edge in edges if edge <= size.steps})
    for first, end in pairwise(edges):
        steps = np.arange(first, end)
        parts = [
            _records(name, steps, walls[first:end], column[first:end])
            for name, column in zip(size.names, everything, strict=True)
        ]
        yield np.concatenate(parts, axis=1)


def _records(tag: str, steps: Any, walls: Any, column: Any) -> Bytes:
    """An event of the first step as protobuf writes it, with the numbers of the others put in."""
    value = summary_pb2.Summary.Value(tag=tag, simple_value=1.5)
    summary = summary_pb2.Summary(value=[value])
    event = event_pb2.Event(wall_time=1.5, step=int(steps[0]), summary=summary)
    model = np.frombuffer(event.SerializeToString(), np.uint8)
    message: Bytes = np.tile(model, (len(steps), 1))
    message[:, 1:9] = walls.view(np.uint8).reshape(-1, 8)
    message[:, -4:] = np.ascontiguousarray(column).view(np.uint8).reshape(-1, 4)
    if steps[0]:
        left, at = steps.copy(), 10
        while left.any():
            message[:, at] = (left & 127) | np.where(left > 127, 128, 0)
            left, at = left >> 7, at + 1
    length = np.frombuffer(np.uint64(len(model)).tobytes(), np.uint8)[None]
    head = np.tile(np.concatenate([length, _checksum(length)], axis=1), (len(steps), 1))
    return np.concatenate([head, message, _checksum(message)], axis=1)


def _table() -> NDArray[np.uint32]:
    found = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        found = np.where(found & 1, (found >> 1) ^ np.uint32(_POLYNOMIAL), found >> 1)
    return found.astype(np.uint32)


_OF_BYTE: Final = _table()


def _checksum(rows: Bytes) -> Bytes:
    """The masked CRC-32C of each row."""
    found = np.full(len(rows), 0xFFFFFFFF, np.uint32)
    for column in np.ascontiguousarray(rows.T):
        found = _OF_BYTE[(found ^ column) & 255] ^ (found >> np.uint32(8))
    found = ~found
    masked = ((found >> np.uint32(15)) | (found << np.uint32(17))) + np.uint32(0xA282EAD8)
    return masked.astype("<u4").view(np.uint8).reshape(-1, 4)


def seconds_to_show(folder: Path, size: Size, *, tag: str, longest: float = 900.0) -> float:
    """From the start of TensorBoard until its HTTP API has the whole series of every run."""
    port = _free_port()
    arguments = ["--logdir", str(folder), "--port", str(port), "--host", "127.0.0.1"]
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            waiting = sorted(path.name for path in folder.iterdir())
            while waiting and time.perf_counter() - began < longest:
                if process.poll() is not None:
                    raise RuntimeError(f"tensorboard ended with {process.returncode}")
                if _last_step(port, waiting[0], tag) == size.steps - 1:
                    waiting.pop(0)
                else:
                    time.sleep(0.02)
            return time.perf_counter() - began if not waiting else float("nan")
        finally:
            process.terminate()


def _last_step(port: int, run: str, tag: str) -> int | None:
    base = f"http://127.0.0.1:{port}/data/plugin/scalars"
    try:
        with urlopen(f"{base}/tags", timeout=60) as answer:
            if tag not in json.load(answer).get(run, {}):
                return None
        with urlopen(f"{base}/scalars?{urlencode({'tag': tag, 'run': run})}", timeout=60) as answer:
            return int(json.load(answer)[-1][1])
    except (URLError, OSError, ValueError, IndexError):
        return None


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
