import torch
from readings import step

from entropylens.diagnostics.training_vitals import TrainingVitals
from entropylens.registry import StepReading


def rows(reading: StepReading) -> dict[tuple[str, str], float]:
    blocks, _ = TrainingVitals().measure(reading, None)
    found = {}
    for block in blocks:
        modules = block.columns["module"] or [""] * len(block.columns["name"])
        triples = zip(block.columns["name"], modules, block.columns["value"], strict=True)
        found.update({(name, module): float(value) for name, module, value in triples})
    return found


def test_what_is_known_is_written_in_its_unit() -> None:
    found = rows(step())
    assert found["loss/mean", ""] == 2.5
    assert found["gradient/norm/before_clip", ""] == 1.5
    assert found["learning_rate", "0"] == 1e-3
    assert found["learning_rate", "1"] == 1e-4
    assert found["tokens/seen", ""] == 1000
    assert found["throughput/tokens_per_second", ""] == 200.0
    assert found["memory/device/allocated", ""] == 1.0
    assert found["memory/process/resident", ""] == 2.0
    assert found["overhead/fraction", ""] == 0.01


def test_what_is_unknown_is_absent() -> None:
    assert rows(StepReading()) == {}


def test_one_parameter_group_has_no_module() -> None:
    assert rows(StepReading(learning_rates=[0.5])) == {("learning_rate", ""): 0.5}


def test_a_rate_that_is_a_tensor_is_not_read_on_the_host() -> None:
    rates: list[torch.Tensor | float] = [torch.tensor(0.5), 0.25]
    found = rows(StepReading(learning_rates=rates))
    assert found == {("learning_rate", "0"): 0.5, ("learning_rate", "1"): 0.25}
    device = StepReading(learning_rates=[torch.tensor(0.5, device="meta")])
    (block,), _ = TrainingVitals().measure(device, None)
    assert block.columns["value"].device.type == "meta"
