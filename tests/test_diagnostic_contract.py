"""What holds for every registered diagnostic, whoever wrote it."""

import re
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from readings import READINGS

from entropylens.records import SCHEMAS
from entropylens.registry import Block, Diagnostic, Lookup, Scalars, all_diagnostics
from entropylens.schedule import PRESETS
from entropylens.transfer import Stamp, Transfer

TESTS = Path(__file__).parent
DIAGNOSTICS = sorted(all_diagnostics().items())
every_diagnostic = pytest.mark.parametrize(
    "found", [d for _, d in DIAGNOSTICS], ids=[name for name, _ in DIAGNOSTICS]
)


def measured(found: Diagnostic, device: str) -> list[Block]:
    """Of two steps: some compare a step with the one before."""
    first, state = found.measure(READINGS[found.reads](device), found.initial_state())
    second, _ = found.measure(READINGS[found.reads](device), state)
    return first + second


def tensors(blocks: list[Block]) -> list[torch.Tensor]:
    values = [value for block in blocks for value in block.columns.values()]
    values += [value.index for value in values if isinstance(value, Lookup)]
    values += [one for value in values if isinstance(value, Scalars) for one in value.values]
    return [value for value in values if isinstance(value, torch.Tensor)]


@every_diagnostic
def test_it_never_waits_for_the_host(found: Diagnostic) -> None:
    """The meta device has no data, so whatever reads a value there fails."""
    blocks = measured(found, "meta")
    assert blocks
    assert all(tensor.device.type == "meta" for tensor in tensors(blocks))


@every_diagnostic
def test_its_rows_fit_the_schema_of_their_table(found: Diagnostic) -> None:
    arrived: list[tuple[str, dict[str, object]]] = []
    transfer = Transfer(lambda table, columns: arrived.append((table, columns)))
    for block in measured(found, "cpu"):
        transfer.add(block, Stamp(1, 0.0, "train"))
    transfer.flush(wait=True)
    assert arrived
    for table, columns in arrived:
        assert set(columns) <= set(SCHEMAS[table].names)
        lengths = {len(c) for c in columns.values() if isinstance(c, list | tuple | np.ndarray)
                   and np.ndim(c)}  # fmt: skip
        assert len(lengths) == 1


@every_diagnostic
def test_every_name_it_writes_is_in_its_dictionary(found: Diagnostic) -> None:
    for block in measured(found, "cpu"):
        for name in block.columns.get("name", []):
            assert any(fnmatchcase(name, known) for known in found.metrics), name


@every_diagnostic
def test_its_definitions_say_something(found: Diagnostic) -> None:
    for name, metric in found.metrics.items():
        empty = [field for field, text in vars(metric).items() if not str(text).strip()]
        assert not empty, f"{name}: {empty}"
        assert metric.question.endswith("?"), name


@every_diagnostic
def test_it_draws_no_random_numbers_of_the_training(found: Diagnostic) -> None:
    before = torch.get_rng_state()
    measured(found, "cpu")
    assert torch.equal(before, torch.get_rng_state())


@every_diagnostic
def test_it_has_a_schedule_for_every_preset_and_its_own_test_file(found: Diagnostic) -> None:
    assert set(found.schedules) == set(PRESETS)
    assert any(schedule.every for schedule in found.schedules.values())
    assert (TESTS / "diagnostics" / f"test_{found.name}.py").exists()


@every_diagnostic
def test_its_public_functions_say_what_they_answer(found: Diagnostic) -> None:
    module = import_module(type(found).__module__)
    for name in module.__all__:
        thing = getattr(module, name)
        if callable(thing) and not isinstance(thing, type):
            doc = thing.__doc__ or ""
            for section in ("Args:", "Returns:", "Device:", "Cost:"):
                assert section in doc, f"{name}: {section}"
            assert doc.splitlines()[0].endswith("?"), f"{name}: open with the question it answers"


def test_no_metric_name_is_both_a_leaf_and_a_folder() -> None:
    names = [name for _, found in DIAGNOSTICS for name in found.metrics]
    assert len(names) == len(set(names))
    for name in names:
        assert re.fullmatch(r"[a-z0-9_*]+(/[a-z0-9_*]+)*", name)
        assert not any(other.startswith(name + "/") for other in names), name
