import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from entropylens.analysis.overview import number, read_curves, read_overview, sentences
from entropylens.analysis.report import write_report
from entropylens.store.reader import Run, open_run
from entropylens.store.writer import RunWriter

NASTY = "</script><script>alert(1)</script> & <b>"


def written(path: Path, *, steps: int = 200, loss: Any = None, name: str = "tidy") -> Run:
    """A run whose learning rate and loss jump at step 121."""
    writer = RunWriter(path, name=name, config={"preset": "full", "model": NASTY})
    generator = np.random.default_rng(0)
    for step in range(1, steps + 1):
        out = 121 <= step <= 140
        values = {
            "loss/mean": (6.0 if out else 3.0) + 0.05 * generator.standard_normal(),
            "learning_rate": 0.3 if 121 <= step <= 125 else 0.01,
            "entropy/token/mean": 4.0 if out else 2.0,
            **{f"entropy/token/p{q}": 2.0 + int(q) / 50 for q in ("05", "25", "50", "75", "95")},
            "gradient/norm/before_clip": 40.0 if step == 122 else 1.0,
            "throughput/tokens_per_second": 1000.0,
            "step/seconds": 0.5,
            "tokens/seen": 100.0 * step,
            "overhead/fraction": 0.01,
        }
        if loss is not None:
            values["loss/mean"] = loss(step)
        writer.write("metrics", {"step": step, "name": [*values], "value": [*values.values()]})
        tokens = {"token_id": [5] * 4, "text": NASTY, "selection": "uniform", "sequence": 0}
        surprisal = (4.0 if out else 1.0) + 0.1 * generator.standard_normal(4)
        writer.write("tokens", {"step": step, "logprob": -surprisal, **tokens})
        sample = {"sample_id": [NASTY], "sequence": 0, "tokens": 9, "measured_tokens": 3}
        sample |= {"loss": 5.0, "entropy": 2.0, "selection": "highest_loss"}
        writer.write("samples", {"step": step, **sample})
        writer.step = step
    writer.close()
    return open_run(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return written(tmp_path_factory.mktemp("runs") / "run")


def test_sentences_say_what_was_planted(run: Run) -> None:
    said = "\n".join(sentences(read_overview(run)))
    assert "The run finished after 200 optimiser steps in 100 s of training." in said
    assert re.search(
        r"At step 121 the loss left its range \(median 3(\.0\d)?\) and reached 6\.\d+ at step "
        r"1[23]\d; it was back in its former range at step 141\.",
        said,
    )
    assert (
        "At step 121 the learning rate jumped from 0.01 to 0.3, 30 times as high; the loss left "
        "its range in the same step." in said
    )
    assert "Mean token entropy was 2 nats before the loss left its range and 4 while" in said
    assert "median of 1 and was largest at step 122: 40." in said
    assert "entropylens took 1.0% of wall time." in said


def test_the_page_is_whole_alone_and_harmless(run: Run, tmp_path: Path) -> None:
    page = write_report(run, tmp_path / "report.html").read_text()
    assert len(page) < 10_000_000
    assert "alert(1)</script>" not in page
    assert "&lt;/script&gt;" in page
    own = page.replace(page[page.index("<script>") : page.index("const figures")], "")
    assert not re.search(r"(src|href)\s*=|url\(|@import|https?://", own)
    for title in ("Loss", "Token entropy", "Learning rate", "Throughput", "Gradient norm"):
        assert f"<h2>{title}</h2>" in page
    for part in ("Tokens that changed most", "Samples with the highest loss", "run/end"):
        assert part in page
    assert "prefers-color-scheme: dark" in page


def test_the_figures_hold_the_logs_values(run: Run, tmp_path: Path) -> None:
    page = write_report(run, tmp_path / "report.html").read_text()
    figures = json.loads(re.search(r"const figures = (.*);\n", page)[1])  # type: ignore[index]
    assert {"loss", "entropy", "rate", "gradient", "speed", "cost"} == set(figures)
    shades = figures["loss"]["layout"]["shapes"]
    assert [(s["x0"], s["x1"]) for s in shades] == [(120.5, 141.5)]
    titles = {t["name"] for t in figures["entropy"]["data"] if t.get("showlegend", True)}
    assert titles == {"5-95 %", "median", "mean"}


def test_a_token_that_became_surprising_is_named(run: Run) -> None:
    (change,) = read_overview(run).tokens
    assert change.text == NASTY
    assert change.before == pytest.approx(1.0, abs=0.1)
    assert change.change == pytest.approx(3.0 * 20 / 41, abs=0.1)  # out in 20 of 41 steps


def test_an_empty_run_and_a_run_of_nan_have_a_report(tmp_path: Path) -> None:
    RunWriter(tmp_path / "empty").close()
    empty = open_run(tmp_path / "empty")
    assert write_report(empty, tmp_path / "empty.html").exists()
    assert sentences(read_overview(empty))[0].startswith("The run finished after 0 optimiser")
    bad = written(tmp_path / "bad", steps=60, loss=lambda step: np.nan)
    assert "Not one loss was a finite number." in sentences(read_overview(bad))
    write_report(bad, tmp_path / "bad.html")


def test_a_loss_that_became_nan_is_the_worst_spike(tmp_path: Path) -> None:
    found = written(tmp_path / "run", steps=80, loss=lambda step: np.nan if step >= 60 else 3.0)
    overview = read_overview(found)
    assert overview.worst is not None
    assert (overview.worst.start, overview.worst.end) == (60, None)
    said = "\n".join(sentences(overview))
    assert "not a finite number in 21 steps, the first of them step 60" in said
    assert "reached NaN at step 60; it had not come back by the end" in said
    figures = write_report(found, tmp_path / "report.html").read_text()
    assert "training: not a number" in figures


def test_a_crashed_run_says_so(tmp_path: Path) -> None:
    found = written(tmp_path / "run", steps=30)
    status = found.path / "status" / "rank-000.json"
    told = json.loads(status.read_text())
    status.write_text(
        json.dumps({**told, "state": "running", "heartbeat": 0.0, "faults": {"x": 2}})
    )
    said = sentences(read_overview(open_run(found.path)))
    assert said[0].startswith("The process is gone without a word")
    assert "2 faults of the monitor were counted: x." in said


def test_ranks_are_drawn_as_one_series(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run")
    for weight, value in ((1.0, 2.0), (3.0, 6.0)):
        row = {"name": ["entropy/token/mean"], "value": value, "weight": weight, "step": 1}
        writer.write("metrics", row)
    writer.close()
    curve = read_curves(open_run(tmp_path / "run"))["entropy/token/mean"]
    assert len(curve.steps) == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1234.5, "1,230"),
        (1.0, "1"),
        (-0.5, "-0.5"),
        (3.14159, "3.14"),
        (2e-7, "2.00e-07"),
        (float("inf"), "infinity"),
        (None, "unknown"),
    ],
)
def test_numbers_are_written_for_people(value: float | None, text: str) -> None:
    assert number(value) == text
