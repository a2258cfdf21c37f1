import json
import os
import shutil
import socket
import time
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from dashboard_client import Visit, callbacks
from dashboard_crowd import WORKERS, Client, Gauge, Log, gunicorn, large_run, live_writer, over_http

from entropylens.store.reader import open_run

CLIENTS: Final = 50
SECONDS: Final = 60.0
LARGE: Final = 10**9
"""Bytes of metrics."""
MOST_MEMORY: Final = 700
"""MiB of one worker; 470 were measured."""
MOST_GROWTH: Final = 60
"""MiB by which the last third of the minute may lie above the second, on average."""
MOST_FILES: Final = 40
"""That one worker has open; 10 were measured."""


def damage(segments: list[Path]) -> None:
    """Two bits of a merged segment, and seven of the others in seven ways."""
    for path, places in ((segments[1], 2), (segments[6], 40)):
        size = path.stat().st_size
        with path.open("r+b") as file:
            for place in np.random.default_rng(0).integers(size // 4, size // 2, places).tolist():
                file.seek(place)
                byte = file.read(1)[0]
                file.seek(place)
                file.write(bytes([byte ^ 4]))
    os.truncate(segments[8], segments[8].stat().st_size // 2)
    os.truncate(segments[10], 0)
    segments[12].write_bytes(bytes(segments[12].stat().st_size))
    segments[14].write_bytes(b"PAR1" + bytes(100) + b"\xff\xff\xff\x7fPAR1")
    segments[16].unlink()
    segments[16].mkdir()
    segments[18].unlink()
    segments[18].symlink_to("/etc/passwd")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def ids_of(port: int) -> dict[str, str]:
    send = over_http(port)
    visit = Visit(send, callbacks(send))
    visit.open("/")
    return {row["name"]: row["id"] for row in visit.values["runs.rowData"]}


def crowd(port: int, ids: dict[str, str], log: Log) -> list[Client]:
    """Half look at the run that is written, half at the large one."""
    until = time.monotonic() + SECONDS
    clients = [
        Client(port, ids[("live", "large")[i % 2]], list(ids.values()), log, until, seed=i)
        for i in range(CLIENTS)
    ]
    for client in clients:
        client.start()
    for client in clients:
        client.join(SECONDS + 180)
    assert not any(client.is_alive() for client in clients)
    return clients


def shown(port: int, run_id: str) -> Visit:
    """The page of a run, as somebody sees it who comes later."""
    send = over_http(port)
    visit = Visit(send, callbacks(send))
    assert visit.open(f"/run/{run_id}").status == 200
    assert visit.draw().status == 200
    return visit


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_crowd_looks_at_a_large_damaged_run_and_at_a_live_one(
    folder: Path, tmp_path: Path
) -> None:
    segments = large_run(folder / "large", LARGE)
    size = sum(path.stat().st_size for path in segments)
    damage(segments)
    port, log = free_port(), Log()
    with (
        live_writer(folder / "live", 0.15),
        gunicorn(folder, port, tmp_path / "errors") as parent,
    ):
        gauge = Gauge(parent)
        before = gauge.children()
        gauge.start()
        ids = ids_of(port)
        assert set(ids) == {"large", "live"}
        clients = crowd(port, ids, log)
        last = int(open_run(folder / "live").metrics("loss/mean").table["step"].to_numpy().max())
        gauge.end()
        after = gauge.children()
        late = shown(port, ids["live"])
        large = shown(port, ids["large"])
    figures = {
        "bytes of the large run": size,
        "segments": len(segments),
        "clients": CLIENTS,
        **log.figures(),
        "MiB of each worker (first, largest, last)": [
            [found[0], max(found), found[-1]] for found in gauge.memory.values()
        ],
        "files of each worker (largest)": [max(found) for found in gauge.files.values()],
        "drawings": sum(client.drawings for client in clients),
        "steps of the live run": len(late.figures["loss"]["data"][0]["x"]),
        "faults": log.faults[:20],
    }
    print(json.dumps(figures, indent=1))
    assert log.faults == []
    assert set(log.statuses) <= {"200", "204"}
    assert before == after  # no worker was killed or died
    assert len(gauge.memory) == WORKERS
    for found in gauge.memory.values():
        assert max(found) < MOST_MEMORY
        third = len(found) // 3
        assert np.mean(found[-third:]) - np.mean(found[third:-third]) < MOST_GROWTH
    assert max(map(max, gauge.files.values())) < MOST_FILES
    check_steps(clients, ids["live"], last)
    assert "loss" in large.graphs
    text = (tmp_path / "errors").read_text()
    assert "Traceback" not in text
    assert "WORKER TIMEOUT" not in text
    shutil.rmtree(folder)


def check_steps(clients: list[Client], live: str, last: int) -> None:
    """Who looked at the live run saw each of its steps, once, in order, to nearly the last."""
    for client in clients:
        if client.run_id == live:
            assert client.steps == list(range(1, len(client.steps) + 1)), client.name
            assert client.steps[-1] > last - 100, client.name  # ten seconds
    assert sum(client.drawings for client in clients) < 10 * len(clients)  # the rest was added
