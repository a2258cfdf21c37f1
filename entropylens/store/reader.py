"""Reading runs, finished or still being written, whole or from a cursor on."""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from entropylens.errors import EntropyLensError
from entropylens.records import SCHEMAS
from entropylens.store.filters import all_of, filtered, matching, within
from entropylens.store.layout import Layout
from entropylens.store.manifest import load_manifest
from entropylens.store.segments import Footer, read_footer, read_segment
from entropylens.store.status import RankStatus, load_status
from entropylens.store.tail import read_tail
from entropylens.store.view import Cursor, View, ends_of

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Cursor", "Rows", "Run", "View", "list_runs", "open_run"]

_T = TypeVar("_T")

_RELISTS: Final = 20
"""How often a read starts again because files were sealed or merged under it."""
_ROOM: Final = 256
"""Files that are remembered before those that are gone are looked for."""
_WORST_FIRST: Final = ("failed", "crashed", "terminated", "stalled", "running", "finished")


@dataclass(frozen=True)
class Rows:
    """Rows of one table."""

    table: pa.Table
    cursor: Cursor
    """Give it as ``since`` to read only what came later."""
    restarted: bool = False
    """The cursor given was of before a resume or merge: these are all rows again."""
    warnings: list[str] = field(default_factory=list)
    """Files that were skipped, and why."""

    def to_arrow(self) -> pa.Table:
        """The rows as an Arrow table."""
        return self.table

    def to_pandas(self) -> "pd.DataFrame":
        """The rows as a pandas frame."""
        return self.table.to_pandas()


