"""Names and places of the files of a run directory."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from entropylens.records import SCHEMAS

__all__ = ["Layout", "publish", "read_json", "sync_directory", "temporary", "write_atomically"]

_SEGMENT: Final = re.compile(r"(\d{3,})-(\d{6,})\.parquet")
_STATUS: Final = re.compile(r"rank-(\d{3,})\.json")
_TAIL: Final = re.compile(r"(\d{3,})\.tail\.arrows")


@dataclass(frozen=True)
class Layout:
    """Where each file of the run in ``root`` lies."""

    root: Path

    @property
    def manifest(self) -> Path:
        """``run.json``."""
        return self.root / "run.json"

    def status(self, rank: int) -> Path:
        """Heartbeat and counters of one process."""
        return self.root / "status" / f"rank-{rank:03d}.json"

    def statuses(self) -> list[Path]:
        """Status files of all ranks."""
        return [path for path, _ in _matching(self.root / "status", _STATUS)]

    def ranks(self) -> list[int]:
        """Ranks that have left a status, a tail or a segment."""
        found = [int(match[1]) for _, match in _matching(self.root / "status", _STATUS)]
        for table in SCHEMAS:
            for pattern in (_TAIL, _SEGMENT):
                found += [int(match[1]) for _, match in _matching(self.root / table, pattern)]
        return sorted(set(found))

    def lock(self, rank: int) -> Path:
        """Held by the process that writes as ``rank``."""
        return self.root / "status" / f".rank-{rank:03d}.lock"

    def tail(self, table: str, rank: int) -> Path:
        """Append-only stream of the rows that no segment holds yet."""
        return self.root / table / f"{rank:03d}.tail.arrows"

    def segment(self, table: str, rank: int, sequence: int) -> Path:
        """An immutable segment."""
        return self.root / table / f"{rank:03d}-{sequence:06d}.parquet"

    def superseded(self, table: str) -> Path:
        """What a resume has replaced."""
        return self.root / "superseded" / table

    @property
    def pyramid(self) -> Path:
        """A first look at all metrics, written by merging."""
        return self.root / "pyramid" / "metrics.parquet"

    def tails(self, table: str) -> dict[int, Path]:
        """Tails of a table by rank."""
        return {int(match[1]): path for path, match in _matching(self.root / table, _TAIL)}

    def segments(self, table: str, rank: int | None = None) -> list[Path]:
        """Segments of a table, of one rank or of all, in order of rank and sequence."""
        found = [
            (int(match[1]), int(match[2]), path)
            for path, match in _matching(self.root / table, _SEGMENT)
        ]
        return [path for owner, _, path in sorted(found) if rank is None or owner == rank]

    def next_sequence(self, table: str, rank: int) -> int:
        """A sequence number that no segment of the rank ever had: resumes leave empty ones."""
        matches = [match for _, match in _matching(self.root / table, _SEGMENT)]
        return max((int(match[2]) for match in matches if int(match[1]) == rank), default=-1) + 1


def _matching(folder: Path, pattern: re.Pattern[str]) -> list[tuple[Path, re.Match[str]]]:
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    matches = ((folder / name, pattern.fullmatch(name)) for name in names)
    return [(path, match) for path, match in matches if match is not None]


def temporary(path: Path) -> Path:
    """A name beside ``path`` that pyarrow, pandas and DuckDB all ignore."""
    return path.with_name(f".{path.name}.tmp")


def publish(path: Path, *, sync: bool = False) -> None:
    """Move the finished temporary file of ``path`` into place."""
    if sync:
        with open(temporary(path), "rb+") as file:
            os.fsync(file.fileno())
    os.replace(temporary(path), path)
    if sync:
        sync_directory(path.parent)


def write_atomically(path: Path, content: bytes, *, sync: bool = False) -> None:
    """Replace ``path`` so that a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary(path).write_bytes(content)
    publish(path, sync=sync)


def read_json(path: Path) -> Any:
    """The document in a JSON file; half characters, which no file could take, become "?".

    Raises:
        OSError: It cannot be read.
        ValueError: It is no JSON.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        text = json.dumps(found, ensure_ascii=False)
        whole = text.encode("utf-8", "replace").decode("utf-8")
        return found if whole == text else json.loads(whole)
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None


def sync_directory(folder: Path) -> None:
    """Make renames in ``folder`` survive power loss, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
