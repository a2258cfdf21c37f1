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
        if name != "sparse":
            assert steps == set(range(1, STEPS + 1 + extra))


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
    assert len(hooks_left(outcome)) == 3
    lens.close()
    assert hooks_left(outcome) == []
