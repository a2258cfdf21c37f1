"""How fast is the dashboard on runs of a million steps, and how fast beside TensorBoard?

Four runs of 60 metrics and a million steps each: three are finished and merged, the fourth was
merged, then resumed, and is written to by another process all the time. Beside them a run with
12,000 layers, and in a folder of its own one that was never merged, whose times are the
``unmerged_...``: the bad case, zoomed at two places only. All logs have been written before, so
that they are in the page cache as far as memory goes; every server and every browser is a new one.

- ``first_page_s``: from navigation until the list of runs has its rows and the sparklines of the
  merged runs, or until a merged run's vital signs are all drawn; the slower of the two, each the
  median of three cold starts. Starting the server is ``server_start_s``.
- ``tick_ms``, ``tick_kb``: time that the server takes, added up, and bytes of the answers as sent,
  for all that the live run's vital signs ask for in one beat of two seconds; median of 30 beats.
- ``zoom_ms``: time that the server takes, added up, for what follows when somebody drags over one
  hundredth of a merged run; ``zoom_seen_ms`` from mouse-up to redrawn. Median of ten places.
- ``ratio_to_tensorboard``: from the start of the process until its HTTP API has given the first
  series of four runs, TensorBoard's time over ours, both with ``--tensorboard-steps`` steps.

The server's times are taken within its process, from the whole request to the whole answer, without
the network; they count waiting for other requests' threads.

    python benchmarks/dashboard.py [--steps N] [--metrics N] [--runs N] [--tensorboard-steps N]
                                   [--again] [--keep DIR]

Logs and what was measured are kept in ``out/dashboard``; ``--again`` measures again.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from rich.console import Console

from benchmarks.dashboard_parts import browser, logs
from benchmarks.dashboard_parts.events import seconds_to_show, write_events
from benchmarks.dashboard_parts.logs import Places, Size
from benchmarks.dashboard_parts.server import REPOSITORY, Server
from entropylens.figures.panels import PANELS

COLD_STARTS = 3
KEYS = ("first_page_s", "tick_ms", "tick_kb", "zoom_ms", "ratio_to_tensorboard")
console = Console(stderr=True)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1_000_000, help="of each run")
    parser.add_argument("--metrics", type=int, default=60, help="of each run")
    parser.add_argument("--runs", type=int, default=4, help="the last of which is written to")
    parser.add_argument("--tensorboard-steps", type=int, default=20_000, help="of both tools' runs")
    parser.add_argument("--again", action="store_true", help="measure cells that are kept, too")
    parser.add_argument("--keep", type=Path, default=Path("out/dashboard"), help="for the logs")
    parser.add_argument("--cells", nargs="*", choices=CELLS, help="only these")
    asked = parser.parse_args()
    size = Size(asked.steps, asked.metrics, asked.runs)
    beside = Size(asked.tensorboard_steps, asked.metrics, asked.runs)
    cells = {}
    for name in asked.cells or CELLS:
        of = beside if name == "tensorboard" else size
        places = Places((asked.keep / f"{of.steps}x{of.metrics}x{of.runs}").absolute())
        kept = places.root / "cells" / f"{name}.json"
        if kept.exists() and not asked.again:
            cells[name] = json.loads(kept.read_text())
            continue
        make(places, of, events=name == "tensorboard")
        with console.status(f"{name} ..."):
            began = time.perf_counter()
            cells[name] = {"load": round(os.getloadavg()[0], 2), **CELLS[name](places, of)}
        console.print(f"{name}: {time.perf_counter() - began:.0f} s")
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(json.dumps(cells[name]))
    found = {key: value for cell in cells.values() for key, value in cell.items() if key in KEYS}
    document = {key: found.get(key) for key in KEYS}
    print(json.dumps({**document, "size": vars(size), "cores": os.cpu_count(), "cells": cells}))
    return 0


# -- logs ------------------------------------------------------------------------------------------


def make(places: Places, size: Size, *, events: bool) -> None:
    """Write the logs that are not there yet."""
    jobs: dict[Path, tuple[Callable[..., None], tuple[Any, ...]]] = {}
    for number, place in enumerate([*places.merged(size), places.before_live]):
        jobs[place] = logs.write_merged, (place, number, size)
        if events:
            folder = places.root / "events" / f"run-{number}"
            jobs[folder] = write_events, (folder, number, size)
    if not events:
        jobs[places.unmerged / "run"] = logs.write_unmerged, (places.unmerged / "run", 99, size)
        jobs[places.runs / "layers"] = logs.write_layers, (places.runs / "layers",)
    missing = {place: job for place, job in jobs.items() if not place.exists()}
    if not missing:
        return
    for place in missing:
        place.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 2)) as pool:
        pending = {pool.submit(work, *given): place for place, (work, given) in missing.items()}
        for done in as_completed(pending):
            done.result()
            console.print(f"wrote {pending[done]} ({time.perf_counter() - began:.0f} s)")
    if places.merged(size):
        logs.check(places.merged(size)[0], 0, size)


@contextmanager
def writing(places: Places, size: Size) -> Iterator[float]:
    """The live run, written to meanwhile; the seconds that resuming it took."""
    logs.renew_live(places)
    arguments = [str(places.live), *map(str, (size.steps, size.metrics, size.runs))]
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.dashboard_parts.logs", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    ) as process:
        assert process.stdout is not None
        try:
            yield float(process.stdout.readline())
        finally:
            process.send_signal(signal.SIGTERM)


def mebibytes(folder: Path) -> float:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return round(sum(path.stat().st_size for path in files) / 2**20, 1)


# -- cells -----------------------------------------------------------------------------------------


def panels(run: Path) -> int:
    """How many panels vital signs show of a run."""
    names = set(logs.names_of(run))
    return sum(any(s.name in names for s in p.series if s.role == "line") for p in PANELS)


def measure_pages(places: Places, size: Size) -> dict[str, Any]:
    shown = panels(places.before_live)
    complaints: list[str] = []
    found: dict[str, list[float]] = {"runs_page_s": [], "vitals_page_s": [], "live_page_s": []}
    starts, answers, still_drawn = [], {}, 0
    ids = [logs.id_of(path) for path in places.merged(size)]
    with writing(places, size) as resumed:
        for _ in range(COLD_STARTS):
            for key, taken in found.items():
                with new_server(places.runs) as server, browser.fresh_page(complaints) as page:
                    starts.append(server.start_s)
                    if key == "runs_page_s":
                        seconds = browser.seconds_to_rows(page, server, size.runs + 1, ids)
                        still_drawn = browser.rows_drawn_after(page, 7.0)
                    else:
                        run = ids[0] if key == "vitals_page_s" else logs.id_of(places.live)
                        seconds = browser.seconds_to_plots(page, server, run, shown)
                    taken.append(round(seconds, 3))
                    answers[key] = browser._by_output(server.answers())
                    answers[key]["memory_mib"] = {"most": server.memory("VmHWM")}
    middle = {key: statistics.median(taken) for key, taken in found.items()}
    return {
        "first_page_s": max(middle["runs_page_s"], middle["vitals_page_s"]),
        **middle,
        "each": found,
        "panels": shown,
        "rows_with_sparklines_after_7_s": still_drawn,
        "server_start_s": round(statistics.median(starts), 3),
        "resume_s": resumed,
        "answers": answers,
        "complaints": sorted(set(complaints)),
    }


def measure_use(places: Places, size: Size) -> dict[str, Any]:
    """A session: the live run, then a merged one, then the layers, with one server."""
    shown = panels(places.before_live)
    complaints: list[str] = []
    with writing(places, size), new_server(places.runs) as server:
        with browser.fresh_page(complaints) as page:
            browser.seconds_to_plots(page, server, logs.id_of(places.live), shown)
            ticks = browser.beats(page, server)
            after_live = server.memory()
            merged = logs.id_of(places.merged(size)[0])
            browser.seconds_to_plots(page, server, merged, shown)
            zooms = browser.zooms(page, server, shown, size.steps)
        with browser.fresh_page(complaints) as page:
            layers = browser.layers(page, server, logs.id_of(places.runs / "layers"))
        return {
            **{key: ticks.pop(key) for key in ("tick_ms", "tick_kb")},
            "zoom_ms": zooms.pop("zoom_ms"),
            "ticks": ticks,
            "zooms": zooms,
            "layers": layers,
            "server_rss_mib": server.memory(),
            "server_rss_mib_after_live": after_live,
            "server_rss_mib_most": server.memory("VmHWM"),
            "disk_mib": {
                "merged": mebibytes(places.merged(size)[0]),
                "pyramid_of_it": mebibytes(places.merged(size)[0] / "pyramid"),
                "unmerged": mebibytes(places.unmerged),
                "layers": mebibytes(places.runs / "layers"),
            },
            "complaints": sorted(set(complaints)),
        }


def measure_unmerged(places: Places, size: Size) -> dict[str, Any]:
    complaints: list[str] = []
    run, shown = logs.id_of(places.unmerged / "run"), panels(places.unmerged / "run")
    with new_server(places.unmerged) as server, browser.fresh_page(complaints) as page:
        rows = browser.seconds_to_rows(page, server, 1, [run])
    with new_server(places.unmerged) as server, browser.fresh_page(complaints) as page:
        plots = browser.seconds_to_plots(page, server, run, shown)
        answers = browser._by_output(server.answers())
        zooms = browser.zooms(page, server, shown, size.steps, places=2)
        return {
            "unmerged_runs_page_s": round(rows, 3),
            "unmerged_vitals_page_s": round(plots, 3),
            **{f"unmerged_{name}": value for name, value in zooms.items()},
            "unmerged_segments": len(list((places.unmerged / "run/metrics").glob("*.parquet"))),
            "unmerged_rss_mib_most": server.memory("VmHWM"),
            "answers": answers,
            "complaints": sorted(set(complaints)),
        }


def measure_tensorboard(places: Places, size: Size) -> dict[str, Any]:
    """Both in turn, three times."""
    if not places.live.exists():
        logs.renew_live(places)
    ours, theirs, events = [], [], places.root / "events"
    for _ in range(COLD_STARTS):
        began = time.perf_counter()
        with new_server(places.runs) as server:
            ask_for_sparklines(server.url, size.runs)
            ours.append(time.perf_counter() - began)
        theirs.append(seconds_to_show(events, size, tag="loss/mean"))
    return {
        "ratio_to_tensorboard": round(statistics.median(theirs) / statistics.median(ours), 2),
        "steps": size.steps,
        "values": size.steps * size.metrics * size.runs,
        "ours_s": [round(seconds, 3) for seconds in ours],
        "tensorboard_s": [round(seconds, 3) for seconds in theirs],
        "disk_mib": {"ours": mebibytes(places.runs), "tensorboard": mebibytes(events)},
    }


CELLS: dict[str, Callable[[Places, Size], dict[str, Any]]] = {
    "pages": measure_pages,
    "use": measure_use,
    "unmerged": measure_unmerged,
    "tensorboard": measure_tensorboard,
}


def new_server(folder: Path) -> Server:
    return Server(folder, folder.parent / "answers.jsonl")


def ask_for_sparklines(url: str, runs: int) -> None:
    """What the list of runs asks for, until all runs have the sparkline of their loss."""
    with urlopen(url) as answer:
        answer.read()
    with urlopen(f"{url}_dash-layout") as answer:
        answer.read()
    with urlopen(f"{url}_dash-dependencies") as answer:
        known = json.load(answer)
    refresh = next(one for one in known if "runs.rowTransaction" in one["output"])
    seen: set[str] = set()
    looked: Any = {}
    while len(seen) < runs:
        given: dict[str, Any] = {"runs-beat": 0, "looked": looked, "tags": {}}
        body = {
            "output": refresh["output"],
            "outputs": [
                dict(zip(("id", "property"), one.rsplit(".", 1), strict=True))
                for one in refresh["output"].strip(".").split("...")
            ],
            "inputs": [{**one, "value": given[one["id"]]} for one in refresh["inputs"]],
            "state": [{**one, "value": given[one["id"]]} for one in refresh["state"]],
            "changedPropIds": ["looked.data"],
        }
        request = Request(
            f"{url}_dash-update-component",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urlopen(request) as answer:
            told = json.load(answer)["response"]
        change = told["runs"]["rowTransaction"]
        looked = told.get("looked", {}).get("data", looked)
        seen |= {row["id"] for row in change["update"] + change["add"] if row.get("loss")}


if __name__ == "__main__":
    sys.exit(main())
