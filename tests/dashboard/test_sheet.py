from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs_to_show import fill, write

from entropylens.figures.panels import PANELS, Shown, panel_of
from entropylens.figures.thinning import smoothed
from entropylens.store.reader import open_run
from entropylens_dashboard.news import added
from entropylens_dashboard.readings import Readings
from entropylens_dashboard.sheet import POINTS, Ask, Sheet, View


def sheet(folder: Path, view: View | None = None, names: Any = ("loss/mean",), **more: Any) -> Any:
    """A panel a name, a line a run."""
    runs = {path.name: open_run(path) for path in sorted(folder.iterdir())}
    panels = [(panel_of([n]), [Ask(r, Shown(n, r, "blue")) for r in runs]) for n in names]
    return Sheet(runs, panels, view or View(), **more)


def drawn(made: Sheet, readings: Readings | None = None) -> list[Any]:
    made.read(readings or Readings())
    return list(made.pictures())


def news(*arguments: Any) -> Any:
    found = added(*arguments)
    assert found is not None
    return found


def patched(figure: dict[str, Any], patch: Any) -> dict[str, Any]:
    """What the browser makes of a patch."""
    for change in patch.to_plotly_json()["operations"]:
        *way, last = change["location"]
        place = figure
        for key in way:
            place = place[key]
        if change["operation"] == "Assign":
            place[last] = change["params"]["value"]
        else:
            assert change["operation"] == "Extend"
            place[last] = [*np.asarray(place[last]).tolist(), *change["params"]["value"]]
    return figure


def test_vital_signs_show_only_what_a_run_has(folder: Path, make: Any) -> None:
    make("run")
    run = open_run(folder / "run")
    made = Sheet({"a": run}, [(p, [Ask("a", s) for s in p.series]) for p in PANELS], View())
    keys = [picture.panel.key for picture in drawn(made)]
    assert keys == ["entropy", "loss", "gradient", "rate", "speed", "cost"]


@pytest.mark.parametrize("smoothing", [0.0, 0.9])
def test_a_beat_adds_just_what_came(folder: Path, make: Any, smoothing: float) -> None:
    writer, readings = make("run"), Readings()
    view = View(smoothing=smoothing)
    names = ("loss/mean", "entropy/token/mean")
    first = sheet(folder, view, names)
    pictures = drawn(first, readings)
    ledger = first.ledger(pictures)
    fill(writer, 301, 305)
    write(writer, "loss/mean", [306], [np.nan])
    writer.flush()
    patches, kept = news(sheet(folder, view, names), Readings(), ledger)  # any process answers
    figure = patched(pictures[0].figure, patches["loss/mean"])
    line = figure["data"][0]
    rows = open_run(folder / "run").metrics("loss/mean").to_pandas().sort_values("step")
    values = rows["value"].to_numpy()
    assert line["x"] == list(range(1, 307))
    assert line["y"][:-1] == pytest.approx(values[:-1], rel=1e-6)
    assert line["y"][-1] is None
    assert figure["data"][-1]["x"] == [306]
    assert figure["data"][-1]["showlegend"] is True
    assert figure["layout"]["xaxis"]["title"]["text"] == "optimiser step · 306 points"
    if smoothing:
        expected, _ = smoothed(values, smoothing)
        assert figure["data"][1]["y"][:-1] == pytest.approx(expected[:-1], rel=1e-5)
    again, same = news(sheet(folder, view, names), readings, kept)
    assert again == {}
    assert same == kept
    fill(writer, 307, 309)
    writer.flush()
    patches, _ = news(sheet(folder, view, names), readings, kept)
    figure = patched(figure, patches["loss/mean"])
    assert figure["data"][0]["x"] == list(range(1, 310))
    assert figure["layout"]["xaxis"]["range"][1] > 309
    if smoothing:
        rows = open_run(folder / "run").metrics("loss/mean").to_pandas().sort_values("step")
        expected, _ = smoothed(rows["value"].to_numpy(), smoothing)
        assert figure["data"][1]["y"][-3:] == pytest.approx(expected[-3:], rel=1e-5)


def test_a_beat_asks_for_new_figures_where_adding_will_not_do(folder: Path, make: Any) -> None:
    writer, readings = make("run"), Readings()
    names = ("loss/mean", "user/late")
    first = sheet(folder, names=names)
    ledger = first.ledger(drawn(first, readings))
    write(writer, "user/late", [301], [1.0])
    writer.flush()
    assert added(sheet(folder, names=names), readings, ledger) is None  # a series that is new
    first = sheet(folder)
    ledger = first.ledger(drawn(first, readings))
    fill(writer, 302, 1000)
    writer.flush()
    assert added(sheet(folder), readings, ledger) is None  # too much at once


def test_a_view_that_does_not_reach_the_end_is_left_alone(folder: Path, make: Any) -> None:
    writer, readings = make("run"), Readings()
    for within, expected in (((10, 20), True), ((250, 400), False)):
        view = View(within=within)
        first = sheet(folder, view)
        ledger = first.ledger(drawn(first, readings))
        fill(writer, *((301, 302) if expected else (303, 304)))
        writer.flush()
        answer = added(sheet(folder, view), readings, ledger)
        assert (answer == ({}, ledger)) is expected
        assert expected or answer is None


