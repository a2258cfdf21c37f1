from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from entropylens.figures.series import POINTS, Line, Span, band_figure, line_figure, thin


@dataclass(frozen=True)
class Plain:
    steps: NDArray[np.int64]
    values: NDArray[np.float64]


def test_thinning_keeps_extremes_order_and_the_bound() -> None:
    steps = np.arange(100_000)
    values = np.sin(steps / 1000)
    values[54_321] = 40.0
    values[77_777] = -40.0
    kept, shown = thin(steps, values, 600)
    assert len(kept) <= 600
    assert (np.diff(kept) > 0).all()
    assert dict(zip(kept.tolist(), shown.tolist(), strict=True))[54_321] == 40.0
    assert shown.min() == -40.0


def test_a_short_series_is_left_alone_and_what_is_no_number_breaks_the_line() -> None:
    steps, values = thin(np.arange(3), np.array([1.0, np.inf, 2.0]))
    assert steps.tolist() == [0, 1, 2]
    assert np.isnan(values[1])
    long = np.zeros(9_000)
    long[4_000] = np.nan
    _, shown = thin(np.arange(9_000), long, 300)
    assert np.isnan(shown).sum() == 1


def test_what_is_no_number_is_marked_at_its_step() -> None:
    figure = line_figure(
        [Line("loss", Plain(np.arange(1, 4), np.array([2.0, np.nan, 1.0])))], unit="nats"
    )
    line, cross = figure.data
    assert (line.name, cross.name) == ("loss", "loss: not a number")
    assert list(cross.x) == [2]
    assert list(cross.y) == [1.0]


def test_spans_are_shaded_and_the_first_is_labelled() -> None:
    series = Plain(np.arange(9), np.arange(9.0))
    spans = [Span(2, 3, "out"), Span(5, 6, "out")]
    figure = line_figure([Line("a", series)], unit="1", spans=spans, logarithmic=True)
    assert [(s.x0, s.x1) for s in figure.layout.shapes] == [(1.5, 3.5), (4.5, 6.5)]
    assert [a.text for a in figure.layout.annotations] == ["out", ""]
    assert figure.layout.yaxis.type == "log"


def test_a_band_closes_around_its_quantiles() -> None:
    steps = np.arange(3)
    quantiles = {f"p{q}": Plain(steps, np.full(3, int(q) / 10)) for q in ("05", "95", "50")}
    figure = band_figure(quantiles, Plain(steps, np.ones(3)), unit="nats")
    names = [trace.name for trace in figure.data]
    assert names == ["5 to 95 % of tokens", "median", "mean"]
    assert list(figure.data[0].y) == [0.5] * 3 + [9.5] * 3


def test_a_long_band_is_thinned_too() -> None:
    steps = np.arange(50_000)
    quantiles = {k: Plain(steps, np.cos(steps)) for k in ("p05", "p25", "p50", "p75", "p95")}
    figure = band_figure(quantiles, Plain(steps, np.sin(steps)), unit="nats")
    assert [len(trace.x) <= 2 * POINTS for trace in figure.data] == [True] * 4
