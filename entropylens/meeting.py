"""How ranks find the run directory that rank 0 writes to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import torch

from entropylens.errors import EntropyLensError

__all__ = ["Meeting", "rank_and_world", "run_dir_of_rank_zero"]

WAIT_SECONDS: Final = 60.0
_FAILED: Final = "!"
_held: dict[str, int] = {}


@dataclass
class Meeting:
    """Where to write: on rank 0 as asked for until it is set to what was taken."""

    run_dir: Path


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes, by torch.distributed."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


@contextmanager
def run_dir_of_rank_zero(run_dir: str | Path, *, rank: int, world_size: int) -> Iterator[Meeting]:
    """Rank 0 opens the run in this block and sets ``run_dir``; the others are told it.

    The word is passed through the store by which the processes found each other, not by a
    collective: a script that opens a Lens on rank 0 alone goes on, and one that opens it on others
    alone fails in the end instead of hanging.

    Args:
        run_dir: As the user asked.
        rank: Of this process.
        world_size: Number of processes.

    Raises:
        EntropyLensError: Rank 0 does not open the run, or could not.
    """
    if world_size == 1:
        yield Meeting(Path(run_dir))
        return
    asked = str(run_dir)
    _held[asked] = number = _held.get(asked, 0) + 1
    store, key = _store(), f"entropylens/{asked}/{number}"
    if rank > 0:
        yield Meeting(_told(store, key, asked))
        return
    meeting = Meeting(Path(run_dir))
    try:
        yield meeting
    except BaseException as error:
        store.set(key, f"{_FAILED}{type(error).__name__}: {error}")
        raise
    store.set(key, str(meeting.run_dir))


def _store() -> Any:
    return torch.distributed.distributed_c10d._get_default_store()


def _told(store: Any, key: str, asked: str) -> Path:
    try:
        store.wait([key], timedelta(seconds=WAIT_SECONDS))
        word = store.get(key).decode()
    except (RuntimeError, torch.distributed.DistError) as error:
        raise EntropyLensError(
            f"Lens: expected rank 0 to open {asked} within {WAIT_SECONDS:.0f} s, but it did not "
            f"({type(error).__name__}); open a Lens on every rank, or pass rank=0 and world_size=1 "
            f"to one that stands alone"
        ) from None
    if word.startswith(_FAILED):
        raise EntropyLensError(f"Lens: expected rank 0 to open {asked}, but there: {word[1:]}")
    return Path(word)
