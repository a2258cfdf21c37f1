import numpy as np

from entropylens.figures.law import forecast_figure, law_figure


def test_a_long_run_is_shown_by_evenly_spaced_steps() -> None:
    step = np.arange(10_000.0)
    picture = law_figure(step, np.ones(10_000), np.zeros(10_000), np.zeros(0), None)
    (dots,) = picture["data"]
    assert len(dots["x"]) == 2000
    assert (dots["customdata"][0], dots["customdata"][-1]) == (0, 9999)
    title = picture["layout"]["xaxis"]["title"]["text"]
    assert title == "mean token entropy, nats · 2,000 of 10,000 steps"


def test_the_band_of_the_law_lies_between_its_edges() -> None:
    grid = np.array([0.0, 1.0])
    edges = grid + 1, grid, grid + 2
    picture = law_figure(np.arange(3.0), np.ones(3), np.zeros(3), grid, edges)
    _, low, high, line, _ = picture["data"]
    assert low["y"].tolist() == [0, 1]
    assert (high["y"].tolist(), high["fill"]) == ([2, 3], "tonexty")
    assert (line["y"].tolist(), line["line"]["dash"]) == ([1, 2], "dash")


def test_entropy_is_shown_with_its_forecast_and_the_floor() -> None:
    step, ahead = np.arange(1, 101), np.arange(20.0, 100.0)
    path = np.stack([ahead * 0, ahead * 0 + 1, ahead * 0 + 2])
    picture = forecast_figure(step, np.ones(100), 0.1, ahead, path, 0.15)
    names = [trace["name"] for trace in picture["data"] if trace.get("showlegend", True)]
    assert names == ["interval", "forecast at 15%", "measured"]
    assert picture["layout"]["shapes"][0]["y0"] == 0.1
    bare = forecast_figure(step, np.ones(100), 0.1, np.zeros(0), np.zeros((3, 0)), 0.15)
    assert [t["name"] for t in bare["data"] if t["showlegend"]] == ["measured"]
