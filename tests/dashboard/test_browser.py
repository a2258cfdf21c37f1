"""The pages as a person uses them, in a real browser."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import CHROMIUM, Witness, chromium, served
from playwright.sync_api import Browser, Page, expect
from runs_to_show import fill, write

from entropylens.store.writer import RunWriter
from entropylens_dashboard import app
from entropylens_dashboard.library import Library
from entropylens_dashboard.pages import panels, runs

pytestmark = [
    pytest.mark.xdist_group("browser"),
    pytest.mark.skipif(
        CHROMIUM is None and not os.environ.get("CI"), reason="no chromium: `make chromium`"
    ),
]

expect.set_options(timeout=20_000)  # the machine may be busy

EVIL = "<img src=x onerror=alert(1)><b>evil</b>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panels, "BEAT_MILLISECONDS", 400)
    monkeypatch.setattr(runs, "BEAT_MILLISECONDS", 500)
    monkeypatch.setattr(app, "Library", partial(Library, ttl=0.3))


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1366, "height": 768}, accept_downloads=True)
    found = context.new_page()
    found.set_default_timeout(15_000)
    yield found
    context.close()


def address(folder: Path, name: str) -> str:
    return "run/" + json.loads((folder / name / "run.json").read_text())["run_id"][:12]


def last_x(page: Page, panel: str = "Loss") -> float:
    figure = page.locator(f".panel[aria-label='{panel}'] .js-plotly-plot")
    return figure.evaluate("g => { const x = g.data[0].x; return x[x.length - 1]; }")


def until(page: Page, script: str, *given: Any) -> None:
    """Wait for a function to give what is true; the policy of the pages forbids it as text."""
    for _ in range(150):
        if page.evaluate(script, *given):
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"never true: {script}")


def drawn(page: Page, what: str, panel: str = "Loss") -> None:
    """Wait until something is true of a figure ``g``."""
    script = f"""panel => {{
        const g = document.querySelector(`.panel[aria-label='${{panel}}'] .js-plotly-plot`);
        return g && ({what});
    }}"""
    until(page, script, panel)


def view_of(page: Page, panel: str = "Loss") -> list[float]:
    figure = page.locator(f".panel[aria-label='{panel}'] .js-plotly-plot")
    return figure.evaluate("g => g.layout.xaxis.range")


def drag(page: Page, panel: str, start: float, end: float) -> None:
    """Zoom by drawing over a share of a figure."""
    box = page.locator(f".panel[aria-label='{panel}'] .nsewdrag").first.bounding_box()
    assert box is not None
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + start * box["width"], middle)
    page.mouse.down()
    page.mouse.move(box["x"] + end * box["width"], middle + 2, steps=4)
    page.mouse.up()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_page_opens_without_a_complaint(
    browser: Browser, folder: Path, make: Any, theme: Any
) -> None:
    for seed in (0, 1):
        make(f"base-{seed}", seed=seed, lr=1e-3).close()
    bad = make("bad", lr=1e-2)
    write(bad, "loss/mean", np.arange(301, 330), np.full(29, np.nan))
    bad.event("alarm", "the loss is NaN", step=301, severity="error", rule="loss/finite")
    bad.close("failed", "ValueError: NaN")
    context = browser.new_context(viewport={"width": 1366, "height": 768}, color_scheme=theme)
    page = context.new_page()
    seen = Witness(page)
    with served(folder) as home:
        page.goto(home)
        rows = page.locator(".ag-center-cols-container .ag-row")
        expect(rows).to_have_count(3)
        expect(page.locator(".level-failing")).to_have_text("✕ failing")
        expect(page.locator(".level-healthy")).to_have_count(2)
        expect(page.locator("svg.spark")).to_have_count(9)
        page.get_by_role("link", name="bad").click()
        expect(page.locator(".panel .js-plotly-plot")).to_have_count(6)
        expect(page.locator(".verdict")).to_contain_text("failing")
        expect(page.locator("#events")).to_contain_text("the loss is NaN")
        expect(page.locator("#findings")).to_contain_text("The run failed")
        expect(page.locator(".panel[aria-label='Loss']")).to_contain_text("not a number")
        page.get_by_role("link", name="all series").click()
        expect(page.locator("#series-count")).to_have_text("12 series")
        page.locator(".ag-row input[type=checkbox]").first.click()
        expect(page.locator(".panel .js-plotly-plot")).to_have_count(1)
        page.get_by_role("link", name="Compare", exact=True).click()
        expect(page.locator(".panel .js-plotly-plot")).to_have_count(3)
        outcome = page.locator("#outcome .ag-center-cols-container .ag-row")
        expect(outcome).to_have_count(2)
        expect(page.locator("#settings")).to_contain_text("user.lr")
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert colour == {"light": "rgb(244, 245, 247)", "dark": "rgb(20, 23, 28)"}[theme]
        wide = page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert wide
        assert {re.match(r"\w+://[^/]+/", url)[0] for url in seen.addresses} == {home}  # type: ignore[index]
    assert seen.errors == []
    context.close()


def test_a_run_that_is_being_written_grows_on_the_page(page: Page, folder: Path, make: Any) -> None:
    writer, seen = make("live"), Witness(page)
    with served(folder) as home:
        page.goto(home + address(folder, "live"))
        expect(page.locator(".panel .js-plotly-plot")).to_have_count(6)
        assert last_x(page) == 300
        fill(writer, 301, 320)
        write(writer, "surprisal_gap/mean", [320], [0.1])
        drawn(page, "g.data[0].x.at(-1) === 320", "Loss")
        expect(page.locator(".panel[aria-label='Surprisal gap']")).to_be_visible()
        expect(page.locator("#head")).to_contain_text("320 steps")
        fill(writer, 321, 330)
        drawn(page, "g.data[0].x.length === 330", "Loss")
        writer.close()
        expect(page.locator("#head")).to_contain_text("finished")
    assert [error for error in seen.errors if "ERR_" not in error] == []


def test_a_zoom_reads_all_points_survives_the_beat_and_is_in_the_address(
    page: Page, folder: Path, make: Any
) -> None:
    writer = make("run", steps=5000)
    with served(folder) as home:
        page.goto(home + address(folder, "run"))
        loss = page.locator(".panel[aria-label='Loss']")
        expect(loss).to_contain_text("of 5,000 points")
        drag(page, "Loss", 0.50, 0.56)
        until(page, "new URL(location).searchParams.has('within')")
        low, high = (
            float(x)
            for x in page.evaluate("new URL(location).searchParams.get('within').split('~')")
        )
        assert 2_000 < low < high < 3_000
        drawn(page, "g.data[0].x[0] > 1000", "Loss")
        figure = page.locator(".panel[aria-label='Loss'] .js-plotly-plot")
        steps = figure.evaluate("g => g.data[0].x")
        inside = [x for x in steps if low <= x <= high]
        assert inside == list(range(int(np.ceil(low)), int(np.floor(high)) + 1))
        assert view_of(page, "Token entropy") == pytest.approx([low, high])
        fill(writer, 5001, 5010)
        page.wait_for_timeout(2500)
        assert view_of(page) == pytest.approx([low, high])
        page.reload()
        expect(loss.locator(".js-plotly-plot")).to_be_visible()
        assert view_of(page) == pytest.approx([low, high])
        page.keyboard.press("u")
        expect(loss).to_contain_text("of 5,010 points")
        page.get_by_text("log", exact=True).click()
        until(page, "new URL(location).searchParams.get('scale') === 'log'")
        drawn(page, "g.layout.yaxis.type === 'log'", "Loss")


def test_hidden_lines_stay_hidden_and_smoothing_leaves_the_raw_line_faint(
    page: Page, folder: Path, make: Any
) -> None:
    writer = make("run")
    with served(folder) as home:
        page.goto(home + address(folder, "run") + "?smooth=0.9")
        figure = page.locator(".panel[aria-label='Token entropy'] .js-plotly-plot")
        expect(figure).to_be_visible()
        roles = figure.evaluate("g => g.data.map(t => [t.meta[1], t.opacity])")
        assert ["line", 0.3] in roles
        assert any(role == "smooth" for role, _ in roles)
        figure.locator(".legendtoggle").first.click()
        page.wait_for_timeout(600)
        hidden = "g => g.data.map(t => t.visible)"
        before = figure.evaluate(hidden)
        assert "legendonly" in before
        fill(writer, 301, 305)
        drawn(page, "g.data[0].x.at(-1) === 305", "Token entropy")
        assert figure.evaluate(hidden) == before


def test_a_server_that_was_away_is_asked_again(page: Page, folder: Path, make: Any) -> None:
    writer = make("run")
    with served(folder) as home:
        port = int(home.rsplit(":", 1)[1].strip("/"))
        page.goto(home + address(folder, "run"))
        expect(page.locator(".panel .js-plotly-plot")).to_have_count(6)
    page.wait_for_timeout(1000)
    fill(writer, 301, 305)
    writer.flush()
    with served(folder, port=port):
        expect(page.locator("#stale")).to_contain_text("has not answered since")
        drawn(page, "g.data[0].x.at(-1) === 305")
        expect(page.locator("#stale")).to_be_empty()


def test_what_a_person_set_in_a_figure_survives_that_it_is_drawn_anew(
    page: Page, folder: Path, make: Any
) -> None:
    make("run")
    with served(folder) as home:
        page.goto(home + address(folder, "run"))
        figure = page.locator(".panel[aria-label='Token entropy'] .js-plotly-plot")
        expect(figure).to_be_visible()
        page.wait_for_timeout(600)
        figure.locator(".legendtoggle").last.click()
        drawn(page, "g.data.some(t => t.visible === 'legendonly')", "Token entropy")
        drag(page, "Loss", 0.2, 0.6)
        drawn(page, "g.layout.xaxis.range[0] > 20", "Token entropy")
        page.keyboard.press("u")
        drawn(page, "g.layout.xaxis.range[0] < 5", "Token entropy")
        assert "legendonly" in figure.evaluate("g => g.data.map(t => t.visible)")


def test_a_list_keeps_what_it_knew_of_a_run_that_goes_on(
    page: Page, folder: Path, make: Any
) -> None:
    writer = make("run")
    with served(folder) as home:
        page.goto(home)
        expect(page.locator("svg.spark")).to_have_count(3)
        fill(writer, 301, 310)
        writer.flush()
        writer.close("failed", "it burnt")
        expect(page.locator(".ag-row").get_by_text("310").first).to_be_visible()
        expect(page.locator(".level-failing")).to_have_count(1)
        expect(page.locator("svg.spark")).to_have_count(3)


def test_runs_that_are_picked_are_in_the_address_and_follow_the_clock(
    page: Page, folder: Path, make: Any
) -> None:
    for seed in range(2):
        make(f"run-{seed}", seed=seed)
    live = make("run-2", seed=2)
    seen = Witness(page)
    with served(folder) as home:
        ids = [address(folder, f"run-{n}").removeprefix("run/") for n in (0, 2)]
        page.goto(f"{home}compare?runs={ids[0]}&by=time")
        expect(page.locator(".panel .js-plotly-plot")).to_have_count(3)
        page.locator("main input:not([type=hidden]):not([type=radio])").first.click()
        page.get_by_role("option", name="run-2").click()
        until(page, "new URL(location).searchParams.get('runs').split(',').length === 2")
        page.reload()
        panel = "loss/mean"
        drawn(page, "g.data.filter(t => t.meta[1] === 'line').length === 2", panel)
        fill(live, 301, 303)
        live.flush()
        drawn(page, "g.data.filter(t => t.meta[1] === 'line')[1].x.length === 303", panel)
    assert seen.errors == []


def test_a_hidden_page_asks_for_nothing(page: Page, folder: Path, make: Any) -> None:
    make("run")
    seen = Witness(page)
    with served(folder) as home:
        page.goto(home + address(folder, "run"))
        expect(page.locator(".panel .js-plotly-plot")).to_have_count(6)
        page.evaluate(
            "Object.defineProperty(document, 'hidden', {value: true, configurable: true})"
        )
        page.wait_for_timeout(1000)
        quiet = len(seen.addresses)
        page.wait_for_timeout(1500)
        assert len(seen.addresses) == quiet
        page.evaluate(
            "Object.defineProperty(document, 'hidden', {value: false, configurable: true})"
        )
        page.wait_for_timeout(1000)
        assert len(seen.addresses) > quiet


def test_names_open_their_definition_and_keys_do_their_work(
    page: Page, folder: Path, make: Any
) -> None:
    make("run")
    with served(folder) as home:
        page.goto(home + address(folder, "run"))
        expect(page.locator(".panel .js-plotly-plot")).to_have_count(6)
        button = page.get_by_role("button", name="entropy/token/mean")
        button.focus()
        page.keyboard.press("Enter")
        definition = page.locator(".definition").first
        expect(definition).to_contain_text("How undecided is the model")
        expect(definition).to_contain_text("Shannon (1948)")
        page.keyboard.press("Escape")
        before = page.evaluate("document.documentElement.dataset.mantineColorScheme")
        page.locator("h1").click()
        page.keyboard.press("d")
        until(page, f"document.documentElement.dataset.mantineColorScheme !== {before!r}")
        page.keyboard.press("r")
        expect(page.locator("h1")).to_have_text("Runs")
        page.keyboard.press("/")
        page.keyboard.type("no such run")
        expect(page.locator(".ag-center-cols-container .ag-row")).to_have_count(0)


def test_text_from_a_log_is_text(page: Page, folder: Path, make: Any) -> None:
    writer = RunWriter(folder / "evil", name=EVIL, config={"user": {"lr": EVIL, "tags": [EVIL]}})
    fill(writer, 1, 50)
    write(writer, f"user/{EVIL}", np.arange(1, 51), np.ones(50))
    write(writer, "conditioning/kappa", [1, 2], [1.0, 2.0], module=EVIL)
    writer.event(f"alarm{EVIL}", EVIL, step=5, severity="error", rule=EVIL)
    writer.close("failed", EVIL)
    make("other").close()
    seen = Witness(page)
    with served(folder) as home:
        page.goto(home)
        expect(page.get_by_role("link", name=EVIL)).to_be_visible()
        page.get_by_role("link", name=EVIL).click()
        expect(page.locator("h1")).to_have_text(EVIL)
        expect(page.locator("#events")).to_contain_text(EVIL)
        page.goto(home + address(folder, "evil") + "?more=" + f"user/{EVIL}".replace("/", "%2F"))
        expect(page.locator(".panel .js-plotly-plot")).to_have_count(7)
        page.get_by_role("link", name="all series").click()
        expect(page.locator(".ag-row").get_by_text(EVIL).first).to_be_visible()
        page.get_by_role("link", name="Compare", exact=True).click()
        expect(page.locator("#settings")).to_contain_text(EVIL)
        assert page.locator("img[src='x'], main b:text-is('evil')").count() == 0
    assert seen.errors == []


def test_runs_that_cannot_be_read_say_why(page: Page, folder: Path, make: Any) -> None:
    make("empty", steps=0)
    make("gone").close()
    make("half").close()
    (folder / "half" / "run.json").write_text('{"format_ver')
    make("newer").close()
    manifest = json.loads((folder / "newer" / "run.json").read_text())
    (folder / "newer" / "run.json").write_text(json.dumps({**manifest, "format_version": 99}))
    seen = Witness(page)
    with served(folder) as home:
        page.goto(home)
        for state in ("starting", "half-written", "newer", "finished"):
            expect(page.locator(".ag-row").get_by_text(state).first).to_be_visible()
        page.get_by_role("link", name="half").click()
        expect(page.locator(".notice")).to_contain_text("run.json")
        page.goto(home + address(folder, "newer"))
        expect(page.locator(".notice")).to_contain_text("newer")
        page.goto(home + address(folder, "empty"))
        expect(page.locator("#panels .notice")).to_contain_text("No row of these series")
        page.goto(home + address(folder, "gone"))
        expect(page.locator(".panel .js-plotly-plot")).to_have_count(6)
        os.rename(folder / "gone", folder / "renamed")
        page.wait_for_timeout(1500)
        expect(page.locator("#verdict")).to_contain_text("healthy")
        shutil.rmtree(folder / "renamed")
        expect(page.locator("#verdict .notice")).to_contain_text("no longer in the folder")
        expect(page.locator(".panel .js-plotly-plot")).to_have_count(6)
        page.goto(home + "run/ffffffffffff")
        expect(page.locator("h1")).to_have_text("Not here")
    assert seen.errors == []


def test_chosen_runs_are_compared_and_divided_by_a_baseline(
    page: Page, folder: Path, make: Any
) -> None:
    for seed in range(3):
        make(f"run-{seed}", seed=seed).close()
    with served(folder) as home:
        page.goto(home)
        rows = page.locator(".ag-center-cols-container .ag-row")
        expect(rows).to_have_count(3)
        boxes = page.locator(".ag-row input[type=checkbox]")
        boxes.nth(0).click()
        boxes.nth(1).click()
        page.get_by_role("button", name="compare the chosen").click()
        page.wait_for_url("**/compare?runs=*")
        loss = page.locator(".panel[aria-label='loss/mean'] .js-plotly-plot")
        expect(loss).to_be_visible()
        lines = "g => g.data.filter(t => t.meta[1] === 'line').length"
        assert loss.evaluate(lines) == 2
        ids = page.evaluate("new URL(location).searchParams.get('runs')").split(",")
        page.goto(f"{home}compare?runs={','.join(ids)}&baseline={ids[0]}")
        expect(page.locator(".panel[aria-label='loss/mean']")).to_contain_text("ratio")
        assert set(loss.evaluate("g => g.data[0].y")) == {1}


def test_a_figure_can_be_taken_along(page: Page, folder: Path, make: Any, tmp_path: Path) -> None:
    make("run").close()
    with served(folder) as home:
        page.goto(home + address(folder, "run"))
        expect(page.locator(".panel .js-plotly-plot")).to_have_count(6)
        kinds = {
            "Picture (PNG)": b"\x89PNG",
            "Every value (CSV)": b"run,name",
            "Figure (HTML)": b"<!doctype html>",
        }
        for item, start in kinds.items():
            page.locator(".panel[aria-label='Loss'] button.menu").click()
            with page.expect_download() as download:
                page.get_by_text(item).click()
            path = tmp_path / "file"
            download.value.save_as(path)
            content = path.read_bytes()
            assert content.startswith(start)
            if item.endswith("(CSV)"):
                assert len(content.decode().splitlines()) == 301
            if item.endswith("(HTML)"):
                assert b"Plotly.newPlot" in content


def test_it_lives_under_a_prefix_and_behind_a_token(page: Page, folder: Path, make: Any) -> None:
    make("run").close()
    token = "correct horse battery staple"
    seen = Witness(page)
    with served(folder, prefix="/lens/", token=token) as home:
        answer = page.goto(home)
        assert answer is not None
        assert answer.status == 401
        page.get_by_role("textbox").fill(token)
        page.keyboard.press("Enter")
        page.get_by_role("link", name="run", exact=True).click()
        expect(page.locator(".panel .js-plotly-plot")).to_have_count(6)
        assert "/lens/run/" in page.url
        assert token not in page.url
    assert [e for e in seen.errors if "401" not in e] == []
