"""The runs of one folder, addressed by identifiers and never by paths."""

import json
import math
import os
import re
import stat
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

from entropylens.errors import EntropyLensError
from entropylens.records import FORMAT_VERSION, SCHEMAS
from entropylens.store.layout import Layout
from entropylens.store.reader import Run
from entropylens.store.status import RankStatus

__all__ = ["Entry", "Library", "without_paths"]

LONGEST_NAME: Final = 200
"""Characters of a name that are shown."""
LONGEST_REASON: Final = 500
"""Characters of the reason of an end that are shown."""
LARGEST_MANIFEST: Final = 32 * 2**20
"""Bytes; a larger run.json is taken for damaged and not read."""
DEEPEST: Final = 32
"""Folders below folders that are looked into."""
REST: Final = 5
"""A scan is followed by a pause of at least so many times its length, whatever ``ttl`` says."""

_ID: Final = re.compile(r"[0-9a-f-]{8,40}")
_RUN_ID: Final = re.compile(r"[0-9a-f]{32}")
_PATH: Final = re.compile(r"""file:/+[^\s'"]*|(?<![\w./])(?<!:/)/(?!/)[^\s'"()<>,;]+""")
_OURS: Final = {*SCHEMAS, "status", "pyramid", "superseded"}
_NOTES: Final = {
    "half-written": "Its run.json is missing or damaged. Nothing of it can be shown; its "
    "metrics/*.parquet can still be read with pyarrow, pandas or DuckDB.",
    "newer": "A newer entropylens has written it. Upgrade entropylens to see it.",
    "starting": "It has not written a row yet.",
    "stalled": "Its process lives, but its step has not moved for ten minutes.",
    "crashed": "Its process ended without closing the log.",
    "unknown": "No process has said how it is.",
}


@dataclass(frozen=True)
class Entry:
    """One run of the library, as a page shows it."""

    id: str
    """What URLs carry: hexadecimal digits, and a dash where two directories hold one run."""
    name: str
    """Printable text from the log; whoever shows it escapes it."""
    folder: str
    """Path relative to the library's root, for display only."""
    state: str
    """running, finished, stalled, terminated, crashed, failed, unknown; starting, half-written or
    newer."""
    note: str
    """Why it cannot be opened, or why it ended; holds no absolute path."""
    run: Run | None
    """Open for reading, or None for half-written and newer."""


class Library:
    """The runs in a folder and the folders below it.

    Symbolic links to directories are not followed, inside or out of the folder; hidden directories
    are not entered. Scanning reads manifests and statuses, never metrics.

    A run's id is the first 12 digits of its ``run_id``, so that a renamed directory keeps it. Where
    several directories carry the same ``run_id``, the oldest keeps that id: the one whose lock file
    or manifest was created first on this disk, so a copy that appears later never takes it over.
    The others are listed as ``<12 digits>-<6 digits of their path>``. `find` also knows every run
    by that longer id, and a directory without a readable manifest by 12 digits of its path alone:
    an id that was handed out goes on working when the original is deleted or a manifest appears.

    Args:
        root: The folder; may be a run itself.
        ttl: Seconds for which a scan is good.

    Raises:
        EntropyLensError: There is no such folder.
    """

    def __init__(self, root: str | Path, *, ttl: float = 2.0) -> None:
        self.root = Path(root).expanduser().absolute()
        if not self.root.is_dir():
            raise EntropyLensError(
                f"Library: expected a folder of runs, found none at {self.root}; give the folder "
                f"that holds the run directories"
            )
        self._ttl = ttl
        self._scanning = threading.Lock()
        self._good_until = 0.0
        self._runs: dict[Path, tuple[tuple[int, ...], Run]] = {}
        self._seen: _Scan | None = None

    def entries(self) -> list[Entry]:
        """All runs, newest first; a fresh scan at most every ``ttl`` seconds."""
        return list(self._fresh().entries)

    def find(self, id: str) -> Entry | None:
        """The run with this id, or None.

        Its ``id`` may be a shorter or longer one than was asked for, if a copy came or went.
        """
        if not isinstance(id, str) or not _ID.fullmatch(id):
            return None
        return self._fresh().by_id.get(id)

    # -- scanning --------------------------------------------------------------------------------

    def _fresh(self) -> "_Scan":
        """The last scan; while one thread scans, the others take what there was before."""
        seen = self._seen
        if seen is not None and time.monotonic() < self._good_until:
            return seen
        if not self._scanning.acquire(blocking=seen is None):
            return seen or _Scan([], {})
        try:
            start = time.monotonic()
            if self._seen is None or start >= self._good_until:
                self._seen = _with_ids(self._scan())
                now = time.monotonic()
                self._good_until = max(start + self._ttl, now + REST * (now - start))
            return self._seen
        finally:
            self._scanning.release()

    def _scan(self) -> "list[_Found]":
        places = list(_places(self.root))
        self._runs = {place: self._runs[place] for place in places if place in self._runs}
        found = [self._look(place) for place in places if place.is_dir()]
        return sorted(found, key=lambda one: (one.created, one.entry.folder), reverse=True)

    def _look(self, place: Path) -> "_Found":
        path = place.relative_to(self.root)
        folder, path_id = _text(path, LONGEST_REASON), _digest(os.fsencode(path))
        try:
            run = self._open(place)
            state, note = _state(run)
            entry = Entry("", _text(run.name), folder, state, note, run)
            return _Found(place, path_id, _run_id(run.run_id), run.created[:40], entry)
        except Exception:  # a manifest may hold anything, and one must not hide the others
            self._runs.pop(place, None)
            manifest = _raw(place)
            state = "newer" if _version(manifest) > FORMAT_VERSION else "half-written"
            run_id = manifest.get("run_id")
            known_id = _run_id(run_id) if isinstance(run_id, str) else path_id
            entry = Entry("", _text(place.name), folder, state, _NOTES[state], None)
            return _Found(place, path_id, known_id, _changed(place), entry)

    def _open(self, place: Path) -> Run:
        """The run as it was opened before, with its manifest read again if that has changed."""
        facts = _manifest_facts(place)
        stamp = (facts.st_mtime_ns, facts.st_ino, facts.st_size)
        known = self._runs.get(place)
        if known is not None and known[0] == stamp:
            return known[1]
        run = Run(place)
        if known is not None and known[1].run_id == run.run_id:
            run = known[1].refresh()
        self._runs[place] = (stamp, run)
        return run


