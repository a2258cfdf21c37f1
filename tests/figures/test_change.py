import numpy as np
import plotly.graph_objects as go

from entropylens.figures.change import cell_figure, course_figure, step_figure

NOTHING = np.zeros(0), np.zeros(0)


def test_each_step_is_a_dot_and_the_line_is_where_both_are_equal() -> None:
    predicted = np.linspace(-1, 2, 10_000)
    picture = step_figure(np.arange(10_000.0), predicted, 2 * predicted)
    dots, line = picture["data"]
    assert len(dots["x"]) == 2000
    np.testing.assert_array_equal(dots["y"], 2 * dots["x"])
    assert line["x"].tolist() == line["y"].tolist() == [-1, 2]
    title = picture["layout"]["xaxis"]["title"]["text"]
    assert title == "predicted to first order, nats · 2,000 of 10,000 steps"
    go.Figure(picture)


def test_the_sum_before_a_step_is_that_of_the_updates_before_it() -> None:
    changes = np.array([3.0, 4.0, 5.0]), np.array([1.0, -2.0, 0.5])
    entropy = np.array([2.0, 3.0, 5.0]), np.array([9.0, 2.0, 1.5])
    picture = course_figure(changes, changes, entropy)
    predicted, _, measured, _, course, _ = picture["data"]
    for line in (predicted, measured):
        assert (line["x"].tolist(), line["y"].tolist()) == ([3, 4, 5, 6], [0, 1, -1, -0.5])
    assert (course["x"].tolist(), course["y"].tolist()) == ([3, 5], [0, -0.5])
    names = [line["name"] for line in (predicted, measured, course)]
    assert names == ["sum of predicted", "sum of measured", "mean token entropy less its start"]
    assert len({line["line"]["dash"] for line in (predicted, measured, course)}) == 3
    go.Figure(picture)


def test_an_update_that_was_measured_stands_for_those_up_to_the_next() -> None:
    changes = np.array([10.0, 20.0, 40.0]), np.array([1.0, 2.0, 1.0])
    line, *_ = course_figure(NOTHING, changes, NOTHING)["data"]
    assert line["x"].tolist() == [10, 20, 40, 60]
    assert line["y"].tolist() == [0, 10, 50, 70]
    assert line["name"] == "sum of measured, each up to the next"
    single, *_ = course_figure(NOTHING, (np.array([7.0]), np.array([2.0])), NOTHING)["data"]
    assert (single["x"].tolist(), single["y"].tolist()) == ([7, 8], [0, 2])


def test_bars_tell_a_fall_from_a_rise_by_side_colour_and_pattern() -> None:
    picture = cell_figure({"falls": -2.0, "nothing": 0.0, "rises": 1.0})
    (bars,) = picture["data"]
    assert bars["y"] == ["falls", "nothing", "rises"]
    assert bars["text"] == ["-2.00", "+0.00", "+1.00"]
    assert bars["marker"]["pattern"]["shape"] == ["/", "", ""]
    assert bars["marker"]["color"][0] != bars["marker"]["color"][2]
    low, high = picture["layout"]["xaxis"]["range"]
    assert low < -2
    assert high > 1
    go.Figure(picture)
