"""No line of ours waits for the device in any step of any training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from untouched import in_lightning, in_transformers, tiny  # noqa: F401 - they register trainings
from untouched.test_untouched import WATCHES
from untouched.trainings import STEPS, TRAININGS
from untouched.waits import watched_for_waits

import entropylens as el
from entropylens.registry import all_diagnostics

pytestmark = pytest.mark.filterwarnings("ignore")

# A dispatch mode and a compiler exclude each other.
CELLS = [cell for cell in sorted(TRAININGS) if "compiled" not in cell[1]]


@pytest.mark.parametrize(("adapter", "mode"), CELLS, ids=[": ".join(cell) for cell in CELLS])
def test_no_step_waits_for_the_device(adapter: str, mode: str, tmp_path: Path) -> None:
    with watched_for_waits() as waits:
        TRAININGS[adapter, mode]({**WATCHES["full"], "max_overhead": None}, tmp_path)
    assert waits.found == []
    assert waits.theirs > 0


@pytest.mark.parametrize(
    "wait",
    [
        "t.sum().item()",
        "float(t.sum())",
        "1 if (t > 0).any() else 0",
        "t.nonzero()",
        "t[t > 0]",
        "t.clone().__setitem__(t > 0, 1.0)",
        "t.masked_select(t > 0)",
        "t.unique()",
        "t.equal(t)",
        "t.tolist()",
        "t.numpy()",
        "t.cpu()",
        "t.to('cpu')",
        "t.to(device='cpu', dtype=t.dtype)",
    ],
)
def test_a_diagnostic_that_waits_is_found(
    wait: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = (
        f"def measure(self, reading, state):\n    t = reading.entropy\n    {wait}\n    return [], 0"
    )
    planted = Path(el.__file__).parent / "planted.py"
    place: dict[str, Any] = {}
    exec(compile(source, str(planted), "exec"), place)
    monkeypatch.setattr(type(all_diagnostics()["surprisal"]), "measure", place["measure"])
    with watched_for_waits() as waits:
        TRAININGS["plain", "usual"]({"preset": "full", "max_overhead": None}, tmp_path)
    assert len(waits.found) >= STEPS
    assert all("planted.py:3 measure" in line for line in waits.found)


@pytest.mark.parametrize("mode", ["shadow", "enforce"])
def test_a_controller_waits_once_in_an_ordinary_step(mode: str, tmp_path: Path) -> None:
    """And once more where it measures the update: the first eight, then every eighth."""
    control = el.StepBound(mode=mode)
    model, batches = tiny.Perceptron(), tiny.class_batches()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    waited = []
    lens = el.Lens(model, optimizer, run_dir=tmp_path / "run", max_overhead=None, control=control)
    with lens, watched_for_waits() as waits:
        for _ in range(40):
            features, classes = next(batches)
            logits = model(features)
            loss = torch.nn.functional.cross_entropy(logits, classes)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            lens.observe(logits=logits, targets=classes, loss=loss, gradient_norm=norm)
            optimizer.step()
            optimizer.zero_grad()
            lens.step()
            # An item() is seen twice: the method, and the operation behind it.
            waited.append(sum(not line.startswith("aten::") for line in waits.found))
            waits.found.clear()
    assert waited == [2 if n < 8 or n % 8 == 0 else 1 for n in range(40)]


def test_dtype_conversions_and_integer_indices_are_no_waits(tmp_path: Path) -> None:
    with watched_for_waits() as waits:
        tensor = torch.arange(4.0)
        tensor.to(torch.float64)[torch.tensor([1, 2])].topk(1)
    assert (waits.found, waits.theirs) == ([], 0)
