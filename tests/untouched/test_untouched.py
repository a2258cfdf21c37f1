"""Weights, optimisers, schedulers, random states and losses are the same to the bit.

Each training of `untouched.trainings` runs bare once, then under every preset, then thinned.
"""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from untouched import in_lightning, in_transformers  # noqa: F401 - they register trainings
from untouched.trainings import STEPS, TRAININGS, Outcome, differences, hooks_left

import entropylens as el
from entropylens.schedule import PRESETS

pytestmark = pytest.mark.filterwarnings("ignore")

CELLS = sorted(TRAININGS)
WATCHES: dict[str, dict[str, Any]] = {
    **{preset: {"preset": preset} for preset in PRESETS},
    # Steps in which nothing is due, as a thinned run has them.
    "sparse": {"preset": "fast", "diagnostics": {"training_vitals": 5}},
}
INSIDE = ("weight", "representation", "attention")
WATCHES["full"] |= {
    "probe_set": el.ProbeSet(rows=8),
    "diagnostics": {n: 1 for n, found in el.all_diagnostics().items() if found.reads in INSIDE},
}


@cache
def bare(adapter: str, mode: str) -> Outcome:
    return TRAININGS[adapter, mode](None, Path(mkdtemp()))


@pytest.mark.parametrize(("adapter", "mode"), CELLS, ids=[": ".join(cell) for cell in CELLS])
def test_a_training_is_untouched(adapter: str, mode: str, tmp_path: Path) -> None:
    expected = bare(adapter, mode)
    for name, watch in WATCHES.items():
        found = TRAININGS[adapter, mode]({**watch, "max_overhead": None}, tmp_path / name)
        assert differences(expected.states, found.states) == []
        assert hooks_left(found) == []
        assert found.run_dir is not None
        run = el.open_run(found.run_dir)
        assert run.state() == "finished"
        assert run.status()[0].faults == {}
        steps = set(run.metrics("loss/mean").to_arrow()["step"].to_pylist())
        # Lightning ends an epoch with what has been accumulated so far.
        extra = (adapter, mode) == ("lightning", "accumulation")
        if name == "full":
            told = " ".join(row["message"] for row in run.events().to_arrow().to_pylist())
            is_seen = run.metrics("representation/norm").to_arrow().num_rows > 0
            assert is_seen or "no representation" in told or "no token statistics" in told
            assert run.metrics("conditioning/sigma_max").to_arrow().num_rows
        if name != "sparse":
            assert steps == set(range(1, STEPS + 1 + extra))


RADIUS = el.StepBound(policy="radius", mode="shadow", level=1e-6, warmup=1)
"""Looks at every step, and would scale each."""
TRIGGERS = el.StepBound(
    mode="shadow", warmup=2, gradient_factor=1.001, loss_factor=1.001, deviations=1e-3, factor=1.001
)
"""Takes everything for suspicious that is a little above the median."""
IN_SHADOW = {
    ("plain", "usual"): TRIGGERS,
    ("plain", "accumulation"): RADIUS,
    ("plain", "shown by hand"): RADIUS,
    ("plain", "gradient scaler"): RADIUS,
    ("plain", "gradient scaler, fused"): RADIUS,
    ("lightning", "automatic"): RADIUS,
    ("lightning", "accumulation"): RADIUS,
    ("lightning", "manual"): RADIUS,
    ("lightning", "gradient scaler"): RADIUS,
    ("lightning", "gradient scaler, fused"): RADIUS,
    ("lightning", "peft"): RADIUS,
    ("transformers", "usual"): RADIUS,
    ("transformers", "accumulation"): TRIGGERS,
    ("transformers", "gradient scaler"): RADIUS,
    ("transformers", "peft"): RADIUS,
    ("transformers", "label smoothing"): RADIUS,
    ("trl", "sft"): RADIUS,
    ("trl", "sft, accumulation"): RADIUS,
    ("trl", "grpo"): RADIUS,
    ("trl", "dpo"): RADIUS,
}


@pytest.mark.parametrize("cell", IN_SHADOW, ids=": ".join)
def test_a_controller_in_shadow_would_act_and_changes_no_bit(
    cell: tuple[str, str], tmp_path: Path
) -> None:
    expected = bare(*cell)
    watch = {"preset": "fast", "max_overhead": None, "control": IN_SHADOW[cell]}
    found = TRAININGS[cell](watch, tmp_path)
    assert differences(expected.states, found.states) == []
    assert hooks_left(found) == []
    assert found.run_dir is not None
    run = el.open_run(found.run_dir)
    assert run.status()[0].faults == {}
    events = [e for e in run.events().to_arrow().to_pylist() if e["kind"] == "control"]
    assert events
    assert {e["mode"] for e in events} == {"shadow"}
    looks = max(run.metrics("control/looks/count").to_arrow()["value"].to_pylist())
    assert looks > 0 or IN_SHADOW[cell] is TRIGGERS


@pytest.mark.parametrize(
    "cell",
    [
        ("plain", "usual"),
        ("plain", "gradient scaler, fused"),
        ("lightning", "automatic"),
        ("lightning", "accumulation"),
        ("lightning", "gradient scaler"),
        ("transformers", "usual"),
        ("transformers", "accumulation"),
        ("transformers", "gradient scaler"),
        ("trl", "sft"),
        ("trl", "grpo"),
    ],
    ids=": ".join,
)
def test_a_controller_that_enforces_leaves_a_healthy_training_alone(
    cell: tuple[str, str], tmp_path: Path
) -> None:
    expected = bare(*cell)
    control = el.StepBound(mode="enforce", warmup=4)
    found = TRAININGS[cell]({"preset": "fast", "max_overhead": None, "control": control}, tmp_path)
    assert differences(expected.states, found.states) == []
    assert found.run_dir is not None
    scales = el.open_run(found.run_dir).metrics("control/step_scale").to_arrow()["value"]
    assert set(scales.to_pylist()) == {1.0}


def test_the_comparison_sees_a_single_bit() -> None:
    outcome = bare("plain", "usual")
    changed = {**outcome.states, "weights": dict(outcome.states["weights"])}
    name = next(iter(changed["weights"]))
    changed["weights"][name] = weight = changed["weights"][name].clone()
    weight.view(-1)[0] = torch.nextafter(weight.view(-1)[0], torch.tensor(1.0))
    assert differences(outcome.states, changed) == [f"/weights/{name}"]
    assert differences(outcome.states, {**outcome.states, "losses": []}) != []


def test_left_hooks_would_be_seen(tmp_path: Path) -> None:
    outcome = bare("plain", "usual")
    lens = el.Lens(outcome.model, outcome.optimizers[0], run_dir=tmp_path / "run")
    assert len(hooks_left(outcome)) == 4
    lens.close()
    assert hooks_left(outcome) == []