def test_zooming_in_gives_every_point(folder: Path, make: Any) -> None:
    make("run", steps=20_000).close()
    whole = drawn(sheet(folder))[0].figure["data"][0]
    assert len(whole["x"]) <= POINTS
    narrow = drawn(sheet(folder, View(within=(1000, 1100))))[0]
    assert narrow.figure["data"][0]["x"].tolist() == list(range(975, 1126))
    assert narrow.figure["layout"]["xaxis"]["range"] == [1000, 1100]
    title = narrow.figure["layout"]["xaxis"]["title"]["text"]
    assert title == "optimiser step · 151 of 20,000 points"


def test_tokens_and_time_are_places_too(folder: Path, make: Any) -> None:
    make("run")
    tokens = drawn(sheet(folder, View(by="tokens")))[0].figure
    assert tokens["data"][0]["x"].tolist() == [64.0 * step for step in range(1, 301)]
    clock = drawn(sheet(folder, View(by="time")))[0].figure
    assert clock["data"][0]["x"][0] == 1_700_000_001_000
    hours = drawn(sheet(folder, View(by="time"), hours=True))[0].figure
    assert hours["data"][0]["x"][-1] == pytest.approx(299 / 3600)
    cut = drawn(sheet(folder, View(by="tokens", within=(640, 1280))))[0].figure
    assert cut["data"][0]["x"].tolist() == [64.0 * s for s in range(8, 23)]


def test_the_average_is_of_all_values_also_of_those_out_of_view(folder: Path, make: Any) -> None:
    make("run", steps=5000).close()
    values = open_run(folder / "run").metrics("loss/mean").to_pandas()["value"].to_numpy()
    expected, _ = smoothed(values, 0.99)
    view = View(smoothing=0.99, within=(4000, 4100))
    line = drawn(sheet(folder, view))[0].figure["data"][1]
    at = line["x"].tolist().index(4050)
    assert line["y"][at] == pytest.approx(expected[4049], rel=1e-12)


def test_a_ratio_is_one_for_the_baseline_and_drawn_anew_on_news(folder: Path, make: Any) -> None:
    writer = make("a")
    other = make("b", steps=0)
    write(other, "loss/mean", np.arange(1, 301), np.full(300, 3.0))
    other.flush()
    readings = Readings()
    made = sheet(folder, baseline="a")
    pictures = drawn(made, readings)
    figure = pictures[0].figure
    assert figure["data"][0]["y"].tolist() == [1.0] * 300
    loss = open_run(folder / "a").metrics("loss/mean").to_pandas()["value"].to_numpy()
    assert figure["data"][2]["y"] == pytest.approx(3.0 / loss)
    assert pictures[0].unit == "ratio to the baseline"
    ledger = made.ledger(pictures)
    assert added(sheet(folder, baseline="a"), readings, ledger) == ({}, ledger)
    fill(writer, 301, 302)
    writer.flush()
    assert added(sheet(folder, baseline="a"), readings, ledger) is None


@pytest.mark.parametrize(
    ("controls", "within", "expected"),
    [
        ({}, None, View()),
        ({"by": "<script>", "smooth": "x", "scale": 3}, "no", View()),
        (
            {"by": "time", "smooth": "5", "scale": "log"},
            ["1", "2"],
            View("time", 0.999, True, (1, 2)),
        ),
        ({"smooth": float("nan")}, [2, 1], View()),
        ({"smooth": -1}, [0, float("inf")], View()),
        ({"scale": "linear"}, [0, 1, 2], View(logarithmic=False)),
    ],
)
def test_a_view_takes_nothing_from_a_browser_on_trust(
    controls: Any, within: Any, expected: View
) -> None:
    assert View.parse(controls, within) == expected


def test_a_resume_has_figures_drawn_anew(folder: Path, make: Any) -> None:
    from entropylens.store.writer import RunWriter

    make("run").close()
    readings = Readings()
    first = sheet(folder)
    ledger = first.ledger(drawn(first, readings))
    again = RunWriter(folder / "run", resume_step=100)
    fill(again, 101, 103, seed=5)
    again.close()
    assert added(sheet(folder), readings, ledger) is None


def test_points_of_another_view_are_not_added(folder: Path, make: Any) -> None:
    writer, readings = make("run"), Readings()
    first = sheet(folder)
    ledger = first.ledger(drawn(first, readings))
    fill(writer, 301, 302)
    writer.flush()
    assert added(sheet(folder, View(by="time")), readings, ledger) == ({}, ledger)


def test_hours_are_counted_from_the_runs_start_whatever_is_shown(folder: Path, make: Any) -> None:
    writer = make("run")
    write(writer, "user/late", [290, 300], [1.0, 2.0])
    writer.flush()
    late = drawn(sheet(folder, View(by="time"), ("user/late",), hours=True))[0].figure
    assert late["data"][0]["x"].tolist() == pytest.approx([289 / 3600, 299 / 3600])
    first = sheet(folder, View(by="time"), hours=True)
    ledger = first.ledger(drawn(first))
    fill(writer, 301, 301)
    writer.flush()
    patches, _ = news(sheet(folder, View(by="time"), hours=True), Readings(), ledger)
    operations = patches["loss/mean"].to_plotly_json()["operations"]
    assert operations[0]["params"]["value"] == pytest.approx([300 / 3600])
