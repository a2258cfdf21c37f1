"""The tail: rows that no segment holds yet, as an Arrow stream that is only appended to."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pyarrow as pa

from entropylens.store.layout import publish, temporary
from entropylens.store.segments import conform

__all__ = ["Tail", "TailRows", "read_tail"]


_TORN: Final = re.compile(r"only \d+ bytes available|[Ee]xpected .*read")
"""How Arrow names the prefix of a message, which a kill in the middle of a write leaves."""
_MESSAGE: Final = re.compile(rb"\xff{4}..[\x00-\x0f]\x00", re.DOTALL)
"""How an Arrow message may begin: a marker and the length of its metadata."""


class Tail:
    """An Arrow IPC stream without an end: its schema, then batches, each in one write.

    Args:
        path: Replaced by an empty tail.
        schema: With the metadata that readers need: run, rank, attempt, first row.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        header = schema.serialize().to_pybytes()
        temporary(path).write_bytes(header)
        publish(path)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        self._length = len(header)
        self.rows = 0

    @property
    def is_gone(self) -> bool:
        """Whether somebody removed or moved the file: nobody would find what is appended."""
        try:
            return not os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
        except FileNotFoundError:
            return True

    def append(self, batch: pa.RecordBatch) -> None:
        """Append a batch whole, or leave the file as it was.

        Raises:
            OSError: The disk is full.
        """
        message = batch.serialize()
        try:
            written = os.write(self._descriptor, message)
            if written != message.size:
                raise OSError(f"{self.path}: {written} of {message.size} bytes were written")
        except OSError:
            os.ftruncate(self._descriptor, self._length)
            raise
        self._length += message.size
        self.rows += batch.num_rows

    def close(self) -> None:
        """Close the file; what it holds stays."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


@dataclass(frozen=True)
class TailRows:
    """What could be read of a tail."""

    rows: pa.Table
    metadata: dict[str, str]
    damage: str | None
    """Why reading stopped before the end; a batch torn by a kill is not damage."""

    @property
    def first_row(self) -> int:
        """Ordinal of the first row."""
        return int(self.metadata["first_row"])


def read_tail(path: Path, table: str) -> TailRows:
    """Read whole batches up to the first that is torn, with the table's present schema.

    Raises:
        FileNotFoundError: It is gone: sealed, resumed or merged meanwhile.
        ValueError: It is no tail of ours.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} is no tail of a run: {error}") from None
    try:
        source = pa.BufferReader(content)
        stream = pa.ipc.open_stream(source)
        metadata = {k.decode(): v.decode() for k, v in (stream.schema.metadata or {}).items()}
        int(metadata["first_row"])
        batches, damage = _whole_batches(content, source, stream)
        rows = conform(pa.Table.from_batches(batches, schema=stream.schema), table)
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is no tail of a run: {error}") from None
    return TailRows(rows, metadata, damage)


def _whole_batches(
    content: bytes, source: pa.BufferReader, stream: pa.RecordBatchReader
) -> tuple[list[pa.RecordBatch], str | None]:
    batches: list[pa.RecordBatch] = []
    while True:
        start = source.tell()
        try:
            batch = stream.read_next_batch()
            batch.validate(full=True)
        except StopIteration:
            return batches, None
        except (pa.ArrowException, OSError) as error:
            torn = _TORN.search(str(error)) and not _holds_message(content[start + 1 :])
            return batches, None if torn else str(error)
        batches.append(batch)


def _holds_message(rest: bytes) -> bool:
    for found in _MESSAGE.finditer(rest):
        try:
            pa.ipc.read_message(pa.py_buffer(rest)[found.start() :])
            return True
        except (pa.ArrowException, OSError, EOFError):
            continue
    return False
