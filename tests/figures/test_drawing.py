import json

import numpy as np
import plotly.graph_objects as go
import pytest
from plotly.utils import PlotlyJSONEncoder

from entropylens.dictionary import definition
from entropylens.figures.axes import Axis
from entropylens.figures.drawing import Mark, Span, draw, figure, marks_figure
from entropylens.figures.panels import PANELS, Shown, panel_of, unit_of
from entropylens.figures.thinning import POINTS

STEPS = np.arange(1, 4)
VALUES = np.array([1.0, 2.0, 3.0])


def test_what_is_no_number_breaks_the_line_and_is_marked_at_its_step() -> None:
    drawn = draw(Shown("loss/mean", "loss"), STEPS, np.array([2.0, np.inf, 1.0]))
    line, cross = figure([drawn], unit="nats")["data"]
    assert np.isnan(line["y"]).tolist() == [False, True, False]
    assert cross["x"].tolist() == [2]
    assert (cross["name"], cross["yaxis"]) == ("loss: not a number", "y2")
    assert cross["showlegend"]


def test_spans_are_shaded_and_the_first_is_labelled() -> None:
    spans = [Span(2, 3, "<out>"), Span(5, 6, "out")]
    document = figure([draw(Shown("a", "a"), STEPS, VALUES)], unit="", spans=spans)
    shapes = document["layout"]["shapes"]
    assert [(s["x0"], s["x1"]) for s in shapes] == [(2, 3), (5, 6)]
    assert [a["text"] for a in document["layout"]["annotations"]] == ["&lt;out&gt;"]


def test_a_band_fills_between_its_edges() -> None:
    low, high = (
        draw(Shown("q", "q", role=role), STEPS, np.full(3, value))
        for role, value in (("low", 0.0), ("high", 1.0))
    )
    below, above = figure([low, high], unit="")["data"]
    assert "fill" not in below
    assert above["fill"] == "tonexty"
    assert (below["showlegend"], above["showlegend"]) == (False, True)


def test_the_axis_says_how_many_of_how_many_points_are_drawn() -> None:
    steps = np.arange(50_000)
    drawn = draw(Shown("a", "a"), steps, np.cos(steps))
    title = figure([drawn], unit="")["layout"]["xaxis"]["title"]["text"]
    assert len(drawn.x) <= POINTS
    assert title == f"optimiser step · {len(drawn.x):,} of 50,000 points"


def test_time_is_told_to_plotly_in_milliseconds_and_the_view_as_a_date() -> None:
    times = np.array([1.7e9, 1.7e9 + 0.5, 1.7e9 + 1])
    drawn = draw(Shown("a", "a"), STEPS, VALUES, times)
    document = figure([drawn], unit="", axis=Axis("time", (1.7e9, 1.7e9 + 1)))
    assert document["data"][0]["x"].tolist() == [1.7e12, 1.7e12 + 500, 1.7e12 + 1000]
    assert document["layout"]["xaxis"]["range"][0] == "2023-11-14 22:13:20.000000"


def test_names_from_a_log_are_text() -> None:
    evil = "<a href='javascript:alert(1)'>x</a>"
    drawn = draw(Shown("a", evil), STEPS, VALUES)
    lane = marks_figure([Mark(1, evil, "error", evil)], Axis())
    shown = json.dumps([figure([drawn], unit=""), lane], cls=PlotlyJSONEncoder)
    assert "<a" not in shown
    assert "&lt;a" in shown


def test_grave_marks_are_lines_and_all_stand_in_their_lane() -> None:
    marks = [Mark(1, "alarm", "error", "bad"), Mark(2, "run/start", "info", "begins")]
    drawn = draw(Shown("a", "a"), STEPS, VALUES)
    shapes = figure([drawn], unit="", marks=marks, reference=1.0)["layout"]["shapes"]
    assert [(s["x0"], s.get("y0")) for s in shapes] == [(1, 0), (0, 1.0)]
    lane = marks_figure(marks, Axis())
    assert [len(trace["x"]) for trace in lane["data"]] == [1, 0, 1]
    assert lane["data"][2]["text"] == ["alarm: bad"]


@pytest.mark.parametrize("is_small", [False, True])
def test_plotly_accepts_every_attribute(is_small: bool) -> None:
    drawn = [
        draw(Shown("a", "a", role="low"), STEPS, VALUES),
        draw(Shown("a", "a", role="high"), STEPS, 2 * VALUES),
        draw(Shown("a", "a"), STEPS, 1.5 * VALUES),
    ]
    marks = [Mark(1, "alarm", "warning", "x")]
    for axis in (Axis(), Axis("time", (1.0, 2.0)), Axis("hours")):
        document = figure(
            drawn, unit="nats", axis=axis, logarithmic=True, marks=marks, is_small=is_small
        )
        go.Figure(document)
        go.Figure(marks_figure(marks, axis))


def test_panels_have_keys_of_their_own_and_pairs_of_edges() -> None:
    assert len({panel.key for panel in PANELS}) == len(PANELS)
    for panel in PANELS:
        roles = [shown.role for shown in panel.series if shown.role != "line"]
        assert roles == ["low", "high"] * (len(roles) // 2)


@pytest.mark.parametrize(
    "key", ["change", "covariance", "groups", "diversity", "ratio", "mismatch", "length"]
)
def test_what_a_panel_of_a_policy_shows_is_measured_and_of_one_unit(key: str) -> None:
    panel = next(panel for panel in PANELS if panel.key == key)
    assert len({definition(name).unit for name in panel.names}) == 1


def test_a_panel_of_picked_names_and_units() -> None:
    assert panel_of(["x", "y"]).names == ("x", "y")
    assert unit_of("entropy/token/mean") == "nats"
    assert unit_of("learning_rate") == unit_of("no/such") == ""


def test_a_time_that_is_not_known_leaves_a_gap() -> None:
    times = np.array([1e9, np.nan, 1e9 + 5])
    one = draw(Shown("a", "a"), np.arange(3), np.arange(3.0), times)
    x = figure([one], unit="", axis=Axis("time"))["data"][0]["x"]
    np.testing.assert_array_equal(x, [1e12, np.nan, 1e12 + 5000])


def test_a_figure_without_a_series_is_empty() -> None:
    found = figure([], unit="nats")
    assert found["data"] == []
    assert found["layout"]["xaxis"]["title"]["text"] == "optimiser step · 0 points"


def test_the_axis_of_a_constant_begins_at_0() -> None:
    ranges = [
        figure([draw(Shown("a", "a"), STEPS, values)], unit="")["layout"]["yaxis"].get("rangemode")
        for values in (np.full(3, 2.0), VALUES)
    ]
    assert ranges == ["tozero", None]
