"""``status/rank-NNN.json``: is the process alive, what has it written, what went wrong."""

import fcntl
import json
import os
import socket
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from entropylens.errors import EntropyLensError
from entropylens.store.layout import Layout, read_json, write_atomically

__all__ = ["ALIVE_SECONDS", "Claim", "RankStatus", "load_status"]

ALIVE_SECONDS: Final = 60.0
"""A heartbeat older than this is a dead process's."""
STALLED_SECONDS: Final = 600.0
"""A live process whose step has not moved for so long is stalled."""

_claimed: set[Path] = set()


@dataclass
class RankStatus:
    """What one process says of itself."""

    run_id: str
    rank: int
    attempt: int
    state: str = "running"
    reason: str = ""
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    started: float = field(default_factory=time.time)
    heartbeat: float = field(default_factory=time.time)
    step: int = 0
    step_time: float = field(default_factory=time.time)
    rows: dict[str, int] = field(default_factory=dict)
    lost_rows: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    writer_cpu_seconds: float = 0.0

    def save(self, layout: Layout, *, sync: bool = False) -> None:
        """Write the status file."""
        self.heartbeat = time.time()
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False)
        write_atomically(layout.status(self.rank), text.encode("utf-8", "replace"), sync=sync)

    def seen_state(self) -> str:
        """The state, judged from outside: a silent process has crashed."""
        if self.state != "running":
            return self.state
        if abs(time.time() - self.heartbeat) > ALIVE_SECONDS or not self._process_lives():
            return "crashed"
        return "stalled" if time.time() - self.step_time > STALLED_SECONDS else "running"

    def _process_lives(self) -> bool:
        if self.host != socket.gethostname():
            return True
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True


def load_status(path: Path) -> RankStatus | None:
    """Read a status file; None if it is missing or damaged. Unknown fields are ignored."""
    try:
        values: dict[str, Any] = read_json(path)
        known = RankStatus.__dataclass_fields__.keys()
        found = RankStatus(**{name: value for name, value in values.items() if name in known})
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return found if _is_sound(found) else None


def _is_sound(status: RankStatus) -> bool:
    """Whether every field is of its kind: anybody may have written the file."""
    counts = [status.rank, status.attempt, status.pid, status.step, status.lost_rows]
    tables = [status.rows, status.faults]
    if not all(isinstance(table, dict) for table in tables):
        return False
    counts += [count for table in tables for count in table.values()]
    moments = [status.started, status.heartbeat, status.step_time, status.writer_cpu_seconds]
    texts = [status.run_id, status.state, status.reason, status.host]
    return (
        all(isinstance(text, str) for text in texts)
        and all(isinstance(c, int) and -(2**63) <= c < 2**63 for c in counts)
        and all(isinstance(m, int | float) and abs(m) < 1e15 for m in moments)
    )


class Claim:
    """The right to write as one rank of one run, given back when the process ends, however it ends.

    A record lock holds on this host, a fresh heartbeat on others. Record locks are not inherited by
    forked workers, but do not exclude within a process; a set does.

    Raises:
        EntropyLensError: Another live process has it.
    """

    def __init__(self, layout: Layout, rank: int) -> None:
        path = layout.lock(rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._key = path.resolve()
        status = load_status(layout.status(rank))
        if self._key in _claimed:
            raise EntropyLensError(_in_use(layout.root, rank, status))
        self._file = open(path, "a")  # noqa: SIM115 - held for the writer's life
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise EntropyLensError(_in_use(layout.root, rank, status)) from None
        elsewhere = status is not None and status.host != socket.gethostname()
        if status is not None and elsewhere and status.seen_state() in ("running", "stalled"):
            self._file.close()
            raise EntropyLensError(_in_use(layout.root, rank, status))
        _claimed.add(self._key)

    def release(self) -> None:
        """Give it back."""
        _claimed.discard(self._key)
        self._file.close()


def _in_use(root: Path, rank: int, status: RankStatus | None) -> str:
    who = "another writer"
    if status is not None:
        age = time.time() - status.heartbeat
        who = f"process {status.pid} on {status.host} (last heartbeat {age:.0f} s ago)"
    return (
        f"RunWriter: expected {root} to be free for rank {rank}, but it is in use by {who}; end "
        f"that run, or choose another run_dir"
    )
