"""Harm without a process: a writer that stops, a death at the n-th change of a file, damage."""

import atexit
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from entropylens.store import compact
from entropylens.store.sigterm import uninstall
from entropylens.store.writer import RunWriter


class Killed(SystemExit):
    """Stands for ``kill -9``: no `except Exception` stops it, nor the testing framework."""


def kill(writer: RunWriter) -> None:
    """End a writer as ``kill -9`` would: what is queued is gone, what is in files stays."""

    def die() -> bool:
        raise Killed

    writer._drain = die  # type: ignore[method-assign]
    with _silent_threads():
        writer._ask("flush", 0.0)
        writer._thread.join()
    bury(writer)


@contextmanager
def _silent_threads() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading, "excepthook", lambda arguments: None)
        yield patch


def flush_or_die(writer: RunWriter) -> None:
    """Flush, in which the writer may be killed."""
    done: Future[bool] = Future()
    writer._commands.put(("flush", done))
    while writer._thread.is_alive() and not done.done():
        time.sleep(0.001)


def bury(writer: RunWriter) -> None:
    """Give back what the system takes from a process that is gone."""
    assert not writer._thread.is_alive()
    for tail in writer._tails.values():
        tail.close()
    writer._claim.release()
    atexit.unregister(writer._at_exit)
    uninstall(writer._on_sigterm, writer._old_handler)


@contextmanager
def killed_at(nth: int) -> Iterator[list[str]]:
    """Die before the ``nth`` change of a file name, or halfway through writing a Parquet file.

    Yields:
        The changes so far; as many as ``nth``, and one more, if the death came.
    """
    changes: list[str] = []

    def dying(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def change(*arguments: Any, **options: Any) -> Any:
            if len(changes) > nth:
                raise Killed  # the dead change nothing more
            changes.append(name)
            if len(changes) <= nth:
                return real(*arguments, **options)
            if name == "write_table":
                real(*arguments, **options)
                path = Path(arguments[1])
                os.truncate(path, path.stat().st_size // 2)
            raise Killed

        return change

    with _silent_threads() as patch:
        for module, name in (
            (os, "replace"),
            (os, "unlink"),
            (os, "mkdir"),
            (shutil, "rmtree"),
            (pq, "write_table"),
            (compact, "_exchange"),
        ):
            patch.setattr(module, name, dying(name, getattr(module, name)))
        yield changes


def flip_in_page(segment: Path) -> None:
    """Change a byte of the values of a segment of metrics."""
    column = pq.read_metadata(segment).row_group(0).column(7)
    assert column.path_in_schema == "value"
    content = bytearray(segment.read_bytes())
    content[column.data_page_offset + column.total_compressed_size - 2] ^= 0xFF
    segment.write_bytes(content)
