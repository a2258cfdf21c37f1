"""What a person waits for, in a browser: pages, beats, zooms, the table of layers."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from playwright.sync_api import ConsoleMessage, Page, sync_playwright

from benchmarks.dashboard_parts.logs import LAYERS
from benchmarks.dashboard_parts.server import Server

PLACES: Final = 10
BEATS: Final = 30
LONGEST_MS: Final = 120_000
_BROWSER: Final = "/usr/bin/chromium"
_ARGUMENTS: Final = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
# Each gives the milliseconds since the navigation began once what it waits for is there, else 0.
_ROWS: Final = """([all, ids]) => {
  const rows = [...document.querySelectorAll('.ag-center-cols-container .ag-row')];
  const full = rows.filter(row => row.querySelectorAll('svg.spark path').length >= 3);
  window.drawn = new Set([...(window.drawn || []), ...full.map(row => row.getAttribute('row-id'))]);
  return rows.length === all && ids.every(id => window.drawn.has(id)) ? performance.now() : 0; }"""
_DRAWN_NOW: Final = """() => [...document.querySelectorAll('.ag-center-cols-container .ag-row')]
  .filter(row => row.querySelectorAll('svg.spark path').length >= 3).length"""
_PLOTS: Final = """count => {
  const plots = [...document.querySelectorAll('#panels .panel .js-plotly-plot')];
  const drawn = plot => [...plot.querySelectorAll('.scatterlayer .trace path.js-line')].some(
    line => (line.getAttribute('d') || '').length > 100);
  return plots.length === count && plots.every(drawn) ? performance.now() : 0; }"""
_ZOOMED: Final = """([count, low, high]) => {
  const plots = [...document.querySelectorAll('#panels .panel .js-plotly-plot')];
  const drawn = plot => {
    if (!plot._fullLayout || !plot._fullLayout.xaxis || !plot._fullData) return false;
    const [from, to] = plot._fullLayout.xaxis.range, wide = to - from;
    if (wide < low || wide > high) return false;
    const inside = plot._fullData.filter(trace => trace.type === 'scatter' && trace.x).every(
      trace => [...trace.x].every(x => x >= from - wide && x <= to + wide));
    return inside && plot.querySelector('.scatterlayer .trace path.js-line') !== null; };
  return plots.length === count && plots.every(drawn) ? performance.now() : 0; }"""
_SINCE_MOUSE_UP: Final = """() => { document.addEventListener(
  'mouseup', () => { window.lifted = performance.now(); }, true); }"""
_LAST: Final = """() => { const plot = [...document.querySelectorAll('#panels .js-plotly-plot')]
  .find(one => one._fullData && one._fullData.some(t => t.x && t.x.length));
  const traces = plot._fullData.filter(t => t.x && t.x.length);
  return Math.max(...traces.map(t => Number(t.x[t.x.length - 1]) || 0)); }"""


@contextmanager
def fresh_page(complaints: list[str]) -> Iterator[Page]:
    """A page of a browser that has just been started; what its console complains of is kept."""

    def heard(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            complaints.append(f"{message.type}: {message.text[:300]}")

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=_BROWSER, args=_ARGUMENTS)
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        page.set_default_timeout(LONGEST_MS)
        page.on("console", heard)
        page.on("pageerror", lambda error: complaints.append(f"exception: {str(error)[:300]}"))
        try:
            yield page
        finally:
            browser.close()


def seconds_to_rows(page: Page, server: Server, rows: int, ids: list[str]) -> float:
    """From navigation until all runs are listed and these have had their sparklines."""
    page.goto(server.url, wait_until="commit")
    return _until(page, _ROWS, [rows, ids]) / 1e3


def rows_drawn_after(page: Page, seconds: float) -> int:
    """How many rows of the list still have their sparklines some beats later."""
    page.wait_for_timeout(1e3 * seconds)
    return int(page.evaluate(_DRAWN_NOW))


def seconds_to_plots(page: Page, server: Server, run_id: str, panels: int) -> float:
    """From navigation until every panel of vital signs is drawn."""
    page.goto(f"{server.url}run/{run_id}", wait_until="commit")
    return _until(page, _PLOTS, panels) / 1e3


def beats(page: Page, server: Server) -> dict[str, Any]:
    """What the page of a run that is written to asks for in each beat, while it is open."""
    before, last = len(server.answers()), page.evaluate(_LAST)
    until = time.monotonic() + 10 * BEATS
    while time.monotonic() < until:
        page.wait_for_timeout(1000)
        found = _by_beat(server.answers(before))
        if len(found) > BEATS + 1:
            break
    # The first may have begun before, the last may not have ended.
    found = found[1 : BEATS + 1]
    sums = {
        what: [sum(answer[key] for answer in beat) * by for beat in found]
        for what, key, by in (("ms", "ms", 1), ("cpu_ms", "cpu_ms", 1), ("kb", "sent", 1e-3),
                              ("asked_kb", "asked", 1e-3))
    }  # fmt: skip
    starts = [beat[0]["at"] for beat in found]
    return {
        "tick_ms": round(statistics.median(sums["ms"]), 1),
        "tick_ms_worst": round(max(sums["ms"]), 1),
        "tick_cpu_ms": round(statistics.median(sums["cpu_ms"]), 1),
        "tick_kb": round(statistics.median(sums["kb"]), 2),
        "tick_kb_worst": round(max(sums["kb"]), 2),
        "tick_asked_kb": round(statistics.median(sums["asked_kb"]), 2),
        "ticks": len(found),
        "seconds_between_ticks": round((starts[-1] - starts[0]) / max(len(starts) - 1, 1), 2),
        "compressed": any(answer["encoding"] for beat in found for answer in beat),
        "steps_added_on_screen": page.evaluate(_LAST) - last,
        "requests": _by_output([answer for beat in found for answer in beat]),
    }


def zooms(
    page: Page, server: Server, panels: int, steps: int, places: int = PLACES
) -> dict[str, Any]:
    """Drag over a hundredth of a run at several places, in a page that shows it whole."""
    page.evaluate(_SINCE_MOUSE_UP)
    taken: dict[str, list[float]] = {"ms": [], "cpu_ms": [], "kb": [], "seen_ms": []}
    answers: list[dict[str, Any]] = []
    for place in range(places):
        # A drag has to be some pixels wide: a tenth of the run first, of that a tenth by hand.
        low = (0.03 + 0.85 * place / places) * steps
        page.evaluate(
            "([low, high]) => window.Plotly.relayout(document.querySelector("
            "'#panels .panel .js-plotly-plot'), {'xaxis.range[0]': low, 'xaxis.range[1]': high})",
            [low, low + 0.1 * steps],
        )
        _until(page, _ZOOMED, [panels, 0.09 * steps, 0.11 * steps])
        _until_quiet(page, server)
        before = len(server.answers())
        _drag(page)
        drawn = _until(page, _ZOOMED, [panels, 0.005 * steps, 0.015 * steps])
        taken["seen_ms"].append(drawn - page.evaluate("() => window.lifted"))
        _until_quiet(page, server)
        asked = [a for a in server.answers(before) if _is_of_zoom(a)]
        answers += asked
        taken["ms"].append(sum(a["ms"] for a in asked))
        taken["cpu_ms"].append(sum(a["cpu_ms"] for a in asked))
        taken["kb"].append(sum(a["sent"] for a in asked) / 1e3)
    middle = {what: round(statistics.median(found), 1) for what, found in taken.items()}
    return {
        "zoom_ms": middle["ms"],
        "zoom_ms_worst": round(max(taken["ms"]), 1),
        "zoom_cpu_ms": middle["cpu_ms"],
        "zoom_kb": middle["kb"],
        "zoom_seen_ms": middle["seen_ms"],
        "zoom_seen_ms_worst": round(max(taken["seen_ms"]), 1),
        "requests": _by_output(answers),
    }


def layers(page: Page, server: Server, run_id: str) -> dict[str, Any]:
    """The table of a run with very many series: filled, scrolled, filtered, one row drawn."""
    before = len(server.answers())
    page.goto(f"{server.url}run/{run_id}/series", wait_until="commit")
    rows = "document.querySelectorAll('.ag-center-cols-container .ag-row')"
    facts = {"rows_s": _until(page, f"() => {rows}.length > 5 ? performance.now() : 0", None) / 1e3}
    answers = _by_output(server.answers(before))
    began = page.evaluate("() => performance.now()")
    page.evaluate(
        "() => { const grid = document.querySelector('.ag-body-viewport'); "
        "grid.scrollTop = grid.scrollHeight; }"
    )
    end = f"() => [...{rows}].some(r => r.getAttribute('row-index') === '{LAYERS - 1}')"
    facts["scrolled_to_end_s"] = (
        _until(page, f"{end} ? performance.now() : 0", None) - began
    ) / 1e3
    began = page.evaluate("() => performance.now()")
    page.get_by_label("module Filter Input").first.fill("model.layers.777.part_3")
    found = f"() => {rows}.length === 1 ? performance.now() : 0"
    facts["filtered_s"] = (_until(page, found, None) - began) / 1e3
    began = page.evaluate("() => performance.now()")
    page.locator(".ag-row .ag-selection-checkbox input").first.click()
    facts["row_drawn_s"] = (_until(page, _PLOTS, 1) - began) / 1e3
    return {**{name: round(value, 3) for name, value in facts.items()}, "requests": answers}


def _until(page: Page, condition: str, argument: Any) -> float:
    handle = page.wait_for_function(condition, arg=argument, polling="raf", timeout=LONGEST_MS)
    return float(handle.json_value())


def _until_quiet(page: Page, server: Server, seconds: float = 0.7) -> None:
    """Until the server has nothing new to say but beats."""
    known, since = -1, time.monotonic()
    while time.monotonic() - since < seconds:
        page.wait_for_timeout(100)
        count = len([a for a in server.answers() if _is_of_zoom(a)])
        if count != known:
            known, since = count, time.monotonic()


def _drag(page: Page) -> None:
    box = page.locator("#panels .panel .nsewdrag").first.bounding_box()
    assert box is not None
    height = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 0.45 * box["width"], height)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.55 * box["width"], height, steps=5)
    page.mouse.up()


def _is_of_zoom(answer: dict[str, Any]) -> bool:
    changed = answer.get("changed", "")
    return "within" in changed or "view" in changed or "again" in changed


def _by_beat(answers: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Answers since each beat began until the next, in the order in which they were asked for."""
    groups: list[list[dict[str, Any]]] = []
    newest = None
    for answer in sorted(answers, key=lambda one: one["at"]):
        beat = answer.get("beat")
        if beat is not None and beat != newest and "beat" in answer["changed"]:
            groups.append([])
            newest = beat
        if groups:
            groups[-1].append(answer)
    return groups


def _by_output(answers: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """How often each thing was asked for, and what the median and the worst answer took."""
    found: dict[str, list[dict[str, Any]]] = {}
    for answer in answers:
        found.setdefault(answer.get("output") or _kind(answer["path"]), []).append(answer)
    return {
        output: {
            "count": len(group),
            "ms": round(statistics.median(a["ms"] for a in group), 1),
            "ms_worst": round(max(a["ms"] for a in group), 1),
            "kb": round(statistics.median(a["sent"] for a in group) / 1e3, 2),
            "asked_kb": round(statistics.median(a["asked"] for a in group) / 1e3, 2),
        }
        for output, group in sorted(found.items())
    }


def _kind(path: str) -> str:
    return "scripts and styles" if "suites" in path or "assets" in path else path
