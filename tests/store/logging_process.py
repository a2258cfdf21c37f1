"""Processes that log, for tests that kill them, signal them or let them fail.

python logging_process.py MODE RUN_DIR [ARGUMENT ...]
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from entropylens.store.writer import RunWriter

ROWS_A_STEP = 10
NAMES = [f"count/{number}" for number in range(ROWS_A_STEP)]


def count(run_dir: str, counter: str, resume_step: str = "") -> None:
    """Log numbered rows until killed; say how many were handed over, and how many acknowledged."""
    first = int(resume_step) if resume_step else None
    writer = RunWriter(run_dir, resume_step=first, flush_seconds=0.004, seal_seconds=0.03)
    handed_over = os.open(counter, os.O_WRONLY | os.O_CREAT)
    step = 0 if first is None else first + 1
    while True:
        start = step * ROWS_A_STEP
        values = np.arange(start, start + ROWS_A_STEP)
        os.pwrite(handed_over, f"{start + ROWS_A_STEP:020d}".encode(), 0)
        writer.write("metrics", {"name": NAMES, "value": values, "step": step})
        if step % 3 == 0 and writer.flush():
            print(start + ROWS_A_STEP, flush=True)
        time.sleep(0.001)
        step += 1


def hold(run_dir: str, rank: str = "0") -> None:
    """Hold a run until a line comes."""
    writer = RunWriter(run_dir, rank=int(rank), flush_seconds=0.01)
    writer.write("metrics", {"name": "loss", "value": 1.0, "step": 1})
    writer.flush()
    print("ready", flush=True)
    sys.stdin.readline()
    writer.close()


def take_part(run_dir: str, rank: str, world_size: str, last_step: str, resume: str = "") -> None:
    """One rank of several: log its own steps and end."""
    print("opening", flush=True)
    first = int(resume) if resume else None
    with_ranks = {"rank": int(rank), "world_size": int(world_size), "resume_step": first}
    writer = RunWriter(run_dir, flush_seconds=0.01, **with_ranks)  # type: ignore[arg-type]
    for step in range((first or 0) + 1, int(last_step) + 1):
        writer.write("metrics", {"name": "loss", "value": 100 * int(rank) + step, "step": step})
    writer.close()


def wait_for_sigterm(run_dir: str, previous: str) -> None:
    """Log, then sleep until SIGTERM ends the process or, with a handler of ours, the sleep."""
    handled: list[int] = []

    def handle(number: int, frame: Any) -> None:
        files = sorted(path.name for path in Path(run_dir, "metrics").iterdir())
        print("handled with", *files, flush=True)
        handled.append(number)

    if previous == "handler":
        signal.signal(signal.SIGTERM, handle)
    writer = RunWriter(run_dir, flush_seconds=60)
    writer.before_exit = lambda: writer.write("metrics", {"name": "last", "value": 2.0})
    writer.write("metrics", {"name": "loss", "value": 1.0, "step": 7})
    print("ready", flush=True)
    deadline = time.monotonic() + 60
    while not handled and time.monotonic() < deadline:
        time.sleep(0.01)
    writer.write("metrics", {"name": "after", "value": 3.0, "step": 8})


def end(run_dir: str, how: str) -> None:
    """Log and end without closing: by an exception, by an exit status, or at the last line."""
    writer = RunWriter(run_dir, flush_seconds=60)
    writer.write("metrics", {"name": "loss", "value": 1.0, "step": 1})
    if how == "exception":
        raise ArithmeticError("the loss is gone")
    if how == "interrupt":
        raise KeyboardInterrupt
    if how == "exit":
        sys.exit(3)


def fork(run_dir: str) -> None:
    """Fork workers that use the writer they inherit, and go on."""
    writer = RunWriter(run_dir, flush_seconds=0.01)
    writer.before_exit = lambda: os._exit(7)
    writer.write("metrics", {"name": "before", "value": 1.0, "step": 1})
    worker = os.fork()
    if worker == 0:
        signal.alarm(20)  # where a worker waits for a thread that it does not have
        writer.write("metrics", {"name": "worker", "value": 2.0, "step": 2})
        writer.event("worker", "a worker speaks")
        acknowledged = writer.flush()
        writer.close("failed", "a worker ends")
        sys.exit(1 if acknowledged else 0)
    _, status = os.waitpid(worker, 0)
    print("worker exited", os.waitstatus_to_exitcode(status), flush=True)
    awake, tell_awake = os.pipe()
    sleeper = os.fork()
    if sleeper == 0:
        os.write(tell_awake, b"1")
        time.sleep(60)
        os._exit(0)
    os.read(awake, 1)
    os.kill(sleeper, signal.SIGTERM)
    _, status = os.waitpid(sleeper, 0)
    print("sleeper exited", os.waitstatus_to_exitcode(status), flush=True)
    sys.stdin.readline()
    writer.write("metrics", {"name": "after", "value": 3.0, "step": 3})
    writer.close()


MODES: dict[str, Callable[..., None]] = {
    mode.__name__: mode for mode in (count, hold, take_part, wait_for_sigterm, end, fork)
}


@contextmanager
def process(mode: Callable[..., None], *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Run a mode in a process of its own; it is killed at the end if it still lives."""
    command = [sys.executable, __file__, mode.__name__, *map(str, arguments)]
    root = str(Path(__file__).parents[2])
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command,
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    ) as found:
        try:
            yield found
        finally:
            found.kill()


def said(found: subprocess.Popen[str]) -> str:
    """The next line that the process prints."""
    assert found.stdout is not None
    return found.stdout.readline().strip()


def tell(found: subprocess.Popen[str]) -> None:
    """Give the process the line it waits for."""
    assert found.stdin is not None
    found.stdin.write("\n")
    found.stdin.flush()


if __name__ == "__main__":
    MODES[sys.argv[1]](*sys.argv[2:])