class Run:
    """One run directory, open for reading; nothing is written and nothing is locked.

    Get one from `open_run`. Each read looks at the files anew, so that a run that is being written
    can be read again and again, whole or from a cursor on.

    Args:
        path: The run directory.

    Raises:
        EntropyLensError: There is no run, its manifest is damaged, or its format newer than ours.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self._layout = Layout(self.path)
        self._remembered: dict[tuple[Any, Path], tuple[tuple[int, int], Any]] = {}
        self._room = _ROOM
        self._named: set[str] = set()
        self.manifest: dict[str, Any] = load_manifest(self.path)

    def __repr__(self) -> str:
        """Name, place and state."""
        return f"Run({self.name!r}, {str(self.path)!r}, {self.state()})"

    @property
    def name(self) -> str:
        """The run's name."""
        return str(self.manifest.get("name") or self.path.name)

    @property
    def run_id(self) -> str:
        """Unique to the run, kept through resumes."""
        return str(self.manifest["run_id"])

    @property
    def created(self) -> str:
        """When it was first started, ISO 8601."""
        return str(self.manifest.get("created", ""))

    @property
    def config(self) -> dict[str, Any]:
        """Settings of the monitor, and under ``user`` those of the training."""
        found = self.manifest.get("config")
        return dict(found) if isinstance(found, Mapping) else {}

    @property
    def attempts(self) -> list[dict[str, Any]]:
        """One entry each time training was started, with the step it went on after."""
        return list(self.manifest["attempts"])

    def refresh(self) -> Self:
        """Read the manifest again: a resume adds an attempt."""
        self.manifest = load_manifest(self.path)
        return self

    def status(self) -> list[RankStatus]:
        """What each process last said of itself; a damaged file is left out."""
        found = [load_status(path) for path in self._layout.statuses()]
        return [status for status in found if status is not None]

    def state(self) -> str:
        """finished, running, stalled, terminated, crashed, failed, or unknown.

        The worst of the ranks that take part in the newest attempt.
        """
        found = self.status()
        newest = max((status.attempt for status in found), default=0)
        states = {status.seen_state() for status in found if status.attempt == newest}
        return next((state for state in _WORST_FIRST if state in states), "unknown")

    def metrics(
        self,
        names: str | Sequence[str] | None = None,
        modules: str | Sequence[str] | None = None,
        *,
        phases: str | Sequence[str] | None = None,
        steps: tuple[int | None, int | None] | None = None,
        since: Cursor | str | None = None,
    ) -> Rows:
        """Rows of the metrics table.

        Args:
            names: Metric names, or patterns with ``*`` and ``?``; None is all.
            modules: Module names or patterns; None is all, "" only values of the whole run.
            phases: train, eval, rollout; None is all.
            steps: First and last step, both included; None on either side is open.
            since: A cursor that an earlier read returned: only what came later.

        Returns:
            The rows, a rank's in the order they were written or, after a merge, by name and step.

        Raises:
            ValueError: The cursor is of another run or table.
            EntropyLensError: The run's manifest is gone or newer.
        """
        conditions = matching("name", names), matching("module", modules)
        return self.rows("metrics", phases=phases, steps=steps, since=since, where=conditions)

    def tokens(self, **filters: Any) -> Rows:
        """Rows of the tokens table; filters as in `rows`."""
        return self.rows("tokens", **filters)

    def samples(self, **filters: Any) -> Rows:
        """Rows of the samples table; filters as in `rows`."""
        return self.rows("samples", **filters)

    def completions(self, **filters: Any) -> Rows:
        """Rows of the completions table; filters as in `rows`."""
        return self.rows("completions", **filters)

    def spectra(self, **filters: Any) -> Rows:
        """Rows of the spectra table; filters as in `rows`."""
        return self.rows("spectra", **filters)

    def events(self, **filters: Any) -> Rows:
        """Rows of the events table; filters as in `rows`."""
        return self.rows("events", **filters)

    def rows(
        self,
        table: str,
        *,
        phases: str | Sequence[str] | None = None,
        steps: tuple[int | None, int | None] | None = None,
        since: Cursor | str | None = None,
        where: Sequence[pc.Expression | None] = (),
    ) -> Rows:
        """Rows of any table.

        Args:
            table: A table of `entropylens.records.SCHEMAS`.
            phases: train, eval, rollout; None is all.
            steps: First and last step, both included; None on either side is open.
            since: A cursor that an earlier read of this table returned.
            where: More conditions, as pyarrow expressions.

        Returns:
            The rows.

        Raises:
            ValueError: The cursor is of another run or table.
        """
        condition = all_of([matching("phase", phases), *within(steps), *where])
        found = self.steadily(table, lambda: self._read(table, condition, since))
        self.warn(found.warnings, stacklevel=4)
        return found

    def snapshot(self, table: str) -> tuple[list[Path], pa.Table]:
        """Readable segments of a table, and the tail rows that none of them covers."""
        found = self.steadily(table, lambda: self.view(table))
        self.warn(found.notes, stacklevel=5)
        rows = [SCHEMAS[table].empty_table(), *(rows for _, _, rows in found.tails)]
        return [path for path, _ in found.segments], pa.concat_tables(rows)

    # -- for the rooms that read files themselves ------------------------------------------------

    def view(self, table: str, since: Cursor | str | None = None) -> View:
        """What there is to read of a table now, from a cursor on.

        Args:
            table: A table of `entropylens.records.SCHEMAS`.
            since: A cursor that an earlier read of this table returned.

        Raises:
            ValueError: The cursor is of another run or table.
            FileNotFoundError: Files were sealed or merged meanwhile: look again (`steadily`).
        """
        since = Cursor.parse(since) if isinstance(since, str) else since
        if since is not None and (since.run_id, since.table) != (self.run_id, table):
            raise ValueError(
                f"Run.{table}: expected a cursor of this run's {table}, got one of "
                f"{since.table} of run {since.run_id[:8]}"
            )
        epoch_of_ranks = self._attempts_of_ranks()
        segments, tails, notes = self._look(table)
        generation = max((footer.generation for _, footer in segments), default=0)
        epoch = f"{generation}:{epoch_of_ranks}"
        fresh = since is None or since.epoch != epoch
        start = {} if fresh or since is None else dict(since.next_rows)
        ends = ends_of(segments, tails)
        ends |= {rank: max(ends.get(rank, 0), end) for rank, end in start.items()}
        cursor = Cursor(self.run_id, table, epoch, tuple(sorted(ends.items())))
        return View(segments, tails, notes, cursor, start, since is not None and fresh)

    def steadily(self, table: str, read: Callable[[], _T]) -> _T:
        """Read again where files were sealed or merged under it.

        Raises:
            EntropyLensError: They kept vanishing.
        """
        for _ in range(_RELISTS):
            try:
                return read()
            except FileNotFoundError:
                continue
        raise EntropyLensError(
            f"Run.{table}: expected {self.path / table} to hold still for one read, but files "
            f"vanished {_RELISTS} times; is somebody deleting them?"
        )

    def remembered(self, path: Path, make: Callable[[Path], _T]) -> _T:
        """What ``make`` made of a file, made once for as long as the file is the same."""
        facts = os.stat(path)
        identity = facts.st_mtime_ns, facts.st_ino
        known = self._remembered.get((make, path))
        if known is not None and known[0] == identity:
            return known[1]
        made = make(path)
        self._remembered[make, path] = identity, made
        if len(self._remembered) > self._room:
            self._forget_gone()
        return made

    def _forget_gone(self) -> None:
        """Forget files that were merged or removed, now and then: a server keeps runs for days."""
        found = self._remembered.copy()
        self._remembered = {key: made for key, made in found.items() if key[1].exists()}
        self._room = max(_ROOM, 2 * len(self._remembered))

    def warn(self, notes: Sequence[str], *, stacklevel: int = 3) -> None:
        """Name each fault once."""
        for note in notes:
            if note not in self._named:
                self._named.add(note)
                warnings.warn(note, UserWarning, stacklevel=stacklevel)

    # -- from files to rows ----------------------------------------------------------------------

    def _read(self, table: str, condition: Any, since: Cursor | str | None) -> Rows:
        found = self.view(table, since)
        notes = list(found.notes)
        parts = [SCHEMAS[table].empty_table()]
        for path, footer in found.segments:
            skip = found.passed(footer.rank, footer.first_row, footer.rows, footer.end_row)
            if skip and skip >= footer.rows:
                continue
            try:
                rows = read_segment(path, table, None if skip else condition)
            except ValueError as error:
                notes.append(f"skipped: {error}")
                continue
            parts.append(filtered(rows.slice(skip), condition) if skip else rows)
        for rank, first, rows in found.tails:
            skip = found.passed(rank, first, rows.num_rows)
            parts.append(filtered(rows.slice(skip), condition))
        return Rows(pa.concat_tables(parts), found.cursor, found.restarted, notes)

    def _look(
        self, table: str
    ) -> tuple[list[tuple[Path, Footer]], list[tuple[int, int, pa.Table]], list[str]]:
        """Tails first: what is sealed while we look is then in a segment and in no tail twice."""
        notes: list[str] = []
        tails = self._tails(table, notes)
        segments = []
        for path in self._layout.segments(table):
            try:
                footer = self.remembered(path, read_footer)
            except ValueError as error:
                notes.append(f"skipped: {error}")
                continue
            if not footer.is_of(self.run_id, table):
                notes.append(f"skipped: {path} belongs to another run or table")
                continue
            segments.append((path, footer))
        notes += [f"skipped: {path} is no segment of a run" for path in self._strangers(table)]
        covered = ends_of(segments)
        open_tails = []
        for rank, first, rows in tails:
            skip = min(max(covered.get(rank, 0) - first, 0), rows.num_rows)
            open_tails.append((rank, first + skip, rows.slice(skip)))
        return segments, open_tails, notes

    def _tails(self, table: str, notes: list[str]) -> list[tuple[int, int, pa.Table]]:
        tails = []
        for rank, path in self._layout.tails(table).items():
            try:
                found = read_tail(path, table)
            except ValueError as error:
                notes.append(f"skipped: {error}")
                continue
            if found.metadata.get("run_id") != self.run_id:
                notes.append(f"skipped: {path} belongs to another run")
                continue
            if found.damage is not None:
                notes.append(f"read in part: {path}: {found.damage}")
            tails.append((rank, found.first_row, found.rows))
        return tails

    def _strangers(self, table: str) -> list[Path]:
        folder = self.path / table
        names = os.listdir(folder) if folder.is_dir() else []
        ours = {*self._layout.segments(table), *self._layout.tails(table).values()}
        seen = [folder / name for name in sorted(names) if not name.startswith(".")]
        return [path for path in seen if path not in ours]

    def _attempts_of_ranks(self) -> str:
        return ",".join(f"{status.rank}.{status.attempt}" for status in self.status())


def open_run(path: str | Path) -> Run:
    """Open a run directory for reading, while it is written or long after.

    Args:
        path: The directory that holds ``run.json``.

    Returns:
        The run.

    Raises:
        EntropyLensError: There is no run, its manifest is damaged, or its format newer than ours.
    """
    return Run(path)


def list_runs(folder: str | Path) -> list[Run]:
    """All runs in a folder and the folders below it, newest first.

    A run whose manifest cannot be read is named in a warning and left out.

    Args:
        folder: Where to look; may be a run itself.

    Returns:
        The runs.

    Raises:
        EntropyLensError: There is no such folder.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise EntropyLensError(f"list_runs: expected a folder, found none at {root}")
    runs = []
    for place, folders, files in os.walk(root):
        if "run.json" not in files:
            folders[:] = [name for name in folders if not name.startswith(".")]
            continue
        folders[:] = [] if Path(place) != root else [n for n in folders if n not in SCHEMAS]
        try:
            runs.append(Run(place))
        except EntropyLensError as error:
            warnings.warn(f"left out: {error}", UserWarning, stacklevel=2)
    return sorted(runs, key=lambda run: (run.created, run.name), reverse=True)