@dataclass(frozen=True)
class _Found:
    """A directory that holds a run, or what may become one."""

    place: Path
    path_id: str
    """32 digits of its path."""
    run_id: str
    """32 digits: the run's own, or those of the path where no manifest gives one."""
    created: str
    entry: Entry
    """Its id is not settled yet."""

    def age(self) -> tuple[float, str]:
        """Sorts the directories of one run by when they came to this disk."""
        layout = Layout(self.place)
        return min(_ctime(layout.lock(0)), _ctime(layout.manifest)), self.path_id


@dataclass(frozen=True)
class _Scan:
    entries: list[Entry]
    by_id: Mapping[str, Entry]


def _with_ids(found: Sequence[_Found]) -> _Scan:
    entries: dict[Path, Entry] = {}
    by_short: dict[str, Entry] = {}
    by_long: dict[str, Entry] = {}
    by_path: dict[str, Entry] = {}
    for one in sorted(found, key=_Found.age):
        short = one.run_id[:12]
        longer = (f"{short}-{one.path_id[:digits]}" for digits in (6, 16, 27))
        long = next(id for id in longer if id not in by_long)
        entry = replace(one.entry, id=long if short in by_short else short)
        by_short.setdefault(short, entry)
        by_long[long] = by_path[one.path_id[:12]] = entries[one.place] = entry
    return _Scan([entries[one.place] for one in found], by_path | by_long | by_short)


def _places(root: Path) -> Iterator[Path]:
    """Directories that hold a run or the beginning of one."""
    for at, folders, files in os.walk(root):
        place = Path(at)
        if "run.json" in files:
            is_run = bool(_OURS & {*folders}) or _version(_raw(place)) > 0
        else:
            is_run = bool(_OURS & {*folders}) and _has_begun(Layout(place))
        if is_run:
            yield place
        if (is_run and place != root) or len(place.relative_to(root).parts) >= DEEPEST:
            folders.clear()
        ours = _OURS if is_run else ()
        folders[:] = [name for name in folders if not name.startswith(".") and name not in ours]


def _has_begun(layout: Layout) -> bool:
    return layout.lock(0).exists() or bool(layout.ranks())


# -- what a directory says of itself --------------------------------------------------------------


def _manifest_facts(place: Path) -> os.stat_result:
    facts = os.stat(Layout(place).manifest)
    if not stat.S_ISREG(facts.st_mode) or facts.st_size > LARGEST_MANIFEST:
        raise EntropyLensError("Library: expected run.json to be a file of at most 32 MiB")
    return facts


def _raw(place: Path) -> dict[str, Any]:
    """What can be read of a manifest that does not open; empty if nothing."""
    try:
        _manifest_facts(place)
        found = json.loads(Layout(place).manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, EntropyLensError):
        return {}
    return found if isinstance(found, dict) else {}


def _version(manifest: Mapping[str, Any]) -> int:
    try:
        return int(manifest["format_version"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return 0


def _state(run: Run) -> tuple[str, str]:
    """State and note; a status file may hold anything."""
    try:
        state, found = run.state(), run.status()
        newest = max((status.attempt for status in found), default=0)
        taking_part = [status for status in found if status.attempt == newest]
        if state == "running" and len(run.attempts) <= 1 and not any(map(_has_rows, taking_part)):
            state = "starting"
        reasons = [s.reason for s in taking_part if s.reason and s.seen_state() == state]
        return state, without_paths(reasons[0]) if reasons else _NOTES.get(state, "")
    except Exception:  # as above
        return "unknown", _NOTES["unknown"]


def _has_rows(status: RankStatus) -> bool:
    """Whether it has measured something: each run begins with an event."""
    return any(count > 0 for table, count in status.rows.items() if table != "events")


def without_paths(reason: object) -> str:
    """A sentence in which of each path only the last part is left, at most so long."""
    shown = _PATH.sub(lambda match: f"…/{match[0].rstrip('/').rpartition('/')[2]}", str(reason))
    return _text(shown, LONGEST_REASON)


def _text(value: object, longest: int = LONGEST_NAME) -> str:
    """``value`` without control characters, directions and half characters, cut to a length."""
    shown = "".join(c if c.isprintable() else " " for c in str(value)[: longest + 1]).strip()
    return (shown if len(shown) <= longest else shown[: longest - 1] + "…") or "?"


def _run_id(text: str) -> str:
    """32 digits for whatever a manifest holds as ``run_id``."""
    return text if _RUN_ID.fullmatch(text) else _digest(text.encode("utf-8", "surrogatepass"))


def _digest(content: bytes) -> str:
    return blake2b(content, digest_size=16).hexdigest()


def _changed(place: Path) -> str:
    try:
        return datetime.fromtimestamp(os.stat(place).st_mtime, UTC).isoformat()
    except OSError:
        return ""


def _ctime(path: Path) -> float:
    try:
        return os.stat(path).st_ctime_ns
    except OSError:
        return math.inf
