"""The tail: rows that no segment holds yet, as an Arrow stream that is only appended to."""

import os
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from entropylens.store.layout import publish, temporary

__all__ = ["Tail", "TailRows", "read_tail"]


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

    def append(self, batch: pa.RecordBatch) -> None:
        """Append a batch whole, or leave the file as it was.

        Raises:
            OSError: The disk is full, or the file was removed.
        """
        if os.fstat(self._descriptor).st_nlink == 0:
            raise FileNotFoundError(f"{self.path} was removed while it was written")
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


def read_tail(path: Path) -> TailRows:
    """Read whole batches up to the first that is torn.

    Raises:
        FileNotFoundError: It is gone: sealed, resumed or merged meanwhile.
        ValueError: It is no tail of ours.
    """
    content = path.read_bytes()
    try:
        stream = pa.ipc.open_stream(content)
        metadata = {k.decode(): v.decode() for k, v in (stream.schema.metadata or {}).items()}
        int(metadata["first_row"])
    except (pa.ArrowInvalid, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is no tail of a run: {error}") from None
    batches, damage = [], None
    while True:
        try:
            batch = stream.read_next_batch()
            batch.validate(full=True)
        except StopIteration:
            break
        except (pa.ArrowInvalid, OSError) as error:
            # A kill in the middle of a write leaves a prefix of a message: an unexpected end.
            text = str(error)
            damage = None if "xpected" in text and "read" in text else text
            break
        batches.append(batch)
    schema = stream.schema.remove_metadata()
    table = pa.Table.from_batches(batches, schema=stream.schema).cast(schema)
    return TailRows(table, metadata, damage)
