import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import step_bound
from benchmarks.step_bound import Timer, Training, figures, is_enough, look, rows_of, share, tables
from entropylens.capture.asking import asked


def small() -> tuple[nn.Module, list[torch.Tensor], list[torch.Tensor]]:
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))
    return model, [*torch.randn(4, 32, 8)], [*torch.randint(0, 3, (4, 32))]


def raw(bounded: float, *, exact: bool = True) -> dict[str, Any]:
    method = {"ours_seconds": [0.1, 0.2, 0.3], "other_seconds": [1.0, 1.0, 2.0], "looks": 3}
    taken = [0.5, 1.0, 3.0]
    budgets = ("eighth", "quarter", "all", "all_states")
    return {
        "parameters": 1000,
        "ordinary": {
            "bare_seconds": [[8.0, 10.0], [8.0, 10.0], [8.0, 10.0]],
            "bounded_seconds": [[bounded, 11.0], [bounded + 0.1, 11.0], [bounded - 0.1, 99.0]],
            "block": 8,
            "looks": 0,
            "interventions": 0,
        },
        "methods": {name: {**method, "steps": 6} for name in step_bound.METHODS},
        "look": {
            "bare": [2.0, 1.0, 9.0],
            "forward_mode": dict.fromkeys(budgets, taken if exact else [None, None, None]),
            "finite_difference": dict.fromkeys(budgets, taken),
        },
    }


def test_a_share_is_the_median_difference_of_pairs_over_the_median_bare_block() -> None:
    # Differences 1, 1, 2, 3, -50; their absolute deviations from 1 are 0, 0, 1, 2, 51.
    found, half = share([10, 20, 40, 30, 60], [11, 21, 42, 33, 10])
    assert found == pytest.approx(1 / 30)
    assert half == pytest.approx(1.96 * 1.2533 * 1.4826 * 1.0 / 5**0.5 / 30)


def test_there_are_enough_pairs_when_the_interval_is_narrow_and_not_before() -> None:
    narrow: Any = {"bare": [(1.0, 9.0)] * 8, "bounded": [(1.1, 5.0)] * 8}
    wide: Any = {"bare": [(1.0, 1.0)] * 4, "bounded": [(1.0, 1.0), (2.0, 1.0)] * 2}
    assert is_enough(narrow, spent=21.0)
    assert not is_enough(narrow, spent=19.0)
    assert is_enough({name: some * 25 for name, some in narrow.items()}, spent=1.0)
    assert not is_enough(wide, spent=500.0)


def test_figures_are_those_of_the_worst_model_and_by_model() -> None:
    found = figures({"cheap": raw(8.08), "dear": raw(8.8, exact=False)})
    assert found["mean_cost_share"] == pytest.approx(0.1)
    assert found["mean_cost_share_by_model"] == pytest.approx({"cheap": 0.01, "dear": 0.1})
    dear = found["models"]["dear"]
    assert dear["ms_a_step"] == pytest.approx(1000.0)
    assert dear["ordinary"]["by_clock"] == pytest.approx(0.1)
    assert dear["ordinary"]["microseconds_a_step"] == pytest.approx(1e5)
    assert (dear["ordinary"]["pairs"], dear["ordinary"]["steps"]) == (3, 24)
    assert dear["methods"]["radius"] == {"share": pytest.approx(0.2), "looks_a_step": 0.5}
    # A method that was replaced by the other is not known, a look is told in steps.
    assert dear["look"]["forward_mode"]["all"] is None
    assert dear["look"]["finite_difference"]["all"] == pytest.approx(0.5)
    assert json.loads(json.dumps(found)) == found
    assert [table.row_count for table in tables(found)] == [2, 2]


def test_without_a_model_there_is_no_worst() -> None:
    assert figures({})["mean_cost_share"] is None


def test_nested_entries_are_timed_once_and_an_empty_call_takes_nothing() -> None:
    timer = Timer()
    timer.around(lambda: timer.around(burn)(0.01))()
    assert 0.009 < timer.seconds < 0.019
    timer.reset()
    for _ in range(100):
        timer.around(lambda: None)()
    assert -1e-3 < timer.seconds < timer.raw_seconds < 2e-3


def burn(seconds: float) -> None:
    began = time.process_time()
    while time.process_time() - began < seconds:
        pass


def test_budgets_are_of_the_rows_and_all_states_are_all_places() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    inputs = torch.randint(0, 5, (16, 100))
    before = {name: p.detach() for name, p in model.named_parameters()}
    update = {name: 1e-3 * torch.randn_like(p) for name, p in before.items()}
    model_asked = asked(model)
    states = {
        (part, whole): look(
            model_asked, rows_of(model, inputs, inputs, part), before, update, whole=whole
        )
        for part in (1 / 8, 1.0)
        for whole in (False, True)
    }
    assert {key: len(logits) for key, (logits, _) in states.items()} == {
        (1 / 8, False): 200,
        (1 / 8, True): 200,
        (1.0, False): 256,
        (1.0, True): 1600,
    }
    after = torch.func.functional_call(model, {n: p + update[n] for n, p in before.items()}, inputs)
    change = (after - model(inputs)).flatten(0, 1)
    torch.testing.assert_close(states[1.0, True][1], change, atol=1e-4, rtol=1e-2)
    assert model_asked.limit == 256


def test_what_is_set_aside_leaves_no_hook_and_comes_back_without_a_look() -> None:
    training = Training(small)
    guard = training.bound("combined")
    calls = guard._memory.steps
    with step_bound.set_aside(training):
        training.run(30)
        assert guard._memory.steps == calls
    # Batch norm went on by itself, and that is not held against the next batch.
    assert float(guard._statistics.moved()) == 0
    training.run(8)
    assert guard._memory.steps == calls + 8
    assert (guard.looks, guard.interventions) == (0, 0)
    training.unbound()
    assert not training.model._forward_hooks
    assert not training.optimizer._optimizer_step_pre_hooks


def test_a_model_is_measured_written_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step_bound, "MODELS", {"small": small})
    monkeypatch.setattr(step_bound, "KEPT", tmp_path / "kept")
    out = tmp_path / "results" / "found.json"
    for options in (["--seconds", "0.1"], ["--report"]):
        monkeypatch.setattr("sys.argv", ["step_bound", *options, "--out", str(out)])
        assert step_bound.main() == 0
        found = json.loads(out.read_text())
        assert list(found["mean_cost_share_by_model"]) == ["small"]
        model = found["models"]["small"]
        assert model["ordinary"]["looks"] == model["methods"]["combined"]["looks_a_step"] == 0
        assert model["methods"]["radius"]["looks_a_step"] == 1
        assert model["methods"]["update_norm"]["looks_a_step"] == 0
        assert model["look"]["forward_mode"]["all"] > 0
    assert "one look, in steps" in capsys.readouterr().out
