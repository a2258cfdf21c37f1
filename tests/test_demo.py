import sys
from pathlib import Path

import pytest

from entropylens import demo
from entropylens.demo import run_demo
from entropylens.errors import EntropyLensError
from entropylens.store.reader import open_run
from entropylens.store.writer import RunWriter

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def test_the_demo_replaces_an_earlier_one_trains_watches_and_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "CORPUS_FILES", 20)
    out = tmp_path / "demo"
    RunWriter(out, config={"user": {"demo": True}}).close()
    assert run_demo(out, steps=20) == 0
    run = open_run(out)
    assert run.state() == "finished"
    assert run.status()[0].faults == {}
    loss = run.metrics("loss/mean").to_arrow()
    assert loss["step"].to_pylist() == list(range(1, 21))
    rates = run.metrics("learning_rate").to_arrow()["value"].to_pylist()
    assert rates[10] / rates[9] == pytest.approx(30, rel=0.2)
    assert (out / "report.html").stat().st_size < 10_000_000
    names = run.samples().to_arrow()["sample_id"].to_pylist()
    assert names
    assert all(".py:" in name for name in names)
    said = capsys.readouterr().out
    assert "The learning rate jumps 30-fold after 10 steps." in said
    assert "The run finished after 20 optimiser steps" in said
    assert f"entropylens show {out}" in said


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    RunWriter(tmp_path / "run").close()
    for name in ("mine", "run"):
        with pytest.raises(EntropyLensError, match="an earlier demo's that has ended"):
            run_demo(tmp_path / name, steps=20)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    assert open_run(tmp_path / "run").state() == "finished"


def test_too_few_steps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected at least 20 steps, got 3"):
        run_demo(tmp_path / "demo", steps=3)


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(EntropyLensError, match=r"pip install 'entropylens\[hf\]'"):
        run_demo(tmp_path / "demo", steps=20)
