"""A large run, a server in several processes, and many browsers without a screen."""

import http.client
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from dashboard_client import Answer, Visit, callbacks

from entropylens.records import SCHEMAS
from entropylens.store.layout import Layout
from entropylens.store.segments import write_segment
from entropylens.store.writer import RunWriter

__all__ = ["Client", "Gauge", "Log", "gunicorn", "large_run", "live_writer", "over_http"]

VITALS: Final = (
    "entropy/token/mean",
    "entropy/token/p05",
    "entropy/token/p25",
    "entropy/token/p50",
    "entropy/token/p75",
    "entropy/token/p95",
    "gradient/norm/before_clip",
    "learning_rate",
    "loss/mean",
    "overhead/fraction",
    "throughput/tokens_per_second",
    "tokens/seen",
)
LAYERED: Final = ("activation/rms", "gradient/norm/layer", "spectrum/stable_rank", "update/ratio")
MODULES: Final = 60
WORKERS: Final = 4
BEAT_SECONDS: Final = 2.0
WARM_SECONDS: Final = 20.0
"""After which every process has read both runs."""
_BYTES_A_ROW: Final = 13.87
"""Measured; a value and a weight that are random, all else is packed away."""
_ROWS: Final = 200_000
"""Rows of a segment that was not merged."""


# -- what is looked at ----------------------------------------------------------------------------


def large_run(path: Path, num_bytes: int) -> list[Path]:
    """A run of one rank, two thirds merged, of numbers that do not get smaller; its segments."""
    writer = RunWriter(path, flush_seconds=0.05)
    writer.event("note", "it begins", step=1)
    writer.close()
    layout = Layout(path)
    run_id = json.loads(layout.manifest.read_text())["run_id"]
    series = [(name, "") for name in VITALS]
    series += [(name, f"layers.{i:03d}.mlp") for name in LAYERED for i in range(MODULES)]
    steps = int(num_bytes / (_BYTES_A_ROW * len(series)))
    merged = 2 * steps // 3
    edges = np.linspace(0, merged, 5, dtype=np.int64).tolist()
    edges += [*range(merged, steps, _ROWS // len(series))][1:]
    edges.append(steps)
    paths, first = [], 0
    for number, (low, high) in enumerate(pairwise(edges)):
        generation = int(number < 4)
        rows = _rows(series, low + 1, high, is_sorted=bool(generation), seed=number)
        paths.append(layout.segment("metrics", 0, layout.next_sequence("metrics", 0)))
        write_segment(
            paths[-1],
            rows,
            run_id=run_id,
            table="metrics",
            rank=0,
            first_row=first,
            end_row=first + rows.num_rows,
            generation=generation,
        )
        first += rows.num_rows
    return paths


def _rows(
    series: Sequence[tuple[str, str]], first: int, last: int, *, is_sorted: bool, seed: int
) -> pa.Table:
    rng, count = np.random.default_rng(seed), last - first + 1
    steps, which = np.arange(first, last + 1), np.arange(len(series))
    if is_sorted:
        which, steps = np.repeat(which, count), np.tile(steps, len(series))
    else:
        which, steps = np.tile(which, count), np.repeat(steps, len(series))
    size = len(which)
    columns: dict[str, Any] = {
        "rank": np.zeros(size, np.int32),
        "attempt": np.zeros(size, np.int32),
        "phase": _texts(["train"], np.zeros(size, np.int32)),
        "step": steps,
        "time": pa.array(1_700_000_000_000_000 + 100_000 * steps, pa.timestamp("us", tz="UTC")),
        "name": _texts([name for name, _ in series], which),
        "module": _texts([module for _, module in series], which),
        "value": rng.random(size),
        "weight": rng.random(size),
    }
    return pa.table([columns[f.name] for f in SCHEMAS["metrics"]], schema=SCHEMAS["metrics"])


def _texts(known: Sequence[str], which: Any) -> pa.Array:
    codes = pa.array(which.astype(np.int32))
    return pa.DictionaryArray.from_arrays(codes, pa.array(known)).cast(pa.string())


_LIVE: Final = """
import sys, time
from pathlib import Path
from runs_to_show import fill
from entropylens.store.writer import RunWriter
writer = RunWriter(Path(sys.argv[1]), flush_seconds=0.2, seal_seconds=5.0)
fill(writer, 1, 20)
step = 20
while True:
    time.sleep(float(sys.argv[2]))
    step += 1
    fill(writer, step, step)
"""


@contextmanager
def live_writer(path: Path, seconds: float) -> Iterator[None]:
    """A process that writes a step every so many seconds; it is told to end at the end."""
    command = [sys.executable, "-c", _LIVE, str(path), str(seconds)]
    with subprocess.Popen(command, env=_environment()) as process:
        deadline = time.monotonic() + 30
        while not Layout(path).tails("metrics") and time.monotonic() < deadline:
            time.sleep(0.05)
        try:
            yield
        finally:
            process.terminate()
            process.wait(30)


def _environment() -> dict[str, str]:
    root = Path(__file__).parents[1]
    places = [root, root / "dashboard", root / "tests"]
    return {**os.environ, "PYTHONPATH": ":".join(map(str, places))}


# -- the server -----------------------------------------------------------------------------------


@contextmanager
def gunicorn(folder: Path, port: int, log: Path) -> Iterator[int]:
    """The dashboard in several processes; the id of the one that started them."""
    call = f"entropylens_dashboard:create_server({str(folder)!r})"
    command = [sys.executable, "-m", "gunicorn", "-w", str(WORKERS), "-b", f"127.0.0.1:{port}"]
    with (
        log.open("w") as errors,
        subprocess.Popen([*command, call], stderr=errors, env=_environment()) as process,
    ):
        send = over_http(port)
        deadline = time.monotonic() + 60
        while send("/", None).status != 200 and time.monotonic() < deadline:
            time.sleep(0.2)
        try:
            yield process.pid
        finally:
            process.terminate()
            process.wait(60)


class Gauge(threading.Thread):
    """What the processes of a server take, once a second.

    Args:
        parent: The one that started them.
    """

    def __init__(self, parent: int) -> None:
        super().__init__(daemon=True)
        self.parent = parent
        self.memory: dict[int, list[int]] = {}
        """MiB of each worker."""
        self.files: dict[int, list[int]] = {}
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(1.0):
            for pid in self.children():
                try:
                    status = Path(f"/proc/{pid}/status").read_text()
                    files = len(os.listdir(f"/proc/{pid}/fd"))
                except OSError:
                    continue
                found = next(line for line in status.splitlines() if line.startswith("VmRSS"))
                self.memory.setdefault(pid, []).append(int(found.split()[1]) // 1024)
                self.files.setdefault(pid, []).append(files)

    def children(self) -> list[int]:
        text = Path(f"/proc/{self.parent}/task/{self.parent}/children").read_text()
        return [int(pid) for pid in text.split()]

    def end(self) -> None:
        self._over.set()
        self.join(5)


# -- who looks ------------------------------------------------------------------------------------


@dataclass
class Log:
    """What clients were answered, and how soon."""

    statuses: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    num_bytes: int = 0
    faults: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, what: str, answer: Answer, seconds: float) -> None:
        with self._lock:
            self.statuses[str(answer.status)] += 1
            self.seconds.setdefault(what, []).append(seconds)
            if time.monotonic() - self.began > WARM_SECONDS:
                self.seconds.setdefault("all, once warm", []).append(seconds)
            self.num_bytes += len(answer.body)

    def fault(self, text: str) -> None:
        with self._lock:
            self.faults.append(text)

    def figures(self) -> dict[str, Any]:
        kinds = [found for what, found in self.seconds.items() if not what.startswith("all")]
        every = {**self.seconds, "all": [one for found in kinds for one in found]}
        return {
            "answers": dict(self.statuses),
            "MiB": round(self.num_bytes / 2**20),
            "seconds (count, median, 99 %, longest)": {
                what: [
                    len(found),
                    *(round(float(q), 3) for q in np.quantile(found, [0.5, 0.99, 1])),
                ]
                for what, found in sorted(every.items())
            },
        }


def over_http(port: int, log: Log | None = None, what: Sequence[str] = ("",)) -> Any:
    """Sends to a port of this machine; ``what[0]`` is what the answer is noted as."""

    def send(path: str, body: bytes | None = None) -> Answer:
        start = time.monotonic()
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
            kind = {} if body is None else {"Content-Type": "application/json"}
            connection.request("GET" if body is None else "POST", path, body, kind)
            found = connection.getresponse()
            answer = Answer(found.status, found.read(), dict(found.getheaders()))
            connection.close()
        except (OSError, http.client.HTTPException) as error:
            answer = Answer(0, repr(error).encode())
        if log is not None:
            log.note(what[0], answer, time.monotonic() - start)
        return answer

    return send


class Client(threading.Thread):
    """One browser, on the vital signs of one run.

    Args:
        port: Of the server.
        run_id: The run.
        others: Runs that it is compared with now and then.
        log: Where answers are noted.
        until: Of `time.monotonic`.
        seed: Of what it does when.
    """

    def __init__(
        self, port: int, run_id: str, others: Sequence[str], log: Log, until: float, seed: int
    ) -> None:
        super().__init__(daemon=True)
        self.run_id, self.others, self.log, self.until = run_id, others, log, until
        self.random = random.Random(seed)
        self.what = ["page"]
        self.send = over_http(port, log, self.what)
        self.steps: list[int] = []
        """Of the loss, as they stand on the screen."""
        self.drawings = 0

    def run(self) -> None:
        try:
            time.sleep(self.random.uniform(0, BEAT_SECONDS))
            self._look()
        except Exception as error:
            self.log.fault(f"{self.name} {self.what[0]}: {error!r}")

    def _look(self) -> None:
        self.send("/", None)
        known = callbacks(self.send)
        page = Visit(self._send, known)
        page.open(f"/run/{self.run_id}")
        self._drawn(page)
        self._words(page)
        self._ask(page, "findings", "findings.children")
        beats = 0
        while time.monotonic() < self.until:
            start, beats = time.monotonic(), beats + 1
            self._beat(page)
            if beats % 3 == 0:
                self._words(page)
            if self.random.random() < 0.05:
                self._zoom(page)
            if self.random.random() < 0.03:
                self._compare(known)
            if beats % 15 == 0:
                self._ask(page, "findings", "findings.children")
            time.sleep(max(BEAT_SECONDS - (time.monotonic() - start), 0.01))

    def _send(self, path: str, body: bytes | None) -> Answer:
        answer: Answer = self.send(path, body)
        if answer.status not in (200, 204):
            self.log.fault(f"{self.name} {self.what[0]}: {answer.status} {answer.text[:200]}")
        return answer

    def _ask(self, page: Visit, what: str, name: str) -> Answer:
        self.what[0] = what
        return page.ask(name)

    def _words(self, page: Visit) -> None:
        self._ask(
            page,
            "words",
            "head.children verdict.children events.children lane.figure words-beat.data",
        )

    def _drawn(self, page: Visit, what: str = "draw") -> None:
        self.what[0] = what
        page.draw()
        self.drawings += 1
        if page.values.get("within.data") is None:
            self.steps = list(page.figures["loss"]["data"][0]["x"]) if page.figures else []

    def _beat(self, page: Visit) -> None:
        self.what[0] = "beat"
        answer = page.beat()
        found = answer.outputs()
        if "again" in found:
            self._drawn(page, "draw again")
            return
        for change in found.get('{"graph":"loss"}', {}).get("figure", {}).get("operations", ()):
            if change["location"] == ["data", 0, "x"] and change["operation"] == "Extend":
                self.steps += change["params"]["value"]

    def _zoom(self, page: Visit) -> None:
        last = max(self.steps[-1] if self.steps else 0, 30)
        low = self.random.randint(0, last - 20)
        page.values["within.data"] = [low, min(low + 200, last)]
        self._drawn(page, "zoom")
        self._words(page)
        page.values["within.data"] = None
        self._drawn(page)

    def _compare(self, known: Any) -> None:
        self.what[0] = "compare"
        page = Visit(self._send, known)
        page.open(f"/compare?runs={','.join(self.others)}")
        page.draw()
        page.ask(
            "outcome.columnDefs outcome.rowData settings.columnDefs settings.rowData "
            "compare-legend.children"
        )
